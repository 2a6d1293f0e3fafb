"""Losses around losses, of known or remembered noise: how to make each, and its published formula in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from conftest import loss_and_grad
from scipy.optimize import brentq
from scipy.special import lambertw
from torch import Tensor, nn

import fused_losses as fl

CLASSES, ROWS = 4, 7
TRANSITION = torch.tensor(
    [[0.7, 0.1, 0.15, 0.05], [0.0, 0.8, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1], [0.05, 0.25, 0.0, 0.7]], dtype=torch.float64
)


def p_of(z: Tensor) -> Tensor:
    exponential = torch.exp(z - z.amax(1, keepdim=True))
    return exponential / exponential.sum(1, keepdim=True)


def ce_rows(z: Tensor, y: Tensor) -> Tensor:
    return -torch.log(p_of(z)[torch.arange(len(y)), y])


def gce_rows(z: Tensor, y: Tensor) -> Tensor:
    return (1 - p_of(z)[torch.arange(len(y)), y] ** 0.7) / 0.7


def forward_rows(z: Tensor, y: Tensor) -> Tensor:
    return -torch.log((p_of(z) @ TRANSITION)[torch.arange(len(y)), y])


def backward_rows(z: Tensor, y: Tensor) -> Tensor:
    every_label = -torch.log(p_of(z))
    return (every_label @ torch.linalg.inv(TRANSITION).T)[torch.arange(len(y)), y]


def normed(z: Tensor, t: float) -> Tensor:
    return torch.stack([row / (t * (row.square().sum().sqrt() + 1e-7)) for row in z])


def clipped(z: Tensor, tau: float) -> Tensor:
    norms = [row.square().sum().sqrt() for row in z]
    return torch.stack([tau / norm * row if norm > tau else row for row, norm in zip(z, norms, strict=True)])


def elr_memory() -> Tensor:
    """The memory of the batch's samples, as if from earlier steps; nobody reads that of the ignored row."""
    memory = 0.9 * p_of(torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)))
    return memory


def make_elr(**options: Any) -> nn.Module:
    loss = fl.ELRLoss(ROWS, CLASSES, **options).eval()
    loss.memory.copy_(elr_memory())
    return loss


def elr_rows(z: Tensor, y: Tensor) -> Tensor:
    there = batch()[1][: len(y) + 1] != -100
    s = (elr_memory()[: len(y) + 1][there].double() * p_of(z)).sum(1)
    return ce_rows(z, y) + 3.0 * torch.log(1 - s)


class OfTwoViews(nn.Module):
    """GJS of the logits and of the same turned by one class, so that there is one tensor to differentiate."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = fl.GJSLoss((0.5, 0.3, 0.2), **options)

    def forward(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        classes = torch.arange(CLASSES).roll(1)
        turned = logits[classes] if logits.dim() == 1 else logits[:, classes]
        return self.loss([logits, turned], target, **options)


def gjs_rows(z: Tensor, y: Tensor) -> Tensor:
    label = torch.zeros(len(y), CLASSES, dtype=z.dtype)
    label[torch.arange(len(y)), y] = 1.0
    parts = [(0.5, label), (0.3, p_of(z)), (0.2, p_of(z.roll(1, 1)))]
    m = sum(share * p for share, p in parts)
    total = sum(share * torch.where(p > 0, p * torch.log(p.clamp(min=1e-300) / m), 0.0).sum(1) for share, p in parts)
    return -total / (0.5 * math.log(0.5))


def smallest(keep: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def rows(z: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        values = gce_rows(z, y)
        order = sorted(range(len(y)), key=lambda i: float(values[i].detach()))
        kept = order[: max(1, int(keep * len(y)))]
        return values, torch.tensor([i in kept for i in range(len(y))])

    return rows


def antidote(delta: float, kappa: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """By a root finder; the weights are constants."""

    def rows(z: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        values = ce_rows(z, y)
        losses, share = values.detach().numpy(), (w / w.sum()).double().numpy()

        def weights(s: float) -> Any:
            part = share * np.exp(-(losses - losses.min()) / s)
            return part / part.sum()

        def divergence(s: float) -> float:
            p = weights(s)
            return float((p * np.log(p / share)).sum())

        s = kappa if divergence(kappa) <= delta else brentq(lambda s: divergence(s) - delta, kappa, 1e3, xtol=1e-13)
        r = torch.from_numpy(weights(s) / share)
        return r * values + kappa * r * torch.log(r) + (s - kappa) * (r * torch.log(r) - delta), torch.ones(len(y)) > 0

    return rows


def super_rows(z: Tensor, y: Tensor) -> Tensor:
    values = gce_rows(z, y)
    beta = (values.detach().numpy() - math.log(CLASSES)) / 0.5
    w = np.where(beta > -2 / math.e, lambertw(beta / 2).real, -1.0)  # SciPy has NaN at -1 / e
    sigma = torch.from_numpy(np.exp(-w))
    return (values - math.log(CLASSES)) * sigma + 0.5 * torch.log(sigma) ** 2


@dataclass(frozen=True)
class Case:
    """``make`` takes weight, ignore_index and reduction; ``rows`` gives the loss of every row that is not ignored, and
    which of them count, from logits, targets and weights of those rows alone."""

    make: Callable[..., nn.Module]
    rows: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    takes_index: bool = False
    tolerance: float = 1e-10
    masked: bool = True  # whether classes may be masked by logits of -inf

    def __call__(self, module: nn.Module, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        inputs = (torch.arange(target.numel()).view(target.shape),) if self.takes_index else ()
        return module(logits, target, *inputs, **options)


def every(rows: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A loss of each row by itself."""
    return lambda z, y, w: (rows(z, y), torch.ones(len(y), dtype=torch.bool))


