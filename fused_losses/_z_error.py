"""What the Z-Error losses share: options, fused or plain operators, statistics over batches and ranks, Module base.

Words. Users choose a score, operators are told where it comes from (``csrc/ops/ops.cpp``):

    class labels, statistic=     "logit"                    "class", of logits
                                 "prob"                     "class_prob", of cross entropies; "class_softmax", of logits
                                 "loss"                     "class", of losses; "class_cross_entropy", of logits
    binary labels, space=        "logit", "prob"            "bce_logit", "bce_prob"
    regression, statistic=       "target", "loss", ...      "mse_target", "mse_loss", ...
    sided=                       "two", "lower"             tail "both", "low" ("high" for losses of class labels)

How rows are judged is called a rule: :class:`ZErrorRule` is what the operators get, in the words on the right. Kernels
make of it and the moments a ``KeepInterval`` of each group: mean, std and the bounds of z. Those of all groups are
``ZErrorIntervals``, the ``rules`` of the CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses import _ops, _z_autograd, _z_reference
from fused_losses._agreement import Exchange
from fused_losses._arguments import REDUCTIONS, RowLossArguments, ZErrorLossArguments, ZErrorRule, check_reduction
from fused_losses._autograd import row_loss
from fused_losses._checks import FLOATING, check_tensors
from fused_losses._parameters import (
    Choice,
    assigned,
    check_choice,
    check_entries,
    explains_keywords,
    positive_integer,
    positive_or_inf,
)
from fused_losses._plain import reads_values
from fused_losses._reference import row_loss_reference
from fused_losses._running import RunningMoments, Source
from fused_losses.distributed import check_constant, global_mean

Threshold = float | Sequence[float] | Tensor
SIDES = {"two": "both", "lower": "low"}


class ZErrorResult(NamedTuple):
    """What a Z-Error loss returns with ``return_mask=True``.

    Attributes:
        loss: as without it.
        mask: bool, one per row, True for rows that are kept.
        scores: z of every row, ``(score - mean) / std`` of the row's class, float64. NaN for rows that have none: rows
            without a class (ignored, missing label), with a score that is not finite, or with too few rows in their
            class.
    """

    loss: Tensor
    mask: Tensor
    scores: Tensor


@dataclass(frozen=True)
class ZOps:
    """What a Z-Error function is made of, fused or in plain PyTorch."""

    row_loss: Callable[[RowLossArguments], Tensor]
    class_moments: Callable[..., Tensor]
    z_error_row_loss: Callable[
        [RowLossArguments, ZErrorRule, _z_reference.ClassScore | None], tuple[Tensor, Tensor, Tensor]
    ]
    z_error_loss: Callable[[ZErrorLossArguments, ZErrorRule], tuple[Tensor, Tensor, Tensor, Tensor]]


FUSED = ZOps(row_loss, _ops.class_moments, _z_autograd.z_error_row_loss, _z_autograd.z_error_loss)
PLAIN = ZOps(row_loss_reference, _z_reference.class_moments, _z_reference.z_error_row_loss, _z_reference.z_error_loss)


def fused_and_plain(make: Callable[[ZOps], Callable[..., Any]]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both kinds of a Z-Error function, under the names by which users and pickle find them."""
    fused, plain = make(FUSED), make(PLAIN)
    for function in (fused, plain):
        function.__qualname__ = function.__name__
    plain.__module__ = "fused_losses.reference"
    return explains_keywords(fused), explains_keywords(plain)


def choose(name: str, value: str, choices: dict[str, str]) -> str:
    """The operator's word for an option; raises a ValueError that lists the choices."""
    return choices[check_choice(name, value, choices)]


def check_small_class(min_count: int, small_class: str) -> tuple[int, bool]:
    """``min_count``, and whether classes with fewer rows are kept; raises a ValueError on bad values."""
    count = int(positive_integer.pack("min_count", min_count))
    return count, check_choice("small_class", small_class, ("drop", "keep")) == "keep"


def check_count(name: str, count: int | None) -> int | None:
    """``count``; raises a ValueError unless it is an integer of at least 1 or None."""
    return None if count is None else int(positive_integer.pack(name, count))


