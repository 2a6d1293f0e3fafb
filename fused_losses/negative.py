"""Normalised negative losses and the active negative losses, their sums with a normalised loss.

Source: "Active Negative Loss Functions for Learning with Noisy Labels", NeurIPS 2023. Each loss: its formula in plain
PyTorch, which a decorator turns into the fused function, then its Module. The C++ forms are in
``csrc/losses/nfl_sums.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import LOSSES, CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import factor, fraction, nfl_focusing, switch
from fused_losses._reference import Rows, expm1
from fused_losses.active_passive import weighted_sum
from fused_losses.normalized import nfl_term

# Classes below it must not make up the sum over the classes, and one class must be above it.
_min_prob = replace(fraction, low=1e-30, high=1e-3, below_share=True)


def _missing(gamma: float, detach: bool, min_prob: float) -> Callable[[Tensor], Tensor]:
    """``A' - n_k``: the focal term at ``min_prob``, below which the logarithm stays the same, less that of a class."""
    least = math.log(min_prob)
    excess = -least * math.expm1(gamma * math.log1p(-min_prob))  # of A' over -log min_prob
    above = nfl_term(gamma, detach)

    def term(log_probs: Tensor) -> Tensor:
        low = log_probs < least
        of_low = torch.where(low, log_probs.detach() if detach else log_probs, least)
        factor = 1.0 if gamma == 0.0 else (-expm1(of_low)) ** gamma
        n = torch.where(low, -least * factor, above(torch.where(low, least, log_probs)))
        missing: Tensor = (-least - n) + excess
        return missing

    return term


@loss_of_row({"min_prob": _min_prob}, min_classes=2, sums=("terms",))
def nnce_loss(rows: Rows, *, min_prob: float = 1e-7, **options: Unpack[CallOptions]) -> Tensor:
    """Normalised negative cross entropy: ``1 - (A + l_y) / sum_k (A + l_k)`` with ``l = max(log p, -A)``.

    A part of sums for noisy labels (:func:`anl_ce_loss`); alone it learns slowly. ``A = -log min_prob``. It trains on
    the labels that a row does not have, as MAE does, with more weight where the network is unsure. It is in [0, 1], and
    its sum over all labels is constant. It needs at least two classes, and a class above ``min_prob`` in every row: a
    row without one is 0 / 0.

    Source: ANL, NeurIPS 2023. Deviation: ``min_prob`` must be below ``1 / C``, where the authors' code gives NaN.

    Args:
        min_prob: smaller probabilities count as this one, from 1e-30 to 0.001 and below ``1 / C``; take it well below,
            because near it gradients of unsure rows are huge. 1e-7 is the value of the authors' code.

    Example:
        >>> nnce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.5000)
    """
    own, total = rows.target_and_sum(_missing(0.0, True, min_prob))
    return 1.0 - own / total


class NNCELoss(RowLossModule, stem="nnce"):
    """Module form of :func:`nnce_loss`."""

    min_prob: float

    def __init__(self, min_prob: float = 1e-7, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"min_prob": min_prob}, **options)


@loss_of_row({"alpha": factor, "beta": factor, "min_prob": _min_prob}, min_classes=2, sums=("log_probs", "terms"))
def anl_ce_loss(
    rows: Rows, *, alpha: float = 5.0, beta: float = 5.0, min_prob: float = 1e-7, **options: Unpack[CallOptions]
) -> Tensor:
    """``alpha NCE + beta NNCE``, the active negative loss ANL-CE; see :func:`nce_loss` and :func:`nnce_loss`.

    For noisy labels. In published CIFAR-10 tables it is above NCE+AGCE where the noise is symmetric (62.3 against 50.0
    % at 80 % wrong labels) and below where it is asymmetric (78.0 against 79.3 %).

    Source: ANL, NeurIPS 2023. Deviation: the authors also add an L1 norm of all parameters of the network, times 5e-5,
    5e-7 and 5e-6 for the three data sets below; that is not part of this function.

    Args:
        alpha: weight of normalised cross entropy, >= 0. (alpha, beta) of the authors: CIFAR-10 (5, 5), the default,
            CIFAR-100 (10, 1), WebVision (20, 1).
        beta: weight of normalised negative cross entropy, >= 0.
        min_prob: as in :func:`nnce_loss`.

    Example:
        >>> anl_ce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(5.)
    """
    return weighted_sum(
        alpha, beta, lambda: LOSSES["nce"].formula(rows), lambda: LOSSES["nnce"].formula(rows, min_prob=min_prob)
    )


