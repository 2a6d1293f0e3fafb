"""The bi-tempered logistic loss. Its C++ form is in ``csrc/losses/tempered.h``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import OrNone, Range, closed_fraction, iterations, plain_number
from fused_losses._reference import Rows


class _Temperature(Range):
    """A range in which the formulas change at 1: what float32 cannot tell from 1 is 1, whatever the bounds."""

    def holds(self, value: Any) -> bool:
        """Whether it is an allowed number."""
        return value == 1.0 or super().holds(value)

    def pack(self, name: str, value: Any) -> float:
        """``value``, or 1.0 for it. Raises as :class:`Range` does."""
        value = plain_number(name, value)
        if isinstance(value, float) and 1.0 - 2.0**-25 <= value <= 1.0 + 2.0**-24 and self.defined(value):
            return 1.0
        return super().pack(name, value)


# The loss divides by 1 - t1, which must have some digits in float32. The normaliser grows to C^(t2 - 1), which must be
# a normal number for a million classes.
_t1 = _Temperature("be between 0.0 and 1.0", lambda t: 0.0 <= t <= 1.0, 0.0, 1.0 - 1e-5)
_t2 = _Temperature("satisfy 0 < value < inf", lambda t: 0.0 < t < math.inf, 1e-15, 7.0)

# Newton steps of the converged mode; 7 bring |sum p - 1| below 1e-12 for t2 from 0.5 to 4, 10 from 0.1.
NEWTON_STEPS = 10


def _log_t(x: Tensor, t: float) -> Tensor:
    """``(x^(1-t) - 1) / (1 - t)``, the logarithm at t = 1."""
    return x.log() if t == 1.0 else torch.expm1((1.0 - t) * x.log()) / (1.0 - t)


def _log_exp_t(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """``log exp_t(x)``, where ``exp_t(x) = [1 + (1-t) x]_+^(1/(1-t))``, and a mask of exp_t = 0. There the log is 0.

    Powers of exp_t are exponentials of multiples of this logarithm, which is accurate for t near 1 too.
    """
    absent = (1.0 + (1.0 - t) * x <= 0.0) | (x == -math.inf)
    inside = torch.where(absent, 0.0, x)
    return inside if t == 1.0 else torch.log1p((1.0 - t) * inside) / (1.0 - t), absent


def _sum_of_powers(log_p: Tensor, absent: Tensor, exponent: float, dim: int) -> Tensor:
    return torch.where(absent, 0.0, torch.exp(exponent * log_p)).sum(dim, keepdim=True)


def _published_normaliser(x: Tensor, t2: float, num_iters: int, dim: int) -> Tensor:
    """The authors' approximate root lambda of ``sum exp_t2(x - lambda) = 1``, for rows ``x`` of maximum 0."""

    def total(y: Tensor) -> Tensor:
        return _sum_of_powers(*_log_exp_t(y, t2), 1.0, dim)

    if t2 > 1.0:  # a fixed point: x scaled by Z^(1 - t2), Z being the sum at the scaled x
        scaled = x
        for _ in range(num_iters):
            scaled = x * total(scaled).pow(1.0 - t2)
        return -_log_t(1.0 / total(scaled), t2)
    # Bisection. At 0 the largest logit alone has probability 1; at the other end no class has more than an equal share.
    in_play = (x > -1.0 / (1.0 - t2)).sum(dim, keepdim=True).to(x.dtype)
    lower, upper = torch.zeros_like(in_play), -_log_t(1.0 / in_play, t2)
    for _ in range(num_iters):
        middle = (lower + upper) / 2.0
        below = total(x - middle) < 1.0
        lower, upper = torch.where(below, lower, middle), torch.where(below, middle, upper)
    return (lower + upper) / 2.0


def _converged_normaliser(x: Tensor, t2: float, dim: int) -> Tensor:
    """The root by Newton's method on ``log_t2(sum exp_t2(x - lambda)) = 0`` from lambda = 0.

    ``S^(1-t2)``, S being the sum, is a (quasi-)norm of functions linear in lambda: concave and increasing for t2 > 1,
    convex and decreasing for t2 < 1. The maximum of x is 0, so 0 lies left of the root, and from there Newton's method
    climbs to it without overshooting. For equal logits one step is exact, as it is for any logits at t2 = 1.
    """
    root = torch.zeros_like(x.narrow(dim, 0, 1))
    for _ in range(NEWTON_STEPS):
        log_p, absent = _log_exp_t(x - root, t2)
        total = _sum_of_powers(log_p, absent, 1.0, dim)
        root = root + total.pow(t2) * _log_t(total, t2) / _sum_of_powers(log_p, absent, t2, dim)
    return root


def _log_probabilities(logits: Tensor, t2: float, num_iters: int | None, dim: int) -> tuple[Tensor, Tensor]:
    """``log p_j`` and where p is 0, with ``dlambda/dz_j = p_j^t2 / sum_i p_i^t2``, the derivative of a root.

    The iteration itself is not differentiated. Two Newton steps from its result towards the sum that it reached (not
    towards 1) are zeros, so they keep the value to the last bit, but they are not constants: the first gives the first
    derivative, the second makes second derivatives right too.
    """
    top = logits.detach().amax(dim, keepdim=True)
    top = torch.where(top == math.inf, math.nan, top)  # a row with +inf becomes NaN as a whole, as one with NaN does
    x = logits - top  # lambda is relative to the maximum, too: beside a large maximum it would be rounded
    constant = x.detach()
    if num_iters is None:
        root = _converged_normaliser(constant, t2, dim)
    else:
        root = _published_normaliser(constant, t2, int(num_iters), dim)
    for _ in range(2):
        log_p, absent = _log_exp_t(x - root, t2)
        total = _sum_of_powers(log_p, absent, 1.0, dim)
        root = root + (total - total.detach()) / _sum_of_powers(log_p, absent, t2, dim)
    return _log_exp_t(x - root, t2)


