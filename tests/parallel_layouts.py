"""Which rank has which rows and classes, and in what form targets come with them, for test_parallel.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_problem import CLASSES, CLOSE, ROWS, Count, bounds, problem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import fused_losses as fl
from fused_losses import _agreement
from fused_losses.functional import linear_loss
from fused_losses.parallel import ClassParallel, sum_gradient


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


def check_chunks(rank, world_size):
    """One collective about the call, and one for each chunk: ranks know from the start how long its message is."""
    first, end = bounds(rank, world_size)
    x, w, _, _, _ = problem()
    sharded = ClassParallel(fl.GCELoss(), None, first, CLASSES)
    sharded.shard(end - first)
    _agreement._known.clear()
    with Count() as sent:
        linear_loss(x, w[first:end], torch.arange(ROWS) % CLASSES, sharded, chunk_bytes=1)
    assert sent.calls == 1 + ROWS


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


def check_groups(rank, world_size):
    """Ranks of other groups have other rows, other losses and errors of their own."""
    own = [dist.new_group([each]) for each in range(world_size)][rank]
    x, w, b, target, samples = (t[rank:] if len(t) == ROWS else t for t in problem())  # rank rows less
    x.requires_grad_()
    logits, loss = F.linear(x, w, b), fl.NFLLoss(gamma=0.5 + rank)
    scores = logits.detach()
    for found, expected in (
        (ClassParallel(loss, own, 0, CLASSES)(logits, target, samples), loss(logits, target, samples)),
        (linear_loss(x, w, target, ClassParallel(loss, own, 0, CLASSES), linear_bias=b), loss(logits, target)),
        (ClassParallel(fl.HEMLoss(), own, 0, CLASSES)(logits, target), fl.HEMLoss()(logits, target)),
        (fl.GlobalMean(loss, own)(logits, target, samples), loss(logits, target, samples)),
        (
            fl.ZErrorCrossEntropyLoss(1.0, process_group=own)(logits, target),
            fl.ZErrorCrossEntropyLoss(1.0)(logits, target),
        ),
        (fl.SmallLoss("gce", 0.5, process_group=own)(logits, target), fl.SmallLoss("gce", 0.5)(logits, target)),
        (fl.Antidote("gce", 0.5, process_group=own)(logits, target), fl.Antidote("gce", 0.5)(logits, target)),
    ):
        torch.testing.assert_close(found, expected, **CLOSE)
    (grad,) = torch.autograd.grad(sum_gradient(x, own).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    statistics = fl.class_statistics(scores, target, CLASSES)
    assert torch.equal(statistics.all_reduce(own).count, statistics.count)
    tracker = fl.OutlierTracker(ROWS + rank)
    tracker.update(torch.arange(3), prob=torch.full((3,), 0.5))
    assert torch.equal(tracker.all_reduce(own).times_seen, tracker.times_seen)
    collector = fl.CutoffCollector()
    collector.update(scores[:, 0], target == 0)
    assert torch.equal(collector.all_reduce(own).logits, collector.logits)
    for each in (fl.GlobalMean(loss, own), fl.ZErrorCrossEntropyLoss(1.0, process_group=own)):
        torch.testing.assert_close(torch.compile(each, backend="eager")(scores, target), each(scores, target), **CLOSE)
    running = fl.SmallLoss("gce", 0.5, running=True, process_group=own)
    with pytest.raises(RuntimeError, match="rows of all ranks is not differentiable in sample_weight"):
        running(logits, target, samples.requires_grad_())
    assert not running.running_moments.any()  # it has learnt nothing from a call that raises
    running.reduction = "sum"
    assert torch.autograd.grad(running(logits, target, samples), samples)[0].any()
    wrong = torch.full_like(target, CLASSES)
    for each in (ClassParallel(loss, own, 0, CLASSES), fl.GlobalMean(loss, own)):
        if rank == 0:
            with pytest.raises(IndexError, match=rf"arget {CLASSES} is out of"):
                each(logits, wrong)
        each(logits, target)


LAYOUTS = {
    "order": check_order,
    "chunks": check_chunks,
    "no classes": check_no_classes,
    "dtensor rows": check_dtensor_rows,
    "one row": check_one_row,
    "groups": check_groups,
}
