"""Z-Error for binary labels, of one task or several (2506.02154): rows far from their label's mean do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_losses._running import Source, source_of
from fused_losses._z_error import (
    FUSED,
    SIDES,
    Threshold,
    ZErrorModule,
    ZErrorResult,
    ZOps,
    check_count,
    check_pair,
    check_small_class,
    choose,
    fused_and_plain,
    masked_loss,
    tasks_of,
)
from fused_losses.statistics import ClassStatistics

_SPACES = {"logit": "bce_logit", "prob": "bce_prob"}


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
    word, tail = choose("space", space, _SPACES), choose("sided", sided, SIDES)
    keep_small = check_small_class(min_count, small_class)
    pair = isinstance(logits, Tensor) and isinstance(target, Tensor)
    if pair and target.dim() == 1 and logits.dim() == 2 and logits.shape[1] == 1:
        target = target.unsqueeze(1)
    check_pair("logits", logits, target)
    rest: dict[str, Any] = {"per_task": True, "labels": 2, "tail": tail, "min_count": min_count}
    return masked_loss(ops, source, logits, target, word, keep_small=keep_small, **rest, **options)


def _z_error_bce_with_logits(ops: ZOps) -> Callable[..., Any]:
    def z_error_bce_with_logits(
        logits: Tensor,
        target: Tensor,
        *,
        threshold: Threshold = 2.0,
        space: str = "logit",
        sided: str = "two",
        min_count: int = 2,
        small_class: str = "keep",
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
            logits: ``(N,)``, ``(N, 1)`` or ``(N, T)`` for T tasks with statistics of their own, ``(N, T, d1, ...)`` for
                pixels; any strides; float64, float32, float16 or bfloat16.
            target: in ``[0, 1]``, the same shape, any dtype; NaN is a missing label, its row is dropped. A soft label's
                row belongs to the nearer of 0 and 1 (0.5 to 0), and its loss is that of the label as it is.
            threshold: number > 0, pair of numbers for labels 0 and 1, or tensor: 0-dim, ``(2,)``, or ``(T, 2)``.
            space: ``"logit"``, or ``"prob"`` for statistics of the sigmoid.
            sided: ``"two"``, or ``"lower"``: drops only rows whose own label looks unlikely, that is, low logits of
                label 1 and high logits of label 0.
            min_count: labels with fewer rows have no statistics (below 2 never);
            small_class: ``"keep"`` keeps those rows; ``"drop"`` drops them, as the paper's code does.
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
            ValueError: shapes that do not fit, options out of range, a label outside [0, 1] (on CUDA: a device
                assertion).
            RuntimeError: dtypes or devices that do not fit.

        Deviations from the paper's code: dropped by selection, not by multiplication, so a NaN or infinite logit leaves
        loss and gradient of the other rows alone, and drops its row but not its class; statistics in float64; a label
        whose logits have a std below 1e-8 is kept whole, as is a label's only row.

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


z_error_bce_with_logits, z_error_bce_with_logits_reference = fused_and_plain(_z_error_bce_with_logits)


class ZErrorBCEWithLogitsLoss(ZErrorModule):
    """Module form of :func:`z_error_bce_with_logits`, with statistics over batches if wanted.

    Args:
        threshold, space, sided, min_count, small_class, reduction, process_group: as for the function.
        pos_weight: as for the function; a buffer.
        num_tasks: T; gives running statistics their shape from the start, for copies (``AveragedModel``) and
            distributed checkpoints.
        running: judge rows by statistics that remember earlier batches: a merge of rows in which older batches fade,
            starting with the first batch, the current one included; frozen in eval mode (before any training batch it
            judges by the batch itself), saved in ``state_dict``.
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
        small_class: str = "keep",
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
        num_tasks: int | None = None,
    ) -> None:
        tasks = check_count("num_tasks", num_tasks)
        super().__init__(
            threshold,
            reduction=reduction,
            running=running,
            momentum=momentum,
            process_group=process_group,
            num_groups=None if tasks is None else 2 * tasks,
        )
        choose("space", space, _SPACES)
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
            self._source(2 * tasks_of("logits", logits)),
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
