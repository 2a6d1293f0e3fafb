"""Row losses whose classes are spread over the ranks of a process group.

Every rank has all rows, with the logits of some consecutive classes. What a loss has to know of the other classes is a
few numbers per row: the maximum, the sum of exponentials, the target's logit, and for some losses a sum over the
classes. With these, each rank has the loss and its own classes' gradient, so backward communicates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._arguments import LOSSES, RowLossArguments, acc_dtype
from fused_losses._reference import Rows, zero_at_zero
from fused_losses.distributed import check_member


class Shard(NamedTuple):
    """The classes of this rank: ``first_class`` and the following, of ``num_classes`` in all."""

    group: dist.ProcessGroup | None
    first_class: int
    num_classes: int
    largest: int  # classes of the rank that has most


def find_shard(group: dist.ProcessGroup | None, first_class: int, classes: int, num_classes: int) -> Shard:
    """This rank's shard. Ranks tell each other what they have; all raise unless every class has exactly one rank."""
    check_member(group)
    found: list[tuple[int, int, int]] = [(0, 0, 0)] * dist.get_world_size(group)
    dist.all_gather_object(found, (first_class, classes, num_classes), group=group)
    end = 0
    for first, count, total in sorted(found):
        if total != num_classes or (first != end and count > 0):
            break
        end += count
    else:
        if end == num_classes:
            return Shard(group, first_class, num_classes, max(count for _, count, _ in found))
    spans = ", ".join(f"[{first}, {first + count}) of {total}" for first, count, total in found)
    raise ValueError(
        f"first_class and the logits of all ranks must divide classes 0 to {num_classes - 1}, got by rank: {spans}"
    )


def check_loss(stem: str, name: str) -> None:
    """Raises unless the loss has a form for sharded classes."""
    if LOSSES[stem].sums is None:
        others = ", ".join(stem for stem, entry in LOSSES.items() if entry.sums is not None)
        raise TypeError(f"loss must be one with a form for sharded classes ({others}), got {name}")


def check_classes(args: RowLossArguments, num_classes: int) -> None:
    """Raises where a target is no class: no rank would notice. On CUDA a device assertion."""
    target = args.target
    fine = (target == args.ignore_index) | ((target >= 0) & (target < num_classes))
    if not target.is_cpu:
        torch._assert_async(fine.all())
    elif not fine.all():
        raise IndexError(f"{args.loss}: target {int(target[~fine][0])} is out of range [0, {num_classes})")


def in_words(args: RowLossArguments) -> str:
    """What has to be the same on all ranks that share the classes, beside the target."""
    return (
        f"{args.loss}({', '.join(map(str, args.params))}) of {args.target.numel()} rows, {args.logits.dtype}, "
        f"logit_bias={args.logit_bias}, ignore_index={args.ignore_index}, reduction={args.reduction!r}"
    )


class RowNumbers(NamedTuple):
    """What all ranks together know of every row."""

    log_p: Tensor  # of the target
    is_top: Tensor  # whether no logit is larger than the target's
    linear_sum: Tensor  # sum over the classes of weight * log p


