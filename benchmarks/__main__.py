"""``python -m benchmarks``: runs a suite and writes one JSON file; see ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # idle compiler processes would disturb what is timed

import torch

from benchmarks import accuracy, end_to_end
from benchmarks.jobs import Job, run_job
from benchmarks.machine import describe
from benchmarks.results import Results, Row
from benchmarks.suites import SUITES

PARTS = ("losses", "end_to_end", "accuracy")


def show(row: Row, out_of: int, number: int) -> None:
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:9.1f} MB"
    print(
        f"[{number:3}/{out_of}] {row.name:<62} {row.provider:>9} {row.time_us:10.1f} us "
        f"({row.low_us:.1f}-{row.high_us:.1f})  {row.copies:6.2f} copies  {row.gb_per_s:7.1f} GB/s {memory}",
        flush=True,
    )


def matches(job: Job, only: str) -> bool:
    """Whether any of the words is in the job's name; no words: yes."""
    return not only or any(word in job.key for word in only.split(","))


def clocked(job: Job, timer: str) -> Job:
    """Jobs on one thread of the CPU take the clock that was asked for."""
    return replace(job, timer=timer) if job.case.device == "cpu" and job.threads == 1 else job


def quietest(job: Job, reject: Callable[[str, str], None], tries: int) -> list[Row]:
    """The rows of that run of the job in which the copy, which is no part of the comparison, took least time."""
    found = [list(run_job(job, reject))]
    found += [list(run_job(job, lambda provider, reason: None)) for _ in range(tries - 1)]
    return min(found, key=lambda rows: rows[0].copy_us if rows else math.inf)


def losses(results: Results, options: argparse.Namespace) -> None:
    jobs = [clocked(job, options.timer) for job in SUITES[options.suite]() if matches(job, options.only)]
    measured = {(row.setting, row.provider) for row in results.rows}
    for number, job in enumerate(jobs, 1):
        before, began = len(results.rows), time.perf_counter()

        def reject(provider: str, reason: str, job: Job = job) -> None:
            results.rejected.append({"case": job.key, "provider": provider, "reason": reason})
            print(f"REJECTED: {reason}", flush=True)

        for row in quietest(job, reject, options.tries) if not _is_measured(job, measured) else ():
            if (row.setting, row.provider) not in measured:
                measured.add((row.setting, row.provider))
                results.rows.append(row)
                show(row, len(jobs), number)
        if len(results.rows) > before:
            results.save(options.out)
            print(f"[{number:3}/{len(jobs)}] {time.perf_counter() - began:.1f} s", flush=True)
        if options.suite == "cuda":
            torch.cuda.empty_cache()


def _is_measured(job: Job, measured: set[tuple[tuple[object, ...], str]]) -> bool:
    """Whether ours is there in every mode: peers may be missing because they do not offer the loss."""
    case = job.case
    settings = [
        (case.loss, mode, case.shape, case.dtype, case.device, case.layout, job.threads, job.timer)
        for mode in job.modes
    ]
    return all((setting, "fused") in measured for setting in settings)


def resumed(path: Path, machine: dict[str, object]) -> Results:
    """The results in ``path`` if the same build on the same machine left them, else none."""
    if path.exists():
        found = Results.load(path)
        names = ("processor", "gpu", "packages", "build", "commit", "environment")
        if all(found.machine.get(name) == machine.get(name) for name in names):
            return found
    return Results(machine)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures fused_losses and its peers.")
    parser.add_argument("--suite", choices=SUITES, help="default: cuda where there is a GPU, else summary")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<device>/results.json)")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds if build and machine are the same")
    parser.add_argument("--only", default="", help="words, separated by commas: jobs whose name contains one of them")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument(
        "--timer",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time for what runs on one thread, where other work shares the machine",
    )
    parser.add_argument("--tries", type=int, default=1, help="runs of each job; kept is that with the fastest copy")
    options = parser.parse_args()
    if options.tries < 1:
        parser.error(f"--tries must be at least 1, got {options.tries}")
    options.suite = options.suite or ("cuda" if torch.cuda.is_available() else "summary")
    device = "cuda" if options.suite == "cuda" else "cpu"
    options.out = options.out or Path(f"benchmarks/results/{device}/results.json")
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--suite cuda needs a GPU, which torch {torch.__version__} does not see")
    if "OMP_PROC_BIND" not in os.environ and device == "cpu":
        print("note: threads are not pinned; set OMP_PROC_BIND=true")

    began = time.perf_counter()
    machine = describe(device)
    results = resumed(options.out, machine) if options.resume else Results(machine)
    parts = options.parts.split(",")
    if "accuracy" in parts and not results.accuracy:
        results.accuracy = accuracy.measure(device)
        results.save(options.out)
    if "losses" in parts:
        losses(results, options)
    if "end_to_end" in parts and not results.end_to_end:
        results.end_to_end = end_to_end.measure(device, options.timer)
    results.machine["load_after"] = round(os.getloadavg()[0], 2)
    results.machine["seconds"] = round(time.perf_counter() - began)
    results.save(options.out)
    print(f"{len(results.rows)} rows in {results.machine['seconds']} s: {options.out}")
    if any(entry["provider"] == "fused" for entry in results.rejected):
        raise SystemExit("fused_losses failed the check against float64, see above")


if __name__ == "__main__":
    main()