def _x_log_t(x: float, t: float) -> float:
    """``x log_t(x)``, 0 at 0."""
    if x == 0.0:
        return 0.0
    return x * (math.log(x) if t == 1.0 else math.expm1((1.0 - t) * math.log(x)) / (1.0 - t))


@loss_of_row({"t1": _t1, "t2": _t2, "label_smoothing": closed_fraction, "num_iters": OrNone(iterations)}, sums=None)
def bi_tempered_loss(
    rows: Rows,
    *,
    t1: float = 0.8,
    t2: float = 1.2,
    label_smoothing: float = 0.0,
    num_iters: int | None = 5,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Bi-tempered logistic loss: a Bregman divergence of label and tempered softmax.

    For noisy labels, with early stopping; trained to the end it learns wrong labels as cross entropy does. With
    ``log_t(x) = (x^(1 - t) - 1) / (1 - t)``, its inverse ``exp_t``, and ``p_j = exp_t2(z_j - lambda)`` where lambda
    makes them sum to 1, the loss of labels q is ``sum_j q_j (log_t1(q_j) - log_t1(p_j)) - (q_j^(2 - t1) - p_j^(2 - t1))
    / (2 - t1)``. ``t1 < 1`` bounds it by ``1 / (1 - t1)``, against labels that are far off. ``t2 > 1`` gives p heavy
    tails, against wrong labels near the boundary. ``t1 = t2 = 1`` is cross entropy.

    The gradient is the published one, ``d_j - s_j sum_i d_i`` with ``d_j = (p_j - q_j) p_j^(t2 - t1)`` and ``s_j =
    p_j^t2 / sum_i p_i^t2``. It takes lambda as exact. For ``t2 < 1`` some classes have probability 0; they get no
    gradient here (the published one is infinite for ``t2 < t1``).

    Source: 1906.03361, Eq. 6 and section 3. Deviation: the authors' code adds 1e-10 inside ``log_t1(q_j)``; this does
    not.

    Args:
        t1: temperature of the logarithm, from 0 to 1. The defaults of t1 and t2 appear in the authors' tests.
        t2: temperature of the exponential, > 0 and at most 7.
        label_smoothing: s, from 0 to 1. The target gets ``1 - s`` and each other class ``s / (C - 1)``, as in the
            authors' code (cross entropy in ``torch`` spreads ``s / C`` over all classes).
        num_iters: iterations for lambda as in the authors' code, an integer from 1 to 1000 (t2 > 1: fixed point, t2 <
            1: bisection). Their default 5 leaves |sum p - 1| at 2e-5 for 10 normal logits and at 1e-2 for 1000 of
            deviation 5 with ``t2 = 1.2``, and at 0.04 to 0.15 with ``t2 < 1``. None: Newton's method up to rounding
            (1e-12 in float64 for ``t2 >= 0.1``).

    Example:
        >>> bi_tempered_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), t1=1.0, t2=1.0)  # cross entropy
        tensor(0.6931)
    """
    dim, classes = rows.dim, rows.num_classes
    if t2 == 1.0:
        log_p, absent = rows.log_probs, rows.log_probs == -math.inf
    else:
        log_p, absent = _log_probabilities(rows.logits, t2, num_iters, dim)
    if t1 == 1.0:
        log_t_p = torch.where(absent, -math.inf, log_p)
    else:
        log_t_p = torch.where(absent, -1.0, torch.expm1((1.0 - t1) * log_p)) / (1.0 - t1)

    own, spread, power = 1.0 - label_smoothing, label_smoothing / max(classes - 1, 1), 2.0 - t1
    of_label: float = (
        _x_log_t(own, t1) - own**power / power + (classes - 1) * (_x_log_t(spread, t1) - spread**power / power)
    )
    value = of_label + _sum_of_powers(log_p, absent, power, dim).squeeze(dim) / power
    if own != 0.0:  # a share of 0 must not meet log 0
        value = value - own * rows.of_target(log_t_p)
    if spread != 0.0:
        value = value - spread * log_t_p.scatter(dim, rows.target.unsqueeze(dim), 0.0).sum(dim)
    return value


class BiTemperedLoss(RowLossModule, stem="bi_tempered"):
    """Module form of :func:`bi_tempered_loss`."""

    t1: float
    t2: float
    label_smoothing: float
    num_iters: int | None

    def __init__(
        self,
        t1: float = 0.8,
        t2: float = 1.2,
        label_smoothing: float = 0.0,
        num_iters: int | None = 5,
        **options: Unpack[RowLossOptions],
    ) -> None:
        super().__init__({"t1": t1, "t2": t2, "label_smoothing": label_smoothing, "num_iters": num_iters}, **options)
