"""Profiles by Nsight Compute of our rows that miss their targets most, and of some main ones.

    python -m benchmarks.gpu_profile results.json --out FOLDER [--worst 3]

Writes profile0.txt and so on, with everything that ``ncu`` says about the kernels of one forward and backward of each:
a program a row, since one that runs out of time may leave nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.calls import Buffers, Call
from benchmarks.cases import Case
from benchmarks.providers import fused
from benchmarks.results import Results, Row
from benchmarks.targets import COPIES, GOALS, OVER_CROSS_ENTROPY, Index

# Names of ours: torch's, in reductions around them, are of no interest.
KERNELS = (
    "regex:^(softmax|multi_reduction|labels|rescale|elr|gjs|statistics|merge|mask|reduce_moments|gradient|sum_weights)"
)
WARM_UP = 2  # calls
MAIN = [Case("cross_entropy", (8, 150, 512, 512), "bfloat16", "cuda")] + [
    Case(loss, ((1 << 26) // num_classes, num_classes), "bfloat16", "cuda")
    for loss, num_classes in (("cross_entropy", 10), ("cross_entropy", 1000), ("hem", 10))
]


def worst(results: Results, count: int) -> list[tuple[float, Row]]:
    """Our rows on the GPU that need the largest multiple of what their target allows, one for each case."""
    rows = [row for row in results.rows if row.device == "cuda"]
    index = Index(rows)
    found: dict[Case, tuple[float, Row]] = {}
    for row in rows:
        if row.provider != "fused" or row.mode != "fwd_bwd":
            continue
        for goal in GOALS:
            value = goal.value(index, row) if goal.measure in (COPIES, OVER_CROSS_ENTROPY) else None
            if value is None or goal.at_most is None:
                continue
            ratio = value / goal.at_most
            if row.case not in found or ratio > found[row.case][0]:
                found[row.case] = (ratio, row)
    return sorted(found.values(), key=lambda pair: -pair[0])[:count]


def command(case: Case, log: Path) -> list[str]:
    """``ncu`` around one call; the card's clocks are left alone."""
    call = [sys.executable, "-m", "benchmarks.gpu_profile", "--run", json.dumps(asdict(case))]
    options = ["--clock-control", "none", "--set", "full", "--kernel-name", KERNELS, "--profile-from-start", "off"]
    return ["ncu", *options, "--log-file", str(log), *call]


def run(case: Case) -> None:
    """What is profiled: a forward and backward after some that are not."""
    call = Call(fused(case), "fwd_bwd", Buffers.of(case, *case.inputs(), count=2))
    for i in range(WARM_UP):
        call.run(i, call.prepare(i))
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call.run(WARM_UP, call.prepare(WARM_UP))
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--worst", type=int, default=3)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        given = json.loads(options.run)
        run(Case(**{**given, "shape": tuple(given["shape"])}))
        return 0
    if options.results is None:
        parser.error("give a result file")
    found = worst(Results.load(options.results), options.worst)
    if not found:
        raise SystemExit(f"{options.results} has no rows on a GPU that have these targets")
    for ratio, row in found:
        print(f"{row.name}: {ratio:.2f} times what the target allows", flush=True)
    cases = list(dict.fromkeys([*(row.case for _, row in found), *MAIN]))
    logs = [options.out / f"profile{i}.txt" for i in range(len(cases))]
    return max(subprocess.run(command(*of)).returncode for of in zip(cases, logs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
