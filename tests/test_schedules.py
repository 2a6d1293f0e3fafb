"""Schedules: the values they pass through, the tensors they write, resuming, no recompilation."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.fsdp as fsdp
from conftest import DEVICES
from gloo_group import group_of_one
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.schedules import LogitBiasSchedule, ThresholdSchedule, get_sigma_threshold

pytestmark = pytest.mark.any_cpu  # no kernel


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
@settings(deadline=None)
def test_sigma_stays_between_its_ends(epoch: float, max_epochs: int, start: float, end: float) -> None:
    sigma = get_sigma_threshold(epoch, max_epochs, start, end)
    assert min(start, end) - 1e-12 <= sigma <= max(start, end) + 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0), "max_epochs must be at least 1, got 0"),
        ((1, math.nan), "max_epochs must be at least 1, got nan"),
        ((math.inf, math.inf), "max_epochs must be at least 1 and finite, got inf"),
        ((math.nan, 5), "epoch must be a number, got nan"),
        ((1, 5, 0.0), "start_sigma must satisfy 0 < value < inf, got 0.0"),
        ((1, 5, 2.0, math.inf), "end_sigma must satisfy 0 < value < inf, got inf"),
    ],
)
def test_sigma_rejects(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_sigma_threshold(*arguments)


def test_linear_threshold_is_the_paper_s_formula() -> None:
    schedule = ThresholdSchedule(Thresholded(), start=100.0, steps=10)
    assert values(schedule, 12) == pytest.approx([get_sigma_threshold(epoch, 10) for epoch in range(13)], abs=1e-12)
    assert schedule.value == 2.0


def test_a_threshold_starts_where_the_paper_s_text_does() -> None:
    module = Thresholded()
    schedule = ThresholdSchedule(module, steps=4)
    assert values(schedule, 4) == [10.0, 8.0, 6.0, 4.0, 2.0] and module.threshold.item() == 2.0


def test_names_at_the_top_level() -> None:
    assert fl.ThresholdSchedule is ThresholdSchedule and fl.LogitBiasSchedule is LogitBiasSchedule


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


def test_annealing_ends_where_the_figure_peaks() -> None:
    schedule = ThresholdSchedule(Thresholded(), end=1.0, mode="peak")
    # One dip is forgiven. After the peak a second call in a row brings no new best; from then on the value is the end.
    accuracy = [0.5, 0.6, 0.55, 0.7, 0.7, 0.69, 0.9, 0.1]
    assert values(schedule, 8, accuracy) == [10.0] * 6 + [1.0] * 3


def test_a_peak_cuts_linear_annealing_short_and_a_late_one_does_not_delay_it() -> None:
    options: dict[str, Any] = {"start": 10.0, "end": 2.0, "steps": 4, "mode": "peak", "patience": 0}
    assert values(ThresholdSchedule(Thresholded(), **options), 3, [0.5, 0.6, 0.6]) == [10.0, 8.0, 6.0, 2.0]
    assert values(ThresholdSchedule(Thresholded(), **options), 5, [1, 2, 3, 4, 5]) == [10.0, 8.0, 6.0, 4.0, 2.0, 2.0]
    losses = ThresholdSchedule(Thresholded(), **options, maximize=False)
    assert values(losses, 3, [0.5, 0.4, math.nan]) == [10.0, 8.0, 6.0, 2.0]


def test_annealing_ends_at_the_peak_of_a_training() -> None:
    """The one line in a training loop: with wrong labels, accuracy on as wrong validation labels rises and falls."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(600, 40, generator=generator), torch.randn(40, 4, generator=generator)
    target = (inputs @ weight).argmax(1)
    wrong = torch.rand(600, generator=generator) < 0.4
    target = torch.where(wrong, torch.randint(4, (600,), generator=generator), target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 256), nn.ReLU(), nn.Linear(256, 4))
    loss = fl.ZErrorCrossEntropyLoss(statistic="prob", sided="lower")
    schedule = ThresholdSchedule(loss, end=1.0, mode="peak")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    accuracies = []
    for _ in range(15):
        optimizer.zero_grad()
        loss(model(inputs[:300]), target[:300]).backward()
        optimizer.step()
        accuracies.append(float((model(inputs[300:]).argmax(1) == target[300:]).float().mean()))
        schedule.step(accuracies[-1])
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        ended = schedule.value == 1.0
        if ended:
            break
    assert ended and 2 <= len(accuracies) < 15, "it ends, and not at once"
    assert len(accuracies) - 1 - best == 2, "two epochs after the best one"


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
@settings(deadline=None)
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


