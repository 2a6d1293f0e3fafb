"""Losses of a sum of powers of the probabilities: SGCE, the asymmetric MSE, and its sums with a normalised loss.

Each loss: its formula in plain PyTorch, which a decorator turns into the fused function, then its Module. The C++ forms
are in ``csrc/losses/powers.h`` and ``csrc/losses/nfl_sums.h``.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import LOSSES, CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import exponent, factor, nfl_focusing, positive_factor, switch
from fused_losses._reference import Rows, expm1
from fused_losses.active_passive import weighted_sum

# For `a`, whose square is multiplied by beta.
_label_value = replace(positive_factor, high=1e4)


@loss_of_row({"q": exponent}, sums=("p^q",))
def sgce_loss(rows: Rows, *, q: float = 0.7, **options: Unpack[CallOptions]) -> Tensor:
    """Symmetrised GCE: ``(mean_k p_k^q - p_y^q) / q``, which is GCE minus its mean over all labels.

    For noisy labels. Its sum over all labels is 0, so symmetric noise does not move its minimum; :func:`ngce_loss` gets
    the same by a division. It is below 0 for rows that are right, and at least ``(1 / C - 1) / q``. A masked class
    (logit -inf) counts in ``C``.

    Source: 2605.20347.

    Args:
        q: exponent, > 0. 0.7 is the value of GCE.

    Example:
        >>> sgce_loss(torch.tensor([[20.0, 0.0]]), torch.tensor([0]), q=1.0)
        tensor(-0.5000)
    """
    own, total = rows.target_and_powers(q, less_one=q < 0.1)  # all powers are near 1 where q is small
    return (total / rows.num_classes - own) / q


class SGCELoss(RowLossModule, stem="sgce"):
    """Module form of :func:`sgce_loss`."""

    q: float

    def __init__(self, q: float = 0.7, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"q": q}, **options)


@loss_of_row({"a": _label_value}, sums=("p^2",))
def amse_loss(rows: Rows, *, a: float = 30.0, **options: Unpack[CallOptions]) -> Tensor:
    """Asymmetric mean squared error: ``mean_k (a [k = y] - p_k)^2``.

    A part of sums (:func:`jal_ce_loss`). ``a = 1`` is the Brier score over C; the larger ``a``, the closer to a
    multiple of MAE and the more asymmetric. The value is mostly the constant ``a^2 / C``: sum it in float32, because 16
    bits would hold nothing else. The gradient is computed without it.

    Source: JAL, 2507.17692 (ICCV 2025).

    Args:
        a: what the label's probability is compared with, > 0. 30 is the authors' value for CIFAR-10 and WebVision.

    Example:
        >>> amse_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), a=1.0)
        tensor(0.2500)
    """
    square, total = rows.target_and_powers(2.0)
    rest = (a - 1.0) - expm1(rows.log_p)
    return (rest * rest + (total - square)) / rows.num_classes


class AMSELoss(RowLossModule, stem="amse"):
    """Module form of :func:`amse_loss`."""

    a: float

    def __init__(self, a: float = 30.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"a": a}, **options)


@loss_of_row({"alpha": factor, "beta": factor, "a": _label_value}, min_classes=2, sums=("log_probs", "p^2"))
def jal_ce_loss(
    rows: Rows, *, alpha: float = 1.0, beta: float = 1.0, a: float = 30.0, **options: Unpack[CallOptions]
) -> Tensor:
    """``alpha NCE + beta AMSE``, the joint asymmetric loss JAL-CE; see :func:`nce_loss` and :func:`amse_loss`.

    For noisy labels. In its paper's CIFAR tables it is above ANL-CE and NCE+AGCE, by most at 80 % wrong labels.

    Source: 2507.17692 (ICCV 2025).

    Args:
        alpha: weight of normalised cross entropy, >= 0. (alpha, beta, a) of the authors: CIFAR-10 (1, 1, 30), the
            default; CIFAR-100 (5, 1, 20); WebVision (50, 1, 30).
        beta: weight of the asymmetric mean squared error, >= 0.
        a: as in :func:`amse_loss`, > 0.

    Example:
        >>> jal_ce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), a=1.0)
        tensor(0.7500)
    """
    return weighted_sum(alpha, beta, lambda: LOSSES["nce"].formula(rows), lambda: LOSSES["amse"].formula(rows, a=a))


class JALCELoss(RowLossModule, stem="jal_ce"):
    """Module form of :func:`jal_ce_loss`."""

    alpha: float
    beta: float
    a: float

    def __init__(
        self, alpha: float = 1.0, beta: float = 1.0, a: float = 30.0, **options: Unpack[RowLossOptions]
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "a": a}, **options)


@loss_of_row(
    {"alpha": factor, "beta": factor, "gamma": nfl_focusing, "detach": switch, "a": _label_value},
    min_classes=2,
    sums=("terms", "p^2"),
)
def jal_fl_loss(
    rows: Rows,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.5,
    detach: bool = True,
    a: float = 30.0,
    **options: Unpack[CallOptions],
) -> Tensor:
    """``alpha NFL + beta AMSE``, the joint asymmetric loss JAL-FL; see :func:`nfl_loss` and :func:`amse_loss`.

    As :func:`jal_ce_loss`, which it equals for ``gamma = 0``.

    Source: 2507.17692 (ICCV 2025).

    Args:
        alpha: weight of the normalised focal loss, >= 0.
        beta: weight of the asymmetric mean squared error, >= 0.
        gamma: focusing exponent, >= 0.
        detach: True: the focal factor is a constant in every derivative, as in :func:`nfl_loss`.
        a: as in :func:`amse_loss`, > 0.

    Example:
        >>> jal_fl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), a=1.0)
        tensor(0.7500)
    """
    return weighted_sum(
        alpha,
        beta,
        lambda: LOSSES["nfl"].formula(rows, gamma=gamma, detach=detach),
        lambda: LOSSES["amse"].formula(rows, a=a),
    )


class JALFLLoss(RowLossModule, stem="jal_fl"):
    """Module form of :func:`jal_fl_loss`."""

    alpha: float
    beta: float
    gamma: float
    detach: bool
    a: float

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.5,
        detach: bool = True,
        a: float = 30.0,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "gamma": gamma, "detach": detach, "a": a}, **options)
