"""A row loss's formula where ranks share the classes: what it asks of the rows, and its derivatives in the answers.

:mod:`._shards` finds the numbers, and makes the gradient in the logits of the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_losses._agreement import Exchange, add_up
from fused_losses._arguments import LOSSES, RowLossArguments, acc_dtype, is_ignored
from fused_losses._reference import Rows, power

Term: TypeAlias = Callable[[Tensor], Tensor]


class RowNumbers(NamedTuple):
    """What all ranks together know of every row."""

    log_p: Tensor  # of the target
    is_top: Tensor  # whether no logit is larger than the target's
    linear_sum: Tensor  # sum over the classes of weight * log p
    powers: Powers
    powers_change: Tensor  # zeros added to the sum of powers, to differentiate with respect to it


class Powers(NamedTuple):
    """A sum over the classes of ``p^q``, and of ``p^q - 1``: each has digits that the other may not show."""

    whole: Tensor
    less_one: Tensor


@dataclass(frozen=True)
class ShardedRows(Rows):
    """Rows for a loss's formula, whose numbers per row come from all ranks."""

    classes_of_all_ranks: int
    numbers: RowNumbers  # leaves of the graph, except for is_top and powers
    other_sum: Callable[[Callable[[Tensor], Tensor]], Tensor]

    @property
    def num_classes(self) -> int:
        """C, over all ranks."""
        return self.classes_of_all_ranks

    @property
    def log_p(self) -> Tensor:
        """Log-probability of the target."""
        return self.numbers.log_p

    @property
    def is_top(self) -> Tensor:
        """Whether no logit, of any rank, is larger than the target's."""
        return self.numbers.is_top

    def sum_log_probs(self, weighted: bool = False) -> Tensor:
        """The sum that :mod:`._shards` has weighted as this loss wants it."""
        return self.numbers.linear_sum

    def target_and_powers(self, exponent: float, less_one: bool = False) -> tuple[Tensor, Tensor]:
        """As for :class:`Rows`; the exponent is the one that :mod:`._shards` has found."""
        own, powers = power(self.numbers.log_p, exponent, less_one), self.numbers.powers
        return own, (powers.less_one if less_one else powers.whole) + self.numbers.powers_change

    def target_and_sum(self, term: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``term(log p_y)`` and its sum over all classes."""
        return term(self.numbers.log_p), self.other_sum(term)


class Slopes(NamedTuple):
    """Derivatives of every row's loss, with its weights."""

    target: Tensor  # in log p_y
    linear: Tensor  # in the linear sum
    power: Tensor  # in the sum of powers
    terms: Tensor | float  # in all log p_j alike, through the sums of terms


class _Sum(NamedTuple):
    """A sum of terms over the classes; ``total`` and ``slope_total`` over all ranks."""

    total: Tensor
    slope_total: Tensor
    slopes: Tensor  # of the terms of this rank


class Formula:
    """A loss's formula with all that does not come from the logits."""

    def __init__(self, args: RowLossArguments, num_classes: int) -> None:
        self.args, self.num_classes, self.entry = args, num_classes, LOSSES[args.loss]
        self.ignored = is_ignored(args.target, args.ignore_index)
        self.target = torch.where(self.ignored, 0, args.target.long())
        ones = torch.ones(args.target.shape, dtype=acc_dtype(args.logits), device=args.target.device)
        self.class_weight = ones if args.weight is None else args.weight.to(ones.dtype)[self.target]
        self.samples = ones if args.sample_weight is None else args.sample_weight.to(ones.dtype)

    def values(self, numbers: RowNumbers, log_probs: Tensor, other_sum: Callable[[Term], Tensor]) -> Tensor:
        """Every row's weighted loss."""
        args, entry = self.args, self.entry
        given = log_probs, self.target, self.ignored, args.weight, self.class_weight, self.samples, self.num_classes
        rows = ShardedRows(*given, numbers, other_sum)
        values = entry.formula(rows, **entry.unpack(args))
        return rows.reduce(values if entry.weighs_classes else self.class_weight * values, "none")

    def terms(self, numbers: RowNumbers, log_probs: Tensor) -> list[Term]:
        """The functions of log p whose sums over the classes the loss asks for."""
        asked: list[Term] = []

        def note(term: Term) -> Tensor:
            asked.append(term)
            return torch.ones_like(numbers.log_p)

        if "terms" in (self.entry.sums or ()):
            self.values(numbers, log_probs, note)
        return asked

    def count_terms(self) -> int:
        """How many those are, whatever the numbers."""
        none = torch.zeros_like(self.class_weight)
        return len(self.terms(RowNumbers(none, self.ignored, none, Powers(none, none), none), none.unsqueeze(1)))


def values_of(formula: Formula, numbers: RowNumbers, log_probs: Tensor, exchanges: list[Exchange]) -> Tensor:
    """Values alone, in inference mode, too."""
    sums = _sums_of_terms(formula.terms(numbers, log_probs), log_probs, exchanges, False)
    totals = iter([each.total for each in sums])
    return formula.values(numbers, log_probs, lambda term: next(totals))


def evaluate(
    formula: Formula, numbers: RowNumbers, log_probs: Tensor, exchanges: list[Exchange]
) -> tuple[Tensor, Slopes, Tensor | float]:
    """Values, their derivatives, and those in each log p_j of this rank through the sums of terms."""
    sums = _sums_of_terms(formula.terms(numbers, log_probs), log_probs, exchanges, True)
    with torch.enable_grad():
        totals = iter([each.total.requires_grad_() for each in sums])
        leaves = [numbers.log_p, numbers.linear_sum, numbers.powers_change]
        for leaf in leaves:
            leaf.requires_grad_()
        values = formula.values(numbers, log_probs, lambda term: next(totals))
        leaves += [each.total for each in sums]
        found = torch.autograd.grad(values.sum(), leaves, materialize_grads=True)
    pull: Tensor | float = 0.0
    terms: Tensor | float = 0.0
    for of_sum, each in zip(found[3:], sums, strict=True):
        pull = pull + of_sum * each.slope_total
        terms = terms + of_sum.unsqueeze(1) * each.slopes
    return values.detach(), Slopes(found[0], found[1], found[2], pull), terms


def _sums_of_terms(asked: list[Term], log_probs: Tensor, exchanges: list[Exchange], with_slopes: bool) -> list[_Sum]:
    """What the terms add up to over the classes of all ranks: one collective, or none where there are no terms.

    Slopes that are not wanted are zeros: other ranks may want theirs, and messages have one length.
    """
    made: list[Tensor] = []
    for term in asked:
        if not with_slopes:
            made += [term(log_probs), torch.zeros_like(log_probs)]
            continue
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            terms = term(leaf)
            made += [terms.detach(), *torch.autograd.grad(terms.sum(), leaf)]
    for exchange in exchanges:
        sums = add_up(exchange, torch.stack([each.sum(1) for each in made]))
        return [_Sum(sums[i], sums[i + 1], made[i + 1]) for i in range(0, len(made), 2)]
    return []
