"""Trains what is missing of an experiment and writes its table and plots, to be run again until it is complete."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.experiments import (
    cost,
    fashion_mnist,
    hem,
    many_classes,
    robust_regression,
    scale,
    yes_no,
    z_annealing,
    z_detection,
    z_labels,
)
from benchmarks.training.experiments.runs import RESULTS, Runs, train_all

EXPERIMENTS: dict[str, Any] = {
    experiment.NAME: experiment
    for experiment in (  # the order of "all"
        many_classes,
        fashion_mnist,
        robust_regression,
        yes_no,
        z_annealing,
        hem,
        z_labels,
        z_detection,
        scale,
        cost,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment that the command line names, or all in turn: one seed of each, then the next."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.experiments", description=__doc__)
    parser.add_argument("name", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--full", action="store_true", help="the size for a GPU; results apart, in a folder full")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later; run again for the rest")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in ("seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not options.minutes >= 0.0:
        parser.error(f"--minutes must be at least 0, got {options.minutes}")
    torch.set_num_threads(options.threads)
    until = time.monotonic() + 60.0 * options.minutes
    folder = options.out / "full" if options.full else options.out
    if options.name != "all":
        complete = run(EXPERIMENTS[options.name], folder, options.seeds, options.full, until)
    else:
        rounds = [(seeds, each) for seeds in range(1, options.seeds + 1) for each in EXPERIMENTS.values()]
        complete = min([run(each, folder, seeds, options.full, until) for seeds, each in rounds])  # all() would stop
    print(f"{folder}/*.md{'' if complete else ', incomplete: run the same command again'}")


def run(experiment: Any, folder: Path, seeds: int, full: bool, until: float) -> bool:
    """Trains what is missing and writes table and plots; False if it got late."""
    runs = Runs(folder / f"{experiment.NAME}.jsonl", until=until)
    if hasattr(experiment, "measure"):  # more than accuracy
        experiment.measure(runs, seeds, full)
    else:
        train_all(runs, experiment.recipe(full), experiment.variants(full), seeds)
    if runs.rows:
        experiment.write(runs, folder)
    return runs.complete


if __name__ == "__main__":
    main()
