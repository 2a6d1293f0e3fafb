"""What every row loss shares: options, checks, the registry, the function factory and the Module base."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from fused_losses import _ops
from fused_losses._reference import class_dim, register_formula
from fused_losses.calibration import solve_logit_bias

LogitBias = float | Tensor | str


class RowLossOptions(TypedDict, total=False):
    """Keyword options of every classification Module."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    logit_bias: LogitBias


class RowLossFunction(Protocol):
    """The signature of every loss function; a loss's own hyper-parameters are keywords too."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        logit_bias: LogitBias = 0.0,
        sample_weight: Tensor | None = None,
        **parameters: float,
    ) -> Tensor:
        """Computes the loss."""


@dataclass(frozen=True)
class Range:
    """The allowed values of a hyper-parameter; ``rule`` completes the sentence "x must ..."."""

    rule: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raises a ValueError (TypeError if it is no number) naming the argument, the rule and the value."""
        if value.__class__ is float and self.holds(value):  # nearly always
            return
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not self.holds(value):
            raise ValueError(f"{name} must {self.rule}, got {value}")


# The bounds exclude NaN and infinities; math.isfinite would break tracing with symbolic floats.
positive = Range("satisfy 0 < value < inf", lambda v: 0.0 < v < math.inf)
non_negative = Range("satisfy 0 <= value < inf", lambda v: 0.0 <= v < math.inf)
above_one = Range("satisfy 1 < value < inf", lambda v: 1.0 < v < math.inf)
fraction = Range("satisfy 0 < value < 1", lambda v: 0.0 < v < 1.0)
closed_fraction = Range("be between 0.0 and 1.0", lambda v: 0.0 <= v <= 1.0)
positive_integer = Range("be an integer >= 1", lambda v: 1.0 <= v < math.inf and v == int(v))