class ANLCELoss(RowLossModule, stem="anl_ce"):
    """Module form of :func:`anl_ce_loss`."""

    alpha: float
    beta: float
    min_prob: float

    def __init__(
        self, alpha: float = 5.0, beta: float = 5.0, min_prob: float = 1e-7, **options: Unpack[RowLossOptions]
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "min_prob": min_prob}, **options)


@loss_of_row({"gamma": nfl_focusing, "detach": switch, "min_prob": _min_prob}, min_classes=2, sums=("terms",))
def nnfl_loss(
    rows: Rows,
    *,
    gamma: float = 0.5,
    detach: bool = True,
    min_prob: float = 1e-7,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Normalised negative focal loss: ``1 - (A - n_y) / sum_k (A - n_k)``.

    As :func:`nnce_loss`, which it equals for ``gamma = 0``, with the focal terms ``n_k = -(1 - p_k)^gamma max(log p_k,
    log min_prob)`` and their value ``A`` at ``p = min_prob``.

    Source: ANL, NeurIPS 2023.

    Args:
        gamma: focusing exponent, from 0 to 50. 0.5 is the value of the authors' code.
        detach: True: ``(1 - p_k)^gamma`` is a constant in every derivative, as in the authors' code. False: the exact
            gradient.
        min_prob: as in :func:`nnce_loss`.

    Example:
        >>> nnfl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.5000)
    """
    own, total = rows.target_and_sum(_missing(gamma, detach, min_prob))
    return 1.0 - own / total


class NNFLLoss(RowLossModule, stem="nnfl"):
    """Module form of :func:`nnfl_loss`."""

    gamma: float
    min_prob: float
    detach: bool

    def __init__(
        self, gamma: float = 0.5, min_prob: float = 1e-7, detach: bool = True, **options: Unpack[RowLossOptions]
    ) -> None:
        super().__init__({"gamma": gamma, "min_prob": min_prob, "detach": detach}, **options)


@loss_of_row(
    {"alpha": factor, "beta": factor, "gamma": nfl_focusing, "detach": switch, "min_prob": _min_prob},
    min_classes=2,
    sums=("terms",),
)
def anl_fl_loss(
    rows: Rows,
    *,
    alpha: float = 5.0,
    beta: float = 5.0,
    gamma: float = 0.5,
    detach: bool = True,
    min_prob: float = 1e-7,
    **options: Unpack[CallOptions],
) -> Tensor:
    """``alpha NFL + beta NNFL``, the active negative loss ANL-FL; see :func:`nfl_loss` and :func:`nnfl_loss`.

    As :func:`anl_ce_loss`, which it equals for ``gamma = 0``, with the same (alpha, beta) and the same L1 norm left
    out.

    Source: ANL, NeurIPS 2023.

    Args:
        alpha: weight of the normalised focal loss, >= 0.
        beta: weight of the normalised negative focal loss, >= 0.
        gamma: focusing exponent of both, from 0 to 50.
        detach: True: the focal factor is a constant in every derivative, as in :func:`nfl_loss`.
        min_prob: as in :func:`nnce_loss`.

    Example:
        >>> anl_fl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(5.)
    """
    return weighted_sum(
        alpha,
        beta,
        lambda: LOSSES["nfl"].formula(rows, gamma=gamma, detach=detach),
        lambda: LOSSES["nnfl"].formula(rows, gamma=gamma, detach=detach, min_prob=min_prob),
    )


class ANLFLLoss(RowLossModule, stem="anl_fl"):
    """Module form of :func:`anl_fl_loss`."""

    alpha: float
    beta: float
    gamma: float
    detach: bool
    min_prob: float

    def __init__(
        self,
        alpha: float = 5.0,
        beta: float = 5.0,
        gamma: float = 0.5,
        detach: bool = True,
        min_prob: float = 1e-7,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__(
            {"alpha": alpha, "beta": beta, "gamma": gamma, "detach": detach, "min_prob": min_prob}, **options
        )
