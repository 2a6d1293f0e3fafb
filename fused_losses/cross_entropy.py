"""Cross entropy with everything torch's has: class weights, label smoothing, class probabilities."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses._arguments import LOSSES, LossEntry
from fused_losses._autograd import row_loss
from fused_losses._common import RowLossModule
from fused_losses._logit_bias import LogitBias, class_dim
from fused_losses._parameters import Range
from fused_losses._reference import SOFT_TARGETS, Rows, reduce_rows, row_loss_reference, zero_at_zero
from fused_losses.row_statistics import RowStatistics

_smoothing = Range("be between 0.0 and 1.0, or negative and finite", lambda s: -math.inf < s <= 1.0, -1e15, 1.0)


def _smoothed(rows: Rows, label_smoothing: float) -> Tensor:
    hard = -rows.class_weight * rows.log_p
    if label_smoothing == 0.0:
        return hard
    smooth = -rows.sum_log_probs(weighted=True) * (label_smoothing / rows.num_classes)
    return smooth if label_smoothing == 1.0 else (1.0 - label_smoothing) * hard + smooth


def _soft_target(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    params: Sequence[float],
    reduction: str,
) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    dim = class_dim(logits)
    log_probs = torch.log_softmax(logits, dim)
    share = (1.0 - params[0]) * target.to(logits.dtype) + params[0] / logits.shape[dim]
    if weight is not None:
        share = share * weight.to(logits.dtype).view([-1 if d == dim else 1 for d in range(logits.dim())])
    values = -zero_at_zero(share, log_probs).sum(dim)
    samples = torch.ones_like(values) if sample_weight is None else sample_weight.to(values.dtype)
    return reduce_rows(values * samples, samples, reduction)


SOFT_TARGETS["cross_entropy"] = _soft_target


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_bias: LogitBias = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy: everything :func:`torch.nn.functional.cross_entropy` does, fused.

    The usual loss for clean labels, and the baseline for noisy ones: it is unbounded, so it ends up fitting wrong
    labels. Value for class indices, ``s = label_smoothing`` and ``w = weight``:
    :math:`(1 - s) w_y (-\\log p_y) + (s / C) \\sum_j w_j (-\\log p_j)`, the mean divided by
    :math:`\\sum_i w_{y_i}`. For probabilities ``q`` it is
    :math:`\\sum_j w_j ((1 - s) q_j + s / C) (-\\log p_j)`, the mean over rows.

    Args:
        input: logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or
            bfloat16.
        target: class indices (int64, int32, int16, uint8) of the shape without the class dimension, or
            floating point probabilities of the shape of ``input``.
        weight: class weights ``(C,)``.
        ignore_index: class index whose rows have loss and gradient zero and do not count in the mean.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: s, at most 1. Negative values, which ``torch`` refuses, are negative label smoothing
            (2106.04149), for noisy labels: the label gets ``1 - s + s / C > 1``, every other class less than nothing,
            and predictions become more confident. The authors tried 0.8 down to -8, the more noise the lower. The loss
            then has no lower bound, and a masked class makes it -inf.
        logit_bias: added to the target's logit (2306.05497); a number, a 0-dim tensor or ``"auto"``. For
            class indices only.
        sample_weight: weight per row.

    Returns:
        The loss in float32, float64 for float64 logits; a scalar unless ``reduction="none"``.

    Raises:
        ValueError: ``label_smoothing`` or ``reduction`` out of range, mismatching batch sizes, ``logit_bias`` with
            probabilities.
        RuntimeError: shapes or dtypes that do not fit.
        IndexError: a target out of range (on CUDA: a device assertion).

    Deviations from torch: nothing left to average gives 0 with zero gradient instead of NaN; a zero probability
    contributes nothing even where its logit is -inf; half precision returns a float32 loss.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> cross_entropy(logits, torch.tensor([0]))
        tensor(0.1269, grad_fn=...)
    """
    arguments = LOSSES["cross_entropy"].arguments(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        logit_bias=logit_bias,
        sample_weight=sample_weight,
    )
    return row_loss(arguments)


@functools.wraps(cross_entropy)
def _reference(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    return row_loss_reference(LOSSES["cross_entropy"].arguments(input, target, weight=weight, **options))


_reference.__module__ = "fused_losses.reference"  # pickle looks for it there
LOSSES["cross_entropy"] = LossEntry(
    "cross_entropy",
    cross_entropy,
    _reference,
    _smoothed,
    {"label_smoothing": 0.0},
    {"label_smoothing": _smoothing},
    weighs_classes=True,
    takes_probabilities=True,
    sums=("log_probs",),
)


class CrossEntropyLoss(RowLossModule, stem="cross_entropy"):
    """Module form of :func:`cross_entropy`; a drop-in for :class:`torch.nn.CrossEntropyLoss`."""

    label_smoothing: float

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_bias: LogitBias = 0.0,
    ) -> None:
        super().__init__(
            {"label_smoothing": label_smoothing},
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            logit_bias=logit_bias,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        *,
        return_row_stats: bool = False,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """Computes the loss of ``input`` for ``target``; see :class:`RowLossModule`."""
        return super().forward(input, target, sample_weight, return_row_stats=return_row_stats)