def _of_row(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "reduction"}


def _of_batch(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name == "reduction"}


CASES = {
    "forward": Case(lambda **o: fl.ForwardCorrectionLoss(TRANSITION, **o), every(forward_rows)),
    "backward": Case(lambda **o: fl.BackwardCorrectionLoss(TRANSITION, **o), every(backward_rows), masked=False),
    "norm": Case(lambda **o: fl.LogitNorm("gce", 0.4, **o), every(lambda z, y: gce_rows(normed(z, 0.4), y))),
    "clip": Case(lambda **o: fl.LogitClip("cross_entropy", 1.5, **o), every(lambda z, y: ce_rows(clipped(z, 1.5), y))),
    "elr": Case(make_elr, every(elr_rows), takes_index=True),
    "clip elr": Case(
        lambda **o: fl.LogitClip(make_elr(**o), 1.5),
        every(lambda z, y: elr_rows(clipped(z, 1.5), y)),
        takes_index=True,
    ),
    "small": Case(lambda **o: fl.SmallLoss("gce", 0.7, **o), smallest(0.7)),
    "clipped": Case(
        lambda **o: fl.ClippedLoss("cross_entropy", 1.2, **o), every(lambda z, y: ce_rows(z, y).clamp(max=1.2))
    ),
    "antidote": Case(lambda **o: fl.Antidote("cross_entropy", 0.4, **o), antidote(0.4, 0.05), tolerance=1e-6),
    "antidote free": Case(lambda **o: fl.Antidote("cross_entropy", 9.0, 2.0, **o), antidote(9.0, 2.0)),
    "super": Case(lambda **o: fl.SuperLoss("gce", lam=0.5, **o), every(super_rows), tolerance=1e-8),
    "super clip": Case(
        lambda **o: fl.SuperLoss(fl.LogitClip("gce", 1.5, **_of_row(o)), lam=0.5, **_of_batch(o)),
        every(lambda z, y: super_rows(clipped(z, 1.5), y)),
        tolerance=1e-8,
    ),
    "small forward": Case(
        lambda **o: fl.SmallLoss(fl.ForwardCorrectionLoss(torch.eye(CLASSES), **_of_row(o)), 0.7, **_of_batch(o)),
        lambda z, y, w: (ce_rows(z, y), smallest(0.7)(z, y, w)[1]),
    ),
    "gjs": Case(OfTwoViews, every(gjs_rows), masked=False),
    "clip forward": Case(
        lambda **o: fl.LogitClip(fl.ForwardCorrectionLoss(TRANSITION, **o), 1.5),
        every(lambda z, y: forward_rows(clipped(z, 1.5), y)),
    ),
    "norm clip": Case(
        lambda **o: fl.LogitNorm(fl.LogitClip(fl.functional.gce_loss, 2.0, **o), 0.4),
        every(lambda z, y: gce_rows(clipped(normed(z, 0.4), 2.0), y)),
    ),
}


def batch(dtype: torch.dtype = torch.float64, rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and targets; the third row is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    target[2] = -100
    return logits.to(dtype), target


def value_and_grad(
    case: Case, module: nn.Module, logits: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    return loss_and_grad(functools.partial(case, module), logits, target, **options)


def expected(case: Case, logits: Tensor, target: Tensor, class_weight: Tensor, sample_weight: Tensor) -> dict[str, Any]:
    """What every reduction gives, by the published formula."""
    there = target != -100
    weight = (class_weight[target.clamp(min=0)] * sample_weight)[there]
    values, kept = case.rows(logits[there].double(), target[there], weight)
    weighted, weight = torch.where(kept, values * weight, 0.0), torch.where(kept, weight, 0.0)
    none = torch.zeros(len(target), dtype=torch.float64)
    none[there] = weighted.detach()
    return {"none": none, "sum": weighted.sum(), "mean": weighted.sum() / weight.sum()}
