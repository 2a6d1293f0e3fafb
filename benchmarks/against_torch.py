"""Our cross entropy against ``torch.nn.functional.cross_entropy``, side by side in one run.

    python benchmarks/against_torch.py [--out results.json]

Calls alternate, so that whatever slows the machine slows both. Medians; ratios are torch's time over ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fused_losses as fl

SHAPES = [(32, 10), (256, 10), (4096, 1000), (65536, 10), (2048, 10000), (4, 150, 256, 256)]


def modes(
    logits: torch.Tensor, target: torch.Tensor, loss: Callable[..., torch.Tensor]
) -> dict[str, Callable[[], Any]]:
    leaf = logits.detach().requires_grad_()

    def forward_backward() -> None:
        leaf.grad = None
        loss(leaf, target).backward()

    return {
        "no grad": lambda: loss(logits, target),
        "requires grad": lambda: loss(leaf, target),
        "forward+backward": forward_backward,
    }


def interleaved(ours: Callable[[], Any], theirs: Callable[[], Any], seconds: float) -> tuple[float, float]:
    for _ in range(3):
        ours()
        theirs()
    start = time.perf_counter()
    ours()
    theirs()
    once = time.perf_counter() - start
    inner = max(1, int(1e-3 / once))  # short calls are timed in bundles of about a millisecond
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(5, min(400, int(seconds / (once * inner))))):
        for call, kept in zip((ours, theirs), samples, strict=True):
            start = time.perf_counter()
            for _ in range(inner):
                call()
            kept.append((time.perf_counter() - start) / inner)
    return statistics.median(samples[0]), statistics.median(samples[1])


def measure(shape: tuple[int, ...], threads: int, seconds: float) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    logits = torch.randn(shape) * 3
    target = torch.randint(0, shape[1], shape[:1] + shape[2:])
    torch.testing.assert_close(fl.functional.cross_entropy(logits, target), F.cross_entropy(logits, target))
    ours, theirs = modes(logits, target, fl.functional.cross_entropy), modes(logits, target, F.cross_entropy)
    rows = []
    for mode in ours:
        fused, plain = interleaved(ours[mode], theirs[mode], seconds)
        rows.append({"shape": shape, "threads": threads, "mode": mode, "ours_us": fused * 1e6, "torch_us": plain * 1e6})
    return rows


def machine() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "allocator": "default (glibc malloc)",
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--seconds", type=float, default=1.5, help="per measurement")
    options = parser.parse_args()
    rows = []
    print(f"{'shape':>20} {'threads':>7} {'mode':>17} {'ours us':>10} {'torch us':>10} {'ratio':>6}")
    for shape in SHAPES:
        for threads in (1, 2):
            for row in measure(shape, threads, options.seconds):
                rows.append(row)
                ratio = row["torch_us"] / row["ours_us"]
                print(
                    f"{'x'.join(map(str, shape)):>20} {threads:>7} {row['mode']:>17} {row['ours_us']:>10.1f} "
                    f"{row['torch_us']:>10.1f} {ratio:>6.2f}",
                    flush=True,
                )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
