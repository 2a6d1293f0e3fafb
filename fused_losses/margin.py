"""Losses of the errors beyond a margin: the high error margin loss and the multi-class margin loss.

Source: 2501.12191. Each loss: its formula in plain PyTorch, which a decorator turns into the fused function, then its
Module. The C++ forms are in ``csrc/losses/margin.h``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import ACTIVE_REDUCTIONS, CallOptions, entries_of
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._logit_bias import LogitBias
from fused_losses._parameters import Choice, OrTensor, Range, factor, switch
from fused_losses._reference import Rows, beside_logits

# Added to a number of classes, as in the reference code of 2501.12191.
COUNT_GUARD = 1e-6

_margin = OrTensor(factor, per_class=True)
_power = Range("be 1 or 2", lambda v: v in (1, 2))
_ACTIVE_DOC = """
            ``"active_mean"``: the same over the rows whose loss is not 0, with 1e-6 added to the sum of weights."""


def _default_reduction(parameters: dict[str, Any]) -> str:
    mean_above_zero = parameters.get("mean_above_zero", False)
    is_true = isinstance(mean_above_zero, (bool, np.bool_)) and bool(mean_above_zero)  # the switch refuses others
    return "active_mean" if is_true else "mean"


def _per_class(rows: Rows, margin: float | Tensor, of_competitor: bool) -> Tensor:
    """The margin in the shape of logits, or one that broadcasts with it."""
    if not isinstance(margin, Tensor):
        return torch.full((), margin, dtype=rows.logits.dtype, device=rows.logits.device)
    margin = margin.to(rows.logits)
    if margin.dim() == 0:
        return margin
    if margin.shape != (rows.num_classes,):
        raise ValueError(f"margin must be 0-dim or of shape ({rows.num_classes},), got {tuple(margin.shape)}")
    return beside_logits(margin, rows.logits) if of_competitor else entries_of(margin, rows.target).unsqueeze(rows.dim)


def _check_power(p: float, mean_above_zero: float, threshold: float, **others: float) -> None:
    if p == 2 and (mean_above_zero or threshold):
        raise ValueError("p must be 1 with mean_above_zero or threshold, which 2501.12191 defines for it, got 2")


class MarginRule(NamedTuple):
    """Whose margin counts, which errors, their power, and whether their number or C divides."""

    of_competitor: bool = False
    mean_above_zero: bool = True
    threshold: bool = True
    power: int = 1


def margin_rule(stem: str, own: dict[str, Any]) -> tuple[float | Tensor, MarginRule]:
    """The margin and the rule of a call of either loss."""
    if stem == "hem":
        return own["margin"], MarginRule(own["margin_index"] == "competitor")
    return own["margin"], MarginRule(False, own["mean_above_zero"], own["threshold"], int(own["p"]))


def errors_of(logits: Tensor, target_logit: Tensor, margin: Tensor, is_target: Tensor) -> Tensor:
    """The errors ``e_j = max(0, z_j - z_y + margin)``, ``e_y = 0``."""
    raw = logits - target_logit + margin
    # The comparison also drops masked classes (-inf) where the target is -inf, too. With relu the gradient is a
    # function of the logits, whose derivative is 0, and not a constant, which has none.
    return torch.where((raw > 0.0) & ~is_target, torch.relu(raw), 0.0)


def value_of(total: Tensor, number: Tensor, num_classes: int, rule: MarginRule) -> Tensor:
    """A row's value from what its errors add up to, and their number."""
    return total / (number + COUNT_GUARD if rule.mean_above_zero else num_classes)


def are_spoiled(logits: Tensor, margin: Tensor, dim: int) -> Tensor:
    """Rows that become NaN as a whole: comparisons hide NaN, and +inf at the target looks like a row without errors."""
    return ~((logits < math.inf) & (margin < math.inf)).all(dim)


def _margin_value(rows: Rows, margin: Tensor, rule: MarginRule) -> Tensor:
    """The errors that count, to their power, over C or their number.

    The threshold and the number are constants for every derivative.
    """
    logits, dim = rows.logits, rows.dim
    index = rows.target.unsqueeze(dim)
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(dim, index, True)
    errors = errors_of(logits, logits.gather(dim, index), margin, is_target)
    counted = errors > 0.0
    if rule.threshold:
        constant = errors.detach()
        mean = constant.sum(dim, keepdim=True) / rows.num_classes
        counted = counted & (errors >= torch.minimum(mean, constant.amax(dim, keepdim=True)))  # rounding may be upwards
    powers = torch.where(counted, errors, 0.0)
    total = (powers if rule.power == 1 else powers.square()).sum(dim)
    value = value_of(total, counted.to(logits.dtype).sum(dim), rows.num_classes, rule)
    spoiled = are_spoiled(logits, margin, dim)
    spoil = spoiled.unsqueeze(dim)
    factor = torch.where(spoil, math.nan, 1.0).to(logits.dtype)  # two numbers alone would make it of the default dtype
    nothing = torch.where(spoil, logits, 0.0) * factor  # NaN in the derivative of such rows alone
    return torch.where(spoiled, nothing.sum(dim), value)


