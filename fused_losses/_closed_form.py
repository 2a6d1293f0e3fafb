"""Row losses of torch's operations whose first derivative is written down with the value, in few passes; the plain
formula has every other derivative, and whatever is traced, where the compiler fuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses._autograd import apply, is_plain, needs_reference
from fused_losses._logit_bias import class_dim

Formula = Callable[..., Tensor]  # from one or several logits: the value of every row
ClosedForm = Callable[..., tuple[Tensor, Sequence[Tensor]]]  # the same, and its derivative in each of the logits


def closed_form(formula: Formula, closed: ClosedForm, logits: Sequence[Tensor], *constants: Any) -> Tensor:
    """``formula(*logits)``, whose first derivative comes from ``closed(*logits)`` where nothing else is asked for.

    ``constants`` are the other tensors that the formula depends on. If one of them wants a derivative, that is
    something else.
    """
    others = [tensor for tensor in constants if isinstance(tensor, Tensor)]
    if (
        not (torch.is_grad_enabled() and any(z.requires_grad for z in logits))
        or not all(is_plain(z) for z in logits)
        or any(needs_reference(z, *others) for z in logits)
    ):
        return formula(*logits)
    return apply(_ClosedForm, formula, closed, *logits)  # type: ignore[no-any-return]


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, closed: ClosedForm, *logits: Tensor) -> Tensor:
        values, gradients = closed(*logits)
        ctx.formula = formula
        ctx.save_for_backward(*logits, *gradients)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_values,) = grad_outputs
        saved = ctx.saved_tensors
        logits, written = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if torch.is_grad_enabled():  # under create_graph the gradient must itself be differentiable
            return None, None, *_by_formula(ctx.formula, logits, ctx.needs_input_grad[2:], grad_values)
        upstream = grad_values.unsqueeze(class_dim(logits[0]))
        return None, None, *(g * upstream for g in written)


def _by_formula(
    formula: Formula, logits: Sequence[Tensor], wanted: Sequence[bool], grad_values: Tensor
) -> list[Tensor | None]:
    asked = [z for z, w in zip(logits, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(formula(*logits), asked, grad_values, create_graph=True))
    return [next(found) if w else None for w in wanted]
