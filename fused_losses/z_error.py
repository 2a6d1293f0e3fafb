"""Z-Error for regression and binary labels (2506.02154): rows far from their class's mean do not count.

Functions come in two kinds, fused and plain PyTorch, from one text: see :class:`fused_losses._z_error.ZOps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_losses._arguments import ZErrorLossArguments, ZErrorRule, check_reduction
from fused_losses._z_error import (
    FUSED,
    Source,
    Threshold,
    ZErrorModule,
    ZErrorResult,
    ZOps,
    check_small_class,
    choose,
    fused_and_plain,
    pack_threshold,
    source_of,
    spread_weight,
)
from fused_losses.distributed import global_mean
from fused_losses.statistics import ClassStatistics

_MSE_STATISTICS = {"target": "mse_target", "loss": "mse_loss", "residual": "mse_residual"}
_BCE_SPACES = {"logit": "bce_logit", "prob": "bce_prob"}
SIDES = {"two": "both", "lower": "low"}


def _masked_loss(
    ops: ZOps,
    source: Source,
    input: Tensor,
    target: Tensor,
    groups: int,
    statistic: str,
    *,
    threshold: Threshold,
    tail: str,
    min_count: int,
    keep_small: bool,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    return_mask: bool,
) -> Tensor | ZErrorResult:
    """Statistics, then mask and loss."""
    check_reduction(reduction)
    numbers, tensor = pack_threshold(threshold)
    constant_input, constant_target = input.detach(), target.detach()
    moments = source.moments(
        groups, lambda: ops.class_moments(constant_input, constant_target, groups, statistic, -100)
    )
    mean_over_ranks = source.group is not None and reduction == "mean"
    weights = spread_weight(sample_weight, input)
    arguments = ZErrorLossArguments(input, target, pos_weight, weights, "sum" if mean_over_ranks else reduction)
    rule = ZErrorRule(moments, tensor, numbers, statistic, tail, min_count, keep_small, return_mask)
    loss, denominator, mask, scores = ops.z_error_loss(arguments, rule)
    if mean_over_ranks and source.group is not None:
        loss = global_mean(loss, denominator, source.group)
    return ZErrorResult(loss, mask, scores) if return_mask else loss


def _z_mse(
    ops: ZOps, source: Source, input: Tensor, target: Tensor, statistic: str, **options: Any
) -> Tensor | ZErrorResult:
    word = choose("statistic", statistic, _MSE_STATISTICS)
    return _masked_loss(
        ops, source, input, target, 1, word, tail="both", min_count=2, keep_small=False, pos_weight=None, **options
    )


def _z_bce(
    ops: ZOps,
    source: Source,
    logits: Tensor,
    target: Tensor,
    *,
    space: str,
    sided: str,
    min_count: int,
    small_class: str,
    **options: Any,
) -> Tensor | ZErrorResult:
    word, tail = choose("space", space, _BCE_SPACES), choose("sided", sided, SIDES)
    keep_small = check_small_class(min_count, small_class)
    if target.dim() == 1 and logits.dim() == 2 and logits.shape[1] == 1:
        target = target.unsqueeze(1)
    return _masked_loss(
        ops,
        source,
        logits,
        target,
        groups_of(logits),
        word,
        tail=tail,
        min_count=min_count,
        keep_small=keep_small,
        **options,
    )


def groups_of(logits: Tensor) -> int:
    """How many groups the binary loss's rows form: two for every task."""
    return 2 * logits.shape[1] if logits.dim() == 2 else 2


