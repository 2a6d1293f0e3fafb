"""Command line: ``python -m benchmarks.training.experiments many_classes``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.training.experiments import many_classes
from benchmarks.training.experiments.runs import RESULTS, Runs, train_all

EXPERIMENTS = {experiment.NAME: experiment for experiment in (many_classes,)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing of an experiment; writes its table and plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.experiments", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--full", action="store_true", help="the size for a GPU; results apart, in NAME_full")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later; run again for the rest")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    experiment = EXPERIMENTS[options.name]
    folder = options.out / "full" if options.full else options.out
    runs = Runs(folder / f"{options.name}.jsonl")
    complete = train_all(runs, experiment.recipe(options.full), experiment.variants(), options.seeds, options.minutes)
    experiment.write(runs, folder)
    print(f"{folder / options.name}.md{'' if complete else ', incomplete: run the same command again'}")


if __name__ == "__main__":
    main()
