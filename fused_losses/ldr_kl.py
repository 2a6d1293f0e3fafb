"""The label-distributionally robust loss with a KL divergence. Its C++ form is in ``csrc/losses/ldr_kl.h``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from fused_losses._arguments import CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import factor, positive
from fused_losses._reference import Rows, expm1, log_near_one

# Scores are divided by the temperature before their exponentials are taken: rounding of 1e-7 must not show there, nor
# where exponentials near 1 are multiplied by it.
_temperature = replace(positive, low=1e-3, high=1e4)
_margin = replace(factor, high=1e4)
_MOST_MARGIN = 100.0  # in units of the temperature: beyond it exponentials of float32 overflow or vanish
_TINY = -40.0  # log(1 + e^z) is e^z from here on


def _check_margin(temperature: float, margin: float) -> None:
    if margin > _MOST_MARGIN * temperature:
        raise ValueError(
            f"margin must be at most {_MOST_MARGIN:g} times the temperature {temperature}, where float32 can compute "
            f"it, got {margin}"
        )


def _scores(rows: Rows) -> Tensor:
    """``log(1 + e^z)`` over its mean. Where all logits are very small only their differences matter."""
    top = rows.logits.detach().amax(rows.dim, keepdim=True)
    tiny = top < _TINY
    z = rows.logits - torch.where(tiny, top, 0.0)
    scores = torch.where(tiny, torch.exp(torch.where(tiny, z, 0.0)), F.softplus(z, threshold=-_TINY))
    scores = scores / scores.detach().amax(rows.dim, keepdim=True)  # sums of large ones could overflow
    return scores / scores.mean(rows.dim, keepdim=True)


@loss_of_row({"temperature": _temperature, "margin": _margin}, sums=None, check=_check_margin)
def ldr_kl_loss(rows: Rows, *, temperature: float = 1.0, margin: float = 0.1, **options: Unpack[CallOptions]) -> Tensor:
    """Label-distributionally robust loss with a KL divergence (LDR-KL).

    For noisy labels. It is the log-sum-exp of bounded scores: with ``h_j = log(1 + e^z_j)`` divided by its mean over
    the classes, the value is ``temperature * log mean_j exp((h_j - h_y + margin [j != y]) / temperature)``. A low
    temperature looks at the largest difference alone, as a margin loss does. A high one looks at all alike, which makes
    the loss symmetric: it resists wrong labels better and learns more slowly. A row's loss is between ``-temperature *
    log C`` and ``C + margin``.

    Drawbacks: the bound grows with the number of classes, and a shift of all logits changes the loss, so both
    parameters have to be searched for every task.

    A masked class (logit -inf) has score 0 and counts in ``C``. If the target is masked, the loss is finite.

    Source: 2112.14869 (ICML 2023).

    Args:
        temperature: lambda of the paper, from 1e-3 to 1e4. The authors take 10 for CIFAR-10.
        margin: how far the label's score shall exceed the others, from 0 to 100 times the temperature.

    Example:
        >>> ldr_kl_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.0512)
    """
    scores = _scores(rows)
    errors = scores - rows.of_target(scores).unsqueeze(rows.dim) + margin
    errors = errors.scatter(rows.dim, rows.target.unsqueeze(rows.dim), 0.0)
    top = errors.detach().amax(rows.dim, keepdim=True)
    exponents = (errors - top) / temperature
    # At high temperatures all exponentials are near 1.
    log_mean = log_near_one(torch.exp(exponents).mean(rows.dim), expm1(exponents).mean(rows.dim))
    return top.squeeze(rows.dim) + temperature * log_mean


class LDRKLLoss(RowLossModule, stem="ldr_kl"):
    """Module form of :func:`ldr_kl_loss`."""

    temperature: float
    margin: float

    def __init__(self, temperature: float = 1.0, margin: float = 0.1, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"temperature": temperature, "margin": margin}, **options)