def _z_mse_loss(ops: ZOps) -> Callable[..., Any]:
    def z_mse_loss(
        input: Tensor,
        target: Tensor,
        *,
        threshold: float | Tensor = 2.0,
        statistic: str = "target",
        reduction: str = "mean",
        sample_weight: Tensor | None = None,
        statistics: ClassStatistics | None = None,
        process_group: dist.ProcessGroup | None = None,
        return_mask: bool = False,
    ) -> Tensor | ZErrorResult:
        """Squared error without the rows far from the mean: ``(input - target)^2`` where ``|z| <= threshold``.

        For regression data with wrong targets: typing and unit errors. With s the statistic of a row,
        ``z = (s - mean(s)) / (std(s) + 1e-8)``, mean and unbiased std over all entries; the mask is a constant for
        autograd. 2506.02154, ZMSELoss; its text takes the statistics of the loss, its code those of the targets.

        Args:
            input: predictions of any shape and strides; float64, float32, float16 or bfloat16.
            target: the same shape; floating point.
            threshold: number, 0-dim tensor; > 0. n rows never exceed (n - 1) / sqrt(n): 2 needs six rows.
            statistic: ``"target"`` (the paper's code: finds targets out of range, whatever the model says), ``"loss"``
                (squared error) or ``"residual"`` (``input - target``); two-sided all of them.
            reduction: ``"none"`` (0 for dropped rows), ``"sum"`` or ``"mean"``: sum of weighted losses over sum of
                weights of the kept rows; 0 with zero gradient if that is 0.
            sample_weight: one weight per entry, or per first dimension.
            statistics: of one class, to be used instead of the batch's.
            process_group: rows of all its ranks form the statistics and the mean, scaled so that
                DistributedDataParallel's average is the gradient of one process with the whole batch.
            return_mask: return :class:`ZErrorResult`, with mask and standardised scores.

        Returns:
            The loss in float32, float64 for float64 ``input``; a scalar unless ``reduction="none"``.

        Raises:
            ValueError: shapes that differ, options out of range.
            RuntimeError: dtypes or devices that do not fit.

        Deviations from the paper's code: dropped by selection, not by multiplication, so a NaN or infinite row that is
        dropped leaves loss and gradient alone; a non-finite score drops its row only; statistics in float64.

        Example:
            >>> target = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 90.0])
            >>> z_mse_loss(torch.zeros(6), target)
            tensor(3.8000)
        """
        return _z_mse(
            ops,
            source_of(statistics, process_group, None),
            input,
            target,
            statistic,
            threshold=threshold,
            reduction=reduction,
            sample_weight=sample_weight,
            return_mask=return_mask,
        )

    return z_mse_loss


def _z_error_bce_with_logits(ops: ZOps) -> Callable[..., Any]:
    def z_error_bce_with_logits(
        logits: Tensor,
        target: Tensor,
        *,
        threshold: Threshold = 2.0,
        space: str = "logit",
        sided: str = "two",
        min_count: int = 2,
        small_class: str = "drop",
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        sample_weight: Tensor | None = None,
        statistics: ClassStatistics | None = None,
        process_group: dist.ProcessGroup | None = None,
        return_mask: bool = False,
    ) -> Tensor | ZErrorResult:
        """Binary cross entropy without the rows whose logit is far from the mean of their label's logits.

        For binary data with wrong labels. For each label (of each task) ``z = (x - mean) / std`` with the unbiased std
        of its rows; rows with ``|z| <= threshold`` are kept; the mask is a constant for autograd. 2506.02154,
        ZErrorBCEWithLogitsLoss.

        Args:
            logits: ``(N,)``, ``(N, 1)`` or ``(N, T)`` for T tasks with statistics of their own; any strides; float64,
                float32, float16 or bfloat16.
            target: 0 or 1, the same shape, any dtype; NaN, or any other value, is a missing label: its row is dropped.
            threshold: number > 0, pair of numbers for labels 0 and 1, or tensor: 0-dim, ``(2,)``, or ``(T, 2)``.
            space: ``"logit"``, or ``"prob"`` for statistics of the sigmoid.
            sided: ``"two"``, or ``"lower"``: drops only rows whose own label looks unlikely, that is, low logits of
                label 1 and high logits of label 0.
            min_count: labels with fewer rows have no statistics (below 2 never);
            small_class: ``"drop"`` drops those rows, as the paper's code a label's only row; ``"keep"`` keeps them.
            pos_weight: factor of the loss of label 1, one or one per task, as in torch.
            reduction: ``"none"`` (0 for dropped rows), ``"sum"`` or ``"mean"``: sum of weighted losses over sum of
                weights of the kept rows; 0 with zero gradient if that is 0.
            sample_weight: one weight per row ``(N,)`` or per entry.
            statistics: of ``2 T`` classes, number 2 task + label, to be used instead of the batch's.
            process_group: rows of all its ranks form the statistics and the mean, scaled so that
                DistributedDataParallel's average is the gradient of one process with the whole batch.
            return_mask: return :class:`ZErrorResult`, with mask and standardised scores.

        Returns:
            The loss in float32, float64 for float64 ``logits``; a scalar unless ``reduction="none"``.

        Raises:
            ValueError: shapes that do not fit, options out of range.
            RuntimeError: dtypes or devices that do not fit.

        Deviations from the paper's code: dropped by selection, not by multiplication, so a NaN or infinite logit leaves
        loss and gradient of the other rows alone, and drops its row but not its class; statistics in float64; a label
        whose logits have a std below 1e-8 is kept whole.

        Example:
            >>> logits = torch.tensor([2.5, 0.2, -1.1, 1.3, -2.0, 3.0])
            >>> z_error_bce_with_logits(logits, torch.tensor([1, 1, 0, 1, 0, 1]), threshold=1.1)
            tensor(0.1565)
        """
        return _z_bce(
            ops,
            source_of(statistics, process_group, None),
            logits,
            target,
            space=space,
            sided=sided,
            min_count=min_count,
            small_class=small_class,
            threshold=threshold,
            pos_weight=pos_weight,
            reduction=reduction,
            sample_weight=sample_weight,
            return_mask=return_mask,
        )

    return z_error_bce_with_logits


