"""Runs that break off and are resumed end like unbroken ones, wherever and however they broke off."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
from training_runs import MARKS, ROOT, SMALL, weights

pytest.importorskip("lightning", reason="the training driver needs Lightning")
pytest.importorskip("sklearn", reason="its digits are the data")

from lightning.pytorch import Callback

from benchmarks.training import classifier, engine
from benchmarks.training.checkpoints import WholeFiles
from benchmarks.training.options import Options

pytestmark = MARKS


class Killed(Exception):
    """Stands for the end of the process."""


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def break_off(
    patch: pytest.MonkeyPatch, options: Options, end: Callable[[], None], after: int, hook: str = "training_step"
) -> BaseException:
    """Runs, calling ``end`` before the call of the hook number ``after`` (from 0); returns what ended the run."""
    calls = []
    step = getattr(engine.Classifier, hook)

    def ends(self: engine.Classifier, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == after + 1:
            end()
        return step(self, *args)

    with patch.context() as inner, pytest.raises((Killed, SystemExit)) as stop:
        inner.setattr(engine.Classifier, hook, ends)
        engine.run(options)
    return stop.value


def compare_with_unbroken(folder: Path, options: Options) -> None:
    """Resumes the run in folder / "broken"; it must end as one that never broke off."""
    broken = engine.run(dataclasses.replace(options, out=folder / "broken", resume=True))
    whole = engine.run(dataclasses.replace(options, out=folder / "whole"))
    for file in ("last.ckpt", "best.ckpt"):
        a, b = (weights(folder / run, file) for run in ("whole", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
    for name in ("epoch", "top1", "train_loss"):
        assert [epoch[name] for epoch in broken["history"]] == [epoch[name] for epoch in whole["history"]]
    assert broken["wrong_labels"] == whole["wrong_labels"] and broken["best"]["epoch"] == whole["best"]["epoch"]
    assert not list(folder.glob("*/*.part"))


RECIPES: dict[str, dict[str, Any]] = {
    "scheduled bias": {"loss": "mae", "logit_bias": "auto", "bias_schedule": "cosine", "lr_schedule": "cosine"},
    "z-error": {"loss": "gce", "z_threshold": 1.0, "warmup": 1.0, "lr_batch": 64},
    "average": {"ema": 0.9, "z_threshold": 1.0},
    "few steps": {"max_steps": 13, "epochs": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4, 5, 6, 10])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_breaks_off_anywhere_ends_like_an_unbroken_one(
    recipe: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five batches an epoch, checkpoints after every two steps and every epoch.
    options = dataclasses.replace(SMALL, **RECIPES[recipe], checkpoint_steps=2)
    break_off(monkeypatch, dataclasses.replace(options, out=tmp_path / "broken"), kill, after)
    compare_with_unbroken(tmp_path, options)


# Steps of two batches, and one of the last batch of five; nine batches of a validation.
@pytest.mark.parametrize(
    ("changes", "hook", "after", "saved"),
    [
        pytest.param({}, "training_step", 7, 8, id="step"),
        pytest.param({"accumulate": 2}, "training_step", 5, 4, id="within a step"),
        pytest.param({"accumulate": 2}, "training_step", 9, 6, id="last batch"),
        pytest.param({"accumulate": 2}, "training_step", 14, 9, id="last batch of all"),
        pytest.param({"ema": 0.9}, "validation_step", 3, 5, id="first validation"),
        pytest.param({"ema": 0.9, "z_threshold": 1.0}, "validation_step", 12, 10, id="validation"),
        pytest.param({"ema": 0.9}, "validation_step", 20, 15, id="last validation"),
        pytest.param({"epochs": 2}, "validation_step", 8, 6, id="last batch of a validation"),
    ],
)
def test_sigterm_stops_where_the_run_can_go_on(
    changes: dict[str, Any], hook: str, after: int, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(SMALL, **changes)
    before = signal.getsignal(signal.SIGTERM)
    stop = break_off(monkeypatch, dataclasses.replace(options, out=tmp_path / "broken"), terminate, after, hook)
    assert isinstance(stop, SystemExit) and stop.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / "broken" / "last.ckpt", weights_only=False)["global_step"] == saved
    compare_with_unbroken(tmp_path, options)


def test_sigterm_stops_a_run_that_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = break_off(monkeypatch, SMALL, terminate, 2)
    assert isinstance(stop, SystemExit) and stop.code == 143


def test_max_steps_end_with_a_validation_even_after_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(SMALL, max_steps=8, out=tmp_path)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        break_off(monkeypatch, options, terminate, 12, "validation_step")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [epoch["epoch"] for epoch in result["history"]] == [0, 1]
    again = engine.run(dataclasses.replace(options, resume=True))
    assert again["history"] == result["history"], "a finished run has nothing left to do"


def test_max_steps_leave_the_warm_up_as_it_is() -> None:
    rates: dict[int, list[float]] = {}

    class Rates(Callback):
        def on_train_batch_start(self, trainer: engine.Trainer, *_: Any) -> None:
            rates[steps].append(trainer.optimizers[0].param_groups[0]["lr"])

    for steps in (-1, 8):
        rates[steps] = []
        engine.fit(dataclasses.replace(SMALL, warmup=2.0, max_steps=steps), watchers=[Rates()])
    assert rates[8] == rates[-1][:8] == sorted(rates[8])


@pytest.mark.parametrize(
    "changes",
    [
        {"z_threshold": 1.0},
        {"bias_schedule": "linear", "logit_bias": "2"},
        {"loss": "elr"},
        {"loss": "hem", "loss_args": ("margin=plus",)},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_averaged_weights_go_with_losses_that_have_buffers(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(SMALL, **changes, ema=0.9, epochs=2)
    break_off(monkeypatch, dataclasses.replace(options, out=tmp_path / "broken"), kill, 6)
    compare_with_unbroken(tmp_path, options)


def test_the_best_checkpoint_is_of_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The run ends within an epoch, which makes it worse.
    options = dataclasses.replace(SMALL, max_steps=8, out=tmp_path / "steps")
    step = engine.Classifier.training_step
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.Classifier,
            "training_step",
            lambda self, batch, number: step(self, batch, number) * (-100 if self.current_epoch else 1),
        )
        result = engine.run(options)
    best = torch.load(tmp_path / "steps" / "best.ckpt", weights_only=False)
    assert result["best"]["epoch"] == 0 and len(result["history"]) == 2 and best["global_step"] == 5
    # The process ends between the two checkpoints of an epoch.
    save, names = engine.Trainer.save_checkpoint, []

    def dies(self: engine.Trainer, path: Path, *args: Any, **kwargs: Any) -> None:
        if len(names) == 3:
            raise Killed
        names.append(path)
        save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine.Trainer, "save_checkpoint", dies)
        engine.run(dataclasses.replace(SMALL, out=tmp_path / "broken"))
    compare_with_unbroken(tmp_path, SMALL)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = WholeFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint({"number": 1}, path)

    def breaks_off(content: Any, file: IO[bytes]) -> None:
        assert Path(file.name).parent == tmp_path, "another folder may be another file system"
        file.write(b"half of a checkpoint")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(torch, "save", breaks_off)
        files.save_checkpoint({"number": 2}, path)
    assert torch.load(path) == {"number": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("after", [3, 5])
def test_the_clock_of_an_epoch_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=iter(range(0, 10_000, 10)).__next__)
    monkeypatch.setattr(classifier, "time", clock)
    options = dataclasses.replace(SMALL, epochs=2, checkpoint_steps=2, out=tmp_path)
    break_off(monkeypatch, options, kill, after)
    *_, last = engine.run(dataclasses.replace(options, resume=True))["history"]
    # Looks at the clock are 10 seconds apart: at the start and the end of an epoch, and when a checkpoint is saved.
    assert 320 / 60 < last["samples_per_s"] < 320 / 10


def test_logs_go_on_in_a_resumed_run_and_begin_anew_in_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def epochs() -> list[list[int]]:
        with (tmp_path / "csv" / "metrics.csv").open() as file:
            of_csv = [int(row["epoch"]) for row in csv.DictReader(file)]
        return [of_csv, [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]]

    options = dataclasses.replace(SMALL, out=tmp_path, log="json,csv")
    for _ in range(2):
        break_off(monkeypatch, options, kill, 11)
        assert epochs() == [[0, 1]] * 2
    with (tmp_path / "csv" / "metrics.csv").open("a") as file:
        file.write("2,3")  # half a line, of a process that ended in the midst of it
    engine.run(dataclasses.replace(options, resume=True))
    assert epochs() == [[0, 1, 2]] * 2


def test_json_has_no_nan(tmp_path: Path) -> None:
    engine.run(dataclasses.replace(SMALL, optimizer="sgd", lr=1e30, epochs=1, out=tmp_path))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["train_loss"] is None
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert result["last"]["train_loss"] is None and result["history"][0]["train_loss"] is None


@pytest.mark.long
def test_kill_9_and_resume_end_like_an_unbroken_run(tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, epochs=80, checkpoint_steps=3, out=tmp_path / "killed")
    flags = ["--dataset", "digits", "--samples", "320", "--batch-size", "64", "--epochs", "80", "--noise", "symmetric"]
    command = [sys.executable, "-m", "benchmarks.training", *flags, "--device", "cpu", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--checkpoint-steps", "3", "--out", str(options.out)], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert options.out is not None
    deadline = time.monotonic() + 900  # of a busy machine
    while not (options.out / "metrics.jsonl").exists() or len((options.out / "metrics.jsonl").read_text()) < 1500:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    done = torch.load(options.out / "last.ckpt", weights_only=False)["global_step"]
    assert 0 < done < 400 and not (options.out / "result.json").exists()
    engine.run(dataclasses.replace(options, resume=True))
    engine.run(dataclasses.replace(options, out=tmp_path / "whole"))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_needs_the_same_settings_and_starts_where_there_is_nothing(tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, epochs=1, out=tmp_path, resume=True)
    first = engine.run(options)
    assert engine.run(options)["history"] == first["history"], "a finished run has nothing left to do"
    with pytest.raises(SystemExit, match=r"changed: lr: 0.001 -> 0.1"):
        engine.run(dataclasses.replace(options, lr=0.1))
    with pytest.raises(SystemExit, match="--resume needs --out"):
        engine.run(dataclasses.replace(options, out=None))


TWO = """
import dataclasses, pathlib, sys, pytest, torch
from lightning.pytorch.utilities import rank_zero_only
from test_training_resume import break_off, compare_with_unbroken, terminate
from training_runs import MARKS, SMALL
torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
for name, changes, after, hook in [
    ("step", {"accumulate": 2}, 6, "training_step"),
    ("validation", {"ema": 0.9, "z_threshold": 1.0}, 3, "validation_step"),
]:
    options = dataclasses.replace(SMALL, **changes, out=folder / name / "broken")
    end = terminate if rank_zero_only.rank == 1 else lambda: None  # the signal comes to one process first
    with pytest.MonkeyPatch.context() as patch:
        assert break_off(patch, options, end, after, hook).code == 143
    compare_with_unbroken(folder / name, options)
"""


@pytest.mark.slow
def test_two_processes_stop_and_go_on_together(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], cwd=ROOT, env=environment, check=False, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
