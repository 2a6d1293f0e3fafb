"""What the Z-Error losses share: options, fused or plain operators, statistics over batches and ranks, Module base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_losses import _ops, _z_autograd, _z_reference
from fused_losses._arguments import RowLossArguments, ZErrorLossArguments, ZErrorRule, check_reduction
from fused_losses._autograd import row_loss
from fused_losses._parameters import closed_fraction, positive, positive_integer
from fused_losses._reference import row_loss_reference
from fused_losses.statistics import ClassStatistics, all_reduce_moments, merge_moments

Threshold = float | Sequence[float] | Tensor


class ZErrorResult(NamedTuple):
    """What a Z-Error loss returns with ``return_mask=True``.

    Attributes:
        loss: as without it.
        mask: bool, one per row, True for kept rows.
        scores: float64, one per row: (score - mean) / std of the row's class; NaN for rows that have no class (ignored,
            missing label) or whose score is not finite or whose class has too few rows.
    """

    loss: Tensor
    mask: Tensor
    scores: Tensor


@dataclass(frozen=True)
class ZOps:
    """What a Z-Error function is made of, fused or in plain PyTorch."""

    row_loss: Callable[[RowLossArguments], Tensor]
    class_moments: Callable[..., Tensor]
    z_error_row_loss: Callable[[RowLossArguments, ZErrorRule], tuple[Tensor, Tensor, Tensor]]
    z_error_loss: Callable[[ZErrorLossArguments, ZErrorRule], tuple[Tensor, Tensor, Tensor, Tensor]]


FUSED = ZOps(row_loss, _ops.class_moments, _z_autograd.z_error_row_loss, _z_autograd.z_error_loss)
PLAIN = ZOps(row_loss_reference, _z_reference.class_moments, _z_reference.z_error_row_loss, _z_reference.z_error_loss)


def fused_and_plain(make: Callable[[ZOps], Callable[..., Any]]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both kinds of a Z-Error function, named for the places that users, and pickle, find them in."""
    fused, plain = make(FUSED), make(PLAIN)
    for function in (fused, plain):
        function.__qualname__ = function.__name__
    plain.__module__ = "fused_losses.reference"
    return fused, plain


@dataclass(frozen=True)
class Source:
    """Where the moments come from that rows are judged by: given ones, or the batch's over all ranks of a group.

    ``update`` turns the batch's into those to use, for running statistics.
    """

    given: Tensor | None = None
    group: dist.ProcessGroup | None = None
    update: Callable[[Tensor], Tensor] | None = None

    def moments(self, groups: int, of_batch: Callable[[], Tensor]) -> Tensor | None:
        """Moments ``(3, groups)`` to judge the rows by; None for those of the batch as it is."""
        if self.given is not None:
            if self.given.shape[1] != groups:
                raise ValueError(f"statistics must be those of {groups} classes, got {self.given.shape[1]}")
            return self.given
        if self.group is None and self.update is None:
            return None
        moments = of_batch()
        if self.group is not None:
            moments = all_reduce_moments(moments, self.group)
        return moments if self.update is None else self.update(moments)


def source_of(
    statistics: ClassStatistics | None, group: dist.ProcessGroup | None, update: Callable[[Tensor], Tensor] | None
) -> Source:
    """The source for a function's arguments."""
    return Source(None if statistics is None else statistics.moments(), group, update)


def choose(name: str, value: str, choices: dict[str, str]) -> str:
    """The operator's word for an option; raises a ValueError that lists the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return choices[value]


def check_small_class(min_count: int, small_class: str) -> bool:
    """Whether classes with fewer than ``min_count`` rows are kept; raises a ValueError on bad values."""
    positive_integer.pack("min_count", min_count)
    return choose("small_class", small_class, {"drop": "", "keep": "keep"}) == "keep"


def check_threshold(threshold: Threshold) -> None:
    """Raises unless all numbers are positive. Values of tensors are not looked at, which would synchronise."""
    if isinstance(threshold, Tensor):
        if not threshold.is_floating_point():
            raise ValueError(f"threshold must be floating point, got a tensor of dtype {threshold.dtype}")
    elif isinstance(threshold, (tuple, list)):
        for value in threshold:
            positive.pack("threshold", value)
    else:
        positive.pack("threshold", threshold)


def pack_threshold(threshold: Threshold) -> tuple[list[float], Tensor | None]:
    """The operators' ``threshold`` and ``threshold_tensor``."""
    check_threshold(threshold)
    if isinstance(threshold, Tensor):
        return [], threshold.detach().reshape(-1) if threshold.dim() > 1 else threshold.detach()
    return list(threshold) if isinstance(threshold, (tuple, list)) else [threshold], None  # type: ignore[list-item]


