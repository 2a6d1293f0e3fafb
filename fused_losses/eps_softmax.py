"""The losses of the eps-softmax, which moves the prediction towards one-hot, and their sums with MAE.

Source: 2508.02387, "eps-Softmax: Approximating One-Hot Vectors for Mitigating Label Noise". Each loss: its formula in
plain PyTorch, which a decorator turns into the fused function, then its Module. The C++ forms are in
``csrc/losses/eps_softmax.h``.
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
    """Cross entropy of the eps-softmax: ``-log p'_y`` with ``p'_j = (p_j + m [j is the arg-max]) / (m + 1)``.

    For noisy labels, as a part of :func:`ece_mae_loss`; not the expected calibration error, which is called ECE, too.
    Where the network predicts the label, almost nothing is left to learn. Elsewhere the gradient is that of cross
    entropy, as long as ``p_y > 1e-8 (m + 1)``. The largest value is ``-log 1e-8 = 18.4``; where the arg-max changes,
    the loss jumps by about ``log(m + 1)``.

    Source: 2508.02387. Deviation: of equal largest logits each counts as the arg-max, where the paper's code takes the
    first.

    Args:
        m: how far the arg-max is moved, > 0; ``m -> 0`` is cross entropy, but at most 18.4. The authors found m to
            matter a lot and take 1e5 for CIFAR-10, 1e4 for CIFAR-100, 1e3 for WebVision, less for asymmetric noise.

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
    """``alpha ECE + beta MAE``, with ECE as in :func:`ece_loss` and ``MAE = 2 (1 - p_y)``.

    For noisy labels of any kind. In the paper's tables it equals NCE+AGCE at 40 % wrong labels and is above it at 80 %,
    and for 100 classes with asymmetric noise.

    Source: 2508.02387.

    Args:
        alpha: weight of ECE, >= 0. (alpha, beta, m) of the authors' code: CIFAR-10 (0.01, 5, 1e5), with asymmetric
            noise (0.02, 5, 1e3); CIFAR-100 clean (0.1, 1, 1e4), the default, at 20 / 40 % symmetric noise with alpha
            0.05 / 0.03, at 40 % asymmetric noise (0.004, 1, 1e2); WebVision (0.015, 0.3, 1e3).
        beta: weight of MAE, >= 0.
        m: as in :func:`ece_loss`.

    Example:
        >>> ece_mae_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # ECE is almost 0 at the arg-max
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
    """``alpha EFL + beta MAE``, with the focal loss ``EFL = -(1 - p'_y)^gamma log p'_y`` in place of ECE.

    As :func:`ece_mae_loss`, which it equals for ``gamma = 0``; ``p'`` is the eps-softmax of :func:`ece_loss`.

    Source: 2508.02387. Deviation: the gradient is exact, where the authors' code takes the factor as a constant.

    Args:
        alpha: weight of the focal loss, >= 0.
        beta: weight of ``MAE = 2 (1 - p_y)``, >= 0.
        m: as in :func:`ece_loss`.
        gamma: focusing exponent, >= 0. 0.1 is the authors' value.

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
