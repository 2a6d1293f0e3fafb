"""A Z-Error threshold of inf: every row with a finite score is kept, whatever its class; the loss is the one without
Z-Error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import loss_and_grad, one_in
from torch.nn import functional as F

import fused_losses as fl
from fused_losses import functional, reference

KINDS = {
    "number": lambda shape, device: math.inf,
    "0-dim": lambda shape, device: torch.tensor(math.inf, device=device),
    "each": lambda shape, device: torch.full(shape, math.inf, dtype=torch.float64, device=device),
}
FORMS = [functional, reference]


def problem(rows, dtype, device):
    """Class 0: ordinary rows and outliers; 1: equal ones; 2: a single row; 3: none; 4: two rows far apart. Row 5 is not
    finite, row 6 is ignored."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 5, generator=generator)
    target = torch.zeros(rows, dtype=torch.int64)
    target[1::3] = 1
    logits[target == 1] = torch.tensor([0.0, 0.5, -1.0, 0.25, 0.0])
    logits[0] = torch.tensor([3e4, 0.0, 0.0, 0.0, 0.0])
    logits[3] = torch.tensor([-3e4, 0.0, 0.0, 0.0, 0.0])
    target[2], target[8], target[9] = 2, 4, 4
    logits[8, 4], logits[9, 4] = -1e4, 1e4
    logits[5], target[6] = math.nan, -100
    return logits.to(device, dtype), target.to(device)


@pytest.mark.parametrize(
    ("rows", "dtype", "kind"), one_in(3, [12, 5000], [torch.float32, torch.float64, torch.bfloat16], KINDS)
)
def test_classes(rows, dtype, kind, device):
    logits, target = problem(rows, dtype, device)
    threshold = KINDS[kind]((5,), device)
    finite = torch.arange(rows, device=device) != 5
    shown = torch.where(finite, target, -100)
    for base in ("cross_entropy", "gce"):
        exact = getattr(reference, "cross_entropy" if base == "cross_entropy" else "gce_loss")
        expected, grad = loss_and_grad(exact, logits.double(), shown)
        for statistic in ("logit", "prob", "loss"):
            for sided in ("two", "lower"):
                options = {"threshold": threshold, "statistic": statistic, "base": base, "sided": sided}
                for form in FORMS:
                    result = form.z_error_cross_entropy(logits, target, return_mask=True, **options)
                    assert torch.equal(result.mask, finite & (target >= 0))
                modules = [fl.ZErrorCrossEntropyLoss(**options, running=running) for running in (False, True)]
                for call in (lambda x, y, o=options: functional.z_error_cross_entropy(x, y, **o), *modules):
                    loss, found = loss_and_grad(call, logits, target)
                    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
                    torch.testing.assert_close(found.double(), grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [12, 5000])
def test_binary_labels_and_numbers(rows, kind, device):
    logits, target = problem(rows, torch.float64, device)
    x, labels = logits[:, 0], (target == 0).double()
    labels[6] = math.nan
    alone = torch.zeros_like(labels)
    alone[2] = 1.0
    finite = x.isfinite()
    for y in (labels, alone):
        kept = finite & y.isfinite()
        expected = F.binary_cross_entropy_with_logits(x[kept], y[kept])
        for form in FORMS:
            for space in ("logit", "prob"):
                for sided in ("two", "lower"):
                    options = {"threshold": KINDS[kind]((2,), device), "space": space, "sided": sided}
                    loss, mask, _ = form.z_error_bce_with_logits(x, y, return_mask=True, **options)
                    assert torch.equal(mask, kept)
                    torch.testing.assert_close(loss, expected)
            for statistic in ("target", "loss", "residual"):
                options = {"threshold": KINDS[kind]((1,), device), "statistic": statistic}
                loss, mask, _ = form.z_mse_loss(x, y, return_mask=True, **options)
                # Where targets are the score, a bad prediction is kept, and makes the loss NaN, as with any threshold.
                assert torch.equal(mask, y.isfinite() if statistic == "target" else kept)
                if statistic != "target":
                    torch.testing.assert_close(loss, F.mse_loss(x[kept], y[kept]))


def test_one_class_is_not_judged(device):
    logits, target = problem(5000, torch.float64, device)
    limits = torch.tensor([1.0, 1.0, 1.0, 1.0, math.inf], device=device)
    for form in FORMS:
        mask = form.z_error_cross_entropy(logits, target, threshold=limits, return_mask=True).mask
        finite = form.z_error_cross_entropy(logits, target, threshold=1.0, return_mask=True).mask
        assert torch.equal(mask, finite | (target == 4))


