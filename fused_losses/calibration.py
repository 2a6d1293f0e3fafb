"""Parameters computed from the number of classes or of training samples, instead of found by training."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fused_losses._arguments import LOSSES, entry_named
from fused_losses._arrays import as_tensor
from fused_losses._calibration_plot import plot_mean_target_error
from fused_losses._common import Criterion, RowLossModule
from fused_losses._logit_bias import solve_logit_bias
from fused_losses._mean_error import RowLoss, mean_slopes
from fused_losses._parameters import OrTensor, Range, check_num_classes, check_number, iterations, positive
from fused_losses._roots import nearest_root
from fused_losses._unwrap import unwrap
from fused_losses.corrections import BackwardCorrectionLoss, ForwardCorrectionLoss

__all__ = [
    "hem_margin",
    "hem_plus_margins",
    "match_parameter",
    "mean_target_error",
    "plot_mean_target_error",
    "solve_logit_bias",
]

_Array = npt.NDArray[np.float64]
_ROW_LOSSES = (RowLossModule, ForwardCorrectionLoss, BackwardCorrectionLoss)  # of our Modules
_OPTIONS = ("weight", "ignore_index", "reduction", "logit_bias")  # that each registered loss has
Loss = str | nn.Module | Callable[..., Tensor]
_Numbers = TypeVar("_Numbers", float, Tensor, npt.NDArray[Any])


@torch.inference_mode(False)  # it takes derivatives
def mean_target_error(loss: Loss, num_classes: int, z: _Numbers, **parameters: float) -> _Numbers:
    """The mean derivative of a loss in the logit of the labelled class, for an untrained network.

    It is ``E[dL / dz_k | z_k = z]`` for the labelled class k with logit ``z``, and the other ``K - 1 = num_classes -
    1`` logits drawn from N(0, 1); the paper writes ``<delta_k>(z)``. It is negative where gradient descent raises the
    logit. Where it is nearly 0 for every initial logit (``z`` from about -2 to 2), the loss does not start to learn:
    use ``logit_bias``, or match a parameter (:func:`match_parameter`).

    A loss of ``p_y`` alone is integrated, to about 1e-11 (phuber_ce and phuber_gce, whose slopes have a kink, to 1e-5;
    where the slope jumps, as that of truncated_gce and, of two classes, of ece and its sums, to about 0.001). Any other
    loss is averaged over a fixed sample of about 2^20 logits, or 16 rows of K from 2^16 classes on, so repeated
    calls give the same number. Its standard error, over five samples and K from 3 to 1e5, is below 0.25 % of the value
    for NCE and NFL and about 0.01 in absolute terms for margin losses.

    Args:
        loss: a name (``"gce"`` or ``"gce_loss"``), a Module, or a function ``loss(logits, target)`` that gives one
            value per row (it gets ``reduction="none"`` if it takes that). The ``reduction`` of a Module is not used,
            and ``logit_bias="auto"`` is solved for ``num_classes``. Where classes differ (class weights, margins per
            class) the labelled class is class 0. Losses that compare rows (Z-Error, SmallLoss) have no such mean;
            these and wrappers (LogitNorm, GlobalMean) are refused.
        num_classes: K, an integer of at least 2.
        z: logit of the labelled class: a number, or a tensor or array of any shape.
        parameters: parameters of the loss, such as ``q=0.5`` or ``logit_bias=3.0``. They take the place of those of a
            Module.

    Returns:
        In units of loss per logit: a float for a number, else float64 of the kind and shape of ``z``.

    Raises:
        TypeError: an argument is of the wrong type, ``loss`` a Module of this package that is no loss of single rows,
            or the loss has no such parameter.
        ValueError: ``num_classes`` is below 2, ``z`` is not finite, the loss is unknown or does not give one value per
            row.

    Example:
        >>> round(mean_target_error("mae", 10, 0.0), 3), round(mean_target_error("mae", 1000, 0.0), 4)
        (-0.133, -0.0012)

    Source: 2306.05497, Eq. 3 and Figures 1 to 3.
    """
    count = check_num_classes(num_classes)
    values = _as_array(z)
    means = mean_slopes(_row_loss(loss, count, parameters), count, values.ravel()).reshape(values.shape)
    if isinstance(z, Tensor):
        return torch.from_numpy(means).to(z.device)
    return means if isinstance(z, np.ndarray) else float(means)


@torch.inference_mode(False)
def match_parameter(
    loss: Loss, name: str, num_classes: int, reference_num_classes: int, reference_value: float
) -> float:
    """The value of a parameter for another number of classes, from one that is known to be good.

    With the returned value, an untrained network with ``num_classes`` classes gets the same mean derivative at logit 0
    as ``reference_value`` gives with ``reference_num_classes``: it is the root of ``mean_target_error(loss,
    num_classes, 0, name=value) = mean_target_error(loss, reference_num_classes, 0, name=reference_value)`` nearest to
    ``reference_value``, found in steps that begin with a tenth of it: two roots within a step may go unnoticed. One
    equation fixes one parameter; all others stay.

    Args:
        loss: as for :func:`mean_target_error`. The other parameters of a Module, or of a ``functools.partial``, are
            used.
        name: the parameter to change: one of the loss's own that takes real numbers, or ``"logit_bias"``.
        num_classes: the number of classes to find a value for, an integer of at least 2.
        reference_num_classes: the number of classes for which ``reference_value`` is good, an integer of at least 2.
        reference_value: that value.

    Returns:
        The value; its error is that of :func:`mean_target_error` (1e-9 for losses of ``p_y`` alone, if their slope is
        smooth). A mean over a sample may go in steps, as for ``ece`` and margin losses, where a row counts or not:
        with the 16 rows of 2^16 classes on in steps of 1/16. Then the value is that of a step, and the two sides
        differ by up to its height.

    On two cores a loss of ``p_y`` alone takes a second for 10^3 classes, and up to half a minute for 10^6. Any other
    takes up to some hundred means over a sample, half a minute, and two minutes for 10^6 classes.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the loss has no such parameter, or no value solves the equation.

    Example:
        >>> round(match_parameter("gce", "q", 1000, 100, 0.7), 2)
        0.48

    Source: 2306.05497, section 3.3 (the losses marked "+"; genCE+ has q = 0.48 for the 1000 classes of WebVision).
    """
    count, reference_count = check_num_classes(num_classes), check_num_classes(reference_num_classes)
    holds = _allowed_values(loss, name)
    start = check_number("reference_value", reference_value)
    if not math.isfinite(start):
        raise ValueError(f"reference_value must be finite, got {reference_value}")
    origin = np.zeros(1)

    def error(value: float, classes: int) -> float:
        return float(mean_slopes(_row_loss(loss, classes, {name: value}), classes, origin)[0])

    goal = error(start, reference_count)

    def gap(value: float) -> float:
        return error(value, count) - goal

    root, reached = nearest_root(gap, start, holds)
    if root is not None:
        return root
    raise ValueError(
        f"no value of {name} gives {num_classes} classes the mean error {goal:.4g} of {reference_num_classes} classes "
        f"at {name}={reference_value}: it stays between {goal + min(reached):.4g} and {goal + max(reached):.4g}"
    )


def _unwrapped(loss: Any) -> Any:
    """``loss`` without the wrappers of torch; raises where it is nothing that could give one value per row."""
    loss = unwrap(loss)
    if isinstance(loss, type) or not (isinstance(loss, str) or callable(loss)):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a name, a Module or a function, got {kind}")
    if isinstance(loss, Criterion) and not isinstance(loss, _ROW_LOSSES):
        raise TypeError(
            "loss must be a name, a function, or a Module of a loss of single rows, without wrappers, got "
            f"{type(loss).__name__}"
        )
    return loss


def _row_loss(loss: Any, num_classes: int, parameters: dict[str, float]) -> RowLoss:
    """``loss`` as a function of logits and target with one value per row."""
    loss = _unwrapped(loss)
    if isinstance(loss, nn.Module):
        return _row_module(loss, num_classes, parameters)
    function: Callable[..., Tensor] = entry_named(loss).reference if isinstance(loss, str) else loss
    options: dict[str, Any] = dict(parameters)
    if "reduction" in inspect.signature(function).parameters:
        options["reduction"] = "none"
    if options.get("logit_bias") == "auto":
        options["logit_bias"] = max(0.0, solve_logit_bias(num_classes))
    return functools.partial(function, **options)


def _row_module(module: nn.Module, num_classes: int, parameters: dict[str, float]) -> RowLoss:
    row_module: Any = copy.deepcopy(module).cpu().double()
    for name, value in parameters.items():
        if not _has_parameter(module, name):
            raise TypeError(f"{type(module).__name__} has no parameter {name!r}")
        old = getattr(row_module, name)
        new: Any = torch.full_like(old, value) if isinstance(old, Tensor) else value
        setattr(row_module, name, nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new)
    if isinstance(module, RowLossModule) and "logit_bias" in parameters:
        row_module.train()  # else it has none
    if hasattr(row_module, "reduction"):
        row_module.reduction = "none"
    bias = getattr(row_module, "logit_bias", None)
    if isinstance(bias, str) and bias == "auto":
        row_module.logit_bias = max(0.0, solve_logit_bias(num_classes))
    return cast(RowLoss, row_module)


def _has_parameter(module: nn.Module, name: str) -> bool:
    if isinstance(module, RowLossModule):
        return name in (*LOSSES[module.stem].ranges, *_OPTIONS)
    return hasattr(module, name) and not callable(getattr(module, name))


def _allowed_values(loss: Loss, name: str) -> Callable[[float], bool]:
    """Tells which values of the parameter are in its range; raises if the loss has no such real parameter."""
    loss = _unwrapped(loss)
    is_other_module = isinstance(loss, nn.Module) and not isinstance(loss, RowLossModule)
    if name == "logit_bias" and not is_other_module:
        return math.isfinite
    if isinstance(loss, functools.partial):
        loss = loss.func
    stem = loss if isinstance(loss, str) else getattr(loss, "stem", getattr(loss, "__name__", ""))
    if isinstance(loss, str) or stem.removesuffix("_loss") in LOSSES:
        ranges = entry_named(stem).ranges
        if name not in ranges:
            raise ValueError(f"name must be one of {', '.join([*ranges, 'logit_bias'])}, got {name!r}")
        given = ranges[name]
        rule = given.range if isinstance(given, OrTensor) else given
        if not isinstance(rule, Range) or rule is iterations:
            kind = "integers" if rule is iterations else "no real numbers"
            raise ValueError(f"name must be a parameter that takes real numbers, got {name!r}, which takes {kind}")
        return rule.holds
    if is_other_module and not hasattr(loss, name):
        raise ValueError(f"name must be an attribute of {type(loss).__name__}, got {name!r}")
    if is_other_module and not _is_real(getattr(loss, name)):
        raise ValueError(f"name must be a parameter that takes real numbers, got {name!r}")
    return math.isfinite


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, Tensor)) and not isinstance(value, bool)


def _as_array(z: float | Tensor | npt.NDArray[Any]) -> _Array:
    if isinstance(z, (Tensor, np.ndarray)):
        values: _Array = as_tensor("z", z).to("cpu", torch.float64).numpy()
    elif _is_real(z):
        values = np.array(float(z))
    else:
        raise TypeError(f"z must be a number, a tensor or an array, got {type(z).__name__}")
    if not np.isfinite(values).all():
        raise ValueError(f"z must be finite, got {values[~np.isfinite(values)].ravel()[0]}")
    return values


# ---- Margins (2501.12191) ------------------------------------------------------------------------------------------


def hem_margin(num_samples: int, M: float = 2000.0) -> float:
    """The margin of HEM for a training set: ``sqrt(M / num_samples)``.

    Fewer samples get a larger margin.

    Args:
        num_samples: training samples of all classes together, at least 1.
        M: the paper's constant, > 0.

    Returns:
        The margin in units of the logits, for ``HEMLoss(margin=...)``.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.

    Example:
        >>> hem_margin(50_000)  # CIFAR-10 and CIFAR-100
        0.2

    Source: 2501.12191, mu = sqrt(M / N) with M = 2000.
    """
    number = check_number("num_samples", num_samples)
    if not 1 <= number < math.inf:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    return math.sqrt(positive.pack("M", check_number("M", M)) / number)


def hem_plus_margins(
    class_counts: Sequence[float] | Tensor | npt.NDArray[Any], M: float = 2000.0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The margins of HEM+, one per class: ``sqrt(M / (C * class_counts[i]))``.

    Rare classes get a larger margin. With equally many samples in all C classes every margin is that of
    :func:`hem_margin`.

    Args:
        class_counts: training samples of each class ``(C,)``, all at least 1: a tensor, an array or a list.
        M: the paper's constant, > 0.
        dtype: of the result, floating point; None for torch's default dtype.

    Returns:
        The margins ``(C,)`` on the CPU, in units of the logits, for ``HEMLoss(margin=...)``.

    Raises:
        TypeError: ``class_counts`` holds no numbers.
        ValueError: ``class_counts`` is empty or not one-dimensional, a class has no samples (its margin would be
            infinite; leave the class out, or choose a count), or ``M`` or ``dtype`` is out of range.

    Example:
        >>> hem_plus_margins([5000, 500])
        tensor([0.4472, 1.4142])

    Source: 2501.12191, mu_i = sqrt(M / (n s_i)). Deviation from other code, which clamps ``mu_i`` relative to the mean:
    nothing is clamped.
    """
    M = positive.pack("M", check_number("M", M))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point dtype, got {dtype}")
    counts = as_tensor("class_counts", class_counts).to("cpu", torch.float64).numpy()
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError(f"class_counts must have one count per class, got shape {counts.shape}")
    bad = np.flatnonzero(~((counts >= 1.0) & (counts < math.inf)))
    if bad.size:
        raise ValueError(f"class_counts must be at least 1 for every class, got {counts[bad[0]]:g} for class {bad[0]}")
    return torch.from_numpy(np.sqrt(M / (counts.size * counts))).to(dtype or torch.get_default_dtype())
