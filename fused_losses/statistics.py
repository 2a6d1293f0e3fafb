"""Mean and standard deviation of a score by class: of one batch, merged over batches, merged over processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses import _ops
from fused_losses._agreement import Exchange, gather
from fused_losses._checks import check_tensors
from fused_losses._parameters import integer

MOMENTS = "moments"  # the name of the exchange


def merge_moments(parts: Tensor) -> Tensor:
    """Moments ``(3, C)`` - count, mean, sum of squared deviations - of the union of ``parts``, ``(n, 3, C)``.

    Means are taken relative to one of them: parts with equal means have exactly that mean, whatever the rounding, so a
    constant class stays constant.
    """
    count, mean, m2 = parts.unbind(1)
    total = count.sum(0)
    at_least_one = total.clamp(min=torch.finfo(parts.dtype).tiny)
    seen = count > 0
    origin = torch.where(seen, mean, -torch.inf).amax(0)
    offset = torch.where(seen, mean - origin, 0.0)
    shift = (count * offset).sum(0) / at_least_one
    merged = m2.sum(0) + (count * (offset - shift).square()).sum(0)
    return torch.stack([total, torch.where(total > 0, origin + shift, 0.0), merged])


def all_reduce_moments(
    moments: Tensor, group: dist.ProcessGroup | None, count_dtype: torch.dtype = torch.int64
) -> Tensor:
    """Moments of the rows of all ranks of ``group``: the same bits on each of them. All ranks synchronise here."""
    counts = " with counts that are no integers" if count_dtype.is_floating_point else ""
    call = f"the statistics of {moments.shape[1]} classes{counts}"
    return merge_moments(gather(Exchange.over(group, MOMENTS), call, moments))


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Count, mean and unbiased standard deviation of a score in every class, each of shape ``(C,)``.

    From :func:`class_statistics`. Merging is exact up to rounding.

    Attributes:
        count: rows of the class; int64 from :func:`class_statistics`, float64 where earlier batches fade.
        mean: float64; NaN for a class without rows.
        std: float64, the square root of ``sum (x - mean)^2 / (count - 1)``; NaN for fewer than two rows.

    Example:
        >>> first = class_statistics(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), 2)
        >>> both = first.update(torch.tensor([5.0]), torch.tensor([0]))
        >>> both.count.tolist(), both.mean.tolist(), both.std.tolist()
        ([3, 0], [3.0, nan], [2.0, nan])
    """

    count: Tensor
    mean: Tensor
    std: Tensor

    @staticmethod
    def from_moments(moments: Tensor) -> ClassStatistics:
        """The statistics from their moments ``(3, C)``: count, mean, sum of squared deviations."""
        count, mean, m2 = moments.unbind(0)
        std = torch.where(count > 1, (m2 / (count - 1)).sqrt(), torch.nan)
        return ClassStatistics(count, torch.where(count > 0, mean, torch.nan), std)

    def moments(self) -> Tensor:
        """Count, mean and sum of squared deviations, float64 ``(3, C)``; zeros where they are not defined."""
        count = self.count.double()
        mean = torch.where(count > 0, self.mean.double(), 0.0)
        return torch.stack([count, mean, torch.where(count > 1, self.std.double().square() * (count - 1), 0.0)])

    @staticmethod
    def _of(moments: Tensor, count_dtype: torch.dtype) -> ClassStatistics:
        made = ClassStatistics.from_moments(moments)
        return ClassStatistics(made.count.to(count_dtype), made.mean, made.std)

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of both sets of rows together, as a new object; exact up to rounding.

        Raises:
            TypeError: ``other`` is something else.
            ValueError: ``other`` has another number of classes.
        """
        if not isinstance(other, ClassStatistics):
            raise TypeError(f"other must be ClassStatistics, got {type(other).__name__}")
        if other.count.shape != self.count.shape:
            raise ValueError(
                f"other must have statistics of {self.count.numel()} classes, got shape {tuple(other.count.shape)}"
            )
        dtype = torch.promote_types(self.count.dtype, other.count.dtype)  # running statistics have shares of rows
        return self._of(merge_moments(torch.stack([self.moments(), other.moments()])), dtype)

    def update(self, score: Tensor, target: Tensor) -> ClassStatistics:
        """Statistics with further rows merged in, as a new object; arguments as for :func:`class_statistics`."""
        return self.merge(class_statistics(score, target, self.count.numel()))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ClassStatistics:
        """The statistics of the rows of all ranks, as a new object with the same bits on each rank.

        Args:
            group: process group, None for the default one. Every rank of it has to call this, with
                statistics of as many classes.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised, another rank was given bad arguments, or only some
                ranks have counts that are no integers, as running statistics have.
        """
        return self._of(all_reduce_moments(self.moments(), group, self.count.dtype), self.count.dtype)


def class_statistics(score: Tensor, target: Tensor, num_classes: int) -> ClassStatistics:
    """Count, mean and unbiased standard deviation of ``score`` in every class, in float64.

    For the ``statistics`` of a Z-Error loss (2506.02154), which compares rows with those of their class; one read of
    the scores. The same bits for any number of threads.

    Args:
        score: one number per row, the shape of ``target``; or logits ``(N, C)``, ``(N, C, d1, ...)``, of which the
            target's entry is the score. float64, float32, float16 or bfloat16, any strides.
        target: class of every row; int64, int32, int16 or uint8. Rows outside ``[0, num_classes)``, such as an
            ``ignore_index``, do not count, nor do rows whose score is not finite.
        num_classes: C, at least 1.

    Returns:
        :class:`ClassStatistics` on the device of ``score``. Nothing waits for the device.

    Raises:
        TypeError: ``score`` or ``target`` is no tensor, or a DTensor, or ``num_classes`` no integer.
        ValueError: ``num_classes`` is below 1, or shapes do not fit.
        RuntimeError: dtypes or devices do not fit.

    Example:
        >>> class_statistics(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2).mean
        tensor([2., 5.], dtype=torch.float64)
    """
    check_tensors(score=score, target=target)
    moments = _ops.class_moments(score.detach(), target, integer("num_classes", num_classes), "class", -100)
    statistics = ClassStatistics.from_moments(moments)
    return ClassStatistics(statistics.count.long(), statistics.mean, statistics.std)
