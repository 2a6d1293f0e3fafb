"""Runs that are compared: the same recipe with different losses, over several seeds, resumable."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.options import Options

RESULTS = Path(__file__).parents[2] / "results" / "training"


@dataclass(frozen=True)
class Variant:
    """A row of the table: ``changes`` to the recipe, ``seeds`` how many at most (None: as many as asked for)."""

    label: str
    changes: dict[str, Any]
    group: str = ""
    seeds: int | None = None


@dataclass
class Runs:
    """Finished runs of an experiment, one JSON line each in ``path``."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    until: float = math.inf  # by time.monotonic(): no run begins later
    complete: bool = True

    def __post_init__(self) -> None:
        """Reads what is there; half a line, of an interrupted run, is cut off."""
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                self.path.write_text(whole, encoding="utf-8")
            self.rows += [json.loads(line) for line in whole.splitlines()]

    def due(self, label: str, group: str, seed: int, settings: dict[str, Any]) -> bool:
        """Whether this run is missing and it is not too late to begin it, which leaves the experiment incomplete."""
        if self.has(label, group, seed, settings):
            return False
        self.complete = self.complete and time.monotonic() <= self.until
        return self.complete

    def add(self, row: dict[str, Any]) -> None:
        """Appends a line."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def has(self, label: str, group: str, seed: int, settings: dict[str, Any]) -> bool:
        """Whether this run is there, with the same settings."""
        # As rows come out of the file, where tuples are lists; defaults are of options that are newer than the row.
        default, settings = (json.loads(json.dumps(of)) for of in (Options().settings(), settings))
        return any(
            (row["label"], row["group"], row["seed"]) == (label, group, seed)
            and {**default, **row["settings"]} == settings
            for row in self.rows
        )

    def of(self, label: str, group: str = "") -> list[dict[str, Any]]:
        """The runs of a variant, one a seed."""
        found = {row["seed"]: row for row in self.rows if (row["label"], row["group"]) == (label, group)}
        return [found[seed] for seed in sorted(found)]


def train_all(runs: Runs, recipe: Options, variants: Sequence[Variant], seeds: int) -> None:
    """Trains what is missing: all with one seed before the next, those of limited seeds last."""
    from benchmarks.training.engine import run
    from benchmarks.training.sources import load

    data: dict[str, Any] = {}
    last = [variant for variant in variants if variant.seeds is not None]
    order = [(seed, variant) for seed in range(seeds) for variant in variants if variant.seeds is None]
    order += [(seed, variant) for variant in last for seed in range(min(seeds, variant.seeds or 0))]
    for seed, variant in order:
        options = dataclasses.replace(recipe, **variant.changes, seed=seed, quiet=True)
        settings = json.loads(json.dumps(options.settings()))
        if not runs.due(variant.label, variant.group, seed, settings):
            continue
        key = f"{options.dataset} {options.samples}"
        data[key] = data.get(key) or load(options)
        result = run(options, data[key])
        top1 = [round(epoch["top1"], 5) for epoch in result["history"]]
        row = {name: result[name] for name in ("settings", "seconds", "device", "wrong_labels")}
        row = {"label": variant.label, "group": variant.group, "seed": seed, "top1": top1, **row}
        runs.add({**row, "torch": torch.__version__, "threads": torch.get_num_threads()})
        print(
            f"{variant.group} {variant.label} seed {seed}: last {top1[-1]:.4f}, best {max(top1):.4f}, "
            f"{row['seconds']} s",
            flush=True,
        )


def spread(values: Iterable[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean +- standard deviation of percentages; the mean alone of one value, "-" of none."""
    numbers = [scale * value for value in values]
    if not numbers:
        return "-"
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{statistics.fmean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def last_and_best(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Accuracy of the last and of the best epoch, over seeds."""
    return spread(row["top1"][-1] for row in rows), spread(max(row["top1"]) for row in rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Saves a picture that ``draw`` makes on a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
