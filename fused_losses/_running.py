"""Statistics of batches that a loss judges its rows by: of one batch, of all ranks, or remembered over batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses import _ops
from fused_losses._agreement import Exchange
from fused_losses._parameters import assigned, closed_fraction, switch
from fused_losses._plain import in_backward, reads_values
from fused_losses.distributed import HasProcessGroup
from fused_losses.statistics import MOMENTS, ClassStatistics, all_reduce_moments


class Source(NamedTuple):
    """Where the moments come from that rows are judged by: given ones, or the batch's over all ranks of a group.

    Running statistics give an ``update``: it takes the batch's moments and returns those to use.
    """

    given: Tensor | None = None
    group: dist.ProcessGroup | None = None
    update: Callable[[Tensor], Tensor] | None = None

    @property
    def needs_checks(self) -> bool:
        """Whether arguments must be checked before :meth:`moments`: other ranks wait there, or the batch is learnt."""
        return self.group is not None or self.update is not None

    @property
    def wants_batch(self) -> bool:
        """Whether :meth:`moments` looks at those of the batch."""
        return self.given is None and not (self.group is None and self.update is None)

    def exchanges(self, reduction: str) -> list[Exchange]:
        """What a call communicates: moments, and what a mean over all ranks divides by."""
        if self.group is None:
            return []
        moments = [Exchange.over(self.group, MOMENTS)] if self.given is None else []
        return [*moments, Exchange.over(self.group)] if reduction == "mean" else moments

    def moments(self, groups: int, of_batch: Callable[[], Tensor]) -> Tensor | None:
        """Moments ``(3, groups)`` to judge the rows by; None for those of the batch as it is."""
        if self.given is not None and self.given.shape[1] != groups:
            raise ValueError(f"statistics must be those of {groups} classes, got {self.given.shape[1]}")
        if not self.wants_batch:
            return self.given
        moments = of_batch()
        if self.group is not None:
            moments = all_reduce_moments(moments, self.group)
        return moments if self.update is None else self.update(moments)


def source_of(statistics: ClassStatistics | None, group: dist.ProcessGroup | None) -> Source:
    """The source for a function's arguments."""
    if not isinstance(statistics, (ClassStatistics, type(None))):
        raise TypeError(f"statistics must be ClassStatistics or None, got {type(statistics).__name__}")
    if statistics is None:
        return Source(None, group)
    moments = statistics.moments()
    if reads_values(moments) and (fault := _fault_of(moments, None)):  # such a class would lose all its rows
        raise ValueError(f"statistics must {fault}, got {statistics}")
    return Source(moments, group)


