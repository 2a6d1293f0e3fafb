"""GPU time of a loss relative to `copy_` of its logits.

One copy reads and writes every logit once: the floor of a forward that also writes the gradient. A forward
that only reads costs half of it; reading twice and writing once 1.5.

Calls rotate over tensors that exceed the L2 cache and are interleaved; the median is reported. A spinning
kernel before each call lets the CPU enqueue it completely, so launch overhead is not part of any number.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl

ROTATION_BYTES = 1 << 28
SPIN_CYCLES = 2_000_000  # about a millisecond: longer than Python takes for a forward and backward
BF16, F32 = torch.bfloat16, torch.float32
CASES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((65536, 1000), BF16),
    ((65536, 1001), BF16),
    ((65536, 1000), F32),
    ((65536, 10), BF16),
    ((65536, 100), BF16),
    ((16384, 21841), BF16),
    ((8192, 50257), BF16),
    ((4096, 128256), BF16),
    ((8, 150, 512, 512), BF16),
    ((8, 19, 512, 1024), BF16),
]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "CrossEntropyLoss": fl.CrossEntropyLoss(),
    "MAELoss(auto)": fl.MAELoss(logit_bias="auto"),
    "torch cross_entropy": F.cross_entropy,
}


def metadata() -> dict[str, str]:
    def output(*command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else "unknown"

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "build": json.dumps(fl.build_info(), sort_keys=True),
        "commit": output("git", "describe", "--always", "--dirty"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }


def medians(calls: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Median GPU time in microseconds of each call, which is given a running number."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            result = call(i)
            end.record()
            end.synchronize()
            del result
            if i >= 3:  # the first rounds warm up
                times[name].append(1000 * begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    size = math.prod(shape) * dtype.itemsize
    count = max(2, math.ceil(ROTATION_BYTES / size))
    inputs = [(3 * torch.randn(shape, device="cuda")).to(dtype).requires_grad_() for _ in range(count)]
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")
    copies = [torch.empty(shape, device="cuda", dtype=dtype) for _ in range(count)]
    calls: dict[str, Callable[[int], Any]] = {"copy": lambda i: copies[i % count].copy_(inputs[i % count].detach())}

    def add(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        def forward(i: int) -> Tensor:
            with torch.no_grad():
                return loss(inputs[i % count], target)

        def both(i: int) -> tuple[Tensor, ...]:
            logits = inputs[i % count]
            return torch.autograd.grad(loss(logits, target), logits)

        calls[f"{name} forward"] = forward
        calls[f"{name} both"] = both

    for name, loss in LOSSES.items():
        add(name, loss)
    times = medians(calls, repeats)
    copy = times["copy"]
    return [
        {
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "loss": name,
            "copy_us": copy,
            "copy_GB_per_s": 2 * size / copy / 1000,
            "forward_us": times[f"{name} forward"],
            "forward_backward_us": times[f"{name} both"],
            "forward_per_copy": times[f"{name} forward"] / copy,
            "forward_backward_per_copy": times[f"{name} both"] / copy,
        }
        for name in LOSSES
    ]


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        print(
            f"{shape:>16} {row['dtype']:>9} {row['loss']:<20}",
            f"copy {row['copy_us']:8.1f} us ({row['copy_GB_per_s']:5.0f} GB/s)",
            f"forward {row['forward_us']:8.1f} us = {row['forward_per_copy']:5.2f} copies",
            f"with backward {row['forward_backward_us']:8.1f} us = {row['forward_backward_per_copy']:5.2f}",
            sep="  ",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; shapes found in it for the same metadata are not repeated")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls per number (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("copy_bandwidth.py needs a CUDA device that torch can see")
    report: dict[str, Any] = {"metadata": metadata(), "rows": []}
    if args.out and args.out.exists():
        before = json.loads(args.out.read_text())
        if before["metadata"] == report["metadata"]:
            report = before
    print(json.dumps(report["metadata"], indent=2))
    done = {(tuple(row["shape"]), row["dtype"]) for row in report["rows"]}
    show(report["rows"])
    for shape, dtype in CASES:
        if (shape, str(dtype).removeprefix("torch.")) in done:
            continue
        rows = measure(shape, dtype, args.repeats)
        torch.cuda.empty_cache()
        show(rows)
        report["rows"] += rows
        if args.out:
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