def spread_weight(sample_weight: Tensor | None, like: Tensor) -> Tensor | None:
    """One weight per entry of ``like`` from that, or from one weight per sample."""
    if sample_weight is None or sample_weight.shape == like.shape:
        return sample_weight
    if sample_weight.dim() == 1 and like.dim() > 1 and sample_weight.shape[0] == like.shape[0]:
        return sample_weight.reshape([-1] + [1] * (like.dim() - 1)).expand(like.shape)
    raise ValueError(
        f"sample_weight must have shape {tuple(like.shape)} or ({like.shape[0] if like.dim() else 1},), "
        f"got {tuple(sample_weight.shape)}"
    )


class ZErrorModule(nn.Module):
    """Base of the Z-Error Modules: threshold and running statistics.

    A tensor given for ``threshold`` becomes a buffer. With ``running=True`` the buffer ``running_moments`` holds count,
    mean and sum of squared deviations of every class, float64 ``(3, classes)``, empty before the first batch.
    """

    threshold: Threshold
    running_moments: Tensor

    def __init__(
        self,
        threshold: Threshold,
        *,
        reduction: str,
        running: bool,
        momentum: float,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        check_threshold(threshold)
        check_reduction(reduction)
        closed_fraction.pack("momentum", momentum)
        if isinstance(threshold, Tensor):
            self.register_buffer("threshold", threshold)
        else:
            self.threshold = threshold
        self.reduction = reduction
        self.running = running
        self.momentum = momentum
        self.process_group = process_group
        if running:
            self.register_buffer("running_moments", torch.zeros(3, 0, dtype=torch.float64))

    @property
    def running_statistics(self) -> ClassStatistics:
        """The running statistics by class; counts are those of a decaying memory and not integers."""
        if not self.running:
            raise RuntimeError(f"{type(self).__name__} has running statistics only with running=True")
        return ClassStatistics.from_moments(self.running_moments)

    def _update(self, batch: Tensor) -> Tensor:
        """Merges a batch's moments into the running ones, whose rows first lose the share ``momentum`` of their weight.

        A class that is not in the batch keeps what it has. A memory of constant batches tends to their size divided by
        ``momentum``; the first batch is taken as it is.
        """
        old = self.running_moments
        if old.shape != batch.shape:
            if old.numel():
                raise ValueError(
                    f"running statistics are those of {old.shape[1]} classes, got a batch with {batch.shape[1]}"
                )
            old = torch.zeros_like(batch)
        count, mean, m2 = old.unbind(0)
        faded = torch.stack([count * (1.0 - self.momentum), mean, m2 * (1.0 - self.momentum)])
        new = torch.where(batch[0] > 0, merge_moments(torch.stack([faded, batch])), old)
        if self.running_moments.shape == new.shape:
            self.running_moments.copy_(new)
        else:
            self.running_moments = new.clone()
        return new

    def _source(self, num_groups: int, device: torch.device) -> Source:
        if not self.running:
            return Source(group=self.process_group)
        if self.training:
            return Source(group=self.process_group, update=self._update)
        known = self.running_moments
        return Source(given=known if known.numel() else known.new_zeros(3, num_groups, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZErrorModule:
        # module.half() must not round the statistics, which kernels read in float64.
        before = self.running_moments if self.running else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.running_moments.dtype != torch.float64:
            self.running_moments = before.to(self.running_moments.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The number of classes is not known before the first batch.
        saved = state_dict.get(prefix + "running_moments") if self.running else None
        if saved is not None:
            self.running_moments = self.running_moments.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _shown(self) -> dict[str, Any]:
        """Options for ``repr``; those at their defaults are left out."""
        threshold: Any = self.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.item() if threshold.numel() == 1 else f"Tensor{list(threshold.shape)}"
        shown: dict[str, Any] = {"threshold": threshold}
        if self.reduction != "mean":
            shown["reduction"] = self.reduction
        if self.running:
            shown |= {"running": True, "momentum": self.momentum}
        return shown

    def extra_repr(self) -> str:
        """The threshold and the options that differ from their defaults."""
        return ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
