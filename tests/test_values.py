"""Losses and gradients against float64 references and hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GRAD_FLOOR, GRAD_TOLERANCE, LOSS_TOLERANCE, one_in
from naive import naive_losses

import fused_losses as fl
from fused_losses import _C

SHAPES = [(5,), (7, 5), (130, 10), (33, 100), (3, 1000), (3, 6, 4, 5), (2, 40, 70)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_problem(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    classes = shape[0] if len(shape) == 1 else shape[1]
    rows = shape[:1] * (len(shape) > 1) + shape[2:]
    target = torch.randint(0, classes, rows, generator=generator)
    if rows:
        target.view(-1)[0] = -100
    weight = torch.rand(classes, generator=generator) + 0.5
    sample_weight = torch.rand(rows, generator=generator) + 0.5
    return logits.to(dtype).to(device), target.to(device), weight.to(device), sample_weight.to(device)


def check_against_float64(entry, logits, target, **options):
    x = logits.detach().clone().requires_grad_()
    loss = entry.function(x, target, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
    (grad,) = torch.autograd.grad(loss, x, upstream)

    exact = logits.detach().double().cpu().requires_grad_()
    moved = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = entry.reference(exact, target.cpu(), **moved)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream.double().cpu())

    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    error = (loss.double().cpu() - expected).abs() / (1 + expected.abs())
    assert error.max() <= LOSS_TOLERANCE[logits.dtype]
    scale = expected_grad.abs().max()
    allowed = GRAD_TOLERANCE[logits.dtype] * scale + GRAD_FLOOR[logits.dtype]
    assert ((grad.double().cpu() - expected_grad).abs() <= allowed).all()
    with torch.no_grad():
        assert torch.equal(entry.function(x, target, **options), loss)


# tests/cpp runs every loss's kernels over more of them.
@pytest.mark.parametrize(("name", "shape", "dtype"), one_in(4, fl.LOSSES, SHAPES, DTYPES))
def test_matches_float64_reference(name, shape, dtype, device):
    logits, target, weight, sample_weight = make_problem(shape, dtype, device)
    reductions = fl.LOSSES[name].reductions
    check_against_float64(fl.LOSSES[name], logits, target, reduction=reductions[SHAPES.index(shape) % len(reductions)])
    options = {"weight": weight, "sample_weight": sample_weight, "logit_bias": 1.5}
    for reduction in reductions:
        check_against_float64(fl.LOSSES[name], logits, target, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_label_smoothing_and_probabilities(shape, dtype, device):
    logits, target, weight, sample_weight = make_problem(shape, dtype, device)
    entry = fl.LOSSES["cross_entropy"]
    probabilities = torch.softmax(logits.double().flip(0), 0 if logits.dim() == 1 else 1)
    for reduction in ("none", "mean"):
        check_against_float64(entry, logits, target, reduction=reduction, label_smoothing=0.3, weight=weight)
        check_against_float64(
            entry, logits, target, reduction=reduction, label_smoothing=0.1, sample_weight=sample_weight
        )
        check_against_float64(
            entry, logits, probabilities.float(), reduction=reduction, label_smoothing=0.2, weight=weight
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(reduction, smoothing, weighted, device):
    logits, target, weight, _ = make_problem((40, 17), torch.float32, device)
    options = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight if weighted else None}
    torch.testing.assert_close(
        fl.functional.cross_entropy(logits, target, **options),
        torch.nn.functional.cross_entropy(logits, target, **options),
    )
    probabilities = torch.softmax(logits.flip(0), 1)
    torch.testing.assert_close(
        fl.functional.cross_entropy(logits, probabilities, **options),
        torch.nn.functional.cross_entropy(logits, probabilities, **options),
    )


def test_every_loss_has_a_published_formula():
    assert naive_losses().keys() == fl.LOSSES.keys()


@pytest.mark.parametrize("name", fl.LOSSES)
def test_hand_worked(name, device):
    # p_y = 1/4
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, device=device)
    target = torch.tensor([0], device=device)
    for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        assert function(logits, target).item() == pytest.approx(naive_losses()[name].hand_worked, rel=1e-12)


@pytest.mark.parametrize("name", fl.LOSSES)
def test_published_formula(name, device):
    logits, target, _, _ = make_problem((9, 6), torch.float64, device, seed=3)
    target = target.abs() % 6
    rows = [
        naive_losses()[name].row(fl.LOSSES[name].pack({}), z, y)
        for z, y in zip(logits.tolist(), target.tolist(), strict=True)
    ]
    for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        x = logits.clone().requires_grad_()
        loss = function(x, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
        for of_row, of_grad, (value, expected) in zip(loss.tolist(), grad.tolist(), rows, strict=True):
            assert of_row == pytest.approx(value, rel=1e-12, abs=1e-12)
            # bi_tempered's reference differentiates p, whose sum differs from 1 by the error of a few iterations.
            rough = 1e-3 if name == "bi_tempered" else 1e-11
            assert of_grad == pytest.approx(expected, rel=rough, abs=rough)


def test_cpp_and_python_agree():
    assert sorted(_C.loss_names()) == sorted(fl.loss_names()) == sorted(fl.LOSSES)
    for name, entry in fl.LOSSES.items():
        assert entry.name == entry.module.stem == name
        assert _C.loss_needs(name) == {
            "num_params": len(entry.pack({})),
            "min_classes": entry.min_classes,
            "has_margin": "active_mean" in entry.reductions,
        }
