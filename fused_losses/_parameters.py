"""What a hyper-parameter may be: checks with one kind of message, and the number that the operators get for it."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fused_losses._plain import in_forward_mode, reads_values


class ParameterRange(Protocol):
    """The allowed values of a hyper-parameter."""

    def pack(self, name: str, value: Any) -> float:
        """The operator's number for ``value``; raises naming the argument, the rule and the value."""

    def unpack(self, number: Any) -> Any:
        """The value that ``number`` stands for."""


_Made = TypeVar("_Made", bound=Callable[..., Any])

# What other implementations call things, and what to do here.
_HINTS = {
    "num_classes": "leave it out, the logits tell the number of classes",
    "scale": "multiply the loss",
    "size_average": "reduction='mean' or 'sum'",
    "reduce": "reduction='none'",
    "alpha": "class weights are given as weight, a tensor of one number per class",
    "weight": "losses of class labels have class weights; weights of rows or entries are sample_weight, in the call",
    "pos_weight": "z_error_bce_with_logits has it; losses of class labels have weight, one number per class",
    "statistic": "the Z-Error losses have it, that of yes/no labels as space",
    "space": "the other Z-Error losses call it statistic",
    "ignore_index": "losses of class labels have it; for the others a missing label is NaN",
    "label_smoothing": "cross_entropy and bi_tempered have it; most others take smoothed class probabilities as target",
}


def unexpected_keyword(called: str, name: str) -> TypeError:
    """The error for a keyword that ``called`` does not have."""
    hint = f"; {_HINTS[name]}" if name in _HINTS else ""
    return TypeError(f"{called}() got an unexpected keyword argument {name!r}{hint}")


def explains_keywords(function: _Made) -> _Made:
    """``function``, a loss's or a constructor, which answers keywords that it does not have by the error above."""
    known = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return function  # what it calls will look
    names = frozenset(known)

    @functools.wraps(function)
    def explaining(*args: Any, **options: Any) -> Any:
        for name in options:
            if name not in names:
                is_constructor = function.__name__ == "__init__"
                raise unexpected_keyword(type(args[0]).__name__ if is_constructor else function.__name__, name)
        return function(*args, **options)

    return explaining  # type: ignore[return-value]


def python_number(value: Any) -> Any:
    """A NumPy scalar, or an array of one, as the number of Python's that it holds; anything else as it is."""
    if not (isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0):
        return value
    # The compiler cannot trace an integer of NumPy's, made in the code that it compiles, to a number.
    return torch.as_tensor(value).item() if torch.compiler.is_compiling() else value.item()


def plain_number(name: str, value: Any) -> Any:
    """What torch's losses take for a number - a bool, a NumPy scalar, a 0-dim array or tensor - as the number of
    Python's that it holds; anything else as it is. Raises a TypeError for a tensor whose derivative would be lost."""
    if isinstance(value, Tensor) and value.dim() == 0 and not (value.is_meta or value.is_complex()):
        if value.requires_grad or in_forward_mode(value):
            raise TypeError(f"{name} must be a number, got a tensor that requires a gradient, and would get none")
        value = value.item()
    value = python_number(value)
    return int(value) if isinstance(value, bool) else value


def kept_value(name: str, value: Any, rule: ParameterRange) -> Any:
    """``value`` as a Module keeps it: a tensor only where ``rule`` has a place for one."""
    if isinstance(rule, Switch) or (isinstance(rule, OrTensor) and isinstance(value, Tensor)):
        return python_number(value)
    if _is_bool(value):
        rule.pack(name, value)  # raises where a bool is none
    return plain_number(name, value)


def assigned(rule: ParameterRange) -> Callable[[str, Any], Any]:
    """The check of what is assigned to a Module's attribute: gives what is kept, or raises."""

    def check(name: str, value: Any) -> Any:
        rule.pack(name, value)
        return kept_value(name, value, rule)

    return check


def _is_bool(value: Any) -> bool:
    return value.dtype == torch.bool if isinstance(value, Tensor) else isinstance(python_number(value), bool)


