"""Autograd of the row losses.

The first derivative in the logits is fused. Mostly (``forward_writes_gradient``) the forward writes the gradient and
the first backward gives it away: on the CPU written for an upstream gradient of 1, and scaled where that was not right;
on CUDA for the one that backward found last, and computed again where that was not right. Otherwise, and while tracing,
the forward saves a few numbers per row, or nothing where rows are short, and backward recomputes. Every other kind of
derivative is rare and goes through the plain formula, which torch differentiates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_losses import _ops
from fused_losses._arguments import LOSSES, RowLossArguments
from fused_losses._checks import check_row_loss, check_tensors
from fused_losses._ops import PackedConstants, pack_constants
from fused_losses._plain import dispatch_modes, in_forward_mode, is_plain
from fused_losses._reference import row_loss_reference
from fused_losses.row_statistics import RowStatistics, row_statistics

_is_grad_enabled, _is_inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_in_function_transform = torch._C._are_functorch_transforms_active
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


def is_recorded(tensor: Tensor) -> bool:
    """Whether autograd records what is done with it: in inference mode nothing, even under ``enable_grad``."""
    # The compiler cannot ask for the mode.
    return tensor.requires_grad and _is_grad_enabled() and (torch.compiler.is_compiling() or not _is_inference())


def row_loss(args: RowLossArguments) -> Tensor:
    """The loss by the fused kernels, differentiable in every way."""
    if not (isinstance(args.logits, Tensor) and isinstance(args.target, Tensor)):
        _refuse(args)  # type: ignore[unreachable]
    try:
        return _row_loss(args)
    except RuntimeError:  # perhaps because there is no kernel for such tensors
        given = zip(args._fields, args.tensors, strict=False)
        check_tensors(f"{args.loss}: ", **{name: tensor for name, tensor in given if tensor is not None})
        raise


class NotATensorError(TypeError, RuntimeError):
    """What torch's functions raise for such an argument, and what its operators raise."""


def _refuse(args: RowLossArguments) -> None:
    """Raises for logits or a target that are no tensors."""
    given: tuple[tuple[str, object], ...] = (("logits", args.logits), ("target", args.target))
    for name, value in given:
        if not isinstance(value, Tensor):
            kind = "None" if value is None else type(value).__name__
            raise NotATensorError(f"{args.loss}: {name} must be a Tensor, got {kind}")


def _row_loss(args: RowLossArguments) -> Tensor:
    if needs_reference(*args.tensors):
        check_row_loss(args)
        return row_loss_reference(args)
    if _lacks_soft_targets(args):
        check_row_loss(args)  # raises, and names the losses that take them
    return fused_row_loss(args)


def fused_row_loss(args: RowLossArguments) -> Tensor:
    """The loss by the fused kernels, for callers that need no derivative but the first in the logits."""
    constants = _make_constants(args)
    if constants is not None:
        return small_row_loss(args.logits, args.target, constants)
    if is_recorded(args.logits):
        return apply(_RowLoss, args.logits, args)  # type: ignore[no-any-return]
    return _ops.row_loss(*args)


# In small calls everything around the loss takes longer than the loss. On the CPU those with nothing but logits and
# class indices take a shorter way, by operators with few arguments.
_MOST_LOGITS = 8192
_trace = torch._C._get_tracing_state


def is_small(logits: Tensor, target: Tensor) -> bool:
    """Whether :func:`small_row_loss` takes the call."""
    return (
        not torch.compiler.is_compiling()
        and (type(logits) is Tensor or type(logits) is torch.nn.Parameter)
        and type(target) is Tensor
        and target.dtype is torch.int64
        and logits.layout is target.layout is torch.strided
        and logits.is_cpu
        and target.is_cpu
        and logits.numel() <= _MOST_LOGITS
        and not dispatch_modes()
        and not _in_function_transform()
        and forward_ad._current_level < 0
        and _trace() is None
    )


def _make_constants(args: RowLossArguments) -> PackedConstants | None:
    """The constants for :func:`small_row_loss` if it takes the call."""
    others = not (args.weight is args.sample_weight is args.logit_bias_tensor is args.first_param is None)
    if others or not is_small(args.logits, args.target):
        return None
    return pack_constants(args.constants) if type(args.ignore_index) is int and type(args.params) is tuple else None


def small_constants(values: tuple[str, Sequence[float], float, int, str]) -> PackedConstants | None:
    """The constants for small calls that nobody looks at; None where one might have too many classes for them."""
    name, params = values[:2]
    return pack_constants(values) if LOSSES[name].suits(params, _MOST_LOGITS) else None


