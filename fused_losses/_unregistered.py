"""The plain formulas of the losses that are in no registry, with the signatures of their functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fused_losses import _corrections, corrections, gjs
from fused_losses._parameters import explains_keywords
from fused_losses._reference import zero_at_zero
from fused_losses._row_values import RowValues, plain_rows


def _reference_of(function: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Gives a plain formula the name, the docstring and the signature of the function."""

    def decorate(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(function)

        def reference(*args: Any, **options: Any) -> Tensor:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            return plain(**bound.arguments)

        reference.__name__ = reference.__qualname__ = function.__name__
        reference.__doc__, reference.__module__ = function.__doc__, "fused_losses.reference"
        reference.__signature__ = signature  # type: ignore[attr-defined]
        return explains_keywords(reference)

    return decorate


@_reference_of(gjs.gjs_loss)
def gjs_loss(
    views: Tensor | Sequence[Tensor], target: Tensor, weights: Sequence[float], reduction: str, **options: Any
) -> Tensor:
    packed = gjs.pack_weights(weights)
    of_views = [
        plain_rows("gjs_loss", view, target, reduction=reduction, **options)
        for view in gjs.check_views(views, len(packed) - 1)
    ]
    values = gjs.divergence(of_views[0], packed, *(of_view.logits for of_view in of_views))
    return RowValues.of(of_views[0], values).reduce(reduction)


@_reference_of(corrections.forward_correction_loss)
def forward_correction_loss(
    logits: Tensor, target: Tensor, transition: Tensor, reduction: str, **options: Any
) -> Tensor:
    rows = plain_rows("forward_correction_loss", logits, target, reduction=reduction, **options)
    _corrections.check_call(transition, logits, inverse=False)
    return RowValues.of(rows, _corrections.forward_formula(rows, transition)).reduce(reduction)


@_reference_of(corrections.backward_correction_loss)
def backward_correction_loss(
    logits: Tensor, target: Tensor, transition: Tensor, reduction: str, **options: Any
) -> Tensor:
    rows = plain_rows("backward_correction_loss", logits, target, reduction=reduction, **options)
    inverse = _corrections.check_call(transition, logits, inverse=True)
    assert inverse is not None
    values = -zero_at_zero(_corrections.of_target(inverse, rows), rows.log_probs).sum(rows.dim)
    return RowValues.of(rows, values).reduce(reduction)
