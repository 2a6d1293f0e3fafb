"""The common parts of losses that weigh the rows of a batch by their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from fused_losses._agreement import Exchange, sum_over_ranks, telling
from fused_losses._row_values import Loss, RowsModule, RowValues, as_module, check_has_rows, row_exchanges, row_values
from fused_losses._running import RunningMoments
from fused_losses.distributed import check_constant

OPTIONS = """
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum of the weighted losses divided by the sum of the
            weights of the rows that count, or 0 with gradient 0 where that is 0. The ``reduction`` of a Module given as
            ``loss`` is not used.
        process_group: {group}the mean is scaled so that DistributedDataParallel's
            average of the gradients is the gradient of one process with the whole batch. Every rank has to call the
            loss. None: every rank on its own.
        **options: those of the Module of ``loss``, where ``loss`` is a name or a function.

    Returns:
        Called as ``loss`` is, with ``(logits, target, ...)`` but for ``return_row_stats``: the loss in float32, float64
        for float64 logits.

    Raises:
        TypeError: ``loss`` is none of these, an argument is no number, or logits are a DTensor.
        ValueError: an argument is out of range, or options are given beside a Module.
        RuntimeError: a parameter requires a gradient or is on another device; another rank of ``process_group`` has
            failed (between GPUs: a device assertion; under torch.compile: only when the group's timeout is over).

    Rows are judged by their losses without weights. Where label smoothing or class probabilities give every class of a
    row its own weight, a row is judged by the mean over its classes under these weights.

    The weights that the rows get are constants for autograd, and so are the parameters: a tensor that requires a
    gradient is refused. A row whose loss is NaN counts, so that the result is NaN,
    but it does not influence the other rows. Nothing waits for the device.
"""
RUNNING = """
        running: True: use a running mean of {what} over batches, which is in ``state_dict``. A batch is
            added before it is used. In eval mode the mean stays as it is; before any training batch, an eval call uses
            its own batch.
        momentum: how fast earlier batches fade, in [0, 1]: their weight is multiplied by ``1 - momentum`` with every
            batch. 0.1 remembers about 10 batches, 0 all of them.
"""
LOSS = """loss: a row loss: its name ("gce"), its function in :mod:`fused_losses.functional` or its Module; or another
            wrapper of this package around one."""


def documented(what: str | None) -> Callable[[type], type]:
    """Puts what the docstrings share in their places; ``what`` can be remembered over batches."""

    def decorate(made: type) -> type:
        group = "" if what is None else f"its ranks find {what} together, and "
        running = "" if what is None else RUNNING.format(what=what).strip("\n")
        shared = OPTIONS.format(group=group)
        options = "\n".join(part for part in (running, shared.strip("\n")) if part)
        made.__doc__ = (made.__doc__ or "").replace("{loss}", LOSS).replace("        {options}", options)
        return made

    return decorate


class Judged(NamedTuple):
    """The losses of a batch, without graph: flat values, weights, and which of them can be judged."""

    values: Tensor
    weight: Tensor
    known: Tensor


class BatchReducer(RunningMoments, RowsModule):
    """A loss that weighs the rows of another by a statistic of the batch.

    The statistic is one number. It is remembered as the mean of one class whose count is that of the rows.
    """

    def __init__(
        self,
        loss: Loss,
        options: dict[str, Any],
        *,
        reduction: str,
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(running=running, momentum=momentum, process_group=process_group, num_groups=1)
        self.reduction = reduction
        self.loss = as_module(loss, options)
        check_has_rows(self.loss)

    def forward(self, logits: Tensor, target: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """The loss of ``logits`` for ``target``; further arguments are those of the loss inside."""
        with telling(self._exchanges()):
            inner = row_values(self.loss, logits, target, *inputs, **options)
            if self.process_group is not None and self.reduction == "mean":
                check_constant(inner.weight)  # before the statistic learns from the batch
            return self._weighed(inner, logits).reduce(self.reduction, self.process_group)

    def _exchanges(self) -> list[Exchange]:
        """What a call communicates, as the first thing of either part."""
        divisor = self.process_group is not None and self.reduction == "mean"
        return self._row_exchanges() + ([Exchange.over(self.process_group)] if divisor else [])

    def _row_exchanges(self) -> list[Exchange]:
        """Those of :meth:`rows`."""
        own = self.process_group is not None and self._asks_ranks()
        return row_exchanges(self.loss) + ([Exchange.over(self.process_group)] if own else [])

    def _asks_ranks(self) -> bool:
        """Whether the statistic is of all ranks' rows."""
        return True

    def rows(self, logits: Tensor, target: Tensor, *inputs: Any, **options: Any) -> RowValues:
        """Every row's loss as this one weighs it."""
        return self._weighed(row_values(self.loss, logits, target, *inputs, **options), logits)

    def _weighed(self, inner: RowValues, logits: Any) -> RowValues:
        self._check_parameters(inner.values)
        self._check_constants()
        # Weights are constants in forward mode, too; no_grad alone would let derivatives through there.
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            losses = inner.values.detach()
            values = losses.flatten()
            judged = Judged(values, inner.weight.flatten(), inner.kept.flatten() & ~values.isnan())
            constants = self._constants(losses, self._statistic(judged, logits))
        return self._weigh(inner, constants)

    def _check_constants(self) -> None:
        """Raises where a parameter wants a gradient and would get none."""
        for name, tensor in (*self._buffers.items(), *self._parameters.items()):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} of {type(self).__name__} is a constant, got a tensor that requires a gradient: detach it"
                )

    def _statistic(self, judged: Judged, logits: Tensor) -> Any:
        """What rows are judged by."""
        raise NotImplementedError

    def _constants(self, losses: Tensor, statistic: Any) -> tuple[Tensor, ...]:
        """What follows from the statistic for every row."""
        raise NotImplementedError

    def _weigh(self, inner: RowValues, constants: tuple[Tensor, ...]) -> RowValues:
        """The rows, weighed."""
        raise NotImplementedError

    def _remembered(self, value: Tensor, count: Tensor) -> Tensor:
        """``value`` of a batch of so many rows, or the running mean of it."""
        if not self.running:
            return value
        batch = torch.stack([count, value, torch.zeros_like(value)]).double().view(3, 1)
        if self._learns():
            self._update(batch)  # nothing happens where the batch's statistic is infinite
        return self._or_batch(batch)[1, 0].to(value.dtype)

    def _first_sums(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """One or two sums over all ranks of the group, before any other: with news of a rank's failure.

        ``dtype``: of the losses, in which the ranks will exchange other numbers.
        """
        if self.process_group is None:
            return numbers
        is_double = numbers.new_full((1,), float(dtype == torch.float64))
        *found, doubles = sum_over_ranks(torch.cat([numbers, is_double]), self.process_group).unbind()
        if not torch.compiler.is_compiling():
            fit = (doubles == 0) | (doubles == dist.get_world_size(self.process_group))
            if not fit.is_cpu:
                torch._assert_async(fit, "logits must be float64 on all ranks of the process group or on none")
            elif not fit:
                raise RuntimeError(
                    f"logits must be float64 on all ranks of the process group or on none, got losses in {dtype} here"
                )
        return torch.stack(found)

    def _over_ranks(self, sums: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sums over all ranks of the group."""
        if self.process_group is not None:
            sums = sums.contiguous()
            dist.all_reduce(sums, op, group=self.process_group)
        return sums

    def _shown(self) -> dict[str, Any]:
        return {**self._unusual(reduction="mean"), **super()._shown()}


def largest(holds: Callable[[Tensor], Tensor], start: int, digits: int, device: torch.device) -> Tensor:
    """The largest n in ``start + [0, 4**digits)`` for which a condition holds that holds up to some n and not beyond.

    ``start`` where it holds for none. A round asks for three numbers at once: between ranks it is one all-reduce.
    """
    found = torch.full((), start, dtype=torch.int64, device=device)
    for digit in reversed(range(digits)):
        # Not by a range times a number: torch's compiler (2.13, 2.14) takes such products of few numbers for 32 bits.
        further = torch.stack([found + step * 4**digit for step in (1, 2, 3)])
        found = found + holds(further).sum() * 4**digit
    return found
