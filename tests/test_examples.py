"""The examples: they run, and what they say about the losses holds."""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gloo_group import gloo_group, run_ranks

for needed in ("rich", "sklearn"):
    pytest.importorskip(needed)

pytestmark = pytest.mark.any_cpu  # trainings; other tests judge the kernels

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class_parallel = load("class_parallel")
decision_cutoff = load("decision_cutoff")
find_wrong_labels = load("find_wrong_labels")
rank_wrong_labels = load("rank_wrong_labels")
unit_errors = load("unit_errors")


def test_every_example_is_tested_and_helps(capsys: pytest.CaptureFixture[str]) -> None:
    modules = {path.stem: globals()[path.stem] for path in EXAMPLES.glob("*.py")}
    assert len(modules) == 5
    for name, module in modules.items():
        with pytest.raises(SystemExit) as caught:
            module.main(["--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert "--quick" in printed and f"python examples/{name}.py" in printed


def test_find_wrong_labels_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    out = tmp_path / "new folder"
    assert find_wrong_labels.main(["--quick", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    printed = capsys.readouterr().out
    assert "precision" in printed and "recall" in printed and str(out) in printed
    assert sorted(path.name for path in out.iterdir()) == ["noise_0.2_threshold_1.csv", "noise_0.2_threshold_2.csv"]
    with (out / "noise_0.2_threshold_1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1257
    assert {row["times_seen"] for row in rows} == {"10"}  # 15 epochs less the 5 in which the threshold comes down


def learn(rank: int, world_size: int, folder: str) -> None:
    with gloo_group(rank, world_size, folder):
        torch.save(class_parallel.train(1_001), f"{folder}/{rank}.pt")


def test_a_head_on_two_processes_learns_what_it_learns_on_one(tmp_path: Path) -> None:
    run_ranks(learn, 2, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    (folder := tmp_path / "alone").mkdir()
    with gloo_group(0, 1, str(folder)):
        alone = class_parallel.train(1_001)
    assert both == [pytest.approx(alone, abs=1e-5)] * 2
    assert len(alone) == 3 and alone[2] < alone[0]


@pytest.mark.long
def test_class_parallel_starts_its_processes_and_prints() -> None:
    command = [sys.executable, str(EXAMPLES / "class_parallel.py"), "--quick"]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"\d\.\d{4}", done.stdout)]
    assert len(losses) == 3 and losses[2] < losses[0]


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_wrong_labels_are_dropped_more_often_than_right_ones(noise: float) -> None:
    outcome = find_wrong_labels.train(noise, threshold=1.0, epochs=15, seed=7)
    assert float(outcome.wrong.double().mean()) == pytest.approx(0.9 * noise, abs=0.04)
    assert outcome.drop_rate(wrong=True) > 0.5 > 0.1 > outcome.drop_rate(wrong=False)
    found = find_wrong_labels.compare_flags(outcome.tracker.flagged(0.5), outcome.wrong)
    assert found.precision > min(0.9, 4.0 * noise)
    assert found.recall > 0.8


@pytest.mark.long
def test_a_large_threshold_finds_few_of_many_and_is_more_precise_on_few() -> None:
    many, few = (find_wrong_labels.train(noise, threshold=2.0, epochs=15, seed=7) for noise in (0.4, 0.05))
    assert many.drop_rate(wrong=True) < 0.05
    assert few.drop_rate(wrong=True) > 0.7
    tight = find_wrong_labels.train(0.05, threshold=1.0, epochs=15, seed=7)
    assert few.drop_rate(wrong=False) < tight.drop_rate(wrong=False)


def test_the_rival_flags_as_many_rows_as_are_wrong() -> None:
    precision, recall, f1 = find_wrong_labels.rank_by_loss(0.2, epochs=5, seed=7)
    assert precision == recall == pytest.approx(f1)
    assert 0.8 < f1 <= 1.0


@pytest.mark.long
def test_ranking_while_training_is_as_good_as_ranking_by_five_trainings_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert rank_wrong_labels.main(["--quick"]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    lines = [line.strip().rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines() if line.strip()]
    f1 = {line[0].removeprefix("20%").strip(): float(line[3]) for line in lines if line[0].startswith("20%")}
    assert {"CE: rank()", "gce: rank()", "Z-Error on CE: flagged(0.5)"} <= f1.keys()
    assert f1["CE: rank()"] > 0.9
    # The spread over seeds is 0.02.
    assert f1["CE: rank()"] > f1["out of fold, 5 trainings"] - 0.04
    assert f1['Z-Error on CE: rank(by="score")'] > 0.9


def test_what_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot create the folder of --out"):
        find_wrong_labels.main(["--quick", "--out", str(tmp_path / "file")])


@functools.lru_cache
def trained(loss: str, error: str, share: float) -> list[Any]:
    return [unit_errors.train(loss, error, share, seed) for seed in (5, 6, 7)]


def mean_of(field: str, loss: str, error: str, share: float) -> float:
    return statistics.fmean(getattr(outcome, field) for outcome in trained(loss, error, share))


@pytest.mark.long
def test_unit_errors_prints_every_loss_and_error(capsys: pytest.CaptureFixture[str]) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert unit_errors.main(["--quick"]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    printed = capsys.readouterr().out
    assert [word for word in (*unit_errors.LOSSES, *unit_errors.ERRORS) if word not in printed] == []


@pytest.mark.long
def test_a_moved_decimal_point_hurts_squared_error_most_and_absolute_error_least() -> None:
    mse, target, loss, absolute = (mean_of("test_error", name, "x10", 0.1) for name in unit_errors.LOSSES)
    assert absolute < target < loss < mse
    assert target < 0.7 * mse


@pytest.mark.long
def test_the_statistic_of_the_targets_cannot_see_errors_within_their_range() -> None:
    assert mean_of("spoilt_dropped", "ZMSE target", "/10", 0.1) == 0.0
    spoilt = mean_of("spoilt_dropped", "ZMSE loss", "/10", 0.1)
    good = mean_of("good_dropped", "ZMSE loss", "/10", 0.1)
    assert spoilt > 0.2 > 0.05 > good
    errors = {name: mean_of("test_error", name, "/10", 0.1) for name in ("MSE", "ZMSE target", "ZMSE loss")}
    assert errors["ZMSE loss"] < errors["MSE"] and errors["ZMSE loss"] < errors["ZMSE target"]


@pytest.mark.parametrize("name", ["ZMSE target", "ZMSE loss"])
def test_masking_beats_squared_error_under_converted_units(name: str) -> None:
    assert mean_of("test_error", name, "x1.8+32", 0.2) < mean_of("test_error", "MSE", "x1.8+32", 0.2)
    assert mean_of("spoilt_dropped", name, "x1.8+32", 0.2) > mean_of("good_dropped", name, "x1.8+32", 0.2)


def test_unit_errors_are_what_they_are_called() -> None:
    target = torch.tensor([25.0, 100.0])
    spoilt = {name: error(target).tolist() for name, error in unit_errors.ERRORS.items()}
    assert spoilt == {"none": [25.0, 100.0], "x1.8+32": [77.0, 212.0], "x10": [250.0, 1000.0], "/10": [2.5, 10.0]}


def test_decision_cutoff(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert decision_cutoff.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("breast cancer") == printed.count("an 8 or not") == 4 and "skew-normal" in printed
    for flipped in (0.0, 0.1):  # one yes in ten: the cut-off 0.5 finds few of them
        found = decision_cutoff.compare("an 8 or not", flipped, 5)
        assert found["Gaussians"][0] > found["0.5"][0] + 5.0
