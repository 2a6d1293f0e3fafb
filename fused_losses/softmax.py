"""The losses that depend on the logits through ``t = log p_y`` alone.

Each loss: its formula in plain PyTorch, which a decorator turns into the fused function, then its Module. The C++ form
of a formula is in ``csrc/losses/target_losses.h``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_target
from fused_losses._parameters import (
    Range,
    above_one,
    check_power,
    exponent,
    factor,
    focusing,
    fraction,
    iterations,
    positive_factor,
)
from fused_losses._reference import expm1, focal_term, log_near_one, zero_at_zero

# Nearer to 1, the two weights of the divergence are too far apart for float32.
_label_weight = replace(fraction, low=1e-15, high=1.0 - 1e-6)
above_one_factor = replace(above_one, high=1e15)
_above_minus_one = Range("satisfy -1 <= value < inf", lambda v: -1.0 <= v < math.inf, -1.0, 1e15)

# -log of the 1e-4 that stands for log 0 in reverse cross entropy
RCE_A = -math.log(1e-4)


@loss_of_target(scale=positive_factor)
def mae_loss(t: Tensor, *, scale: float = 2.0, **options: Unpack[CallOptions]) -> Tensor:
    """Mean absolute error between the probabilities and the one-hot label: ``scale * (1 - p_y)``.

    For noisy labels and up to about 10 classes. It is symmetric (its sum over all labels is constant) and bounded, so
    symmetric label noise does not move its minimum. With many classes it learns slowly or not at all, unless
    ``logit_bias`` is used.
    Source: 2306.05497, Table 1, with ``scale=2``; 2006.13554 uses ``scale=1`` inside NCE+MAE.

    Args:
        scale: factor, > 0. With 2 it is the distance itself.

    Example:
        >>> mae_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(1.)
    """
    return -scale * expm1(t)


class MAELoss(RowLossModule, stem="mae"):
    """Module form of :func:`mae_loss`."""

    scale: float

    def __init__(self, scale: float = 2.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"scale": scale}, **options)


@loss_of_target(q=exponent)
def gce_loss(t: Tensor, *, q: float = 0.7, **options: Unpack[CallOptions]) -> Tensor:
    """Generalised cross entropy: ``(1 - p_y^q) / q``.

    For noisy labels; the one to start with. ``q -> 0`` is cross entropy, ``q = 1`` is MAE: a larger q resists wrong
    labels better and learns more slowly. For many classes q has to be smaller
    (:func:`fused_losses.calibration.match_parameter`).

    Source: 1805.07836, Eq. 6; called genCE in 2306.05497. Deviation: nothing is clamped, where other code clamps p at
    1e-7.

    Args:
        q: exponent, > 0. 0.7 is the papers' value, for 10 and 100 classes.

    Example:
        >>> gce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.5492)
    """
    return -expm1(q * t) / q


class GCELoss(RowLossModule, stem="gce"):
    """Module form of :func:`gce_loss`."""

    q: float

    def __init__(self, q: float = 0.7, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"q": q}, **options)


@loss_of_target(check=lambda a, q: check_power(1.0 + a, q, "1 + a"), a=positive_factor, q=exponent)
def agce_loss(t: Tensor, *, a: float = 0.6, q: float = 0.6, **options: Unpack[CallOptions]) -> Tensor:
    """Asymmetric generalised cross entropy: ``((a + 1)^q - (a + p_y)^q) / q``.

    For noisy labels. An asymmetric loss tolerates noise as long as the most frequent label of every class is the right
    one. It behaves much like MAE: with many classes it needs ``logit_bias``.

    Source: 2106.03110. 2306.05497 repeats it in Table 1, where the error has ``a_n`` in place of ``a_k`` by mistake.

    Args:
        a: offset, > 0. The defaults of a and q are those of the paper's code for CIFAR-10 and CIFAR-100.
        q: exponent, > 0.

    Example:
        >>> agce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), a=1.0, q=1.0)
        tensor(0.5000)
    """
    top = 1.0 + a
    log_ratio = log_near_one((a + t.exp()) / top, expm1(t) / top)
    largest: float = top**q
    return expm1(q * log_ratio) * (-largest / q)


class AGCELoss(RowLossModule, stem="agce"):
    """Module form of :func:`agce_loss`."""

    a: float
    q: float

    def __init__(self, a: float = 0.6, q: float = 0.6, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"a": a, "q": q}, **options)


def check_aue(a: float, q: float) -> None:
    """Raises where the two do not fit together."""
    if q < 0.5 and a < 1.0 + 1e-6:  # (a - 1)^q would depend on digits of a that float32 does not have
        raise ValueError(f"a must be at least {1.0 + 1e-6} with q = {q}, where float32 can compute it, got {a}")
    check_power(a, q, "a")


@loss_of_target(check=check_aue, a=above_one_factor, q=exponent)
def aue_loss(t: Tensor, *, a: float = 5.5, q: float = 3.0, **options: Unpack[CallOptions]) -> Tensor:
    """Asymmetric unhinged loss: ``((a - p_y)^q - (a - 1)^q) / q``.

    For noisy labels, as :func:`agce_loss`; mostly as a part of NCE+AUE (:func:`nce_aue_loss`).
    Source: 2106.03110, which also calls it AUL.

    Args:
        a: offset, > 1. The defaults of a and q are those of the paper's code for CIFAR-10 and CIFAR-100.
        q: exponent, > 0.

    Example:
        >>> aue_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), a=2.0, q=1.0)
        tensor(0.5000)
    """
    miss = -expm1(t)
    gap = max(a - 1.0, torch.finfo(t.dtype).eps)  # where a rounds to 1 in the dtype of t, the next number
    return (gap + miss).pow(q) * expm1(-q * torch.log1p(miss / gap)) / -q


class AUELoss(RowLossModule, stem="aue"):
    """Module form of :func:`aue_loss`."""

    a: float
    q: float

    def __init__(self, a: float = 5.5, q: float = 3.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"a": a, "q": q}, **options)


@loss_of_target(a=positive_factor)
def ae_loss(t: Tensor, *, a: float = 2.5, **options: Unpack[CallOptions]) -> Tensor:
    """Asymmetric exponential loss: ``exp(-p_y / a)``.

    For noisy labels, as :func:`agce_loss`. Its minimum is ``exp(-1 / a)``, not 0.
    Source: 2106.03110, which also calls it AEL.

    Args:
        a: scale, > 0. 2.5 is the value of the paper's code for CIFAR-10 and CIFAR-100.

    Example:
        >>> ae_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), a=1.0)
        tensor(0.6065)
    """
    return torch.exp(-t.exp() / a)


class AELoss(RowLossModule, stem="ae"):
    """Module form of :func:`ae_loss`."""

    a: float

    def __init__(self, a: float = 2.5, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"a": a}, **options)


@loss_of_target(A=positive_factor)
def rce_loss(t: Tensor, *, A: float = RCE_A, **options: Unpack[CallOptions]) -> Tensor:
    """Reverse cross entropy: ``A (1 - p_y)``, where ``-A`` stands for log 0.

    A part of sums (:func:`sce_loss`, :func:`nce_rce_loss`); alone it is MAE with another scale.
    Source: 1908.06112, Eq. 5. Deviation: nothing is clamped. Code that clamps p at 1e-7 gives up to 9.2e-7 (C - 1)
    more.

    Args:
        A: minus the value taken for log 0, > 0. The default is -log(1e-4) = 9.21.

    Example:
        >>> rce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(4.6052)
    """
    return -A * expm1(t)


class RCELoss(RowLossModule, stem="rce"):
    """Module form of :func:`rce_loss`."""

    A: float

    def __init__(self, A: float = RCE_A, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"A": A}, **options)


@loss_of_target(alpha=factor, beta=factor, A=positive_factor)
def sce_loss(
    t: Tensor, *, alpha: float = 0.1, beta: float = 1.0, A: float = RCE_A, **options: Unpack[CallOptions]
) -> Tensor:
    """Symmetric cross entropy: ``alpha CE + beta RCE``, with RCE as in :func:`rce_loss`.

    For noisy labels. It learns as fast as cross entropy and keeps part of its weakness: it is not bounded.
    Source: 1908.06112, Eq. 7.

    Args:
        alpha: weight of cross entropy, >= 0. The defaults of alpha and beta are those of 2006.13554's code for
            CIFAR-10; it has 6 and 0.1 for CIFAR-100.
        beta: weight of reverse cross entropy, >= 0.
        A: minus the value taken for log 0 in ``RCE = A (1 - p_y)``, > 0. The default is -log(1e-4) = 9.21, as in the
            authors' code.

    Example:
        >>> sce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # 0.1 log 2 + 9.21 / 2
        tensor(4.6745)
    """
    reverse = -beta * A * expm1(t)
    return reverse if alpha == 0.0 else reverse - alpha * t


class SCELoss(RowLossModule, stem="sce"):
    """Module form of :func:`sce_loss`."""

    alpha: float
    beta: float
    A: float

    # A by keyword: others' code has the number of classes in this place
    def __init__(
        self, alpha: float = 0.1, beta: float = 1.0, *, A: float = RCE_A, **options: Unpack[RowLossOptions]
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "A": A}, **options)


@loss_of_target(order=iterations)
def taylor_ce_loss(t: Tensor, *, order: int = 2, **options: Unpack[CallOptions]) -> Tensor:
    """Taylor cross entropy: ``sum_{k=1..order} (1 - p_y)^k / k``.

    For noisy labels. ``order=1`` is MAE with scale 1; the more terms, the closer to cross entropy.
    Source: Feng et al., IJCAI 2020, "Can Cross Entropy Loss Be Robust to Label Noise?". The default order is ours.

    Args:
        order: number of terms, an integer from 1 to 1000.

    Example:
        >>> taylor_ce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.6250)
    """
    miss = -expm1(t)
    value = torch.zeros_like(miss)
    for k in range(int(order), 0, -1):
        value = miss * (value + 1.0 / k)
    return value


class TaylorCELoss(RowLossModule, stem="taylor_ce"):
    """Module form of :func:`taylor_ce_loss`."""

    order: int

    def __init__(self, order: int = 2, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"order": order}, **options)


@loss_of_target(pi=_label_weight)
def js_loss(t: Tensor, *, pi: float = 0.5, **options: Unpack[CallOptions]) -> Tensor:
    """Jensen-Shannon divergence of label and prediction, scaled.

    For noisy labels. ``pi -> 0`` is cross entropy, ``pi -> 1`` is close to MAE. The divergence with weights ``(pi, 1 -
    pi)`` depends on ``p_y`` alone: with ``m = pi + (1 - pi) p_y`` it is ``-pi log m + (1 - pi) p_y log(p_y / m) - (1 -
    pi)(1 - p_y) log(1 - pi)``. The loss is the divergence divided by ``-(1 - pi) log(1 - pi)``.

    Source: 2105.04522, Eq. 5, scaled as its code does for CIFAR.

    Args:
        pi: weight of the label, between 0 and 1. The authors take .1 for clean CIFAR-10, .7 at 40 % noise; CIFAR-100:
            .3.

    Example:
        >>> js_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.6226)
    """
    p, rest, log_rest = t.exp(), 1.0 - pi, math.log1p(-pi)
    m, small = pi + rest * p, p < pi
    # Where p is much larger than pi, log m = t + log(m / p): the terms below would cancel.
    of_small = rest * zero_at_zero(p, t) - m * log_near_one(m, rest * expm1(t))
    excess = pi * expm1(-torch.where(small, 0.0, t))  # m / p - 1
    of_large = -pi * torch.where(small, 0.0, t) - m * torch.log1p(excess)
    return (torch.where(small, of_small, of_large) + rest * expm1(t) * log_rest) / (-rest * log_rest)


class JSLoss(RowLossModule, stem="js"):
    """Module form of :func:`js_loss`."""

    pi: float

    def __init__(self, pi: float = 0.5, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"pi": pi}, **options)


@loss_of_target(gamma=focusing)
def focal_loss(t: Tensor, *, gamma: float = 2.0, **options: Unpack[CallOptions]) -> Tensor:
    """Focal loss: ``-(1 - p_y)^gamma log p_y``.

    For rare classes and clean labels: it gives more weight to rows that the network finds hard, and wrong labels are
    such rows.
    Source: 1708.02002, Eq. 4, with the exact gradient. Code of the noisy-label papers treats the factor as a constant.

    Args:
        gamma: focusing exponent, >= 0. 2 is the paper's value, 0 is cross entropy.

    Example:
        >>> focal_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # log(2) / 4
        tensor(0.1733)
    """
    return focal_term(t, gamma)


class FocalLoss(RowLossModule, stem="focal"):
    """Module form of :func:`focal_loss`."""

    gamma: float

    def __init__(self, gamma: float = 2.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"gamma": gamma}, **options)


@loss_of_target(epsilon=_above_minus_one)
def poly_loss(t: Tensor, *, epsilon: float = 2.0, **options: Unpack[CallOptions]) -> Tensor:
    """Poly-1: ``-log p_y + epsilon (1 - p_y)``, cross entropy plus a multiple of MAE.

    For clean labels. Cross entropy is the series ``sum_k (1 - p_y)^k / k``; this changes the factor of its first term
    from 1 to ``1 + epsilon``. The gradient is that of cross entropy times ``1 + epsilon p_y``: a positive ``epsilon``
    goes on pushing rows that are already right. It is not bounded and does not resist wrong labels; :func:`sce_loss` is
    the same sum with weights that do.
    Source: 2204.12511. The paper searches ``epsilon`` for every task.

    Args:
        epsilon: weight of the second term, >= -1.

    Example:
        >>> poly_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(1.6931)
    """
    return -epsilon * expm1(t) - t


class PolyLoss(RowLossModule, stem="poly"):
    """Module form of :func:`poly_loss`."""

    epsilon: float

    def __init__(self, epsilon: float = 2.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"epsilon": epsilon}, **options)
