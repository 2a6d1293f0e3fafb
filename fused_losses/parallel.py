"""Losses over classes that are spread over the ranks of a process group (tensor parallelism of the last layer)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._arguments import RowLossArguments, acc_dtype, is_distributed
from fused_losses._autograd import row_loss
from fused_losses._checks import check_row_loss
from fused_losses._common import RowLossModule
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import positive_integer
from fused_losses._reference import ACTIVE_GUARD, mean_of
from fused_losses._shards import (
    Shard,
    announce_error,
    check_classes,
    check_loss,
    find_shard,
    values_and_gradient,
)
from fused_losses.distributed import HasProcessGroup, sum_of_weights


class ClassParallel(HasProcessGroup):
    """A loss of logits of which every rank has some classes: the loss and gradients of one process with all.

    For heads whose weight is divided by classes, as ``ColwiseParallel`` does. All ranks of the group have the same rows
    and targets; each gives the logits of its classes and gets their gradient. The loss is the same on all ranks.
    Forward communicates 12 to 16 bytes per row in two all-reduces, a maximum and sums, and 8 more in another for
    each sum of terms that need the normaliser (NFL, NGCE); backward and ``no_grad`` add none. The first call also
    compares the ranks' classes.

    The gradient in the features is each rank's own part: :func:`sum_gradient` around them adds the parts up.

    Args:
        loss: a row-loss Module; all but HEM, multi-margin and bi-tempered. Its ``weight`` has all classes, targets
            count over all, and smoothing uses their number.
        process_group: the ranks that share the classes; None for the default group.
        first_class: number of this rank's first class.
        num_classes: C, of all ranks together. Shards may differ in size.

    Returns:
        Called with ``(logits, target, sample_weight=None)``, logits ``(N, classes here)`` or ``(N, classes here, d1,
        ...)``: the loss in float32, float64 for float64 logits. Also taken by :func:`linear_loss` as ``loss``.

    Raises:
        TypeError: ``loss`` is not such a Module.
        ValueError: the ranks' classes are not all classes once; shapes that do not fit.
        RuntimeError: dtypes that do not fit; on the CPU also where another rank's arguments were bad.
        IndexError: a target out of range (on CUDA: a device assertion).

    Example:
        >>> head = nn.Linear(512, 500_000)  # classes 500 000 rank to 500 000 (rank + 1)
        >>> criterion = ClassParallel(GCELoss(), group, 500_000 * rank, 1_000_000)
        >>> criterion(head(sum_gradient(features, group)), labels).backward()
    """

    def __init__(
        self, loss: RowLossModule, process_group: dist.ProcessGroup | None, first_class: int, num_classes: int
    ) -> None:
        super().__init__()
        if not isinstance(loss, RowLossModule):
            raise TypeError(f"loss must be a row-loss Module of fused_losses, got {type(loss).__name__}")
        check_loss(loss.stem, type(loss).__name__)
        positive_integer.pack("num_classes", num_classes)
        if not 0 <= first_class <= num_classes:
            raise ValueError(f"first_class must be between 0 and num_classes = {num_classes}, got {first_class}")
        self.loss = loss
        self.process_group = process_group
        self.first_class = first_class
        self.num_classes = num_classes
        self._shards: dict[int, Shard] = {}

    def shard(self, classes: int) -> Shard:
        """The shard of this rank, which has that many classes."""
        if classes not in self._shards:
            self._shards[classes] = find_shard(self.process_group, self.first_class, classes, self.num_classes)
        return self._shards[classes]

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss for this rank's classes of the logits."""
        classes = logits.shape[1] if isinstance(logits, Tensor) and logits.dim() > 1 else 0
        return sharded_loss(self.loss, self.shard(classes), logits, target, sample_weight)

    def extra_repr(self) -> str:
        """Which classes."""
        return f"first_class={self.first_class}, num_classes={self.num_classes}"


def sharded_loss(
    loss: RowLossModule, shard: Shard, logits: Tensor, target: Tensor, sample_weight: Tensor | None
) -> Tensor:
    """The loss of logits (N, classes of this rank, ...)."""
    args = _checked(loss, shard, logits, target, sample_weight)
    values = _values(logits, args, shard)
    return values.reshape(target.shape) if args.reduction == "none" else _reduced(values, args, [])


def _checked(
    loss: RowLossModule, shard: Shard, logits: Tensor, target: Tensor, sample_weight: Tensor | None
) -> RowLossArguments:
    """The loss's arguments for flat rows; an error of this rank is one of all."""
    try:
        return _arguments(loss, shard.num_classes, logits, target, sample_weight)
    except Exception:
        rows = target.numel() if isinstance(target, Tensor) else 0
        dtype = acc_dtype(logits) if isinstance(logits, Tensor) else torch.float32
        like = torch.empty((), dtype=dtype, device=getattr(logits, "device", "cpu"))
        announce_error(rows, like, shard, loss)
        raise


