"""An error of one rank is an error of all: ranks agree about a call before they wait for each other's numbers."""

from __future__ import annotations

import zlib
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses.distributed import check_member

Group = dist.ProcessGroup | None


class Agreement:
    """What a call's checks stand in, between its start and its first collective.

    Whoever has passed them calls :meth:`reach`; an exception before that is told to the other ranks, which raise as
    well. One collective of a few numbers per group, whatever the shapes of a rank's arguments are.

    Args:
        group: ranks with the same rows and targets, which they compare too.
        others: groups of ranks that have rows of their own.
    """

    def __init__(self, group: Group, *others: Group) -> None:
        self.groups = group, *others
        for each in self.groups:
            check_member(each)
        self.pending = True

    def __enter__(self) -> Agreement:
        return self

    def reach(self, call: str, target: Tensor | None = None) -> None:
        """Raises unless all ranks reach this; those of ``group`` with the same ``call``, in words, and target."""
        self.pending = False
        error = _tell(self.groups[0], None, call, target)
        for group in self.groups[1:]:
            error = _tell(group, error)
        if error is not None:
            raise error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pending and isinstance(error, Exception):
            self.pending = False
            for group in self.groups:
                _tell(group, error)


def _tell(group: Group, error: Exception | None, call: str = "", target: Tensor | None = None) -> Exception | None:
    """This rank's error, or else what to raise instead: the error of another rank, or that the calls differ.

    Where the group communicates between GPUs only, nobody waits for the answer: others get a device assertion.
    """
    device = "cpu" if "cpu" in dist.get_backend_config(group) else "cuda"
    number = zlib.crc32(call.encode())
    # Made on their device: a copy from the host would wait for the GPU.
    words = [torch.full((), n, dtype=torch.int64, device=device) for n in (int(error is not None), number, -number, 0)]
    checksum = words[3] if target is None else _checksum(target).to(device)
    found = torch.stack([*words[:3], checksum, -checksum])
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    if device != "cpu":
        if error is None:
            alike = (found[0] == 0) & (found[1] == -found[2]) & (found[3] == -found[4])
            torch._assert_async(alike, "a rank of the group has raised an error, or was given other arguments")
        return error
    failed, most, least, most_target, least_target = found.tolist()
    if failed:
        texts = _gather(None if error is None else f"{type(error).__name__}: {error}", group)
        rank, text = next((rank, text) for rank, text in texts if text is not None)
        return error or RuntimeError(f"the loss was given bad arguments on another rank. Rank {rank} raised {text}")
    if most != -least:
        calls = "; ".join(f"rank {rank}: {text}" for rank, text in _gather(call, group))
        return RuntimeError(f"the ranks that share the classes must make the same call, got {calls}")
    if most_target != -least_target:
        return RuntimeError("target must be the same on all ranks that share the classes, got different ones")
    return None


def _checksum(target: Tensor) -> Tensor:
    """A number that tells targets apart, and orders of the same targets, but for rare coincidences."""
    places = torch.arange(1, target.numel() + 1, device=target.device)
    return (target.reshape(-1).long() * places).sum()


def _gather(text: str | None, group: Group) -> list[tuple[int, str | None]]:
    """Every rank's text, with its number among all processes."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, text, group=group)
    return list(zip(dist.get_process_group_ranks(group), found, strict=True))