def small_row_loss(logits: Tensor, target: Tensor, constants: PackedConstants) -> Tensor:
    """The loss by the fused kernels, differentiable in every way."""
    if logits.requires_grad and _is_grad_enabled() and not _is_inference():  # is_recorded, without a call
        return _apply_small(logits, (target, constants))  # type: ignore[no-any-return, no-untyped-call]
    return _ops.packed_row_loss(logits, target, constants.tensor)


class _SmallRowLoss(torch.autograd.Function):
    """The fused first derivative in the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, given: tuple[Tensor, PackedConstants]) -> Tensor:
        target, constants = given
        ctx.constants, written = constants, None
        if logits.dtype is torch.float16 or constants.values[4] == "none":  # as in forward_writes_gradient
            loss = _ops.packed_row_loss(logits, target, constants.tensor)
        else:
            loss, written = _ops.packed_row_loss_with_grad(logits, target, constants.tensor)
        ctx.save_for_backward(logits, target, written)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad_loss = grad_outputs[0]
        logits, target, written = ctx.saved_tensors
        given = give_away(ctx, written, grad_loss)
        if given is not None and complete(given, grad_loss):
            return given, None
        args = RowLossArguments(logits, target, None, None, None, None, *ctx.constants.values)
        return gradient_from_logits(args, grad_loss), None


# Without the Python part of apply, whose checks is_small has made.
_apply_small = super(torch.autograd.Function, _SmallRowLoss).apply


def row_loss_and_statistics(args: RowLossArguments) -> tuple[Tensor, RowStatistics]:
    """The loss and the statistics of the logits' rows, from one read if there is an operator that has both."""
    if not _has_statistics(args):
        return row_loss(args), row_statistics(args.logits, args.target, args.ignore_index)
    if is_recorded(args.logits):
        loss, stats, argmax = apply(_RowLossAndStatistics, args.logits, args)
    else:
        loss, stats, argmax = _ops.row_loss_and_statistics(*args)
    return loss, RowStatistics.of_rows(stats, argmax, args.logits)


def _has_statistics(args: RowLossArguments) -> bool:
    """Whether the operator of the loss may make row statistics too."""
    logits, target = args.logits, args.target
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        return False  # type: ignore[unreachable]
    if not (is_plain(logits) or torch.compiler.is_compiling()):
        return False
    dense = all(tensor is None or tensor.layout is torch.strided for tensor in args.tensors)
    return dense and not target.is_floating_point() and not needs_reference(*args.tensors)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, outside of traces without its Python part, which only looks for torch.func's wrappers."""
    if torch.compiler.is_compiling():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _lacks_soft_targets(args: RowLossArguments) -> bool:
    """Whether the target holds class probabilities, which the loss does not take."""
    target = args.target
    if target.dtype is torch.int64 or not target.is_floating_point():
        return False
    return target.dim() == args.logits.dim() and not LOSSES[args.loss].takes_probabilities


def needs_reference(differentiable: Tensor, *others: Tensor | None) -> bool:
    """Is anything asked for but the first derivative in the first of these tensors?"""
    if _in_function_transform():
        return True
    if in_forward_mode(differentiable, *others):
        return True
    if torch.is_grad_enabled():
        for tensor in others:
            if tensor is not None and getattr(tensor, "requires_grad", False):
                return True
    return False


def forward_writes_gradient(args: RowLossArguments, expects_upstream: bool = False) -> bool:
    """Whether the training forward writes the gradient.

    Not in float16: divided by the batch size, and before mixed precision has multiplied it by the loss scale, the
    gradient would be too small; but for an operator that ``expects_upstream``, the loss scale of the step before, as
    it does on CUDA. Not for a mean over active rows on CUDA: their number is known only after all rows; the CPU then
    goes over the rows again. Not while tracing: the traced backward must do the same every time.
    """
    logits = args.logits
    if args.reduction == "none" or (args.reduction == "active_mean" and not logits.is_cpu):
        return False
    fits = logits.dtype is not torch.float16 or (expects_upstream and not logits.is_cpu)
    return fits and is_plain(logits)


