"""Targets in narrow integer dtypes are those numbers: no class becomes ``ignore_index`` because it wraps around."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import loss_and_grad
from gloo_group import gloo_group, run_ranks
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import fused_losses as fl
from fused_losses.integrations.huggingface import compute_loss
from fused_losses.integrations.mmengine import FusedLoss
from fused_losses.parallel import ClassParallel

pytestmark = pytest.mark.any_cpu  # what Python makes of targets; kernels are compared in test_edge_cases.py

CLASSES = 200
# Every ignore_index is congruent to a class modulo the range of its dtype, and most are no number of it.
CASES = [
    (torch.uint8, -100, 156), (torch.uint8, -156, 100), (torch.uint8, -57, 199), (torch.uint8, 256 + 7, 7),
    (torch.int16, 2**16 + 156, 156), (torch.int16, 7 - 2**16, 7), (torch.int32, 2**32 + 156, 156),
    (torch.int32, 7 - 2**40, 7),
]  # fmt: skip
cases = pytest.mark.parametrize("dtype, ignore_index, wrapped", CASES)


def problem(wrapped: int) -> tuple[Tensor, Tensor]:
    """Of six rows, two are of the class that ``ignore_index`` becomes modulo the range."""
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits, torch.tensor([3, wrapped, 9, 199, wrapped, 0])


def elr(ignore_index: int) -> Callable[..., Tensor]:
    loss = fl.ELRLoss(6, CLASSES, ignore_index=ignore_index)
    return lambda z, y, **options: loss(z, y, torch.arange(6), **options)


def z_error(ignore_index: int) -> nn.Module:
    return fl.ZErrorCrossEntropyLoss(ignore_index=ignore_index, min_count=1)


def every_mixture(loss: str) -> Callable[[int], Callable[..., Tensor]]:
    shares = (0.3, torch.tensor(0.3), torch.linspace(0.1, 0.9, 6))

    def make(ignore_index: int) -> Callable[..., Tensor]:
        options: dict[str, Any] = {"ignore_index": ignore_index, "weight": torch.linspace(0.5, 2.0, CLASSES).double()}
        return lambda z, y: torch.stack(
            [fl.functional.mixed(loss, z, y, y.flip(0), share, **options) for share in shares]
        )

    return make


def linear(loss: str) -> Callable[[int], Callable[..., Tensor]]:
    weight = torch.eye(CLASSES, dtype=torch.float64)
    return lambda ignore: lambda z, y: fl.functional.linear_loss(z, weight, y, loss, ignore_index=ignore)


WRAPPERS: dict[str, Callable[[int], Callable[..., Tensor]]] = {
    "forward": lambda i: fl.ForwardCorrectionLoss(fl.noise.symmetric_matrix(0.3, CLASSES), ignore_index=i),
    "backward": lambda i: fl.BackwardCorrectionLoss(fl.noise.symmetric_matrix(0.3, CLASSES), ignore_index=i),
    "gjs": lambda i: lambda z, y: fl.GJSLoss((0.5, 0.3, 0.2), ignore_index=i)([z, z.roll(1, 1)], y),
    "elr": elr,
    "norm": lambda i: fl.LogitNorm("gce", 0.4, ignore_index=i),
    "norm twice": lambda i: fl.LogitNorm(fl.LogitClip("nce", 1.0, ignore_index=i), 0.4),
    "clip elr": lambda i: lambda z, y: fl.LogitClip(fl.ELRLoss(6, CLASSES, ignore_index=i), 1.0)(z, y, torch.arange(6)),
    "small": lambda i: fl.SmallLoss("gce", 0.7, ignore_index=i),
    "clipped": lambda i: fl.ClippedLoss("gce", 1.0, ignore_index=i),
    "antidote": lambda i: fl.Antidote("gce", 0.4, ignore_index=i),
    "super": lambda i: fl.SuperLoss("gce", ignore_index=i),
    "z error": z_error,
    "mixed mae": every_mixture("mae"),
    "mixed nce": every_mixture("nce"),
    "linear gce": linear("gce"),
    "linear hem": linear("hem"),
    "FusedLoss": lambda i: (
        lambda z, y: FusedLoss("gce", ignore_index=i, class_weight=[0.5] * 150 + [2.0] * 50)(z, y, torch.ones(6))
    ),
    "Trainer": lambda i: lambda z, y: compute_loss(fl.GCELoss(ignore_index=i))({"logits": z}, y, 12),
    "causal": lambda i: (
        lambda z, y: compute_loss(fl.GCELoss(ignore_index=i), causal=True)(
            {"logits": z.unsqueeze(0)}, y.unsqueeze(0), 12
        )
    ),
}


@cases
@pytest.mark.parametrize("name", [*fl.LOSSES])
def test_row_losses(name: str, dtype: torch.dtype, ignore_index: int, wrapped: int) -> None:
    logits, target = problem(wrapped)
    for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        expected = loss_and_grad(function, logits, target, ignore_index=ignore_index)
        torch.testing.assert_close(
            loss_and_grad(function, logits, target.to(dtype), ignore_index=ignore_index), expected, rtol=0, atol=0
        )


@cases
@pytest.mark.parametrize("name", [*WRAPPERS])
def test_wrappers(name: str, dtype: torch.dtype, ignore_index: int, wrapped: int) -> None:
    logits, target = problem(wrapped)
    expected = loss_and_grad(WRAPPERS[name](ignore_index), logits, target)
    found = loss_and_grad(WRAPPERS[name](ignore_index), logits, target.to(dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[1][1 if name != "causal" else 0].abs().sum() > 0 or name in ("small", "linear hem", "clipped")


@cases
def test_a_row_of_the_wrapped_class_counts(dtype: torch.dtype, ignore_index: int, wrapped: int) -> None:
    """By torch, whose own targets are int64."""
    logits, target = problem(wrapped)
    expected = F.cross_entropy(logits, target)
    of_noise = fl.ForwardCorrectionLoss(torch.eye(CLASSES, dtype=torch.float64), ignore_index=ignore_index)
    of_elr = fl.ELRLoss(6, CLASSES, lam=0.0, ignore_index=ignore_index)
    torch.testing.assert_close(of_noise(logits, target.to(dtype)), expected)
    torch.testing.assert_close(of_elr(logits, target.to(dtype), torch.arange(6)), expected)


def test_a_class_beyond_is_found_in_a_narrow_dtype() -> None:
    """And one that is none does not become one: modulo 256 the number of classes is less than these."""
    many, target = torch.zeros(2, 300), torch.tensor([100, 250], dtype=torch.uint8)
    loss = fl.ForwardCorrectionLoss(torch.eye(300))
    torch.testing.assert_close(loss(many, target), torch.tensor(300.0).log())
    with pytest.raises(IndexError, match="Target 250 is out of bounds"):
        fl.ForwardCorrectionLoss(torch.eye(200))(many[:, :200], target)


def test_two_labels_of_different_dtypes() -> None:
    narrow, wide = torch.tensor([3, 156, 9, 199, 44, 0], dtype=torch.uint8), torch.tensor([1, -100, 199, 5, -100, 7])
    logits, _ = problem(0)
    for first, second in ((narrow, wide), (wide, narrow)):
        for share in (0.3, torch.linspace(0.1, 0.9, 6)):
            found, expected = (
                loss_and_grad(lambda z, a, b=b, s=share: fl.functional.mixed("gce", z, a, b, s), logits, a)
                for a, b in ((first, second), (first.long(), second.long()))
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(IndexError, match="Target 300 is out of bounds"):
        fl.functional.mixed("gce", logits, narrow, wide.masked_fill(wide == 5, 300), 0.3)


def check_between_ranks(rank: int, world_size: int, folder: str) -> None:
    with gloo_group(rank, world_size, folder):
        for dtype, ignore_index, wrapped in CASES:
            logits, target = problem(wrapped)
            half, mine = CLASSES // 2, slice(3 * rank, 3 * rank + 3)
            for make in (fl.GCELoss, fl.NCELoss, fl.CrossEntropyLoss):
                loss = make(ignore_index=ignore_index)
                shared = ClassParallel(loss, None, half * rank, CLASSES)
                here = logits[:, half * rank : half * rank + half]
                torch.testing.assert_close(shared(here, target.to(dtype)), loss(logits, target))
                of_rank = fl.GlobalMean(loss)(logits[mine], target[mine].to(dtype))
                dist.all_reduce(of_rank)
                torch.testing.assert_close(of_rank / world_size, loss(logits, target))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_between_ranks(tmp_path: Path) -> None:
    run_ranks(check_between_ranks, 2, tmp_path)
