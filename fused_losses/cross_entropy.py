"""Cross entropy with all options of torch's: class weights, label smoothing, class probabilities."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

from torch import Tensor
from typing_extensions import Never

from fused_losses._arguments import LOSSES, LossEntry
from fused_losses._autograd import row_loss
from fused_losses._checks import check_tensors
from fused_losses._common import RowLossModule
from fused_losses._logit_bias import LogitBias
from fused_losses._parameters import Range
from fused_losses._reference import Rows, checked_reference
from fused_losses.row_statistics import RowStatistics

_smoothing = Range("be between 0.0 and 1.0, or negative and finite", lambda s: -math.inf < s <= 1.0, -1e15, 1.0)


def _smoothed(rows: Rows, label_smoothing: float) -> Tensor:
    hard = -rows.class_weight * rows.log_p
    if label_smoothing == 0.0:
        return hard
    smooth = -rows.sum_log_probs(weighted=True) * (label_smoothing / rows.num_classes)
    return smooth if label_smoothing == 1.0 else (1.0 - label_smoothing) * hard + smooth


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
    **unknown: Never,
) -> Tensor:
    """Cross entropy: everything :func:`torch.nn.functional.cross_entropy` does, fused.

    For clean labels, and as the baseline for noisy ones: it is not bounded, so trained to the end it learns wrong
    labels. For class indices y, with ``s = label_smoothing`` and ``w = weight``, a row's loss is ``(1 - s) w_y (-log
    p_y) + (s / C) sum_j w_j (-log p_j)``, and the mean divides by the sum of ``w_y``. For class probabilities q it is
    ``sum_j w_j ((1 - s) q_j + s / C) (-log p_j)``, and the mean is over rows (divided by the sum of ``sample_weight``,
    if given).

    Args:
        input: logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or bfloat16. A
            logit of -inf masks its class: its probability is 0.
        target: class indices in ``[0, C)`` or ``ignore_index``, the shape of ``input`` without its class dimension;
            int64, int32, int16 or uint8. Or class probabilities, floating point and of the shape of ``input``.
        weight: class weights ``(C,)``, floating point.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: ``"none"`` (the weighted loss of each row), ``"sum"``, or ``"mean"``: the sum of the weighted losses
            divided by the sum of the weights; 0 with gradient 0 where the weights sum to 0.
        label_smoothing: s, at most 1. Negative values, which ``torch`` refuses, are negative label smoothing
            (2106.04149), for noisy labels: the label gets more than 1, every other class less than 0. The authors take
            values from 0.8 down to -8, lower ones for more noise. The loss then has no lower bound, and a masked class
            makes it -inf. With ``s > 0`` a masked class makes it inf, unless its weight is 0.
        logit_bias: added to the target's logit before the softmax (2306.05497): a number, a 0-dim tensor, or
            ``"auto"``, the value of :func:`fused_losses.calibration.solve_logit_bias` for C classes, at least 0. For
            class indices only.
        sample_weight: one weight per row, the shape of the rows; multiplies the class weight.

    Returns:
        The loss in float32, float64 for float64 logits; a scalar unless ``reduction="none"``.

    Raises:
        TypeError: ``label_smoothing`` is no number, or ``ignore_index`` no integer.
        ValueError: ``label_smoothing`` or ``reduction`` is out of range, batch sizes differ, or ``logit_bias`` is given
            with class probabilities.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: a target is out of range (on CUDA: a device assertion).

    Deviations from ``torch``: where the weights sum to 0 the mean is 0 with gradient 0 instead of NaN; a class
    probability of 0 adds nothing, even where its logit is -inf; half precision gives a float32 loss.

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
        **unknown,  # which it refuses
    )
    return row_loss(arguments)


# Users see no **unknown. A wrapper that looks at keywords, as other losses have, would cost each call microseconds.
_signature = inspect.signature(cross_entropy)
cross_entropy.__signature__ = _signature.replace(parameters=[*_signature.parameters.values()][:-1])  # type: ignore[attr-defined]


@functools.wraps(cross_entropy)
def _reference(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    check_tensors(input=input, target=target)
    return checked_reference(LOSSES["cross_entropy"].arguments(input, target, weight=weight, **options))


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
    """Cross entropy: everything :class:`torch.nn.CrossEntropyLoss` does, fused.

    Module form of :func:`fused_losses.functional.cross_entropy`, which explains the loss. Called with ``(input, target,
    sample_weight=None, *, return_row_stats=False)``: the loss, or with ``return_row_stats`` a pair of it and
    :class:`fused_losses.RowStatistics` of the logits.

    Args:
        weight: class weights ``(C,)``, a buffer.
        ignore_index, reduction, label_smoothing: as for the function.
        logit_bias: as for the function, but only in training mode: ``eval()`` leaves it out.

    Raises:
        TypeError: ``label_smoothing`` is no number, or ``ignore_index`` no integer.
        ValueError: an argument is out of range.

    Example:
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.2269)
    """

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
        """The loss of ``input`` for ``target``; arguments as for the other losses' ``forward``, with the names of
        torch.
        """
        return super().forward(input, target, sample_weight, return_row_stats=return_row_stats)
