"""Two labels a row: the loss of batches made by Mixup and CutMix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_losses import _ops
from fused_losses._arguments import (
    LOSSES,
    REDUCTIONS,
    LossEntry,
    RowLossArguments,
    acc_dtype,
    check_reduction,
    entries_of,
    entry_named,
    is_ignored,
)
from fused_losses._autograd import (
    apply,
    complete,
    forward_writes_gradient,
    give_away,
    is_recorded,
    needs_reference,
)
from fused_losses._checks import check_tensors, row_shape
from fused_losses._common import RowLossModule, check_forward
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import closed_fraction
from fused_losses._plain import reads_values
from fused_losses._reference import ACTIVE_GUARD, mean_of, row_loss_reference
from fused_losses._row_values import check_dense
from fused_losses.distributed import sum_of_weights

# The loss of one label: takes the label, a weight per row and a reduction.
LossOfLabel = Callable[[Tensor, "Tensor | None", str], Tensor]


def _function_and_options(
    loss: str | Callable[..., Tensor] | nn.Module,
) -> tuple[Callable[..., Tensor], LossEntry | None, dict[str, Any]]:
    """The function of a loss, its entry if it is one of ours, and a Module's options."""
    if isinstance(loss, RowLossModule):
        check_forward(loss)
        entry = LOSSES[loss.stem]
        return entry.function, entry, loss.call_options() | {"reduction": loss.reduction}
    if isinstance(loss, str):
        entry = entry_named(loss)
        return entry.function, entry, {}
    if isinstance(loss, (nn.Module, type)) or not callable(loss):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a name, a function or a Module of a row loss, got {kind}")
    return loss, next((entry for entry in LOSSES.values() if entry.function is loss), None), {}


def _check_reduction(entry: LossEntry | None, options: dict[str, Any]) -> None:
    """Puts the loss's own reduction in the place of one that is left out; raises on one that it does not have."""
    left_out = "mean" if entry is None else entry.reduction(options)
    if options.setdefault("reduction", left_out) is None and entry is not None and entry.none_is_default:
        options["reduction"] = left_out
    check_reduction(options["reduction"], REDUCTIONS if entry is None else entry.reductions)


class _Labels(NamedTuple):
    """Two labels a row: ``share`` of the first one, per row or of all, and what is left of the second one."""

    first: Tensor
    second: Tensor
    share: Tensor | float

    @property
    def of_operator(self) -> tuple[Tensor, Tensor | None, float]:
        """The operators' other_target, share and share_of_all."""
        if not isinstance(self.share, Tensor):
            return self.second, None, self.share
        return (self.second, None, self.share.item()) if self.share.dim() == 0 else (self.second, self.share, 0.0)

    def with_shares(self, ignore_index: int) -> _Labels:
        """The same without labels that have no share, which are left out even where the loss is not finite."""
        share = self.share
        if not isinstance(share, Tensor) or share.requires_grad:
            return self
        first, second = _without(self.first, share == 0, ignore_index), _without(self.second, share == 1, ignore_index)
        return _Labels(first, second, share)

    def one_by_one(
        self,
        loss: LossOfLabel,
        sample_weight: Tensor | None,
        reduction: str,
        weight: Tensor | None,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Their loss from that of each, in the dtype of those."""
        share = self.share.to(dtype) if isinstance(self.share, Tensor) else self.share
        if reduction == "none" or not isinstance(share, Tensor) or share.dim() == 0:
            of_first = loss(self.first, sample_weight, reduction)
            return share * of_first + (1.0 - share) * loss(self.second, sample_weight, reduction)
        total = weights = share.new_zeros(())
        for target, part in ((self.first, share), (self.second, 1.0 - share)):
            samples = part if sample_weight is None else part * sample_weight.to(dtype)
            by_class = not target.is_floating_point()  # a mean over probabilities divides by no class weights
            counted = ~is_ignored(target, ignore_index) if by_class else torch.ones_like(samples, dtype=torch.bool)
            if reduction == "active_mean":
                values = loss(target, samples, "none")
                total, counted = total + values.sum(), counted & (values.detach() != 0)
            else:
                total = total + loss(target, samples, "sum")
            of_class: Tensor | float = 1.0
            if weight is not None and by_class:
                of_class = entries_of(weight.to(dtype), torch.where(counted, target.long(), 0))
            weights = weights + torch.where(counted, samples * of_class, 0.0).sum()
        if reduction == "sum":
            return total
        return mean_of(total, weights, ACTIVE_GUARD if reduction == "active_mean" else 0.0)

    def by_formula(self, args: RowLossArguments) -> Tensor:
        """Their loss by plain operations of torch."""

        def loss(target: Tensor, samples: Tensor | None, reduction: str) -> Tensor:
            return row_loss_reference(args._replace(target=target, sample_weight=samples, reduction=reduction))

        dtype, labels = acc_dtype(args.logits), self.with_shares(args.ignore_index)
        return labels.one_by_one(loss, args.sample_weight, args.reduction, args.weight, args.ignore_index, dtype)


def _without(target: Tensor, rows: Tensor, ignore_index: int) -> Tensor:
    """The labels but for those of ``rows``, a flag for each or one of all; of probabilities 0 counts for nothing."""
    if not target.is_floating_point():
        return torch.where(rows, ignore_index, target.long())
    return torch.where(rows.unsqueeze(class_dim(target)) if rows.dim() > 0 else rows, 0.0, target)


class _MixedLoss(torch.autograd.Function):
    """The fused first derivative in the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: RowLossArguments, labels: _Labels) -> Tensor:
        upstream = written = None
        if forward_writes_gradient(args, expects_upstream=True):
            loss, upstream, written = _ops.mixed_loss_with_grad(*labels.of_operator, *args)
        else:
            loss = _ops.mixed_loss(*labels.of_operator, *args)
        is_tensor = isinstance(labels.share, Tensor)
        ctx.save_for_backward(*args.tensors, labels.second, labels.share if is_tensor else None, upstream, written)
        ctx.constants = args.constants, None if is_tensor else labels.share
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, second, share, upstream, written = ctx.saved_tensors
        constants, share_of_all = ctx.constants
        args = RowLossArguments(*inputs, *constants)
        labels = _Labels(args.target, second, share_of_all if share is None else share)
        return _gradient(ctx, args, labels, upstream, written, grad_outputs[0]), None, None


