"""What a training step of a loss on one CPU core is spent on, and what a second core changes.

    python -m benchmarks.cpu_profile --out benchmarks/results/cpu/profile.md        (about five minutes)

Three views of forward + backward in float32. By size: a plain copy of the logits, which moves the same bytes, cross
entropy's step and the step, in turns on buffers that rotate through more memory than the last cache holds; the step is
divided into

- call: what is left of the step on one row (pixel) without the work on it;
- arithmetic: the step on so few rows that logits and gradient stay in cache, call taken off, for as many rows;
- memory: the rest. Besides transfers that is page faults of a fresh gradient (a copy writes into pages that exist) and,
  for pixels, what strides between classes cost; the few pixels in cache have the layout, but a smaller stride.

Cross entropy at every shape of the summary, every other loss at two. By function, where ``perf`` is installed: shares
of samples, for cross entropy and whatever takes over 15 % more or less than it. What the compiler has inlined counts
for its caller. By threads: what two make of cross entropy's step and of the copy, in elapsed time, and the functions
again; time in libgomp is waiting for the other thread.
"""

from __future__ import annotations

import argparse
import collections
import functools
import math
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.calls import Buffers, Call, Copy
from benchmarks.cases import LOSSES, ROW_LOSSES, Case, shape_name
from benchmarks.machine import describe
from benchmarks.measure import Timed
from benchmarks.providers import fused
from benchmarks.suites import PIXELS, PIXELS_LAST

SHAPES = ((4096, 1000), (65536, 10))  # of every loss
CASES = [Case("cross_entropy", shape) for shape in ((32, 10), (256, 10), *SHAPES, (2048, 10_000), PIXELS)]
CASES += [Case("cross_entropy", PIXELS_LAST, layout="channels_last")]
CASES += [Case(loss, shape) for shape in SHAPES for loss in ROW_LOSSES if loss != "cross_entropy"]
CACHED_ELEMENTS = 64 * 1000  # logits and gradient fill 0.5 MB
CACHED_PIXELS = (16, 16)  # a multiple of what kernels take at once
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 25, 200, 0.6  # the first may wait for memory that the machine must find
BUNDLED_BYTES, BUNDLE = 1 << 20, 20  # smaller inputs are timed so many calls at a time
LIKE_CROSS_ENTROPY = 0.15
PERF_SECONDS = 2
THREADS = 2
SHOWN = 3.0  # percent of the samples


def step_of(case: Case, count: int | None = None) -> Call:
    """The step on ``count`` inputs, or on as many as defeat the cache."""
    buffers = buffers_of(case if case.by_class else replace(case, loss="cross_entropy"), count)
    return Call(fused(case), "fwd_bwd", buffers)


@functools.lru_cache(maxsize=3)  # the next loss has the same three inputs
def buffers_of(case: Case, count: int | None) -> Buffers:
    return Buffers.of(case, *case.inputs(), count=count)


