"""LogitNorm and LogitClip: every dtype and layout of logits, against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fused_losses as fl

# What logits and gradients are rounded to; sums of 300 products in float32 lose no more than 2e-5.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LAYOUTS = {
    "rows": lambda z: z,
    "gaps": lambda z: torch.stack([z, z], -1)[..., 0],
    "channels last": lambda z: z.transpose(1, -1).contiguous().transpose(1, -1),
}


def rescaled(z, parameter, clips):
    """Rows of float64, zeros for masked classes."""
    norm = z.square().sum(1, keepdim=True).sqrt()
    return z * (parameter / norm).clamp(max=1.0) if clips else z / (parameter * (norm + 1e-7))


@pytest.mark.parametrize("clips", [False, True], ids=["norm", "clip"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(9, 2), (9, 10), (5, 300), (2, 19, 3, 2)])
def test_every_dtype_and_layout(shape, layout, dtype, clips):
    generator = torch.Generator().manual_seed(sum(shape))
    z = (torch.randn(shape, generator=generator) * torch.rand(shape[:1] + (1,) * (len(shape) - 1))).to(dtype)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    target.view(-1)[1] = -100
    upstream = torch.randn(shape, generator=generator).to(dtype).double()
    masked = torch.zeros(shape, dtype=torch.bool)
    if shape[1] > 2:
        masked[0, 1] = True  # and an ignored row may hold anything
        z[0, 1], z.movedim(1, -1).reshape(-1, shape[1])[1] = -math.inf, math.nan
    parameter = 1.5 if clips else 0.7
    criterion = fl.LogitClip("gce", parameter) if clips else fl.LogitNorm("gce", parameter)

    ignored = (target == -100).unsqueeze(1)
    exact = torch.where(ignored, 1.0, torch.where(masked, 0.0, z.double())).requires_grad_()
    expected = rescaled(exact, parameter, clips)
    (right,) = torch.autograd.grad(expected, exact, torch.where(ignored, 0.0, upstream))

    leaf = LAYOUTS[layout](z.clone()).detach().requires_grad_()
    given = leaf if layout != "gaps" else LAYOUTS[layout](leaf)
    found = criterion.rescale(given, target)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (grad,) = torch.autograd.grad(found, leaf, upstream.to(found.dtype))
    assert found.isfinite()[ignored.expand(shape)].all()
    kept = torch.where(ignored, 0.0, found.detach().double())
    wanted = torch.where(ignored, 0.0, torch.where(masked, -math.inf, expected.detach()))
    torch.testing.assert_close(kept, wanted, rtol=1e-6, atol=1e-6)
    grad = torch.where(masked | ignored, 0.0, grad.double())
    size = float(right.abs().max())
    torch.testing.assert_close(grad, torch.where(masked, 0.0, right), rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * size)


def test_the_gradient_does_not_depend_on_the_layout_of_the_one_that_comes_in():
    z, target = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    leaf = z.requires_grad_()
    found = fl.LogitNorm("gce", 0.5).rescale(leaf, target)
    upstream = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad(found, leaf, given, retain_graph=True)[0]
        for given in (upstream, upstream.T.contiguous().T, upstream[:1].expand(6, 40).clone())
    ]
    assert torch.equal(grads[0], grads[1])
    expanded = torch.autograd.grad(found, leaf, upstream[:1].expand(6, 40))[0]
    assert torch.equal(grads[2], expanded)


@pytest.mark.parametrize("criterion", [fl.LogitNorm("gce", t=0.5), fl.LogitClip(fl.NFLLoss(), 2.0)])
def test_the_reduction_is_that_of_the_loss(criterion):
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    mean = criterion(logits, target)
    criterion.reduction = "none"
    assert criterion.loss.reduction == "none"
    assert torch.allclose(criterion(logits, target).mean(), mean)


SECOND = [lambda loss: fl.LogitNorm(loss, t=0.5), lambda loss: fl.LogitClip(loss, 1.0)]


@pytest.mark.parametrize("name", ["gce", "nce"])  # in one read, and around another loss
@pytest.mark.parametrize("make", SECOND)
def test_second_derivatives_of_short_and_of_long_rows(make, name):
    z, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    z *= torch.tensor([0.1, 0.5, 3.0]).double().unsqueeze(1) / z.norm(dim=1, keepdim=True)
    loss, leaf = make(name), z.requires_grad_()
    first, differentiable = (
        torch.autograd.grad(loss(leaf, target), leaf, create_graph=graph)[0] for graph in (False, True)
    )
    torch.testing.assert_close(differentiable, first)
    assert torch.autograd.gradgradcheck(loss, (leaf, target))


@pytest.mark.parametrize("name", ["gce", "nce"])
@pytest.mark.parametrize("make", SECOND)
def test_ignored_rows_have_no_second_derivative_whatever_they_hold(make, name):
    z, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, -100, 2])
    kept = z[[0, 2]].clone().requires_grad_()
    z[1] = math.nan
    seconds = []
    for logits, labels in ((z.requires_grad_(), target), (kept, target[[0, 2]])):
        (first,) = torch.autograd.grad(make(name)(logits, labels), logits, create_graph=True)
        seconds += torch.autograd.grad(first.square().sum(), logits)
    torch.testing.assert_close(seconds[0][[0, 2]], seconds[1])
    assert not seconds[0][1].any()
