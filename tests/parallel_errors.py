"""What ranks are told about wrong calls, their own and those of others, for test_parallel.py."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from parallel_problem import CLASSES, FEATURES, bounds
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fused_losses as fl
from fused_losses.functional import linear_loss
from fused_losses.parallel import ClassParallel


def check_errors(rank, world_size):
    first, end = bounds(rank, world_size)
    logits, target = torch.zeros(4, end - first), torch.zeros(4, dtype=torch.int64)
    sharded = ClassParallel(fl.GCELoss(), None, first, CLASSES)
    for bad in (CLASSES, -1):
        with pytest.raises(IndexError, match=rf"target {bad} is out of range \[0, {CLASSES}\)"):
            sharded(logits, torch.tensor([0, 0, bad, 0]))
    for bad, error, message in (
        (None, TypeError, "logits must be a Tensor, got NoneType"),
        (torch.zeros(4), ValueError, "logits must have a dimension of classes"),
        (logits.to_sparse(), RuntimeError, "logits must be dense"),
    ):
        for call in (sharded, ClassParallel(fl.GCELoss(), None, first, CLASSES)):
            with pytest.raises(error, match=message):
                call(bad, target)
    with pytest.raises(ValueError, match="first_class and the logits of all ranks must divide"):
        ClassParallel(fl.GCELoss(), None, first, CLASSES + 1)(logits, target)
    for bad in (-1, CLASSES + 1):
        with pytest.raises(ValueError, match=f"between 0 and num_classes = {CLASSES}, got {bad}"):
            ClassParallel(fl.GCELoss(), None, bad, CLASSES)
    with pytest.raises(TypeError, match="row-loss Module"):
        ClassParallel(nn.CrossEntropyLoss(), None, first, CLASSES)
    alone = fl.LinearLoss(FEATURES, CLASSES)
    fully_shard(alone.linear)
    for call in (alone.logits, lambda x: alone(x, target)):
        with pytest.raises(RuntimeError, match="linear must not be sharded by fully_shard on its own"):
            call(torch.zeros(4, FEATURES))
    check_derivatives(sharded, logits, target)
    total = sharded(logits.requires_grad_(), target)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(total, logits, create_graph=True)


def check_derivatives(sharded, logits, target):
    """There is one, the first in the logits; others are errors, not zeros. Of sharded rows, others are right."""
    samples, weight, bias = torch.ones(4, requires_grad=True), torch.ones(CLASSES, requires_grad=True), torch.ones(())
    with pytest.raises(RuntimeError, match="differentiable in the logits only, got sample_weight"):
        sharded(logits, target, samples)
    with torch.no_grad():
        sharded(logits, target, samples)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        sharded(forward_ad.make_dual(logits, logits), target)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.zeros(4, CLASSES)
    for placement, message in ((Shard(1), "sharded classes is differentiable"), (Shard(0), "rows of all ranks is not")):
        placed = distribute_tensor(whole, mesh, [placement])
        for loss, weights in ((fl.GCELoss(), samples), (fl.GCELoss(weight=weight), None)):
            with pytest.raises(RuntimeError, match=message):
                loss(placed, target, weights)
    loss = fl.GCELoss(logit_bias=bias.requires_grad_())
    with pytest.raises(RuntimeError, match="got logit_bias"):
        loss(distribute_tensor(whole, mesh, [Shard(1)]), target)
    with pytest.raises(ValueError, match="return_row_stats must be False"):
        loss(placed, target, return_row_stats=True)
    with pytest.raises(TypeError, match=r"logits must be a plain tensor, got a DTensor"):
        fl.functional.gce_loss(placed, target)
    with pytest.raises(TypeError, match=r"logits must be a plain tensor, got a DTensor"):
        fl.row_statistics(placed, target)
    with pytest.raises(TypeError, match=r"score must be a plain tensor, got a DTensor"):
        fl.class_statistics(placed, target, CLASSES)


# What only one rank gets wrong, and the error it gets. The other ranks are told that a rank has failed, or, where none
# has, that their calls differ.
ONE_RANK = {
    "target out of range": ({"target": torch.full((4,), CLASSES)}, "IndexError.*out of range"),
    "shape of target": ({"target": torch.zeros(3, dtype=torch.int64)}, "(Value|Runtime)Error.*target"),
    "type of target": ({"target": [0] * 4}, "TypeError.*target"),
    "dtype of target": ({"target": torch.zeros(4, dtype=torch.bool)}, "RuntimeError.*target"),
    "probabilities": ({"target": torch.zeros(4)}, "RuntimeError.*target"),
    "rows": ({"rows": 5, "target": torch.zeros(5, dtype=torch.int64)}, "the same call.*5 rows"),
    "other targets": ({"target": torch.tensor([0, 1, 0, 0])}, "target must be the same on all ranks"),
    "dtype": ({"dtype": torch.float64}, "the same call.*torch.float64"),
    "integers": ({"dtype": torch.int64}, "RuntimeError.*(floating point|float64, float32)"),
    "classes": ({"more": 1}, "ValueError.*classes of this rank"),
    "sample_weight": ({"sample_weight": torch.ones(4, dtype=torch.int64)}, "RuntimeError.*sample_weight"),
    "its shape": ({"sample_weight": torch.ones(3)}, "(Value|Runtime)Error.*sample_weight"),
    "weights": ({"sample_weight": torch.ones(4)}, "the same call.*no weights.*"),
    "weight": ({"loss": fl.GCELoss(weight=torch.ones(3))}, "RuntimeError.*weight"),
    "NaN bias": ({"loss": fl.GCELoss(logit_bias=1.0), "logit_bias": torch.nan}, "ValueError.*logit_bias"),
    "another loss": ({"loss": fl.NCELoss()}, "the same call.*nce"),
    "another parameter": ({"loss": fl.GCELoss(0.5)}, "the same call.*0.5"),
}


def check_one_bad_rank(rank, world_size):
    """An error of one rank ends the call on all, and the next call works."""
    first, end = bounds(rank, world_size)
    sharded = ClassParallel(fl.GCELoss(), None, first, CLASSES)
    fine = {"target": torch.zeros(4, dtype=torch.int64), "sample_weight": None}

    def of_logits(target, sample_weight, rows=4, dtype=torch.float32, more=0):
        return sharded(torch.zeros(rows, end - first + more, dtype=dtype), target, sample_weight)

    def of_features(target, sample_weight, rows=4, dtype=torch.float32, more=0):
        x, w = torch.zeros(rows, FEATURES, dtype=dtype), torch.zeros(end - first + more, FEATURES, dtype=dtype)
        return linear_loss(x, w, target, sharded, sample_weight=sample_weight)

    for call in (of_logits, of_features):
        call(**fine)
        for bad, (name, (given, message)) in enumerate(ONE_RANK.items()):
            is_bad = rank == bad % world_size
            given = {**fine, **given} if is_bad else fine
            sharded.loss = given.get("loss", sharded.loss)
            sharded.loss.logit_bias = given.get("logit_bias", 0.0)
            with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as caught:
                call(**{k: v for k, v in given.items() if k not in ("loss", "logit_bias")})
            told = f"{type(caught.value).__name__}: {caught.value}"
            assert re.search(message, told), (name, told)
            sharded.loss = fl.GCELoss()
        call(**fine)


def check_one_bad_rank_of_a_mesh(rank, world_size):
    """Where rows are sharded one rank's rows are its own; ranks that share neither rows nor classes are told too."""
    shape, names = ((2, 2), ("rows", "classes")) if world_size == 4 else ((world_size,), ("rows",))
    placements = [Shard(0), Shard(1)][: len(shape)]
    logits = distribute_tensor(
        torch.zeros(8, CLASSES), init_device_mesh("cpu", shape, mesh_dim_names=names), placements
    )
    for target in (torch.full((8,), CLASSES + 1), None, torch.zeros(3)):
        given = target if rank == world_size - 1 else torch.zeros(8, dtype=torch.int64)
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError), match=r"target|expected|another rank"):
            fl.GCELoss()(logits, given)
    fl.GCELoss()(logits, torch.zeros(8, dtype=torch.int64))
    features, weight, target = torch.zeros(4, FEATURES), torch.zeros(CLASSES, FEATURES), torch.zeros(4).long()
    placed = distribute_tensor(weight, init_device_mesh("cpu", (world_size,)), [Replicate()])
    with pytest.raises((RuntimeError, ValueError), match="linear_weight must be sharded"):
        linear_loss(features, placed if rank == 0 else weight, target, fl.GlobalMean(fl.GCELoss()))