@loss_of_row(
    {"margin": _margin, "margin_index": Choice(("target", "competitor"))},
    sums=("errors",),
    reductions=ACTIVE_REDUCTIONS,
    reduction=("active_mean", _ACTIVE_DOC),
)
def hem_loss(
    rows: Rows, *, margin: float | Tensor = 0.2, margin_index: str = "target", **options: Unpack[CallOptions]
) -> Tensor:
    """High error margin loss: the mean of the errors that are at least the mean error.

    For clean labels, where inputs of unknown classes have to be rejected (:mod:`fused_losses.scores`) or classes are
    rare; not for wrong labels. The errors are ``e_j = max(0, z_j - z_y + margin)`` for ``j != y`` and ``e_y = 0``. The
    loss is the sum of those with ``e_j >= (1 / C) sum_i e_i`` and ``e_j > 0``, divided by 1e-6 plus their number.
    Errors [0, 0, 0.5, 0.3] have mean 0.2 and loss 0.4. There is no softmax and no bound. A row without errors has loss
    and gradient 0, and the default reduction leaves it out. The threshold and the numbers are constants in every
    derivative. NaN or +inf anywhere in a row makes its loss and gradient NaN.

    Source: 2501.12191. A margin per class is HEM+: the paper's text names the margin of the other class, its code
    weighs by the target's class. The latter is the default, because only it enlarges the margin of rare classes. The
    1e-6 are those of the code. Deviation: errors count from just below their mean, so that equal ones all do whatever
    rounding adds to the mean: from 1e-6 of it below in float32, in rows of C > 2^17 classes from ``(528 + C / 1024)
    2^-24`` below.

    Args:
        margin: >= 0, in units of the logits: a number, a 0-dim tensor, or one margin per class ``(C,)``. 0.2 is the
            paper's for CIFAR; :func:`fused_losses.hem_margin` and :func:`fused_losses.hem_plus_margins` compute it from
            the size of the training set.
        margin_index: with one margin per class, whose counts: ``"target"``, or ``"competitor"`` for that of class j.

    Example:
        >>> hem_loss(torch.tensor([[0.0, -0.2, 0.3, 0.1]]), torch.tensor([0]), margin=0.2)  # errors 0, 0, 0.5, 0.3
        tensor(0.4000)
    """
    of_competitor = margin_index == "competitor"
    return _margin_value(rows, _per_class(rows, margin, of_competitor), MarginRule(of_competitor))


class HEMLoss(RowLossModule, stem="hem"):
    """Module form of :func:`hem_loss`."""

    margin: float | Tensor
    margin_index: str

    def __init__(
        self, margin: float | Tensor = 0.2, margin_index: str = "target", **options: Unpack[RowLossOptions]
    ) -> None:
        options.setdefault("reduction", "active_mean")
        super().__init__({"margin": margin, "margin_index": margin_index}, **options)
        _margin.check_entries("margin", margin)


@loss_of_row(
    {"margin": _margin, "mean_above_zero": switch, "threshold": switch, "p": _power},
    sums=("errors",),
    reductions=ACTIVE_REDUCTIONS,
    reduction=(None, _ACTIVE_DOC + '\n            None: ``"active_mean"`` with ``mean_above_zero``, else ``"mean"``.'),
    reduction_of=_default_reduction,
    check=_check_power,
)
def multi_margin_loss(
    rows: Rows,
    *,
    margin: float | Tensor = 1.0,
    mean_above_zero: bool = False,
    threshold: bool = False,
    p: int = 1,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Multi-class margin loss: ``(1 / C) sum_j e_j^p`` with ``e_j = max(0, z_j - z_y + margin)`` for ``j != y``.

    A baseline for :func:`hem_loss`. Without switches it is :class:`torch.nn.MultiMarginLoss`; with one switch it is an
    ablation of 2501.12191, with both it is HEM. NaN or +inf anywhere in a row makes its loss and gradient NaN.

    Source: ``torch``; 2501.12191 for the switches. Deviations from ``torch``: class weights also count in the
    denominator of the mean; the Module's first argument is ``margin``, not ``p``.

    Args:
        margin: >= 0, in units of the logits: a number, a 0-dim tensor, or one margin per class ``(C,)``, of which the
            target's counts. 1 is torch's default.
        mean_above_zero: divide by 1e-6 plus the number of errors > 0 that count, instead of by C ("+maz").
        threshold: count errors that are at least the mean ``(1 / C) sum_j e_j`` ("+thres"); see :func:`hem_loss`.
        p: 1, or 2 for squared errors (without the switches).

    Example:
        >>> multi_margin_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.5000)
    """
    rule = MarginRule(False, mean_above_zero, threshold, p)
    return _margin_value(rows, _per_class(rows, margin, False), rule)


class MultiMarginLoss(RowLossModule, stem="multi_margin"):
    """Module form of :func:`multi_margin_loss`."""

    margin: float | Tensor
    mean_above_zero: bool
    threshold: bool
    p: int

    def __init__(
        self,
        margin: float | Tensor = 1.0,
        mean_above_zero: bool = False,
        threshold: bool = False,
        *,
        p: int = 1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str | None = None,
        logit_bias: LogitBias = 0.0,
    ) -> None:
        super().__init__(
            {"margin": margin, "mean_above_zero": mean_above_zero, "threshold": threshold, "p": p},
            reduction=_default_reduction({"mean_above_zero": mean_above_zero}) if reduction is None else reduction,
            weight=weight,
            ignore_index=ignore_index,
            logit_bias=logit_bias,
        )
        _margin.check_entries("margin", margin)
