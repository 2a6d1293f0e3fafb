"""Schedules: the values they pass through, the tensors they write, resuming, no recompilation."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from conftest import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.schedules import LogitBiasSchedule, ThresholdSchedule, get_sigma_threshold


class Thresholded(nn.Module):
    """Stands for any loss with a threshold: the mean of what lies below it."""

    def __init__(self, threshold: Any = 2.0) -> None:
        super().__init__()
        if isinstance(threshold, Tensor):
            self.register_buffer("threshold", threshold)
        else:
            self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x <= self.threshold, x, 0.0).sum()


def values(
    schedule: ThresholdSchedule | LogitBiasSchedule, steps: int, metrics: list[float] | None = None
) -> list[Any]:
    result = [schedule.value]
    for index in range(steps):
        schedule.step(None if metrics is None else metrics[index])
        result.append(schedule.value)
    return result


@pytest.mark.parametrize(("epoch", "expected"), [(0, 100.0), (1, 90.2), (5, 51.0), (10, 2.0), (15, 2.0), (-3, 100.0)])
def test_sigma_formula_of_the_paper_clamped(epoch: int, expected: float) -> None:
    assert get_sigma_threshold(epoch, 10) == pytest.approx(expected, abs=1e-12)


def test_sigma_in_the_paper_s_text() -> None:
    assert get_sigma_threshold(5, 10, start_sigma=10.0) == 6.0
    assert get_sigma_threshold(1, 1, 10.0, 3.0) == 3.0


@given(st.floats(-10, 1e4), st.integers(1, 1000), st.floats(0.1, 200), st.floats(0.1, 200))
def test_sigma_stays_between_its_ends(epoch: float, max_epochs: int, start: float, end: float) -> None:
    sigma = get_sigma_threshold(epoch, max_epochs, start, end)
    assert min(start, end) - 1e-12 <= sigma <= max(start, end) + 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0), "max_epochs must be at least 1, got 0"),
        ((math.nan, 5), "epoch must be a number, got nan"),
        ((1, 5, 0.0), "start_sigma must satisfy 0 < value < inf, got 0.0"),
        ((1, 5, 2.0, math.inf), "end_sigma must satisfy 0 < value < inf, got inf"),
    ],
)
def test_sigma_rejects(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_sigma_threshold(*arguments)


def test_linear_threshold_is_the_paper_s_formula() -> None:
    schedule = ThresholdSchedule(Thresholded(), steps=10)
    assert values(schedule, 12) == pytest.approx([get_sigma_threshold(epoch, 10) for epoch in range(13)], abs=1e-12)
    assert schedule.value == 2.0


def test_cosine_by_hand() -> None:
    schedule = LogitBiasSchedule(fl.MAELoss(), start=4.0, steps=4, mode="cosine")
    half = math.sqrt(0.5)
    assert values(schedule, 5) == pytest.approx([4.0, 2 + 2 * half, 2.0, 2 - 2 * half, 0.0, 0.0], abs=1e-12)
    assert schedule.value == 0.0


def test_plateau_halves_the_distance_after_more_than_patience_bad_steps() -> None:
    schedule = LogitBiasSchedule(fl.MAELoss(), start=8.0, mode="plateau", patience=1)
    # better, better, bad, bad -> halve, bad, NaN counts as bad -> halve, better, bad
    metrics = [1.0, 0.5, 0.5, 0.6, 0.5, math.nan, 0.4, 0.4]
    assert values(schedule, 8, metrics) == [8.0, 8.0, 8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 2.0]


def test_plateau_arrives_at_its_end() -> None:
    schedule = ThresholdSchedule(Thresholded(), 10.0, 2.0, mode="plateau", patience=0, factor=0.1, maximize=True)
    # 1 is an improvement on -inf; each of the next calls is a plateau. 0.1 % of the way is snapped to the end.
    found = values(schedule, 5, [1.0] * 5)
    assert found[:4] == pytest.approx([10.0, 10.0, 2.8, 2.08])
    assert found[4:] == [pytest.approx(2.008), 2.0]


def test_small_improvements_do_not_count_below_min_delta() -> None:
    schedule = LogitBiasSchedule(fl.MAELoss(), 1.0, mode="plateau", patience=0, min_delta=0.1, factor=0.0)
    assert values(schedule, 2, [1.0, 0.95]) == [1.0, 1.0, 0.0]


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 50), st.floats(-20, 20), st.floats(-20, 20))
def test_moves_steadily_from_start_to_end(mode: str, steps: int, start: float, end: float) -> None:
    path = values(LogitBiasSchedule(fl.MAELoss(), start, end, steps, mode=mode), steps)
    assert (path[0], path[-1]) == (start, end)
    sign = 1.0 if end >= start else -1.0
    assert all(sign * (b - a) >= -1e-12 for a, b in itertools.pairwise(path))


def test_float_becomes_a_buffer_that_the_loss_reads() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.arange(8) % 5
    loss = fl.MAELoss()
    schedule = LogitBiasSchedule(loss, start=3.0, end=1.0, steps=2)
    assert loss.logit_bias.dtype == torch.float64 and loss.logit_bias.dim() == 0
    assert set(loss.state_dict()) == {"logit_bias"}
    for bias in (3.0, 2.0, 1.0):
        assert loss.logit_bias.item() == bias
        torch.testing.assert_close(loss(logits, target), fl.functional.mae_loss(logits, target, logit_bias=bias))
        schedule.step()


def test_writes_into_the_same_tensor() -> None:
    module = Thresholded(torch.tensor(5.0))
    tensor, address = module.threshold, module.threshold.data_ptr()
    schedule = ThresholdSchedule(module, start=None, end=1.0, steps=4)
    schedule.step()
    assert module.threshold is tensor and tensor.data_ptr() == address
    assert tensor.item() == 4.0


def test_follows_a_module_that_was_moved() -> None:
    module = Thresholded()
    schedule = ThresholdSchedule(module, 10.0, 2.0, 8)
    module.to(torch.float32)  # replaces the buffer
    schedule.step()
    assert module.threshold.dtype == torch.float32 and module.threshold.item() == 9.0


@pytest.mark.parametrize("device", DEVICES)
def test_one_value_per_class(device: str) -> None:
    module = Thresholded(torch.tensor([4.0, 8.0, 2.0], device=device))
    schedule = ThresholdSchedule(module, start=None, end=2.0, steps=2)
    schedule.step()
    assert module.threshold.tolist() == [3.0, 5.0, 2.0]
    schedule.step()
    assert module.threshold.tolist() == [2.0, 2.0, 2.0]
    schedule = ThresholdSchedule(module, start=10.0, end=torch.tensor([1.0, 2.0, 3.0]), steps=1)
    assert module.threshold.tolist() == [10.0] * 3
    schedule.step()
    assert module.threshold.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("mode", ["linear", "cosine", "plateau"])
def test_resumes_where_it_stopped(mode: str) -> None:
    def build(start: float | None) -> tuple[Thresholded, ThresholdSchedule]:
        module = Thresholded()
        steps = None if mode == "plateau" else 10
        return module, ThresholdSchedule(module, start, 2.0, steps, mode=mode, patience=1)

    metrics = [0.9, 0.8, 0.8, 0.8, 0.7, 0.9, 0.9, 0.9, 0.6]
    arguments = [(metric,) if mode == "plateau" else () for metric in metrics]
    module, schedule = build(9.0)
    for argument in arguments[:5]:
        schedule.step(*argument)
    saved = copy.deepcopy(schedule.state_dict())
    # The restored schedule was built from the Module's default 2.0; start comes from the saved state.
    other_module, other = build(None)
    other.load_state_dict(saved)
    assert other_module.threshold.item() == module.threshold.item()
    for argument in arguments[5:]:
        schedule.step(*argument)
        other.step(*argument)
        assert other_module.threshold.item() == module.threshold.item()
    assert 2.0 < module.threshold.item() < 9.0
    assert str(schedule.state_dict()) == str(other.state_dict())


def test_a_new_value_recompiles_nothing() -> None:
    compilations = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    logits, target = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    bias_loss, threshold_loss = fl.MAELoss(), Thresholded()
    bias = LogitBiasSchedule(bias_loss, start=3.0, steps=3)
    threshold = ThresholdSchedule(threshold_loss, start=1.5, end=0.1, steps=3)
    run_bias = torch.compile(bias_loss, backend=count, fullgraph=True)
    run_threshold = torch.compile(threshold_loss, backend=count, fullgraph=True)
    for _ in range(4):
        expected = fl.functional.mae_loss(logits, target, logit_bias=float(bias.value))
        torch.testing.assert_close(run_bias(logits, target), expected)
        torch.testing.assert_close(run_threshold(logits), logits[logits <= threshold.value].sum())
        bias.step()
        threshold.step()
    assert compilations == 2, "one per Module"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_sees_the_new_value() -> None:
    loss = fl.MAELoss().cuda()
    schedule = LogitBiasSchedule(loss, start=3.0, steps=1)
    loss.cuda()
    logits, target = torch.randn(6, 4, device="cuda"), (torch.arange(6) % 4).cuda()
    loss(logits, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = loss(logits, target)
    schedule.step()
    graph.replay()
    torch.testing.assert_close(result, fl.functional.mae_loss(logits, target))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ThresholdSchedule(fl.MAELoss(), steps=3),
            TypeError,
            "module must have an attribute 'threshold', MAELoss",
        ),
        (lambda: ThresholdSchedule(Thresholded((2.0, 3.0)), steps=3), TypeError, "to be scheduled, got tuple"),
        (lambda: ThresholdSchedule(Thresholded()), ValueError, "steps must be an integer >= 1 .*, got None"),
        (lambda: ThresholdSchedule(Thresholded(), steps=0), ValueError, "steps must be an integer >= 1 .*, got 0"),
        (lambda: ThresholdSchedule(Thresholded(), steps=3, mode="plateau"), ValueError, "steps must be left out"),
        (
            lambda: ThresholdSchedule(Thresholded(), steps=3, mode="step"),
            ValueError,
            "mode must be one of .*, got 'step'",
        ),
        (
            lambda: ThresholdSchedule(Thresholded(), 0.0, 2.0, 3),
            ValueError,
            "start must satisfy 0 < value < inf, got 0.0",
        ),
        (
            lambda: ThresholdSchedule(Thresholded(), 1.0, -1.0, 3),
            ValueError,
            "end must satisfy 0 < value < inf, got -1.0",
        ),
        (lambda: LogitBiasSchedule(fl.MAELoss(), math.inf, 0.0, 3), ValueError, "start must be finite, got inf"),
        (
            lambda: LogitBiasSchedule(fl.MAELoss(logit_bias="auto"), steps=3),
            ValueError,
            "start must be finite, got nan; module.logit_bias is no number",
        ),
        (
            lambda: ThresholdSchedule(Thresholded(torch.ones(3)), torch.ones(2), 2.0, 3),
            ValueError,
            r"start must be a number or have the shape \(3,\) of module.threshold, got shape \(2,\)",
        ),
        (
            lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3, factor=1.0),
            ValueError,
            "factor must satisfy .*, got 1.0",
        ),
        (lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3, patience=-1), ValueError, "patience must be .*, got -1"),
        (lambda: LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3, min_delta=-1), ValueError, "min_delta must .*, got -1"),
    ],
)
def test_constructor_rejects(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_step_and_state_reject_what_does_not_fit() -> None:
    plateau = LogitBiasSchedule(fl.MAELoss(), 1.0, mode="plateau")
    linear = LogitBiasSchedule(fl.MAELoss(), 1.0, steps=3)
    with pytest.raises(TypeError, match=r"step\(\) needs a metric with mode='plateau', got None"):
        plateau.step()
    with pytest.raises(TypeError, match=r"step\(\) takes a metric only with mode='plateau', got 0.5"):
        linear.step(0.5)
    with pytest.raises(ValueError, match="state_dict must have the keys"):
        linear.load_state_dict({"fraction": 0.5})
    per_class = ThresholdSchedule(Thresholded(torch.ones(3)), steps=3).state_dict()
    with pytest.raises(ValueError, match=r"must have shape \(\), got \(3,\)"):
        linear.load_state_dict(per_class)
    assert linear.value == 1.0 and plateau.step_count == 0