def check_threshold(threshold: Threshold) -> Threshold:
    """``threshold``, its numbers as Python's. Raises unless all are positive; those of tensors are looked at where that
    waits for nobody."""
    if isinstance(threshold, Tensor):
        if not threshold.is_floating_point():
            raise ValueError(f"threshold must be floating point, got a tensor of dtype {threshold.dtype}")
        if threshold.requires_grad:
            raise RuntimeError("threshold is a constant, got a tensor that requires a gradient: detach it")
        if reads_values(threshold):
            check_entries("threshold", threshold, positive_or_inf)
        return threshold
    if isinstance(threshold, (tuple, list)):
        return tuple(positive_or_inf.pack("threshold", value) for value in threshold)
    return positive_or_inf.pack("threshold", threshold)


class Groups(NamedTuple):
    """What thresholds are for: classes, or tasks with so many labels each."""

    unit: str
    number: int
    labels: int = 1

    def check_threshold(self, threshold: Threshold) -> None:
        """Raises unless there is one for all, for each label, or for each label of each task (for each class)."""
        pair = self.labels == 2
        if isinstance(threshold, (tuple, list)):
            if len(threshold) != 1 and not (pair and len(threshold) == 2):
                rule = f"one number{' or two, for labels 0 and 1,' * pair} or a tensor with one per {self.unit}"
                raise ValueError(f"threshold must be {rule}, got a list of {len(threshold)}")
        elif isinstance(threshold, Tensor):
            shape = (self.number, self.labels)
            if threshold.dim() > 1 and (self.unit == "class" or threshold.shape != shape):
                may_be = (
                    "have at most one dimension" if self.unit == "class" else f"have one dimension or shape {shape}"
                )
                raise ValueError(f"threshold must {may_be}, got shape {tuple(threshold.shape)}")
            if threshold.numel() not in {1, self.labels, self.number * self.labels}:
                per = "label or per task and label" if pair else self.unit
                rule = f"0-dim or hold one number per {per} ({self.number * self.labels})"
                raise ValueError(f"threshold must be {rule}, got shape {list(threshold.shape)}")


def pack_threshold(threshold: Threshold, groups: Groups | None = None) -> tuple[list[float], Tensor | None]:
    """The operators' ``threshold`` and ``threshold_tensor``."""
    if threshold.__class__ is float and positive_or_inf.holds(threshold):  # nearly always
        return [threshold], None
    threshold = check_threshold(threshold)
    if groups is not None:
        groups.check_threshold(threshold)
    if isinstance(threshold, Tensor):
        return [], threshold.detach().reshape(-1) if threshold.dim() > 1 else threshold.detach()
    return list(threshold) if isinstance(threshold, tuple) else [threshold], None  # type: ignore[list-item]


def spread_weight(sample_weight: Tensor | None, like: Tensor) -> Tensor | None:
    """One weight per entry of ``like`` from that, or from one weight per sample."""
    if sample_weight is None:
        return None
    check_tensors(sample_weight=sample_weight)
    if sample_weight.shape == like.shape:
        return sample_weight
    if sample_weight.dim() == 1 and like.dim() > 1 and sample_weight.shape[0] == like.shape[0]:
        return sample_weight.reshape([-1] + [1] * (like.dim() - 1)).expand(like.shape)
    per_row = f" or ({like.shape[0]},)" if like.dim() > 1 else ""
    raise ValueError(f"sample_weight must have shape {tuple(like.shape)}{per_row}, got {tuple(sample_weight.shape)}")


def masked_loss(
    ops: ZOps,
    source: Source,
    input: Tensor,
    target: Tensor,
    statistic: str,
    *,
    per_task: bool,
    labels: int,
    threshold: Threshold,
    tail: str,
    min_count: int,
    keep_small: bool,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    return_mask: bool,
) -> Tensor | ZErrorResult:
    """Statistics, then mask and loss. The operators take the last of several dimensions for the tasks."""
    check_reduction(reduction)
    if pos_weight is not None:
        check_tensors(pos_weight=pos_weight)
    weights = spread_weight(sample_weight, input)
    input, target = _tasks_last(input, per_task), _tasks_last(target, per_task)
    weights = None if weights is None else _tasks_last(weights, per_task)
    tasks = input.shape[-1] if input.dim() > 1 else 1
    groups = labels * tasks
    numbers, tensor = pack_threshold(threshold, Groups("task", tasks, labels))
    mean_over_ranks = source.group is not None and reduction == "mean"
    if mean_over_ranks and weights is not None:
        check_constant(weights)
    if source.needs_checks:
        _check_weights(input, weights, pos_weight, tasks)
    constant_input, constant_target = input.detach(), target.detach()
    moments = source.moments(
        groups, lambda: ops.class_moments(constant_input, constant_target, groups, statistic, -100)
    )
    arguments = ZErrorLossArguments(input, target, pos_weight, weights, "sum" if mean_over_ranks else reduction)
    rule = ZErrorRule(moments, tensor, numbers, statistic, tail, min_count, keep_small, return_mask)
    loss, denominator, mask, scores = ops.z_error_loss(arguments, rule)
    if mean_over_ranks:
        loss = global_mean(loss, denominator, source.group)
    if reduction == "none":
        loss = _tasks_back(loss, per_task)
    if not return_mask:
        return loss
    return ZErrorResult(loss, _tasks_back(mask, per_task), _tasks_back(scores, per_task))