def _arguments(
    loss: RowLossModule, num_classes: int, logits: Tensor, target: Tensor, sample_weight: Tensor | None
) -> RowLossArguments:
    """Checked as for all logits on one rank."""
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must have shape (N, classes of this rank, ...), got {shape}")
    sizes = (logits.shape[0], num_classes, *logits.shape[2:])
    args = loss._arguments(logits.detach().new_zeros(()).expand(sizes), target, sample_weight)
    check_row_loss(args)
    if target.is_floating_point():
        raise RuntimeError(f"{args.loss}: target must hold class indices where classes are sharded")
    check_classes(args, num_classes)
    samples = None if sample_weight is None else sample_weight.reshape(-1)
    return args._replace(target=target.reshape(-1), sample_weight=samples)


def _values(logits: Tensor, args: RowLossArguments, shard: Shard) -> Tensor:
    """One loss per row."""
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    if torch.is_grad_enabled() and rows.requires_grad:
        return _ShardedLoss.apply(rows, args, shard)  # type: ignore[no-any-return, no-untyped-call]
    return values_and_gradient(args._replace(logits=rows), shard, False)[0]


def _reduced(values: Tensor, args: RowLossArguments, row_groups: list[dist.ProcessGroup]) -> Tensor:
    """Sum or mean over the rows of all ranks of the groups."""
    total = values.sum()
    for group in row_groups:
        total = _SumOverRanks.apply(total, group)  # type: ignore[no-untyped-call]
    if args.reduction == "sum":
        return total
    with torch.no_grad():
        denominator = sum_of_weights(args, values)
        for group in row_groups:
            dist.all_reduce(denominator, group=group)
    guard = ACTIVE_GUARD if args.reduction == "active_mean" else 0.0
    return mean_of(total, denominator.to(total.dtype), guard)


class _ShardedLoss(torch.autograd.Function):
    """Forward makes the gradient for upstream gradients of 1, while it communicates."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: RowLossArguments, shard: Shard) -> Tensor:
        values, grad_logits = values_and_gradient(args._replace(logits=logits), shard, True)
        ctx.save_for_backward(grad_logits)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("ClassParallel has a first derivative only: call it without create_graph=True")
        (grad_logits,) = ctx.saved_tensors
        return (grad_logits * grad_outputs[0].unsqueeze(1)).to(grad_logits.dtype), None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_gradient(input: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """``input`` itself, whose gradient becomes the sum over all ranks of the group.

    For the features before a head whose classes are divided among the ranks: each has the gradient through its own
    classes only.
    """
    return _SumGradient.apply(input, process_group)  # type: ignore[no-any-return, no-untyped-call]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = total.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None


def distributed_loss(loss: RowLossModule, logits: Any, target: Any, sample_weight: Any) -> Tensor:
    """The loss of DTensor logits: rows and classes replicated or sharded, classes over at most one mesh dimension.

    A plain tensor, the same on all ranks under "mean" and "sum"; this rank's rows under "none".
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, dim = logits.device_mesh, class_dim(logits)
    row_groups, class_groups = _groups(logits, dim)
    shape, offset = compute_local_shape_and_global_offset(logits.shape, mesh, logits.placements)
    local = logits.to_local()
    rows = slice(offset[0], offset[0] + shape[0])
    if dim == 1:
        target, sample_weight = (
            _local_rows(target, rows, logits.shape[0]),
            _local_rows(sample_weight, rows, logits.shape[0]),
        )
    if class_groups:
        check_loss(loss.stem, type(loss).__name__)
        classes = logits.shape[dim]
        shard = Shard(class_groups[0], offset[dim], classes, -(-classes // dist.get_world_size(class_groups[0])))
        args = _checked(loss, shard, local, target, sample_weight)
        values = _values(local, args, shard)
    else:
        args = loss._arguments(local, target, sample_weight)
        if not row_groups:
            return row_loss(args)
        values = row_loss(args._replace(reduction="none"))
    return values.reshape(target.shape) if args.reduction == "none" else _reduced(values, args, row_groups)


def _groups(logits: Any, dim: int) -> tuple[list[dist.ProcessGroup], list[dist.ProcessGroup]]:
    """The groups over which rows and classes are sharded."""
    found: dict[int, list[dist.ProcessGroup]] = {0: [], dim: []}
    for number, placement in enumerate(logits.placements):
        if placement.is_shard() and placement.dim in found:
            found[placement.dim].append(logits.device_mesh.get_group(number))
        elif not placement.is_replicate():
            raise ValueError(f"logits must be Shard(0), Shard({dim}) or Replicate(), got {logits.placements}")
    if len(found[dim]) > 1 or (dim == 0 and found[0]):
        raise ValueError(f"classes of (N, C) must be sharded over one mesh dimension, got {logits.placements}")
    return ([] if dim == 0 else found[0]), found[dim]


def _local_rows(rows: Any, here: slice, everywhere: int) -> Any:
    """This rank's rows, of a DTensor, of all rows or of these."""
    if rows is None:
        return None
    if is_distributed(rows):
        return rows.to_local()
    return rows[here] if rows.shape[0] == everywhere else rows
