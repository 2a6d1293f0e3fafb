"""Command line: ``python -m benchmarks.training --dataset fashion-mnist --model small_cnn --loss gce``."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from benchmarks.training.options import parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and prints the result."""
    options = parse(arguments)
    if importlib.util.find_spec("lightning") is None:
        raise SystemExit("python -m benchmarks.training needs Lightning: pip install lightning")
    from benchmarks.training.engine import run

    result = run(options)
    if int(os.environ.get("RANK", 0)) > 0:  # of torchrun's processes one speaks
        return
    if result["last"] is not None:
        last, best = result["last"], result["best"]
        print(f"top-1: last {100 * last['top1']:.2f} %, best {100 * best['top1']:.2f} % (epoch {best['epoch'] + 1})")
    wrong = result["wrong_labels"] if result["wrong_labels"].get("wrong") else {}  # none: nothing to find
    for name, found in wrong.items():
        if isinstance(found, dict):
            numbers = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
            print(f"wrong labels {name.replace('_', ' ')}: {numbers}")
    if options.out is not None:
        print(f"numbers, checkpoints and the report of each sample: {options.out}")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):  # a refusal ends like one of argparse's
            print(error.code, file=sys.stderr)
            sys.exit(2)
        raise
