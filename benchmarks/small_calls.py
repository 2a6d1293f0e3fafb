"""What a small call costs on one thread: every loss Module beside ``torch.nn.CrossEntropyLoss``, at 32 x 10, and
Z-Error losses at 256 x 10, since statistics of a class need rows.

    python -m benchmarks.small_calls [losses] > benchmarks/results/cpu/small_calls.md        (two minutes)

Without gradient, forward that is to be differentiated, and forward + backward. All calls of a state take turns; the
shortest CPU time of each counts, in microseconds; behind it, in units of torch's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_losses as fl
from benchmarks.cpu_profile import shortest
from benchmarks.machine import describe
from fused_losses._arguments import LOSSES

SHAPE, Z_SHAPE = (32, 10), (256, 10)
BUNDLE, REPEATS = 10, 10
STATES = ("no grad", "forward", "step")


@dataclass
class SmallCall:
    """One Module in one state; see :class:`benchmarks.calls.Call`."""

    module: Callable[..., Tensor]
    state: str
    logits: Tensor
    target: Tensor

    def prepare(self, i: int) -> Any:
        """Nothing: small inputs are in cache."""
        self.logits.grad = None

    def run(self, i: int, prepared: Any) -> Any:
        loss = self.module(self.logits, self.target)
        if self.state == "step":
            loss.backward()


def microseconds(modules: list[Callable[..., Tensor]], state: str, shape: tuple[int, int]) -> list[float]:
    """Of one call each."""
    logits, target = torch.randn(shape), torch.arange(shape[0]) % shape[1]
    calls = [SmallCall(m, state, logits.clone().requires_grad_(state != "no grad"), target) for m in modules]
    turns = [shortest(calls, BUNDLE, time.thread_time) for _ in range(REPEATS)]
    return [min(times) for times in zip(*turns, strict=True)]


def table(losses: Mapping[str, Callable[..., Tensor]], shape: tuple[int, int]) -> None:
    """Prints times, and these over torch's."""
    modules: dict[str, Callable[..., Tensor]] = {"torch": nn.CrossEntropyLoss(), **losses}
    columns = [microseconds(list(modules.values()), state, shape) for state in STATES]
    print(f"\n| {shape[0]} x {shape[1]} | {' | '.join(STATES)} |\n|{' --- |' * (1 + len(STATES))}")
    for name, *times in zip(modules, *columns, strict=True):
        cells = (f"{t:.1f}, {t / column[0]:.2f}" for t, column in zip(times, columns, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", nargs="*", help="names of the registry; default: all")
    names = parser.parse_args().losses or list(LOSSES)
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        parser.error(f"no such loss: {', '.join(unknown)}; there are {', '.join(LOSSES)}")
    torch.set_num_threads(1)
    machine = describe("cpu")
    print("# Small calls\n\nMade by `python -m benchmarks.small_calls`, which explains it.")
    print(f"{machine['processor']}, {machine['isa']}, torch {torch.__version__}, commit {machine['commit']}.")
    losses: dict[str, Callable[..., nn.Module]] = {name: LOSSES[name].module for name in names}
    table({name: make() for name, make in losses.items()}, SHAPE)
    chosen: dict[str, Any] = {"threshold": 1.0, "statistic": "prob", "sided": "lower"}
    z_error = {
        "z_error": fl.ZErrorCrossEntropyLoss(),
        "z_error running": fl.ZErrorCrossEntropyLoss(running=True, num_classes=Z_SHAPE[1]),
        "z_error prob": fl.ZErrorCrossEntropyLoss(running=True, num_classes=Z_SHAPE[1], **chosen),
    }
    table(z_error, Z_SHAPE)


if __name__ == "__main__":
    main()