def _check_weights(input: Tensor, sample_weight: Tensor | None, pos_weight: Tensor | None, tasks: int) -> None:
    """Raises where the operator would, after statistics have learnt from the batch."""
    for name, weight in (("sample_weight", sample_weight), ("pos_weight", pos_weight)):
        if weight is None:
            continue
        if weight.dtype not in FLOATING:
            raise RuntimeError(f"{name} must be float64, float32, float16 or bfloat16, got {weight.dtype}")
        if weight.device != input.device:
            raise RuntimeError(f"{name} must be on the device of input ({input.device}), got {weight.device}")
    if pos_weight is not None and (pos_weight.dim() > 1 or pos_weight.numel() not in (1, tasks)):
        shape = list(pos_weight.shape)
        raise ValueError(f"pos_weight must hold one number or one per task ({tasks}), got shape {shape}")


def _tasks_last(rows: Tensor, per_task: bool) -> Tensor:
    """(N, T, d1, ...) with the tasks at the end; with one more dimension where all entries form one task."""
    if rows.dim() < 2:
        return rows
    return rows.movedim(1, -1) if per_task else rows.unsqueeze(-1)


def _tasks_back(rows: Tensor, per_task: bool) -> Tensor:
    """Undoes :func:`_tasks_last`."""
    if rows.dim() < 2:
        return rows
    return rows.movedim(-1, 1) if per_task else rows.squeeze(-1)


def check_pair(name: str, input: Tensor, target: Tensor) -> None:
    """Raises unless both are dense tensors of one shape, and the first, called ``name``, a floating point one."""
    check_tensors(**{name: input, "target": target})
    if input.dtype not in FLOATING:
        raise RuntimeError(f"{name} must be float64, float32, float16 or bfloat16, got {input.dtype}")
    if input.shape != target.shape:
        raise ValueError(f"target must have the shape of the input, {list(input.shape)}, got {list(target.shape)}")


def tasks_of(name: str, input: Tensor) -> int:
    """How many tasks (N, T, d1, ...), called ``name``, has."""
    check_tensors(**{name: input})
    return input.shape[1] if input.dim() > 1 else 1


class ZErrorModule(RunningMoments):
    """Base of the Z-Error Modules: threshold and running statistics. A tensor given for ``threshold`` is a buffer."""

    _checks: ClassVar = {"reduction": assigned(Choice(REDUCTIONS))}
    threshold: Threshold

    def __init__(
        self,
        threshold: Threshold,
        *,
        reduction: str,
        running: bool,
        momentum: float,
        process_group: dist.ProcessGroup | None,
        num_groups: int | None,
    ) -> None:
        super().__init__(running=running, momentum=momentum, process_group=process_group, num_groups=num_groups)
        threshold = check_threshold(threshold)
        units, labels = self._groups
        if isinstance(threshold, tuple) and labels == 1:
            threshold = torch.tensor(threshold, dtype=torch.float64)  # one per class or task
        if isinstance(threshold, Tensor):  # on a GPU, too: once
            check_entries("threshold", threshold, positive_or_inf)
        if num_groups is not None or not isinstance(threshold, Tensor):
            unit = "class" if units == "classes" else "task"
            Groups(unit, (num_groups or labels) // labels, labels).check_threshold(threshold)
        self._keep("threshold", threshold)
        self.reduction = reduction

    def _exchanges(self, reduction: str | None = None) -> list[Exchange]:
        """What a call communicates, under another ``reduction`` than the loss's if given."""
        if self.process_group is None or (self.running and not self.training):
            return []
        return Source(group=self.process_group).exchanges(reduction or self.reduction)

    def _shown(self) -> dict[str, Any]:
        units, labels = self._groups
        number = {} if self.num_groups is None else {f"num_{units}": self.num_groups // labels}
        return {**self._unusual(reduction="mean"), **super()._shown(), **number}
