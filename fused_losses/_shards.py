"""Row losses whose classes are spread over the ranks of a process group.

Every rank has all rows, with the logits of some consecutive classes. What most losses have to know of the other classes
is a few numbers per row: the maximum, the sum of exponentials, the target's logit, and for some losses a sum over the
classes. With these, each rank has the loss and its own classes' gradient, so backward communicates nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fused_losses._agreement import Exchange, check_member, gather, telling
from fused_losses._arguments import LOSSES, RowLossArguments, acc_dtype, is_ignored
from fused_losses._autograd import row_loss
from fused_losses._plain import outside_transforms
from fused_losses._reference import zero_at_zero
from fused_losses._shard_formula import Formula, Powers, RowNumbers, evaluate, values_of
from fused_losses._shard_margin import sums_of_errors, values_and_gradient_of_errors

# Names of the exchanges: numbers of all rows, only that ranks make the same call, or then numbers of some rows.
ROWS, CALL, CHUNK = "rows", "call", "chunk"


class Shard(NamedTuple):
    """The classes of this rank: ``first_class`` and the following, of ``num_classes`` in all."""

    group: dist.ProcessGroup | None
    first_class: int
    num_classes: int
    largest: int  # number of classes of the rank that has most


def find_shard(group: dist.ProcessGroup | None, first_class: int, classes: int, num_classes: int) -> Shard:
    """This rank's shard. Ranks tell each other what they have; all raise unless every class has exactly one rank."""
    check_member(group)
    found: list[tuple[int, int, int]] = [(0, 0, 0)] * dist.get_world_size(group)
    with outside_transforms():
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


def check_classes(args: RowLossArguments, num_classes: int) -> None:
    """Raises where a target is no class: no rank would notice. On CUDA a device assertion."""
    target = args.target.long()
    fine = is_ignored(target, args.ignore_index) | ((target >= 0) & (target < num_classes))
    if not target.is_cpu:
        torch._assert_async(fine.all())
    elif not fine.all():
        raise IndexError(f"{args.loss}: target {int(target[~fine][0])} is out of range [0, {num_classes})")


def in_words(args: RowLossArguments) -> str:
    """What has to be the same on all ranks that share the classes, beside the target."""
    given = [name for name in ("weight", "sample_weight") if getattr(args, name) is not None]
    return (
        f"{args.loss}({', '.join(map(str, args.params))}) of {args.target.numel()} rows, {args.logits.dtype}, "
        f"logit_bias={args.logit_bias}, ignore_index={args.ignore_index}, reduction={args.reduction!r}, "
        f"{' and '.join(given) or 'no weights'}"
    )


def agree_about_call(args: RowLossArguments, shard: Shard, how: str) -> None:
    """Raises unless all ranks make the same call in the same way: for the collectives that follow."""
    nothing = torch.empty(0, device=args.target.device)
    gather(Exchange.over(shard.group, CALL), f"{in_words(args)}, {how}", nothing, args.target)


def exchange_of_chunk(args: RowLossArguments, shard: Shard, rows: int) -> Exchange:
    """What :func:`values_and_gradient` gathers of up to so many rows, where all ranks have agreed about the call."""
    numbers = _numbers_per_row(args, shard) * rows + 2
    return Exchange.over(shard.group, CHUNK, numbers * acc_dtype(args.logits).itemsize)


