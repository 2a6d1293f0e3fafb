"""Row losses in plain PyTorch: what kernels are compared with, and the route of every derivative they do not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses._arguments import LOSSES, RowLossArguments, acc_dtype, check_reduction, entries_of
from fused_losses._checks import check_min_classes, check_row_loss, check_targets
from fused_losses._logit_bias import class_dim

# Added to the denominator of a mean over active rows, as in the reference code of 2501.12191.
ACTIVE_GUARD = 1e-6


def zero_at_zero(p: Tensor, log_term: Tensor) -> Tensor:
    """``p * log_term``, 0 at p = 0 in value and gradient."""
    empty = p == 0
    return torch.where(empty, 0.0, p * torch.where(empty, 0.0, log_term))


def expm1(x: Tensor) -> Tensor:
    """``e^x - 1`` with all digits in the derivative too: torch's is ``(e^x - 1) + 1``, which is 0 for x < -17."""
    near = x > -1.0
    return torch.where(near, torch.expm1(torch.where(near, x, 0.0)), torch.exp(x) - 1.0)


def power(log_p: Tensor, exponent: float, less_one: bool = False) -> Tensor:
    """``p^q``, or ``p^q - 1``, which has digits where ``p^q`` is near 1."""
    return expm1(exponent * log_p) if less_one else torch.exp(exponent * log_p)


def log_near_one(x: Tensor, x_minus_1: Tensor) -> Tensor:
    """``log x`` where ``x - 1`` is known by itself, with digits that ``x`` has lost if it is near 1."""
    near = x > 0.5
    return torch.where(near, torch.log1p(torch.where(near, x_minus_1, 0.0)), torch.log(torch.where(near, 1.0, x)))


def focal_term(log_p: Tensor, gamma: float) -> Tensor:
    """``-(1 - p)^gamma log p``."""
    if gamma == 0.0:
        return -log_p
    # (1 - p)^gamma has an infinite slope at p = 1 for gamma < 1; its product with log p has slope 0 there. At p = 0 it
    # is 1, and its slope times an infinite logarithm counts as the 0 that it tends to.
    certain, masked = log_p == 0, log_p == -torch.inf
    inside = torch.where(certain | masked, -1.0, log_p)
    at_ends = torch.where(masked, -log_p, -0.0 * log_p)
    return torch.where(certain | masked, at_ends, -((-expm1(inside)) ** gamma) * inside)


