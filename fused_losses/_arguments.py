"""What every row loss is called with: its options, its entry in the registry, the operators' arguments made of them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypedDict

import torch
from torch import Tensor

from fused_losses._logit_bias import LogitBias, class_dim, resolve_logit_bias
from fused_losses._parameters import OrTensor, ParameterRange, check_choice, integer, unexpected_keyword

if TYPE_CHECKING:
    from fused_losses._common import RowLossModule

REDUCTIONS = ("none", "mean", "sum")
ACTIVE_REDUCTIONS = (*REDUCTIONS, "active_mean")


class _Default(Enum):
    """Stands for an option that is left out, where None has a meaning."""

    OF_LOSS = 0


Own = ParamSpec("Own")  # a loss's own hyper-parameters, and the options of every call


class CallOptions(TypedDict, total=False):
    """Keyword options of every loss function."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    logit_bias: LogitBias
    sample_weight: Tensor | None


class RowLossFunction(Protocol[Own]):
    """The signature of every loss function."""

    def __call__(self, logits: Tensor, target: Tensor, *args: Own.args, **options: Own.kwargs) -> Tensor:
        """Computes the loss."""


class RowLossArguments(NamedTuple):
    """One call of the row-loss operators, in the order of their schema (``csrc/ops/ops.cpp``)."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    sample_weight: Tensor | None
    logit_bias_tensor: Tensor | None  # takes the place of logit_bias
    first_param: Tensor | None  # takes the place of the first of params
    loss: str
    params: Sequence[float]
    logit_bias: float
    ignore_index: int
    reduction: str

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The first six."""
        return self[:6]

    @property
    def constants(self) -> tuple[str, Sequence[float], float, int, str]:
        """What is left."""
        return self[6:]


# Those of a call without tensors among them.
RowLossConstants = tuple[str, tuple[float, ...], float, int, str]


class ZErrorRule(NamedTuple):
    """How a Z-Error operator judges rows, in the order of the schemas; ``csrc/ops/ops.cpp`` explains the words."""

    moments: Tensor | None  # of the groups; None: computed from the rows of the call
    threshold_tensor: Tensor | None  # takes the place of threshold
    threshold: Sequence[float]
    statistic: str
    tail: str
    min_count: int
    keep_small: bool
    with_scores: bool


class ZErrorLossArguments(NamedTuple):
    """One call of the binary or regression form, in the order of the schema; the rule follows."""

    input: Tensor
    target: Tensor
    pos_weight: Tensor | None
    sample_weight: Tensor | None
    reduction: str

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """All but the reduction."""
        return self[:4]


@dataclass(frozen=True)
class LossEntry:
    """A loss in the registry :data:`LOSSES`.

    ``name`` is the stem ("gce"), ``function`` the fused function, ``reference`` the same in plain PyTorch, ``formula``
    what both compute (class weights included if it ``weighs_classes``); ``parameters`` the own hyper-parameters with
    their defaults, ``ranges`` what each may be, ``check`` what they may be together; ``reductions`` the allowed ones,
    ``reduction`` the default one (None is another word for it if ``none_is_default``), and ``module`` the Module class.
    A target of class probabilities stands for the sum of the classes' losses if the loss ``takes_probabilities``.
    Nothing of a row but log p_y counts if the loss is ``of_log_p``.
    Logits must have ``min_classes`` classes. ``sums`` names what the formula adds up over the classes: "log_probs",
    "p^q" with the name or value of the exponent, "terms" (:meth:`Rows.sum_log_probs`, :meth:`Rows.target_and_powers`,
    :meth:`Rows.target_and_sum`), "errors" of margins; None: ranks that share the classes gather whole rows.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    parameters: dict[str, Any]
    ranges: Mapping[str, ParameterRange]
    reductions: tuple[str, ...] = REDUCTIONS
    reduction: Callable[[dict[str, Any]], str] = lambda parameters: "mean"
    none_is_default: bool = False
    weighs_classes: bool = False
    takes_probabilities: bool = False
    of_log_p: bool = False
    min_classes: int = 1
    sums: tuple[str, ...] | None = ()
    check: Callable[..., None] | None = None
    modules: list[type[RowLossModule]] = field(default_factory=list)
    packed: dict[str, float] = field(init=False)
    tensor_parameter: str | None = field(init=False)  # the first, if a tensor may take its place
    share_parameter: int | None = field(init=False)  # the place of the one that must be below 1 / C

    def __post_init__(self) -> None:
        """Packs the defaults once."""
        packed = {name: self.ranges[name].pack(name, default) for name, default in self.parameters.items()}
        object.__setattr__(self, "packed", packed)
        first = next(iter(self.ranges), "")
        object.__setattr__(self, "tensor_parameter", first if isinstance(self.ranges.get(first), OrTensor) else None)
        shares = [i for i, rule in enumerate(self.ranges.values()) if getattr(rule, "below_share", False)]
        object.__setattr__(self, "share_parameter", shares[0] if shares else None)

    def __reduce__(self) -> tuple[Callable[[str], LossEntry], tuple[str]]:
        """Copies and pickles are the entry itself: there is one of each loss."""
        return entry_named, (self.name,)

    @property
    def module(self) -> type[RowLossModule]:
        """The Module class."""
        return self.modules[0]

    @property
    def affine_in_softmax(self) -> bool:
        """Whether a row's gradient is affine in its softmax; these are the losses that take class probabilities."""
        return self.takes_probabilities

    def pack(self, parameters: dict[str, Any]) -> tuple[float, ...]:
        """The operators' ``params``: checked numbers in the order of the C++ header."""
        if torch.compiler.is_compiling():
            packed = dict(zip(self.packed, _defaults(self.name), strict=True))
        elif parameters:
            packed = self.packed.copy()
        else:
            return tuple(self.packed.values())
        for name, value in parameters.items():
            rule = self.ranges.get(name)
            if rule is None:
                raise unexpected_keyword(self.function.__name__, name)
            packed[name] = rule.pack(name, value)
        if self.check is not None:
            self.check(**packed)
        return tuple(packed.values())

    def suits(self, params: Sequence[float], num_classes: int) -> bool:
        """Whether no packed parameter is too large for that number of classes, whatever the row."""
        return self.share_parameter is None or params[self.share_parameter] < 1.0 / num_classes

    def unpack(self, args: RowLossArguments) -> dict[str, Any]:
        """The hyper-parameters of a call."""
        own = {name: rule.unpack(x) for (name, rule), x in zip(self.ranges.items(), args.params, strict=False)}
        if args.first_param is not None and self.tensor_parameter is not None:
            own[self.tensor_parameter] = args.first_param
        return own

    def arguments(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str | _Default | None = _Default.OF_LOSS,
        logit_bias: LogitBias = 0.0,
        sample_weight: Tensor | None = None,
        **parameters: Any,
    ) -> RowLossArguments:
        """The operators' arguments for a call of the function."""
        if reduction is _Default.OF_LOSS or (reduction is None and self.none_is_default):
            reduction = self.reduction(parameters)
        elif reduction.__class__ is not str:
            check_reduction(reduction, self.reductions)  # type: ignore[arg-type]
        return pack_arguments(
            logits,
            target,
            weight,
            sample_weight,
            logit_bias,
            parameters.get(self.tensor_parameter) if self.tensor_parameter else None,
            self.name,
            self.pack(parameters),
            ignore_index,
            reduction,  # type: ignore[arg-type]
        )


