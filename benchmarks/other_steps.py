"""Steps that the other benchmarks leave out, on one thread: probability targets, row statistics, losses around losses.

    python -m benchmarks.other_steps > benchmarks/results/cpu/other_steps.md        (three minutes)

Forward + backward, float32. Calls of a table take turns on inputs that are not in the cache; the shortest CPU time of
each counts, so that other work on the machine matters little. "Over torch" is the time in units of
``torch.nn.functional.cross_entropy``'s in the same table.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses as fl
from benchmarks.calls import rotation_bytes
from benchmarks.cpu_profile import shortest
from benchmarks.machine import describe

SOFT_SHAPE = (1024, 1000)
WRAPPED_SHAPES = ((16384, 100), (65536, 10))
Steps = dict[str, Callable[[Tensor], Any]]  # from logits to a loss, or to a tuple that begins with it


@dataclass
class Step:
    """Forward and backward of a loss; see :class:`benchmarks.calls.Call`."""

    loss: Callable[[Tensor], Any]
    leaves: list[Tensor]

    def prepare(self, i: int) -> Tensor:
        """The next logits, without a gradient: a fresh one is part of the step."""
        leaf = self.leaves[i % len(self.leaves)]
        leaf.grad = None
        return leaf

    def run(self, i: int, prepared: Tensor) -> None:
        loss = self.loss(prepared)
        (loss[0] if isinstance(loss, tuple) else loss).backward()


def table(title: str, shape: tuple[int, int], losses: Steps, target: Tensor) -> None:
    """Prints milliseconds of a step, and over that of cross entropy."""
    logits = torch.randn(shape)
    copies = rotation_bytes("cpu") // (4 * logits.numel())
    leaves = [logits.clone().requires_grad_() for _ in range(copies)]
    steps: Steps = {"F.cross_entropy": functools.partial(F.cross_entropy, target=target), **losses}
    times = shortest([Step(loss, leaves) for loss in steps.values()], 1, time.thread_time)
    print(f"\n## {title}, {shape[0]} x {shape[1]}\n\n| loss | ms | over torch |\n| --- | --- | --- |")
    for name, microseconds in zip(steps, times, strict=True):
        print(f"| {name} | {microseconds / 1000:.2f} | {microseconds / times[0]:.2f} |")


def two_labels(loss: Callable[..., Tensor], target: Tensor, logits: Tensor) -> Tensor:
    """The loss of inputs that were mixed from two."""
    return fl.functional.mixed(loss, logits, target, target.roll(1), 0.3)


def loss_then_statistics(loss: Callable[..., Tensor], target: Tensor, logits: Tensor) -> tuple[Tensor, Any]:
    """Two calls, two reads."""
    return loss(logits, target), fl.row_statistics(logits, target)


def probability_targets(shape: tuple[int, int], target: Tensor) -> Steps:
    """Probabilities for all classes, and two labels a row."""
    probabilities = torch.rand(shape).softmax(1)
    losses = {"GCE": fl.LOSSES["gce"], "NCE+AGCE": fl.LOSSES["nce_agce"]}
    steps: Steps = {"F.cross_entropy of probabilities": lambda x: F.cross_entropy(x, probabilities)}
    for name, entry in losses.items():
        loss, plain = entry.function, entry.reference
        steps[f"{name} of probabilities"] = functools.partial(loss, target=probabilities)
        steps[f"{name} of probabilities, plain formula"] = functools.partial(plain, target=probabilities)
        steps[f"{name} of two labels"] = functools.partial(two_labels, loss, target)
    return steps


def row_statistics(target: Tensor) -> Steps:
    """A loss with the statistics of its rows from one read of the logits, and from two."""
    steps: Steps = {}
    for name, loss in {"GCE": fl.GCELoss(), "NGCE": fl.NGCELoss()}.items():
        steps[name] = functools.partial(loss, target=target)
        steps[f"{name}, return_row_stats=True"] = functools.partial(loss, target=target, return_row_stats=True)
        steps[f"{name}, then row_statistics"] = functools.partial(loss_then_statistics, loss, target)
    return steps


def wrapped(shape: tuple[int, int], target: Tensor) -> Steps:
    """Corrections, ELR, several views, and rescaled logits beside the loss inside."""
    rows, classes = shape
    matrix = fl.noise.symmetric_matrix(0.2, classes)
    elr, other_view, index = fl.ELRLoss(rows, classes), torch.randn(shape), torch.arange(rows)
    gjs = fl.GJSLoss((0.4, 0.3, 0.3))
    return {
        "cross entropy": functools.partial(fl.CrossEntropyLoss(), target=target),
        "forward correction": functools.partial(fl.ForwardCorrectionLoss(matrix), target=target),
        "backward correction": functools.partial(fl.BackwardCorrectionLoss(matrix), target=target),
        "ELR": lambda x: elr(x, target, index),
        "GJS of two views, one with a gradient": lambda x: gjs([x, other_view], target),
        "LogitNorm of cross entropy": functools.partial(fl.LogitNorm("cross_entropy"), target=target),
        "LogitClip of cross entropy": functools.partial(fl.LogitClip("cross_entropy", 1.0), target=target),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = describe("cpu")
    print("# Other steps\n\nMade by `python -m benchmarks.other_steps`, which explains it.")
    print(f"{machine['processor']}, {machine['isa']}, torch {torch.__version__}, commit {machine['commit']}.")
    target = torch.randint(SOFT_SHAPE[1], (SOFT_SHAPE[0],))
    table("Probability targets", SOFT_SHAPE, probability_targets(SOFT_SHAPE, target), target)
    table("Row statistics", SOFT_SHAPE, row_statistics(target), target)
    for shape in WRAPPED_SHAPES:
        target = torch.randint(shape[1], (shape[0],))
        table("Around another loss, or with a memory", shape, wrapped(shape, target), target)


if __name__ == "__main__":
    main()
