"""Means over the rows of all processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._agreement import Exchange, sum_over_ranks, telling
from fused_losses._arguments import RowLossArguments, entries_of, is_ignored
from fused_losses._autograd import row_loss
from fused_losses._checks import check_tensors, row_shape
from fused_losses._common import Criterion, RowLossModule, check_forward
from fused_losses._plain import in_forward_mode
from fused_losses._reference import ACTIVE_GUARD, mean_of


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


def kept_weight(mask: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None) -> Tensor:
    """Sum of the kept rows' weights, of this process."""
    share = torch.ones_like(mask, dtype=torch.float64)
    if weight is not None:
        share = share * entries_of(weight, torch.where(mask, target.long(), 0))
    if sample_weight is not None:
        share = share * sample_weight
    return torch.where(mask, share, 0.0).sum()


def sum_of_weights(args: RowLossArguments, values: Tensor) -> Tensor:
    """What the mean over this process's rows divides by, but for the guard of a mean over active rows, in float64.

    ``values`` are the rows' losses, whose zeros a mean over active rows leaves out.
    """
    if args.target.is_floating_point():  # class probabilities: the values contain the class weights
        everywhere = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
        return kept_weight(everywhere == 0, everywhere, None, args.sample_weight)
    counted = ~is_ignored(args.target, args.ignore_index)
    if args.reduction == "active_mean":
        counted = counted & (values != 0)
    return kept_weight(counted, args.target, args.weight, args.sample_weight)


def check_constant(weights: Tensor) -> None:
    """Raises where weights, or their sum, by which a mean over all ranks divides, want a derivative: there is none."""
    if (weights.requires_grad and torch.is_grad_enabled()) or in_forward_mode(weights):
        raise RuntimeError(
            "a mean over the rows of all ranks is not differentiable in sample_weight and weight, got one that "
            'requires a gradient: detach it, or use reduction="sum"'
        )


def global_mean(total: Tensor, denominator: Tensor, group: dist.ProcessGroup | None, guard: float = 0.0) -> Tensor:
    """This rank's part of the mean over the rows of all ranks, times the number of ranks.

    DistributedDataParallel averages gradients over ranks, which takes that factor back; the mean of the losses over
    ranks is the loss of the whole batch. ``guard`` is added to the denominator. All ranks synchronise here.
    """
    check_constant(denominator)
    (everywhere,) = sum_over_ranks(denominator.reshape(1), group).unbind()
    return mean_of(total * dist.get_world_size(group), everywhere.to(total.dtype), guard)


class GlobalMean(HasProcessGroup):
    """A row loss whose mean is over the rows of all ranks, as if one process had the whole batch.

    For DistributedDataParallel where the ranks' weights differ in sum: with ``ignore_index``, weights, unequal numbers
    of rows, and always with :class:`HEMLoss`, whose mean is over active rows. There each rank divides by its own sum,
    and the average over ranks is not the mean of the whole batch. This divides by the sum over all ranks and multiplies
    by the number of ranks, which DDP's average takes back. The mean of the losses over the ranks is the loss of the
    whole batch. Each call takes one all-reduce of 24 bytes, which also tells whether a rank has failed;
    every rank has to call it.

    Args:
        loss: the Module of a row loss. With ``reduction`` "none" or "sum" it is called as it is.
        process_group: the ranks; None for the default group.

    Returns:
        Called with ``(logits, target, sample_weight=None)``: the loss, of the dtype of the loss itself.

    Raises:
        TypeError: ``loss`` is no Module of a row loss.
        RuntimeError: at the call, torch.distributed is not initialised, or another rank has failed (between GPUs: a
            device assertion; under torch.compile: only when the group's timeout is over).

    Example:
        >>> criterion = GlobalMean(HEMLoss(margin=0.2))
        >>> criterion(model(images), labels).backward()  # model: DistributedDataParallel  # doctest: +SKIP
    """

    def __init__(self, loss: RowLossModule, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if not isinstance(loss, RowLossModule):
            raise TypeError(f"loss must be a row-loss Module of fused_losses, got {type(loss).__name__}")
        check_forward(loss)
        self.loss = loss
        self.process_group = process_group

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` for ``target``; ``sample_weight`` is one weight per row."""
        loss = self.loss
        exchanges = self._exchanges()
        if not exchanges:
            return loss(logits, target, sample_weight)  # type: ignore[no-any-return]
        with telling(exchanges):
            check_tensors(logits=logits, target=target)
            return self.evaluate(loss._arguments(logits, target, sample_weight), _total_and_values)

    def _exchanges(self, reduction: str | None = None) -> list[Exchange]:
        """What a call communicates, under another ``reduction`` than the loss's if given."""
        reduces = (reduction or self.loss.reduction) not in ("none", "sum")
        return [Exchange.over(self.process_group)] if reduces else []

    def evaluate(
        self, args: RowLossArguments, total_and_values: Callable[[RowLossArguments], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The mean, from the sum of the rows' losses and those losses themselves."""
        total, values = total_and_values(args)
        denominator = sum_of_weights(args, values)
        guard = ACTIVE_GUARD if args.reduction == "active_mean" else 0.0
        return global_mean(total, denominator, self.process_group, guard)


def _total_and_values(args: RowLossArguments) -> tuple[Tensor, Tensor]:
    """The second only where a mean over active rows needs it."""
    if args.reduction == "active_mean":
        values = row_loss(args._replace(reduction="none"))
        return values.sum(), values
    shape = row_shape(args.logits)
    return row_loss(args._replace(reduction="sum")), args.logits.new_zeros(()).expand(shape)
