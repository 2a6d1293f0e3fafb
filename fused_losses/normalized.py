"""Losses divided by their sum over all labels, which makes any loss symmetric, and their sums with a passive loss.

"Normalized Loss Functions for Deep Learning with Noisy Labels", 2006.13554 (Eq. 3 and 8 and section 4). Each loss: the
plain PyTorch formula, decorated into the fused function, then its Module. The C++ twins are in
``csrc/losses/normalized.h``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import LOSSES, CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import check_power, exponent, factor, nfl_focusing, positive_factor, switch
from fused_losses._reference import Rows, expm1, focal_term
from fused_losses.softmax import RCE_A, above_one_factor, check_aue


@loss_of_row({}, takes_probabilities=True, min_classes=2, sums=("log_probs",))
def nce_loss(rows: Rows, **options: Unpack[CallOptions]) -> Tensor:
    """Normalised cross entropy: ``log p_y / sum_j log p_j``. 2006.13554 Eq. 8.

    In (0, 1), and symmetric: its sum over all labels is 1, so symmetric label noise does not move its minimum. Alone
    it underfits; the sums with a passive loss (:func:`nce_mae_loss` and the like) are made to be trained with. Needs
    at least two classes. A class masked by a logit of -inf makes the denominator infinite and the loss 0.
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

    In [0, 1] and symmetric, as :func:`nce_loss`, which it is for ``gamma = 0``. 2006.13554 Eq. 3 applied to the focal
    loss. 2306.05497 Table 1 prints the factor inside the logarithm, which is no sensible loss; this follows the code.
    Needs at least two classes.

    Args:
        gamma: focusing exponent, >= 0.
        detach: whether ``(1 - p_j)^gamma`` is a constant in every derivative, as in the papers' code; False gives the
            exact gradient.
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

    In [0, 1] and symmetric, as :func:`nce_loss`. 2006.13554 Eq. 3 applied to GCE (1805.07836). Nothing is clamped:
    other code clamps p at 1e-7. Needs at least two classes; one masked by a logit of -inf counts in ``C``.

    Args:
        q: exponent, > 0.
    """
    own, total = rows.target_and_powers(q, less_one=True)  # computed as it stands, C - sum p^q would cancel
    return own / total


class NGCELoss(RowLossModule, stem="ngce"):
    """Module form of :func:`ngce_loss`."""

    q: float

    def __init__(self, q: float = 0.7, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"q": q}, **options)


def weighted_sum(alpha: float, beta: float, active: Callable[[], Tensor], passive: Callable[[], Tensor]) -> Tensor:
    """``alpha active + beta passive``; a term of weight 0 is left out, be it infinite or NaN."""
    terms = [weight * term() for weight, term in ((alpha, active), (beta, passive)) if weight != 0.0]
    return sum(terms[1:], terms[0]) if terms else 0.0 * active()


@loss_of_row(
    {"alpha": factor, "beta": factor, "mae_scale": positive_factor},
    takes_probabilities=True,
    min_classes=2,
    sums=("log_probs",),
)
def nce_mae_loss(
    rows: Rows, *, alpha: float = 1.0, beta: float = 1.0, mae_scale: float = 1.0, **options: Unpack[CallOptions]
) -> Tensor:
    """``alpha NCE + beta MAE``, the active-passive loss NCE+MAE. 2006.13554 section 4; symmetric.

    The papers' code has (alpha, beta) = (1, 10) for MNIST, (1, 1) for CIFAR-10, (10, 1) for CIFAR-100.

    Args:
        alpha: weight of normalised cross entropy, >= 0.
        beta: weight of MAE, >= 0.
        mae_scale: MAE is ``mae_scale (1 - p_y)``; 1 in 2006.13554, 2 in 2306.05497; > 0.
    """
    return weighted_sum(
        alpha, beta, lambda: LOSSES["nce"].formula(rows), lambda: LOSSES["mae"].formula(rows, scale=mae_scale)
    )


class NCEMAELoss(RowLossModule, stem="nce_mae"):
    """Module form of :func:`nce_mae_loss`."""

    alpha: float
    beta: float
    mae_scale: float

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, mae_scale: float = 1.0, **options: Unpack[RowLossOptions]
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "mae_scale": mae_scale}, **options)


@loss_of_row(
    {"alpha": factor, "beta": factor, "A": positive_factor},
    takes_probabilities=True,
    min_classes=2,
    sums=("log_probs",),
)
def nce_rce_loss(
    rows: Rows, *, alpha: float = 1.0, beta: float = 1.0, A: float = RCE_A, **options: Unpack[CallOptions]
) -> Tensor:
    """``alpha NCE + beta RCE``, the active-passive loss NCE+RCE. 2006.13554 section 4; symmetric.

    The paper's code has (alpha, beta) = (1, 10) for MNIST, (1, 1) for CIFAR-10, (10, 0.1) for CIFAR-100; that of
    2106.03110 has (1, 100), (1, 1), (10, 1).

    Args:
        alpha: weight of normalised cross entropy, >= 0.
        beta: weight of reverse cross entropy, >= 0.
        A: minus the log of zero in ``RCE = A (1 - p_y)``, > 0; the default is -log(1e-4) = 9.21.
    """
    return weighted_sum(alpha, beta, lambda: LOSSES["nce"].formula(rows), lambda: LOSSES["rce"].formula(rows, A=A))


class NCERCELoss(RowLossModule, stem="nce_rce"):
    """Module form of :func:`nce_rce_loss`."""

    alpha: float
    beta: float
    A: float

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, A: float = RCE_A, **options: Unpack[RowLossOptions]
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "A": A}, **options)


@loss_of_row(
    {"alpha": factor, "beta": factor, "gamma": nfl_focusing, "detach": switch, "mae_scale": positive_factor},
    min_classes=2,
    sums=("terms",),
)
def nfl_mae_loss(
    rows: Rows,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.5,
    detach: bool = True,
    mae_scale: float = 1.0,
    **options: Unpack[CallOptions],
) -> Tensor:
    """``alpha NFL + beta MAE``, the active-passive loss NFL+MAE. 2006.13554 section 4; symmetric.

    Args:
        alpha: weight of the normalised focal loss, >= 0.
        beta: weight of MAE, >= 0.
        gamma: focusing exponent, >= 0.
        detach: whether the focal factor is a constant in every derivative; see :func:`nfl_loss`.
        mae_scale: MAE is ``mae_scale (1 - p_y)``; 1 in 2006.13554, 2 in 2306.05497; > 0.
    """
    return weighted_sum(
        alpha,
        beta,
        lambda: LOSSES["nfl"].formula(rows, gamma=gamma, detach=detach),
        lambda: LOSSES["mae"].formula(rows, scale=mae_scale),
    )


class NFLMAELoss(RowLossModule, stem="nfl_mae"):
    """Module form of :func:`nfl_mae_loss`."""

    alpha: float
    beta: float
    gamma: float
    detach: bool
    mae_scale: float

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.5,
        mae_scale: float = 1.0,
        detach: bool = True,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__(
            {"alpha": alpha, "beta": beta, "gamma": gamma, "mae_scale": mae_scale, "detach": detach}, **options
        )


@loss_of_row(
    {"alpha": factor, "beta": factor, "gamma": nfl_focusing, "detach": switch, "A": positive_factor},
    min_classes=2,
    sums=("terms",),
)
def nfl_rce_loss(
    rows: Rows,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.5,
    detach: bool = True,
    A: float = RCE_A,
    **options: Unpack[CallOptions],
) -> Tensor:
    """``alpha NFL + beta RCE``, the active-passive loss NFL+RCE. 2006.13554 section 4; symmetric.

    Args:
        alpha: weight of the normalised focal loss, >= 0.
        beta: weight of reverse cross entropy, >= 0.
        gamma: focusing exponent, >= 0.
        detach: whether the focal factor is a constant in every derivative; see :func:`nfl_loss`.
        A: minus the log of zero in ``RCE = A (1 - p_y)``, > 0; the default is -log(1e-4) = 9.21.
    """
    return weighted_sum(
        alpha,
        beta,
        lambda: LOSSES["nfl"].formula(rows, gamma=gamma, detach=detach),
        lambda: LOSSES["rce"].formula(rows, A=A),
    )


class NFLRCELoss(RowLossModule, stem="nfl_rce"):
    """Module form of :func:`nfl_rce_loss`."""

    alpha: float
    beta: float
    gamma: float
    detach: bool
    A: float

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.5,
        A: float = RCE_A,
        detach: bool = True,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "gamma": gamma, "A": A, "detach": detach}, **options)


def _check_agce(alpha: float, beta: float, a: float, q: float) -> None:
    if beta != 0.0:
        check_power(1.0 + a, q, "1 + a")


@loss_of_row(
    {"alpha": factor, "beta": factor, "a": positive_factor, "q": exponent},
    takes_probabilities=True,
    min_classes=2,
    sums=("log_probs",),
    check=_check_agce,
)
def nce_agce_loss(
    rows: Rows, *, alpha: float = 1.0, beta: float = 4.0, a: float = 6.0, q: float = 1.5, **options: Unpack[CallOptions]
) -> Tensor:
    """``alpha NCE + beta AGCE``, with AGCE as in :func:`agce_loss`. 2106.03110.

    The defaults are those of the paper's code for CIFAR-10; it has (alpha, beta, a, q) = (0, 1, 4, 0.2) for MNIST and
    (10, 0.1, 1.8, 3) for CIFAR-100.

    Args:
        alpha: weight of normalised cross entropy, >= 0.
        beta: weight of AGCE, >= 0.
        a: offset of AGCE, > 0.
        q: exponent of AGCE, > 0.
    """
    return weighted_sum(
        alpha, beta, lambda: LOSSES["nce"].formula(rows), lambda: LOSSES["agce"].formula(rows, a=a, q=q)
    )


class NCEAGCELoss(RowLossModule, stem="nce_agce"):
    """Module form of :func:`nce_agce_loss`."""

    alpha: float
    beta: float
    a: float
    q: float

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 4.0,
        a: float = 6.0,
        q: float = 1.5,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "a": a, "q": q}, **options)


def _check_aue_of(alpha: float, beta: float, a: float, q: float) -> None:
    if beta != 0.0:
        check_aue(a, q)


@loss_of_row(
    {"alpha": factor, "beta": factor, "a": above_one_factor, "q": exponent},
    takes_probabilities=True,
    min_classes=2,
    sums=("log_probs",),
    check=_check_aue_of,
)
def nce_aue_loss(
    rows: Rows, *, alpha: float = 1.0, beta: float = 4.0, a: float = 6.3, q: float = 1.5, **options: Unpack[CallOptions]
) -> Tensor:
    """``alpha NCE + beta AUE``, with AUE as in :func:`aue_loss`; the tables of papers call it NCE+AUL. 2106.03110.

    For noisy labels, beside :func:`nce_agce_loss`: the active part drives, the asymmetric one protects. The defaults
    are those of the paper's code for CIFAR-10; it has (alpha, beta, a, q) = (0, 1, 3, 0.1) for MNIST and
    (10, 0.015, 6, 3) for CIFAR-100.

    Args:
        alpha: weight of normalised cross entropy, >= 0.
        beta: weight of AUE, >= 0.
        a: offset of AUE, > 1.
        q: exponent of AUE, > 0.

    Example:
        >>> nce_aue_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), beta=0.0)
        tensor(0.5000)
    """
    return weighted_sum(alpha, beta, lambda: LOSSES["nce"].formula(rows), lambda: LOSSES["aue"].formula(rows, a=a, q=q))


class NCEAUELoss(RowLossModule, stem="nce_aue"):
    """Module form of :func:`nce_aue_loss`."""

    alpha: float
    beta: float
    a: float
    q: float

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 4.0,
        a: float = 6.3,
        q: float = 1.5,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "a": a, "q": q}, **options)