class _RowLoss(torch.autograd.Function):
    """The fused first derivative of a row loss in its logits.

    The logits are an argument of their own besides being in ``args``: autograd does not look into tuples.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: RowLossArguments) -> Tensor:
        stats = denominator = written = None
        if not forward_writes_gradient(args, expects_upstream=True):
            save = _ops.row_loss_with_bits if is_plain(logits) else _ops.row_loss_with_stats
            loss, stats, denominator = save(*args)
        elif logits.is_cpu:
            loss, written = _ops.row_loss_with_grad(*args)
        else:
            loss, stats, denominator, written = _ops.row_loss_with_stats_and_grad(*args)
        save_row_loss(ctx, args, stats, denominator, written)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if grad_outputs[0] is None else row_loss_gradient(ctx, grad_outputs[0]), None


class _RowLossAndStatistics(_RowLoss):
    """The same with row statistics, which are constants."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: RowLossArguments) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        saved = denominator = written = None
        if logits.is_cpu or LOSSES[args.loss].affine_in_softmax:  # backward may start from the logits
            if forward_writes_gradient(args):
                loss, written, stats, argmax = _ops.row_loss_with_grad_and_statistics(*args)
            else:
                loss, stats, argmax = _ops.row_loss_and_statistics(*args)
        elif forward_writes_gradient(args, expects_upstream=True):
            everything = _ops.row_loss_with_stats_and_grad_and_statistics(*args)
            loss, saved, denominator, written, stats, argmax = everything
        else:
            with_bits, without = _ops.row_loss_with_bits_and_statistics, _ops.row_loss_with_stats_and_statistics
            save = with_bits if is_plain(logits) else without
            loss, saved, denominator, stats, argmax = save(*args)
        save_row_loss(ctx, args, saved, denominator, written)
        mark_constant(ctx, stats, argmax)
        return loss, stats, argmax


def mark_constant(ctx: Any, *outputs: Tensor) -> None:
    """Marks outputs as not differentiable, for which backward then gets no zeros: each would be a launch.

    Where the loss's own gradient is zero, backward gets None. Dynamo cannot trace the switch and needs none.
    """
    ctx.mark_non_differentiable(*outputs)
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def save_row_loss(
    ctx: Any, args: RowLossArguments, stats: Tensor | None, denominator: Tensor | None, written: Tensor | None
) -> None:
    """Saves what :func:`row_loss_gradient` needs: tensors where hooks, checkpoints and offloading see them."""
    ctx.save_for_backward(*args.tensors, stats, denominator, written)
    ctx.constants = args.constants


def row_loss_gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
    """The gradient in the logits from what was saved."""
    *inputs, stats, denominator, written = ctx.saved_tensors
    args = RowLossArguments(*inputs, *ctx.constants)
    given = give_away(ctx, written, grad_loss)
    if given is not None and given.is_cpu and complete(given, grad_loss):
        return given
    if torch.is_grad_enabled():
        return gradient_from_logits(args, grad_loss)
    if stats is None:  # nothing was saved
        stats = denominator = args.logits.new_empty(0)
    if given is not None and not given.is_cpu:
        _ops.row_loss_backward_(grad_loss, stats, denominator, given, *args)
        return given
    return _ops.row_loss_backward(grad_loss, stats, denominator, *args)


def gradient_from_logits(args: RowLossArguments, grad_loss: Tensor) -> Tensor:
    """The gradient in the logits from nothing but the arguments."""
    if torch.is_grad_enabled():  # under create_graph the gradient must itself be differentiable
        loss = row_loss_reference(args)
        return torch.autograd.grad(loss, args.logits, grad_loss, create_graph=True)[0]
    nothing = args.logits.new_empty(0)
    return _ops.row_loss_backward(grad_loss, nothing, nothing, *args)


def give_away(ctx: Any, written: Tensor | None, grad_loss: Tensor) -> Tensor | None:
    """The gradient that forward wrote, for the first backward to complete in place; None for later ones.

    What is done to it from here on is not counted as a change of the saved tensor (`data`), which nobody reads again.
    """
    if written is None or torch.is_grad_enabled():
        return None
    # A batched gradient stands for many (is_grads_batched): backward is one call, the operators are called for each.
    if not is_plain(grad_loss) or is_batched(grad_loss):
        return None
    mine = object()
    if vars(ctx).setdefault("given_away", mine) is not mine:  # in one step: threads may go backward through one graph
        return None
    return written.data


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many (vmap, ``is_grads_batched``)."""
    return not torch.compiler.is_compiling() and bool(_is_legacy_batched(tensor) or _is_batched(tensor))


def is_last_backward(grad_loss: Tensor) -> bool:
    """Whether no other backward will need the saved gradients: the graph is freed, nothing is traced or batched."""
    if not is_plain(grad_loss) or is_batched(grad_loss):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def is_one(number: Tensor) -> bool:
    """Whether it is 1, where looking at it waits for nobody."""
    if not (number.is_cpu and is_plain(number)) or is_batched(number):
        return False
    return number.item() == 1.0


def complete(written: Tensor, grad_loss: Tensor) -> bool:
    """Multiplies the gradient that the CPU's forward wrote by the upstream one; False where that would not be right."""
    factor = grad_loss.item()
    if factor == 1.0:
        return True
    # bfloat16 would be rounded twice, and infinity times the zeros of ignored rows is NaN.
    if written.dtype is torch.bfloat16 or not math.isfinite(factor):
        return False
    written.mul_(factor)
    return True
