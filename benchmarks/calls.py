"""One timed call: a provider's loss in one mode, on buffers that rotate so that every call finds them cold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import UPSTREAM, Case, LossFunction

# Buffers larger than any cache in between: at least this, and more than the last-level cache.
ROTATION_BYTES = 256 << 20
LARGEST_ROTATION = 512 << 20


def rotation_bytes(device: str) -> int:
    """How many bytes of inputs the calls cycle through."""
    if device != "cpu":
        return ROTATION_BYTES
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    largest = max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)
    return min(max(ROTATION_BYTES, largest), LARGEST_ROTATION)


@dataclass
class Buffers:
    """Equal inputs at different addresses."""

    leaves: list[Tensor]
    targets: list[Tensor]
    copies: list[Tensor]
    upstream: Tensor

    @staticmethod
    def of(case: Case, logits: Tensor, target: Tensor, count: int | None = None) -> Buffers:
        """``count`` of them, or as many as it takes to find each one cold."""
        if count is None:
            count = min(4096, max(2, math.ceil(rotation_bytes(case.device) / case.logits_bytes)))
        value_dtype = logits.dtype if logits.dtype in (torch.float32, torch.float64) else torch.float32
        return Buffers(
            leaves=[logits.detach().clone().requires_grad_() for _ in range(count)],
            targets=[target.clone() for _ in range(count)],
            copies=[logits.clone() for _ in range(count)],  # clones, so that their pages exist
            upstream=torch.tensor(UPSTREAM, dtype=value_dtype, device=case.device),
        )

    @property
    def count(self) -> int:
        return len(self.leaves)


@dataclass
class Call:
    """``prepare`` is not timed, ``run`` is; both take the running number that picks the buffer."""

    function: LossFunction
    mode: str
    buffers: Buffers
    overwrites_logits: bool = False

    def prepare(self, i: int) -> Any:
        """The graph for a backward alone; a fresh copy for a library that overwrites its input."""
        leaf = self.buffers.leaves[i % self.buffers.count]
        if self.overwrites_logits:
            leaf = leaf.detach().clone().requires_grad_()
        elif self.mode.startswith("fwd_bwd") and leaf.is_cuda:
            # As in a training: ours expects the upstream gradient of the step before, which modes in turns do not have.
            self.run(i - 1, self.buffers.leaves[(i - 1) % self.buffers.count])
            torch.cuda.synchronize()
        if self.mode.startswith("bwd"):
            return self._loss(leaf, i), leaf
        return leaf

    def run(self, i: int, prepared: Any) -> Any:
        if self.mode == "fwd":
            with torch.no_grad():
                return self._loss(prepared.detach(), i)
        if self.mode == "fwd_train":
            return self._loss(prepared, i)
        loss, leaf = prepared if self.mode.startswith("bwd") else (self._loss(prepared, i), prepared)
        upstream = self.buffers.upstream.to(loss.dtype) if self.mode.endswith("scaled") else None
        return torch.autograd.grad(loss, leaf, upstream)

    def _loss(self, logits: Tensor, i: int) -> Tensor:
        return self.function(logits, self.buffers.targets[i % self.buffers.count])


@dataclass
class Copy:
    """``copy_`` of the logits into a buffer that exists: one read and one write of every logit."""

    buffers: Buffers

    def prepare(self, i: int) -> Any:
        return self.buffers.leaves[i % self.buffers.count].detach()

    def run(self, i: int, prepared: Any) -> Any:
        return self.buffers.copies[i % self.buffers.count].copy_(prepared)


@dataclass
class Repeated:
    """The same again, on inputs that need not be cold."""

    step: Callable[[], Any]

    def prepare(self, i: int) -> None:
        return None

    def run(self, i: int, prepared: None) -> Any:
        return self.step()
