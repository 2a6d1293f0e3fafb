"""Autograd of the Z-Error losses. Statistics and masks are constants for every derivative.

The losses have a fused first derivative in their input; every other derivative goes through the plain formula of the
rows that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import _ops, _z_reference
from fused_losses._arguments import RowLossArguments, ZErrorLossArguments, ZErrorRule
from fused_losses._autograd import (
    apply,
    forward_writes_gradient,
    fused_row_loss,
    is_recorded,
    is_small,
    mark_constant,
    needs_reference,
    row_loss,
    row_loss_gradient,
    save_row_loss,
)
from fused_losses._logit_bias import class_dim
from fused_losses._z_reference import ClassScore, class_score

Result = tuple[Tensor, Tensor, Tensor]  # loss, mask, scores


def z_error_row_loss(args: RowLossArguments, rule: ZErrorRule, judged: ClassScore | None) -> Result:
    """Any row loss of the rows that are kept: loss, mask and scores. ``judged``: what they are judged by, if known.

    On the CPU, where forward writes the gradient, the mask comes first and then the row loss, which ignores dropped
    rows; on CUDA, too, where two more launches cost less than reading the logits twice. Elsewhere the rows' losses come
    first, and one kernel makes statistics, mask and reduction of them.
    """
    if needs_reference(*args.tensors):
        return masked_first(args, rule, judged or class_score(row_loss, rule.statistic, args), row_loss)
    differentiate = is_recorded(args.logits)
    if differentiate and _masks_first(args, rule):
        return masked_first(args, rule, judged or class_score(fused_row_loss, rule.statistic, args), fused_row_loss)
    if differentiate:
        return apply(_ZErrorRowLoss, args.logits, args, rule)  # type: ignore[no-any-return]
    plan = _Plan.of(args, rule)
    loss, _, mask, _, scores, _ = plan.reduce(_ops.row_loss(*plan.rows))
    return loss, mask, scores


def _masks_first(args: RowLossArguments, rule: ZErrorRule) -> bool:
    if is_small(args.logits, args.target):  # as z_error_kept_target's callers do: a checkpoint may recompute them here
        return True
    writes = forward_writes_gradient(args, expects_upstream=True)
    return writes and (args.logits.is_cpu or _is_worth_a_mask(args, rule))


_LARGE = 1 << 26  # bytes of logits
_LONG_ROW = 128  # bytes; the forward of shorter ones takes it that no row is ignored, and backward would start again


def _is_worth_a_mask(args: RowLossArguments, rule: ZErrorRule) -> bool:
    """Whether to judge rows of CUDA before their losses are known: by one logit of each."""
    logits = args.logits
    long_row = logits.shape[class_dim(logits)] * logits.element_size() >= _LONG_ROW
    return rule.statistic == "logit" and long_row and logits.numel() * logits.element_size() >= _LARGE


def masked_first(
    args: RowLossArguments,
    rule: ZErrorRule,
    judged: ClassScore,
    row_loss: Callable[[RowLossArguments], Tensor],
) -> Result:
    """The row loss of the rows that a mask keeps, by what they are judged by."""
    score, word = judged
    target, ignore_index = args.target, args.ignore_index
    moments = rule.moments
    if moments is None:
        moments = _ops.class_moments(score, target, args.logits.shape[class_dim(args.logits)], word, ignore_index)
    rule = rule._replace(moments=moments, statistic=word)
    mask, kept_target, scores = _ops.z_error_mask(score, target, ignore_index, *rule)
    return row_loss(args._replace(target=kept_target)), mask, scores


class _Plan(NamedTuple):
    """A row loss and the reduction that follows it, which judges rows by their losses or, where it needs to, by logits.

    Rows are judged without class weights. So most losses are computed without them and multiplied afterwards.
    """

    args: RowLossArguments
    rule: ZErrorRule
    rows: RowLossArguments  # that give one loss per row, not yet multiplied by sample_weight
    by_values: bool = False  # judge rows by these losses
    unweighted: bool = False  # the reduction multiplies the losses by the class weights
    by_entropy: bool = False  # judge rows by their cross entropy without class weights, made of the logits once more

    @staticmethod
    def of(args: RowLossArguments, rule: ZErrorRule) -> _Plan:
        rows = args._replace(sample_weight=None, reduction="none")
        is_entropy, has_weight = args.loss == "cross_entropy", args.weight is not None
        is_smooth = is_entropy and args.params[0] != 0
        has_bias = args.logit_bias != 0 or args.logit_bias_tensor is not None
        if rule.statistic == "logit":
            return _Plan(args, rule._replace(statistic="class"), rows)
        if rule.statistic == "prob" and is_entropy and not (is_smooth or has_bias or has_weight):
            return _Plan(args, rule._replace(statistic="class_prob"), rows, by_values=True)  # the losses are -log p
        if rule.statistic == "prob":
            return _Plan(args, rule._replace(statistic="class_softmax"), rows)
        if is_smooth and has_weight:
            # Smoothing sums over all classes, each with its weight. Dividing by the target's weight does not undo that.
            return _Plan(args, rule._replace(statistic="class_cross_entropy"), rows, by_entropy=True)
        rows = rows._replace(weight=None)
        return _Plan(args, rule._replace(statistic="class"), rows, by_values=True, unweighted=has_weight)

    def reduce(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The reduction: loss, denominator, mask, kept target, scores, weight of each row."""
        args, smoothing, bias, bias_tensor = self.args, 0.0, 0.0, None
        if self.by_entropy:
            smoothing, bias, bias_tensor = args.params[0], args.logit_bias, args.logit_bias_tensor
        return _ops.z_error_class_loss(
            values,
            values if self.by_values else args.logits,
            args.target,
            args.logits.shape[class_dim(args.logits)],
            args.weight,
            args.sample_weight,
            bias_tensor,
            smoothing,
            bias,
            self.unweighted,
            args.ignore_index,
            args.reduction,
            *self.rule,
        )