def _gradient(
    ctx: Any,
    args: RowLossArguments,
    labels: _Labels,
    upstream: Tensor | None,
    written: Tensor | None,
    grad_loss: Tensor,
) -> Tensor:
    if torch.is_grad_enabled():  # under create_graph the gradient must itself be differentiable
        return torch.autograd.grad(labels.by_formula(args), args.logits, grad_loss, create_graph=True)[0]
    given = give_away(ctx, written, grad_loss)
    if given is not None and not given.is_cpu:
        _ops.mixed_loss_backward_(grad_loss, upstream, given, *labels.of_operator, *args)
        return given
    if given is not None and complete(given, grad_loss):
        return given
    return _ops.mixed_loss_backward(grad_loss, *labels.of_operator, *args)


def _in_one_read(entry: LossEntry, labels: _Labels, args: RowLossArguments) -> bool:
    """Whether there is a kernel: for losses that are affine in the softmax, which a bias would change."""
    share = labels.share if isinstance(labels.share, Tensor) else None
    tensors = (*args[1:6], labels.second, share)
    return (
        entry.affine_in_softmax
        and args.logit_bias == 0
        and args.logit_bias_tensor is None
        and not (args.target.is_floating_point() or labels.second.is_floating_point())
        and not needs_reference(args.logits, *tensors)
    )


