"""The counting, judging and comparing of measurements, on rows and calls whose answers are known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from benchmarks import jobs as jobs_module
from benchmarks import report
from benchmarks.__main__ import adjusted
from benchmarks.calls import Buffers, Call
from benchmarks.cases import LOSSES, ROW_LOSSES, Case
from benchmarks.jobs import Job, run_job
from benchmarks.measure import Timing, peak_extra_bytes, time_calls
from benchmarks.models import parameter_count, resnet50
from benchmarks.providers import PROVIDERS, Provider, WrongResult, check, exact
from benchmarks.results import Results, Row, merged
from benchmarks.suites import HEADLINE, LARGE, SUITES, SWEPT_CLASSES
from benchmarks.targets import GOALS, Goal, Index, copies, judge, judge_accuracy, speed_up
from benchmarks.traffic import moved_bytes


def row(loss: str = "cross_entropy", provider: str = "fused", time_us: float = 100.0, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "loss": loss,
        "provider": provider,
        "mode": "fwd_bwd",
        "shape": (4096, 1000),
        "dtype": "float32",
        "device": "cpu",
        "layout": "contiguous",
        "threads": 1,
        "timer": "wall",
        "time_us": time_us,
        "low_us": 0.95 * time_us,
        "high_us": 1.05 * time_us,
        "samples": 9,
        "copy_us": 50.0,
        "floor_bytes": 2 * 4 * 4096 * 1000,
        "moved_bytes": None,
        "checked_rows": 4096,
        "first_s": 0.0,
        "ce_us": 80.0,
        "peak_bytes": 4 * 4096 * 1000,
    }
    return Row(**{**fields, **changes})


MACHINE = {"processor": "a processor", "commit": "0123456"}


def test_row_derives_bandwidth_and_copies() -> None:
    step = row(time_us=100.0)
    assert step.copies == 2.0 and step.share_of_copy == 0.5
    assert step.gb_per_s == pytest.approx(2 * 4 * 4096 * 1000 / 100e-6 / 1e9)
    # A forward without gradient reads only: as fast as the copy's reads is half of the copy's time.
    assert row(mode="fwd", time_us=25.0, floor_bytes=4 * 4096 * 1000).share_of_copy == 1.0


def test_results_survive_the_file(tmp_path: Path) -> None:
    before = Results(MACHINE, [row(), row(provider="torch", time_us=300.0)], [{"loss": "mae"}], [{"batch": 3}], [])
    before.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == before
    assert json.loads((tmp_path / "r.json").read_text())["rows"][1]["provider"] == "torch"


def test_foreign_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"rows": [{"time": 3}]}')
    with pytest.raises(SystemExit, match=r"x\.json is not a result file"):
        Results.load(tmp_path / "x.json")


@pytest.mark.parametrize(("ours", "passed"), [(57.0, True), (58.0, False)])
def test_worst_case_decides_an_upper_bound(ours: float, passed: bool) -> None:
    goal = Goal("T1", "", lambda r: True, copies, at_most=1.15)
    verdict = judge(goal, Index([row(time_us=10.0), row(time_us=ours, threads=2)]), "cpu")
    assert (verdict.value, verdict.cases, verdict.passed) == (ours / 50.0, 2, passed)
    assert "2 threads" in verdict.worst


def test_ratios_are_to_the_fastest_peer_of_the_same_setting() -> None:
    rows = [row(), row(provider="torch", time_us=400.0), row(provider="snippet", time_us=300.0)]
    rows += [row(provider="torch", time_us=1.0, threads=2), row(provider="compile", time_us=1.0)]
    goal = Goal("T3", "", lambda r: True, speed_up("torch", "snippet"), 3.0)
    assert judge(goal, Index(rows), "cpu").value == 3.0
    assert judge(goal, Index(rows), "cuda").passed is None
    assert judge(goal, Index(rows[:1]), "cpu").text == "not measured"


def test_geometric_mean() -> None:
    rows = [row(), row(provider="compile", time_us=100.0), row(loss="hem"), row("hem", "compile", 400.0)]
    verdict = judge(Goal("T5", "", lambda r: True, speed_up("compile"), 1.5, mean=True), Index(rows), "cpu")
    assert verdict.value == pytest.approx(2.0) and verdict.passed


def test_every_target_is_judged() -> None:
    assert {goal.target for goal in GOALS} == {f"T{n}" for n in range(1, 12)}  # T12 is about errors
    for goal in GOALS:
        assert (goal.at_least is None) != (goal.at_most is None)
    rows = [row(loss, shape=shape) for loss in LOSSES for shape in ((4096, 1000), (65536, 10), (256, 10))]
    rows += [dataclasses.replace(r, provider=p, time_us=500.0) for r in rows for p in ("torch", "compile", "reference")]
    judged = {goal.target for goal in GOALS if judge(goal, Index(rows), "cpu").value is not None}
    assert judged == {"T1", "T2", "T3", "T5", "T9", "T10", "T11"}


def error_row(provider: str, gradient: float | None, value: float | None = 1e-8, dtype: str = "float32") -> Any:
    found = {"value_error": value, "gradient_error": gradient, "scaled_gradient_error": gradient}
    return {"loss": "cross_entropy", "dtype": dtype, "device": "cpu", "provider": provider, **found}


@pytest.mark.parametrize(
    ("ours", "plain", "passed"), [(1e-7, 1e-7, True), (2e-7, 1e-7, False), (1e-7, None, True), (None, 1e-7, False)]
)
def test_accuracy_is_judged_against_plain(ours: float | None, plain: float | None, passed: bool) -> None:
    rows = [error_row("fused", ours), error_row("plain", plain), error_row("reference", 1e-3)]
    ((_, _, verdict),) = judge_accuracy(Results({}, accuracy=rows))
    assert verdict.passed is passed


def test_bfloat16_loss_is_judged() -> None:
    rows = [error_row("fused", 1e-3, 1e-8, "bfloat16"), error_row("plain", 1e-3, 1e-3, "bfloat16")]
    _, (_, _, verdict) = judge_accuracy(Results({}, accuracy=rows))
    assert verdict.passed and verdict.value == pytest.approx(1e5)


def test_compare_flags_what_is_slower_beyond_the_noise() -> None:
    old = Results(MACHINE, [row(), row("hem"), row("mae"), row("gce"), row("js")])
    new = Results(MACHINE, [row(time_us=130.0), row("hem", time_us=108.0), row("mae", time_us=50.0)])
    new.rows = [dataclasses.replace(r, suite="another") for r in new.rows]
    new.rows += [row("gce", time_us=120.0, low_us=90.0), row("ae", time_us=1e6)]
    text, regressed = report.compare(old, new)
    verdicts = {line.split()[1]: line.split("|")[-2].strip() for line in text.splitlines() if "float32" in line}
    assert verdicts == {"cross_entropy": "**slower**", "gce": "within the noise", "mae": "faster"}
    assert regressed and "4 of our cases" in text
    assert not report.compare(old, old)[1]


def test_two_suites_make_one_report(tmp_path: Path) -> None:
    summary = [row(suite="summary", time_us=100.0), row(suite="summary", provider="reference", time_us=600.0)]
    compiled = [row(suite="compile", time_us=200.0), row(suite="compile", provider="compile", time_us=500.0)]
    compiled += [row("hem", suite="compile"), row("hem", "compile", 900.0, suite="compile")]
    compiled += [row("mae", suite="compile", shape=(256, 10), threads=2)]
    rejected = {"case": "mae-256x10-float32 on cpu, 2 threads, wall", "provider": "compile", "reason": "compile fails"}
    files = [Results({**MACHINE, "command": "a"}, summary), Results({**MACHINE, "command": "b"}, compiled)]
    files[1].rejected.append(rejected)
    (one,) = merged(files)
    assert one.rows == summary + compiled and one.rejected == [rejected]
    assert one.machine == {**MACHINE, "command": "a; b"}
    goal = Goal("T5", "", lambda r: True, speed_up("compile"), 1.0)
    verdict = judge(goal, Index(one.rows), "cpu")
    assert (verdict.value, verdict.cases) == (2.5, 2)  # not 5: our 100 us took no turns with the compiler
    text = report.report(files, tmp_path)
    assert text.count("\n## a processor") == 1
    table = text[text.index("### torch.compile of the reference over ours") :].splitlines()
    assert [line for line in table if line.startswith(("| loss", "| cross", "| hem", "| mae", "| geo"))][:5] == [
        "| loss | 4096x1000 | 256x10, 2 threads |",
        "| cross_entropy | 2.50 |  |",
        "| mae |  | failed |",
        "| hem | 9.00 |  |",
        "| geometric mean | 4.74 | failed |",
    ]


def test_the_last_file_counts_for_what_several_measured() -> None:
    old = Results(MACHINE, [row(time_us=100.0), row(provider="torch", time_us=400.0), row("hem")])
    new = Results(MACHINE, [row(time_us=80.0)])
    (one,) = merged([old, new])
    assert [(r.loss, r.provider, r.time_us) for r in one.rows] == [
        ("cross_entropy", "fused", 80.0),
        ("hem", "fused", 100.0),
    ]
    assert len(merged([old, Results({**MACHINE, "processor": "another"}, [row()])])) == 2


def test_losing_cases_are_listed_and_winning_ones_are_not() -> None:
    rows = [row(), row(provider="compile", time_us=80.0), row("hem"), row("hem", "compile", 200.0)]
    text = report.losing_cases(Index(rows))
    assert "| cross_entropy 4096x1000" in text and "| compile | 1.25 |" in text and "hem" not in text
    assert "no measured case" in report.losing_cases(Index(rows[2:]))


def test_report_writes_tables_and_pictures(tmp_path: Path) -> None:
    rows = [row(name, "fused", 90.0 + k) for k, name in enumerate(LOSSES)]
    rows += [
        dataclasses.replace(r, shape=(max(2, (1 << 20) // c), c), floor_bytes=8 << 20)
        for r in rows
        for c in SWEPT_CLASSES
    ]
    rows += [dataclasses.replace(r, provider="reference", time_us=6 * r.time_us) for r in rows]
    step: dict[str, Any] = {"model": "net", "batch": 8, "classes": 10, "loss": "mae", "step_us": 1e3, "loss_us": 10.0}
    step |= {"images_per_s": 8e3, "loss_share": 0.01, "step_peak_bytes": 1, "loss_peak_bytes": 1}
    rejected = [{"case": "a case", "provider": "torch", "reason": "torch computes another loss"}]
    errors = [error_row(p, 1e-7) for p in ("fused", "plain", "reference")]
    steps = [{**step, "provider": p} for p in ("plain", "fused")]
    text = report.report([Results(MACHINE, rows, errors, steps, rejected)], tmp_path)
    for part in (
        "| T12 |",
        "a processor",
        "nce_agce",
        "torch computes another loss",
        "net | 8 x 10",
        "(copy_share.png)",
    ):
        assert part in text
    for name in ("copy_share", "speed_up", "memory"):
        image = plt.imread(tmp_path / f"{name}.png")
        assert image.std() > 0.05  # something is drawn


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


class Sleep:
    """A call that takes a known time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def prepare(self, i: int) -> None:
        return None

    def run(self, i: int, prepared: None) -> None:
        import time

        time.sleep(self.seconds)


