"""A logit of -inf: every path, kernel or reference, float or double, rows or pixels, gives one answer."""

from __future__ import annotations

import math

import pytest
import torch
from test_edge_cases import WITH_MARGIN, WITH_MEAN_LOG

import fused_losses as fl

OUT = -math.inf
LOGITS = torch.tensor([[1.0, OUT, 0.0], [1.0, OUT, 0.0], [OUT, 0.0, 1.0], [OUT, OUT, 1.0], [OUT, OUT, OUT]])
TARGET = torch.tensor([0, 1, 1, 0, 0])
PARAMETERS = [{}, {"detach": False}, {"gamma": 0.0}, {"gamma": 2.0, "detach": False}, {"gamma": 0.5}, {"alpha": 0.0},
              {"beta": 0.0}, {"label_smoothing": 0.3}, {"label_smoothing": 1.0}, {"t1": 1.0, "t2": 1.0},
              {"t1": 1.0, "t2": 0.8}, {"t1": 1.0, "t2": 0.8, "label_smoothing": 0.5}, {"t1": 0.5, "t2": 0.8},
              {"t1": 1.0, "t2": 1.3, "label_smoothing": 0.3}]  # fmt: skip
WEIGHTS = [None, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 1.0, 2.0])]
CASES = [(name, own, weight) for name, entry in fl.LOSSES.items() for own in PARAMETERS for weight in WEIGHTS
         if own.keys() <= entry.parameters.keys()]  # fmt: skip


def run(function, logits, target, **options):
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(x, target, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach().double().reshape(-1), grad.double().reshape(len(target), -1)


@pytest.mark.parametrize("name, own, weight", CASES)
def test_one_answer_on_every_path(name, own, weight, device):
    entry = fl.LOSSES[name]
    logits, target = LOGITS.to(device), TARGET.to(device)
    options = own | {"weight": None if weight is None else weight.to(device)}
    expected = run(entry.reference, logits.double(), target, **options)
    pixels = logits.t().contiguous().t()[:, :, None]
    many = torch.cat([logits, torch.full((len(logits), 197), OUT, device=device)], 1)
    paths = {
        "float": run(entry.function, logits, target, **options),
        "double": run(entry.function, logits.double(), target, **options),
        "pixels": run(entry.function, pixels, target[:, None], **options),
        "reference": run(entry.reference, logits, target, **options),
    }
    for path, (loss, grad) in paths.items():
        torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6, equal_nan=True, msg=f"{path} loss")
        torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-6, equal_nan=True, msg=f"{path} gradient")
    if weight is None and name not in WITH_MARGIN:  # those divide by the number of classes
        wide = run(entry.function, many, target, **options), run(entry.reference, many.double(), target, **options)
        # What cancels in a gradient of ldr_kl is multiplied by a class's slope over the mean score, here 111.
        atol = 2e-5 if name == "ldr_kl" else 1e-6
        for actual, exact in zip(*wide, strict=True):
            torch.testing.assert_close(actual, exact, rtol=1e-5, atol=atol, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in fl.LOSSES if name not in WITH_MEAN_LOG])
def test_masked_classes_have_no_gradient(name, device):
    for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        _, grad = run(function, LOGITS[[0, 2]].to(device), TARGET[[0, 2]].to(device))
        assert grad[0, 1] == 0 and grad[1, 0] == 0 and grad.isfinite().all()


def test_label_smoothing_leaves_out_masked_classes_of_weight_zero():
    logits, target = torch.tensor([[1.0, OUT, 0.0]]), torch.tensor([0])
    weight = torch.tensor([1.0, 0.0, 1.0])
    log_p = torch.log_softmax(torch.tensor([1.0, 0.0]), 0)
    expected = -0.7 * log_p[0] - 0.1 * log_p.sum()
    for function in (fl.functional.cross_entropy, fl.reference.cross_entropy):
        loss = function(logits, target, weight=weight, label_smoothing=0.3)
        torch.testing.assert_close(loss, expected)
        assert function(logits, target, label_smoothing=0.3) == math.inf


def test_a_smoothed_label_on_a_class_without_probability_is_infinitely_far_off():
    for function in (fl.functional.bi_tempered_loss, fl.reference.bi_tempered_loss):
        loss = function(torch.tensor([[10.0, 0.0]]), torch.tensor([1]), t1=1.0, t2=0.8, label_smoothing=0.5)
        assert loss == math.inf