def integer(name: str, value: Any) -> int:
    """``value``, an integer of Python, NumPy or a 0-dim tensor. Raises a TypeError on anything else, a ValueError on
    one that operators cannot take."""
    value = python_number(value)
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype in _INTEGERS:
        return value if torch.compiler.is_compiling() else int(value)  # type: ignore[return-value]  # operators take it
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    _check_64_bits(name, value)
    return value  # type: ignore[return-value]  # symbolic while tracing


def _check_64_bits(name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {value}")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_num_classes(num_classes: int, fewest: int = 2) -> int:
    return check_index("num_classes", num_classes, fewest)


def check_index(name: str, value: Any, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """``value``, an integer of any kind."""
    try:
        if isinstance(value, bool):
            raise TypeError
        index = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if index < least:
        raise ValueError(f"{name} must be at least {least}, got {index}")
    if index > most:
        raise ValueError(f"{name} must be at most {most}, got {index}")
    return index


def check_number(name: str, value: Any, what: str = "a number") -> float:
    try:
        if isinstance(value, (bool, np.bool_, str, bytes, bytearray)):
            raise TypeError
        return float(value)
    except OverflowError:  # of an integer
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {what}, got {value!r}") from None


@dataclass(frozen=True)
class Range:
    """Numbers; ``rule`` completes the sentence "x must ..." for those that the loss is defined for.

    Of these, kernels that compute in float32 can use the ones between ``low`` and ``high``, and 0 where it is defined;
    the others are refused, whatever the dtype of the logits. Beyond these bounds results would be off by more than a
    hundredth, or infinite, or NaN (tests/test_parameter_edges.py goes to all of them). If ``below_share``, a call's
    number must besides be below 1 / C.
    """

    rule: str
    defined: Callable[[Any], bool]
    low: float = -math.inf
    high: float = math.inf
    below_share: bool = False

    def holds(self, value: Any) -> bool:
        """Whether it is an allowed number."""
        return self.defined(value) and (self.low <= value <= self.high or value == 0.0)

    def pack(self, name: str, value: Any) -> float:
        """``value`` itself. Raises a ValueError where it is out of range, a TypeError where it is no number."""
        if value.__class__ is float and self.holds(value):  # nearly always
            return value
        value = plain_number(name, value)
        if not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            hint = "; class weights are given as weight=" if isinstance(value, Tensor) and value.dim() == 1 else ""
            raise TypeError(f"{name} must be a number, got {type(value).__name__}{hint}")
        is_endless = isinstance(value, int) and abs(value) > sys.float_info.max
        if is_endless or not self.defined(value):
            raise ValueError(f"{name} must {self.rule}, got {value}")
        if not self.holds(value):
            bounds = f"at most {self.high}" if self.low == -math.inf else f"between {self.low} and {self.high}"
            zero = "0 or " if self.low > 0.0 and self.defined(0.0) else ""
            raise ValueError(f"{name} must be {zero}{bounds}, where float32 can compute it, got {value}")
        return value  # type: ignore[return-value]  # symbolic while tracing

    def unpack(self, number: Any) -> Any:
        """``number`` itself."""
        return number


@dataclass(frozen=True)
class Count(Range):
    """A range of integers, none of which is a bool, as in torch."""

    def pack(self, name: str, value: Any) -> float:
        """``value`` itself. Raises as :class:`Range` does."""
        if _is_bool(value):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        number = super().pack(name, value)
        _check_64_bits(name, number)
        return number


# The bounds exclude NaN and, but for thresholds, infinities; math.isfinite would break tracing with symbolic floats.
positive = Range("satisfy 0 < value < inf", lambda v: 0.0 < v < math.inf)
positive_or_inf = Range("satisfy 0 < value <= inf", lambda v: v > 0.0)
non_negative = Range("satisfy 0 <= value < inf", lambda v: 0.0 <= v < math.inf)
above_one = Range("satisfy 1 < value < inf", lambda v: 1.0 < v < math.inf)
fraction = Range("satisfy 0 < value < 1", lambda v: 0.0 < v < 1.0)
closed_fraction = Range("be between 0.0 and 1.0", lambda v: 0.0 <= v <= 1.0)
positive_integer = Count("be an integer >= 1", lambda v: 1.0 <= v < math.inf and v == int(v))
not_negative_integer = Count("be an integer >= 0", lambda v: 0.0 <= v < math.inf and v == int(v))
iterations = replace(positive_integer, high=1000)  # of a loop that kernels run for every row
# Numbers that logits and losses are multiplied with or added to. Products of two stay far from the ends of float32.
finite = Range("satisfy -inf < value < inf", lambda v: -math.inf < v < math.inf, -1e15, 1e15)
factor = replace(non_negative, low=1e-15, high=1e15)
positive_factor = replace(positive, low=1e-15, high=1e15)
# Exponents of p and of 1 - p, small enough that the power does not depend on digits that p does not have.
exponent = replace(positive, low=1e-15, high=1e4)
focusing = replace(non_negative, low=1e-15, high=1e4)
# Exponents of terms that are divided by their sum: with two equal classes each term is 2^-gamma.
nfl_focusing = replace(non_negative, low=1e-15, high=50.0)


def check_power(base: float, q: float, base_name: str) -> None:
    """Raises unless ``base ** q`` leaves room for factors in float32."""
    if base > 1e3 or q > 10.0:  # else it is below 1e30
        largest = 30.0 * math.log(10.0) / math.log(base)
        if q > largest:
            raise ValueError(
                f"q must be at most {largest:.4g} with {base_name} = {base}, where float32 can compute it, got {q}"
            )


@dataclass(frozen=True)
class Switch:
    """True or False; 1 or 0 to the operator."""

    def pack(self, name: str, value: Any) -> float:
        """1.0 or 0.0. Raises a TypeError unless ``value`` is a bool."""
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        return float(value)

    def unpack(self, number: Any) -> Any:
        """True or False."""
        return bool(number)


switch = Switch()


@dataclass(frozen=True)
class Choice:
    """One of some strings; the operator gets its position."""

    options: tuple[str, ...]

    def pack(self, name: str, value: Any) -> float:
        """The position of ``value`` among the options. Raises a ValueError unless it is one of them."""
        return float(self.options.index(check_choice(name, value, self.options)))

    def unpack(self, number: Any) -> Any:
        """The option at that position."""
        return self.options[int(number)]


@dataclass(frozen=True)
class OrNone:
    """A range or None, for which the operator gets 0."""

    range: Range

    def pack(self, name: str, value: Any) -> float:
        """``value``, or 0.0 for None. Raises as the range does."""
        return 0.0 if value is None else self.range.pack(name, value)

    def unpack(self, number: Any) -> Any:
        """None for 0."""
        return None if number == 0.0 else number


@dataclass(frozen=True)
class OrTensor:
    """A range, or a floating point tensor, 0-dim or, if ``per_class``, ``(C,)``, which the operator gets as it is."""

    range: Range
    per_class: bool = False

    def pack(self, name: str, value: Any) -> float:
        """``value``, or 1.0 to hold the place of a tensor, for which kernels are chosen that take any number.

        Entries of a constant tensor are looked at where that waits for nobody.
        """
        if not isinstance(value, Tensor):
            return self.range.pack(name, value)
        if value.dim() > self.per_class or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a number or a floating point tensor, 0-dim{' or of shape (C,)' * self.per_class}, got "
                f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            )
        if reads_values(value) and not value.requires_grad:  # what is learnt may pass an end on its way
            self.check_entries(name, value)
        return 1.0

    def unpack(self, number: Any) -> Any:
        """The number or the tensor itself."""
        return number

    def check_entries(self, name: str, value: float | Tensor) -> None:
        """Raises unless every entry of a tensor is in the range. It reads the tensor."""
        if isinstance(value, Tensor):
            check_entries(name, value, self.range)


def check_entries(name: str, tensor: Tensor, range: Range) -> None:
    """Raises unless all are in the range, which has no gaps. It reads the tensor."""
    if not tensor.is_meta and tensor.numel() > 0:
        for entry in torch.aminmax(tensor.detach()):  # both NaN if one is
            range.pack(f"every entry of {name}", entry.item())


def check_choice(name: str, value: Any, options: Collection[str]) -> str:
    """``value``. Raises a ValueError unless it is one of the options, which it lists."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be {one_of(options)}, got {value!r}")
    return value


def one_of(options: Collection[str]) -> str:
    """The options as words: ``'none', 'mean' or 'sum'``."""
    *most, last = map(repr, options)
    return f"{', '.join(most)} or {last}"