LOSSES: dict[str, LossEntry] = {}


def _defaults(name: str) -> tuple[float, ...]:
    return tuple(LOSSES[name].packed.values())


# A constant to the compiler. With dynamic=True the numbers in the registry would be inputs of the graph, and torch 2.13
# fails where one of them is first met within an autograd.Function and needed outside, as by two losses in one graph.
_defaults._dynamo_marked_constant = True  # type: ignore[attr-defined]


def entry_named(name: str, argument: str = "loss", or_else: str = "") -> LossEntry:
    """The loss of that name, "gce" or "gce_loss". Raises a ValueError that lists all, and what else may be given."""
    entry = LOSSES.get(name.removesuffix("_loss"))
    if entry is None:
        raise ValueError(f"{argument} must be one of {', '.join(LOSSES)}{or_else}, got {name!r}")
    return entry


def pack_arguments(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_bias: LogitBias,
    first_param: float | Tensor | None,
    loss: str,
    params: Sequence[float],
    ignore_index: int,
    reduction: str,
) -> RowLossArguments:
    """The operators' arguments; ``params`` are packed already. Of ``first_param`` only a tensor matters."""
    if isinstance(logit_bias, float) and logit_bias == 0.0:  # nearly always
        bias, bias_tensor = 0.0, None
    else:
        bias, bias_tensor = resolve_logit_bias(logit_bias, logits)
    if ignore_index.__class__ is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = integer("ignore_index", ignore_index)
    if reduction.__class__ is not str:  # operators look at words only
        check_reduction(reduction, LOSSES[loss].reductions)
    if LOSSES[loss].share_parameter is not None and isinstance(logits, Tensor) and logits.dim() > 0:
        _check_share(LOSSES[loss], params, logits)
    return RowLossArguments(
        logits,
        target,
        weight,
        sample_weight,
        bias_tensor,
        first_param if isinstance(first_param, Tensor) else None,
        loss,
        params,
        bias,
        ignore_index,
        reduction,
    )


def _check_share(entry: LossEntry, params: Sequence[float], logits: Tensor) -> None:
    """Raises where a parameter must be below 1 / C and is not."""
    classes = logits.shape[class_dim(logits)]
    if classes > 0 and not entry.suits(params, classes):
        place: Any = entry.share_parameter
        share = 1.0 / operator.index(classes)  # while tracing, a format needs a number
        raise ValueError(
            f"{list(entry.ranges)[place]} must be below 1 / C, which is {share:.6g} for {classes} classes, got "
            f"{params[place]}"
        )


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor; imports nothing."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """Which targets, class indices of any integer dtype, are ``ignore_index``."""
    return target.long() == ignore_index  # torch compares a narrower integer with a number modulo its range


def entries_of(per_class: Tensor, classes: Tensor) -> Tensor:
    """``per_class[classes]``, under vmap of single rows, too: torch looks at an index of no dimension."""
    return per_class.index_select(0, classes.reshape(-1)).view(classes.shape)


def acc_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of arithmetic, loss and statistics."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_reduction(reduction: str, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    """Raises unless it is one of the allowed reductions."""
    check_choice("reduction", reduction, allowed)
