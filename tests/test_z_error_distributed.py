"""Several processes with a process group give what one process gives with the whole batch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from gloo_group import gloo_group, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_losses as fl

pytestmark = [
    pytest.mark.any_cpu,  # the same kernels as in one process
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"),
]

ROWS, FEATURES, CLASSES = 97, 6, 3


def make_batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    target[::19] = -100
    sample_weight = torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.5
    return x, target, sample_weight


def share_of(rank, world_size):
    """Shares of different sizes; the last rank of several has no row at all of class 0."""
    _, target, _ = make_batch()
    rows = torch.arange(ROWS)
    owner = rows * rows % world_size
    if world_size > 1:
        owner = torch.where((owner == world_size - 1) & (target == 0), 0, owner)
    return owner == rank


def over_all_ranks(loss, group):
    return loss if group is None else fl.GlobalMean(loss, group)


def make_losses(group):
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return {
        "logit": fl.ZErrorCrossEntropyLoss(1.1, process_group=group),
        "weighted": fl.ZErrorCrossEntropyLoss(1.1, "loss", "gce", weight=weight, process_group=group),
        "running": fl.ZErrorCrossEntropyLoss(1.1, "prob", running=True, process_group=group),
        "base": fl.ZErrorCrossEntropyLoss(1.1, base=fl.MAELoss(weight=weight), process_group=group),
        "binary": fl.ZErrorBCEWithLogitsLoss(1.1, process_group=group),
        "squares": fl.ZMSELoss(1.1, "residual", process_group=group),
        "base hem": fl.ZErrorCrossEntropyLoss(1.1, base="hem", process_group=group),
        "hem": over_all_ranks(fl.HEMLoss(0.1), group),
        "weighted hem": over_all_ranks(fl.HEMLoss(0.1, weight=weight), group),
        "mean": over_all_ranks(fl.GCELoss(weight=weight), group),
    }


def targets_of(name, target):
    if name == "binary":  # one task per output; ignored rows are missing labels
        one_hot = nn.functional.one_hot(target.clamp(min=0), CLASSES).double()
        return torch.where(target.unsqueeze(1) >= 0, one_hot, torch.nan)
    if name == "squares":
        return target.clamp(min=0).double().unsqueeze(1).expand(-1, CLASSES)
    return target


def train_step(group, rows, wrap):
    """Loss, gradients and running statistics of every loss on the given rows, from the same initial model."""
    x, target, sample_weight = make_batch()
    found = {}
    for name, loss_function in make_losses(group).items():
        torch.manual_seed(0)
        model = wrap(nn.Linear(FEATURES, CLASSES).double())
        for _ in range(2 if name == "running" else 1):
            model.zero_grad()
            loss = loss_function(model(x[rows]), targets_of(name, target[rows]), sample_weight[rows])
            loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in model.parameters())]
        if name == "running":
            found[name].append(loss_function.running_moments)
    return found


def worker(rank, world_size, folder):
    with gloo_group(rank, world_size, folder):
        rows = share_of(rank, world_size)
        found = train_step(dist.group.WORLD, rows, DistributedDataParallel)
        x, target, _ = make_batch()
        statistics = fl.class_statistics(x[rows, 0], target[rows], CLASSES).all_reduce()
        torch.save((found, statistics), os.path.join(folder, f"rank{rank}.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_together_are_one_process(world_size, tmp_path):
    shares = torch.stack([share_of(rank, world_size) for rank in range(world_size)])
    assert (shares.sum(0) == 1).all() and len(set(shares.sum(1).tolist())) > 1
    run_ranks(worker, world_size, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]

    alone = train_step(None, torch.ones(ROWS, dtype=torch.bool), lambda model: model)
    local = train_step(None, share_of(0, world_size), lambda model: model)
    for name, (loss, *rest) in alone.items():
        mean = torch.stack([found[name][0] for found, _ in ranks]).mean()
        torch.testing.assert_close(mean, loss, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(local[name][1], rest[0], rtol=1e-3)  # one rank's rows alone say something else
        for found, _ in ranks:
            for value, expected in zip(found[name][1:], rest, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)

    x, target, _ = make_batch()
    expected = fl.class_statistics(x[:, 0], target, CLASSES)
    for _, statistics in ranks:
        assert torch.equal(statistics.count, expected.count)
        torch.testing.assert_close(statistics.mean, expected.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(statistics.std, expected.std, rtol=1e-12, atol=0)
        assert torch.equal(statistics.mean, ranks[0][1].mean) and torch.equal(statistics.std, ranks[0][1].std)