@pytest.mark.parametrize("kind", KINDS)
def test_classes_without_statistics_are_dropped_where_that_is_asked_for(kind, device):
    """Their rows have no score. By hand: the first two rows have losses log 4/3 and log 2, the single one log 8/7; for
    yes/no labels log 2, log 4 and log 8/7."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [0.0, math.log(7.0)]], device=device)
    target = torch.tensor([0, 0, 1], device=device)
    x = torch.tensor([0.0, math.log(3.0), math.log(7.0)], device=device)
    for form in FORMS:
        for call, rows, first, single in (
            (form.z_error_cross_entropy, (logits, target), math.log(8.0 / 3.0), math.log(8.0 / 7.0)),
            (form.z_error_bce_with_logits, (x, target), math.log(8.0), math.log(8.0 / 7.0)),
        ):
            threshold = KINDS[kind]((2,), device)
            kept = call(*rows, threshold=threshold, return_mask=True)
            assert kept.mask.all() and float(kept.loss) == pytest.approx((first + single) / 3.0)
            dropped = call(*rows, threshold=threshold, small_class="drop", return_mask=True)
            assert dropped.mask.tolist() == [True, True, False] and float(dropped.loss) == pytest.approx(first / 2.0)
            assert dropped.scores[:2].isfinite().all() and dropped.scores[2].isnan()


@pytest.mark.any_cpu
def test_two_labels_may_differ():
    x, y = torch.tensor([-1.0, -2.0, -3.0, 9.0, 1.0, 2.0, 3.0, -9.0]), torch.tensor([0.0] * 4 + [1.0] * 4)
    loss = fl.ZErrorBCEWithLogitsLoss((math.inf, 1.0))
    assert loss(x, y, return_mask=True).mask.tolist() == [True] * 7 + [False]
    assert "inf" in repr(loss)


@pytest.mark.any_cpu
def test_in_compiled_code():
    logits, target = problem(12, torch.float32, "cpu")
    for threshold in (math.inf, torch.tensor(math.inf)):
        module = fl.ZErrorCrossEntropyLoss(threshold)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, target), module(logits, target))


@pytest.mark.any_cpu
def test_cut_offs():
    scores, labels = np.array([-1e6, -3.0, 2.0, 1.0, 2.0, 1e200, np.nan]), np.array([0, 0, 1, 1, 1, 1, 1])
    assert fl.z_error_inlier_mask(scores, labels, math.inf).tolist() == [True] * 6 + [False]
    one_row = fl.z_error_inlier_mask(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1]), math.inf)
    assert one_row.all()
    logits = np.array([-4.0, -2.0, 1.0, 2.0, 6.0])
    labels = np.array([0, 0, 1, 1, 1])
    everything = fl.optimal_logit_cutoff_from_gaussians(logits, labels, math.inf)
    assert everything == fl.optimal_logit_cutoff_from_gaussians(logits, labels, 100.0)


@pytest.mark.any_cpu
def test_schedules_that_move_at_once():
    judged = fl.ZErrorCrossEntropyLoss()
    schedule = fl.ThresholdSchedule(judged, math.inf, 2.0, mode="peak", patience=0)
    values = []
    for metric in (0.5, 0.6, 0.55, 0.4):
        schedule.step(metric)
        values.append(float(judged.threshold))
    assert values == [math.inf, math.inf, 2.0, 2.0]
    fl.ThresholdSchedule(judged, 2.0, math.inf, mode="peak").load_state_dict(
        {**schedule.state_dict(), "start": 2.0, "end": math.inf}
    )
    assert judged.threshold == math.inf


@pytest.mark.any_cpu
@pytest.mark.parametrize(
    "options", [{"steps": 3}, {"steps": 3, "mode": "cosine"}, {"mode": "plateau"}, {"steps": 3, "mode": "peak"}]
)
def test_schedules_do_not_interpolate_it(options):
    hint = "mode='peak' without steps alone takes inf, because it goes there at once"
    for argument, start, end in [("start", math.inf, 2.0), ("end", 2.0, math.inf), ("start", None, 2.0)]:
        with pytest.raises(ValueError, match=rf"^{argument} must satisfy 0 < value < inf, got inf; {hint}$"):
            fl.ThresholdSchedule(fl.ZErrorCrossEntropyLoss(math.inf), start, end, **options)
    with pytest.raises(ValueError, match=r"^start_sigma must satisfy 0 < value < inf, got inf$"):
        fl.get_sigma_threshold(1, 3, math.inf)
