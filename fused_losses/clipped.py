"""The losses of ``p_y`` that are clipped, linear or constant where ``p_y`` is small, or bounded there.

Each loss: its formula in plain PyTorch, which a decorator turns into the fused function, then its Module. The C++ forms
are in ``csrc/losses/target_losses.h``.
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
from fused_losses._parameters import exponent, fraction, positive_factor
from fused_losses._reference import expm1, log_near_one
from fused_losses.softmax import above_one_factor

# For q near 1 tau^(-1 / (1 - q)) depends on digits of 1 - q that q does not have.
_below_one = replace(fraction, low=1e-15, high=0.999)
_truncation = replace(fraction, low=1e-15, high=0.9999)


@loss_of_target(tau=above_one_factor)
def phuber_ce_loss(t: Tensor, *, tau: float = 10.0, **options: Unpack[CallOptions]) -> Tensor:
    """Partially Huberised cross entropy: ``-log p_y``, below ``p_y = 1 / tau`` its tangent ``1 + log tau - tau p_y``.

    For noisy labels: the slope in ``p_y`` is at most ``tau``, so rows that are far off pull less. The largest value is
    ``1 + log tau``.

    Source: Menon et al., ICLR 2020, "Can gradient clipping mitigate label noise?", Eq. 6.

    Args:
        tau: largest slope, > 1. 10 is the default of a public implementation, which takes 2 for CIFAR-10.

    Example:
        >>> phuber_ce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # cross entropy here
        tensor(0.6931)
    """
    log_tau = math.log(tau)
    return torch.where(t <= -log_tau, 1.0 + log_tau - tau * t.exp(), -t)


class PHuberCELoss(RowLossModule, stem="phuber_ce"):
    """Module form of :func:`phuber_ce_loss`."""

    tau: float

    def __init__(self, tau: float = 10.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"tau": tau}, **options)


@loss_of_target(q=_below_one, tau=above_one_factor)
def phuber_gce_loss(t: Tensor, *, q: float = 0.7, tau: float = 10.0, **options: Unpack[CallOptions]) -> Tensor:
    """Partially Huberised GCE: ``(1 - p_y^q) / q`` where ``p_y > tau^(-1 / (1 - q))``, its tangent below.

    For noisy labels, as :func:`gce_loss`, but its slope in ``p_y`` is at most ``tau``. With the defaults only rows with
    ``p_y < 5e-4`` differ from GCE. Its limit for ``q -> 0`` is :func:`phuber_ce_loss`.

    Source: Menon et al., ICLR 2020, "Can gradient clipping mitigate label noise?".

    Args:
        q: exponent, between 0 and 0.999. The default is that of GCE.
        tau: largest slope, > 1.

    Example:
        >>> phuber_gce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # GCE here
        tensor(0.5492)
    """
    t0 = -math.log(tau) / (1.0 - q)
    tau_p0 = math.exp(q * t0)
    at_p0 = -math.expm1(q * t0) / q
    return torch.where(t <= t0, at_p0 + tau_p0 - tau * t.exp(), -expm1(q * t) / q)


class PHuberGCELoss(RowLossModule, stem="phuber_gce"):
    """Module form of :func:`phuber_gce_loss`."""

    q: float
    tau: float

    def __init__(self, q: float = 0.7, tau: float = 10.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"q": q, "tau": tau}, **options)


@loss_of_target(q=exponent, k=_truncation)
def truncated_gce_loss(t: Tensor, *, q: float = 0.7, k: float = 0.5, **options: Unpack[CallOptions]) -> Tensor:
    """Truncated GCE: ``min(GCE(p_y), GCE(k))``, with GCE as in :func:`gce_loss`.

    For noisy labels, after some epochs with GCE: rows with ``p_y <= k`` count as wrong and have no gradient. Used from
    the start it learns nothing, because then every ``p_y`` is about ``1 / C``.

    Source: 1805.07836, section 3.3. Deviation: the paper chooses the rows to leave out every ten epochs; here every
    call chooses by its own logits, so a row can come back.

    Args:
        q: exponent, > 0. The defaults of q and k are the paper's.
        k: probability up to which a row is left out, between 0 and 0.9999.

    Example:
        >>> truncated_gce_loss(torch.tensor([[-9.0, 0.0]]), torch.tensor([0]))  # (1 - 0.5^0.7) / 0.7
        tensor(0.5492)
    """
    t_k = math.log(k)
    return torch.where(t <= t_k, -math.expm1(q * t_k) / q, -expm1(q * t) / q)


class TruncatedGCELoss(RowLossModule, stem="truncated_gce"):
    """Module form of :func:`truncated_gce_loss`."""

    q: float
    k: float

    def __init__(self, q: float = 0.7, k: float = 0.5, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"q": q, "k": k}, **options)


@loss_of_target(a=positive_factor)
def bounded_ce_loss(t: Tensor, *, a: float = 0.1, **options: Unpack[CallOptions]) -> Tensor:
    """Bounded cross entropy: ``log((1 + a) / (p_y + a))``, the limit of :func:`agce_loss` for ``q -> 0``.

    For noisy labels: cross entropy with a largest value of ``log(1 + 1 / a)``.
    Source: our reading of "bounded cross entropy" in 2306.05497, whose formula we could not read.

    Args:
        a: offset, > 0. The default 0.1 is ours.

    Example:
        >>> bounded_ce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), a=0.5)
        tensor(0.4055)
    """
    top = 1.0 + a
    return -log_near_one((t.exp() + a) / top, expm1(t) / top)


class BoundedCELoss(RowLossModule, stem="bounded_ce"):
    """Module form of :func:`bounded_ce_loss`."""

    a: float

    def __init__(self, a: float = 0.1, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"a": a}, **options)
