"""Means over the rows of all processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._arguments import LOSSES
from fused_losses._common import Criterion, RowLossModule
from fused_losses._reference import ACTIVE_GUARD


class HasProcessGroup(Criterion):
    """A loss that keeps a group of processes: copies share it, and it cannot be pickled."""

    process_group: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> HasProcessGroup:
        memo[id(self.process_group)] = self.process_group
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return made

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                f"{type(self).__name__} cannot be pickled with its process_group, which belongs to this process: set "
                "process_group to None before and to the other process's group after, or save state_dict()"
            )
        return self.__dict__.copy()


def check_member(group: dist.ProcessGroup | None) -> None:
    """Raises unless torch.distributed is initialised and this process belongs to the group."""
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed must be initialised before a loss uses process_group")
    if dist.get_rank(group) < 0:
        raise ValueError(f"process_group must contain the calling process, got a group without rank {dist.get_rank()}")


def kept_weight(mask: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> Tensor:
    """Sum of the kept rows' weights, of this process."""
    share = torch.ones_like(mask, dtype=torch.float64)
    if weight is not None:
        share = share * weight[torch.where(mask, target.long(), 0)]
    if sample_weight is not None:
        share = share * sample_weight
    return torch.where(mask, share, 0.0).sum()


def global_mean(total: Tensor, denominator: Tensor, group: dist.ProcessGroup | None, guard: float = 0.0) -> Tensor:
    """This rank's part of the mean over the rows of all ranks, times the number of ranks.

    DistributedDataParallel averages gradients over ranks, which takes that factor back; the mean of the losses over
    ranks is the loss of the whole batch. ``guard`` is added to the denominator. All ranks synchronise here.
    """
    check_member(group)
    everywhere = denominator.detach().clone()
    dist.all_reduce(everywhere, group=group)
    empty = everywhere == 0
    divisor = torch.where(empty, 1.0, everywhere) + guard
    return torch.where(empty, 0.0, total * (dist.get_world_size(group) / divisor))


class GlobalMean(HasProcessGroup):
    """A loss whose mean is over the rows of all ranks, as if one process had the whole batch.

    Under DistributedDataParallel each rank divides by its own sum of weights, and the average over ranks is not the
    mean of the whole batch where those sums differ: with ``ignore_index``, weights, shares of unequal size, and always
    for the number of active rows of :class:`HEMLoss`. This divides by the sum over all ranks and multiplies by their
    number, which DDP's average of gradients takes back. The mean of the losses over ranks is the whole batch's loss.
    One all-reduce of one number per call; all ranks must call it.

    Args:
        loss: a row-loss Module. With ``reduction`` "none" or "sum" it is called as it is.
        process_group: the ranks; None for the default group.

    Returns:
        Called with ``(logits, target, sample_weight=None)``: the loss, of the dtype of the loss itself.

    Raises:
        TypeError: ``loss`` is no row-loss Module.
        RuntimeError: torch.distributed has not been initialised.

    Example:
        >>> criterion = GlobalMean(HEMLoss(margin=0.2))
        >>> criterion(model(images), labels).backward()  # model: DistributedDataParallel
    """

    def __init__(self, loss: RowLossModule, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if not isinstance(loss, RowLossModule):
            raise TypeError(f"loss must be a row-loss Module of fused_losses, got {type(loss).__name__}")
        self.loss = loss
        self.process_group = process_group

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` for ``target``."""
        loss = self.loss
        if loss.reduction in ("none", "sum"):
            return loss(logits, target, sample_weight)  # type: ignore[no-any-return]
        check_member(self.process_group)
        active = loss.reduction == "active_mean"
        options = loss.call_options()
        values = LOSSES[loss.stem].function(
            logits, target, reduction="none" if active else "sum", sample_weight=sample_weight, **options
        )
        with torch.no_grad():
            if target.is_floating_point():  # class probabilities: weights are in the values already
                counted = torch.ones(target.select(1 if target.dim() > 1 else 0, 0).shape, device=target.device) > 0
                denominator = kept_weight(counted, torch.zeros_like(counted), None, sample_weight)
            else:
                counted = target != loss.ignore_index
                if active:
                    counted = counted & (values != 0)
                denominator = kept_weight(counted, target, loss.weight, sample_weight)
        guard = ACTIVE_GUARD if active else 0.0
        return global_mean(values.sum(), denominator.to(values.dtype), self.process_group, guard)