@torch.no_grad()
def values_and_gradient(
    args: RowLossArguments, shard: Shard, with_gradient: bool, chunk: Exchange | None = None
) -> tuple[Tensor, Tensor]:
    """Every row's weighted loss, the same on all ranks, and the gradient of their sum in this rank's logits.

    The gradient is in the dtype of arithmetic.

    ``args.logits`` is (N, classes of this rank), targets count over all classes. All ranks have to call it: one
    collective, and one more for sums of terms that need the normaliser first. The first raises unless all make the same
    call; that of a ``chunk`` of a call about which they have agreed is given. Either brings the news of a failure.
    """
    numbers = Exchange.over(shard.group, ROWS) if chunk is None else chunk
    if LOSSES[args.loss].sums is None:
        with telling([numbers]):
            return _whole_rows(args, shard, numbers, with_gradient)
    formula = Formula(args, shard.num_classes)
    terms = _exchanges_of_terms(args, shard, formula)
    with telling([numbers, *terms]):
        rows = _find_targets(args, shard)
        if _has_errors(args):
            return values_and_gradient_of_errors(
                formula, rows.z, rows.own, rows.column, shard.first_class,
                lambda message: _gather(numbers, message, args), terms,
            )  # fmt: skip
        return _softmax_rows(args, shard, formula, rows, numbers, terms, with_gradient)


def _exchanges_of_terms(args: RowLossArguments, shard: Shard, formula: Formula) -> list[Exchange]:
    """Those of sums over the classes whose terms need numbers of whole rows."""
    rows, dtype = len(args.target), acc_dtype(args.logits)
    if _has_errors(args):
        return sums_of_errors(formula, shard.group, rows, dtype)
    sums = 2 * formula.count_terms()
    return [Exchange.adding(shard.group, sums * rows, dtype)] if sums else []


class _Rows(NamedTuple):
    """The rows' logits of this rank's classes, in the dtype of arithmetic, and where their targets are."""

    z: Tensor  # with the bias
    ignored: Tensor
    own: Tensor  # whether the target is one of these classes
    column: Tensor  # (N, 1): which one, else 0


def _find_targets(args: RowLossArguments, shard: Shard) -> _Rows:
    target = args.target.long()
    ignored = is_ignored(target, args.ignore_index)
    local = torch.where(ignored, -1, target - shard.first_class)
    own = (local >= 0) & (local < args.logits.shape[1])
    index = torch.where(own, local, 0).unsqueeze(1)
    return _Rows(_with_bias(args.logits.to(acc_dtype(args.logits)), args, own, index), ignored, own, index)


