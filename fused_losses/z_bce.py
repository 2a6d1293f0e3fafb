"""Z-Error for binary labels, of one task or several (2506.02154): rows far from their label's mean do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_losses._agreement import telling
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
    min_count, keep_small = check_small_class(min_count, small_class)
    pair = isinstance(logits, Tensor) and isinstance(target, Tensor)
    if pair and target.dim() == 1 and logits.dim() == 2 and logits.shape[1] == 1:
        target = target.unsqueeze(1)
    check_pair("logits", logits, target)
    if logits.dim() == 0:
        raise ValueError("logits must have shape (N,), (N, T) or (N, T, d1, ...), got a scalar")
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
        """Binary cross entropy without the rows whose logit is far from the mean logit of their label.

        For yes/no labels of which some are wrong. With x the logit of a row, and mean and unbiased std those of the
        rows with the same label (of the same task), ``z = (x - mean) / std``. Rows with ``|z| <= threshold`` are kept,
        the others dropped: they have loss and gradient 0. The mask of kept rows is a constant for autograd.

        Args:
            logits: ``(N,)``, ``(N, 1)``, ``(N, T)`` for T tasks with statistics of their own, or ``(N, T, d1, ...)``
                for pixels; any strides; float64, float32, float16 or bfloat16.
            target: labels in [0, 1], the shape of ``logits``, any dtype. NaN is a missing label, and its row is
                dropped. A soft label's row belongs to the nearer of 0 and 1 (0.5 to 0), and its loss is that of the
                label as it is.
            threshold: in standard deviations, > 0: a number, a pair of numbers for labels 0 and 1, or a tensor, 0-dim,
                ``(2,)`` or ``(T, 2)``. 2 is the paper's value; it can drop nothing from a label with fewer than six
                rows. inf keeps all finite scores.
            space: ``"logit"``, or ``"prob"`` for x the sigmoid of the logit.
            sided: ``"two"`` as the paper's code, or ``"lower"``: drop only rows whose own label looks unlikely, which
                are low logits of label 1 and high logits of label 0.
            min_count: labels with fewer rows have no statistics, an integer >= 1; below 2 rows there are never any.
            small_class: what happens to rows of such labels, whatever the threshold: ``"keep"``, or ``"drop"`` as in
                the paper's code.
            pos_weight: factor on the loss of label 1, a tensor with one number or one per task, as in ``torch``.
            reduction: ``"none"`` (0 for dropped rows), ``"sum"``, or ``"mean"``: the sum of the weighted losses divided
                by the sum of the weights of the kept rows, or 0 with gradient 0 where that is 0.
            sample_weight: one weight per row ``(N,)`` or per entry.
            statistics: :class:`fused_losses.ClassStatistics` of ``2 T`` classes (class number ``2 * task + label``) to
                use instead of the batch's.
            process_group: statistics and mean are over the rows of all its ranks, scaled so that
                DistributedDataParallel's average of the gradients is the gradient of one process with the whole batch.
                None: every rank on its own.
            return_mask: return :class:`fused_losses.ZErrorResult`: the loss, the mask and every row's z.

        Returns:
            The loss in float32, float64 for float64 ``logits``; a scalar unless ``reduction="none"``.

        Raises:
            TypeError: ``logits`` or ``target`` is no tensor, or a threshold no number.
            ValueError: shapes do not fit, an option is out of range, or a label is outside [0, 1] (on CUDA: a device
                assertion).
            RuntimeError: dtypes or devices do not fit, or another rank of ``process_group`` was given bad arguments
                (between GPUs: a device assertion).

        Source: 2506.02154, ZErrorBCEWithLogitsLoss. Deviations from its code: a NaN or infinite logit drops its own
        row, and neither its class nor the loss of the other rows (where no logit is finite, none is dropped, and the
        loss is NaN, not 0); statistics are in float64; a label whose logits have a std below 1e-8 is kept whole, and so
        is the only row of a label.

        Example:
            >>> logits = torch.tensor([2.5, 0.2, -1.1, 1.3, -2.0, 3.0])
            >>> z_error_bce_with_logits(logits, torch.tensor([1, 1, 0, 1, 0, 1]), threshold=1.1)
            tensor(0.1565)
        """
        source = source_of(statistics, process_group)
        with telling(source.exchanges(reduction)):
            return _z_bce(
                ops,
                source,
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
    """Binary cross entropy without the rows whose logit is far from the mean logit of their label.

    Module form of :func:`fused_losses.functional.z_error_bce_with_logits`, which explains the loss; optionally with
    statistics over batches.

    Args:
        threshold: as for the function; a tensor becomes a buffer.
        space, sided, min_count, small_class, reduction, process_group: as for the function.
        pos_weight: as for the function; a buffer.
        running: True: use statistics over batches, which are in ``state_dict``. A batch is added before it is used. In
            eval mode they stay as they are; before any training batch, an eval call uses its own batch.
        momentum: how fast earlier batches fade, in [0, 1]: their weight is multiplied by ``1 - momentum`` with every
            batch. 0.1 remembers about 10 batches, 0 all of them.
        num_tasks: T. It gives running statistics their shape from the start: for copies (``AveragedModel``), replicas
            (``DataParallel``), ``functional_call``, distributed checkpoints and compiled first calls in inference mode.

    Returns:
        Called with ``(logits, target, sample_weight=None, *, return_mask=False)``: the loss, or
        :class:`fused_losses.ZErrorResult`.

    Raises:
        TypeError: a threshold is no number.
        ValueError: an option is out of range.

    Example:
        >>> criterion = ZErrorBCEWithLogitsLoss(sided="lower", running=True, num_tasks=3)
        >>> answers = torch.tensor([[0.0, 1.0, torch.nan], [1.0, 1.0, 0.0]])  # NaN: a missing label
        >>> criterion(torch.zeros(2, 3), answers)
        tensor(0.6931)
    """

    pos_weight: Tensor | None
    _groups = ("tasks", 2)

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
        min_count, _ = check_small_class(min_count, small_class)
        self.space, self.sided, self.min_count, self.small_class = space, sided, min_count, small_class
        self.register_buffer("pos_weight", pos_weight)

    def forward(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None, *, return_mask: bool = False
    ) -> Tensor | ZErrorResult:
        """The loss of ``logits`` for labels ``target``; see :func:`z_error_bce_with_logits`."""
        with telling(self._exchanges()):
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
        own = {"threshold": self.threshold, "space": self.space, "sided": self.sided}
        return {**own, **self._unusual(min_count=2, small_class="keep", pos_weight=None), **super()._shown()}
