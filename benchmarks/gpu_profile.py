"""Profiles by Nsight Compute of our rows that miss their targets most.

    python -m benchmarks.gpu_profile results.json --out FOLDER [--worst 3]

Writes one text file for each, with everything that ``ncu`` says about the kernels of one forward and backward.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.calls import Buffers, Call
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS
from benchmarks.results import Results, Row
from benchmarks.targets import COPIES, GOALS, OVER_CROSS_ENTROPY, Index

KERNELS = "regex:forward|gradient|sum_weights|masked_loss"
WARM_UP = 2  # calls, of one or two kernels each


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
    """``ncu`` around some calls of this case; the card's clocks are left alone."""
    call = [sys.executable, "-m", "benchmarks.gpu_profile", "--run", json.dumps(asdict(case))]
    options = ["--clock-control", "none", "--set", "full", "--kernel-name", KERNELS]
    return ["ncu", *options, "--launch-skip", str(2 * WARM_UP), "--launch-count", "2", "--log-file", str(log), *call]


def run(case: Case) -> None:
    """What is profiled."""
    function = PROVIDERS["fused"].make(case)
    assert function is not None
    call = Call(function, "fwd_bwd", Buffers.of(case, *case.inputs(), count=2))
    for i in range(2 * WARM_UP + 2):
        call.run(i, call.prepare(i))


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
    failed = 0
    for ratio, row in found:
        log = options.out / f"profile-{row.case.id}.txt"
        print(f"{row.name}: {ratio:.2f} times what the target allows; {log.name}", flush=True)
        failed |= subprocess.run(command(row.case, log)).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
