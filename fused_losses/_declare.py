"""How a loss is declared by its plain PyTorch formula: the fused function, the reference and the registry entry."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Concatenate

from torch import Tensor

from fused_losses._arguments import LOSSES, REDUCTIONS, LossEntry, Own, RowLossFunction
from fused_losses._autograd import is_small, row_loss, small_constants, small_row_loss
from fused_losses._checks import check_tensors
from fused_losses._ops import PackedConstants
from fused_losses._parameters import ParameterRange
from fused_losses._reference import Rows, checked_reference

_PLAIN = {float, int, bool, str, type(None)}  # types of options whose value is known without a tensor

_OPTIONS_DOC = """
    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or bfloat16. Called
            z above; p is its softmax. A logit of -inf masks its class: probability 0. If the target is masked, the loss
            is its limit at ``p_y = 0`` (infinite for cross entropy), NaN for NCE, NFL, sums with them, CORES and the
            unhinged loss.
        target: class indices, called y above, in ``[0, C)`` or ``ignore_index``; the shape of ``logits`` without its
            class dimension; int64, int32, int16 or uint8.{probabilities}
{own}        weight: class weights ``(C,)``, floating point: a row's loss is multiplied by ``weight[target]``. As in
            ``torch``, 0 does not hide a row whose loss is NaN or infinite; ``ignore_index`` does.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: ``"none"`` (the weighted loss of each row), ``"sum"``, or ``"mean"``: the sum of the weighted losses
            divided by the sum of the weights, or 0 with gradient 0 where that is 0 (``torch`` gives NaN).{reduction}
        logit_bias: added to the target's logit before the softmax (2306.05497): a number, a 0-dim tensor, or
            ``"auto"``, the value of :func:`fused_losses.calibration.solve_logit_bias` for C classes, at least 0.
        sample_weight: one weight per row, the shape of ``target``; multiplies the class weight.

    Returns:
        The loss in float32, float64 for float64 logits; a scalar unless ``reduction="none"``.

    Raises:
        TypeError: a parameter is no number, or ``ignore_index`` no integer.
        ValueError: a parameter is out of range, ``reduction`` is unknown, batch sizes differ.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: a target is out of range (on CUDA: a device assertion).
"""

_PROBABILITIES_DOC = """ Or class probabilities u, of the shape of ``logits`` and
            floating point, as Mixup and CutMix make them: the loss of a row is then
            ``sum_k u_k weight[k] loss(logits, k)``, the mean is over rows (divided by the sum of
            ``sample_weight``, if given), and ``logit_bias`` must be 0."""

_MODULE_DOC = """{summary}

    Module form of :func:`fused_losses.functional.{function}`, which explains the loss. Called with ``(logits, target,
    sample_weight=None, *, return_row_stats=False)``: the loss, or with ``return_row_stats`` a pair of it and
    :class:`fused_losses.RowStatistics` of the logits.

    Args:
{own}        weight: class weights ``(C,)``, a buffer.
        ignore_index, reduction: as for the function.
        logit_bias: as for the function, but only in training mode: ``eval()`` leaves it out.

    Raises:
        TypeError: a parameter is no number, or ``ignore_index`` no integer.
        ValueError: a parameter is out of range.
"""

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
    def make_constants(**options: Any) -> PackedConstants | None:
        if type(options.get("logit_bias")) is str:  # depends on the logits
            return None
        if options.get("weight") is not None or options.get("sample_weight") is not None:  # no tensor: to be refused
            return None
        return small_constants(LOSSES[name].arguments(None, None, **options).constants)  # type: ignore[arg-type]

    def function(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        if is_small(logits, target) and _PLAIN.issuperset(map(type, options.values())):
            constants = make_constants(**options)
            if constants is not None:
                return small_row_loss(logits, target, constants)
        return row_loss(LOSSES[name].arguments(logits, target, **options))

    return function


def _make_reference(name: str) -> Callable[..., Tensor]:
    def function(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        check_tensors(logits=logits, target=target)
        return checked_reference(LOSSES[name].arguments(logits, target, **options))

    return function


def _parts(formula: Callable[..., Tensor]) -> tuple[str, str, str]:
    """A formula's docstring: what comes before the arguments, the arguments, the example."""
    summary, _, own = (inspect.getdoc(formula) or "").partition("\nArgs:\n")
    if own:
        own, header, example = own.partition("\nExample:\n")
    else:
        summary, header, example = summary.partition("\nExample:\n")
    lines = "".join(f"        {line}\n" for line in textwrap.dedent(own).strip("\n").splitlines())
    return summary.rstrip(), lines, header + example


