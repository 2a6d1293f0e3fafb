"""Numbers in whatever kind users have them: those of NumPy count as Python's; what is no number, or none that fits, is
refused by an error that names the argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import fused_losses as fl
from fused_losses import calibration, noise

pytestmark = pytest.mark.any_cpu  # errors

F = fl.functional
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BINARY = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
SCORES, LABELS = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]), np.array([0, 0, 0, 1, 1, 1])


def _schedule(mode: str = "linear", steps: Any = 3, **options: Any) -> Any:
    schedule = fl.ThresholdSchedule(fl.ZErrorCrossEntropyLoss(), steps=steps, mode=mode, **options)
    schedule.step(*([1.0] if mode == "plateau" else []))
    return schedule.value


def _seen(metric: Any) -> Any:
    schedule = fl.ThresholdSchedule(fl.ZErrorCrossEntropyLoss(), mode="plateau")
    schedule.step(metric)
    return schedule.value


def _tracker() -> fl.OutlierTracker:
    tracker = fl.OutlierTracker(4)
    tracker.update([0, 1, 3], mask=[True, False, True], prob=[0.9, 0.1, 0.7])
    return tracker


def _linear(**sizes: int) -> Any:
    return tuple(fl.LinearLoss(**({"in_features": 3, "num_classes": 3} | sizes)).linear.weight.shape)


# What is called with a number, by the argument's name and the function's; a number that is right.
REAL: dict[str, tuple[Callable[[Any], Any], float]] = {
    "target_activation solve_logit_bias": (lambda v: calibration.solve_logit_bias(10, v), 0.5),
    "num_samples hem_margin": (calibration.hem_margin, 50),
    "M hem_margin": (lambda v: calibration.hem_margin(50, v), 0.5),
    "M hem_plus_margins": (lambda v: calibration.hem_plus_margins([5, 7], v), 0.5),
    "epoch get_sigma_threshold": (lambda v: fl.get_sigma_threshold(v, 3), 0.5),
    "max_epochs get_sigma_threshold": (lambda v: fl.get_sigma_threshold(1, v), 2),
    "start_sigma get_sigma_threshold": (lambda v: fl.get_sigma_threshold(1, 3, v), 0.5),
    "end_sigma get_sigma_threshold": (lambda v: fl.get_sigma_threshold(1, 3, 2.0, v), 0.5),
    "factor ThresholdSchedule": (lambda v: _schedule("plateau", None, factor=v), 0.5),
    "min_delta ThresholdSchedule": (lambda v: _schedule("plateau", None, min_delta=v), 0.5),
    "metric step": (_seen, 0.5),
    "min_rate flagged": (lambda v: _tracker().flagged(v), 0.5),
    "threshold z_error_inlier_mask": (lambda v: fl.z_error_inlier_mask(SCORES, LABELS, v), 0.5),
    "z_threshold cutoff": (lambda v: fl.optimal_logit_cutoff_from_gaussians(SCORES, LABELS, v), 2),
    "rate symmetric": (lambda v: noise.symmetric(Y, v, 3).labels, 0.5),
    "rate symmetric_matrix": (lambda v: noise.symmetric_matrix(v, 3), 0.5),
    "rate asymmetric": (lambda v: noise.asymmetric(Y, v, 3, {0: 1}).labels, 0.5),
    "rate instance_dependent": (lambda v: noise.instance_dependent(X, Y, v, 3).labels, 0.5),
    "std instance_dependent": (lambda v: noise.instance_dependent(X, Y, 0.5, 3, std=v).labels, 0.5),
    "quantile estimate_transition": (lambda v: noise.estimate_transition(X.softmax(1), v), 0.5),
    "init TransitionMatrix": (lambda v: fl.TransitionMatrix(3, v)(), 0.5),
    "lam mixed": (lambda v: F.mixed("hem", X, Y, Y.flip(0), v), 0.5),
    "q gce_loss": (lambda v: F.gce_loss(X, Y, q=v), 0.5),
    "logit_bias gce_loss": (lambda v: F.gce_loss(X, Y, logit_bias=v), 0.5),
    "margin hem_loss": (lambda v: F.hem_loss(X, Y, margin=v), 0.5),
    "threshold z_error_cross_entropy": (lambda v: F.z_error_cross_entropy(X, Y, threshold=v), 0.5),
    "threshold z_error_bce_with_logits": (lambda v: F.z_error_bce_with_logits(X[:, 0], BINARY, threshold=v), 0.5),
    "threshold z_mse_loss": (lambda v: F.z_mse_loss(X[:, 0], BINARY, threshold=v), 0.5),
    "momentum ZErrorCrossEntropyLoss": (lambda v: fl.ZErrorCrossEntropyLoss(running=True, momentum=v)(X, Y), 0.5),
    "keep SmallLoss": (lambda v: fl.SmallLoss("gce", v)(X, Y), 0.5),
    "c ClippedLoss": (lambda v: fl.ClippedLoss("gce", v)(X, Y), 0.5),
    "delta Antidote": (lambda v: fl.Antidote("gce", v)(X, Y), 0.5),
    "lam SuperLoss": (lambda v: fl.SuperLoss("gce", v)(X, Y), 0.5),
    "t LogitNorm": (lambda v: fl.LogitNorm("gce", v)(X, Y), 0.5),
    "tau LogitClip": (lambda v: fl.LogitClip("gce", v)(X, Y), 0.5),
    "beta ELRLoss": (lambda v: fl.ELRLoss(6, 3, v)(X, Y, torch.arange(6)), 0.5),
    "weights gjs_loss": (lambda v: F.gjs_loss([X], Y, [v, 0.5]), 0.5),
}
WHOLE: dict[str, tuple[Callable[[Any], Any], int]] = {
    "num_classes solve_logit_bias": (calibration.solve_logit_bias, 10),
    "num_classes mean_target_error": (lambda v: calibration.mean_target_error("gce", v, 0.0), 10),
    "steps ThresholdSchedule": (lambda v: _schedule(steps=v), 3),
    "patience ThresholdSchedule": (lambda v: _schedule("plateau", None, patience=v), 3),
    "num_samples OutlierTracker": (lambda v: fl.OutlierTracker(v).num_samples, 3),
    "min_seen flagged": (lambda v: _tracker().flagged(0.5, min_seen=v), 1),
    "min_seen rank": (lambda v: _tracker().rank(min_seen=v), 1),
    "num_classes symmetric": (lambda v: noise.symmetric(Y, 0.5, v).labels, 3),
    "num_classes symmetric_matrix": (lambda v: noise.symmetric_matrix(0.5, v), 3),
    "num_classes asymmetric": (lambda v: noise.asymmetric(Y, 0.5, v, {0: 1}).labels, 3),
    "num_classes instance_dependent": (lambda v: noise.instance_dependent(X, Y, 0.5, v).labels, 3),
    "seed symmetric": (lambda v: noise.symmetric(Y, 0.5, 3, seed=v).labels, 3),
    "ignore_index symmetric": (lambda v: noise.symmetric(Y, 0.5, 3, ignore_index=v).labels, 2),
    "pairs to": (lambda v: noise.pair_matrix(0.5, 3, {0: v}), 1),
    "pairs from": (lambda v: noise.pair_matrix(0.5, 3, {v: 0}), 1),
    "num_classes TransitionMatrix": (lambda v: fl.TransitionMatrix(v)(), 3),
    "num_classes class_statistics": (lambda v: fl.class_statistics(X, Y, v).count, 3),
    "ignore_index row_statistics": (lambda v: fl.row_statistics(X, Y, v).log_prob.nan_to_num(), 2),
    "ignore_index gce_loss": (lambda v: F.gce_loss(X, Y, ignore_index=v), 2),
    "ignore_index GCELoss": (lambda v: fl.GCELoss(ignore_index=v)(X, Y), 2),
    "ignore_index ForwardCorrectionLoss": (lambda v: fl.ForwardCorrectionLoss(torch.eye(3), ignore_index=v)(X, Y), 2),
    "ignore_index ZErrorCrossEntropyLoss": (lambda v: fl.ZErrorCrossEntropyLoss(ignore_index=v)(X, Y), 2),
    "min_count z_error_cross_entropy": (lambda v: F.z_error_cross_entropy(X, Y, min_count=v), 3),
    "min_count ZErrorCrossEntropyLoss": (lambda v: fl.ZErrorCrossEntropyLoss(min_count=v)(X, Y), 3),
    "min_count z_error_bce_with_logits": (lambda v: F.z_error_bce_with_logits(X[:, 0], BINARY, min_count=v), 3),
    "num_tasks ZErrorBCEWithLogitsLoss": (lambda v: fl.ZErrorBCEWithLogitsLoss(num_tasks=v).num_groups, 3),
    "num_classes ELRLoss": (lambda v: fl.ELRLoss(3, v).memory, 3),
    "num_samples ELRLoss": (lambda v: fl.ELRLoss(v, 3).memory, 3),
    "chunk_bytes linear_loss": (lambda v: F.linear_loss(X, torch.eye(3), Y, chunk_bytes=v), 30),
    "in_features LinearLoss": (lambda v: _linear(in_features=v), 3),
    "num_classes LinearLoss": (lambda v: _linear(num_classes=v), 3),
    "num_classes ClassParallel": (lambda v: fl.parallel.ClassParallel(fl.GCELoss(), None, 0, v).num_classes, 3),
    "first_class ClassParallel": (lambda v: fl.parallel.ClassParallel(fl.GCELoss(), None, v, 5).first_class, 3),
}
NO_NUMBERS = ["0.5", b"1", 1j, [0.5, 0.5], (2,), {}, object(), math.nan, np.float64("nan"), np.array([0.5, 0.5])]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    return bool(np.all(found == expected)) and type(found) is type(expected)


@pytest.mark.parametrize("name", REAL)
def test_numbers_of_numpy(name: str) -> None:
    call, value = REAL[name]
    for kind in (np.float64, np.float32, np.float16, np.array):
        assert same(call(kind(value)), call(value)), kind


@pytest.mark.parametrize("name", WHOLE)
def test_integers_of_numpy(name: str) -> None:
    call, value = WHOLE[name]
    for kind in (np.int64, np.int32, np.uint8, *(() if name == "pairs from" else (np.array,))):
        assert same(call(kind(value)), call(value)), kind


@pytest.mark.parametrize("name", [*REAL, *WHOLE])
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    call, _ = (REAL | WHOLE)[name]
    argument = name.split()[0]
    takes_any = argument == "metric"  # NaN is no improvement
    takes_endless = takes_any or argument in ("epoch", "steps", "patience", "z_threshold")
    takes_endless |= name == "threshold z_error_inlier_mask"
    takes_several = name.startswith("threshold z_")
    for value in [*NO_NUMBERS, *([] if takes_endless else [10**400])]:
        is_key = name == "pairs from" and not isinstance(value, Hashable)
        if (isinstance(value, float) and takes_any) or (isinstance(value, (list, tuple)) and takes_several) or is_key:
            continue
        with pytest.raises((TypeError, ValueError), match=argument):
            call(value)
    if name in WHOLE:
        for value in (1.5, Fraction(3, 2), torch.tensor(1.5), *([] if takes_endless else [2**70, math.inf])):
            with pytest.raises((TypeError, ValueError), match=argument):
                call(value)


@pytest.mark.parametrize("name", [*REAL, "reference_value match_parameter", "end of epochs"])
def test_numbers_without_end_are_refused_or_make_sense(name: str) -> None:
    more: dict[str, Callable[[Any], Any]] = {
        "reference_value match_parameter": lambda v: calibration.match_parameter("gce", "logit_bias", 10, 5, v),
        "end of epochs": lambda v: fl.get_sigma_threshold(v, v),
    }
    call = more[name] if name in more else REAL[name][0]
    for value in (math.inf, -math.inf, -1.0):
        try:
            found = call(value)
        except ValueError as error:
            assert re.search(name.split()[0] + "|epochs", str(error)) and "got" in str(error)
        else:
            numbers = found if isinstance(found, (tuple, list)) else [found]
            assert all(torch.as_tensor(number).isfinite().all() for number in numbers), value


WEIGHED: dict[str, Callable[..., Any]] = {
    "gjs_loss": lambda **o: F.gjs_loss([X], Y, (0.5, 0.5), **o),
    "forward_correction_loss": lambda **o: F.forward_correction_loss(X, Y, torch.eye(3), **o),
    "z_error_bce_with_logits": lambda **o: F.z_error_bce_with_logits(X[:, 0], BINARY, **o),
    "z_mse_loss": lambda **o: F.z_mse_loss(X[:, 0], BINARY, **o),
    "linear_loss": lambda **o: F.linear_loss(X, torch.eye(3), Y, **o),
    "SmallLoss": lambda **o: fl.SmallLoss("gce", 0.5)(X, Y, **o),
    "ELRLoss": lambda **o: fl.ELRLoss(6, 3)(X, Y, torch.arange(6), **o),
    "LogitNorm": lambda **o: fl.LogitNorm("gce")(X, Y, **o),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_weights_that_are_no_tensors(name: str) -> None:
    for value in (1, 0.5, [1.0] * 6, np.ones(6), "1"):
        with pytest.raises((TypeError, RuntimeError), match="sample_weight"):
            WEIGHED[name](sample_weight=value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: noise.symmetric(LABELS, 0.4, 2),  # type: ignore[arg-type]
        lambda: noise.instance_dependent(SCORES, Y, 0.4, 3),  # type: ignore[arg-type]
        lambda: noise.estimate_transition(SCORES),  # type: ignore[arg-type]
        lambda: fl.ELRLoss(6, 3)(X, Y, LABELS),  # type: ignore[arg-type]
        lambda: F.forward_correction_loss(X, Y, np.eye(3)),  # type: ignore[arg-type]
        lambda: F.backward_correction_loss(X, Y, np.eye(3)),  # type: ignore[arg-type]
        lambda: fl.scores.max_logit(SCORES),  # type: ignore[arg-type]
    ],
)
def test_an_array_where_a_tensor_is_wanted_is_called_so(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"^\w+ must be an? .*tensor, got ndarray$"):  # an array has a dtype, too
        call()


def test_complex_numbers_lose_nothing_unnoticed() -> None:
    for call in (
        lambda z: fl.ThresholdSchedule(fl.ZErrorCrossEntropyLoss(), start=z, steps=3),
        lambda z: calibration.hem_plus_margins([z, z]),
        lambda z: fl.ForwardCorrectionLoss([[z, 0.0], [0.0, z]]),
    ):
        for z in (2 + 1j, np.complex64(2 + 1j)):
            with pytest.raises(TypeError, match=r"must be a tensor, an array or a list of numbers, got .* of complex"):
                call(z)


@pytest.mark.parametrize("name", ["hem", "multi_margin"])
def test_active_rows_without_weight(name: str) -> None:
    """Their mean is 0, or NaN where a row is not finite: by kernel, plain formula and in chunks."""
    entry, target, none = fl.LOSSES[name], torch.tensor([0, 1]), torch.zeros(2)
    for bad in (0.0, math.nan, math.inf):
        logits = torch.tensor([[0.0, bad], [1.0, 0.0]])
        options: dict[str, Any] = {"weight": none, "reduction": "active_mean"}
        for loss in (
            entry.function(logits, target, **options),
            entry.reference(logits, target, **options),
            F.linear_loss(torch.zeros(2, 0), torch.zeros(2, 0), target, name, linear_bias=logits[0], **options),
        ):
            assert loss.isnan() if bad else loss == 0.0


@pytest.mark.parametrize("value", ["x", math.nan, 1, None, np.ones(2)])
def test_a_switch_is_true_or_false(value: Any) -> None:
    for name, call in {
        "bias": lambda v: fl.LinearLoss(3, 3, bias=v),
        "per_task": lambda v: fl.ZMSELoss(per_task=v),
        "per_task ": lambda v: F.z_mse_loss(X, X, per_task=v),
        "running": lambda v: fl.ZMSELoss(running=v),
    }.items():
        with pytest.raises(TypeError, match=f"^{name.strip()} must be True or False, got"):
            call(value)
        call(np.True_)
