"""What a GPU at hand will be used for, tried without one: stages and what they name, their state, the smoke test."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

import fused_losses as fl
from benchmarks import gpu_check, gpu_profile, gpu_smoke
from benchmarks.cases import Case
from benchmarks.gpu_check import ROOT, Record, Stage, Step
from benchmarks.results import Results, Row
from benchmarks.suites import SUITES
from benchmarks.test_commands import said_of_itself
from fused_losses import _z_autograd

STAGES = gpu_check.stages("python", "90", None)
STEPS = [step for stage in STAGES for step in stage.steps]
PY = sys.executable


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


# ---- What is named exists --------------------------------------------------------------------------------------------


def test_the_dry_run_shows_every_stage_and_command() -> None:
    script = [str(ROOT / "benchmarks" / "gpu_check.sh"), "--dry-run"]
    result = subprocess.run(script, env={**os.environ, "PYTHON": PY}, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^stage (\w): .*?(\d+) s of 540 s at most(?:, all at once)?$", result.stdout, re.MULTILINE) == [
        (stage.key, str(stage.seconds)) for stage in STAGES
    ]
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")] == [s.name for s in STEPS]


def test_stages_end_within_nine_minutes_and_have_names_of_their_own() -> None:
    assert [stage.key for stage in STAGES] == list("abcdef")
    assert all(stage.seconds <= gpu_check.STAGE_SECONDS <= 540 for stage in STAGES)
    assert len({step.name for step in STEPS}) == len(STEPS)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_files_modules_suites_and_options_of_a_step_exist(step: Step) -> None:
    command = step.arguments(60)
    assert "{" not in "".join(command)
    for word in command:
        if word.endswith((".py", ".sh")) or word.startswith("tests"):
            assert (ROOT / word).exists(), word
    plugins = [command[i + 1] for i, word in enumerate(command) if word == "-p" and ":" not in command[i + 1]]
    for module in filter(None, [option(command, "-m"), *plugins]):
        assert importlib.util.find_spec(module) is not None, module
    suite = option(command, "--suite")
    assert suite is None or (suite in SUITES and list(SUITES[suite]()))
    if "benchmarks/gpu_smoke.py" in command or option(command, "-m") not in (None, "pytest"):
        start = command.index("python")
        for word in command[start + 2 :]:
            if word.startswith("--"):
                assert word in said_of_itself(*command[start + 1 : start + 2 + (command[start + 1] == "-m")])


@pytest.mark.slow
def test_the_tests_can_be_collected_where_nothing_can_be_installed() -> None:
    """With pytest, its plugins and hypothesis, but without the packages that hide_optional hides."""
    command = next(step for step in STEPS if step.name == "tests").arguments(60)
    chosen = command[command.index("--first") :]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    pytest_command = [
        PY,
        "-m",
        "pytest",
        "-p",
        "hide_optional",
        "-p",
        "benchmarks.resume_tests",
        "--collect-only",
        "-q",
        *chosen,
    ]
    result = subprocess.run(pytest_command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout[-3000:]
    collected = [line for line in result.stdout.splitlines() if "::" in line]
    assert len(collected) > 100 and len(set(collected)) == len(collected)
    assert collected[0].startswith("tests/test_cuda.py")
    assert not any("test_cpp.py" in line for line in collected)


def test_wheels_are_installed_and_one_of_ours_saves_the_compilation(tmp_path: Path) -> None:
    peer = tmp_path / "liger_kernel-1.0-py3-none-any.whl"
    peer.touch()
    with_peer = {step.name: step for step in gpu_check.stages("python", "90", tmp_path)[0].steps}
    assert with_peer["wheels"].command[-1] == str(peer) and "compile" in with_peer
    (tmp_path / "fused_losses-0.1.0-cp312-cp312-linux_x86_64.whl").touch()
    with_both = {step.name: step for step in gpu_check.stages("python", "90", tmp_path)[0].steps}
    assert "compile" not in with_both and "unpack" in with_both
    assert not any("fused_losses-" in word for word in with_both["wheels"].command)


def test_binaries_come_out_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "fused_losses-0.1.0-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fused_losses/libfused_losses_ops.so", b"operators")
        archive.writestr("fused_losses/__init__.py", b"code")
    (tmp_path / "fused_losses").mkdir()
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    gpu_check.unpack(wheel)
    assert [path.name for path in (tmp_path / "fused_losses").iterdir()] == ["libfused_losses_ops.so"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fused_losses/__init__.py", b"code")
    with pytest.raises(SystemExit, match="has no binaries"):
        gpu_check.unpack(wheel)


# ---- Running and going on --------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    for name, value in {
        "STATE": folder,
        "LOGS": folder / "logs",
        "REPORT": folder / "report",
        "RESULTS": folder / "results.json",
        "PASSED_TESTS": folder / "passed-tests.txt",
    }.items():
        monkeypatch.setattr(gpu_check, name, value)
    monkeypatch.setattr(gpu_check, "digest", lambda: "these sources")
    return folder


def step(name: str, code: str, seconds: int = 60, **more: object) -> Step:
    return Step(name, seconds, (PY, "-c", code), **more)  # type: ignore[arg-type]


def statuses(record: Record) -> dict[str, object]:
    return {name: about["status"] for name, about in record.steps.items()}


def check(record: Record, *steps: Step, resume: bool = False, seconds: float = math.inf) -> bool:
    return gpu_check.check([Stage("x", "a stage", steps)], record, resume, time.monotonic() + seconds)


def test_steps_are_told_apart_by_how_they_end(state: Path, tmp_path: Path) -> None:
    record = Record(tmp_path / "out")
    steps = [
        step("good", "print('fine')"),
        step("bad", "raise SystemExit(3)"),
        step("slow", "import time; time.sleep(60)", 1),
        step("long", "print('UNFINISHED: 2 jobs are left')"),
        step("tool", "", needs="no-such-program"),
    ]
    assert not check(record, *steps)
    assert [str(status)[:9] for status in statuses(record).values()] == [
        "passed", "FAILED (3", "CUT OFF a", "unfinishe", "left out:"
    ]  # fmt: skip
    assert check(record, steps[0], steps[3], steps[4])


def test_three_files_come_out_after_every_step(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"from pathlib import Path; Path({str(state)!r}, 'results.json').write_text('rows'); print('said')"
    check(Record(out), step("one", code), step("two", "raise SystemExit(1)"))
    assert sorted(path.name for path in out.iterdir()) == ["logs.tar.gz", "report.md", "results.json"]
    assert (out / "results.json").read_text() == "rows"
    assert (
        "| one | passed |" in (out / "report.md").read_text()
        and "| two | FAILED (1) |" in (out / "report.md").read_text()
    )
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["logs/one.log", "logs/state.json", "logs/two.log"]
        log = archive.extractfile("logs/one.log")
        assert log is not None and log.read().endswith(b"said\n")


def test_steps_beside_each_other_run_at_once(state: Path, tmp_path: Path) -> None:
    flag = [tmp_path / name for name in ("one", "other")]
    wait = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(.01)"
    steps = [step("one", wait.format(*map(str, flag)), 30), step("other", wait.format(*map(str, flag[::-1])), 30)]
    record = Record(tmp_path / "out")
    assert gpu_check.check([Stage("x", "a stage", (*steps,), beside=True)], record, False, math.inf)
    assert statuses(record) == {"one": "passed", "other": "passed"}


def test_parts_of_the_smoke_test_share_all_problems() -> None:
    todo = gpu_smoke.problems(quick=True)
    assert sum(len(todo[part::3]) for part in range(3)) == len(todo)


def test_resume_leaves_out_what_passed_for_the_same_sources(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The folder of results may be emptied in between: the state is elsewhere.
    runs = tmp_path / "runs"
    steps = [
        step("once", f"open({str(runs)!r}, 'a').write('once ')"),
        step("again", f"open({str(runs)!r}, 'a').write('again '); raise SystemExit(1)"),
    ]
    for number, resume in enumerate((False, True, False)):
        again = () if resume else ("once", "again")
        check(Record(tmp_path / f"out{number}", again), *steps, resume=resume)
    assert runs.read_text() == "once again again once again "
    monkeypatch.setattr(gpu_check, "digest", lambda: "other sources")
    check(Record(tmp_path / "out"), steps[0], resume=True)
    assert runs.read_text().endswith("once again once ")


def test_stages_in_commands_of_their_own_keep_each_others_results(state: Path, tmp_path: Path) -> None:
    record = Record(tmp_path / "out")
    check(record, step("main", f"open({str(gpu_check.RESULTS)!r}, 'w').write('rows')"))
    check(Record(tmp_path / "out", again=["peers"]), step("peers", ""))
    assert gpu_check.RESULTS.read_text() == "rows"
    assert list(Record(tmp_path / "out").steps) == ["main", "peers"]
    Record(tmp_path / "out", again=["main"])
    assert not gpu_check.RESULTS.exists()


def test_nothing_begins_without_time_or_without_what_is_essential(state: Path, tmp_path: Path) -> None:
    record = Record(tmp_path / "out")
    assert not check(record, step("late", ""), seconds=5)
    assert statuses(record) == {"late": "FAILED: no time left"}
    record = Record(tmp_path / "out", again=["late"])
    assert not check(record, step("build", "raise SystemExit(1)", essential=True), step("smoke", ""))
    assert list(statuses(record)) == ["build"]


def test_long_logs_keep_both_ends(state: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"begin" + b"x" * 2 * gpu_check.LARGEST_LOG + b"end")
    gpu_check.shorten(log)
    text = log.read_bytes()
    assert len(text) < 1.1 * gpu_check.LARGEST_LOG and text.startswith(b"begin") and text.endswith(b"end")


@pytest.mark.long
def test_a_run_of_tests_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pathlib, pytest\n"
        "@pytest.mark.parametrize('i', range(4))\n"
        "def test_it(i):\n    assert i != 3 or pathlib.Path('repaired').exists()\n"
    )

    def run(minutes: str) -> tuple[int, str]:
        options = ("-p", "benchmarks.resume_tests", "--passed-file", "passed", "--stop-after-minutes", minutes)
        command = [PY, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return result.returncode, result.stdout

    status, said = run("0")
    assert status == 0 and "UNFINISHED: 4 tests are left" in said
    status, said = run("5")
    assert status == 1 and "1 failed, 3 passed" in said
    (tmp_path / "repaired").touch()
    status, said = run("5")
    assert status == 0 and re.search(r"\b1 passed", said)
    assert run("5")[0] == 0


# ---- Smoke test and profiles -----------------------------------------------------------------------------------------


def test_the_smoke_test_runs_on_a_cpu() -> None:
    script = [PY, str(ROOT / "benchmarks" / "gpu_smoke.py"), "--device", "cpu", "--quick", "--minutes", "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^[1-9]\d* calls agree with float64, 0 do not$", result.stdout, re.MULTILINE)


def test_the_smoke_test_begins_with_what_racecheck_should_see() -> None:
    todo = gpu_smoke.problems(quick=True)
    of_z_error = list(todo[6]())
    assert {case.options.get("statistic") for case in of_z_error} >= {"logit", "prob", "loss", "target", "residual"}
    assert max(case.logits.nbytes for case in of_z_error) >= _z_autograd._LARGE
    names, shapes = gpu_smoke.LOSSES_OF_MANY_ROWS, gpu_smoke.MANY_ROWS
    assert [make.args for make in todo[:6]] == [(name, *shape) for name in names for shape in shapes]  # type: ignore[attr-defined]
    for name in names:
        (case,) = gpu_smoke.many_rows_case(name, 70, 100, torch.float32)
        assert gpu_smoke.complaint(case, "cpu") is None


@pytest.mark.parametrize("dtype", gpu_smoke.DTYPES, ids=str)
def test_the_smoke_test_notices_wrong_results(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cases = [*gpu_smoke.row_cases("staged", "mae", "rows in a wider matrix", 10, dtype)]
    assert [gpu_smoke.complaint(case, "cpu") for case in cases] == [None] * len(cases)
    right = cases[0].function

    def off(*args: object, **options: object) -> torch.Tensor:
        return right(*args, **options) * 1.03

    found = gpu_smoke.complaint(cases[0]._replace(function=off), "cpu")
    assert found is not None and "mae: loss is off by" in found
    flips = iter((1.0, 1.0 + 1e-6))

    def random(*args: object, **options: object) -> torch.Tensor:
        return right(*args, **options) * next(flips)

    found = gpu_smoke.complaint(cases[0]._replace(function=random), "cpu")
    assert found is not None and ("two runs differ" in found or dtype == torch.float64)


def test_the_smoke_test_allows_what_rounding_decides() -> None:
    def case(name: str, logits: torch.Tensor) -> gpu_smoke.Case:
        entry, target = fl.LOSSES[name], torch.zeros(len(logits), dtype=torch.long)
        return gpu_smoke.Case("staged", name, entry.function, entry.reference, logits, target, {}, "")

    # Errors 0, 0.7, 0.6, 1.1 have the mean 0.6; without errors there is no doubt, nor of other losses.
    logits = torch.tensor([[0.0, 0.5, 0.4, 0.9], [9.0, 0.0, 0.0, 0.0]])
    assert gpu_smoke.share_in_doubt(case("hem", logits)) in (1 / 2, 1 / 3)
    assert gpu_smoke.share_in_doubt(case("hem", logits[1:])) == gpu_smoke.share_in_doubt(case("mae", logits)) == 0
    opposite = case("unhinged", torch.tensor([[1.0, 0.0], [0.0, 1.0 + 1e-4]]))
    assert gpu_smoke.cancelled(opposite, "cpu", gpu_smoke.exact(opposite, "cpu")[0]) == pytest.approx(2e4, rel=0.01)


def test_gaps_between_rows_are_nan() -> None:
    wide = torch.randn(4, 9)
    copied = gpu_smoke.copy_to("cpu", wide[:, 1:-2])
    assert copied.stride() == (9, 1) and torch.equal(copied, wide[:, 1:-2])
    gaps = torch.ones(4, 9, dtype=torch.bool)
    gaps[:, 1:-2] = False
    stored = copied.as_strided((4, 9), (9, 1), 0)
    assert bool(stored[gaps].isnan().all()) and not bool(stored[~gaps].isnan().any())


def row(loss: str, classes: int, copies: float, over_ce: float) -> Row:
    case = Case(loss, (65536, classes), "bfloat16", "cuda")
    return Row(
        loss=loss, provider="fused", mode="fwd_bwd", shape=case.shape, dtype=case.dtype, device="cuda",
        layout="contiguous", threads=1, timer="device", time_us=100.0 * copies, low_us=0.0, high_us=0.0,
        copy_us=100.0, floor_bytes=case.floor_bytes("fwd_bwd"), moved_bytes=None, checked_rows=9, first_s=0.0,
        ce_us=100.0 * copies / over_ce,
    )  # fmt: skip


def test_profiles_know_all_kernels() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    names = set(re.findall(r"(\w+)\(\s*const __grid_constant__", sources))
    assert {"softmax_in_tiles", "multi_reduction_in_registers", "statistics"} <= names
    pattern = re.compile(gpu_profile.KERNELS.removeprefix("regex:"))
    assert [name for name in names if not pattern.search(name)] == []


def test_profiles_are_of_the_rows_that_miss_their_targets_most() -> None:
    rows = [
        row("cross_entropy", 1000, 1.15, 1.0),
        row("cross_entropy", 100, 2.3, 1.0),
        row("mae", 1000, 1.2, 1.04),
        row("bi_tempered", 1000, 9.0, 4.5),
        row("gce", 1001, 1.4, 1.26),
    ]
    worst = gpu_profile.worst(Results({}, rows), 3)
    assert [(found.loss, found.num_classes) for _, found in worst] == [
        ("bi_tempered", 1000), ("cross_entropy", 100), ("gce", 1001)
    ]  # fmt: skip
    assert [round(ratio, 2) for ratio, _ in worst] == [3.0, 2.0, 1.2]
    command = gpu_profile.command(worst[0][1].case, Path("log"))
    assert command[0] == "ncu" and option(command, "--clock-control") == "none"
    given = option(command, "--run")
    assert given is not None and json.loads(given)["loss"] == "bi_tempered" and shlex.join(command)
