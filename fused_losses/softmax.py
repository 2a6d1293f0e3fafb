"""The losses that depend on the logits through ``t = log p_y`` alone.

Each loss: formula (the plain PyTorch reference, decorated into the fused function), then its Module. The C++ twin of
a formula is in ``csrc/losses/target_losses.h``.
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
    """Mean absolute error between probabilities and one-hot label: ``scale * (1 - p_y)``.

    Symmetric and bounded, so it resists symmetric label noise; without ``logit_bias`` it learns slowly or not at all
    with many classes. 2306.05497 Table 1 (``scale=2``); ``scale=1`` is the form inside NCE+MAE of 2006.13554.

    Args:
        scale: factor, 2 for the distance itself; > 0.
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

    Between cross entropy (``q -> 0``) and MAE (``q = 1``): learns faster than MAE, resists noise better than cross
    entropy. 1805.07836 Eq. 6; genCE in 2306.05497. Nothing is clamped: other code clamps p at 1e-7.

    Args:
        q: exponent, > 0.
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

    Asymmetric losses tolerate noise as long as the right label is the most frequent one. 2106.03110; Table 1 of
    2306.05497 prints its error with ``a_n`` where ``a_k`` is meant.

    Args:
        a: offset, > 0.
        q: exponent, > 0.
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
    """Asymmetric unhinged loss: ``((a - p_y)^q - (a - 1)^q) / q``. 2106.03110, where it is also called AUL.

    Args:
        a: offset, > 1.
        q: exponent, > 0.
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
    """Asymmetric exponential loss: ``exp(-p_y / a)``. 2106.03110 (AEL). Its minimum is ``exp(-1 / a)``, not 0.

    Args:
        a: scale, > 0.
    """
    return torch.exp(-t.exp() / a)


class AELoss(RowLossModule, stem="ae"):
    """Module form of :func:`ae_loss`."""

    a: float

    def __init__(self, a: float = 2.5, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"a": a}, **options)


@loss_of_target(A=positive_factor)
def rce_loss(t: Tensor, *, A: float = RCE_A, **options: Unpack[CallOptions]) -> Tensor:
    """Reverse cross entropy: ``A (1 - p_y)``, ``-A`` standing for log 0. 1908.06112 Eq. 5.

    Proportional to MAE. Code that clamps p at 1e-7 exceeds this value by at most 9.2e-7 (C - 1).

    Args:
        A: minus the log of zero, > 0; the default is -log(1e-4) = 9.21.
    """
    return -A * expm1(t)


class RCELoss(RowLossModule, stem="rce"):
    """Module form of :func:`rce_loss`."""

    A: float

    def __init__(self, A: float = RCE_A, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"A": A}, **options)


@loss_of_target(alpha=factor, beta=factor, constants=(RCE_A,))
def sce_loss(t: Tensor, *, alpha: float = 0.1, beta: float = 1.0, **options: Unpack[CallOptions]) -> Tensor:
    """Symmetric cross entropy: ``alpha CE + beta RCE`` with A = -log(1e-4). 1908.06112 Eq. 7.

    Args:
        alpha: weight of cross entropy, >= 0.
        beta: weight of reverse cross entropy, >= 0.
    """
    reverse = -beta * RCE_A * expm1(t)
    return reverse if alpha == 0.0 else reverse - alpha * t


class SCELoss(RowLossModule, stem="sce"):
    """Module form of :func:`sce_loss`."""

    alpha: float
    beta: float

    def __init__(self, alpha: float = 0.1, beta: float = 1.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"alpha": alpha, "beta": beta}, **options)


@loss_of_target(order=iterations)
def taylor_ce_loss(t: Tensor, *, order: int = 2, **options: Unpack[CallOptions]) -> Tensor:
    """Taylor cross entropy: ``sum_{k=1..order} (1 - p_y)^k / k``.

    ``order=1`` is MAE with scale 1, many terms approach cross entropy. IJCAI 2020, "Can Cross Entropy Loss Be Robust
    to Label Noise?"; the default order is ours.

    Args:
        order: number of terms, an integer >= 1.
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
    """Jensen-Shannon divergence of label and prediction, weights ``(pi, 1 - pi)``, over ``-(1 - pi) log(1 - pi)``.

    ``pi -> 0`` gives cross entropy, ``pi -> 1`` resembles MAE. 2105.04522 Eq. 5, scaled as its code. It collapses
    to a function of ``p_y``: with ``m = pi + (1 - pi) p_y``, the divergence is
    ``-pi log m + (1 - pi) p_y log(p_y / m) - (1 - pi)(1 - p_y) log(1 - pi)``.

    Args:
        pi: weight of the label, in (0, 1).
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
    """Focal loss: ``-(1 - p_y)^gamma log p_y``, with its exact gradient. 1708.02002 Eq. 4.

    Puts weight on hard rows, the opposite of what noisy labels want; made for imbalance. Code of the noisy-label
    papers treats the factor as a constant, which changes the gradient.

    Args:
        gamma: focusing exponent, >= 0; 0 is cross entropy.
    """
    return focal_term(t, gamma)


class FocalLoss(RowLossModule, stem="focal"):
    """Module form of :func:`focal_loss`."""

    gamma: float

    def __init__(self, gamma: float = 2.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"gamma": gamma}, **options)


@loss_of_target(a=positive_factor)
def bounded_ce_loss(t: Tensor, *, a: float = 0.1, **options: Unpack[CallOptions]) -> Tensor:
    """Bounded cross entropy: ``log((1 + a) / (p_y + a))``, the ``q -> 0`` limit of AGCE.

    This is our reading of "bounded cross entropy" in 2306.05497, whose formula could not be consulted.

    Args:
        a: offset, > 0; the bound is ``log(1 + 1 / a)``.
    """
    top = 1.0 + a
    return -log_near_one((t.exp() + a) / top, expm1(t) / top)


class BoundedCELoss(RowLossModule, stem="bounded_ce"):
    """Module form of :func:`bounded_ce_loss`."""

    a: float

    def __init__(self, a: float = 0.1, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"a": a}, **options)


@loss_of_target(epsilon=_above_minus_one)
def poly_loss(t: Tensor, *, epsilon: float = 2.0, **options: Unpack[CallOptions]) -> Tensor:
    """Poly-1: ``-log p_y + epsilon (1 - p_y)``, cross entropy plus a multiple of MAE. 2204.12511.

    For clean labels, and for classes that are rare or hard: cross entropy is the series of ``(1 - p_y)^k / k``, of
    which this changes the first factor from 1 to ``1 + epsilon``. Positive values push rows that are nearly right
    further, negative ones less. Unbounded as cross entropy, it does not resist wrong labels; :func:`sce_loss` is the
    same sum with weights that do. The gradient is that of cross entropy times ``1 + epsilon p_y``. The paper finds
    ``epsilon`` by search, for every task anew.

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
