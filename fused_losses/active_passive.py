"""Active-passive losses: sums of a normalised loss, which learns fast, and one that resists wrong labels.

Source: 2006.13554, section 4, and 2106.03110. Each loss: its formula in plain PyTorch, which a decorator turns into the
fused function, then its Module. The C++ forms are in ``csrc/losses/normalized.h``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import LOSSES, CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import check_power, exponent, factor, nfl_focusing, positive_factor, switch
from fused_losses._reference import Rows
from fused_losses.softmax import RCE_A, above_one_factor, check_aue


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
    """``alpha NCE + beta MAE``, the active-passive loss NCE+MAE.

    For noisy labels, of about 100 classes with ``alpha=10``. NCE (:func:`nce_loss`) learns fast, MAE resists wrong
    labels; the sum is symmetric.

    Source: 2006.13554, section 4.

    Args:
        alpha: weight of normalised cross entropy, >= 0. (alpha, beta) of the authors' code: MNIST (1, 10), CIFAR-10 (1,
            1), the default, CIFAR-100 (10, 1).
        beta: weight of MAE, >= 0.
        mae_scale: MAE is ``mae_scale (1 - p_y)``, > 0: 1 in 2006.13554, 2 in 2306.05497.

    Example:
        >>> nce_mae_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(1.)
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
    """``alpha NCE + beta RCE``, the active-passive loss NCE+RCE.

    For noisy labels. NCE (:func:`nce_loss`) learns fast, RCE (:func:`rce_loss`) resists wrong labels; the sum is
    symmetric.

    Source: 2006.13554, section 4.

    Args:
        alpha: weight of normalised cross entropy, >= 0. (alpha, beta) of the authors' code: MNIST (1, 10), CIFAR-10 (1,
            1), the default, CIFAR-100 (10, 0.1). The code of 2106.03110 has (1, 100), (1, 1), (10, 1).
        beta: weight of reverse cross entropy, >= 0.
        A: minus the value taken for log 0 in ``RCE = A (1 - p_y)``, > 0. The default is -log(1e-4) = 9.21.

    Example:
        >>> nce_rce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(5.1052)
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
    """``alpha NFL + beta MAE``, the active-passive loss NFL+MAE.

    As :func:`nce_mae_loss`, which it equals for ``gamma = 0``; NFL as in :func:`nfl_loss`.

    Source: 2006.13554, section 4.

    Args:
        alpha: weight of the normalised focal loss, >= 0. (alpha, beta) as for NCE+MAE.
        beta: weight of MAE, >= 0.
        gamma: focusing exponent, from 0 to 50.
        detach: True: the focal factor is a constant in every derivative, as in :func:`nfl_loss`.
        mae_scale: MAE is ``mae_scale (1 - p_y)``, > 0: 1 in 2006.13554, 2 in 2306.05497.

    Example:
        >>> nfl_mae_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(1.)
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
    """``alpha NFL + beta RCE``, the active-passive loss NFL+RCE.

    As :func:`nce_rce_loss`, which it equals for ``gamma = 0``; NFL as in :func:`nfl_loss`.

    Source: 2006.13554, section 4.

    Args:
        alpha: weight of the normalised focal loss, >= 0. (alpha, beta) as for NCE+RCE.
        beta: weight of reverse cross entropy, >= 0.
        gamma: focusing exponent, from 0 to 50.
        detach: True: the focal factor is a constant in every derivative, as in :func:`nfl_loss`.
        A: minus the value taken for log 0 in ``RCE = A (1 - p_y)``, > 0. The default is -log(1e-4) = 9.21.

    Example:
        >>> nfl_rce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(5.1052)
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
    """``alpha NCE + beta AGCE``, with NCE as in :func:`nce_loss` and AGCE as in :func:`agce_loss`.

    For noisy labels, about 10 classes and training to the end. NCE learns fast, AGCE resists wrong labels.

    Source: 2106.03110.

    Args:
        alpha: weight of normalised cross entropy, >= 0. (alpha, beta, a, q) of the paper's code: MNIST (0, 1, 4, 0.2),
            CIFAR-10 (1, 4, 6, 1.5), the default, CIFAR-100 (10, 0.1, 1.8, 3).
        beta: weight of AGCE, >= 0.
        a: offset of AGCE, > 0.
        q: exponent of AGCE, > 0.

    Example:
        >>> nce_agce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), beta=1.0, a=1.0, q=1.0)
        tensor(1.)
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
    """``alpha NCE + beta AUE``, with NCE as in :func:`nce_loss` and AUE as in :func:`aue_loss`.

    For noisy labels, as :func:`nce_agce_loss`. Papers call it NCE+AUL in their tables.

    Source: 2106.03110.

    Args:
        alpha: weight of normalised cross entropy, >= 0. (alpha, beta, a, q) of the paper's code: MNIST (0, 1, 3, 0.1),
            CIFAR-10 (1, 4, 6.3, 1.5), the default, CIFAR-100 (10, 0.015, 6, 3).
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