z_mse_loss, z_mse_loss_reference = fused_and_plain(_z_mse_loss)
z_error_bce_with_logits, z_error_bce_with_logits_reference = fused_and_plain(_z_error_bce_with_logits)


class ZMSELoss(ZErrorModule):
    """Module form of :func:`z_mse_loss`, with statistics over batches if wanted.

    Args:
        threshold, statistic, reduction, process_group: as for the function.
        running: judge rows by statistics that remember earlier batches: a merge of rows in which older batches fade,
            starting with the first batch, the current one included; frozen in eval mode, saved in ``state_dict``.
        momentum: share of its weight that the memory loses with every batch, in ``[0, 1]``; 0 forgets nothing.
    """

    def __init__(
        self,
        threshold: float | Tensor = 2.0,
        statistic: str = "target",
        *,
        reduction: str = "mean",
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            threshold, reduction=reduction, running=running, momentum=momentum, process_group=process_group
        )
        choose("statistic", statistic, _MSE_STATISTICS)
        self.statistic = statistic

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None, *, return_mask: bool = False
    ) -> Tensor | ZErrorResult:
        """The loss of predictions ``input`` for ``target``; see :func:`z_mse_loss`."""
        return _z_mse(
            FUSED,
            self._source(1, input.device),
            input,
            target,
            self.statistic,
            threshold=self.threshold,
            reduction=self.reduction,
            sample_weight=sample_weight,
            return_mask=return_mask,
        )

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "statistic": self.statistic}


class ZErrorBCEWithLogitsLoss(ZErrorModule):
    """Module form of :func:`z_error_bce_with_logits`, with statistics over batches if wanted.

    Args:
        threshold, space, sided, min_count, small_class, reduction, process_group: as for the function.
        pos_weight: as for the function; a buffer.
        running: judge rows by statistics that remember earlier batches: a merge of rows in which older batches fade,
            starting with the first batch, the current one included; frozen in eval mode, saved in ``state_dict``.
        momentum: share of its weight that the memory loses with every batch, in ``[0, 1]``; 0 forgets nothing.
    """

    pos_weight: Tensor | None

    def __init__(
        self,
        threshold: Threshold = 2.0,
        space: str = "logit",
        sided: str = "two",
        *,
        min_count: int = 2,
        small_class: str = "drop",
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            threshold, reduction=reduction, running=running, momentum=momentum, process_group=process_group
        )
        choose("space", space, _BCE_SPACES)
        choose("sided", sided, SIDES)
        check_small_class(min_count, small_class)
        self.space, self.sided, self.min_count, self.small_class = space, sided, min_count, small_class
        self.register_buffer("pos_weight", pos_weight)

    def forward(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None, *, return_mask: bool = False
    ) -> Tensor | ZErrorResult:
        """The loss of ``logits`` for labels ``target``; see :func:`z_error_bce_with_logits`."""
        return _z_bce(
            FUSED,
            self._source(groups_of(logits), logits.device),
            logits,
            target,
            space=self.space,
            sided=self.sided,
            min_count=self.min_count,
            small_class=self.small_class,
            threshold=self.threshold,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
            sample_weight=sample_weight,
            return_mask=return_mask,
        )

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "space": self.space, "sided": self.sided}
