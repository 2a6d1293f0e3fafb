"""What a loss says of each row before anything is reduced: what wrappers and batch reducers are put around."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_losses._agreement import Exchange
from fused_losses._arguments import (
    REDUCTIONS,
    RowLossArguments,
    acc_dtype,
    check_reduction,
    entries_of,
    is_ignored,
)
from fused_losses._autograd import row_loss
from fused_losses._checks import check_row_loss, check_rows, check_targets, check_tensors, row_shape
from fused_losses._common import Criterion, RowLossModule, check_forward
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import Choice, OrTensor, assigned, integer, kept_value
from fused_losses._plain import reads_values
from fused_losses._reference import Rows, reduce_rows
from fused_losses.distributed import global_mean

Loss = str | Callable[..., Any] | nn.Module


class RowValues(NamedTuple):
    """Every row's loss without weights, its weight, whether it counts at all, and, where it is not the weight, what it
    adds to the divisor of a mean."""

    values: Tensor
    weight: Tensor
    kept: Tensor
    divisor: Tensor | None = None

    @staticmethod
    def of(rows: Rows, values: Tensor) -> RowValues:
        """Those of a plain formula."""
        return RowValues(values, rows.class_weight * rows.sample_weight, ~rows.ignored)

    def reduce(self, reduction: str, group: dist.ProcessGroup | None = None) -> Tensor:
        """The reduced loss, a mean over the rows of all ranks of ``group`` if there is one."""
        weight = torch.where(self.kept, self.weight, 0.0)
        values = torch.where(self.kept, self.values, 0.0) * weight  # no derivative of a dropped row is NaN
        divisor = weight if self.divisor is None else torch.where(self.kept, self.divisor, 0.0)
        if group is None or reduction != "mean":
            return reduce_rows(values, divisor, reduction)
        return global_mean(values.sum(), divisor.sum(), group)


class RowsModule(Criterion):
    """Base of the Modules that are no registered row loss but have one loss per row all the same.

    A tensor given for a hyper-parameter becomes a buffer; numbers stay attributes and can be reassigned.
    """

    _checks: ClassVar = {"reduction": assigned(Choice(REDUCTIONS)), "ignore_index": integer}
    reduction: str
    rows: Callable[..., RowValues]  # takes the arguments of forward

    def _row_exchanges(self) -> list[Exchange]:
        """What :attr:`rows` communicates."""
        return []

    def _views(self, logits: Any) -> Sequence[Tensor] | None:
        """The logits one by one where the loss inside takes several for each row, else None."""
        return views_of(getattr(self, "loss", None), logits)

    def _check_parameters(self, logits: Tensor) -> None:
        """Raises where a hyper-parameter is on a device from which it cannot be multiplied with ``logits``."""
        for name, tensor in (*self._buffers.items(), *self._parameters.items()):
            if tensor is not None and tensor.dim() == 0 and tensor.device.type not in ("cpu", logits.device.type):
                raise RuntimeError(
                    f"{name} of {type(self).__name__} must be on the device of logits ({logits.device}), got "
                    f"{tensor.device}"
                )

    def _set(self, name: str, value: float | Tensor, rule: OrTensor) -> None:
        """Checks a hyper-parameter and keeps it."""
        rule.pack(name, value)
        rule.check_entries(name, value)
        self._keep(name, kept_value(name, value, rule))


def as_module(loss: Loss, options: dict[str, Any]) -> nn.Module:
    """The Module of a row loss given by name, function or as a Module; ``options`` are for the first two."""
    if not isinstance(loss, nn.Module):
        from fused_losses.linear import find_loss  # here: it imports all losses, these included

        return find_loss(loss).module(**options)
    for name, value in options.items():
        raise ValueError(f"{name} must be set on the Module given as loss, got {value!r} beside it")
    return loss


def check_has_rows(loss: nn.Module) -> None:
    """Raises unless :func:`row_values` takes the Module."""
    if not isinstance(loss, (RowLossModule, RowsModule)):
        raise TypeError(
            "loss must be a name, a function or a Module of a row loss of fused_losses, or a wrapper around one, got "
            f"{type(loss).__name__}"
        )
    check_forward(loss)


def views_of(loss: object, logits: Any) -> Sequence[Tensor] | None:
    """The logits one by one where ``loss`` takes several for each row, else None."""
    return loss._views(logits) if isinstance(loss, RowsModule) else None


def exchanges(loss: nn.Module) -> list[Exchange]:
    """What calling the Module communicates, as far as it says."""
    return loss._exchanges() if isinstance(loss, Criterion) else []


def row_exchanges(loss: nn.Module) -> list[Exchange]:
    """What :func:`row_values` communicates."""
    return loss._row_exchanges() if isinstance(loss, RowsModule) else []


def row_values(loss: nn.Module, logits: Tensor, target: Tensor, *inputs: Any, **options: Any) -> RowValues:
    """Every row's loss by a Module that :func:`check_has_rows` lets pass, called as the Module is."""
    rows = loss.rows if isinstance(loss, RowsModule) else functools.partial(_registered, loss)  # type: ignore[arg-type]
    try:
        return rows(logits, target, *inputs, **options)
    except TypeError:
        _check_inputs(loss, rows, logits, target, *inputs, **options)
        raise