@dataclass(frozen=True)
class ShardedRows(Rows):
    """Rows for a loss's formula, whose numbers per row come from all ranks."""

    shard: Shard
    numbers: RowNumbers  # leaves, but for is_top
    other_sum: Callable[[Callable[[Tensor], Tensor]], Tensor]

    @property
    def num_classes(self) -> int:
        """C, over all ranks."""
        return self.shard.num_classes

    @property
    def log_p(self) -> Tensor:
        """Log-probability of the target."""
        return self.numbers.log_p

    @property
    def is_top(self) -> Tensor:
        """Whether no logit, of any rank, is larger than the target's."""
        return self.numbers.is_top

    def sum_log_probs(self, weighted: bool = False) -> Tensor:
        """The sum that :func:`_linear_weights` has weighted as this loss wants it."""
        return self.numbers.linear_sum

    def target_and_sum(self, term: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``term(log p_y)`` and its sum over all classes."""
        return term(self.numbers.log_p), self.other_sum(term)


def values_and_gradient(args: RowLossArguments, shard: Shard, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Every row's weighted loss, the same on all ranks, and the gradient of their sum in this rank's logits.

    ``args.logits`` is (N, classes of this rank), targets count over all classes. All ranks have to call it: one
    collective, and one more for a sum of terms that need the normaliser first.
    """
    with torch.no_grad():
        logits, target = args.logits, args.target.long()
        ignored = target == args.ignore_index
        local = torch.where(ignored, -1, target - shard.first_class)
        own = (local >= 0) & (local < logits.shape[1])
        index = torch.where(own, local, 0).unsqueeze(1)
        z = _with_bias(logits.to(acc_dtype(logits)), args, own, index)
        linear = _linear_weights(args, shard, z)
        d, of_rank = _reduce_classes(z, ignored, own, index, linear)
        e = d.exp()
        of_rank.insert(1, e.sum(1))
        everywhere = _merge(_gather(of_rank, linear, shard))
        below, log_sum = _below(of_rank[0], everywhere.top), everywhere.sum.log()
        log_p = everywhere.target - everywhere.top - log_sum
        linear_total = torch.zeros_like(log_p) + everywhere.linear - everywhere.linear_weight * log_sum
        log_probs = d.add_((below - log_sum).unsqueeze(1))
        numbers = RowNumbers(log_p, everywhere.target >= everywhere.top, linear_total)
        values, slopes, terms = _evaluate(args, shard, ignored, numbers, log_probs)
        if not with_gradient:
            return values, logits.new_empty(0)
        of_target, of_linear, of_terms = slopes
        # d log p_k / d z_j is [k = j] - p_j, in every one of these numbers.
        pull = of_target + of_linear * everywhere.linear_weight + of_terms
        grad = e.mul_((-pull * below.exp() / everywhere.sum).unsqueeze(1))
        if linear is not None:
            grad += of_linear.unsqueeze(1) * linear
        if terms is not None:
            grad += terms
        if grad.shape[1]:
            grad.scatter_add_(1, index, torch.where(own, of_target, 0.0).unsqueeze(1))
        return values, grad.to(logits.dtype)


def _with_bias(z: Tensor, args: RowLossArguments, own: Tensor, index: Tensor) -> Tensor:
    bias = args.logit_bias if args.logit_bias_tensor is None else args.logit_bias_tensor.to(z)
    if (not isinstance(bias, Tensor) and bias == 0.0) or z.shape[1] == 0:
        return z
    return z.scatter_add(1, index, (own.to(z.dtype) * bias).unsqueeze(1))


def _reduce_classes(
    z: Tensor, ignored: Tensor, own: Tensor, index: Tensor, linear: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """``z`` less its rows' maxima, zeros in ignored rows; this rank's maximum, target's logit, linear sum.

    A rank that has not the target's class, or no class at all, sends -inf, which loses against what others send.
    """
    none = torch.full((z.shape[0],), -torch.inf, dtype=z.dtype, device=z.device)
    top = torch.where(ignored, 0.0, z.amax(1)) if z.shape[1] else none
    of_target = torch.where(own, z.gather(1, index).squeeze(1), none) if z.shape[1] else none
    of_target = torch.where(ignored, 0.0, of_target)
    shift = torch.where(top == -torch.inf, 0.0, top)
    d = torch.where(ignored.unsqueeze(1), 0.0, z - shift.unsqueeze(1))
    numbers = [top, of_target]
    if linear is not None:
        numbers.append(zero_at_zero(linear.expand_as(d), d).sum(1))
    return d, numbers


def _gather(of_rank: list[Tensor], linear: Tensor | None, shard: Shard) -> tuple[Tensor, Tensor | None]:
    """Every rank's numbers [rank, number, row], and its linear weights' sum."""
    message = torch.cat(of_rank if linear is None else [*of_rank, linear.sum().reshape(1)])
    found = message.new_empty(dist.get_world_size(shard.group), message.numel())
    dist.all_gather(list(found.unbind()), message, group=shard.group)
    shape = found.shape[0], len(of_rank), of_rank[0].shape[0]
    if linear is None:
        return found.reshape(shape), None
    return found[:, :-1].reshape(shape), found[:, -1:]


class _Everywhere(NamedTuple):
    """Numbers of each row, over all ranks."""

    top: Tensor  # the largest logit
    sum: Tensor  # of exp(z - top)
    target: Tensor  # its logit
    linear: Tensor | float  # sum of linear weight * (z - top)
    linear_weight: Tensor | float


def _merge(found: tuple[Tensor, Tensor | None]) -> _Everywhere:
    """Sums that are relative to each rank's maximum become relative to that of all, as in an online softmax."""
    numbers, weights = found
    top = numbers[:, 0].amax(0)
    below = _below(numbers[:, 0], top)
    total, of_target = (numbers[:, 1] * below.exp()).sum(0), numbers[:, 2].amax(0)
    if weights is None:
        return _Everywhere(top, total, of_target, 0.0, 0.0)
    return _Everywhere(top, total, of_target, (numbers[:, 3] + weights * below).sum(0), weights.sum())


def _below(top: Tensor, of_all: Tensor) -> Tensor:
    """How far a rank's maximum is below that of all; 0 for a rank without finite logits, whose sums are 0."""
    return torch.where(top == -torch.inf, 0.0, top - of_all)


def _linear_weights(args: RowLossArguments, shard: Shard, z: Tensor) -> Tensor | None:
    """By what this rank's log-probabilities are multiplied in the loss's linear sum; None where there is none."""
    entry = LOSSES[args.loss]
    if "log_probs" not in (entry.sums or ()) or (args.loss == "cross_entropy" and args.params[0] == 0):
        return None
    if args.weight is None or not entry.weighs_classes:
        return z.new_ones(z.shape[1])
    return args.weight[shard.first_class : shard.first_class + z.shape[1]].to(z.dtype)


def _evaluate(
    args: RowLossArguments, shard: Shard, ignored: Tensor, numbers: RowNumbers, log_probs: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | float], Tensor | None]:
    """Values; their derivatives in log p_y, in the linear sum, and through the terms of other sums: the total over all
    classes, and that in each log p_j of this rank."""
    made: list[tuple[Tensor, Tensor, Tensor]] = []  # sums, sums of their slopes, slopes

    def other_sum(term: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            terms = term(leaf)
            (slopes,) = torch.autograd.grad(terms.sum(), leaf)
        sums = torch.stack([terms.detach().sum(1), slopes.sum(1)])
        dist.all_reduce(sums, group=shard.group)
        made.append((sums[0].clone().requires_grad_(), sums[1], slopes))
        return made[-1][0]

    with torch.enable_grad():
        leaves = [numbers.log_p.requires_grad_(), numbers.linear_sum.requires_grad_()]
        ones = torch.ones_like(leaves[0])
        target = torch.where(ignored, 0, args.target.long())
        class_weight = ones if args.weight is None else args.weight.to(ones.dtype)[target]
        samples = ones if args.sample_weight is None else args.sample_weight.to(ones.dtype)
        made_of = numbers._replace(log_p=leaves[0], linear_sum=leaves[1])
        rows = ShardedRows(log_probs, target, ignored, args.weight, class_weight, samples, shard, made_of, other_sum)
        entry = LOSSES[args.loss]
        values = entry.formula(rows, **entry.unpack(args.params))
        values = rows.reduce(values if entry.weighs_classes else class_weight * values, "none")
        leaves.extend(total for total, _, _ in made)
        found = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    of_linear = found[1]
    pull: Tensor | float = 0.0
    terms: Tensor | None = None
    for of_sum, (_, slope_total, slopes) in zip(found[2:], made, strict=True):
        pull = pull + of_sum * slope_total
        terms = of_sum.unsqueeze(1) * slopes if terms is None else terms + of_sum.unsqueeze(1) * slopes
    return values.detach(), (found[0], of_linear, pull), terms
