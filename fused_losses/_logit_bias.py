"""The logit bias: what it may be, and its value solved from the number of classes (2306.05497 Eq. 4)."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fused_losses._parameters import check_num_classes, check_number, finite, python_number

LogitBias = float | Tensor | str
Array = npt.NDArray[np.float64]


def class_dim(logits: Tensor) -> int:
    """The dimension of the classes: 0 for (C,), else 1."""
    return 0 if logits.dim() == 1 else 1


def resolve_logit_bias(logit_bias: LogitBias, logits: Tensor) -> tuple[float, Tensor | None]:
    """The operators' ``logit_bias`` and ``logit_bias_tensor``; "auto" is solved from the number of classes."""
    if isinstance(logit_bias, Tensor):
        return 0.0, logit_bias
    if isinstance(logit_bias, str):
        check_logit_bias(logit_bias)
        has_classes = isinstance(logits, Tensor) and logits.dim() > 0  # if not, the operators say what is wrong
        num_classes = int(logits.shape[class_dim(logits)]) if has_classes else 1
        return (max(0.0, solve_logit_bias(num_classes)) if num_classes > 1 else 0.0), None
    check_logit_bias(logit_bias)
    return python_number(logit_bias), None


def check_logit_bias(logit_bias: LogitBias) -> None:
    """Raises unless it is a finite number, a 0-dim floating point tensor or "auto"."""
    if isinstance(logit_bias, str):
        if logit_bias != "auto":
            raise ValueError(f'logit_bias must be a number, a 0-dim tensor or "auto", got {logit_bias!r}')
    elif isinstance(logit_bias, Tensor):
        if logit_bias.dim() != 0 or not logit_bias.is_floating_point():
            raise ValueError(
                "logit_bias must be a number or a 0-dim floating point tensor, got a tensor of shape "
                f"{tuple(logit_bias.shape)} and dtype {logit_bias.dtype}"
            )
    elif isinstance(python_number(logit_bias), bool):  # it looks like a switch, and is none
        raise TypeError("logit_bias must be a number, got bool")
    else:
        finite.pack("logit_bias", logit_bias)


# Equally spaced nodes. For integrands that are analytic in a strip of half-width b the trapezoid rule errs by
# about exp(-2 pi b / step); here b = pi/2 in both variables, so a step of 0.2 leaves exp(-49).
_STEP = 0.2
_SCORE = np.arange(-15.0, 120.0, _STEP)
_NORMAL = np.arange(-12.0, 12.0 + _STEP / 2, _STEP)
_NORMAL_WEIGHT = np.exp(-0.5 * _NORMAL**2) * (_STEP / math.sqrt(2.0 * math.pi))


def solve_logit_bias(num_classes: int, target_activation: float = 0.15) -> float:
    """The logit bias that gives the labelled class a chosen mean probability at the start of training.

    For bounded losses with many classes (``logit_bias="auto"`` calls it): MAE and its like learn nothing from a row
    whose label has a probability near 0, and in an untrained network with many classes that is every row. With ``K =
    num_classes`` logits z drawn from N(0, 1) and ``C = target_activation``, the bias is the root of ``E[exp(z_y + bias)
    / (exp(z_y + bias) + sum_{j != y} exp(z_j))] = C``. There is exactly one root. It is negative where the probability
    is above C without a bias (``K <= 6`` for the default); ``logit_bias="auto"`` takes 0 instead, this function returns
    it as it is. It is computed by quadrature, to 1e-12 for K from 2 to 1e6 and C from 0.001 to 0.999, and cached.

    Args:
        num_classes: number of classes K, an integer of at least 2.
        target_activation: wanted mean probability C of the labelled class, 0 < C < 1. 0.15 is the paper's value.

    Returns:
        The bias, in units of the logits.

    Raises:
        TypeError: ``num_classes`` is no integer, or ``target_activation`` no number.
        ValueError: an argument is out of range.

    Example:
        >>> round(solve_logit_bias(100), 3)
        3.034

    Source: Staats, Thamm, Rosenow, "Enhancing Noise-Robust Losses for Large-Scale Noisy Data Learning" (2306.05497),
    Eq. 4. The paper uses 0.5 for K = 10 and 3.0 for K = 100, the rounded roots; for K = 1000 it uses 5.2 where the
    equation gives 5.36.
    """
    count = check_num_classes(num_classes)
    target = _check_target_activation(target_activation)
    if torch.compiler.is_compiling():
        # With dynamic=True both may be symbols. Text holds none, so this gives numbers; the round trip is exact.
        count, target = int(f"{count}"), float(f"{target}")
    return _look_up(count, target)


