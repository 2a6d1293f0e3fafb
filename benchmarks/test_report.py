"""The judging, merging and comparing of measurements, on rows whose answers are known."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.cases import LOSSES
from benchmarks.results import Results, Row, merged
from benchmarks.suites import SWEPT_CLASSES
from benchmarks.targets import (
    COMPILED_TIME,
    COPIES,
    GOALS,
    OVER_CROSS_ENTROPY,
    PLAIN_TIME,
    TORCH_TIME,
    Goal,
    Index,
    judge,
    judge_accuracy,
    speed_up,
)


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
    goal = Goal(COPIES, "", (), at_most=1.15)
    verdict = judge(goal, Index([row(time_us=10.0), row(time_us=ours, threads=2)]), "cpu")
    assert (verdict.value, verdict.cases, verdict.passed) == (ours / 50.0, 2, passed)
    assert "2 threads" in verdict.worst


def test_ratios_are_to_the_fastest_peer_of_the_same_setting() -> None:
    rows = [row(), row(provider="torch", time_us=400.0), row(provider="snippet", time_us=300.0)]
    rows += [row(provider="torch", time_us=1.0, threads=2), row(provider="compile", time_us=1.0)]
    goal = Goal(speed_up("", "torch", "snippet"), "", (), 3.0)
    assert judge(goal, Index(rows), "cpu").value == 3.0
    assert judge(goal, Index(rows), "cuda").passed is None
    assert judge(goal, Index(rows[:1]), "cpu").text == "not measured"


def test_geometric_mean() -> None:
    rows = [row(), row(provider="compile", time_us=100.0), row(loss="hem"), row("hem", "compile", 400.0)]
    verdict = judge(Goal(speed_up("", "compile"), "", (), 1.5, mean=True), Index(rows), "cpu")
    assert verdict.value == pytest.approx(2.0) and verdict.passed


def test_every_target_is_judged() -> None:
    for goal in GOALS:
        assert (goal.at_least is None) != (goal.at_most is None)
    rows = [row(loss, shape=shape) for loss in LOSSES for shape in ((4096, 1000), (65536, 10), (256, 10))]
    rows += [dataclasses.replace(r, provider=p, time_us=500.0) for r in rows for p in ("torch", "compile", "reference")]
    for measure in (COPIES, OVER_CROSS_ENTROPY, PLAIN_TIME, TORCH_TIME, COMPILED_TIME):
        goals = [goal for goal in GOALS if goal.measure is measure]
        assert goals and any(judge(goal, Index(rows), "cpu").value is not None for goal in goals)


def error_row(provider: str, gradient: float | None, value: float | None = 1e-8, dtype: str = "float32") -> Any:
    found = {"value_error": value, "gradient_error": gradient, "scaled_gradient_error": gradient}
    return {"loss": "cross_entropy", "dtype": dtype, "device": "cpu", "provider": provider, **found}


@pytest.mark.parametrize(
    ("ours", "plain", "passed"), [(1e-7, 1e-7, True), (2e-7, 1e-7, False), (1e-7, None, True), (None, 1e-7, False)]
)
def test_accuracy_is_judged_against_plain(ours: float | None, plain: float | None, passed: bool) -> None:
    rows = [error_row("fused", ours), error_row("plain", plain), error_row("reference", 1e-3)]
    ((*_, verdict),) = judge_accuracy(Results({}, accuracy=rows))
    assert verdict.passed is passed


def test_bfloat16_loss_is_judged() -> None:
    rows = [error_row("fused", 1e-3, 1e-8, "bfloat16"), error_row("plain", 1e-3, 1e-3, "bfloat16")]
    _, (*_, verdict) = judge_accuracy(Results({}, accuracy=rows))
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
    goal = Goal(speed_up("", "compile"), "", (), 1.0)
    verdict = judge(goal, Index(one.rows), "cpu")
    assert (verdict.value, verdict.cases) == (2.5, 2)  # not 5: our 100 us took no turns with the compiler
    text = report.report([one], tmp_path)
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
        "| error of the gradient over plain PyTorch's | every dtype |",
        "a processor",
        "nce_agce",
        "torch computes another loss",
        "net | 8 x 10",
    ):
        assert part in text
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib is not installed" in text
        return
    import matplotlib.pyplot as plt

    assert "(copy_share.png)" in text
    for name in ("copy_share", "speed_up"):
        image = plt.imread(tmp_path / f"{name}.png")
        assert image.std() > 0.05  # something is drawn


def test_the_number_of_tries_is_told() -> None:
    assert report.how_often([row()]) == "Every job was timed once.\n"
    assert "timed 3 times" in report.how_often([row(tries=3), row(tries=3)])
    assert "timed 1 to 3 times" in report.how_often([row(tries=3), row()])
