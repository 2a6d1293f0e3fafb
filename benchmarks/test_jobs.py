"""Jobs, what is measured of calls, suites and the profile, on cases whose answers are known."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import cpu_profile
from benchmarks import jobs as jobs_module
from benchmarks.__main__ import adjusted, losses
from benchmarks.calls import Buffers, Call, Repeated
from benchmarks.cases import LOSSES, ROW_LOSSES, Case
from benchmarks.jobs import Job, run_job
from benchmarks.measure import Timing, peak_extra_bytes, time_calls
from benchmarks.models import parameter_count, resnet50
from benchmarks.providers import PROVIDERS, Provider, WrongResult, check, exact
from benchmarks.results import Results
from benchmarks.suites import LARGE_SHAPES, MAIN_LOSSES, SUITES
from benchmarks.traffic import moved_bytes


def test_wrong_result_is_an_error() -> None:
    case = Case("cross_entropy", (16, 5))
    logits, target = case.inputs()
    want = exact(case, logits, target)
    check("torch", case, F.cross_entropy, logits, target, want)
    with pytest.raises(WrongResult, match="torch computes another loss of cross_entropy-16x5-float32"):
        check("torch", case, lambda x, t: 1.01 * F.cross_entropy(x, t), logits, target, want)
    with pytest.raises(WrongResult, match="another gradient"):
        check("torch", case, lambda x, t: F.cross_entropy(x.detach() + 0 * x, t), logits, target, want)


def test_job_gives_a_row_per_provider_and_mode() -> None:
    rejected: list[str] = []
    job = Job(Case("mae_auto", (64, 12)), ("fused", "snippet", "torch"), ("fwd", "bwd_scaled"), seconds=0.001)
    rows = list(run_job(job, lambda name, reason: rejected.append(name)))
    assert [(r.provider, r.mode) for r in rows] == [(p, m) for p in ("fused", "snippet") for m in job.modes]
    for found in rows:
        assert found.ce_us is not None and found.ce_us > 0
        assert 0 < found.low_us <= found.time_us <= found.high_us and found.checked_rows == 64
    assert not rejected


def sleep(seconds: float) -> Repeated:
    return Repeated(lambda: time.sleep(seconds))


def test_times_are_times() -> None:
    times = time_calls({"short": sleep(0.001), "long": sleep(0.004)}, 0.02)
    assert times["short"].median >= 1000 and times["long"].median >= 4000  # no upper bound: others may be busy


def test_processor_time_leaves_out_waiting() -> None:
    assert time_calls({"sleep": sleep(0.004)}, 0.02, "cpu")["sleep"].median < 4000


@pytest.mark.parametrize(("threads", "timer"), [(1, "cpu"), (2, "wall")])
def test_processor_time_is_for_one_thread(threads: int, timer: str) -> None:
    job = Job(Case("mae", (64, 12)), ("fused",), threads=threads)
    assert adjusted(job, "cpu", 1).timer == timer and adjusted(job, "wall", 1).timer == "wall"


@pytest.mark.parametrize("threads", [1, 2])
def test_the_try_with_the_fastest_copy_is_kept(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter([(60.0, 90.0), (50.0, 100.0), (70.0, 80.0)])

    def times(calls: Any, *_: Any) -> Any:
        copy, others = next(tries)
        return {key: Timing(copy if key[0] == "copy" else others, 1.0, 999.0) for key in calls}

    monkeypatch.setattr(jobs_module, "time_calls", times)
    job = adjusted(Job(Case("cross_entropy", (4, 3)), ("fused",), threads=threads), "wall", tries=3)
    (found,) = run_job(job, lambda provider, reason: None)
    assert (found.copy_us, found.time_us, found.ce_us, found.tries) == (50.0, 100.0, 100.0, 3)
    assert next(tries, None) is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, t: 1 / 0, "compile fails on mae-64x12-float32: ZeroDivisionError: division by zero"),
        (lambda x, t: 1.01 * LOSSES["mae"].fused(x, t), "compile computes another loss of mae-64x12"),
    ],
)
def test_a_failing_peer_is_told_and_the_others_timed(
    function: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "compile", Provider("compile", lambda case: function, copies={}))
    told: list[str] = []
    job = Job(Case("mae", (64, 12)), ("fused", "compile"), seconds=0.001)
    rows = list(run_job(job, lambda provider, reason: told.append(reason)))
    assert [r.provider for r in rows] == ["fused"]
    assert len(told) == 1 and told[0].startswith(reason)


def test_our_own_failure_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "fused", Provider("fused", lambda case: lambda x, t: 1 / 0))  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        list(run_job(Job(Case("mae", (64, 12)), ("fused",)), lambda provider, reason: None))


def test_compiled_code_is_checked_at_the_shape_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def function(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return F.cross_entropy(logits, target)

    monkeypatch.setitem(PROVIDERS, "compile", Provider("compile", lambda case: function, copies={}))
    monkeypatch.setitem(jobs_module.CHECKED_LOGITS, "cpu", 100)
    case = Case("cross_entropy", (64, 10))
    rows = list(run_job(Job(case, ("fused", "compile"), seconds=0.001), lambda provider, reason: None))
    assert set(shapes) == {case.shape} and {r.checked_rows for r in rows} == {64}


def test_the_suite_of_the_compiler_has_every_loss_at_every_shape() -> None:
    jobs = list(SUITES["compile"]())
    for shape in ((4096, 1000), (65536, 10), (256, 10), *LARGE_SHAPES):
        assert {j.case.loss for j in jobs if j.case.shape == shape and j.threads == 1} >= set(ROW_LOSSES)
        assert {j.case.loss for j in jobs if j.case.shape == shape and j.threads == 2} == set(MAIN_LOSSES)


def test_memory_and_traffic_of_known_calls() -> None:
    case = Case("cross_entropy", (512, 100))
    logits, target = case.inputs()
    size = case.logits_bytes
    buffers = Buffers.of(case, logits, target, count=2)
    for count, function in ((1, lambda x, t: (x * 2.0).sum()), (2, lambda x, t: (x * 2.0 + 1.0).sum())):
        peak = peak_extra_bytes(Call(function, "fwd", buffers), "cpu")
        assert count * size <= peak <= count * size + 64  # and scalars
    assert moved_bytes(lambda: logits * 2.0) == 2 * size
    assert moved_bytes(lambda: logits.view(-1)[::2].t()) == 0
    assert moved_bytes(lambda: logits + logits[:, :1].expand_as(logits)) == 2 * size + 512 * 4
    assert moved_bytes(lambda: logits.gather(1, target.unsqueeze(1))) == 512 * (8 + 4 + 4)


def test_fused_step_moves_little_more_than_the_floor() -> None:
    case = Case("mae", (512, 100))
    buffers = Buffers.of(case, *case.inputs(), count=2)
    call = Call(LOSSES["mae"].fused, "fwd_bwd", buffers)
    moved = moved_bytes(lambda: call.run(0, call.prepare(0)), at_once=True)
    assert case.floor_bytes("fwd_bwd") <= moved <= 1.05 * case.floor_bytes("fwd_bwd")


@pytest.mark.parametrize("suite", SUITES)
def test_suites_name_every_loss_and_no_job_twice(suite: str) -> None:
    jobs = list(SUITES[suite]())
    assert {job.case.loss for job in jobs} == set(MAIN_LOSSES if suite == "cuda_compile" else LOSSES)
    for job in jobs:
        assert job.providers[0] == "fused" and math.prod(job.case.shape) > 0
    keys = [(job.key, mode) for job in jobs for mode in job.modes]
    assert len(set(keys)) == len(keys)


def test_minutes_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(suite="compile", only="hem-", timer="wall", tries=1, minutes=0.0, out=tmp_path / "r")
    results = Results({})
    losses(results, options)
    assert not results.rows and "10 jobs are left" in capsys.readouterr().out


@pytest.mark.parametrize("case", [Case("cross_entropy", (32, 10)), Case("hem", (1, 6, 32, 32), layout="channels_last")])
def test_profile_divides_a_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_profile, "MIN_ROUNDS", 9)
    shares = cpu_profile.by_size(case)
    assert shares.whole >= shares.call >= 0 and shares.arithmetic >= 0 and shares.memory >= -1e-9
    assert shares.call + shares.arithmetic + shares.memory == pytest.approx(shares.whole)
    few = cpu_profile.step_of(cpu_profile.with_rows(case, 7), 1).buffers.leaves[0]
    assert few.stride(1) == (1 if len(case.shape) == 2 or case.layout == "channels_last" else 256)
    assert shares.line.count("|") == 9


def test_profile_compares_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_profile, "MIN_ROUNDS", 9)
    before = torch.get_num_threads()
    line = cpu_profile.by_threads(Case("cross_entropy", (32, 10)))
    assert torch.get_num_threads() == before
    loss, logits, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
    assert (loss, logits) == ("cross_entropy", "32x10")
    assert len(numbers) == 4 and all(float(number) > 0 for number in numbers)


def test_profile_has_every_loss_at_two_shapes_and_cross_entropy_at_all() -> None:
    for shape in cpu_profile.SHAPES:
        assert {case.loss for case in cpu_profile.CASES if case.shape == shape} == set(ROW_LOSSES)
    assert sum(case.loss == "cross_entropy" for case in cpu_profile.CASES) == 7


@pytest.mark.parametrize(
    ("library", "symbol", "name"),
    [
        (
            "libfused_losses_ops.so",
            "void a::HorizontalSoftmax<float>::exp_sum<false, true>(float const*) const",
            "exp_sum<false, true>",
        ),
        ("libtorch_cpu.so", "at::add(at::Tensor)", "libtorch_cpu"),
        ("[kernel.kallsyms]", "clear_page", "kernel"),
    ],
)
def test_profile_shortens_names(library: str, symbol: str, name: str) -> None:
    assert cpu_profile.short(library, symbol) == name


def test_resnet50_has_the_published_size() -> None:
    with torch.device("meta"):
        assert parameter_count(resnet50(1000)) == 25_557_032