def _by_rows(args: RowLossArguments, labels: _Labels, share: Tensor) -> tuple[RowLossArguments, _Labels]:
    """The same call with a share per row, all of them the 0-dim ``share``, as the kernel takes one for all by number.

    In a mean with a share per row both labels have one divisor. Here each has its own, which becomes part of the
    shares: with ``lam / (weights of a)`` and ``(1 - lam) / (weights of b)`` it is a sum.
    """
    dtype, rows = acc_dtype(args.logits), args.target.shape
    if args.reduction != "mean":
        return args, labels._replace(share=share.to(dtype).expand(rows))

    def factor_of(part: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What a label's losses are multiplied by in the sum; with 0 it is left out."""
        factor = mean_of(part, sum_of_weights(args._replace(target=target), part))
        return factor, torch.where(factor == 0, args.ignore_index, target.long())

    of_first, first = factor_of(share.double(), labels.first)
    of_second, second = factor_of(1.0 - share.double(), labels.second)
    both = of_first + of_second
    share = of_first / torch.where(both == 0, 1.0, both)
    samples = both.to(dtype).expand(rows)
    if args.sample_weight is not None:
        samples = samples * args.sample_weight.to(dtype)
    labels = _Labels(first, second, share.to(dtype).expand(rows))
    return args._replace(target=first, sample_weight=samples, reduction="sum"), labels


def mixed(
    loss: str | Callable[..., Tensor] | nn.Module,
    logits: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    **options: Any,
) -> Tensor:
    """``lam loss(a) + (1 - lam) loss(b)``: the loss of inputs that were mixed from two with different labels.

    For Mixup (1710.09412) and CutMix (1905.04899) with any row loss, without a matrix of targets. For losses that take
    class probabilities, without ``logit_bias``, the logits are read once; for the others, once for each label.

    Args:
        loss: a name ("gce"), a function of :mod:`fused_losses.functional`, or a Module.
        logits: as for the loss.
        target_a: class indices of the labels with share ``lam``, or class probabilities for a loss that takes them.
        target_b: the labels with share ``1 - lam``, the shape of ``target_a``.
        lam: in [0, 1]: a number, or a tensor, 0-dim or with one number per row, the shape of class indices.
        **options: of the loss: its parameters, ``weight``, ``ignore_index``, ``reduction`` (the loss's own by
            default), ``logit_bias``, ``sample_weight``. They take the place of those of a Module.

    Returns:
        As the loss does. With one ``lam`` the mean is ``lam`` times the mean of one label plus ``1 - lam`` times that
        of the other, each over its own weights (under "active_mean" over its own active rows). With ``lam`` per row it
        is the sum of both divided by the sum of all weights, those of active rows under "active_mean".

    Raises:
        TypeError: ``loss`` is none of these, ``lam`` no number, or logits or a target no tensor.
        ValueError: ``lam`` is outside [0, 1] (of a tensor, looked at on the CPU only); the loss or the reduction is
            unknown.
        RuntimeError: shapes or dtypes do not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> mixed("mae", logits, torch.tensor([0]), torch.tensor([1]), 0.75)
        tensor(0.6192)
    """
    function, entry, own = _function_and_options(loss)
    check_tensors(logits=logits, target_a=target_a, target_b=target_b)
    options = own | options
    _check_reduction(entry, options)
    reduction = options["reduction"]
    check_tensors(**{name: options[name] for name in ("weight", "sample_weight") if options.get(name) is not None})
    check_dense(logit_bias=options.get("logit_bias"), lam=lam)
    rows = row_shape(logits) if target_a.is_floating_point() else tuple(target_a.shape)
    if not isinstance(lam, Tensor):
        lam = closed_fraction.pack("lam", lam)
    elif lam.dim() > 0 and lam.shape != rows:
        of = "the rows of logits" if target_a.is_floating_point() else "target_a"
        raise RuntimeError(f"lam must be a number, 0-dim or of the shape of {of}, {rows}, got {tuple(lam.shape)}")
    elif reads_values(lam) and lam.numel():
        for end in lam.detach().aminmax():
            closed_fraction.pack("every entry of lam" if lam.dim() else "lam", float(end))
    if isinstance(lam, Tensor) and logits.dim() == 1 and lam.numel() == 1:
        lam = lam.reshape(())  # of the only row, whose loss is a scalar
    if not isinstance(lam, Tensor) and lam in (0.0, 1.0):
        return function(logits, target_a if lam == 1.0 else target_b, **options)
    labels = _Labels(target_a, target_b, lam)
    if entry is not None:
        args = entry.arguments(logits, target_a, **options)
        if _in_one_read(entry, labels, args):
            if isinstance(lam, Tensor) and lam.dim() == 0 and not reads_values(lam):
                args, labels = _by_rows(args, labels, lam)
            return _mixed_loss(args, labels)

    if entry is not None:
        labels = labels.with_shares(options.get("ignore_index", -100))

    def of_label(target: Tensor, samples: Tensor | None, reduction: str) -> Tensor:
        return function(logits, target, **(options | {"sample_weight": samples, "reduction": reduction}))

    samples, weight = options.get("sample_weight"), options.get("weight")
    ignore_index = options.get("ignore_index", -100)
    return labels.one_by_one(of_label, samples, reduction, weight, ignore_index, acc_dtype(logits))


def _mixed_loss(args: RowLossArguments, labels: _Labels) -> Tensor:
    if is_recorded(args.logits):
        return apply(_MixedLoss, args.logits, args, labels)  # type: ignore[no-any-return]
    return _ops.mixed_loss(*labels.of_operator, *args)
