"""The losses of ``p_y`` that are clipped: linear, or constant, where ``p_y`` is small.

Each loss: formula (the plain PyTorch reference, decorated into the fused function), then its Module. The C++ twins are
in ``csrc/losses/target_losses.h``.
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
from fused_losses._parameters import exponent, fraction
from fused_losses._reference import expm1
from fused_losses.softmax import above_one_factor

# For q near 1 tau^(-1 / (1 - q)) depends on digits of 1 - q that q does not have.
_below_one = replace(fraction, low=1e-15, high=0.999)
_truncation = replace(fraction, low=1e-15, high=0.9999)


@loss_of_target(tau=above_one_factor)
def phuber_ce_loss(t: Tensor, *, tau: float = 10.0, **options: Unpack[CallOptions]) -> Tensor:
    """Partially Huberised cross entropy: ``-log p_y`` where ``p_y > 1 / tau``, below that its tangent.

    The tangent is ``1 + log tau - tau p_y``, so the slope in ``p_y`` is clipped at ``tau``. ICLR 2020, "Can gradient
    clipping mitigate label noise?", Eq. 6.

    Args:
        tau: largest slope, > 1.
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
    """Partially Huberised GCE: ``(1 - p_y^q) / q`` where ``p_y > tau^(-1 / (1 - q))``, below that its tangent.

    For noisy labels; like :func:`gce_loss`, but its slope in ``p_y`` never exceeds ``tau``, so rows that are far off
    pull less. With ``q = 0.7`` and ``tau = 10`` only rows with ``p_y < 5e-4`` are affected. ICLR 2020, "Can gradient
    clipping mitigate label noise?"; :func:`phuber_ce_loss` is its limit for ``q`` to 0.

    Args:
        q: exponent, in (0, 1).
        tau: largest slope, > 1.

    Example:
        >>> phuber_gce_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))  # that of GCE
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
    """Truncated GCE: ``min(GCE(p_y), GCE(k))``, GCE as in :func:`gce_loss`. 1805.07836 section 3.3.

    For noisy labels, after a warm-up with GCE: rows with ``p_y <= k`` count as wrong and have no gradient. From the
    start nothing is learnt, because every ``p_y`` is about ``1 / C``. The paper finds anew, every ten epochs, which
    rows to leave out; here each step decides by its own logits, so a row can come back.

    Args:
        q: exponent, > 0.
        k: probability below which a row is left out, in (0, 1).

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