class _ZErrorRowLoss(torch.autograd.Function):
    """The fused first derivative in the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: RowLossArguments, rule: ZErrorRule) -> Result:
        plan = _Plan.of(args, rule)
        values, stats, _ = _ops.row_loss_with_stats(*plan.rows)
        loss, denominator, mask, kept_target, scores, row_weight = plan.reduce(values)
        weight = row_weight if plan.unweighted else args.sample_weight
        kept = args._replace(target=kept_target, weight=plan.rows.weight, sample_weight=weight)
        save_row_loss(ctx, kept, stats, denominator, None)
        mark_constant(ctx, mask, scores)
        return loss, mask, scores

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if grad_outputs[0] is None else row_loss_gradient(ctx, grad_outputs[0]), None, None


def z_error_loss(args: ZErrorLossArguments, rule: ZErrorRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The binary and the regression form: loss, denominator, mask and scores."""
    if needs_reference(*args.tensors):
        with torch.no_grad():
            _, denominator, mask, scores = _ops.z_error_loss(*args, *rule)
        return _z_reference.masked_loss(args, mask, rule.statistic), denominator, mask, scores
    if is_recorded(args.input):
        return apply(_ZErrorLoss, args.input, args, rule)  # type: ignore[no-any-return]
    return _ops.z_error_loss(*args, *rule)


class _ZErrorLoss(torch.autograd.Function):
    """The fused first derivative in the input."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, args: ZErrorLossArguments, rule: ZErrorRule
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, denominator, mask, scores = _ops.z_error_loss(*args, *rule)
        ctx.save_for_backward(*args.tensors, denominator, mask)
        ctx.constants = args.reduction, rule.statistic
        mark_constant(ctx, denominator, mask, scores)
        return loss, denominator, mask, scores

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_outputs[0] is None:
            return None, None, None
        *inputs, denominator, mask = ctx.saved_tensors
        reduction, statistic = ctx.constants
        args = ZErrorLossArguments._make((*inputs, reduction))
        return _gradient(grad_outputs[0], denominator, mask, args, statistic), None, None


def _gradient(
    grad_loss: Tensor, denominator: Tensor, mask: Tensor, args: ZErrorLossArguments, statistic: str
) -> Tensor:
    if torch.is_grad_enabled():  # under create_graph the gradient must itself be differentiable
        loss = _z_reference.masked_loss(args, mask, statistic)
        return torch.autograd.grad(loss, args.input, grad_loss, create_graph=True)[0]
    return _ops.z_error_loss_backward(grad_loss, denominator, mask, statistic, *args)
