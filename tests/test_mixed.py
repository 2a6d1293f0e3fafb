"""functional.mixed against the loss of each label, row by row."""

from __future__ import annotations

import itertools

import pytest
import torch

import fused_losses as fl


@pytest.fixture
def batch(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    a, b = (torch.randint(5, (6,), generator=generator).to(device) for _ in range(2))
    a[1] = b[1] = b[2] = -100
    return logits, a, b, torch.rand(6, generator=generator, dtype=torch.float64).to(device)


def value_and_grad(loss, logits):
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize("name", fl.LOSSES)
def test_by_rows(name, batch):
    logits, a, b, lam = batch
    entry = fl.LOSSES[name]
    weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=logits.device)
    samples = torch.linspace(0.2, 2.0, 6, dtype=torch.float64, device=logits.device)
    for own, reduction in itertools.product(
        ({}, {"weight": weight, "sample_weight": samples}), ("none", "sum", "mean")
    ):
        rows = [entry.reference(logits, target, reduction="none", **own) for target in (a, b)]
        expected = lam * rows[0] + (1.0 - lam) * rows[1]
        if reduction != "none":
            expected = expected.sum()
        if reduction == "mean":
            shares = (lam, a), (1.0 - lam, b)
            of_class = own.get("weight", torch.ones_like(weight))
            of_row = own.get("sample_weight", torch.ones_like(samples))
            expected = expected / sum((x * of_row * of_class[y.clamp(min=0)])[y >= 0].sum() for x, y in shares)
        actual = fl.functional.mixed(name, logits, a, b, lam, reduction=reduction, **own)
        for x, y in zip(value_and_grad(actual, logits), value_and_grad(expected, logits), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", fl.LOSSES)
def test_one_factor_for_all_rows(name, batch):
    logits, a, b, _ = batch
    entry = fl.LOSSES[name]
    parts = [entry.function(logits, target, reduction="mean") for target in (a, b)]
    for lam in (0.0, 0.3, 1.0, torch.tensor(0.3, device=logits.device)):
        for loss in (name, entry.function):
            actual = fl.functional.mixed(loss, logits, a, b, lam, reduction="mean")
            torch.testing.assert_close(actual, (lam * parts[0] + (1.0 - lam) * parts[1]).to(actual.dtype))


def test_options_of_a_module(batch):
    logits, a, b, lam = batch
    weight = torch.rand(5, device=logits.device)
    module = fl.GCELoss(q=0.4, weight=weight, reduction="sum")
    actual = fl.functional.mixed(module, logits, a, b, lam)
    torch.testing.assert_close(
        actual, fl.functional.mixed("gce_loss", logits, a, b, lam, q=0.4, weight=weight, reduction="sum")
    )


def test_dense_targets_say_the_same_of_cross_entropy(batch):
    logits, a, b, lam = batch
    a, b = a.clamp(min=0), b.clamp(min=0)
    one_hot = torch.nn.functional.one_hot
    dense = lam[:, None] * one_hot(a, 5) + (1.0 - lam[:, None]) * one_hot(b, 5)
    torch.testing.assert_close(
        fl.functional.mixed("cross_entropy", logits, a, b, lam), torch.nn.functional.cross_entropy(logits, dense)
    )


def test_bad_input(batch):
    logits, a, b, lam = batch
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"^lam must be between 0.0 and 1.0, got "):
            fl.functional.mixed("gce", logits, a, b, wrong)
    with pytest.raises(RuntimeError, match=r"^lam must be a number, 0-dim or of the shape of target_a"):
        fl.functional.mixed("gce", logits, a, b, lam[:2])
    with pytest.raises(ValueError, match=r"^loss must be one of cross_entropy, "):
        fl.functional.mixed("nonsense", logits, a, b, lam)
    with pytest.raises(TypeError, match=r"^loss must be a name, a function or a Module of a row loss, got MSELoss"):
        fl.functional.mixed(torch.nn.MSELoss(), logits, a, b, lam)
    with pytest.raises(ValueError, match=r"^reduction must be 'none', 'mean' or 'sum'"):
        fl.functional.mixed(fl.HEMLoss(), logits, a, b, lam)