def reduce_rows(values: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """``values`` already hold their weights; a mean divides by the sum of ``weights`` (0 where that is 0).

    "active_mean" counts the weights of rows whose value is not 0 only, plus :data:`ACTIVE_GUARD`.
    """
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    active = reduction == "active_mean"
    denominator = torch.where(values == 0.0, 0.0, weights).sum() if active else weights.sum()
    return mean_of(total, denominator, ACTIVE_GUARD if active else 0.0)


def mean_of(total: Tensor, denominator: Tensor, guard: float = 0.0) -> Tensor:
    """``total / (denominator + guard)``; without a guard 0, with gradient 0, where the denominator is 0."""
    if guard:
        return total / (denominator + guard)
    empty = denominator == 0
    return torch.where(empty, 0.0, total / torch.where(empty, 1.0, denominator))


def beside_logits(per_class: Tensor, logits: Tensor) -> Tensor:
    """One number per class ``(C,)``, in the dtype of the logits, as it is multiplied with them."""
    dim = class_dim(logits)
    return per_class.to(logits.dtype).view([-1 if d == dim else 1 for d in range(logits.dim())])


@dataclass(frozen=True)
class Rows:
    """One call's rows in plain PyTorch: logits with the bias in, targets, masks and weights.

    ``weight`` is one per class, ``class_weight`` that of every row's target.
    """

    logits: Tensor
    target: Tensor
    ignored: Tensor
    weight: Tensor | None
    class_weight: Tensor
    sample_weight: Tensor

    @staticmethod
    def of(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        logit_bias: float | Tensor,
        ignore_index: int,
        any_ignored: bool = True,
    ) -> Rows:
        """Computes in float32 (float64 for float64 logits). Ignored rows become zeros with target 0 first of all; who
        knows that there are none says so."""
        logits = logits.to(acc_dtype(logits))
        dim = class_dim(logits)
        if logits.dim() == 1:  # an option of the one row may have shape (1,)
            target = target.reshape(())
            sample_weight = None if sample_weight is None else sample_weight.reshape(())
        target = target.long()
        ignored = target == ignore_index
        if any_ignored:
            target = torch.where(ignored, 0, target)
            logits = torch.where(ignored.unsqueeze(dim), 0.0, logits)
        if isinstance(logit_bias, Tensor) or logit_bias != 0.0:
            one_hot = torch.zeros_like(logits).scatter(dim, target.unsqueeze(dim), 1.0)
            logits = logits + one_hot * logit_bias
        ones = torch.ones(target.shape, dtype=logits.dtype, device=logits.device)
        class_weight = ones if weight is None else entries_of(weight.to(logits.dtype), target)
        samples = ones if sample_weight is None else sample_weight.to(logits.dtype)
        return Rows(logits, target, ignored, weight, class_weight, samples)

    @property
    def dim(self) -> int:
        """The dimension of the classes."""
        return class_dim(self.logits)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[self.dim]

    def of_target(self, per_class: Tensor) -> Tensor:
        """The entry of each row's target, without the class dimension."""
        return per_class.gather(self.dim, self.target.unsqueeze(self.dim)).squeeze(self.dim)

    @property
    def log_probs(self) -> Tensor:
        """Log of the softmax."""
        return torch.log_softmax(self.logits, self.dim)

    @property
    def log_p(self) -> Tensor:
        """Log-probability of the target."""
        return self.of_target(self.log_probs)

    @property
    def is_top(self) -> Tensor:
        """Whether no logit of the row is larger than the target's."""
        return self.of_target(self.logits >= self.logits.amax(self.dim, keepdim=True))

    def sum_log_probs(self, weighted: bool = False) -> Tensor:
        """``sum_j log p_j``, each multiplied by its class's weight if ``weighted``; 0 leaves out even -inf."""
        if not weighted or self.weight is None:
            return self.log_probs.sum(self.dim)
        weight = beside_logits(self.weight, self.logits).expand_as(self.logits)
        return zero_at_zero(weight, self.log_probs).sum(self.dim)

    def target_and_sum(self, term: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``term(log p_y)`` and ``sum_j term(log p_j)``; ``term`` works entry by entry."""
        terms = term(self.log_probs)
        return self.of_target(terms), terms.sum(self.dim)

    def target_and_powers(self, exponent: float, less_one: bool = False) -> tuple[Tensor, Tensor]:
        """``p_y^q`` and ``sum_j p_j^q``, every power less 1 if ``less_one``."""
        return self.target_and_sum(lambda log_p: power(log_p, exponent, less_one))

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """Weighs ``values`` (class weights inside already) by sample and reduces them."""
        kept = torch.where(self.ignored, 0.0, values * self.sample_weight)
        weights = torch.where(self.ignored, 0.0, self.class_weight * self.sample_weight)
        return reduce_rows(kept, weights, reduction)


@dataclass(frozen=True)
class EveryClass(Rows):
    """Rows with every class as the target in turn: a formula's values keep the classes' dimension.

    Of classes without a share, which may be masked, nothing is asked: their entries are zeros.
    """

    has_share: Tensor

    def of_target(self, per_class: Tensor) -> Tensor:
        """The entry of each class."""
        return per_class.masked_fill(~self.has_share, 0)

    def sum_log_probs(self, weighted: bool = False) -> Tensor:
        """As for :class:`Rows`, beside every class."""
        return super().sum_log_probs(weighted).unsqueeze(self.dim)

    def target_and_sum(self, term: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """As for :class:`Rows`, beside every class."""
        terms = term(self.log_probs)
        return self.of_target(terms), terms.sum(self.dim, keepdim=True)


def probability_loss(args: RowLossArguments) -> Tensor:
    """``sum_k u_k w_k loss(z, k)`` for probabilities u, the means over rows as torch's cross entropy takes them."""
    logits, entry = args.logits.to(acc_dtype(args.logits)), LOSSES[args.loss]
    dim, own = class_dim(logits), entry.unpack(args)
    ones = logits.new_ones(())
    share = args.target.to(logits.dtype)
    if "label_smoothing" in own:  # of the probabilities
        share = (1.0 - own["label_smoothing"]) * share + own["label_smoothing"] / logits.shape[dim]
        own["label_smoothing"] = 0.0
    if args.weight is not None:
        share = share * beside_logits(args.weight, logits)
    rows = EveryClass(logits, args.target, ones != ones, None, ones, ones, share != 0)
    values = zero_at_zero(share, entry.formula(rows, **own)).sum(dim)
    samples = torch.ones_like(values) if args.sample_weight is None else args.sample_weight.to(values.dtype)
    return reduce_rows(values * samples, samples, args.reduction)


# The reduced loss of what a wrapper makes of a registered one, by the operators' name of it.
WRAPPED: dict[str, Callable[[RowLossArguments], Tensor]] = {}


def checked_reference(args: RowLossArguments) -> Tensor:
    """The loss as users ask for it: with the operators' errors, where plain operations would broadcast."""
    check_row_loss(args)
    return row_loss_reference(args)


def row_loss_reference(args: RowLossArguments) -> Tensor:
    """The loss by plain operations of torch, which can differentiate them in any way."""
    if args.loss in WRAPPED:
        return WRAPPED[args.loss](args)
    entry = LOSSES[args.loss]
    check_reduction(args.reduction, entry.reductions)
    check_min_classes(args)
    if args.target.is_floating_point() and entry.takes_probabilities:
        return probability_loss(args)
    check_targets(args.target, args.ignore_index, args.logits.shape[class_dim(args.logits)])
    bias = args.logit_bias if args.logit_bias_tensor is None else args.logit_bias_tensor
    rows = Rows.of(args.logits, args.target, args.weight, args.sample_weight, bias, args.ignore_index)
    values = entry.formula(rows, **entry.unpack(args))
    return rows.reduce(values if entry.weighs_classes else rows.class_weight * values, args.reduction)