def test_times_are_times() -> None:
    times = time_calls({"short": Sleep(0.001), "long": Sleep(0.004)}, 0.02)
    assert 1000 <= times["short"].median < 4000 <= times["long"].median


def test_processor_time_leaves_out_waiting() -> None:
    assert time_calls({"sleep": Sleep(0.004)}, 0.02, "cpu")["sleep"].median < 1000


@pytest.mark.parametrize(("threads", "timer"), [(1, "cpu"), (2, "wall")])
def test_processor_time_is_for_one_thread(threads: int, timer: str) -> None:
    job = Job(Case("mae", (64, 12)), ("fused",), threads=threads)
    assert adjusted(job, "cpu", 1).timer == timer and adjusted(job, "wall", 1).timer == "wall"


@pytest.mark.parametrize("threads", [1, 2])
def test_the_try_with_the_fastest_copy_is_kept(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter([(60.0, 90.0), (50.0, 100.0), (70.0, 80.0)])

    def times(calls: Any, *_: Any) -> Any:
        copy, others = next(tries)
        return {key: Timing(copy if key[0] == "copy" else others, 1.0, 999.0, 9) for key in calls}

    monkeypatch.setattr(jobs_module, "time_calls", times)
    job = adjusted(Job(Case("cross_entropy", (4, 3)), ("fused",), threads=threads), "wall", tries=3)
    (found,) = run_job(job, lambda provider, reason: None)
    assert (found.copy_us, found.time_us, found.ce_us, found.tries) == (50.0, 100.0, 100.0, 3)
    assert next(tries, None) is None


def test_the_number_of_tries_is_told() -> None:
    assert report.how_often([row()]) == "Every job was timed once.\n"
    assert "timed 3 times" in report.how_often([row(tries=3), row(tries=3)])
    assert "timed 1 to 3 times" in report.how_often([row(tries=3), row()])


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
    for shape in ((4096, 1000), (65536, 10), (256, 10), *LARGE):
        assert {j.case.loss for j in jobs if j.case.shape == shape and j.threads == 1} == set(ROW_LOSSES)
        assert {j.case.loss for j in jobs if j.case.shape == shape and j.threads == 2} == set(HEADLINE)


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
    assert {job.case.loss for job in jobs} == set(LOSSES)
    for job in jobs:
        assert job.providers[0] == "fused" and math.prod(job.case.shape) > 0
    keys = [(job.key, mode) for job in jobs for mode in job.modes]
    assert len(set(keys)) == len(keys)


def test_resnet50_has_the_published_size() -> None:
    with torch.device("meta"):
        assert parameter_count(resnet50(1000)) == 25_557_032
