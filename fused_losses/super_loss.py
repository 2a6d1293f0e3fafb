"""SuperLoss: the smaller a row's loss, the larger its weight."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._batch_reducer import BatchReducer, Judged, documented
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import OrTensor, assigned, finite, positive_factor
from fused_losses._row_values import Loss, RowValues

_LAM, _TAU = OrTensor(positive_factor), OrTensor(finite)
_HALLEY_STEPS = 4  # they converge cubically from two digits on; near -1/e the series starts them closer


def _check_tau(name: str, value: Any) -> Any:
    return None if value is None else assigned(_TAU)(name, value)


def lambert_w(x: Tensor) -> Tensor:
    """The principal branch of Lambert's W, ``w e^w = x``, for float64 ``x >= -1/e``."""
    near = x < -0.25
    root = (2.0 * (math.e * torch.where(near, x, -0.25) + 1.0)).clamp(min=0.0).sqrt()
    series = -1.0 + root * (1.0 - root * (1.0 / 3.0 - root * (11.0 / 72.0)))
    log = torch.log1p(torch.where(near, 0.0, x).clamp(max=1e300))
    w = torch.where(near, series, log * (1.0 - torch.log1p(log) / (2.0 + log)))
    for _ in range(_HALLEY_STEPS):
        exponential, slope = torch.exp(w), w + 1.0
        excess = w * exponential - x
        step = excess / (exponential * slope - (w + 2.0) * excess / (2.0 * slope))
        w = torch.where(slope.abs() < 1e-7, w, w - step)  # at -1/e the series is exact and the step 0 / 0
    return torch.where(x == torch.inf, torch.inf, w)


@documented("the mean loss")
class SuperLoss(BatchReducer):
    """A loss whose rows have larger weights the smaller their losses are, in closed form.

    For noisy labels, as a curriculum without a schedule: easy rows come first, rows with wrong labels count little.
    With l the loss of a row and W Lambert's function, the weight of the row is ``sigma = exp(-W(max(-2 / e, (l - tau) /
    lam) / 2))``: e for the easiest rows, 1 at ``l = tau``, towards 0 for large losses. The value of the row is ``(l -
    tau) sigma + lam log(sigma)^2``, which is negative below ``tau``. ``sigma`` minimises it, so its derivative in l is
    ``sigma``.

    Drawbacks: with many wrong labels the weights do not fall fast enough, and wrong labels are learnt in the end; rows
    of rare classes count less.

    Args:
        {loss}
        lam: > 0, a number or a 0-dim tensor: the larger, the more equal the weights. 1 for CIFAR-10, .25 for CIFAR-100.
        tau: the loss of weight 1: a number, a 0-dim tensor, or None: log C, the cross entropy of a guess. With
            ``running`` it must be None, and is the running mean of the losses (without weights).
        {options}

    Example:
        >>> criterion = SuperLoss("cross_entropy", reduction="none")
        >>> criterion(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        tensor([-0.6856,  1.1167])

    Source: "SuperLoss: A Generic Loss for Robust Curriculum Learning", NeurIPS 2020, Eq. 3 and 4.
    """

    _checks: ClassVar = {"lam": assigned(_LAM), "tau": _check_tau}
    lam: float | Tensor
    tau: float | Tensor | None

    def __init__(
        self,
        loss: Loss,
        lam: float | Tensor = 1.0,
        tau: float | Tensor | None = None,
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
        self._set("lam", lam, _LAM)
        if tau is None:
            self.tau = None
        elif running:
            raise ValueError(f"tau must be None with running=True, which finds it, got {tau}")
        else:
            self._set("tau", tau, _TAU)

    def _asks_ranks(self) -> bool:
        return self.running and self.tau is None

    def _statistic(self, judged: Judged, logits: Tensor) -> Tensor | float:
        if self.tau is not None:
            return self.tau
        if not self.running:
            one = (self._views(logits) or [logits])[0]
            return math.log(one.shape[class_dim(one)])
        finite = judged.known & judged.values.isfinite()
        sums = torch.stack([torch.where(finite, judged.values, 0.0).sum(dtype=torch.float64), finite.sum()])
        total, count = self._first_sums(sums, judged.values.dtype).unbind()
        return self._remembered(total / count.clamp(min=1.0), count)

    def _constants(self, losses: Tensor, statistic: Tensor | float) -> tuple[Tensor, ...]:
        x = 0.5 * ((losses.double() - statistic) / self.lam).clamp(min=-2.0 / math.e)
        log_sigma = -lambert_w(x)
        sigma = torch.exp(log_sigma)
        endless = losses == torch.inf  # such rows get weight 0
        rest = self.lam * log_sigma.square() - sigma * statistic
        return sigma.to(losses.dtype), rest.to(losses.dtype), endless

    def _weigh(self, inner: RowValues, constants: tuple[Tensor, ...]) -> RowValues:
        sigma, rest, endless = constants
        return inner._replace(values=sigma * torch.where(endless, 0.0, inner.values) + rest)

    def _shown(self) -> dict[str, Any]:
        return {"lam": self.lam, "tau": self.tau, **super()._shown()}
