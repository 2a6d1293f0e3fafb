"""The bases of the loss Modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, TypedDict

from torch import Tensor, nn

from fused_losses._agreement import Exchange
from fused_losses._arguments import (
    LOSSES,
    RowLossArguments,
    check_reduction,
    is_distributed,
    pack_arguments,
)
from fused_losses._autograd import is_small, row_loss, row_loss_and_statistics, small_constants, small_row_loss
from fused_losses._declare import describe_module
from fused_losses._logit_bias import LogitBias, check_logit_bias
from fused_losses._ops import PackedConstants
from fused_losses._parameters import OrTensor, explains_keywords, integer, kept_value, python_number
from fused_losses.row_statistics import RowStatistics


class RowLossOptions(TypedDict, total=False):
    """Keyword options of every classification Module."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    logit_bias: LogitBias


class Criterion(nn.Module):
    """Base of all loss Modules."""

    _precise: tuple[str, ...] = ()  # buffers that keep their dtype under half() and the like

    # Of options whose value only Python looks at: give what is kept of a value, or raise. Subclasses add theirs.
    _checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._checks = {
            name: check for kind in reversed(cls.__mro__) for name, check in vars(kind).get("_checks", {}).items()
        }
        if "__init__" in vars(cls):
            cls.__init__ = explains_keywords(cls.__init__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """Numbers of NumPy's are kept as Python's, which the compiler and operators take everywhere."""
        held = vars(self).get("_buffers", {}).get(name)
        if held is not None and value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} is a tensor here, given as one or by a schedule, and must stay one, got {value!r}: "
                f"{name}.fill_({value!r}) changes it"
            )
        check = self._checks.get(name)
        super().__setattr__(name, python_number(value) if check is None else check(name, value))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """A Parameter stays one: it is to be learnt, and as a buffer it would be another tensor once it has moved."""
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Criterion:
        # A number has all its digits under half(), too, be it an attribute or, scheduled, a 0-dim tensor.
        before = {name: held for name, held in self._buffers.items() if name in self._precise or _is_number(held)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            after = self._buffers.get(name)
            if exact is not None and after is not None and after.dtype != exact.dtype:
                self._buffers[name] = exact.to(after.device)
        return self

    def __prepare_scriptable__(self) -> Criterion:
        raise TypeError(
            f"{type(self).__name__} cannot be scripted by torch.jit.script, which knows no autograd in Python: "
            "use torch.compile or torch.export"
        )

    def _exchanges(self) -> list[Exchange]:
        """What a call communicates, as far as it may bring news of a failure."""
        return []

    def _keep(self, name: str, value: Any) -> None:
        """A tensor as a buffer (a Parameter as one), anything else as an attribute."""
        if isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def extra_repr(self) -> str:
        """The own parameters of the loss, then the options that differ from their defaults."""
        return ", ".join(f"{name}={shown_value(value)}" for name, value in self._shown().items())

    def _shown(self) -> dict[str, Any]:
        """What ``repr`` shows."""
        return {}

    def _unusual(self, **defaults: Any) -> dict[str, Any]:
        """The attributes of these names that have other values."""
        values = {name: getattr(self, name) for name in defaults}
        return {name: x for name, x in values.items() if isinstance(x, Tensor) or x != defaults[name]}

    def _tensor(self, name: str) -> Any:
        # Not by getattr: nn.Module's look-up takes as long as a small loss.
        buffers = self._buffers
        return buffers[name] if name in buffers else getattr(self, name)


def _is_number(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dim() == 0


def _copy(function: FunctionType) -> FunctionType:
    """With code of its own: torch.compile counts by code how often it has compiled something, and gives up."""
    made = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    return made


def check_forward(loss: nn.Module) -> None:
    """Raises for a subclass with a ``forward`` of its own, which code that computes a loss's rows does not call."""
    if not type(loss).forward.__module__.startswith("fused_losses."):
        raise TypeError(
            f"the loss inside must have the forward of fused_losses, which is not called here, got "
            f"{type(loss).__name__}, which overrides it: do in front of the outer loss what it does"
        )


class RowLossModule(Criterion):
    """Base of the Modules of losses that give one value per row.

    A tensor given for ``weight``, ``logit_bias`` or a parameter becomes a buffer, an ``nn.Parameter`` stays one: it
    moves with the Module and is in its ``state_dict``, and a value written into it counts from the next call on, also
    in compiled code and captured CUDA graphs. Numbers are plain attributes and can be assigned. ``logit_bias`` is
    applied in training mode only.
    """

    stem: str
    weight: Tensor | None
    logit_bias: LogitBias
    parameter_names: tuple[str, ...] = ()
    # For calls with nothing but logits and target. Empty: this loss cannot have them; None: not made yet.
    _constants: PackedConstants | tuple[()] | None = None

    def __init_subclass__(cls, stem: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if stem is not None:
            cls.stem = stem
            if "forward" not in vars(cls):
                cls.forward = _copy(cls.forward)  # type: ignore[method-assign,arg-type]
            LOSSES[stem].modules.append(cls)
            describe_module(cls, LOSSES[stem])

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
        parameters = {name: kept_value(name, value, entry.ranges[name]) for name, value in parameters.items()}
        self._params: tuple[float, ...] | None = entry.pack(parameters)
        check_reduction(reduction, entry.reductions)
        check_logit_bias(logit_bias)
        for name, value in parameters.items():
            self._keep(name, value)
        self.parameter_names = tuple(parameters)
        self.register_buffer("weight", weight)
        self.ignore_index = integer("ignore_index", ignore_index)
        self.reduction = reduction
        self._keep("logit_bias", logit_bias)

    def __setattr__(self, name: str, value: Any) -> None:
        """Notices that a hyper-parameter has a new value, so that calls need not look."""
        if name in self.parameter_names:
            value = kept_value(name, value, LOSSES[self.stem].ranges[name])
            self._params = self._constants = None
        elif name in ("ignore_index", "reduction", "logit_bias"):
            self._constants = None
        super().__setattr__(name, value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Notices that a buffer takes the place of a number, as schedules do it."""
        if name in self.parameter_names and not isinstance(LOSSES[self.stem].ranges[name], OrTensor):
            raise TypeError(f"{name} must be a number, got a buffer, whose later values would not count")
        super().register_buffer(name, tensor, persistent)
        self._constants = None
        if name in self.parameter_names:
            self._pack()  # not later: done within a compiled call, it would cause another compilation

    def _pack(self) -> tuple[float, ...]:
        params = LOSSES[self.stem].pack({name: getattr(self, name) for name in self.parameter_names})
        self._params = params
        return params

    def _make_constants(self) -> PackedConstants | tuple[()]:
        bias, ignore_index, reduction = self.logit_bias, integer("ignore_index", self.ignore_index), self.reduction
        own = [getattr(self, name) for name in self.parameter_names]
        numbers = (type(bias), type(ignore_index), type(reduction)) == (float, int, str) and bias == 0.0
        made = None
        if numbers and not any(isinstance(value, Tensor) for value in own):
            made = small_constants((self.stem, self._pack(), 0.0, ignore_index, reduction))
        self._constants = made or ()
        return self._constants

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        *,
        return_row_stats: bool = False,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss of ``logits`` for ``target``.

        Args:
            logits: as for the loss's function.
            target: as for the loss's function.
            sample_weight: one weight per row, the shape of ``target``.
            return_row_stats: also return :func:`fused_losses.row_statistics` of the logits as they are (without
                ``logit_bias``). One read of the logits gives both, but for multi-reduction losses on CUDA in float64
                and of rows longer than shared memory: these are read once more.

        Returns:
            The loss, or a pair of loss and :class:`fused_losses.RowStatistics`.
        """
        if sample_weight is None and not return_row_stats and is_small(logits, target):
            constants = self._make_constants() if self._constants is None else self._constants
            if constants and self._tensor("weight") is None:
                return small_row_loss(logits, target, constants)
        if type(logits) is not Tensor and is_distributed(logits):
            from fused_losses.parallel import distributed_loss  # here: it imports this file

            if return_row_stats:
                raise ValueError("return_row_stats must be False for DTensor logits, got True")
            return distributed_loss(self, logits, target, sample_weight)
        args = self._arguments(logits, target, sample_weight)
        return row_loss_and_statistics(args) if return_row_stats else row_loss(args)

    def _arguments(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> RowLossArguments:
        first = LOSSES[self.stem].tensor_parameter
        return pack_arguments(
            logits,
            target,
            self._tensor("weight"),
            sample_weight,
            self._tensor("logit_bias") if self.training else 0.0,  # 2306.05497: "removal of the bias during testing"
            None if first is None else self._tensor(first),
            self.stem,
            self._pack() if self._params is None else self._params,
            self.ignore_index,
            self.reduction,
        )

    def call_options(self) -> dict[str, Any]:
        """Keywords with which the loss's function computes what this Module does now, but for ``reduction``."""
        bias = self.logit_bias if self.training else 0.0
        own = {name: getattr(self, name) for name in self.parameter_names}
        return {"weight": self.weight, "ignore_index": self.ignore_index, "logit_bias": bias, **own}

    def _shown(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.parameter_names}
        reduction = LOSSES[self.stem].reduction(own)
        return own | self._unusual(ignore_index=-100, reduction=reduction, logit_bias=0.0, weight=None)


def shown_value(value: Any) -> str:
    """A value for ``repr``, a tensor that is more than a number by its shape."""
    if not isinstance(value, Tensor):
        return repr(value)
    is_number = value.dim() == 0 and not value.is_meta
    return repr(value.item()) if is_number else f"Tensor{list(value.shape)}"
