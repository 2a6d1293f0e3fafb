"""The experiments: runs go on where they stopped, and the committed tables are those of the committed numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.training.experiments import z_detection
from benchmarks.training.experiments.runs import RESULTS, Runs, Variant, last_and_best, spread, table, train_all
from benchmarks.training.options import Options

pytestmark = pytest.mark.any_cpu


def test_only_missing_runs_are_trained(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="training needs Lightning")
    pytest.importorskip("sklearn", reason="its digits are the data")
    path = tmp_path / "results.jsonl"
    recipe = Options(dataset="digits", samples=200, epochs=2, batch_size=100, device="cpu", noise="symmetric")
    variants = [Variant("CE", {}), Variant("MAE", {"loss": "mae"}, seeds=1)]

    def train(recipe: Options = recipe, seeds: int = 2, until: float = math.inf) -> bool:
        runs = Runs(path, until=until)
        train_all(runs, recipe, variants, seeds)
        return runs.complete

    assert not train(until=0.0) and train()
    assert train(until=0.0), "nothing is missing, however late it is"
    first = path.read_text()
    runs = Runs(path)
    assert [(row["label"], row["seed"]) for row in runs.rows] == [("CE", 0), ("CE", 1), ("MAE", 0)]
    assert all(len(row["top1"]) == 2 for row in runs.rows)
    assert runs.has("CE", "", 1, dataclasses.replace(recipe, seed=1, quiet=True).settings()), (
        "as options are, not the file"
    )
    with path.open("a") as file:
        file.write(first[: len(first) // 2].splitlines()[-1][:50])  # an interrupted line
    assert train()
    assert len(Runs(path).rows) == 3
    assert train(dataclasses.replace(recipe, epochs=1), seeds=1)
    assert len(Runs(path).rows) == 5, "other settings are another run"


def test_numbers_are_shown_with_their_spread() -> None:
    assert spread([0.5]) == "50.0" and spread([]) == "-"
    assert spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert last_and_best([{"top1": [0.2, 0.4, 0.3]}, {"top1": [0.1, 0.2, 0.3]}]) == ("30.0 ± 0.0", "35.0 ± 7.1")
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_numbers(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("lightning", reason="training needs Lightning")
    from benchmarks.training.experiments.__main__ import EXPERIMENTS

    EXPERIMENTS[path.stem].write(Runs(path), tmp_path)
    assert (tmp_path / f"{path.stem}.md").read_text() == path.with_suffix(".md").read_text()
    assert all((path.parent / picture.name).exists() for picture in tmp_path.glob("*.png"))


def test_planted_outliers_are_where_they_are_said_to_be() -> None:
    logits, labels, wrong = z_detection.classification(20_000, seed=1)
    for label, flipped, centre in ((0.0, False, -2.0), (0.0, True, 2.0), (1.0, False, 2.0), (1.0, True, -2.0)):
        chosen = logits[(labels == label) & (wrong == flipped)]
        # five standard errors of a mean
        assert abs(float(chosen.mean()) - centre) < 5.0 / len(chosen) ** 0.5
    predictions, targets, strange = z_detection.regression(20_000, seed=1)
    assert float(strange.float().mean()) == pytest.approx(0.1, abs=0.011) and not predictions.any()
    assert targets[strange].abs().min() > 2.0 and float(targets[strange].abs().mean()) == pytest.approx(6.0, abs=0.2)
    rare = z_detection.classification(20_000, seed=1, minority=0.01)[1]
    assert float(rare.mean()) == pytest.approx(0.01, abs=0.004)


def test_dropped_rows_are_those_of_the_formula() -> None:
    import fused_losses as fl

    logits, labels, _ = z_detection.classification(512, seed=3)
    expected = torch.zeros(512, dtype=torch.bool)
    for first in range(0, 512, 128):
        batch = slice(first, first + 128)
        for cls in (0.0, 1.0):
            rows = labels[batch] == cls
            x = logits[batch][rows].double()
            expected[batch][rows] = (x - x.mean()).abs() / x.std() > 1.5
    found = z_detection.dropped(fl.ZErrorBCEWithLogitsLoss(1.5), logits, labels, 128)
    assert torch.equal(found, expected) and found.any()


def test_results_are_json_lines() -> None:
    for path in RESULTS.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert isinstance(json.loads(line), dict)
