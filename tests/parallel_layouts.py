"""Which rank has which rows and classes, and in what form targets come with them, for test_parallel.py."""

from __future__ import annotations

import pytest
import torch
from parallel_problem import CLASSES, CLOSE, ROWS, bounds, problem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import fused_losses as fl
from fused_losses.parallel import ClassParallel


def check_order(rank, world_size):
    """The last rank may have the first classes."""
    first, end = (CLASSES - end for end in reversed(bounds(rank, world_size)))
    x, w, b, target, samples = problem()
    logits = F.linear(x, w, b)
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
    for loss in (fl.GCELoss(), fl.NFLLoss(weight=weight), fl.HEMLoss(weight, "competitor"), fl.LDRKLLoss()):
        whole, part = logits.clone().requires_grad_(), logits[:, first:end].clone().requires_grad_()
        expected, found = loss(whole, target, samples), ClassParallel(loss, None, first, CLASSES)(part, target, samples)
        torch.testing.assert_close(found, expected, **CLOSE)
        expected.backward()
        found.backward()
        torch.testing.assert_close(part.grad, whole.grad[:, first:end], **CLOSE)


def check_no_classes(rank, world_size):
    """A rank without classes is told of logits without a dimension for them, too."""
    first, end = (0, 0) if rank == 0 and world_size > 1 else bounds(max(rank - 1, 0), max(world_size - 1, 1))
    target = torch.zeros(4, dtype=torch.int64)
    sharded = ClassParallel(fl.GCELoss(), None, first, CLASSES)
    sharded(torch.zeros(4, end - first), target)
    bad = rank == 0
    message = r"classes.*, got shape \(4,\)|classes of this rank, \.\.\.\), got \(4,\)" if bad else "another rank"
    with pytest.raises(ValueError if bad else RuntimeError, match=message):
        sharded(torch.zeros(4) if bad else torch.zeros(4, end - first), target)


def check_dtensor_rows(rank, world_size):
    """One loss per row is that of this rank's rows; targets and sample weights may be DTensors, or these rows only."""
    x, w, b, target, samples = problem()
    mesh = init_device_mesh("cpu", (world_size,))
    logits = F.linear(x, w, b)
    u = torch.softmax(logits.flip(1), 1)
    here = torch.arange(ROWS).tensor_split(world_size)[rank]  # twelve rows, as many on each of one to four ranks
    for placement in (Shard(0), Shard(1), Replicate()):
        rows = here if placement == Shard(0) else torch.arange(ROWS)
        of_rows = Shard(0) if placement == Shard(0) else Replicate()
        placed = distribute_tensor(logits, mesh, [placement])
        for reduction in ("none", "mean", "sum"):
            kinds = [(fl.NCELoss(reduction=reduction), target)]
            if placement != Shard(1):
                kinds.append((fl.CrossEntropyLoss(reduction=reduction), u))
            for loss, labels in kinds:
                whole, part = logits.clone().requires_grad_(), placed.clone().requires_grad_()
                expected = loss(whole, labels, samples)
                expected.sum().backward()
                local = labels[rows], samples[rows]
                placed_alike = [DTensor.from_local(t, mesh, [of_rows]) for t in local]
                everywhere = [DTensor.from_local(t, mesh, [Replicate()]) for t in (labels, samples)]
                for given in ((labels, samples), local, placed_alike, everywhere):
                    part.grad = None
                    found = loss(part, *given)
                    assert type(found) is torch.Tensor
                    torch.testing.assert_close(found, expected[rows] if reduction == "none" else expected, **CLOSE)
                    found.sum().backward()
                    torch.testing.assert_close(part.grad.full_tensor(), whole.grad, **CLOSE)
        with pytest.raises(RuntimeError, match="target must be dense"):
            fl.GCELoss()(placed, target.to_sparse())


def check_one_row(rank, world_size):
    """Logits of one row, whose only dimension is that of the classes."""
    mesh = init_device_mesh("cpu", (world_size,))
    logits, target = torch.arange(float(CLASSES)), torch.tensor(3)
    torch.testing.assert_close(
        fl.GCELoss()(distribute_tensor(logits, mesh, [Replicate()]), target), fl.GCELoss()(logits, target)
    )
    with pytest.raises(ValueError, match=r"classes of \(N, C\) must be sharded"):
        fl.GCELoss()(distribute_tensor(logits, mesh, [Shard(0)]), target)
    with pytest.raises(RuntimeError, match="got a scalar"):
        fl.GCELoss()(distribute_tensor(torch.tensor(1.0), mesh, [Replicate()]), target)
    images = distribute_tensor(torch.zeros(2, CLASSES, 4), mesh, [Shard(2)])
    with pytest.raises(ValueError, match=r"logits must be Shard\(0\), Shard\(1\) or Replicate"):
        fl.GCELoss()(images, torch.zeros(2, 4, dtype=torch.int64))
