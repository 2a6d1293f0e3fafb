"""Z-Error for regression (2506.02154): rows far from the mean do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._agreement import telling
from fused_losses._arguments import acc_dtype
from fused_losses._checks import is_integer_tensor
from fused_losses._parameters import assigned, switch
from fused_losses._running import Source, source_of
from fused_losses._z_error import (
    FUSED,
    Threshold,
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
    switch.pack("per_task", options["per_task"])
    check_pair("input", input, target)
    if target.dtype == torch.bool:
        raise RuntimeError("target must be floating point or integers, got torch.bool")
    if is_integer_tensor(target):  # counts, which nn.MSELoss takes, too
        target = target.to(acc_dtype(input))
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

        For regression where a few per cent of the targets are far out of range, such as typing errors; from 20 % on it
        fails, and an absolute error is safer. With s the statistic of a row, ``z = (s - mean(s)) / (std(s) + 1e-8)``,
        with mean and unbiased std over all entries. Rows with ``|z| <= threshold`` are kept, the others have loss and
        gradient 0. The mask of kept rows is a constant for autograd.

        Args:
            input: predictions of any shape and strides; float64, float32, float16 or bfloat16.
            target: the same shape; floating point or integers. NaN is a missing label, and its row is dropped.
            threshold: in standard deviations, > 0: a number or a 0-dim tensor. 2 is the paper's value; it can drop
                nothing from fewer than six rows. inf keeps all finite scores.
            statistic: s: ``"target"`` as the paper's code (finds targets out of range, whatever the model says),
                ``"loss"`` as its text, the squared error, or ``"residual"``, which is ``input - target``. All are
                two-sided.
            per_task: True: statistics for every column of ``(N, T, d1, ...)``, for targets of different scales, instead
                of one for all entries. A tensor ``threshold`` may then be ``(T,)``.
            reduction: ``"none"`` (0 for dropped rows), ``"sum"``, or ``"mean"``: the sum of the weighted losses divided
                by the sum of the weights of the kept rows, or 0 with gradient 0 where that is 0.
            sample_weight: one weight per entry, or one per entry of the first dimension.
            statistics: :class:`fused_losses.ClassStatistics` of one class (T with ``per_task``) to use instead of the
                batch's.
            process_group: statistics and mean are over the rows of all its ranks, scaled so that
                DistributedDataParallel's average of the gradients is the gradient of one process with the whole batch.
                None: every rank on its own.
            return_mask: return :class:`fused_losses.ZErrorResult`: the loss, the mask and every row's z.

        Returns:
            The loss in float32, float64 for float64 ``input``; a scalar unless ``reduction="none"``.

        Raises:
            TypeError: ``input`` or ``target`` is no tensor, or ``threshold`` no number.
            ValueError: shapes differ, or an option is out of range.
            RuntimeError: dtypes or devices do not fit, or another rank of ``process_group`` was given bad arguments
                (between GPUs: a device assertion).

        Source: 2506.02154, ZMSELoss. Deviations from its code: a row whose score is NaN or infinite drops itself only,
        and cannot make loss or gradient NaN (with ``statistic="target"`` predictions are no scores: one that is NaN
        makes the loss NaN); where no score is finite, no row with a label is dropped; statistics are in float64; a
        single row is kept (its code returns 0).

        Example:
            >>> target = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 90.0])
            >>> z_mse_loss(torch.zeros(6), target)
            tensor(3.8000)
        """
        source = source_of(statistics, process_group)
        with telling(source.exchanges(reduction)):
            return _z_mse(
                ops,
                source,
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
    """Squared error without the rows far from the mean: ``(input - target)^2`` where ``|z| <= threshold``.

    Module form of :func:`fused_losses.functional.z_mse_loss`, which explains the loss; optionally with statistics over
    batches.

    Args:
        threshold: as for the function; a tensor becomes a buffer, and one number per task may also be a list.
        statistic, per_task, reduction, process_group: as for the function.
        running: True: use statistics over batches, which are in ``state_dict``. A batch is added before it is used. In
            eval mode they stay as they are; before any training batch, an eval call uses its own batch.
        momentum: how fast earlier batches fade, in [0, 1]: their weight is multiplied by ``1 - momentum`` with every
            batch. 0.1 remembers about 10 batches, 0 all of them.
        num_tasks: T with ``per_task``, else 1. It gives running statistics their shape from the start, as
            :class:`ZErrorBCEWithLogitsLoss` says.

    Returns:
        Called with ``(input, target, sample_weight=None, *, return_mask=False)``: the loss, or
        :class:`fused_losses.ZErrorResult`.

    Raises:
        TypeError: ``threshold`` is no number.
        ValueError: an option is out of range.

    Example:
        >>> criterion = ZMSELoss(per_task=True, num_tasks=2)
        >>> criterion(torch.zeros(3, 2), torch.ones(3, 2))
        tensor(1.)
    """

    _checks: ClassVar = {"per_task": assigned(switch)}
    _groups = ("tasks", 1)

    def __init__(
        self,
        threshold: Threshold = 2.0,
        statistic: str = "target",
        *,
        per_task: bool = False,
        reduction: str = "mean",
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
        num_tasks: int | None = None,
    ) -> None:
        tasks = check_count("num_tasks", num_tasks)
        per_task = bool(switch.pack("per_task", per_task))
        if not per_task and tasks not in (None, 1):
            raise ValueError(f"num_tasks must be 1 without per_task=True, got {num_tasks}")
        super().__init__(
            threshold,
            reduction=reduction,
            running=running,
            momentum=momentum,
            process_group=process_group,
            num_groups=tasks if per_task else 1,
        )
        choose("statistic", statistic, _STATISTICS)
        self.statistic, self.per_task = statistic, per_task

    def forward(
        self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None, *, return_mask: bool = False
    ) -> Tensor | ZErrorResult:
        """The loss of predictions ``input`` for ``target``; see :func:`z_mse_loss`."""
        with telling(self._exchanges()):
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
        own = {"threshold": self.threshold, "statistic": self.statistic}
        shown = {**own, **self._unusual(per_task=False), **super()._shown()}
        if not self.per_task:
            del shown["num_tasks"]  # it can be 1 only
        return shown
