"""Targets that are class probabilities: the sum of the classes' losses, each with its share."""

from __future__ import annotations

import math

import pytest
import torch

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # formulas in plain PyTorch
NAMES = [name for name, entry in fl.LOSSES.items() if entry.takes_probabilities]
ROWS, CLASSES = 6, 5


def problem(shape=(ROWS, CLASSES), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=dtype)
    share = torch.softmax(torch.randn(shape, generator=generator, dtype=torch.float64), 1)
    return logits.requires_grad_(), share


def expected(name, logits, share, weight=None, sample_weight=None):
    """Row losses, one class at a time by the loss of class indices."""
    total = 0.0
    for k in range(share.shape[1]):
        target = torch.full_like(share[:, 0], k, dtype=torch.int64)
        factor = 1.0 if weight is None else weight[k]
        total = total + share[:, k] * factor * fl.LOSSES[name].reference(logits, target, reduction="none")
    return total if sample_weight is None else total * sample_weight


def test_which_losses_take_them():
    # Functions of log p_y and of the mean log-probability.
    assert [name for name, entry in fl.LOSSES.items() if entry.sums is not None and "terms" not in entry.sums] == NAMES


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(ROWS, CLASSES), (3, CLASSES, 2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_sum_of_the_classes_losses(name, shape, reduction):
    logits, share = problem(shape)
    weight, samples = torch.rand(CLASSES, dtype=torch.float64), torch.rand(share[:, 0].shape, dtype=torch.float64)
    rows = expected(name, logits, share, weight, samples)
    divisor = samples.sum() if reduction == "mean" else 1.0
    want = rows if reduction == "none" else rows.sum() / divisor
    for made in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        value = made(logits, share, weight=weight, sample_weight=samples, reduction=reduction)
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (value, want)))


@pytest.mark.parametrize("name", NAMES)
def test_certain_labels_are_class_indices(name):
    logits, _ = problem()
    target = torch.arange(ROWS) % CLASSES
    one_hot = torch.nn.functional.one_hot(target, CLASSES).double()
    masked = logits.detach().clone()
    masked[:, 4] = -math.inf  # where the share is 0
    for z, y, u in ((logits, target, one_hot), (masked[:4], target[:4], one_hot[:4])):
        if z is not logits and name.startswith("nce"):
            continue  # the sum over classes is infinite
        z = z.detach().requires_grad_()
        losses = [fl.LOSSES[name].module()(z, labels) for labels in (y, u)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes(name, dtype):
    logits, share = problem(dtype=dtype)
    value = fl.LOSSES[name].function(logits, share.to(torch.float32))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected(name, logits.double(), share).mean(), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(value, logits)[0].dtype == dtype


def test_what_needs_one_label_is_refused():
    logits, share = problem()
    for name in NAMES:
        with pytest.raises(ValueError, match="logit_bias is not supported for class probabilities"):
            fl.LOSSES[name].function(logits, share, logit_bias=1.0)
        with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target, got 1"):
            fl.LOSSES[name].function(logits, share, ignore_index=1)
