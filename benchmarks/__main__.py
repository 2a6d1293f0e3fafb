"""``python -m benchmarks``: runs a suite and writes one JSON file; see ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # idle compiler processes would disturb what is timed

import torch

from benchmarks import accuracy, end_to_end
from benchmarks.jobs import Job, failure, run_job
from benchmarks.machine import describe
from benchmarks.results import SAME_MACHINE, Results, Row
from benchmarks.suites import SUITES

OUT = "benchmarks/results/<device>/results.json, of the suite compile compile.json"
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


def adjusted(job: Job, timer: str, tries: int) -> Job:
    """The job as often as was asked for, and if it is on one thread of the CPU with the clock that was asked for."""
    one_thread = job.case.device == "cpu" and job.threads == 1
    return replace(job, tries=tries, timer=timer if one_thread else job.timer)


def losses(results: Results, options: argparse.Namespace) -> None:
    jobs = [job for job in SUITES[options.suite]() if matches(job, options.only)]
    jobs = [adjusted(job, options.timer, options.tries) for job in jobs]
    stop_at = time.perf_counter() + 60 * options.minutes
    measured = {(row.setting, row.provider) for row in results.rows}
    for number, job in enumerate(jobs, 1):
        if _is_measured(job, options.suite, measured):
            continue
        if time.perf_counter() > stop_at:
            print(
                f"UNFINISHED: {options.minutes:g} minutes are over, {len(jobs) - number + 1} jobs are left", flush=True
            )
            break
        before, began = len(results.rows), time.perf_counter()

        def reject(provider: str, reason: str, job: Job = job) -> None:
            entry = {"case": job.key, "provider": provider, "reason": reason}
            if entry not in results.rejected:  # a resumed run may try once more
                results.rejected.append(entry)
            print(f"REJECTED: {reason}", flush=True)

        for row in (replace(row, suite=options.suite) for row in rows_of(job, reject)):
            if (row.setting, row.provider) not in measured:
                measured.add((row.setting, row.provider))
                results.rows.append(row)
                show(row, len(jobs), number)
        if len(results.rows) > before:
            results.save(options.out)
            print(f"[{number:3}/{len(jobs)}] {time.perf_counter() - began:.1f} s", flush=True)
        if job.case.device == "cuda":
            torch.cuda.empty_cache()


def rows_of(job: Job, reject: Callable[[str, str], None]) -> Iterator[Row]:
    """Those of :func:`run_job`. On a GPU, where time is short, an error of ours is told like one of the others, unless
    it has broken the GPU's context."""
    try:
        yield from run_job(job, reject)
    except Exception as error:
        if job.case.device != "cuda":
            raise
        reject("fused", failure("fused", job.case, error))
        torch.cuda.synchronize()


def _is_measured(job: Job, suite: str, measured: set[tuple[tuple[object, ...], str]]) -> bool:
    """Whether ours is there in every mode: peers may be missing because they do not offer the loss."""
    settings = [(suite, mode, job.case, job.threads, job.timer) for mode in job.modes]
    return all((setting, "fused") in measured for setting in settings)


def resumed(path: Path, machine: dict[str, object]) -> Results:
    """The results in ``path`` if the same build on the same machine left them, else none."""
    if path.exists():
        found = Results.load(path)
        if all(found.machine.get(name) == machine.get(name) for name in (*SAME_MACHINE, "commit")):
            if machine["command"] not in found.machine["command"].split("; "):
                found.machine["command"] += f"; {machine['command']}"
            return found
    return Results(machine)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures fused_losses and its peers.")
    parser.add_argument("--suite", choices=SUITES, help="default: cuda where there is a GPU, else summary")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: {OUT})")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds if build and machine are the same")
    parser.add_argument("--only", default="", help="words, separated by commas: jobs whose name contains one of them")
    parser.add_argument("--parts", help=f"default: {','.join(PARTS)}; of the suite compile losses")
    parser.add_argument(
        "--timer",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time for what runs on one thread, where other work shares the machine",
    )
    parser.add_argument("--tries", type=int, default=1, help="timings of each job; kept is that with the fastest copy")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no job later; --resume does the rest")
    options = parser.parse_args()
    if options.tries < 1:
        parser.error(f"--tries must be at least 1, got {options.tries}")
    if not options.minutes >= 0.0:
        parser.error(f"--minutes must be at least 0, got {options.minutes}")
    options.suite = options.suite or ("cuda" if torch.cuda.is_available() else "summary")
    device = "cuda" if options.suite.startswith("cuda") else "cpu"
    name = "compile" if options.suite == "compile" else "results"
    options.out = options.out or Path(f"benchmarks/results/{device}/{name}.json")
    options.parts = options.parts or ("losses" if options.suite == "compile" else ",".join(PARTS))
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--suite {options.suite} needs a GPU, which torch {torch.__version__} does not see")
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
    results.machine["seconds"] = results.machine.get("seconds", 0) + round(time.perf_counter() - began)
    results.save(options.out)
    print(f"{len(results.rows)} rows in {results.machine['seconds']} s: {options.out}")
    if any(entry["provider"] == "fused" for entry in results.rejected):
        raise SystemExit("fused_losses failed the check against float64, see above")


if __name__ == "__main__":
    main()
