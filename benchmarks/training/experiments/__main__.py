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
    z_annealing,
    z_detection,
    z_labels,
)
from benchmarks.training.experiments.runs import RESULTS, Runs, train_all

EXPERIMENTS: dict[str, Any] = {
    experiment.NAME: experiment
    for experiment in (
        many_classes,
        fashion_mnist,
        z_detection,
        z_labels,
        z_annealing,
        robust_regression,
        hem,
        scale,
        cost,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.experiments", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--full", action="store_true", help="the size for a GPU; results apart, in a folder full")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later; run again for the rest")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    experiment = EXPERIMENTS[options.name]
    folder = options.out / "full" if options.full else options.out
    runs = Runs(folder / f"{options.name}.jsonl", until=time.monotonic() + 60.0 * options.minutes)
    if hasattr(experiment, "measure"):  # more than accuracy
        experiment.measure(runs, options.seeds, options.full)
        complete = not runs.late()
    else:
        variants = experiment.variants(options.full)
        complete = train_all(runs, experiment.recipe(options.full), variants, options.seeds)
    experiment.write(runs, folder)
    print(f"{folder / options.name}.md{'' if complete else ', incomplete: run the same command again'}")


if __name__ == "__main__":
    main()