def _check_inputs(loss: nn.Module, rows: Callable[..., RowValues], *inputs: Any, **options: Any) -> None:
    """Raises, without naming functions that users do not know, where ``rows`` does not take such arguments."""
    try:
        inspect.signature(rows).bind(*inputs, **options)
    except TypeError as error:
        hint = "; for row statistics call fused_losses.row_statistics" if "return_row_stats" in options else ""
        raise TypeError(f"{type(loss).__name__} inside a wrapper: {error}{hint}") from None


def _registered(loss: RowLossModule, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> RowValues:
    args = loss._arguments(logits, target, sample_weight)
    check_tensors(f"{type(loss).__name__}: ", logits=logits, target=target)
    check_dense(weight=args.weight, sample_weight=args.sample_weight)
    check_row_loss(args)
    return rows_of(args)


def rows_of(args: RowLossArguments) -> RowValues:
    """Every row's loss by a call's checked arguments."""
    by_class = not args.target.is_floating_point()
    divisor, kept = row_weights(args, by_class)
    weight, shares = args.weight, _label_shares(args)
    if weight is None or shares is None:
        return RowValues(row_loss(args._replace(weight=None, sample_weight=None, reduction="none")), divisor, kept)
    # The row's loss is a sum over classes, each with its weight: here their mean, by what it is divided by.
    values = row_loss(args._replace(sample_weight=None, reduction="none"))
    of_row = _weight_of(shares, weight, args)
    values = values / torch.where(of_row == 0, 1.0, of_row)
    if maybe_any(weight.eq(0)):  # a row without any weight is judged all the same
        unweighted = args._replace(logits=args.logits.detach(), weight=None, sample_weight=None, reduction="none")
        values = torch.where(of_row == 0, row_loss(unweighted), values)
    samples = 1.0 if args.sample_weight is None else args.sample_weight.reshape(of_row.shape).to(of_row)
    return RowValues(values, of_row * samples, kept, divisor)


def _label_shares(args: RowLossArguments) -> tuple[Tensor | None, float] | None:
    """Class probabilities of the rows, None for those of class indices, and how much they are smoothed; None if a row's
    class weight is that of its label."""
    smoothing = float(args.params[0]) if args.loss == "cross_entropy" else 0.0
    if args.target.is_floating_point():
        return args.target.detach(), smoothing
    return (None, smoothing) if smoothing != 0.0 else None


def _weight_of(shares: tuple[Tensor | None, float], weight: Tensor, args: RowLossArguments) -> Tensor:
    """The sum of the class weights, each times the size of the class's share: with negative smoothing some are < 0."""
    probabilities, smoothing = shares
    weight = weight.to(acc_dtype(args.logits))
    of_others = smoothing / len(weight)
    if probabilities is None:
        own, _ = row_weights(args._replace(sample_weight=None))
        return abs(1.0 - smoothing + of_others) * own + abs(of_others) * (weight.sum() - own)
    sizes = ((1.0 - smoothing) * probabilities.to(weight.dtype) + of_others).abs()
    return torch.tensordot(sizes, weight, ([class_dim(args.logits)], [0]))  # type: ignore[no-any-return]


def row_weights(args: RowLossArguments, by_class: bool = True) -> tuple[Tensor, Tensor]:
    """Every row's weight and whether it counts."""
    shape = row_shape(args.logits)
    weight = args.logits.new_ones(shape, dtype=acc_dtype(args.logits))
    target = args.target.reshape(shape) if by_class else args.target
    kept = ~is_ignored(target, args.ignore_index) if by_class else weight > 0
    if by_class and args.weight is not None:
        weight = entries_of(args.weight.to(weight.dtype), torch.where(kept, target.long(), 0))
    if args.sample_weight is not None:
        weight = weight * args.sample_weight.reshape(shape).to(weight.dtype)
    return weight, kept


def plain_arguments(
    name: str,
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    ignore_index: int,
    sample_weight: Tensor | None,
    reduction: str = "mean",
) -> RowLossArguments:
    """The arguments of a loss that is in no registry, checked but for classes out of range."""
    check_reduction(reduction)
    check_tensors(f"{name}: ", logits=logits, target=target)
    check_dense(weight=weight, sample_weight=sample_weight)
    ignored = int(integer("ignore_index", ignore_index))
    args = RowLossArguments(logits, target, weight, sample_weight, None, None, name, (), 0.0, ignored, reduction)
    check_rows(args, REDUCTIONS, takes_probabilities=False)
    if logits.shape[class_dim(logits)] == 0:
        raise ValueError(f"{name}: logits must have at least one class, got shape {list(logits.shape)}")
    return args


def plain_rows(name: str, logits: Tensor, target: Tensor, **options: Any) -> Rows:
    """The checked arguments of a loss that is computed by operations of torch; options as for plain_arguments."""
    return checked_rows(plain_arguments(name, logits, target, **options))


def checked_rows(args: RowLossArguments) -> Rows:
    """Of :func:`plain_arguments`, once their classes are checked, too."""
    logits, target = args.logits, args.target
    check_targets(target, args.ignore_index, logits.shape[class_dim(logits)])
    maybe_ignored = maybe_any(is_ignored(target, args.ignore_index))
    return Rows.of(logits, target, args.weight, args.sample_weight, 0.0, args.ignore_index, maybe_ignored)


def check_dense(**values: Any) -> None:
    """Raises for a sparse tensor among values of any kind."""
    check_tensors(**{name: value for name, value in values.items() if isinstance(value, Tensor)})


def maybe_any(flags: Tensor) -> bool:
    """Whether one may be True: False only where looking at them waits for nobody."""
    return not reads_values(flags) or bool(flags.any())