def describe_module(module: type, entry: LossEntry) -> None:
    """Gives a loss's Module a whole docstring in place of one line, and its constructor a signature of all options."""
    summary, own, _ = _parts(entry.formula)
    if "\n" not in (module.__doc__ or ""):
        first = summary.partition("\n\n")[0].replace("\n", "\n    ")
        doc = _MODULE_DOC.format(summary=first, function=entry.function.__name__, own=own)
        module.__doc__ = doc.rstrip() + "\n    "
    make: Any = module.__init__  # type: ignore[misc]  # of the class, not of an instance
    signature = inspect.signature(make)
    given = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(given) < len(signature.parameters):
        common = [p.replace(default=entry.reduction({})) if p.name == "reduction" else p for p in _COMMON[:-1]]
        make.__signature__ = signature.replace(parameters=[*given, *common])


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
    summary, own_doc, example = _parts(formula)
    made.__name__ = made.__qualname__ = formula.__name__
    made.__module__ = module
    options_doc = inspect.cleandoc(
        _OPTIONS_DOC.format(
            own=own_doc, reduction=reduction_doc, probabilities=_PROBABILITIES_DOC if takes_probabilities else ""
        )
    )
    made.__doc__ = f"{summary}\n\n{options_doc}\n{example}"
    made.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*tensors, *keywords, *common], return_annotation="Tensor"
    )


def loss_of_row(
    ranges: dict[str, ParameterRange],
    *,
    reductions: tuple[str, ...] = REDUCTIONS,
    reduction: tuple[Any, str] = ("mean", ""),
    reduction_of: Callable[[dict[str, Any]], str] | None = None,
    takes_probabilities: bool = False,
    of_log_p: bool = False,
    min_classes: int = 1,
    sums: tuple[str, ...] | None = (),
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[Concatenate[Rows, Own], Tensor]], RowLossFunction[Own]]:
    """Declares a loss by its formula on :class:`Rows`.

    Decorates ``x_loss(rows, own parameters, options of every call)``, which gives each row's value without weights and
    is the reference; its name, defaults and docstring become those of the fused function. ``ranges`` gives what each
    parameter may be in the order of the C++ struct. ``reduction`` is the default and what the docstring says of
    reductions beyond the usual three; ``reduction_of`` finds it from the parameters. ``of_log_p``, ``min_classes`` and
    ``sums`` are as in :class:`LossEntry`; ``check`` gets all parameters as keywords and raises where they do not fit
    together.
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
            reductions,
            reduction_of or (lambda parameters: reduction[0]),
            none_is_default=reduction[0] is None,
            takes_probabilities=takes_probabilities,
            of_log_p=of_log_p,
            min_classes=min_classes,
            sums=sums,
            check=check,
        )
        return function

    return decorate


def loss_of_target(
    *, check: Callable[..., None] | None = None, **ranges: ParameterRange
) -> Callable[[Callable[Concatenate[Tensor, Own], Tensor]], RowLossFunction[Own]]:
    """Declares a loss that is a function of ``t = log p_y``: ``x_loss(t, own parameters)``; see :func:`loss_of_row`."""

    def decorate(formula: Callable[Concatenate[Tensor, Own], Tensor]) -> RowLossFunction[Own]:
        @functools.wraps(formula)  # its name, docstring and signature
        def of_row(rows: Rows, *args: Own.args, **own: Own.kwargs) -> Tensor:
            return formula(rows.log_p, *args, **own)

        declare = loss_of_row(ranges, takes_probabilities=True, of_log_p=True, check=check)
        return declare(of_row)  # type: ignore[arg-type]  # wraps() hides it

    return decorate
