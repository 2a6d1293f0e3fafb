"""The losses of the eps-softmax, which moves the prediction towards one-hot, and their sums with MAE.

"eps-Softmax: Approximating One-Hot Vectors for Mitigating Label Noise", 2508.02387. Each loss: the plain PyTorch
formula, decorated into the fused function, then its Module. The C++ twins are in ``csrc/losses/eps_softmax.h``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import LOSSES, CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import factor, focusing, positive_factor
from fused_losses._reference import Rows, expm1, focal_term, log_near_one

_FLOOR = math.log(1e-8)


def _log_eps_softmax(rows: Rows, m: float) -> Tensor:
    """``log p'_y``, at least log 1e-8. Of an arg-max ``1 - p' = (1 - p) / (m + 1)``."""
    t, is_top = rows.log_p, rows.is_top
    other = t - math.log1p(m)
    of_top = log_near_one((t.exp() + m) / (m + 1.0), expm1(t) / (m + 1.0))
    return torch.where(is_top, of_top, torch.where(other < _FLOOR, _FLOOR, other))


def _plus_mae(rows: Rows, alpha: float, active: Tensor, beta: float) -> Tensor:
    mae: Tensor = LOSSES["mae"].formula(rows, scale=2.0 * beta)
    return alpha * active + mae


@loss_of_row({"m": positive_factor}, takes_probabilities=True)
def ece_loss(rows: Rows, *, m: float = 1e4, **options: Unpack[CallOptions]) -> Tensor:
    """Cross entropy of the eps-softmax: ``-log p'_y``, ``p'_j = (p_j + m [j is the arg-max]) / (m + 1)``. 2508.02387.

    For noisy labels: where the network already predicts the label there is next to nothing left to learn, elsewhere the
    gradient is that of cross entropy, as long as ``p_y > 1e-8 (m + 1)``. The paper adds MAE to it
    (:func:`ece_mae_loss`). Very sensitive to ``m``: the paper has 1e5 for CIFAR-10, 1e4 for CIFAR-100, 1e3 for
    WebVision. At most ``-log 1e-8 = 18.4``; it jumps by about ``log(m + 1)`` where the arg-max changes.

    Of equal largest logits each counts as the arg-max, so that classes can be renamed; the paper's code takes the
    first.

    Args:
        m: how far the arg-max is moved, > 0; m to 0 is cross entropy, at most 18.4.

    Example:
        >>> ece_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), m=9.0)
        tensor(3.6158)
    """
    return -_log_eps_softmax(rows, m)


class ECELoss(RowLossModule, stem="ece"):
    """Module form of :func:`ece_loss`."""

    m: float

    def __init__(self, m: float = 1e4, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"m": m}, **options)


@loss_of_row({"alpha": factor, "beta": factor, "m": positive_factor}, takes_probabilities=True)
def ece_mae_loss(
    rows: Rows, *, alpha: float = 0.1, beta: float = 1.0, m: float = 1e4, **options: Unpack[CallOptions]
) -> Tensor:
    """``alpha ECE + beta MAE``, ECE as in :func:`ece_loss` and ``MAE = 2 (1 - p_y)``. 2508.02387.

    For noisy labels. In its paper's tables level with NCE+AGCE at 40 % wrong labels, above it at 80 % and, for 100
    classes, where the noise is asymmetric. Very sensitive to ``m``: the authors have 1e5 for CIFAR-10, 1e4 for
    CIFAR-100, 1e3 with (alpha, beta) = (0.015, 0.3) for WebVision.

    Args:
        alpha: weight of ECE, >= 0.
        beta: weight of MAE, >= 0.
        m: how far the arg-max is moved, > 0.

    Example:
        >>> ece_mae_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # the arg-max: all but MAE
        tensor(1.0000)
    """
    return _plus_mae(rows, alpha, -_log_eps_softmax(rows, m), beta)


class ECEMAELoss(RowLossModule, stem="ece_mae"):
    """Module form of :func:`ece_mae_loss`."""

    alpha: float
    beta: float
    m: float

    def __init__(
        self, alpha: float = 0.1, beta: float = 1.0, m: float = 1e4, **options: Unpack[RowLossOptions]
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "m": m}, **options)


@loss_of_row({"alpha": factor, "beta": factor, "m": positive_factor, "gamma": focusing}, takes_probabilities=True)
def efl_mae_loss(
    rows: Rows,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    m: float = 1e4,
    gamma: float = 0.1,
    **options: Unpack[CallOptions],
) -> Tensor:
    """``alpha EFL + beta MAE``: the focal loss ``-(1 - p'_y)^gamma log p'_y`` in place of ECE. 2508.02387.

    As :func:`ece_mae_loss`, which it is for ``gamma = 0``. The gradient is exact: the factor is no constant.

    Args:
        alpha: weight of the focal loss, >= 0.
        beta: weight of ``MAE = 2 (1 - p_y)``, >= 0.
        m: how far the arg-max is moved, > 0.
        gamma: focusing exponent, >= 0.

    Example:
        >>> efl_mae_loss(torch.tensor([[0.0, 30.0]]), torch.tensor([0]))  # alpha 18.42 + 2
        tensor(3.8421)
    """
    return _plus_mae(rows, alpha, focal_term(_log_eps_softmax(rows, m), gamma), beta)


class EFLMAELoss(RowLossModule, stem="efl_mae"):
    """Module form of :func:`efl_mae_loss`."""

    alpha: float
    beta: float
    m: float
    gamma: float

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        m: float = 1e4,
        gamma: float = 0.1,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "m": m, "gamma": gamma}, **options)