def _softmax_rows(
    args: RowLossArguments, shard: Shard, formula: Formula, rows: _Rows, numbers: Exchange, terms: list[Exchange],
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of losses of the probabilities."""
    linear, exponent = _linear_weights(args, shard, rows.z), _exponent(args)
    top, of_target, d = _reduce_classes(rows)
    e = d.exp()
    of_rank = [top, of_target, e.sum(1)]
    if linear is not None:
        of_rank.append(zero_at_zero(linear.expand_as(d), d).sum(1))
    if exponent is not None:
        of_rank.append(_smaller_power_sum(d, exponent))
    message = torch.cat([*of_rank, _of_no_row(linear, d)])
    everywhere = _merge(_gather(numbers, message, args), len(top), linear is not None, exponent)
    shift = _below(top, everywhere.top) - everywhere.log_sum
    log_probs = d.add_(shift.unsqueeze(1))
    if not with_gradient:
        return values_of(formula, everywhere.of_rows(), log_probs, terms), d.new_empty(0)
    values, slopes, of_terms = evaluate(formula, everywhere.of_rows(), log_probs, terms)
    # d log p_k / d z_j is [k = j] - p_j, in every one of these numbers.
    pull = slopes.target + slopes.linear * everywhere.linear_weight + slopes.terms
    if exponent is not None:
        of_power = exponent * slopes.power
        pull += of_power * everywhere.powers.whole
        of_terms = of_terms + of_power.unsqueeze(1) * torch.exp(exponent * log_probs)
    grad = e.mul_((-pull * shift.exp()).unsqueeze(1))
    if linear is not None:
        grad += slopes.linear.unsqueeze(1) * linear
    grad += of_terms
    if grad.shape[1]:
        grad.scatter_add_(1, rows.column, torch.where(rows.own, slopes.target, 0.0).unsqueeze(1))
    return values, grad


def _with_bias(z: Tensor, args: RowLossArguments, own: Tensor, index: Tensor) -> Tensor:
    bias = args.logit_bias if args.logit_bias_tensor is None else args.logit_bias_tensor.to(z)
    if (not isinstance(bias, Tensor) and bias == 0.0) or z.shape[1] == 0:
        return z
    return z.scatter_add(1, index, (own.to(z.dtype) * bias).unsqueeze(1))


def _reduce_classes(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's maximum, the target's logit, and ``z`` less the maximum; zeros in ignored rows.

    A rank without the target's class, or without any, sends -inf: the maximum over ranks is then another rank's number.
    """
    z, ignored, own, column = rows
    none = torch.full((z.shape[0],), -torch.inf, dtype=z.dtype, device=z.device)
    top = torch.where(ignored, 0.0, z.amax(1)) if z.shape[1] else none
    of_target = torch.where(own, z.gather(1, column).squeeze(1), none) if z.shape[1] else none
    of_target = torch.where(ignored, 0.0, of_target)
    shift = torch.where(top == -torch.inf, 0.0, top)
    return top, of_target, torch.where(ignored.unsqueeze(1), 0.0, z - shift.unsqueeze(1))


def _smaller_power_sum(d: Tensor, exponent: float) -> Tensor:
    """The sum of ``exp(q d)``, or of ``exp(q d) - 1``, which is not positive: the one nearer to 0.

    The other one follows by the number of classes, and without loss of digits, as it is the larger.
    """
    whole, less_one = torch.exp(exponent * d).sum(1), torch.expm1(exponent * d).sum(1)
    return torch.where((whole > 0) & (whole < 0.5 * d.shape[1]), whole, less_one)


class _Everywhere(NamedTuple):
    """Numbers of each row, over all ranks."""

    top: Tensor  # the largest logit
    log_sum: Tensor  # log of the sum of exp(z - top)
    target: Tensor  # its logit
    linear: Tensor | float  # sum of linear weight * (z - top)
    linear_weight: Tensor | float
    powers: Powers

    def of_rows(self) -> RowNumbers:
        """As the loss's formula wants them."""
        log_p = self.target - self.top - self.log_sum
        linear = torch.zeros_like(log_p) + self.linear - self.linear_weight * self.log_sum
        return RowNumbers(log_p, self.target >= self.top, linear, self.powers, torch.zeros_like(log_p))


def _of_no_row(linear: Tensor | None, d: Tensor) -> Tensor:
    """What a rank tells once: the sum of its linear weights, and how many classes it has."""
    weight = d.new_zeros(()) if linear is None else linear.sum()
    return torch.stack([weight, weight.new_full((), d.shape[1])])


def _gather(exchange: Exchange, message: Tensor, args: RowLossArguments) -> Tensor:
    """The messages of all ranks."""
    if exchange.gathers == CHUNK:
        return gather(exchange, CHUNK, message)
    return gather(exchange, in_words(args), message, args.target)


def _merge(found: Tensor, rows: int, has_linear: bool, exponent: float | None) -> _Everywhere:
    """Sums that are relative to each rank's maximum become relative to that of all, as in an online softmax.

    ``found`` has every rank's maximum, target's logit, sum of exponentials, and where there are such the linear sum and
    the smaller sum of powers, of all rows; then what is told once.
    """
    of_row = 3 + has_linear + (exponent is not None)
    tops, targets, sums, *others = found[:, :-2].reshape(found.shape[0], of_row, rows).unbind(1)
    top = tops.amax(0)
    below, weights, counts = _below(tops, top), found[:, -2:-1], found[:, -1:]
    log_sum = (sums * below.exp()).sum(0).log()
    linear_sum: Tensor | float = 0.0 if not has_linear else (others.pop(0) + weights * below).sum(0)
    powers = Powers(top, top) if exponent is None else _merge_powers(others[0], counts, exponent * (below - log_sum))
    return _Everywhere(top, log_sum, targets.amax(0), linear_sum, weights.sum(), powers)


def _merge_powers(smaller: Tensor, counts: Tensor, shift: Tensor) -> Powers:
    """Both sums of powers, from the smaller one of each rank; ``shift`` is added to the logarithm of its powers.

    ``exp(a + s) - 1 = (exp(a) - 1) exp(s) + (exp(s) - 1)``, where no term is positive: none cancel.
    """
    is_whole = smaller > 0
    whole, less_one = torch.where(is_whole, smaller, counts + smaller), torch.where(is_whole, smaller - counts, smaller)
    return Powers((whole * shift.exp()).sum(0), (less_one * shift.exp() + counts * torch.expm1(shift)).sum(0))


def _below(top: Tensor, of_all: Tensor) -> Tensor:
    """How far a rank's maximum is below that of all; 0 for a rank without finite logits, whose sums are 0."""
    return torch.where(top == -torch.inf, 0.0, top - of_all)


def _whole_rows(args: RowLossArguments, shard: Shard, numbers: Exchange, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Of a loss that no few numbers of a row make: every rank gathers all logits, and keeps its classes' gradient."""
    logits, largest = args.logits.to(acc_dtype(args.logits)), shard.largest
    rows, classes = logits.shape
    here = logits.new_tensor([shard.first_class, classes])
    found = _gather(numbers, torch.cat([F.pad(logits, (0, largest - classes)).flatten(), here]), args)
    first, count = found[:, -2:-1], found[:, -1:]
    column = torch.arange(largest, device=logits.device)
    place = torch.where(column < count, first + column, shard.num_classes).long()  # padding goes to one column more
    parts = found[:, :-2].reshape(len(found), rows, largest).transpose(0, 1).flatten(1)
    whole = logits.new_empty(rows, shard.num_classes + 1).scatter_(1, place.flatten().expand(rows, -1), parts)
    with torch.enable_grad():
        leaf = whole[:, : shard.num_classes].contiguous().requires_grad_(with_gradient)
        values = row_loss(args._replace(logits=leaf, reduction="none"))
        if not with_gradient:
            return values.detach(), logits.new_empty(0)
        (grad,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), grad[:, shard.first_class : shard.first_class + classes]


def _numbers_per_row(args: RowLossArguments, shard: Shard) -> int:
    """That a rank tells of each row before any normaliser is known."""
    if LOSSES[args.loss].sums is None:
        return shard.largest
    if _has_errors(args):
        return 2
    return 3 + _has_linear_sum(args) + (_exponent(args) is not None)


def _has_errors(args: RowLossArguments) -> bool:
    """Whether it is a margin loss, which adds up errors and no exponentials."""
    return "errors" in (LOSSES[args.loss].sums or ())


def _has_linear_sum(args: RowLossArguments) -> bool:
    plain = args.loss == "cross_entropy" and args.params[0] == 0
    return "log_probs" in (LOSSES[args.loss].sums or ()) and not plain


def _linear_weights(args: RowLossArguments, shard: Shard, z: Tensor) -> Tensor | None:
    """By what this rank's log-probabilities are multiplied in the loss's linear sum; None where there is none."""
    entry = LOSSES[args.loss]
    if not _has_linear_sum(args):
        return None
    if args.weight is None or not entry.weighs_classes:
        return z.new_ones(z.shape[1])
    return args.weight[shard.first_class : shard.first_class + z.shape[1]].to(z.dtype)


def _exponent(args: RowLossArguments) -> float | None:
    """Of the powers of the probabilities that the loss adds up; None where there are none."""
    entry = LOSSES[args.loss]
    names = [name.removeprefix("p^") for name in entry.sums or () if name.startswith("p^")]
    own = entry.unpack(args)
    return next((own[name] if name in own else float(name) for name in names), None)
