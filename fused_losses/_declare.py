"""How a loss is declared by its plain PyTorch formula: the fused function, the reference and the registry entry."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate

from torch import Tensor

from fused_losses._arguments import LOSSES, REDUCTIONS, LossEntry, Own, RowLossFunction
from fused_losses._autograd import is_small, row_loss, small_row_loss
from fused_losses._ops import PackedConstants, pack_constants
from fused_losses._parameters import ParameterRange
from fused_losses._reference import Rows, row_loss_reference

_PLAIN = {float, int, bool, str, type(None)}  # types of options whose value is known without a tensor

_OPTIONS_DOC = """
    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or bfloat16.
            Channels-last and NCHW images are read in place. A logit of -inf masks its class: probability 0 and no
            gradient. As a target it has loss -log 0. Where log-probabilities are summed over the classes it makes the
            sum infinite (label smoothing; a loss divided by the sum is 0), unless its weight or share there is 0.
        target: class indices in ``[0, C)`` or ``ignore_index``, the shape of ``logits`` without its class
            dimension; int64, int32, int16 or uint8.{probabilities}
{own}        weight: class weights ``(C,)``; a row counts ``weight[target]``. As in ``torch`` a weight of 0
            is a factor: it does not hide a row that is not finite, ``ignore_index`` does.
        ignore_index: rows with this target have loss and gradient zero and do not count in the mean.
        reduction: ``"none"`` (weighted loss per row), ``"sum"``, or ``"mean"``: sum of weighted losses over sum of
            weights; 0 with zero gradient where that sum is 0 (``torch`` gives NaN).{reduction}
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

_PROBABILITIES_DOC = """ Or floating point probabilities
            ``u`` of the shape of ``logits``, as Mixup and CutMix make them: ``sum_k u_k weight[k] loss(logits, k)``,
            the mean over rows, without ``logit_bias``."""

_COMMON = [
    inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None"),
    inspect.Parameter("ignore_index", inspect.Parameter.KEYWORD_ONLY, default=-100, annotation="int"),
    inspect.Parameter("reduction", inspect.Parameter.KEYWORD_ONLY, default="mean", annotation="str"),
    inspect.Parameter("logit_bias", inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation="float | Tensor | str"),
    inspect.Parameter("sample_weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None"),
]


def _make_fused(name: str) -> Callable[..., Tensor]:
    """The public function of the loss ``name``."""

    @functools.lru_cache(maxsize=100, typed=True)
    def constants_of(**options: Any) -> PackedConstants | None:
        if type(options.get("logit_bias")) is str:  # depends on the logits
            return None
        args = LOSSES[name].arguments(None, None, **options)  # type: ignore[arg-type]
        return pack_constants(args[6:]) if type(args.ignore_index) is int else None

    def function(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        if is_small(logits, target) and _PLAIN.issuperset(map(type, options.values())):
            constants = constants_of(**options)
            if constants is not None:
                return small_row_loss(logits, target, constants)
        return row_loss(LOSSES[name].arguments(logits, target, **options))

    return function


def _make_reference(name: str) -> Callable[..., Tensor]:
    def function(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return row_loss_reference(LOSSES[name].arguments(logits, target, **options))

    return function


def _describe(
    made: Callable[..., Tensor],
    module: str,
    formula: Callable[..., Tensor],
    own: list[inspect.Parameter],
    reduction: tuple[Any, str],
    takes_probabilities: bool,
) -> None:
    """Gives ``made`` the name and docstring of ``formula``, the signature that users see, and the place they import
    it from, which pickle looks at."""
    default_reduction, reduction_doc = reduction
    tensors = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
        for name in ("logits", "target")
    ]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    annotation = "str" if isinstance(default_reduction, str) else "str | None"
    common = [
        p.replace(default=default_reduction, annotation=annotation) if p.name == "reduction" else p for p in _COMMON
    ]
    summary, _, own_doc = (inspect.getdoc(formula) or "").partition("\nArgs:\n")
    own_doc, header, example = own_doc.partition("\nExample:\n")
    own_doc = "".join(f"        {line}\n" for line in inspect.cleandoc(own_doc).splitlines())
    made.__name__ = made.__qualname__ = formula.__name__
    made.__module__ = module
    options_doc = inspect.cleandoc(
        _OPTIONS_DOC.format(
            own=own_doc, reduction=reduction_doc, probabilities=_PROBABILITIES_DOC if takes_probabilities else ""
        )
    )
    made.__doc__ = f"{summary.rstrip()}\n\n{options_doc}\n{header}{example}"
    made.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*tensors, *keywords, *common], return_annotation="Tensor"
    )


def loss_of_row(
    ranges: dict[str, ParameterRange],
    *,
    constants: tuple[float, ...] = (),
    reductions: tuple[str, ...] = REDUCTIONS,
    reduction: tuple[Any, str] = ("mean", ""),
    reduction_of: Callable[[dict[str, Any]], str] | None = None,
    takes_probabilities: bool = False,
    min_classes: int = 1,
    sums: tuple[str, ...] | None = (),
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[Concatenate[Rows, Own], Tensor]], RowLossFunction[Own]]:
    """Declares a loss by its formula on :class:`Rows`.

    Decorates ``x_loss(rows, own parameters, options of every call)``, which gives each row's value without weights and
    is the reference; its name, defaults and docstring become those of the fused function. ``ranges`` gives what each
    parameter may be in the order of the C++ struct; ``constants`` are appended to them. ``reduction`` is the default
    and what the docstring says of reductions beyond the usual three; ``reduction_of`` finds it from the parameters.
    ``min_classes`` and ``sums`` are as in :class:`LossEntry`;
    ``check`` gets all parameters as keywords and raises where they do not fit together.
    """

    def decorate(formula: Callable[Concatenate[Rows, Own], Tensor]) -> RowLossFunction[Own]:
        name = formula.__name__.removesuffix("_loss")
        own = [p for p in inspect.signature(formula).parameters.values() if p.name in ranges]
        function, reference = _make_fused(name), _make_reference(name)
        for made, module in ((function, formula.__module__), (reference, "fused_losses.reference")):
            _describe(made, module, formula, own, reduction, takes_probabilities)
        LOSSES[name] = LossEntry(
            name,
            function,
            reference,
            formula,
            {p.name: p.default for p in own},
            ranges,
            constants,
            reductions,
            reduction_of or (lambda parameters: reduction[0]),
            none_is_default=reduction[0] is None,
            takes_probabilities=takes_probabilities,
            min_classes=min_classes,
            sums=sums,
            check=check,
        )
        return function

    return decorate


def loss_of_target(
    *, constants: tuple[float, ...] = (), check: Callable[..., None] | None = None, **ranges: ParameterRange
) -> Callable[[Callable[Concatenate[Tensor, Own], Tensor]], RowLossFunction[Own]]:
    """Declares a loss that is a function of ``t = log p_y``: ``x_loss(t, own parameters)``; see :func:`loss_of_row`."""

    def decorate(formula: Callable[Concatenate[Tensor, Own], Tensor]) -> RowLossFunction[Own]:
        @functools.wraps(formula)  # its name, docstring and signature
        def of_row(rows: Rows, *args: Own.args, **own: Own.kwargs) -> Tensor:
            return formula(rows.log_p, *args, **own)

        return loss_of_row(ranges, constants=constants, takes_probabilities=True, check=check)(of_row)  # type: ignore[arg-type]  # wraps() hides it

    return decorate