@dataclass(frozen=True)
class LossEntry:
    """A loss in the registry :data:`LOSSES`.

    ``name`` is the stem ("gce"), ``function`` the fused function, ``reference`` the same in plain PyTorch,
    ``parameters`` the own hyper-parameters with their defaults and ``module`` the Module class.
    """

    name: str
    function: RowLossFunction
    reference: RowLossFunction
    parameters: dict[str, float]
    ranges: dict[str, Range]
    constants: tuple[float, ...] = ()
    modules: list[type[RowLossModule]] = field(default_factory=list)

    @property
    def module(self) -> type[RowLossModule]:
        """The Module class."""
        return self.modules[0]

    def pack(self, parameters: dict[str, float]) -> list[float]:
        """The operator's ``params``: checked values in the order of the C++ header, then constants."""
        if not parameters:
            return [*self.parameters.values(), *self.constants]
        unknown = parameters.keys() - self.parameters.keys()
        if unknown:
            raise TypeError(f"{self.name}_loss() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        for name, value in parameters.items():
            self.ranges[name].check(name, value)
        return [*(self.parameters | parameters).values(), *self.constants]


LOSSES: dict[str, LossEntry] = {}


def resolve_logit_bias(logit_bias: LogitBias, logits: Tensor) -> tuple[float, Tensor | None]:
    """The operator's ``logit_bias`` and ``logit_bias_tensor``; "auto" is solved from the number of classes."""
    if logit_bias.__class__ is float and logit_bias == 0.0:  # nearly always
        return 0.0, None
    if isinstance(logit_bias, Tensor):
        return 0.0, logit_bias
    if isinstance(logit_bias, str):
        check_logit_bias(logit_bias)
        num_classes = int(logits.shape[class_dim(logits)]) if logits.dim() else 1
        return (max(0.0, solve_logit_bias(num_classes)) if num_classes > 1 else 0.0), None
    check_logit_bias(logit_bias)
    return logit_bias, None


_finite = Range("satisfy -inf < value < inf", lambda v: -math.inf < v < math.inf)


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
    else:
        _finite.check("logit_bias", logit_bias)


def check_reduction(reduction: str) -> None:
    """Raises unless it is one of the three reductions."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


_OPTIONS_DOC = """
    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or bfloat16.
            Channels-last and NCHW images are read in place.
        target: class indices in ``[0, C)`` or ``ignore_index``, the shape of ``logits`` without its class
            dimension; int64, int32, int16 or uint8.
{own}        weight: class weights ``(C,)``; a row counts ``weight[target]``.
        ignore_index: rows with this target have loss and gradient zero and do not count in the mean.
        reduction: ``"none"`` (weighted loss per row), ``"sum"``, or ``"mean"``: sum of weighted losses over sum of
            weights; 0 with zero gradient where that sum is 0 (``torch`` gives NaN).
        logit_bias: added to the target's logit before the softmax (2306.05497): a number, a 0-dim tensor, or
            ``"auto"``, which solves Eq. 4 for the number of classes (:func:`fused_losses.calibration.solve_logit_bias`,
            not below 0).
        sample_weight: weight per row, the shape of ``target``.

    Returns:
        The loss in float32, float64 for float64 logits; a scalar unless ``reduction="none"``.

    Raises:
        ValueError: a hyper-parameter out of range, an unknown ``reduction``, mismatching batch sizes.
        RuntimeError: shapes or dtypes that do not fit.
        IndexError: a target out of range (on CUDA: a device assertion).
"""

_COMMON = [
    inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None"),
    inspect.Parameter("ignore_index", inspect.Parameter.KEYWORD_ONLY, default=-100, annotation="int"),
    inspect.Parameter("reduction", inspect.Parameter.KEYWORD_ONLY, default="mean", annotation="str"),
    inspect.Parameter("logit_bias", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation="float | Tensor | str"),
    inspect.Parameter("sample_weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None"),
]


def _signature(parameters: dict[str, float]) -> inspect.Signature:
    tensors = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
        for name in ("logits", "target")
    ]
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation="float")
        for name, default in parameters.items()
    ]
    return inspect.Signature([*tensors, *own, *_COMMON], return_annotation="Tensor")


def _make_function(name: str, operator: Callable[..., Tensor]) -> RowLossFunction:
    def function(
        logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        logit_bias: LogitBias = 0.0,
        sample_weight: Tensor | None = None,
        **parameters: float,
    ) -> Tensor:
        params = LOSSES[name].pack(parameters)
        bias, bias_tensor = resolve_logit_bias(logit_bias, logits)
        return operator(logits, target, weight, sample_weight, bias_tensor, name, params, bias, ignore_index, reduction)

    return function


def loss_of_target(
    *, constants: tuple[float, ...] = (), **ranges: Range
) -> Callable[[Callable[..., Tensor]], RowLossFunction]:
    """Declares a loss that is a function of ``t = log p_y``.

    Decorates its plain PyTorch formula ``x_loss(t, own parameters)``, whose name, defaults and docstring become those
    of the fused function; the formula itself is the reference. ``ranges`` gives the range of each parameter in the
    order of the C++ struct; ``constants`` are appended to them.
    """

    def decorate(formula: Callable[..., Tensor]) -> RowLossFunction:
        public_name = formula.__name__
        stem = public_name.removesuffix("_loss")
        defaults = {name: p.default for name, p in inspect.signature(formula).parameters.items() if name in ranges}
        function = _make_function(stem, _ops.row_loss)
        reference = _make_function(stem, _ops.row_loss_reference)
        doc = inspect.getdoc(formula) or ""
        summary, _, own = doc.partition("\nArgs:\n")
        own = "".join(f"        {line.strip()}\n" for line in own.strip().splitlines())
        for made in (function, reference):
            made.__name__ = made.__qualname__ = public_name  # type: ignore[attr-defined]
            made.__module__ = formula.__module__
            made.__doc__ = summary.rstrip() + "\n" + _OPTIONS_DOC.format(own=own)
            made.__signature__ = _signature(defaults)  # type: ignore[attr-defined]
        LOSSES[stem] = LossEntry(stem, function, reference, defaults, ranges, constants)
        register_formula(stem, formula)
        return function

    return decorate


class RowLossModule(nn.Module):
    """Base of the loss Modules: holds the options and calls the loss's function.

    A tensor given for ``weight`` or ``logit_bias`` becomes a buffer: it moves with the Module, is saved in its
    ``state_dict``, and a new value written into it takes effect at the next call, compiled or captured. Numbers stay
    plain attributes and can be reassigned.
    """

    stem: str
    weight: Tensor | None

    def __init_subclass__(cls, stem: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if stem is not None:
            cls.stem = stem
            LOSSES[stem].modules.append(cls)

    def __init__(
        self,
        parameters: dict[str, float],
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        logit_bias: LogitBias = 0.0,
    ) -> None:
        super().__init__()
        LOSSES[self.stem].pack(parameters)
        check_reduction(reduction)
        check_logit_bias(logit_bias)
        self.parameter_names = tuple(parameters)
        for name, value in parameters.items():
            setattr(self, name, value)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        if isinstance(logit_bias, Tensor):
            self.register_buffer("logit_bias", logit_bias)
        else:
            self.logit_bias = logit_bias

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Computes the loss of ``logits`` for ``target``; ``sample_weight`` is one weight per row."""
        return LOSSES[self.stem].function(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            logit_bias=self.logit_bias,
            sample_weight=sample_weight,
            **{name: getattr(self, name) for name in self.parameter_names},
        )

    def extra_repr(self) -> str:
        """Parameters, then the options that differ from their defaults."""
        shown = {name: getattr(self, name) for name in self.parameter_names}
        defaults = {"ignore_index": -100, "reduction": "mean", "logit_bias": 0.0}
        for name, default in defaults.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                shown[name] = value.item() if isinstance(value, Tensor) else value
        if self.weight is not None:
            shown["weight"] = f"Tensor[{self.weight.numel()}]"
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
