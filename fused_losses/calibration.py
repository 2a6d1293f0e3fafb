"""Hyper-parameters solved from the number of classes instead of being tuned by training."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fused_losses._arrays import as_tensor
from fused_losses._calibration_plot import plot_mean_target_error
from fused_losses._mean_error import RowLoss, mean_slopes
from fused_losses._unwrap import unwrap

if TYPE_CHECKING:
    from fused_losses._arguments import LossEntry

__all__ = ["match_parameter", "mean_target_error", "plot_mean_target_error", "solve_logit_bias"]

_Array = npt.NDArray[np.float64]
Loss = str | nn.Module | Callable[..., Tensor]
_Numbers = TypeVar("_Numbers", float, Tensor, npt.NDArray[Any])

# Equally spaced nodes. For integrands that are analytic in a strip of half-width b the trapezoid rule errs by
# about exp(-2 pi b / step); here b = pi/2 in both variables, so a step of 0.2 leaves exp(-49).
_STEP = 0.2
_SCORE = np.arange(-15.0, 120.0, _STEP)
_NORMAL = np.arange(-12.0, 12.0 + _STEP / 2, _STEP)
_NORMAL_WEIGHT = np.exp(-0.5 * _NORMAL**2) * (_STEP / math.sqrt(2.0 * math.pi))


def solve_logit_bias(num_classes: int, target_activation: float = 0.15) -> float:
    r"""The bias ``eps`` that gives the labelled class a chosen mean probability at the start of training.

    A bounded loss such as MAE learns nothing from a row whose labelled class has a probability close to zero,
    which is every row of an untrained network with many classes. Adding ``eps`` to the logit of the labelled
    class, in training only, removes that dependence on the number of classes. With logits
    :math:`z \sim N(0, 1)^K`, ``K = num_classes`` and ``C = target_activation``, ``eps`` is the root of

    .. math:: E\left[\frac{e^{z_y + \epsilon}}{e^{z_y + \epsilon} + \sum_{j \ne y} e^{z_j}}\right] = C .

    The left side increases in ``eps`` from 0 to 1, so there is exactly one root. It is negative where an
    unbiased softmax already exceeds the target (``K <= 6`` for the default); ``logit_bias="auto"`` replaces a
    negative value by 0, this function returns it as it is.

    The expectation is computed by quadrature, without sampling, and the result is cached. Its error is below
    1e-12: for ``K`` from 2 to 1e6 and ``C`` from 0.001 to 0.999 it differs by at most 4e-14 from the root on
    a wider grid with a third of the step, and for ``K = 2`` by at most 2e-14 from the one-dimensional
    integral worked out in 30 digits. Monte Carlo estimates with 4e5 draws agree within their sampling error,
    0.006.

    Args:
        num_classes: number of classes ``K``, an integer of at least 2.
        target_activation: wanted mean probability ``C`` of the labelled class, 0 < C < 1.

    Returns:
        ``eps``, in units of the logits.

    Raises:
        TypeError: ``num_classes`` is not an integer or ``target_activation`` not a real number.
        ValueError: an argument is out of its range.

    Example:
        >>> round(solve_logit_bias(100), 3)
        3.034

    Source: Staats, Thamm, Rosenow, "Enhancing Noise-Robust Losses for Large-Scale Noisy Data Learning"
    (arXiv 2306.05497), Eq. 4. The paper uses 0.5 for K = 10 and 3.0 for K = 100, the rounded roots; for
    K = 1000 it uses 5.2 where the equation with ``C = 0.15`` gives 5.36.
    """
    count = _check_num_classes(num_classes)
    target = _check_target_activation(target_activation)
    if torch.compiler.is_compiling():
        # With dynamic=True both may be symbols. Text cannot hold one; the round trip is exact.
        count, target = int(f"{count}"), float(f"{target}")
    return _solve(count, target)


def _check_num_classes(num_classes: int) -> int:
    try:
        if isinstance(num_classes, bool):
            raise TypeError
        count = operator.index(num_classes)
    except TypeError:
        raise TypeError(
            f"num_classes must be an integer, got {num_classes!r} of type {type(num_classes).__name__}"
        ) from None
    if count < 2:
        raise ValueError(f"num_classes must be at least 2, got {count}")
    return count


def _check_number(name: str, value: Any, what: str = "a number") -> float:
    try:
        if isinstance(value, (bool, np.bool_, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {what}, got {value!r}") from None


def _check_target_activation(target_activation: float) -> float:
    value = _check_number("target_activation", target_activation, "a real number")
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


# A constant to the compiler, which must not trace the quadrature (and sees through a cache, hence _look_up).
_solve: Callable[[int, float], float] = torch.compiler.assume_constant_result(  # type: ignore[no-untyped-call]
    _look_up
)


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
def _rate() -> _Array:
    """e^(z - x), the rate of a Gumbel variable shifted by z, for every node x (rows) and z (columns)."""
    result: _Array = np.exp(_NORMAL - _SCORE[:, None])
    return result


@functools.lru_cache(maxsize=1)
def _log_score_distribution() -> _Array:
    """log F at the nodes ``_SCORE``; F(x) = E[exp(-e^(z - x))] with z standard normal."""
    rate = _rate()
    below = np.exp(-rate) @ _NORMAL_WEIGHT
    above = -np.expm1(-rate) @ _NORMAL_WEIGHT
    # Far to the right F rounds to 1 while its (K-1)-th power does not: there the log must come from 1 - F.
    result: _Array = np.where(below < 0.5, np.log(below), np.log1p(-np.minimum(above, 0.5)))
    return result


def mean_target_error(loss: Loss, num_classes: int, z: _Numbers, **parameters: float) -> _Numbers:
    r"""How hard a loss pulls on the logit of the labelled class of an untrained network, on average.

    For the labelled class ``k`` with logit ``z`` and the other ``K - 1 = num_classes - 1`` logits drawn from N(0, 1):

    .. math:: \langle\delta_k\rangle(z) = E\left[\frac{\partial L}{\partial z_k} \,\Big|\, z_k = z\right] .

    It is negative where gradient descent raises the logit. Where it is nearly 0 for every initial logit (``z`` from
    about -2 to 2) the loss does not start to learn: raise ``logit_bias`` or match a parameter
    (:func:`match_parameter`).

    A loss of ``p_y`` alone (found out by trial) is integrated: the distribution of the other classes'
    ``sum exp(z_j)`` is known to about 1e-11, and the result is as good for smooth losses; for phuber_ce, whose slope
    has a kink, to 1e-5 of its value. Any other loss is averaged over a fixed sample of about 2^20 random logits (16
    rows of ``K`` from 2^16 classes on), so repeated calls give the same number. Measured over five samples for ``K``
    from 3 to 1e5, the standard error is below 0.25 % of the value for NCE and NFL; margin losses, whose slope jumps,
    are good to about 0.01 in absolute terms.

    Args:
        loss: what to average: a name (``"gce"`` or ``"gce_loss"``), a Module, or a function
            ``loss(logits, target)`` giving one value per row (``reduction="none"`` is passed if it takes it). The
            ``reduction`` of a Module is replaced by ``"none"``, and ``logit_bias="auto"`` is solved for
            ``num_classes``. Where classes differ (class weights, margins per class) the labelled class is class 0.
            Losses that look at several rows at once (Z-Error) have no such average.
        num_classes: ``K``, an integer of at least 2.
        z: logit of the labelled class: a number, a tensor or an array of any shape.
        parameters: parameters of a loss given by name or as a function, ``q=0.5``, ``logit_bias=3.0``.

    Returns:
        ``<delta_k>`` in units of loss per logit: a float for a number, else float64 of the kind and shape of ``z``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``num_classes`` < 2, ``z`` not finite, an unknown loss, or a loss that is not one value per row.

    Example:
        >>> round(mean_target_error("mae", 10, 0.0), 3), round(mean_target_error("mae", 1000, 0.0), 4)
        (-0.133, -0.0012)

    Source: 2306.05497, Eq. 3 and Figures 1 to 3.
    """
    count = _check_num_classes(num_classes)
    values = _as_array(z)
    means = mean_slopes(_row_loss(loss, count, parameters), count, values.ravel()).reshape(values.shape)
    if isinstance(z, Tensor):
        return torch.from_numpy(means).to(z.device)
    return means if isinstance(z, np.ndarray) else float(means)


def match_parameter(
    loss: Loss, name: str, num_classes: int, reference_num_classes: int, reference_value: float
) -> float:
    """Carries a parameter tuned with some number of classes over to another number of classes.

    The value returned gives an untrained network with ``num_classes`` classes the same pull on the labelled class, at
    logit 0, that ``reference_value`` gives with ``reference_num_classes``: the root of
    ``mean_target_error(loss, num_classes, 0, name=value) = mean_target_error(loss, reference_num_classes, 0,
    name=reference_value)`` nearest to ``reference_value``. One equation settles one parameter; the others stay.

    Args:
        loss: as for :func:`mean_target_error`; the values of a Module are kept, and so are those that a
            ``functools.partial`` sets.
        name: the parameter to change, one of the loss's own that takes real numbers, or ``"logit_bias"``.
        num_classes: the number of classes to find a value for, an integer of at least 2.
        reference_num_classes: the number of classes for which ``reference_value`` is known to be good.
        reference_value: that value.

    Returns:
        The matching value; its error is that of :func:`mean_target_error` (1e-9 for losses of ``p_y`` alone).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the loss has no such parameter, or no value of it gives the pull that
            is asked for.

    Example:
        >>> round(match_parameter("gce", "q", 1000, 100, 0.7), 2)
        0.48

    Source: 2306.05497, section 3.3 (the losses marked "+"; genCE+ has q = 0.48 for the 1000 classes of WebVision).
    """
    count, reference_count = _check_num_classes(num_classes), _check_num_classes(reference_num_classes)
    holds = _allowed_values(loss, name)
    start = _check_number("reference_value", reference_value)
    origin = np.zeros(1)

    def error(value: float, classes: int) -> float:
        return float(mean_slopes(_row_loss(loss, classes, {name: value}), classes, origin)[0])

    goal = error(start, reference_count)

    def gap(value: float) -> float:
        return error(value, count) - goal

    at_start = gap(start)
    if at_start == 0.0:
        return start
    reached = [at_start]
    step = 0.1 * abs(start) or 0.1
    walks = [_walk(start, sign * step, at_start, gap, holds) for sign in (1.0, -1.0)]
    while walks:
        for walk in list(walks):
            segment = next(walk, None)
            if segment is None:
                walks.remove(walk)
                continue
            reached.append(segment[3])
            if segment[1] * segment[3] <= 0.0:
                return _root(gap, *segment)
    raise ValueError(
        f"no value of {name} gives {num_classes} classes the mean error {goal:.4g} of {reference_num_classes} classes "
        f"at {name}={reference_value}: it stays between {goal + min(reached):.4g} and {goal + max(reached):.4g}"
    )


def _walk(
    start: float, step: float, at_start: float, gap: Callable[[float], float], holds: Callable[[float], bool]
) -> Iterator[tuple[float, float, float, float]]:
    """Segments (from, gap there, to, gap there) going away from ``start``: growing, halved at the end of the range."""
    here, at_here = start, at_start
    for _ in range(40):
        there = here + step
        try:
            at_there = gap(there) if holds(there) else math.nan
        except ValueError:  # out of range beside the loss's other parameters
            at_there = math.nan
        if math.isfinite(at_there):
            yield here, at_here, there, at_there
            here, at_here, step = there, at_there, 1.5 * step
        else:
            step *= 0.5


def _root(gap: Callable[[float], float], a: float, at_a: float, b: float, at_b: float) -> float:
    """A root of ``gap`` between ``a`` and ``b``, where it has opposite signs: regula falsi, Illinois variant."""
    for _ in range(100):
        if at_b == 0.0 or abs(b - a) <= 1e-13 * (abs(a) + abs(b)):
            break
        middle = b - at_b * (b - a) / (at_b - at_a)
        at_middle = gap(middle)
        if at_middle * at_b < 0.0:
            a, at_a = b, at_b
        else:
            at_a *= 0.5  # the end that stays is pulled in, or convergence would be linear
        moved, b, at_b = abs(middle - b), middle, at_middle
        if moved <= 1e-13 * abs(b):
            break
    return b


def _row_loss(loss: Any, num_classes: int, parameters: dict[str, float]) -> RowLoss:
    """``loss`` as a function of logits and target with one value per row."""
    loss = unwrap(loss)
    if isinstance(loss, nn.Module):
        return _row_module(loss, num_classes, parameters)
    function: Callable[..., Tensor] = _entry(loss).reference if isinstance(loss, str) else loss
    if not callable(function):
        raise TypeError(f"loss must be a name, a Module or a function, got {type(loss).__name__}")
    options: dict[str, Any] = dict(parameters)
    if "reduction" in inspect.signature(function).parameters:
        options["reduction"] = "none"
    if options.get("logit_bias") == "auto":
        options["logit_bias"] = max(0.0, solve_logit_bias(num_classes))
    return functools.partial(function, **options)


def _row_module(module: nn.Module, num_classes: int, parameters: dict[str, float]) -> RowLoss:
    row_module: Any = copy.deepcopy(module).cpu().double()
    for name, value in parameters.items():
        old = getattr(row_module, name)
        setattr(row_module, name, torch.full_like(old, value) if isinstance(old, Tensor) else value)
    if hasattr(row_module, "reduction"):
        row_module.reduction = "none"
    if isinstance(getattr(row_module, "logit_bias", None), str):
        row_module.logit_bias = max(0.0, solve_logit_bias(num_classes))
    return cast(RowLoss, row_module)


def _entry(name: str) -> LossEntry:
    from fused_losses._arguments import LOSSES  # it imports this file

    stem = name.removesuffix("_loss")
    if stem not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[stem]


def _allowed_values(loss: Loss, name: str) -> Callable[[float], bool]:
    """Tells which values of the parameter are in its range; raises if the loss has no such real parameter."""
    from fused_losses._arguments import LOSSES
    from fused_losses._parameters import OrTensor, Range, positive_integer

    loss = unwrap(loss)
    if name == "logit_bias":
        return math.isfinite
    if isinstance(loss, functools.partial):
        loss = loss.func
    stem = loss if isinstance(loss, str) else getattr(loss, "stem", getattr(loss, "__name__", ""))
    if isinstance(loss, str) or stem.removesuffix("_loss") in LOSSES:
        ranges = _entry(stem).ranges
        if name not in ranges:
            raise ValueError(f"name must be one of {', '.join([*ranges, 'logit_bias'])}, got {name!r}")
        given = ranges[name]
        rule = given.range if isinstance(given, OrTensor) else given
        if not isinstance(rule, Range) or rule is positive_integer:
            kind = "integers" if rule is positive_integer else "no real numbers"
            raise ValueError(f"name must be a parameter that takes real numbers, got {name!r}, which takes {kind}")
        return rule.holds
    if isinstance(loss, nn.Module) and not hasattr(loss, name):
        raise ValueError(f"name must be an attribute of {type(loss).__name__}, got {name!r}")
    return math.isfinite


def _as_array(z: float | Tensor | npt.NDArray[Any]) -> _Array:
    if isinstance(z, (Tensor, np.ndarray)):
        values: _Array = as_tensor("z", z).to("cpu", torch.float64).numpy()
    elif isinstance(z, (int, float, np.number)) and not isinstance(z, bool):
        values = np.array(float(z))
    else:
        raise TypeError(f"z must be a number, a tensor or an array, got {type(z).__name__}")
    if not np.isfinite(values).all():
        raise ValueError(f"z must be finite, got {values[~np.isfinite(values)].ravel()[0]}")
    return values
