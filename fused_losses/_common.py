"""What every row loss shares: options, checks, the registry and the Module base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict

from torch import Tensor, nn

from fused_losses import _ops
from fused_losses._parameters import Rule, finite
from fused_losses._reference import REDUCTIONS, check_reduction, class_dim
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
        **parameters: Any,
    ) -> Tensor:
        """Computes the loss."""


@dataclass(frozen=True)
class LossEntry:
    """A loss in the registry :data:`LOSSES`.

    ``name`` is the stem ("gce"), ``function`` the fused function, ``reference`` the same in plain PyTorch,
    ``arguments`` what both hand to their operator, as a tuple; ``parameters`` the own hyper-parameters with their
    defaults, ``ranges`` what each may be, ``check`` what they may be together, ``reductions`` the allowed ones and
    ``module`` the Module class.
    """

    name: str
    function: RowLossFunction
    reference: RowLossFunction
    arguments: Callable[..., Any]
    parameters: dict[str, Any]
    ranges: Mapping[str, Rule]
    constants: tuple[float, ...] = ()
    reductions: tuple[str, ...] = REDUCTIONS
    check: Callable[..., None] | None = None
    modules: list[type[RowLossModule]] = field(default_factory=list)
    packed: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Packs the defaults once."""
        packed = {name: self.ranges[name].pack(name, default) for name, default in self.parameters.items()}
        object.__setattr__(self, "packed", packed)

    @property
    def module(self) -> type[RowLossModule]:
        """The Module class."""
        return self.modules[0]

    def pack(self, parameters: dict[str, Any]) -> list[float]:
        """The operator's ``params``: checked numbers in the order of the C++ header, then constants."""
        if not parameters:
            return [*self.packed.values(), *self.constants]
        packed = self.packed.copy()
        for name, value in parameters.items():
            rule = self.ranges.get(name)
            if rule is None:
                raise TypeError(f"{self.name}_loss() got an unexpected keyword argument {name!r}")
            packed[name] = rule.pack(name, value)
        if self.check is not None:
            self.check(**packed)
        return [*packed.values(), *self.constants]


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
        finite.pack("logit_bias", logit_bias)


class RowLossModule(nn.Module):
    """Base of the loss Modules: holds the options and calls the loss's function.

    A tensor given for ``weight``, ``logit_bias`` or ``margin`` becomes a buffer: it moves with the Module, is saved in
    its ``state_dict``, and a new value written into it takes effect at the next call, compiled or captured. Numbers
    stay plain attributes and can be reassigned.
    """

    stem: str
    weight: Tensor | None
    parameter_names: tuple[str, ...] = ()

    def __init_subclass__(cls, stem: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if stem is not None:
            cls.stem = stem
            LOSSES[stem].modules.append(cls)

    def __init__(
        self,
        parameters: dict[str, Any],
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        logit_bias: LogitBias = 0.0,
    ) -> None:
        super().__init__()
        entry = LOSSES[self.stem]
        self._params: list[float] | None = entry.pack(parameters)
        check_reduction(reduction, entry.reductions)
        check_logit_bias(logit_bias)
        for name, value in parameters.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.parameter_names = tuple(parameters)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        if isinstance(logit_bias, Tensor):
            self.register_buffer("logit_bias", logit_bias)
        else:
            self.logit_bias = logit_bias

    def __setattr__(self, name: str, value: Any) -> None:
        """Notices that a hyper-parameter has a new value, so that calls need not look."""
        super().__setattr__(name, value)
        if name in self.parameter_names:
            self._params = None

    def _pack(self) -> list[float]:
        params = LOSSES[self.stem].pack({name: getattr(self, name) for name in self.parameter_names})
        self._params = params
        return params

    def _tensor(self, name: str) -> Any:
        # Module's own look-up takes as long as a small loss.
        buffers = self._buffers
        return buffers[name] if name in buffers else getattr(self, name)

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Computes the loss of ``logits`` for ``target``; ``sample_weight`` is one weight per row."""
        bias, bias_tensor = resolve_logit_bias(self._tensor("logit_bias"), logits)
        margin = self._tensor("margin") if "margin" in self.parameter_names else None
        return _ops.row_loss(
            logits,
            target,
            self._tensor("weight"),
            sample_weight,
            bias_tensor,
            margin if isinstance(margin, Tensor) else None,
            self.stem,
            self._pack() if self._params is None else self._params,
            bias,
            self.ignore_index,
            self.reduction,
        )

    def extra_repr(self) -> str:
        """Parameters, then the options that differ from their defaults."""
        shown = {name: getattr(self, name) for name in self.parameter_names}
        defaults = {"ignore_index": -100, "reduction": "mean", "logit_bias": 0.0, "weight": None}
        for name, default in defaults.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                shown[name] = value
        return ", ".join(f"{name}={_shown(value)}" for name, value in shown.items())


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"Tensor[{value.numel()}]" if value.dim() else repr(value.item())
