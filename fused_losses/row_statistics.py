"""What each row of logits looks like, for diagnostics: one read of the logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_losses import _ops
from fused_losses._checks import check_tensors, row_shape
from fused_losses._parameters import integer


class RowStatistics(NamedTuple):
    """What :func:`fused_losses.row_statistics` returns: one number per row, in the shape of the target, without
    gradients.

    float32, or float64 for float64 logits. Ignored rows have NaN in all fields but ``argmax``. A row with a NaN logit
    has NaN in all fields, and the first class that is NaN as ``argmax``. A row with +inf, or with -inf in all classes,
    has NaN in ``log_prob``, ``max_prob`` and ``entropy``. Classes masked by -inf have probability 0.
    """

    log_prob: Tensor
    """Log-probability of the target: minus its cross entropy."""
    max_prob: Tensor
    """Largest probability."""
    max_logit: Tensor
    """Largest logit."""
    margin: Tensor
    """The target's logit less the largest other one: positive where the row is classified right, inf for one class."""
    entropy: Tensor
    """Entropy of the probabilities, in nats."""
    argmax: Tensor
    """The class of the largest logit, the first of equals; int64."""

    @staticmethod
    def of_rows(stats: Tensor, argmax: Tensor, logits: Tensor) -> RowStatistics:
        """Those that an operator has found of the rows of ``logits``."""
        shape = row_shape(logits)
        return RowStatistics._make(of_rows.view(shape) for of_rows in (*stats.unbind(), argmax))


def row_statistics(logits: Tensor, target: Tensor, ignore_index: int = -100) -> RowStatistics:
    """Log-probability of the label, largest probability, largest logit, margin, entropy and prediction of each row.

    For questions about samples instead of batches: which labels are suspicious (:class:`fused_losses.OutlierTracker`),
    which inputs belong to no class, how many predictions are right. One read of the logits gives all of them.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or bfloat16.
        target: class indices in ``[0, C)`` or ``ignore_index``, the shape of ``logits`` without its class dimension;
            int64, int32, int16 or uint8.
        ignore_index: rows with this target have only ``argmax``, the rest is NaN.

    Returns:
        :class:`fused_losses.RowStatistics`, without gradients.

    Raises:
        TypeError: ``logits`` or ``target`` is no tensor, or a DTensor, or ``ignore_index`` no integer.
        ValueError: batch sizes differ, or there is no class.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: a target is out of range (on CUDA: a device assertion).

    Example:
        >>> rows = row_statistics(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> rows.margin, rows.argmax
        (tensor([ 2., -1.]), tensor([0, 1]))
    """
    check_tensors(logits=logits, target=target)
    found = _ops.row_statistics(logits.detach(), target, integer("ignore_index", ignore_index))
    return RowStatistics.of_rows(*found, logits)
