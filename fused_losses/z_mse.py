"""Z-Error for regression (2506.02154): rows far from the mean do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_losses._running import Source, source_of
from fused_losses._z_error import (
    FUSED,
    ZErrorModule,
    ZErrorResult,
    ZOps,
    check_count,
    check_pair,
    choose,
    fused_and_plain,
    masked_loss,
    tasks_of,
)
from fused_losses.statistics import ClassStatistics

_STATISTICS = {"target": "mse_target", "loss": "mse_loss", "residual": "mse_residual"}


def _z_mse(
    ops: ZOps, source: Source, input: Tensor, target: Tensor, statistic: str, **options: Any
) -> Tensor | ZErrorResult:
    word = choose("statistic", statistic, _STATISTICS)
    check_pair("input", input, target)
    # One row says nothing about itself: it is kept.
    rest: dict[str, Any] = {"labels": 1, "tail": "both", "min_count": 2, "keep_small": True, "pos_weight": None}
    return masked_loss(ops, source, input, target, word, **rest, **options)


def _z_mse_loss(ops: ZOps) -> Callable[..., Any]:
    def z_mse_loss(
        input: Tensor,
        target: Tensor,
        *,
        threshold: float | Tensor = 2.0,
        statistic: str = "target",
        per_task: bool = False,
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
            per_task: statistics of every column of ``(N, T, d1, ...)``, for targets of different scale, instead of one
                pool; a tensor ``threshold`` may then be ``(T,)``.
            reduction: ``"none"`` (0 for dropped rows), ``"sum"`` or ``"mean"``: sum of weighted losses over sum of
                weights of the kept rows; 0 with zero gradient if that is 0.
            sample_weight: one weight per entry, or per first dimension.
            statistics: of one class (T with ``per_task``), to be used instead of the batch's.
            process_group: rows of all its ranks form the statistics and the mean, scaled so that
                DistributedDataParallel's average is the gradient of one process with the whole batch.
            return_mask: return :class:`ZErrorResult`, with mask and standardised scores.

        Returns:
            The loss in float32, float64 for float64 ``input``; a scalar unless ``reduction="none"``.

        Raises:
            ValueError: shapes that differ, options out of range.
            RuntimeError: dtypes or devices that do not fit.

        Deviations from the paper's code: dropped by selection, not by multiplication, so a NaN or infinite row that is
        dropped leaves loss and gradient alone; a non-finite score drops its row only; statistics in float64; a single
        row is kept (its code returns 0).

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
            per_task=per_task,
            threshold=threshold,
            reduction=reduction,
            sample_weight=sample_weight,
            return_mask=return_mask,
        )

    return z_mse_loss


z_mse_loss, z_mse_loss_reference = fused_and_plain(_z_mse_loss)


class ZMSELoss(ZErrorModule):
    """Module form of :func:`z_mse_loss`, with statistics over batches if wanted.

    Args:
        threshold, statistic, per_task, reduction, process_group: as for the function.
        num_tasks: T, with ``per_task``: gives running statistics their shape from the start.
        running: judge rows by statistics that remember earlier batches: a merge of rows in which older batches fade,
            starting with the first batch, the current one included; frozen in eval mode (before any training batch it
            judges by the batch itself), saved in ``state_dict``.
        momentum: share of its weight that the memory loses with every batch, in ``[0, 1]``; 0 forgets nothing.
    """

    def __init__(
        self,
        threshold: float | Tensor = 2.0,
        statistic: str = "target",
        *,
        per_task: bool = False,
        num_tasks: int | None = None,
        reduction: str = "mean",
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            threshold,
            reduction=reduction,
            running=running,
            momentum=momentum,
            process_group=process_group,
            num_groups=check_count("num_tasks", num_tasks) if per_task else 1,
        )
        choose("statistic", statistic, _STATISTICS)
        self.statistic, self.per_task = statistic, per_task

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None, *, return_mask: bool = False
    ) -> Tensor | ZErrorResult:
        """The loss of predictions ``input`` for ``target``; see :func:`z_mse_loss`."""
        return _z_mse(
            FUSED,
            self._source(tasks_of("input", input) if self.per_task else 1),
            input,
            target,
            self.statistic,
            per_task=self.per_task,
            threshold=self.threshold,
            reduction=self.reduction,
            sample_weight=sample_weight,
            return_mask=return_mask,
        )

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "statistic": self.statistic}
