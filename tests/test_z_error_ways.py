"""Ways of the Z-Error loss for classes: small calls have one operator for statistics and mask, large ones two."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

import fused_losses as fl
from fused_losses import _autograd, _ops, _z_autograd


def steps(module, dtype=torch.float32):
    """Two training steps and a step in eval mode: losses, gradients, running statistics."""
    torch.manual_seed(0)
    results = []
    for training in (True, True, False):
        module.train(training)
        logits = torch.randn(40, 3, dtype=dtype, requires_grad=True)
        target = torch.randint(-1, 3, (40,))
        loss = module(logits, target)
        upstream = torch.linspace(-1.0, 2.0, loss.numel()).reshape(loss.shape).to(loss)
        results += [loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]]
        with torch.no_grad():
            results.append(module.train(False)(logits, target))
    return results, [b for b in module.buffers() if b is not None]


GRID = list(itertools.product(("logit", "prob", "loss"), ("two", "lower"), ("drop", "keep"), (False, True)))


@pytest.mark.parametrize(("statistic", "sided", "small_class", "running"), GRID)
def test_small_calls_compute_what_others_do(statistic, sided, small_class, running, monkeypatch):
    options = {"sided": sided, "small_class": small_class, "running": running, "ignore_index": -1}
    modules = [
        fl.ZErrorCrossEntropyLoss(0.9, statistic, base, reduction=reduction, min_count=12, num_classes=3, **options)
        for base in ("cross_entropy",) + ("gce_loss",) * (statistic != "loss")
        for reduction in ("mean", "sum", "none")
    ]
    others = [copy.deepcopy(m) for m in modules]
    calls = []
    monkeypatch.setattr(
        "fused_losses.z_cross_entropy.z_error_kept_target",
        lambda *args: calls.append(1) or _ops.z_error_kept_target(*args),
    )
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    small = [steps(m, dtype) for m, dtype in zip(modules, itertools.cycle(dtypes))]
    assert len(calls) == len(modules) * (2 if running else 6)
    calls.clear()
    pickled = [pickle.loads(pickle.dumps(m)) for m in modules]
    monkeypatch.setattr(_autograd, "_MOST_LOGITS", -1)
    large = [steps(m, dtype) for m, dtype in zip(others, itertools.cycle(dtypes))]
    assert not calls
    torch.testing.assert_close(small, large, rtol=1e-6, atol=1e-7)
    assert [repr(m) for m in pickled] == [repr(m) for m in others]


NEW_VALUES = {
    "threshold": [0.5, torch.tensor([0.5, 9.0, 0.9])],
    "statistic": ["prob"],
    "base": ["mae", fl.GCELoss(q=0.2)],
    "sided": ["lower"],
    "min_count": [14],
    "small_class": ["drop"],
    "ignore_index": [1],
    "reduction": ["sum"],
    "logit_bias": [2.0, torch.tensor(2.0), "auto"],
    "weight": [torch.tensor([1.0, 2.0, 5.0])],
}


@pytest.mark.parametrize("option", NEW_VALUES)
def test_a_new_value_counts_from_the_next_call_on(option):
    torch.manual_seed(0)
    logits, target = 2 * torch.randn(40, 3), torch.randint(0, 3, (40,)).sort().values
    logits[target == 2, 2] += 3
    options = {"threshold": 1.5, "min_count": 13} | ({"min_count": 15} if option == "small_class" else {})
    for value in NEW_VALUES[option]:
        module = fl.ZErrorCrossEntropyLoss(**options)
        before = module(logits, target)
        setattr(module, option, value)
        expected = fl.ZErrorCrossEntropyLoss(**options | {option: value})(logits, target)
        assert not torch.equal(expected, before) or value == "auto"  # which is 0 for three classes
        assert torch.equal(module(logits, target), expected)


def test_a_number_that_becomes_a_buffer_counts_from_the_next_call_on():
    logits, target = torch.randn(40, 3), torch.randint(0, 3, (40,))
    for name in ("threshold", "logit_bias"):
        module = fl.ZErrorCrossEntropyLoss()
        module(logits, target)
        delattr(module, name)  # as schedules do
        module.register_buffer(name, torch.tensor(0.7))
        expected = fl.ZErrorCrossEntropyLoss(**{name: torch.tensor(0.7)})(logits, target)
        assert torch.equal(module(logits, target), expected)


def test_momentum_may_change():
    logits, target = torch.randn(2, 40, 3), torch.randint(0, 3, (40,))
    fresh, changed = fl.ZErrorCrossEntropyLoss(running=True, momentum=0.5), fl.ZErrorCrossEntropyLoss(running=True)
    for part in logits:
        fresh(part, target), changed(part, target)
        changed.momentum = 0.5
    torch.testing.assert_close(changed.running_moments, fresh.running_moments)


def test_the_operator_refuses_what_does_not_fit():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    constants = _ops.pack_z_error_constants((2.0, "logit", "both", 2, True, -100, 0.1))
    moments = torch.zeros(3, 3, dtype=torch.float64)
    for error, message, args in (
        (ValueError, r"logits must have shape \(N, C\)", (logits[0], target, None, constants)),
        (ValueError, "target must have the shape", (logits, target[:2], None, constants)),
        (ValueError, r"moments must have shape \(3, 3\)", (logits, target, moments[:, :2].contiguous(), constants)),
        (ValueError, "running must be contiguous", (logits, target, moments.t(), constants)),
        (RuntimeError, "moments must be float64", (logits, target, moments.float(), constants)),
        (RuntimeError, "constants must come from z_error_constants", (logits, target, None, constants[1:])),
    ):
        with pytest.raises(error, match=message):
            _ops.z_error_kept_target(*args)
    with pytest.raises(ValueError, match="statistic must be 'logit', 'prob' or 'loss', got 'x'"):
        _ops.pack_z_error_constants((2.0, "x", "both", 2, True, -100, 0.1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("base", ["cross_entropy", "nce_mae"])
def test_large_batches_are_judged_before_their_losses_are_known(base, reduction, device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 40, generator=generator).to(device).requires_grad_()
    target = torch.randint(0, 40, (400,), generator=generator).to(device)
    module = fl.ZErrorCrossEntropyLoss(1.2, base=base, reduction=reduction)

    def run():
        loss, mask, scores = module(logits, target, return_mask=True)
        return loss.detach(), mask, scores, torch.autograd.grad(0.5 * loss, logits)[0]

    expected = run()
    masked_first, calls = _z_autograd.masked_first, []
    monkeypatch.setattr(_z_autograd, "_LARGE", 0)
    monkeypatch.setattr(_z_autograd, "masked_first", lambda *args: calls.append(1) or masked_first(*args))
    found = run()
    assert calls and not expected[1].all()
    torch.testing.assert_close(found, expected)


def test_calls_of_one_stream_leave_nothing_to_each_other(device):
    """Counters on CUDA stay from launch to launch: barriers that have turned, tickets that are zero again."""
    torch.manual_seed(0)
    many, target = torch.randn(9000, 5), torch.randint(0, 5, (9000,))
    wide, of_wide = torch.randn(400, 300), torch.randint(0, 300, (400,))
    smoothed = fl.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1)

    def cross_entropy(x, y, **options):
        return lambda on: fl.functional.z_error_cross_entropy(x.to(on), y.to(on), threshold=1.0, **options)

    def judge_first(on):
        layer, rows = torch.ones(5, 5, device=on), many[:3000].to(on)
        return fl.functional.linear_loss(rows, layer, target[:3000].to(on), fl.ZErrorCrossEntropyLoss())

    calls = [
        lambda on: fl.class_statistics(many.to(on), target.to(on), 5).mean,
        lambda on: fl.class_statistics(wide.to(on), of_wide.to(on), 300).count,
        cross_entropy(many, target, statistic="prob"),
        cross_entropy(wide, of_wide),
        lambda on: cross_entropy(many, target, statistic="loss", base=copy.deepcopy(smoothed).to(on))(on),
        lambda on: fl.functional.z_error_bce_with_logits(many[:, 0].to(on), (target > 2).to(on), threshold=1.0),
        lambda on: fl.functional.z_mse_loss(many[:500].to(on), wide[:, :5].repeat(2, 1)[:500].to(on), threshold=1.0),
        judge_first,
    ]
    expected = [call("cpu") for call in calls]
    for number in torch.cat([torch.randperm(len(calls)) for _ in range(8)]).tolist():
        torch.testing.assert_close(calls[number](device).cpu(), expected[number], rtol=1e-5, atol=1e-6)


def test_repr_shows_what_differs_from_the_defaults():
    shown = repr(fl.ZErrorCrossEntropyLoss([1.0, 2.0], weight=torch.ones(2), ignore_index=9, num_classes=2))
    assert "threshold=Tensor[2], " in shown and "weight=Tensor[2], ignore_index=9, num_classes=2" in shown
    assert "statistic='target', per_task=True, num_tasks=3" in repr(fl.ZMSELoss(per_task=True, num_tasks=3))
    assert "min_count=4, pos_weight=2.0" in repr(fl.ZErrorBCEWithLogitsLoss(min_count=4, pos_weight=torch.tensor(2.0)))


def test_a_weight_per_task_beside_running_statistics():
    x, y, weight = torch.randn(20, 3), torch.arange(60).remainder(2).view(20, 3), torch.tensor([0.5, 1.0, 2.0])
    running = fl.ZErrorBCEWithLogitsLoss(1.5, running=True, pos_weight=weight)  # the first batch is judged by itself
    plain = fl.functional.z_error_bce_with_logits(x, y, threshold=1.5, pos_weight=weight)
    torch.testing.assert_close(running(x, y), plain)


@pytest.mark.parametrize("shape", [(4, 1), (3,), (1, 2)])
def test_a_weight_of_another_shape_is_refused(shape):
    x, y = torch.randn(4, 2), torch.ones(4, 2)
    for loss in (fl.ZMSELoss(), fl.ZErrorBCEWithLogitsLoss()):
        with pytest.raises(ValueError, match=r"^sample_weight must have shape \(4, 2\) or \(4,\), got"):
            loss(x, y, torch.ones(shape))


@pytest.mark.parametrize("min_count", [1, 2, 4])
@pytest.mark.parametrize("small_class", ["keep", "drop"])
def test_small_classes_of_the_plain_formula(min_count, small_class):
    torch.manual_seed(0)
    x, y = torch.randn(14, 4, dtype=torch.float64), torch.tensor([0] * 8 + [1] * 3 + [2] * 2 + [3])
    options = {"threshold": 0.8, "min_count": min_count, "small_class": small_class, "return_mask": True}
    for name, target in (("z_error_cross_entropy", y), ("z_error_bce_with_logits", (y[:, None] == 0) | (x > 1.2))):
        fused, plain = (getattr(space, name)(x, target, **options) for space in (fl.functional, fl.reference))
        torch.testing.assert_close(plain, fused, equal_nan=True)
