"""Losses that choose or weigh the rows of a batch by their losses: SmallLoss, ClippedLoss, Antidote."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._batch_reducer import BatchReducer, Judged, documented, largest
from fused_losses._parameters import OrTensor, Range, assigned, positive_factor
from fused_losses._row_values import Loss, RowValues

_KEEP = OrTensor(Range("satisfy 0 < value <= 1", lambda v: 0.0 < v <= 1.0))
_FACTOR = OrTensor(positive_factor)
_ROUNDING = 1e-6  # keep * n may miss a whole number by this much, for the float64 number that was meant
_OF_FLOAT32 = 1e-7  # relative, of a share that is rounded to float32
_DIGITS = 12  # to base 4 of log temperature in Antidote, whose bounds are never 4**12 roundings apart


def _as_meant(keep: float | Tensor) -> float | Tensor:
    """The share in float64. A tensor is one decimal number, if its dtype has but one of so few digits, else itself."""
    if not isinstance(keep, Tensor):
        return keep
    info, exact = torch.finfo(keep.dtype), keep.double()
    digits = round(1.0 / info.resolution)
    decimal = torch.round(exact * digits) / digits
    upwards = exact * (1.0 + min(0.5 * info.eps, _OF_FLOAT32))  # a third of 300 rows are 100
    return torch.where(decimal.to(keep.dtype) == keep, decimal, upwards).clamp(max=1.0)


@documented("the largest loss that is kept")
class SmallLoss(BatchReducer):
    """The loss of the rows of a batch with the smallest losses.

    For wrong labels whose share is known: early in training they are the rows with large losses. It is the selection
    step of co-teaching, for one network. Start with ``keep=1`` and lower it over the first epochs to one minus the
    share of wrong labels, by assignment or through a 0-dim tensor.

    Drawbacks: rows of rare and hard classes have large losses too and are dropped with the wrong labels, and a single
    network confirms its own choice.

    Args:
        {loss}
        keep: share of the rows that count, 0 < keep <= 1, a number or a 0-dim tensor. Of n rows these are the ``max(1,
            floor(keep n))`` with the smallest losses (without weights), and all others whose loss equals the largest of
            these. With ``running``, the rows whose loss is at most the running mean of that largest loss.
        {options}

    Example:
        >>> criterion = SmallLoss("cross_entropy", keep=0.5)
        >>> criterion(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        tensor(0.1269)

    Source: 1804.06872, Algorithm 1. Deviations: ties are kept; at least one row is kept; the mean divides by the
    weights of the kept rows.
    """

    _checks: ClassVar = {"keep": assigned(_KEEP)}
    keep: float | Tensor

    def __init__(
        self,
        loss: Loss,
        keep: float | Tensor,
        *,
        reduction: str = "mean",
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            loss, options, reduction=reduction, running=running, momentum=momentum, process_group=process_group
        )
        self._set("keep", keep, _KEEP)

    def _statistic(self, judged: Judged, logits: Tensor) -> Tensor:
        values = torch.where(judged.known, judged.values, torch.inf)
        (count,) = self._first_sums(judged.known.sum(dtype=torch.float64).reshape(1), values.dtype).unbind()
        wanted = torch.floor(_as_meant(self.keep) * count + _ROUNDING).clamp(min=1.0)
        if self.process_group is None:
            at = (wanted.long() - 1).clamp(max=max(values.numel() - 1, 0))
            found = values.sort().values.index_select(0, at.view(1)).view(()) if values.numel() else values.sum()
        else:
            found = self._of_all_ranks(values, judged.known, wanted)
        return self._remembered(found, count)

    def _of_all_ranks(self, values: Tensor, known: Tensor, wanted: Tensor) -> Tensor:
        """The ``wanted``-th smallest value of all ranks, found digit by digit: they need not have as many rows each."""
        integer, size = (torch.int64, 64) if values.dtype == torch.float64 else (torch.int32, 32)
        ends = torch.iinfo(integer)

        def turned(bits: Tensor) -> Tensor:  # bits to integers in the order of the numbers, and back
            return torch.where(bits < 0, bits ^ ends.max, bits)

        order = turned(values.view(integer)).long()

        def fewer_below(candidates: Tensor) -> Tensor:
            below = known & (order < candidates.unsqueeze(1))
            return self._over_ranks(below.sum(1, dtype=torch.float64)) < wanted

        found = largest(fewer_below, ends.min, size // 2, values.device)
        return turned(found.to(integer)).view(values.dtype)

    def _constants(self, losses: Tensor, statistic: Tensor) -> tuple[Tensor, ...]:
        return (~(losses > statistic),)

    def _weigh(self, inner: RowValues, constants: tuple[Tensor, ...]) -> RowValues:
        return inner._replace(kept=inner.kept & constants[0])

    def _shown(self) -> dict[str, Any]:
        return {"keep": self.keep, **super()._shown()}


@documented(None)
class ClippedLoss(BatchReducer):
    """``min(loss, c)`` for every row: rows with a larger loss have no gradient.

    For wrong labels and outliers: it bounds any loss. A clipped row counts in the mean, with c.

    Drawbacks: right rows that the network has not learnt yet have large losses too, and a clipped row is never learnt.
    With ``c`` at the loss of a guess (log C for cross entropy) most rows of an untrained network are clipped. GCE falls
    off smoothly instead.

    Args:
        {loss}
        c: the largest loss of a row, without weights, > 0, a number or a 0-dim tensor.
        {options}

    Example:
        >>> criterion = ClippedLoss("cross_entropy", c=1.0)
        >>> criterion(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        tensor(0.5635)

    Source: the clipped loss of robust regression.
    """

    _checks: ClassVar = {"c": assigned(_FACTOR)}
    c: float | Tensor

    def __init__(
        self,
        loss: Loss,
        c: float | Tensor,
        *,
        reduction: str = "mean",
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(loss, options, reduction=reduction, process_group=process_group)
        self._set("c", c, _FACTOR)

    def _asks_ranks(self) -> bool:
        return False

    def _statistic(self, judged: Judged, logits: Tensor) -> float | Tensor:
        return self.c

    def _constants(self, losses: Tensor, statistic: float | Tensor) -> tuple[Tensor, ...]:
        return losses > statistic, torch.clamp(losses, max=statistic)

    def _weigh(self, inner: RowValues, constants: tuple[Tensor, ...]) -> RowValues:
        above, clipped = constants
        return inner._replace(values=torch.where(above, clipped, inner.values))

    def _shown(self) -> dict[str, Any]:
        return {"c": self.c, **super()._shown()}


@documented("the temperature s")
class Antidote(BatchReducer):
    """The mean loss of a batch under those weights, not too far from equal ones, that make it smallest.

    For wrong labels: rows with large losses get small weights, and ``delta`` says how many. With ``l_i`` the losses of
    the rows and ``u_i`` their shares of the weights (1 / n without weights), the value is the minimum of ``sum_i p_i
    l_i + kappa KL(p, u)`` over all weights p that sum to 1 and have ``KL(p, u) <= delta``, where KL is the
    Kullback-Leibler divergence.

    The minimum is at ``p_i`` proportional to ``u_i exp(-l_i / s)``. The temperature s is ``kappa`` if ``KL(p, u) <=
    delta`` holds there, else the root of ``KL(p, u) = delta``, found on the device. The gradient of the value in
    ``l_i`` is ``p_i``. Under "none" and "sum" the value of a row is ``r (l + s log r) - (s - kappa) delta`` with ``r =
    p / u``, times its weight, so that the mean is the value above. A row of infinite loss has weight 0.

    Drawbacks: ``delta`` has to fit the share of wrong labels, and hard rows lose weight too.

    Args:
        {loss}
        delta: how far the weights may go, > 0, a number or a 0-dim tensor. Dropping a share r of the rows takes
            ``-log(1 - r)``. The authors use .27, .57, 1 and 1.62 for 20, 40, 60 and 80 % wrong labels.
        kappa: the lowest temperature, > 0, a number or a 0-dim tensor. .05 is the authors' value.
        {options}

    Example:
        >>> criterion = Antidote("cross_entropy", delta=0.57)
        >>> criterion(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        tensor(0.2089)

    Source: 2508.06622, with KL as the divergence. It is computed from the dual problem: s is ``lambda + kappa``, with
    the ``lambda >= 0`` that minimises ``lambda delta + s log sum_i u_i exp(-l_i / s)``.
    """

    _checks: ClassVar = {"delta": assigned(_FACTOR), "kappa": assigned(_FACTOR)}
    delta: float | Tensor
    kappa: float | Tensor

    def __init__(
        self,
        loss: Loss,
        delta: float | Tensor,
        kappa: float | Tensor = 0.05,
        *,
        reduction: str = "mean",
        running: bool = False,
        momentum: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            loss, options, reduction=reduction, running=running, momentum=momentum, process_group=process_group
        )
        self._set("delta", delta, _FACTOR)
        self._set("kappa", kappa, _FACTOR)

    def _statistic(self, judged: Judged, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The temperature, the smallest loss, and the log of the mean of ``exp((smallest - l) / s)``.

        Of rows with a weight. Where all their losses are infinite, so is the smallest.
        """
        weight = torch.where(judged.known, judged.weight, 0.0)
        sums = torch.stack([(weight > 0.0).sum(dtype=weight.dtype), weight.sum()])
        count, weights = self._first_sums(sums, judged.values.dtype).to(weight.dtype).unbind()
        finite = judged.known & judged.values.isfinite() & (weight > 0.0)
        lowest, spread = self._ends(judged.values, finite)
        above = torch.where(finite, judged.values - lowest, torch.inf)  # exp of minus it is a row's part
        # KL(p || u) is below (spread / s)^2 / 8: the variance of losses within ``spread`` is at most spread^2 / 4.
        least = torch.zeros_like(spread) + self.kappa
        factor = torch.log(torch.maximum(spread / (8.0 * self.delta) ** 0.5, least) / least)

        def temperature(step: Tensor) -> Tensor:
            return least * torch.exp(factor * (step.to(factor.dtype) / 4**_DIGITS))

        def log_mean(s: Tensor) -> tuple[Tensor, Tensor]:
            """Of the rows' parts; and the mean of the exponents under them."""
            exponent = -above / s.unsqueeze(-1)
            part = torch.exp(exponent)
            times_exponent = torch.where(part > 0, part * exponent, 0.0)
            sums = [(weight * each).sum(-1) for each in (part, torch.expm1(exponent), times_exponent)]
            total, below_one, first = self._over_ranks(torch.stack(sums)).unbind()
            of_part = below_one / weights  # all its digits where the parts are nearly 1
            return torch.where(of_part > -0.5, torch.log1p(of_part), torch.log(total / weights)), first / total

        def too_far(steps: Tensor) -> Tensor:
            log_of, exponent = log_mean(temperature(steps))
            return exponent - log_of > self.delta

        s = self._remembered(temperature(largest(too_far, 0, _DIGITS, weight.device)), count)
        # Of no weight there is no mean, and nothing to weigh; nor of infinite losses alone, which stay what they are.
        return s, lowest, torch.where((weights > 0.0) & (lowest < torch.inf), log_mean(s)[0], 0.0)

    def _ends(self, values: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest loss, infinite where there is none, and the largest difference."""
        if values.numel() == 0:
            values, finite = values.new_zeros(1), finite.new_zeros(1)
        ends = torch.stack([torch.where(finite, -values, -torch.inf), torch.where(finite, values, -torch.inf)])
        low, high = self._over_ranks(ends.amax(1), dist.ReduceOp.MAX).unbind()
        there = low > -torch.inf
        return torch.where(there, -low, torch.inf), torch.where(there, high + low, 0.0)

    def _constants(self, losses: Tensor, statistic: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        s, lowest, log_mean = statistic
        below = torch.where(losses == lowest, 0.0, torch.clamp(lowest - losses, max=0.0))  # rows without weight: 0
        r = torch.exp(below / s - log_mean)
        s_log_r = torch.where(r == 0.0, 0.0, below - s * log_mean)
        return r, r * s_log_r - (s - self.kappa) * self.delta  # stationary in s

    def _weigh(self, inner: RowValues, constants: tuple[Tensor, ...]) -> RowValues:
        r, rest = constants
        return inner._replace(values=r * torch.where(r == 0.0, 0.0, inner.values) + rest)

    def _shown(self) -> dict[str, Any]:
        return {"delta": self.delta, "kappa": self.kappa, **super()._shown()}
