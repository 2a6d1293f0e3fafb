"""Losses whose classes are spread over the ranks of a process group (tensor parallelism of the last layer)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._agreement import Exchange, sum_over_ranks, telling
from fused_losses._arguments import RowLossArguments, is_distributed, is_ignored
from fused_losses._autograd import is_recorded, needs_reference, row_loss
from fused_losses._checks import check_constants, check_row_loss, check_tensors
from fused_losses._common import RowLossModule, check_forward
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import integer, positive_integer
from fused_losses._reference import ACTIVE_GUARD, mean_of
from fused_losses._shards import ROWS, Shard, check_classes, find_shard, values_and_gradient
from fused_losses.distributed import HasProcessGroup, check_constant, sum_of_weights


class ClassParallel(HasProcessGroup):
    """A loss of logits of which every rank has some classes; loss and gradients are those of one process with all
    classes.

    For a last layer whose weight is divided by classes, as ``ColwiseParallel`` does it. All ranks of the group have the
    same rows and targets. Each gives the logits of its classes and gets their gradient; the loss is the same on all
    ranks. The gradient of the features is only this rank's part: put :func:`sum_gradient` around the features to add up
    the parts.

    Forward gathers 12 to 20 bytes per row, and 24 more by which an error on one rank becomes an error on all. Losses
    with sums that need the normaliser of the softmax first (NFL, NNCE) add one all-reduce of 8 bytes per row and sum,
    and 4 more for the same. Multi-margin gathers 8 bytes per row and adds an all-reduce of 8, HEM also one of 4; LDR-KL
    and bi-tempered gather all logits.
    Backward and ``no_grad`` add nothing. The first call also compares the classes of the ranks; a call with more rows
    than all before gathers twice, to agree on the length.

    Args:
        loss: the Module of a row loss. Its ``weight`` has all classes, targets count over all classes, and smoothing
            uses their number.
        process_group: the ranks that share the classes; None for the default group.
        first_class: number of the first class of this rank.
        num_classes: C, of all ranks together. Ranks may have different numbers of classes.

    Returns:
        Called with ``(logits, target, sample_weight=None)``, logits ``(N, classes here)`` or ``(N, classes here, d1,
        ...)``: the loss in float32, float64 for float64 logits. :func:`linear_loss` takes it as ``loss``, too.

    Raises:
        TypeError: ``loss`` is no such Module, or ``first_class`` no integer.
        ValueError: the classes of the ranks are not all classes once; shapes do not fit.
        RuntimeError: dtypes do not fit; torch.distributed is not initialised; another rank has failed, which its
            message says, or was given another call (between GPUs: a device assertion; under torch.compile: only when
            the group's timeout is over).
        IndexError: a target is out of range (on CUDA: a device assertion).

    Example:
        >>> head = nn.Linear(512, 500_000)  # classes 500_000 * rank to 500_000 * (rank + 1)  # doctest: +SKIP
        >>> criterion = ClassParallel(fl.GCELoss(), group, 500_000 * rank, 1_000_000)  # doctest: +SKIP
        >>> criterion(head(sum_gradient(features, group)), labels).backward()  # doctest: +SKIP
    """

    _checks: ClassVar = {
        "first_class": integer,
        "num_classes": lambda name, value: int(positive_integer.pack(name, value)),
    }

    def __init__(
        self, loss: RowLossModule, process_group: dist.ProcessGroup | None, first_class: int, num_classes: int
    ) -> None:
        super().__init__()
        if not isinstance(loss, RowLossModule):
            raise TypeError(f"loss must be a row-loss Module of fused_losses, got {type(loss).__name__}")
        check_forward(loss)
        self.loss = loss
        self.process_group = process_group
        self.first_class = first_class
        self.num_classes = num_classes
        if not 0 <= self.first_class <= self.num_classes:
            raise ValueError(
                f"first_class must be between 0 and num_classes = {self.num_classes}, got {self.first_class}"
            )
        self._classes = 0  # of this rank

    def __setattr__(self, name: str, value: Any) -> None:
        """Notices what makes ranks ask each other again for their classes."""
        super().__setattr__(name, value)
        if name in ("process_group", "first_class", "num_classes"):
            self._shard: Shard | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shard": None}  # where it is loaded, ranks have not asked

    def shard(self, classes: int) -> Shard:
        """Where the classes of this rank lie, given their number. The first call asks all ranks."""
        if self._shard is None:
            self._shard = find_shard(self.process_group, self.first_class, classes, self.num_classes)
            self._classes = classes
        if classes != self._classes:
            raise ValueError(f"logits must have {self._classes} classes of this rank as at first, got {classes}")
        return self._shard

    def shard_of(self, name: str, tensor: Any, dim: int) -> Shard:
        """The same for a tensor that has these classes in a dimension.

        If it has none, that is said once the other ranks, who may be asking, have been answered.
        """
        has_classes = isinstance(tensor, Tensor) and not tensor.is_nested and tensor.dim() > dim
        try:
            return self.shard(tensor.shape[dim] if has_classes else 0)
        except ValueError:
            check_tensors(**{name: tensor})
            if not has_classes:
                raise ValueError(f"{name} must have a dimension of classes, got shape {tuple(tensor.shape)}") from None
            raise

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of logits ``(N, classes here, ...)`` for ``target``; ``sample_weight`` is one weight per row."""
        with telling(self._exchanges()):
            shard = self.shard_of("logits", logits, 1)
            args = _arguments(self.loss, self.num_classes, logits, target, sample_weight)
            values = _values(logits, args, shard)
        return values.reshape(target.shape) if args.reduction == "none" else _reduced(values, args, [])

    def _exchanges(self) -> list[Exchange]:
        """What a call communicates, as far as it may bring news."""
        return [Exchange.over(self.process_group, ROWS)]

    def _shown(self) -> dict[str, Any]:
        return {"first_class": self.first_class, "num_classes": self.num_classes}


def _arguments(
    loss: RowLossModule, num_classes: int, logits: Tensor, target: Tensor, sample_weight: Tensor | None
) -> RowLossArguments:
    """The loss's arguments for flat rows, checked as for all logits on one rank."""
    check_tensors(logits=logits, target=target)
    if logits.dim() < 2:
        raise ValueError(f"logits must have shape (N, classes of this rank, ...), got {tuple(logits.shape)}")
    sizes = (logits.shape[0], num_classes, *logits.shape[2:])
    args = loss._arguments(logits.detach().new_zeros(()).expand(sizes), target, sample_weight)
    check_row_loss(args)
    if target.is_floating_point():
        raise RuntimeError(f"{args.loss}: target must hold class indices where classes are sharded")
    check_classes(args, num_classes)
    if torch.is_grad_enabled():
        check_constants(args, "a loss of sharded classes is differentiable in the logits only")
    if needs_reference(logits, *args.tensors[1:]):
        raise NotImplementedError(
            "a loss of sharded classes has no form for the transforms of torch.func, nor a forward-mode derivative: "
            "use backward or torch.autograd.grad"
        )
    samples = None if sample_weight is None else sample_weight.reshape(-1)
    return args._replace(target=target.reshape(-1), sample_weight=samples)


def _values(logits: Tensor, args: RowLossArguments, shard: Shard) -> Tensor:
    """One loss per row."""
    rows = logits.movedim(1, -1).flatten(0, -2)
    if is_recorded(rows):
        return _ShardedLoss.apply(rows, args, shard)  # type: ignore[no-any-return, no-untyped-call]
    return values_and_gradient(args._replace(logits=rows), shard, False)[0]


def _reduced(values: Tensor, args: RowLossArguments, row_groups: list[dist.ProcessGroup]) -> Tensor:
    """Sum or mean over the rows of all ranks of the groups: one collective for each."""
    total = values.sum()
    denominator = total.detach().double() if args.reduction == "sum" else sum_of_weights(args, values)
    if row_groups:
        check_constant(denominator)
    with torch.no_grad():
        sums = torch.stack([total.double(), denominator])
        for group in row_groups:
            sums = sum_over_ranks(sums, group)
    if row_groups:
        total, denominator = _Everywhere.apply(total, sums[0].to(total.dtype)), sums[1]  # type: ignore[no-untyped-call]
    if args.reduction == "sum":
        return total
    guard = ACTIVE_GUARD if args.reduction == "active_mean" else 0.0
    return mean_of(total, denominator.to(total.dtype), guard)


class _ShardedLoss(torch.autograd.Function):
    """Forward makes the gradient for upstream gradients of 1, while it communicates."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: RowLossArguments, shard: Shard) -> Tensor:
        values, grad_logits = values_and_gradient(args._replace(logits=logits), shard, True)
        if logits.dtype != torch.float16:  # weights not yet divided by their sum may be beyond its range
            grad_logits = grad_logits.to(logits.dtype)
        ctx.save_for_backward(grad_logits, is_ignored(args.target, args.ignore_index))
        ctx.dtype = logits.dtype
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("ClassParallel has a first derivative only: call it without create_graph=True")
        grad_logits, ignored = ctx.saved_tensors
        upstream = torch.where(ignored, 0.0, grad_outputs[0])  # infinity times the zeros of ignored rows is NaN
        return (grad_logits * upstream.unsqueeze(1)).to(ctx.dtype), None, None


class _Everywhere(torch.autograd.Function):
    """The sum over all ranks, of which this rank's is a part."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, everywhere: Tensor) -> Tensor:
        return everywhere.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        part = grad_outputs[0]
        total = part.detach().contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        if torch.is_grad_enabled():  # create_graph
            total = _Everywhere.apply(part, total)  # type: ignore[no-untyped-call]
        return total, None


def sum_gradient(input: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """``input`` itself; its gradient becomes the sum over all ranks of the group.

    For the features before a last layer whose classes are divided among the ranks (:class:`ClassParallel`): each rank
    has only the gradient through its own classes.

    Args:
        input: a tensor, the same on all ranks.
        process_group: the ranks; None for the default group.

    Returns:
        A view of ``input``.

    Raises:
        TypeError: ``input`` is no tensor.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    return _SumGradient.apply(input, process_group)  # type: ignore[no-any-return, no-untyped-call]


def distributed_loss(loss: RowLossModule, logits: Any, target: Any, sample_weight: Any) -> Tensor:
    """The loss of DTensor logits: rows and classes replicated or sharded, classes over at most one mesh dimension.

    A plain tensor, the same on all ranks under "mean" and "sum"; this rank's rows under "none".
    """
    dim = class_dim(logits)
    if logits.dim() == 0:
        raise RuntimeError(f"{loss.stem}: logits must have shape (C,), (N, C) or (N, C, d1, ...), got a scalar")
    row_groups, class_groups = _groups(logits, dim)
    if not class_groups and (loss.reduction == "none" or not row_groups):
        local, target, sample_weight, _ = _local_parts(logits, target, sample_weight)
        return row_loss(loss._arguments(local, target, sample_weight))
    sums = [] if loss.reduction == "none" else [Exchange.over(group) for group in row_groups]
    with telling([*(Exchange.over(group, ROWS) for group in class_groups), *sums]):
        local, target, sample_weight, offset = _local_parts(logits, target, sample_weight)
        if class_groups:
            classes, group = logits.shape[dim], class_groups[0]
            shard = Shard(group, offset[dim], classes, -(-classes // dist.get_world_size(group)))
            args = _arguments(loss, classes, local, target, sample_weight)
            values = _values(local, args, shard)
        else:
            args = loss._arguments(local, target, sample_weight)
            values = row_loss(args._replace(reduction="none"))
        return values.reshape(target.shape) if args.reduction == "none" else _reduced(values, args, row_groups)


def _local_parts(logits: Any, target: Any, sample_weight: Any) -> tuple[Tensor, Any, Any, tuple[int, ...]]:
    """This rank's logits, targets and sample weights, and where its logits begin in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(logits.shape, logits.device_mesh, logits.placements)
    if class_dim(logits) == 1:
        rows = slice(offset[0], offset[0] + shape[0])
        target = _local_rows("target", target, rows, logits.shape[0])
        sample_weight = _local_rows("sample_weight", sample_weight, rows, logits.shape[0])
    return logits.to_local(), target, sample_weight, offset


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


def _local_rows(name: str, rows: Any, here: slice, everywhere: int) -> Any:
    """This rank's rows, of a DTensor, of a tensor of all rows, or of one that has only these."""
    if is_distributed(rows):
        rows = rows.to_local()
    if isinstance(rows, Tensor):
        check_tensors(**{name: rows})
    whole = isinstance(rows, Tensor) and rows.dim() > 0 and rows.shape[0] == everywhere
    return rows[here] if whole else rows
