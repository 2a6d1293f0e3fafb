"""What a training step of a loss on one CPU core is spent on.

    python -m benchmarks.cpu_profile --out benchmarks/results/cpu/profile.md

Two views of forward + backward in float32. By size: a plain copy that moves the same bytes, the step on logits in
memory, and the step on so few rows that they stay in cache, for as many rows; what the cache does not explain is
memory. By function, where ``perf`` is installed: shares of samples. What the compiler has inlined
counts for its caller.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case, shape_name
from benchmarks.machine import describe
from benchmarks.providers import PROVIDERS

CASES = [("cross_entropy", 4096, 1000), ("cross_entropy", 65536, 10)]
CASES += [("nce_mae", 4096, 1000), ("nfl", 4096, 1000), ("hem", 4096, 1000)]
CASES += [("bi_tempered", 4096, 1000), ("bi_tempered", 65536, 10)]
ROTATION_BYTES = 256 << 20
CACHED_ELEMENTS = 64 * 1000  # logits and gradient fill 0.5 MB
ROUNDS = 61
PERF_SECONDS = 4
SHOWN = 3.0  # percent of the samples


def step_of(case: Case, inputs: list[tuple[Tensor, Tensor]]) -> Callable[[int], None]:
    function = PROVIDERS["fused"].make(case)
    assert function is not None

    def step(i: int) -> None:
        logits, target = inputs[i % len(inputs)]
        torch.autograd.grad(function(logits, target), logits)

    return step


def inputs_of(case: Case) -> list[tuple[Tensor, Tensor]]:
    """As many as defeat the cache."""
    many = max(1, ROTATION_BYTES // (2 * case.logits_bytes)) if case.logits_bytes > 4 * CACHED_ELEMENTS else 1
    made = [case.inputs(seed) for seed in range(many)]
    return [(logits.requires_grad_(), target) for logits, target in made]


def copy_of(case: Case, inputs: list[tuple[Tensor, Tensor]]) -> Callable[[int], None]:
    out = [torch.empty(case.shape) for _ in inputs]

    def copy(i: int) -> None:
        out[i % len(out)].copy_(inputs[i % len(inputs)][0].detach())

    return copy


def shortest(calls: list[Callable[[int], None]], bundle: int) -> list[float]:
    """Microseconds of CPU time per call; the calls take turns. What is slower was disturbed by other work."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            began = time.process_time()
            for k in range(bundle):
                call(i * bundle + k)
            found.append((time.process_time() - began) / bundle)
    return [min(found) * 1e6 for found in times]


def by_size(loss: str, rows: int, classes: int) -> str:
    case = Case(loss, (rows, classes))
    cached_rows = CACHED_ELEMENTS // classes
    cached, single = Case(loss, (cached_rows, classes)), Case(loss, (1, classes))
    inputs = inputs_of(case)
    copy, whole = shortest([copy_of(case, inputs), step_of(case, inputs)], 1)
    of_cached, of_call = shortest([step_of(cached, inputs_of(cached)), step_of(single, inputs_of(single))], 20)
    arithmetic = min((of_cached - of_call) * rows / cached_rows, whole - of_call)  # on a busy machine it may seem more
    memory = max(0.0, whole - arithmetic - of_call)
    cells = [loss, shape_name(case.shape), f"{whole:.0f}", f"{whole / copy:.2f}"]
    cells += [f"{100 * part / whole:.0f} %" for part in (of_call, arithmetic, memory)]
    return "| " + " | ".join(cells) + " |"


def by_function(loss: str, rows: int, classes: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        spin = [sys.executable, "-m", "benchmarks.cpu_profile", "--spin", f"{loss},{rows},{classes}"]
        with subprocess.Popen(spin, stdout=subprocess.PIPE) as spinning:
            assert spinning.stdout is not None
            spinning.stdout.readline()  # it is ready
            record = ["perf", "record", "-F", "4000", "-e", "cpu-clock", "-o", data, "-p", str(spinning.pid), "--"]
            subprocess.run([*record, "sleep", str(PERF_SECONDS)], check=True, capture_output=True)
            spinning.terminate()
        command = ["perf", "report", "-i", data, "--stdio", "--no-children", "-F", "overhead,dso,symbol"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shares: dict[str, float] = collections.defaultdict(float)
    for overhead, library, symbol in re.findall(r"^ +([\d.]+)% +(\S+) +\[.\] (.*)$", text, re.MULTILINE):
        shares[short(library, symbol)] += float(overhead)
    found = sorted(shares.items(), key=lambda item: -item[1])
    shown = [f"{name} {share:.0f} %" for name, share in found if share >= SHOWN]
    return f"| {loss} | {rows}x{classes} | {', '.join(shown)} |"


def short(library: str, symbol: str) -> str:
    """``sum_classes<true, true>`` and the like for our kernels, for all else the library."""
    if "fused_losses" not in library:
        return "kernel" if library.startswith("[") else library.split(".so")[0]
    while "(" in symbol:  # arguments, anonymous namespaces
        symbol, changed = re.subn(r"\([^()]*\)( const)?", "", symbol)
        if not changed:
            break
    symbol = re.sub(r"::\{lambda.*", "", symbol)
    kernel = re.search(r"(RowTile|LaneTile|PassTile|PassRows|TileRows)\b.*::(\w+(<[\w, ]*>)?)(\[.*\])?$", symbol)
    return kernel[2] if kernel else re.sub(r"<.*", "", symbol).split("::")[-1] or symbol


def spin(loss: str, rows: int, classes: int) -> None:
    """Steps until the process is ended."""
    case = Case(loss, (rows, classes))
    step = step_of(case, inputs_of(case))
    step(0)
    print("ready", flush=True)
    for i in itertools.count():
        step(i)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file; default: standard output")
    parser.add_argument("--spin", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.spin:
        loss, rows, classes = options.spin.split(",")
        return spin(loss, int(rows), int(classes))
    about = describe("cpu")
    lines = ["# Where the time goes on one core", "", "Made by `python -m benchmarks.cpu_profile`, which explains it."]
    lines += [f"{about['processor']}, {about['isa']}, load before {about['load_before']}, float32.", ""]
    lines += ["| loss | logits | us | times a copy | call | arithmetic | memory |", "|---|---|---|---|---|---|---|"]
    lines += [by_size(*case) for case in CASES]
    if shutil.which("perf"):
        lines += ["", "| loss | logits | share of samples |", "|---|---|---|", *[by_function(*case) for case in CASES]]
    text = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
