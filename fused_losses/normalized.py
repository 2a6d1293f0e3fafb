"""Losses divided by their sum over all labels, which makes any loss symmetric.

Source: 2006.13554, "Normalized Loss Functions for Deep Learning with Noisy Labels", Eq. 3 and 8. Each loss: its formula
in plain PyTorch, which a decorator turns into the fused function, then its Module. The C++ forms are in
``csrc/losses/normalized.h``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import exponent, nfl_focusing, switch
from fused_losses._reference import Rows, expm1, focal_term


@loss_of_row({}, takes_probabilities=True, min_classes=2, sums=("log_probs",))
def nce_loss(rows: Rows, **options: Unpack[CallOptions]) -> Tensor:
    """Normalised cross entropy: ``log p_y / sum_j log p_j``.

    A part of sums for noisy labels (:func:`nce_mae_loss`, :func:`nce_agce_loss`); alone it learns too little. It is in
    (0, 1), and its sum over all labels is 1, so symmetric label noise does not move its minimum. It needs at least two
    classes. A masked class (logit -inf) makes the denominator infinite, and the loss and its gradient 0.

    Source: 2006.13554, Eq. 8.

    Example:
        >>> nce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.5000)
    """
    return rows.log_p / rows.sum_log_probs()


class NCELoss(RowLossModule, stem="nce"):
    """Module form of :func:`nce_loss`."""

    def __init__(self, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({}, **options)


def nfl_term(gamma: float, detach: bool) -> Callable[[Tensor], Tensor]:
    """``-(1 - p)^gamma log p`` of log-probabilities, on demand with the factor as a constant."""

    def term(log_probs: Tensor) -> Tensor:
        if detach and gamma != 0.0:
            return -(-expm1(log_probs.detach())).pow(gamma) * log_probs
        return focal_term(log_probs, gamma)

    return term


@loss_of_row({"gamma": nfl_focusing, "detach": switch}, min_classes=2, sums=("terms",))
def nfl_loss(rows: Rows, *, gamma: float = 0.5, detach: bool = True, **options: Unpack[CallOptions]) -> Tensor:
    """Normalised focal loss: ``n_y / sum_j n_j`` with ``n_j = -(1 - p_j)^gamma log p_j``.

    A part of sums for noisy labels (:func:`nfl_mae_loss`, :func:`nfl_rce_loss`), as :func:`nce_loss`, which it equals
    for ``gamma = 0``. It is in [0, 1] and its sum over all labels is 1. It needs at least two classes. A masked class
    (logit -inf) makes the loss and its gradient 0.

    Source: 2006.13554, Eq. 3 applied to the focal loss. 2306.05497 prints the factor inside the logarithm (Table 1);
    this is the formula of the papers' code.

    Args:
        gamma: focusing exponent, from 0 to 50. 0.5 is the value of the papers' code.
        detach: True: ``(1 - p_j)^gamma`` is a constant in every derivative, as in the papers' code. False: the exact
            gradient.

    Example:
        >>> nfl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.5000)
    """
    own, total = rows.target_and_sum(nfl_term(gamma, detach))
    return own / total


class NFLLoss(RowLossModule, stem="nfl"):
    """Module form of :func:`nfl_loss`."""

    gamma: float
    detach: bool

    def __init__(self, gamma: float = 0.5, detach: bool = True, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"gamma": gamma, "detach": detach}, **options)


@loss_of_row({"q": exponent}, min_classes=2, sums=("p^q",))
def ngce_loss(rows: Rows, *, q: float = 0.7, **options: Unpack[CallOptions]) -> Tensor:
    """Normalised generalised cross entropy: ``(1 - p_y^q) / (C - sum_j p_j^q)``.

    For noisy labels, as :func:`nce_loss`: it is in [0, 1] and its sum over all labels is 1. It needs at least two
    classes; a masked class (logit -inf) counts in ``C``.

    Source: 2006.13554, Eq. 3 applied to GCE (1805.07836). Deviation: nothing is clamped, where other code clamps p at
    1e-7.

    Args:
        q: exponent, > 0. 0.7 is the value of GCE; 2006.13554's code takes 0.1 for CIFAR-10 and 0.7 for CIFAR-100
            (beside MAE).

    Example:
        >>> ngce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.5000)
    """
    own, total = rows.target_and_powers(q, less_one=True)  # computed as it stands, C - sum p^q would cancel
    return own / total


class NGCELoss(RowLossModule, stem="ngce"):
    """Module form of :func:`ngce_loss`."""

    q: float

    def __init__(self, q: float = 0.7, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"q": q}, **options)
