"""Calls that raise leave a criterion's memory as it was, and say what is wrong."""

from __future__ import annotations

import pytest
import torch
from test_state import CLASSES, KINDS, MAKE, ROWS, batch

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # what a criterion remembers

INTEGERS = torch.ones(ROWS, dtype=torch.int64)
WRONG_CALLS = {
    "ce": [
        lambda m, x, y: m(x + 9, torch.where(y == 0, CLASSES, y)),
        lambda m, x, y: m(x + 9, y, INTEGERS),
        lambda m, x, y: m(x + 9, y, torch.ones(3)),
        lambda m, x, y: m(x + 9, y[:, None]),
        lambda m, x, y: m(x.long(), y),
    ],
    "bce": [
        lambda m, x, y: m(x + 9, y * 2),
        lambda m, x, y: m(x + 9, y, INTEGERS),
        lambda m, x, y: m(x + 9, y[:, 0]),
    ],
    "mse": [lambda m, x, y: m(x, y + 9, INTEGERS), lambda m, x, y: m(x, y > 0)],
}
WRONG_OPTIONS = {
    "ce": [{"weight": torch.ones(3)}, {"threshold": torch.ones(3)}, {"base": fl.HEMLoss(torch.ones(3))}],
    "bce": [{"pos_weight": torch.ones(3)}, {"pos_weight": torch.ones(1, dtype=torch.int64)}],
    "mse": [{"threshold": torch.ones(3), "per_task": True}],
}
CLASS_OF = {"ce": fl.ZErrorCrossEntropyLoss, "bce": fl.ZErrorBCEWithLogitsLoss, "mse": fl.ZMSELoss}


@pytest.mark.parametrize("times", [1, 100], ids=["small", "large"])  # small calls have an operator of their own
@pytest.mark.parametrize(
    "kind, options",
    [("bce", {}), ("mse", {}), *(("ce", {"statistic": statistic}) for statistic in ("logit", "prob", "loss"))],
    ids=str,
)
def test_a_call_that_raises_teaches_nothing(kind, options, times):
    x, y = (tensor.repeat_interleave(times, 0) for tensor in batch(kind))
    module = CLASS_OF[kind](running=True, **options)
    module(x, y)
    before = module.running_moments.clone()
    for call in WRONG_CALLS[kind]:
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call(module, x, y)
        assert torch.equal(module.running_moments, before)
    for wrong in WRONG_OPTIONS[kind]:
        module = CLASS_OF[kind](running=True, **options, **wrong)
        with pytest.raises((RuntimeError, ValueError)):
            module(x, y)
        assert module.running_moments.sum() == 0


def test_a_memory_of_predictions_learns_nothing_from_a_call_that_raises():
    module = fl.ELRLoss(ROWS, CLASSES)
    x, y = batch("ce")
    index = torch.arange(ROWS)
    module(x, y, index)
    before = module.memory.clone()
    for call in (
        lambda: module(x + 1, torch.where(y == 0, CLASSES, y), index),
        lambda: module(x + 1, y, index, INTEGERS),
        lambda: module(x + 1, y, index + 1),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            call()
        assert torch.equal(module.memory, before)


def test_running_statistics_are_those_of_the_moment():
    module = fl.ZMSELoss(running=True, momentum=0.0)
    x, y = batch("mse")
    module(x, y)
    found = module.running_statistics
    count = found.count.clone()
    module(x, y + 5)
    assert torch.equal(found.count, count) and module.running_statistics.count > count


def test_errors_name_the_mistake():
    x, y = batch("ce")
    module = fl.ZErrorCrossEntropyLoss(running=True)
    with pytest.raises(RuntimeError, match=r"pass target.squeeze\(1\)"):
        module(x, y[:, None])
    with pytest.raises(RuntimeError, match=r"logits must be float64, .* got torch.int64"):
        module(x.long(), y)
    with pytest.raises(ValueError, match="or a tensor with one per task, got a list of 3"):
        fl.ZErrorBCEWithLogitsLoss([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"one number per task \(2\), got shape \[3\]"):
        fl.ZMSELoss([1.0, 2.0, 3.0], per_task=True, num_tasks=2)
    predictions = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    lists = fl.ZMSELoss([1.0, 2.0], per_task=True, num_tasks=2)(predictions, predictions**2)
    assert lists == fl.ZMSELoss(torch.tensor([1.0, 2.0]), per_task=True)(predictions, predictions**2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_assigned_momentum_is_checked(kind):
    module = MAKE[kind]()
    with pytest.raises(ValueError, match=r"momentum must be between 0.0 and 1.0, got 5.0"):
        module.momentum = 5.0
    module(*batch(kind))
    assert module.momentum == 0.1