def _check_target_activation(target_activation: float) -> float:
    value = check_number("target_activation", target_activation, "a real number")
    if not 0.0 < value < 1.0:
        raise ValueError(f"target_activation must be greater than 0 and less than 1, got {value}")
    return value


@functools.lru_cache(maxsize=1024)
def _solve_cached(num_classes: int, target_activation: float) -> float:
    # d logit(E p') / d eps = E[p'(1 - p')] / (E[p'] E[1 - p']) lies in (0, 1] (Jensen), so stepping by the
    # gap between the logits never passes the root; the slope stays above 0.7, so < 0.3 of the gap is left.
    goal = math.log(target_activation) - math.log1p(-target_activation)
    bias = 0.0
    for _ in range(200):
        gap = goal - _mean_activation_logit(bias, num_classes)
        bias += gap
        if abs(gap) <= 1e-14 * (1.0 + abs(goal)):
            break
    return bias


def _look_up(num_classes: int, target_activation: float) -> float:
    return _solve_cached(num_classes, target_activation)


# A constant to the compiler, which must not trace the quadrature; it sees through a cache, hence _look_up. The mark is
# what torch.compiler.assume_constant_result sets, which imports the compiler: that takes as long as torch itself.
_look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _mean_activation_logit(bias: float, num_classes: int) -> float:
    """log(E[p'_y] / E[1 - p'_y]) for standard normal logits.

    A softmax probability is the chance that its class has the largest of the scores x_j = z_j + Gumbel noise.
    The scores are independent, with distribution F and density f, so

        E[p'_y]     = integral of F(x)^(K-1) f(x - bias) dx
        1 - E[p'_y] = integral of (1 - F(x)^(K-1)) f(x - bias) dx.

    The smaller of the two is summed and the other is its complement, so that no digits are lost near 0 and 1.
    """
    rate = _rate()
    log_others_below = (num_classes - 1) * _log_score_distribution()
    # f(x - bias) e^(-bias): the factor is added to the logarithm, where it cannot underflow.
    density = (rate * np.exp(-rate * math.exp(bias))) @ _NORMAL_WEIGHT * _STEP
    log_win = bias + math.log(float(np.exp(log_others_below) @ density))
    if log_win < math.log(0.5):
        return log_win - math.log1p(-math.exp(log_win))
    log_lose = bias + math.log(float(-np.expm1(log_others_below) @ density))
    return math.log1p(-math.exp(log_lose)) - log_lose


@functools.lru_cache(maxsize=1)
def _rate() -> Array:
    """e^(z - x), the rate of a Gumbel variable shifted by z, for every node x (rows) and z (columns)."""
    result: Array = np.exp(_NORMAL - _SCORE[:, None])
    return result


@functools.lru_cache(maxsize=1)
def _log_score_distribution() -> Array:
    """log F at the nodes ``_SCORE``; F(x) = E[exp(-e^(z - x))] with z standard normal."""
    rate = _rate()
    below = np.exp(-rate) @ _NORMAL_WEIGHT
    above = -np.expm1(-rate) @ _NORMAL_WEIGHT
    # Far to the right F rounds to 1 while its (K-1)-th power does not: there the log must come from 1 - F.
    result: Array = np.where(below < 0.5, np.log(below), np.log1p(-np.minimum(above, 0.5)))
    return result