WRAPPED: dict[str, Any] = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda module: torch.compile(nn.DataParallel(module), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("start", [4.0, None])
@pytest.mark.parametrize("threshold", [3.0, torch.tensor(3.0)])
def test_a_wrapped_module_is_scheduled_inside(wrapper: str, start: float | None, threshold: Any) -> None:
    module = Thresholded(threshold.clone() if isinstance(threshold, Tensor) else threshold)
    wrapped = WRAPPED[wrapper](module)
    rows = torch.arange(5.0)
    assert wrapped(rows) == 6.0  # compiled with the present threshold
    schedule = ThresholdSchedule(wrapped, start, 1.0, 1)
    first = 3.0 if start is None else start
    assert module.threshold.item() == first and [*module.state_dict()] == ["threshold"]
    assert wrapped(rows) == rows[rows <= first].sum()
    schedule.step()
    assert module.threshold.item() == 1.0 and wrapped(rows) == 1.0
    assert ThresholdSchedule(wrapped, None, 2.0, 1).module is module


@pytest.mark.filterwarnings("ignore:FSDP is switching")  # one process shards nothing
def test_a_distributed_module_is_scheduled_inside(tmp_path: Path) -> None:
    class Scaled(Thresholded):
        def __init__(self) -> None:
            super().__init__(3.0)
            self.scale = nn.Parameter(torch.ones(1))  # DistributedDataParallel refuses Modules without any

    with group_of_one(tmp_path):
        for wrap in (nn.parallel.DistributedDataParallel, fsdp.FullyShardedDataParallel, fsdp.fully_shard):
            module = Scaled()
            options = {"device_id": torch.device("cpu")} if wrap is fsdp.FullyShardedDataParallel else {}
            ThresholdSchedule(wrap(module, **options), 5.0, 1.0, 1)
            assert module.threshold.item() == 5.0


def test_a_module_that_only_hands_the_attribute_through_is_refused_untouched() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    class OfClass(nn.Module):
        threshold = 2.0

    inner = Thresholded()
    for module in (Wrapper(inner), OfClass()):
        with pytest.raises(
            TypeError, match=f"must hold 'threshold' itself to be scheduled, {type(module).__name__} has"
        ):
            ThresholdSchedule(module, steps=3)
        assert module.threshold == 2.0 and not module.state_dict()
    with pytest.raises(TypeError, match="module must have an attribute 'threshold', function has none"):
        ThresholdSchedule(get_sigma_threshold, steps=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"start": -1.0}, {"end": math.nan}, {"steps": 0}, {"mode": "no"}, {"patience": -1}])
def test_a_rejected_schedule_leaves_the_module_alone(bad: dict[str, Any]) -> None:
    module = Thresholded()
    for wrapped in (module, torch.compile(module, backend="eager")):
        with pytest.raises(ValueError, match=str(*bad)):
            ThresholdSchedule(wrapped, **({"steps": 3} | bad))
        assert module.threshold == 2.0 and not module.state_dict()


def test_numbers_of_numpy() -> None:
    module = Thresholded(np.float32(4.0))
    schedule = ThresholdSchedule(module, np.float32(4.0), np.array(2), np.int64(2), patience=np.int32(1))
    assert values(schedule, 2) == [4.0, 3.0, 2.0]
    assert ThresholdSchedule(Thresholded(np.float32(4.0)), None, 2.0, 2).value == 4.0
    plateau = LogitBiasSchedule(
        fl.MAELoss(), np.float16(1.0), mode="plateau", patience=np.int64(0), factor=np.float64(0)
    )
    assert values(plateau, 2, [np.float32(1.0), torch.tensor(1.0)]) == [1.0, 1.0, 0.0]
    per_class = ThresholdSchedule(Thresholded(torch.ones(2)), [4.0, 8.0], np.array([2.0, 4.0]), 1)
    per_class.value.zero_()  # what is given out is a copy
    assert per_class.value.tolist() == [4.0, 8.0]


@pytest.mark.parametrize("mode", ["linear", "cosine", "plateau", "peak"])
def test_resumes_where_it_stopped(mode: str) -> None:
    def build(start: float | None) -> tuple[Thresholded, ThresholdSchedule]:
        module = Thresholded()
        steps = None if mode == "plateau" else 10
        return module, ThresholdSchedule(module, start, 2.0, steps, mode=mode, patience=2 if mode == "peak" else 1)

    metrics = [0.9, 0.8, 0.8, 0.8, 0.7, 0.9, 0.9, 0.9, 0.6]
    arguments = [(metric,) if mode in ("plateau", "peak") else () for metric in metrics]
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
    assert module.threshold.item() == 2.0 if mode == "peak" else 2.0 < module.threshold.item() < 9.0
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