def shortest(calls: Iterable[Timed], bundle: int, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Microseconds per call, of CPU time; the calls take turns. What is slower was disturbed by other work.

    Every call has the next inputs, cold ones, and the order is drawn anew: what ran before leaves the caches full.
    """
    times: list[tuple[Timed, list[float]]] = [(call, []) for call in calls]
    turns, shuffle = list(times), random.Random(0).shuffle
    began, rounds, number = time.perf_counter(), 0, 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - began < SECONDS):
        shuffle(turns)
        for call, found in turns:
            prepared = [call.prepare(number + k) for k in range(bundle)]
            start = clock()
            for k in range(bundle):
                call.run(number + k, prepared[k])
            found.append((clock() - start) / bundle)
            number += bundle
        rounds += 1
    return [min(found) * 1e6 for _, found in times]


def with_rows(case: Case, rows: int) -> Case:
    """The case with that many rows or, in its layout, pixels: one or :data:`CACHED_PIXELS`."""
    if len(case.shape) == 2:
        return replace(case, shape=(rows, case.shape[1]))
    return replace(case, shape=(1, case.shape[1], *((1, 1) if rows == 1 else CACHED_PIXELS)))


def row_count(case: Case) -> int:
    return math.prod(case.shape) // case.shape[1]


@dataclass(frozen=True)
class Shares:
    """Microseconds of a step, of a copy of its logits, of cross entropy's step on them, and of the step's parts."""

    case: Case
    whole: float
    copy: float
    cross_entropy: float
    call: float
    arithmetic: float

    @property
    def memory(self) -> float:
        return self.whole - self.call - self.arithmetic

    @property
    def line(self) -> str:
        parts = (self.call, self.arithmetic, self.memory)
        shares = [f"{100 * part / self.whole:.0f} %" for part in parts]
        ratios = [f"{self.whole / other:.2f}" for other in (self.copy, self.cross_entropy)]
        return cells(self.case, f"{self.whole:.0f}", *ratios, *shares)

    @property
    def unlike_cross_entropy(self) -> bool:
        return abs(self.whole / self.cross_entropy - 1.0) > LIKE_CROSS_ENTROPY


def head(*columns: str) -> list[str]:
    names = ["loss", "logits", *columns]
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def cells(case: Case, *others: str) -> str:
    return "| " + " | ".join([case.loss, shape_name(case.shape, case.layout), *others]) + " |"


def by_size(case: Case) -> Shares:
    step = step_of(case)
    own = Call(LOSSES["cross_entropy"].fused, "fwd_bwd", step.buffers)
    whole, copy, cross_entropy = shortest([step, Copy(step.buffers), own], bundle_of(case))
    cached = with_rows(case, min(row_count(case), max(2, CACHED_ELEMENTS // case.shape[1])))
    few, one = shortest([step_of(cached, 1), step_of(with_rows(case, 1), 1)], BUNDLE)
    a_row = max(0.0, few - one) / (row_count(cached) - 1)
    call = min(whole, max(0.0, one - a_row))
    arithmetic = min(a_row * row_count(case), whole - call)  # measured apart, it may exceed the whole on a busy machine
    return Shares(case, whole, copy, cross_entropy, call, arithmetic)


def by_threads(case: Case) -> str:
    step = step_of(case)
    calls: list[Timed] = [step, Copy(step.buffers)]
    bundle = bundle_of(case)
    one, one_copy = shortest(calls, bundle, time.perf_counter)
    with threads(THREADS):
        both, both_copy = shortest(calls, bundle, time.perf_counter)
    ratios = [f"{x:.2f}" for x in (both / both_copy, one / both, one_copy / both_copy)]
    return cells(case, f"{both:.0f}", *ratios)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bundle_of(case: Case) -> int:
    return BUNDLE if case.logits_bytes < BUNDLED_BYTES else 1


def by_function(case: Case) -> str:
    step = step_of(case)
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        record = ["perf", "record", "-F", "4000", "-e", "cpu-clock", "-o", data, "-p", str(os.getpid()), "--"]
        with subprocess.Popen([*record, "sleep", str(PERF_SECONDS)], stderr=subprocess.DEVNULL) as perf:
            number = 0
            while perf.poll() is None:
                for _ in range(bundle_of(case)):
                    step.run(number, step.prepare(number))
                    number += 1
        command = ["perf", "report", "-i", data, "--stdio", "--no-children", "-F", "overhead,dso,symbol"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shares: dict[str, float] = collections.defaultdict(float)
    for overhead, library, symbol in re.findall(r"^ +([\d.]+)% +(\S+) +\[.\] (.*)$", text, re.MULTILINE):
        shares[short(library, symbol)] += float(overhead)
    found = sorted(shares.items(), key=lambda item: -item[1])
    return cells(case, ", ".join(f"{name} {share:.0f} %" for name, share in found if share >= SHOWN))


def short(library: str, symbol: str) -> str:
    """``sum_classes<true, true>`` and the like for our kernels, for all else the library."""
    if "fused_losses" not in library:
        return "kernel" if library.startswith("[") else library.split(".so")[0]
    while "(" in symbol:  # arguments, anonymous namespaces
        symbol, changed = re.subn(r"\([^()]*\)( const)?", "", symbol)
        if not changed:
            break
    symbol = re.sub(r"::\{lambda.*", "", symbol)
    kernel = re.search(r"(\w+Softmax|\w+Tile|\w+View|TileRows)\b.*::(\w+(<[\w, ]*>)?)(\[.*\])?$", symbol)
    return kernel[2] if kernel else re.sub(r"<.*", "", symbol).split("::")[-1] or symbol


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file; default: standard output")
    parser.add_argument("--only", default="", help="words, separated by commas: cases whose name contains one of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = describe("cpu")
    lines = ["# Where the time goes on one core", "", "Made by `python -m benchmarks.cpu_profile`, which explains it."]
    lines += [f"{about['processor']}, {about['isa']}, load before {about['load_before']}, float32.", ""]
    lines += head("us", "times a copy", "times cross entropy", "call", "arithmetic", "memory")
    found = [by_size(case) for case in CASES if any(word in case.id for word in options.only.split(","))]
    lines += [shares.line for shares in found]
    if shutil.which("perf"):
        unlike = [s.case for s in found if s.case.loss == "cross_entropy" or s.unlike_cross_entropy]
        lines += ["", f"The losses without a line take within {LIKE_CROSS_ENTROPY:.0%} of cross entropy's time.", ""]
        lines += [*head("share of samples"), *map(by_function, unlike)]
    own = [shares.case for shares in found if shares.case.loss == "cross_entropy"]
    if (os.cpu_count() or 1) >= THREADS:
        lines += ["", f"# With {THREADS} threads", "", "Elapsed time; the speed-up is over one thread.", ""]
        lines += [*head("us", "times a copy", "speed-up", "speed-up of the copy"), *map(by_threads, own)]
        if shutil.which("perf"):
            with threads(THREADS):
                lines += ["", *head("share of samples"), *map(by_function, own)]
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
