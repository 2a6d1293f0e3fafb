"""Margin losses whose classes ranks share: the target's logit, the mean error (HEM), then what the errors add up to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses._agreement import Exchange, add_up
from fused_losses._shard_formula import Formula
from fused_losses.margin import are_spoiled, errors_of, margin_rule, value_of


def sums_of_errors(formula: Formula, group: object, rows: int, dtype: torch.dtype) -> list[Exchange]:
    """The collectives after the one that finds the target's logit, for so many rows."""
    _, rule = margin_rule(formula.args.loss, formula.entry.unpack(formula.args))
    counts = [rows, 2 * rows] if rule.threshold else [2 * rows]
    return [Exchange.adding(group, count, dtype) for count in counts]  # type: ignore[arg-type]


def values_and_gradient_of_errors(
    formula: Formula,
    z: Tensor,
    own: Tensor,
    index: Tensor,
    first_class: int,
    gather_numbers: Callable[[Tensor], Tensor],
    sums: list[Exchange],
) -> tuple[Tensor, Tensor]:
    """Every row's weighted loss, and the gradient of their sum in this rank's logits ``z``, which have the bias.

    ``own`` says which targets are among them, ``index`` (N, 1) where.
    """
    margin, rule = margin_rule(formula.args.loss, formula.entry.unpack(formula.args))
    z = torch.where(formula.ignored.unsqueeze(1), 0.0, z)
    classes = z.shape[1]
    if not isinstance(margin, Tensor):
        margin = z.new_full((), margin)
    elif margin.dim() == 1 and rule.of_competitor:
        margin = margin[first_class : first_class + classes].to(z)
    elif margin.dim() == 1:
        margin = margin.to(z)[formula.target].unsqueeze(1)
    is_target = torch.zeros_like(z, dtype=torch.bool)
    of_target = torch.full_like(formula.samples, -torch.inf)
    if classes:
        is_target.scatter_(1, index, own.unsqueeze(1))
        of_target = torch.where(own, z.gather(1, index).squeeze(1), of_target)
    is_nan = are_spoiled(z, margin.to(z), 1)
    found = gather_numbers(torch.stack([of_target.nan_to_num(-torch.inf, torch.inf, -torch.inf), is_nan.to(z)]))
    target_logit, spoiled = found.amax(0).unbind()
    errors = errors_of(z, target_logit.unsqueeze(1), margin.to(z), is_target)
    counted = errors > 0.0
    if rule.threshold:
        of_row = add_up(sums[0], errors.sum(1, dtype=torch.float64).to(z.dtype))
        below = (1.0 - 4.0 * torch.finfo(z.dtype).eps) / formula.num_classes  # the sum may have been rounded upwards
        counted &= errors >= (of_row * below).unsqueeze(1)
    kept = torch.where(counted, errors, 0.0)
    slopes = counted.to(z.dtype) if rule.power == 1 else 2.0 * kept
    parts = torch.stack([(kept if rule.power == 1 else kept.square()).sum(1), slopes.sum(1)])
    total, pull = add_up(sums[-1], parts)
    spoil = torch.where(spoiled > 0, torch.nan, 1.0)
    weights = torch.where(formula.ignored, 0.0, formula.class_weight * formula.samples * spoil)
    of_sum = value_of(torch.ones_like(total), pull, formula.num_classes, rule)  # the number is the pull where it counts
    grad = (weights * of_sum).unsqueeze(1) * slopes
    if classes:
        grad.scatter_add_(1, index, torch.where(own, -weights * of_sum * pull, 0.0).unsqueeze(1))
    values = torch.where(formula.ignored, 0.0, weights * value_of(total, pull, formula.num_classes, rule))
    return values, torch.where(formula.ignored.unsqueeze(1), 0.0, grad)