class RunningMoments(HasProcessGroup):
    """Base of the losses that can remember the statistics of earlier batches.

    With ``running=True`` the buffer ``running_moments`` holds count, mean and sum of squared deviations of every class,
    float64 ``(3, classes)``; ``(3, 0)`` before the first batch where their number was not given.
    """

    _checks: ClassVar = {"running": assigned(switch), "momentum": assigned(closed_fraction)}
    running_moments: Tensor
    _precise: tuple[str, ...] = ("running_moments",)
    _groups: tuple[str, int] = ("classes", 1)  # what users count, and how many groups each has

    def __init__(
        self, *, running: bool, momentum: float, process_group: dist.ProcessGroup | None, num_groups: int | None
    ) -> None:
        super().__init__()
        self.running = running
        self.momentum = momentum
        self.process_group = process_group
        self.num_groups = num_groups
        if self.running:
            self.register_buffer("running_moments", torch.zeros(3, num_groups or 0, dtype=torch.float64))

    @property
    def running_statistics(self) -> ClassStatistics:
        """The running statistics of each class as they are now. Counts fade with the batches and are no integers."""
        if not self.running:
            raise AttributeError  # of which nn.Module asks __getattr__ what to say
        return ClassStatistics.from_moments(self.running_moments.clone())

    def __getattr__(self, name: str) -> Any:
        if name == "running_statistics":
            raise AttributeError(f"{type(self).__name__} has running_statistics only with running=True")
        if name == "running_moments" and name not in vars(self).get("_buffers", ()):
            raise AttributeError(f"{type(self).__name__} has running_moments only if it was made with running=True")
        return super().__getattr__(name)

    def _update(self, batch: Tensor) -> Tensor:
        """Merges a batch's moments into the running ones, whose counts are first multiplied by ``1 - momentum``.

        So counts tend to the batch's divided by ``momentum``. The first batch is taken as it is; a class that is not in
        the batch keeps what it has.
        """
        running: Tensor = self._tensor("running_moments")
        if running.shape[1] == 0:
            is_replica = getattr(self, "_is_replica", False)
            if is_replica or torch.compiler.is_exporting():  # every call would find empty statistics
                what = "learn in a replica (DataParallel)" if is_replica else "be exported in training mode"
                raise RuntimeError(
                    f"{type(self).__name__} with running=True cannot {what} before its statistics have a shape: give "
                    "num_classes (num_tasks), or call it once"
                )
            with torch.inference_mode(False):  # so that later batches can change the buffer
                running = torch.zeros(batch.shape, dtype=torch.float64, device=batch.device)
            self.running_moments = running
        try:
            _ops.update_moments_(running, batch, closed_fraction.pack("momentum", self.momentum))
        except RuntimeError as error:
            if not torch._C._are_functorch_transforms_active():
                raise
            raise RuntimeError(
                f"{type(self).__name__} updates its running statistics in training mode: call eval() under "
                "torch.func.vmap"
            ) from error
        return running

    def reset_parameters(self) -> None:
        """Forgets the running statistics, as after ``to_empty``; there is nothing else to reset."""
        if self.running:
            self.running_moments.zero_()

    def _learns(self) -> bool:
        """Whether a call changes running statistics: in training mode, once."""
        return self.running and self.training and not in_backward()

    def _or_batch(self, batch: Tensor) -> Tensor:
        """The running moments; before any training batch, when they say nothing, those of the batch."""
        return torch.where(self.running_moments[0].sum() > 0, self.running_moments, batch)

    def _source(self, num_groups: int) -> Source:
        """Where a call with that many groups finds the moments to judge by."""
        known = self._tensor("running_moments").shape[1] if self.running else self.num_groups
        if known and known != num_groups:
            what = "running statistics are those" if self.running else "the loss was made for statistics"
            called, share = self._groups
            raise ValueError(f"{what} of {known // share} {called}, got a batch with {num_groups // share}")
        if not self.running:
            return Source(group=self.process_group)
        if self.training:
            closed_fraction.pack("momentum", self.momentum)  # it may have been assigned
            return Source(group=self.process_group, update=self._update if self._learns() else self._or_batch)
        return Source(update=self._or_batch) if known else Source()

    def _shown(self) -> dict[str, Any]:
        return self._unusual(running=False, momentum=0.1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "running_moments") if self.running else None
        if saved is not None:
            fault = _fault_of(saved, self.num_groups)
            if fault:
                args[-1].append(f"{prefix}running_moments must {fault}")  # torch collects the messages and raises
                return
            if self.num_groups is None and saved.shape != self.running_moments.shape:
                self.running_moments = self.running_moments.new_zeros(saved.shape)
            state_dict = {**state_dict, prefix + "running_moments": saved.double()}  # assign=True takes it as it is
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _fault_of(moments: Tensor, num_groups: int | None) -> str:
    """What is wrong with saved moments; "" for nothing."""
    width = "classes" if num_groups is None else num_groups
    if moments.dim() != 2 or moments.shape[0] != 3 or num_groups not in (None, moments.shape[1]):
        return f"have shape (3, {width}), got {tuple(moments.shape)}"
    if not moments.is_meta and not (moments.isfinite().all() and (moments[[0, 2]] >= 0).all()):
        return "hold finite means and counts and sums of squares that are not negative"
    return ""
