"""What the documentation says of LDR-KL: limits, bounds, logits far from 0. Values and gradients are tested with all
losses."""

from __future__ import annotations

import math

import pytest
import torch

import fused_losses as fl
from fused_losses import functional, reference

MADE = pytest.mark.parametrize("made", [functional, reference], ids=["functional", "reference"])


def rows(classes=6, dtype=torch.float64):
    logits = 3 * torch.randn(40, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits.to(dtype), torch.arange(40) % classes


def scores(logits):
    s = torch.nn.functional.softplus(logits, threshold=40)
    return s / s.mean(1, keepdim=True)


@MADE
def test_the_limits_of_the_temperature(made):
    logits, target = rows()
    h = scores(logits)
    errors = h - h.gather(1, target[:, None]) + 0.1
    errors[torch.arange(40), target] = 0.0
    cold = made.ldr_kl_loss(logits, target, temperature=1e-3, reduction="none")
    torch.testing.assert_close(cold, errors.amax(1), rtol=0, atol=2e-3)  # 1e-3 log 6
    hot = [made.ldr_kl_loss(logits, torch.full((40,), y), temperature=1e4, reduction="none") for y in range(6)]
    torch.testing.assert_close(hot[0][target == 0], errors.mean(1)[target == 0], rtol=0, atol=6**2 / 1e4)
    constant = torch.stack(hot).sum(0)  # symmetric: 6 * 1 - 6 + 5 * margin
    torch.testing.assert_close(constant, torch.full_like(constant, 0.5), rtol=0, atol=6**3 / 1e4)


@MADE
@pytest.mark.parametrize("temperature, margin", [(1.0, 0.1), (0.1, 10.0), (10.0, 0.5)])
def test_bounds(made, temperature, margin):
    wide = torch.tensor([[1e4, 0.0, 0.0], [0.0, -1e4, -1e4], [1e30, -1e30, 0.0]])
    for target in (torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])):
        values = made.ldr_kl_loss(wide, target, temperature=temperature, margin=margin, reduction="none")
        assert (values >= -temperature * math.log(3) - 1e-5).all() and (values <= 3 + margin).all()


@MADE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_far_below_zero_only_differences_matter(made, dtype):
    """There h is C times the softmax."""
    logits, target = rows(dtype=dtype)
    probabilities = 6 * torch.softmax(logits.double(), 1)
    errors = probabilities - probabilities.gather(1, target[:, None]) + 0.1
    errors[torch.arange(40), target] = 0.0
    expected = torch.exp(errors).mean(1).log()
    for shift in (-60.0, -1024.0):
        x = (logits + shift).requires_grad_()
        value = made.ldr_kl_loss(x, target, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), x)
        shifted = (x.detach().double() - shift).requires_grad_()
        exact = functional.ldr_kl_loss(shifted + shift, target, reduction="none")
        (exact_grad,) = torch.autograd.grad(exact.sum(), shifted)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-3)  # 1024 leaves 13 bits of a float


def test_a_margin_that_float32_cannot_compute():
    message = r"^margin must be at most 100 times the temperature 0.01, where float32 can compute it, got 1.1$"
    for made in (
        fl.LDRKLLoss,
        lambda **own: functional.ldr_kl_loss(torch.zeros(1, 2), torch.tensor([0]), **own),
    ):
        with pytest.raises(ValueError, match=message):
            made(temperature=0.01, margin=1.1)
        made(temperature=0.01, margin=1.0)
