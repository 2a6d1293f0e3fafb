"""ELR: what it remembers, where, under which index, and after resuming; several processes together are one."""

from __future__ import annotations

import copy
import math
import os
import pickle

import pytest
import torch
from gloo_group import gloo_group, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset

import fused_losses as fl

SAMPLES, CLASSES = 12, 4


def batches(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        index = torch.randperm(SAMPLES, generator=generator)[:6]
        logits = 2 * torch.randn(6, CLASSES, generator=generator, dtype=torch.float64)
        yield logits.requires_grad_(), torch.randint(CLASSES, (6,), generator=generator), index


def by_hand(memory, logits, target, index, beta, lam):
    """One step of the published algorithm, row by row in numbers of Python; changes the memory."""
    losses = []
    for z, y, i in zip(logits.tolist(), target.tolist(), index.tolist(), strict=True):
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        clamped = [min(max(v, 1e-4), 1 - 1e-4) for v in p]
        memory[i] = [beta * t + (1 - beta) * v / sum(clamped) for t, v in zip(memory[i], clamped, strict=True)]
        s = sum(t * v for t, v in zip(memory[i], p, strict=True))
        losses.append(-math.log(p[y]) + lam * math.log(1 - s))
    return losses


@pytest.mark.parametrize("where", ["device", "host"])
def test_several_steps_by_hand(where):
    criterion = fl.ELRLoss(SAMPLES, CLASSES, beta=0.8, lam=2.0, memory=where, reduction="none")
    memory = [[0.0] * CLASSES for _ in range(SAMPLES)]
    for logits, target, index in batches():
        found = criterion(logits, target, index)
        expected = torch.tensor(by_hand(memory, logits, target, index, 0.8, 2.0), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the memory is float32
        p = logits.detach().softmax(1)
        t = torch.tensor([memory[i] for i in index.tolist()], dtype=torch.float64)
        s = (t * p).sum(1, keepdim=True)
        one_hot = nn.functional.one_hot(target, CLASSES)
        (grad,) = torch.autograd.grad(found.sum(), logits)
        torch.testing.assert_close(grad, p - one_hot - 2.0 * p * (t - s) / (1 - s), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(criterion.state_dict()["memory"], torch.tensor(memory), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_recomputation_does_not_remember_again(fused, reentrant, where):
    for reduction in ("mean", "none"):
        twice, once = (fl.ELRLoss(SAMPLES, CLASSES, memory=where, reduction=reduction) for _ in range(2))
        if not fused:
            twice._is_fused = once._is_fused = lambda args: False
        for logits, target, index in batches():
            again = logits.detach().requires_grad_()
            expected, found = (
                once(logits, target, index),
                checkpoint(twice, again, target, index, use_reentrant=reentrant),
            )
            torch.testing.assert_close(found, expected)
            for loss in (expected, found):
                loss.sum().backward()
            torch.testing.assert_close(again.grad, logits.grad)
            torch.testing.assert_close(twice.state_dict()["memory"], once.state_dict()["memory"], rtol=0, atol=0)


# What logits and gradients, or the memory, are rounded to; sums of 300 classes in float32 lose no more than 1e-5.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(9, 2), (9, 10), (6, 37), (5, 300), (2, 19, 3, 2), (300,)])
def test_every_dtype_and_layout(shape, dtype, memory_dtype):
    """Repeated samples see what was remembered before, and the last one that can be judged is remembered."""
    generator = torch.Generator().manual_seed(len(shape))
    classes, rows = shape[min(1, len(shape) - 1)], math.prod(shape) // shape[min(1, len(shape) - 1)]
    z = (3 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    index = torch.randint(rows, target.shape, generator=generator)
    if rows > 4:
        target.view(-1)[2], index.view(-1)[2], index.view(-1)[0] = -100, rows - 1, index.view(-1)[1]
        z.select(0, -1)[...] = math.nan
    weight, share = torch.linspace(0.5, 2, classes), torch.rand(target.shape, generator=generator)
    criterion = fl.ELRLoss(rows, classes, 0.6, 2.0, memory_dtype=memory_dtype, weight=weight, reduction="none")
    before = (0.5 * torch.rand(rows, classes, generator=generator) / classes).to(memory_dtype)
    criterion.memory.copy_(before)

    flat = z.double().reshape(1, -1) if len(shape) == 1 else z.double().movedim(1, -1).flatten(0, -2)
    flat.requires_grad_()
    memory, losses = before.clone(), []
    for row, y, i, w in zip(flat, target.flatten(), index.flatten(), share.flatten(), strict=True):
        p = row.softmax(0)
        if y == -100 or row.isnan().any():
            losses.append(torch.zeros(()).double() if y == -100 else row.sum())
            continue
        clamped = p.detach().clamp(1e-4, 1 - 1e-4)
        t = (0.6 * before[i].double() + 0.4 * clamped / clamped.sum()).to(memory_dtype)
        memory[i] = t
        losses.append(w * weight[y] * (-p[y].log() + 2.0 * torch.log(1 - t.double() @ p)))
    expected = torch.stack(losses)
    (right,) = torch.autograd.grad(expected.nan_to_num().sum(), flat)

    leaf = z[..., ::1].clone().requires_grad_()
    strided = leaf if len(shape) == 4 else torch.stack([leaf, leaf], -1)[..., 0]  # its classes have gaps
    found = criterion(strided, target, index, sample_weight=share)
    (grad,) = torch.autograd.grad(torch.where(found.isnan(), 0.0, found).sum(), leaf)
    kept = ROUNDING[memory_dtype] if memory_dtype == torch.bfloat16 else 1e-6  # rounding may go the other way
    torch.testing.assert_close(criterion.memory, memory, rtol=2 * kept, atol=1e-7)
    torch.testing.assert_close(found.view(-1).double(), expected, rtol=2e-5 + kept, atol=2e-5 + kept, equal_nan=True)
    flat_grad = grad.double().reshape(1, -1) if len(shape) == 1 else grad.double().movedim(1, -1).flatten(0, -2)
    judged = ~expected.isnan()
    tolerance = ROUNDING[dtype] + kept
    torch.testing.assert_close(flat_grad[judged], right[judged], rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced_by_the_kernel_and_by_rows(reduction):
    logits, target, index = next(batches())
    target[1] = -100
    weights = torch.rand(6, dtype=torch.float64)
    losses, grads = [], []
    for wrapper in (lambda loss: loss, lambda loss: fl.ClippedLoss(loss, 1e9)):  # which asks for the rows
        criterion = wrapper(
            fl.ELRLoss(SAMPLES, CLASSES, weight=torch.tensor([1.0, 2.0, 0.5, 1.0]), reduction=reduction)
        )
        if isinstance(criterion, fl.ClippedLoss):
            criterion.reduction = reduction
        for scale in (1.0, 3.0):
            loss = scale * criterion(logits, target, index, sample_weight=weights)
            losses.append(loss)
            grads.append(torch.autograd.grad(loss, logits, retain_graph=True)[0])
            assert torch.equal(torch.autograd.grad(loss, logits)[0], grads[-1])
        criterion.eval()
        with torch.no_grad():
            constant = criterion(logits, target, index, sample_weight=weights)
        torch.testing.assert_close(constant, criterion(logits, target, index, sample_weight=weights).detach())
    for found in (losses, grads):
        torch.testing.assert_close(found[0], found[2])
        torch.testing.assert_close(found[1], found[3])
    loss = fl.ELRLoss(SAMPLES, CLASSES)(logits, target, index)
    (grad,) = torch.autograd.grad(loss, logits, torch.tensor(math.inf, dtype=torch.float64))
    assert not grad[1].any() and grad[0].isinf().all()
    nothing = fl.ELRLoss(SAMPLES, CLASSES)(logits, torch.full((6,), -100), index)
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_second_derivative_of_a_step_although_the_memory_goes_on():
    logits, target, index = next(batches())
    weights = torch.linspace(0.0, 2.0, 6, dtype=torch.float64)  # of the first row nothing is known from its gradient
    for lam in (0.0, 2.0, torch.tensor(2.0)):
        criterion = fl.ELRLoss(SAMPLES, CLASSES, lam=lam)
        criterion(logits, target, index)
        state = copy.deepcopy(criterion)
        (grad,) = torch.autograd.grad(criterion(logits, target, index, weights), logits, create_graph=True)
        criterion(5 * logits, target, index)
        (found,) = torch.autograd.grad((grad * logits.detach().sin()).sum(), logits)
        state(logits, target, index)
        t, z = state.memory[index].double(), logits.detach().clone().requires_grad_()
        p = z.softmax(1)
        values = -p.log()[torch.arange(6), target] + float(lam) * torch.log(1 - (t * p).sum(1))
        (grad,) = torch.autograd.grad((weights * values).sum() / weights.sum(), z, create_graph=True)
        (right,) = torch.autograd.grad((grad * z.detach().sin()).sum(), z)
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


def test_worked_by_hand():
    criterion = fl.ELRLoss(1, 2, beta=0.5, lam=3.0)
    # p = (.8, .2); t = .5 p = (.4, .1); s = .34; -log .8 + 3 log .66
    logits, target, index = torch.tensor([[math.log(4.0), 0.0]]), torch.tensor([0]), torch.tensor([0])
    assert criterion(logits, target, index).item() == pytest.approx(-math.log(0.8) + 3 * math.log(0.66))
    torch.testing.assert_close(criterion.memory, torch.tensor([[0.4, 0.1]]))


def test_eval_over_rows_and_their_samples():
    logits, target, index = next(batches())
    criterion = fl.ELRLoss(SAMPLES, CLASSES, reduction="none")
    criterion(logits, target, index)
    criterion.eval()
    torch.testing.assert_close(torch.vmap(criterion)(logits, target, index), criterion(logits, target, index))


def test_eval_reads_and_does_not_write():
    criterion = fl.ELRLoss(SAMPLES, CLASSES).eval()
    logits, target, index = next(batches())
    torch.testing.assert_close(criterion(logits, target, index), fl.CrossEntropyLoss()(logits, target))
    assert not criterion.memory.any()
    criterion.train()(logits, target, index)
    before = criterion.memory.clone()
    criterion.eval()(logits, target, index)
    assert before[index].all() and torch.equal(criterion.memory, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["device", "host"])
def test_resumes_exactly(where, dtype):
    def make():
        return fl.ELRLoss(SAMPLES, CLASSES, memory=where, memory_dtype=dtype)

    def run(criterion, steps):
        losses = []
        for logits, target, index in steps:
            loss = criterion(logits.float(), target, index)
            losses += [loss.detach(), torch.autograd.grad(loss, logits)[0]]
        return losses

    steps = list(batches(6))
    whole = make()
    right = run(whole, steps)
    first = make()
    run(first, steps[:3])
    state = first.state_dict()
    second = make()
    second.load_state_dict(copy.deepcopy(state))
    others = [second, copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first]
    for other in others:
        for found, expected in zip(run(other, steps[3:]), right[6:], strict=True):
            assert torch.equal(found, expected)
        assert other.memory.dtype == dtype
        assert torch.equal(other.state_dict()["memory"], whole.state_dict()["memory"])


def test_a_loaded_memory_takes_the_place_of_an_update_on_its_way():
    learnt = torch.nn.Parameter(torch.tensor(3.0))  # so that torch's operations do it, and write at the next step
    criterion = fl.ELRLoss(SAMPLES, CLASSES, lam=learnt, memory="host")
    before = copy.deepcopy(criterion.state_dict())
    criterion(*next(iter(batches(1))))
    criterion.load_state_dict(before)
    assert not criterion.state_dict()["memory"].any()


def test_bfloat16_memory_follows_and_never_reaches_one():
    narrow, wide = (fl.ELRLoss(1, CLASSES, memory_dtype=d, reduction="sum") for d in (torch.bfloat16, torch.float32))
    plain = fl.ELRLoss(1, CLASSES, memory_dtype=torch.bfloat16, reduction="sum", lam=torch.tensor(3.0))
    plain.lam.requires_grad_()  # for which there is the plain formula only
    target, index = torch.tensor([1]), torch.tensor([0])
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]], requires_grad=True)
    for _ in range(40):
        for criterion in (narrow, wide, plain):
            loss = criterion(logits, target, index)
            assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()
        assert (narrow.memory.float() - wide.memory).abs().max() < 0.01
    assert narrow.memory.max() == plain.memory.max() == 1 - 2**-8  # the largest number below 1
    assert narrow.eval()(logits, target, index).isfinite()


def test_the_last_of_equal_indices_is_remembered():
    logits, target, _ = next(batches())
    index = torch.tensor([3, 5, 3, 3, 5, 0])
    criterion, alone = fl.ELRLoss(SAMPLES, CLASSES), fl.ELRLoss(SAMPLES, CLASSES)
    criterion(logits, target, index)
    alone(logits[3:], target[3:], index[3:])
    assert torch.equal(criterion.memory, alone.memory)
    spoilt = torch.cat([logits.detach(), torch.full((2, CLASSES), math.nan)])
    ignored = torch.cat([target, torch.tensor([1, -100])])
    again = fl.ELRLoss(SAMPLES, CLASSES, reduction="none")
    losses = again(spoilt, ignored, torch.cat([index, torch.tensor([3, 5])]))
    assert losses[:6].isfinite().all() and losses[6].isnan() and losses[7] == 0
    assert torch.equal(again.memory, alone.memory)  # rows that cannot be judged leave no trace


def test_places_and_dtypes():
    logits, target, index = next(batches())
    for where in ("device", "host"):
        criterion = fl.ELRLoss(SAMPLES, CLASSES, memory=where)
        criterion(logits, target, index.to(torch.int32))
        kept = criterion.state_dict()["memory"].clone()
        criterion.half()
        assert torch.equal(criterion.memory, kept) and criterion.memory.dtype == torch.float32
        moved = criterion.to("meta")
        assert moved.memory.device.type == ("cpu" if where == "host" else "meta")


@pytest.mark.parametrize(
    "error, message, call",
    [
        (IndexError, r"^index must be in \[0, 12\), got 12", {"index": [0, 12]}),
        (IndexError, r"^index must be in \[0, 12\), got -1", {"index": [-1, 0]}),
        (
            IndexError,
            r"^index must be a sample of this shard, index % 2 == 1, got 4",
            {"index": [3, 4], "shard": (1, 2)},
        ),
        (TypeError, r"^index must be an integer tensor, got torch.float32", {"index": [0.0, 1.0]}),
        (RuntimeError, r"^index must have the shape \[2\] of target, got \[3\]", {"index": [0, 1, 2]}),
        (ValueError, r"^logits must have the 4 classes", {"logits": torch.zeros(2, 3)}),
        (ValueError, r"^beta must be between 0.0 and 1.0, got 1.1", {"beta": 1.1}),
        (ValueError, r"^lam must satisfy", {"lam": -1.0}),
        (ValueError, r"^num_samples must be an integer >= 1", {"num_samples": 0}),
        *((ValueError, r"^num_classes must be an integer >= 2", {"num_classes": number}) for number in (1, 2.5)),
        (ValueError, r"^memory_dtype must be", {"memory_dtype": torch.float16}),
        (ValueError, r"^memory must be 'device' or 'host'", {"memory": "disk"}),
        (ValueError, r"^shard must satisfy", {"shard": (2, 2)}),
        (ValueError, r"^shard must satisfy", {"shard": (-1, 2)}),
        (TypeError, r"^shard must be a pair", {"shard": 3}),
    ],
)
def test_bad_input(error, message, call):
    index = torch.tensor(call.pop("index", [0, 1]))
    logits = call.pop("logits", torch.zeros(2, CLASSES))
    with pytest.raises(error, match=message):
        fl.ELRLoss(**{"num_samples": SAMPLES, "num_classes": CLASSES, **call})(logits, torch.tensor([0, 1]), index)


def test_the_order_of_the_authors_code_is_explained():
    index = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=r"called with \(logits, target, index\)"):
        fl.ELRLoss(SAMPLES, CLASSES)(index, torch.zeros(2, CLASSES), index)


class Numbered(Dataset):
    """Features, labels and the samples' numbers."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randint(CLASSES, (SAMPLES,), generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return self.x[i], self.y[i], i


def train(shares, rank, world_size, wrap):
    """Three epochs on this rank's share, shuffled anew in each; ``shares`` of all ranks for one process."""
    torch.manual_seed(0)
    model = wrap(nn.Linear(3, CLASSES).double())
    criterion = fl.ELRLoss(SAMPLES, CLASSES, shard=None if len(shares) > 1 else (rank, world_size))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    data = Numbered()
    loaders = [
        DataLoader(
            Subset(data, range(r, SAMPLES, world_size)), 2, shuffle=True, generator=torch.Generator().manual_seed(r)
        )
        for r in shares
    ]
    for _ in range(3):
        for parts in zip(*loaders, strict=True):
            x, y, index = (torch.cat(part) for part in zip(*parts, strict=True))
            optimizer.zero_grad()
            criterion(model(x), y, index).backward()
            optimizer.step()
    return criterion.memory, [p.detach() for p in model.parameters()]


def worker(rank, world_size, folder):
    with gloo_group(rank, world_size, folder):
        torch.save(train([rank], rank, world_size, DistributedDataParallel), os.path.join(folder, f"rank{rank}.pt"))


@pytest.mark.slow
@pytest.mark.any_cpu
def test_ranks_with_their_own_rows_are_one_process(tmp_path):
    run_ranks(worker, 2, tmp_path)
    memory, parameters = train([0, 1], 0, 2, lambda model: model)
    assert memory.any(1).all()
    for rank in range(2):
        rows, of_rank = torch.load(tmp_path / f"rank{rank}.pt")
        assert rows.shape == (SAMPLES // 2, CLASSES)
        torch.testing.assert_close(rows, memory[rank::2])
        for found, expected in zip(of_rank, parameters, strict=True):
            torch.testing.assert_close(found, expected)
