"""Losses and gradients against float64 references and hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GRAD_FLOOR, GRAD_TOLERANCE, LOSS_TOLERANCE

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", fl.LOSSES)
def test_matches_float64_reference(name, shape, dtype, device):
    logits, target, weight, sample_weight = make_problem(shape, dtype, device)
    for reduction in fl.LOSSES[name].reductions:
        check_against_float64(fl.LOSSES[name], logits, target, reduction=reduction)
    options = {"weight": weight, "sample_weight": sample_weight, "logit_bias": 1.5}
    for reduction in fl.LOSSES[name].reductions:
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


def bi_tempered_by_hand():
    """Defaults t1 = 0.8, t2 = 1.2: exp_t2(x) = (1 - x / 5)^-5, log_t1(x) = 5 (x^(1/5) - 1)."""

    def total(x):
        return 1 + (1 - x / 5) ** -5  # the other logit, shifted by the maximum, is 0

    x = -math.log(3)
    for _ in range(5):
        x = -math.log(3) * total(x) ** -0.2
    root = 5 * (total(x) ** 0.2 - 1)  # -log_t2(1 / total)
    p = (1 + (math.log(3) + root) / 5) ** -5, (1 + root / 5) ** -5
    return 5 * (1 - p[0] ** 0.2) - (1 - p[0] ** 1.2 - p[1] ** 1.2) / 1.2


NCE = math.log(4) / (math.log(4) + math.log(4 / 3))
NFL = math.sqrt(0.75) * math.log(4) / (math.sqrt(0.75) * math.log(4) + math.sqrt(0.25) * math.log(4 / 3))
RCE = 0.75 * 4 * math.log(10)

# p_y = 1/4: logits (0, log 3) and label 0.
HAND_WORKED = {
    "cross_entropy": math.log(4),
    "mae": 1.5,
    "gce": (1 - 0.25**0.7) / 0.7,
    "agce": (1.6**0.6 - 0.85**0.6) / 0.6,
    "aue": (5.25**3 - 4.5**3) / 3,
    "ae": math.exp(-0.1),
    "rce": RCE,
    "sce": 0.1 * math.log(4) + RCE,
    "taylor_ce": 0.75 + 0.75**2 / 2,
    "phuber_ce": math.log(4),
    "js": (-0.5 * math.log(0.625) + 0.125 * math.log(0.4) + 0.375 * math.log(2)) / (0.5 * math.log(2)),
    "focal": 0.5625 * math.log(4),
    "bounded_ce": math.log(1.1 / 0.35),
    "nce": NCE,
    "nfl": NFL,
    "ngce": (1 - 0.25**0.7) / (2 - 0.25**0.7 - 0.75**0.7),
    "nce_mae": NCE + 0.75,
    "nce_rce": NCE + RCE,
    "nfl_mae": NFL + 0.75,
    "nfl_rce": NFL + RCE,
    "nce_agce": NCE + 4 * (7**1.5 - 6.25**1.5) / 1.5,
    "bi_tempered": bi_tempered_by_hand(),
    "hem": (math.log(3) + 0.2) / (1 + 1e-6) ** 2,  # one survivor, one active row
    "multi_margin": (math.log(3) + 1) / 2,
}


def test_every_loss_is_worked_by_hand():
    assert HAND_WORKED.keys() == fl.LOSSES.keys()


@pytest.mark.parametrize("name", HAND_WORKED)
def test_hand_worked(name, device):
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, device=device)
    target = torch.tensor([0], device=device)
    for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        assert function(logits, target).item() == pytest.approx(HAND_WORKED[name], rel=1e-12)


def test_names_agree_between_cpp_and_python():
    assert sorted(_C.loss_names()) == sorted(fl.loss_names()) == sorted(fl.LOSSES)
    for name, entry in fl.LOSSES.items():
        assert entry.name == entry.module.stem == name
