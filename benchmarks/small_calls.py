"""What a small call costs on one thread: every loss Module at 32 x 10 beside ``torch.nn.CrossEntropyLoss``.

    python -m benchmarks.small_calls [losses]        (two minutes)

Without gradient, forward that is to be differentiated, and forward + backward. All calls of a state take turns; the
shortest CPU time of each counts, and the table gives torch's over ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu_profile import shortest
from fused_losses._arguments import LOSSES

SHAPE = (32, 10)
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


def microseconds(modules: list[Callable[..., Tensor]], state: str) -> list[float]:
    """Of one call each."""
    logits, target = torch.randn(SHAPE), torch.arange(SHAPE[0]) % SHAPE[1]
    calls = [SmallCall(m, state, logits.clone().requires_grad_(state != "no grad"), target) for m in modules]
    turns = [shortest(calls, BUNDLE, time.thread_time) for _ in range(REPEATS)]
    return [min(times) for times in zip(*turns, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(LOSSES)
    modules: list[Callable[..., Tensor]] = [nn.CrossEntropyLoss()]
    for name in names:
        make: Callable[..., nn.Module] = LOSSES[name].module
        modules.append(make())
    columns = [microseconds(modules, state) for state in STATES]
    print(f"{'':22}" + "".join(f"{state:>18}" for state in STATES))
    for name, *times in zip(["torch", *names], *columns, strict=True):
        cells = (f"{t:8.1f} us {column[0] / t:5.2f} " for t, column in zip(times, columns, strict=True))
        print(f"{name:22}" + " ".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    main()
