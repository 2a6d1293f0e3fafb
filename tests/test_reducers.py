"""Losses that weigh a batch's rows by their own losses: numbers, infinite rows, memory, several processes."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo_group import gloo_group, run_ranks
from scipy.special import lambertw
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_losses as fl
from fused_losses._batch_reducer import largest
from fused_losses.super_loss import lambert_w

INF, NAN = math.inf, math.nan
RUNNING = {
    "small": lambda **o: fl.SmallLoss("cross_entropy", 0.5, **o),
    "antidote": lambda **o: fl.Antidote("cross_entropy", 0.4, **o),
    "super": lambda **o: fl.SuperLoss("cross_entropy", **o),
}


def logits_of(losses):
    """Two classes whose cross entropies are these."""
    p = torch.exp(-torch.tensor(losses, dtype=torch.float64))
    return torch.stack([torch.log(p), torch.log1p(-p)], 1), torch.zeros(len(losses), dtype=torch.int64)


def test_lambert_w():
    x = np.concatenate(
        [
            np.geomspace(1e-30, 1e300, 400),
            -np.geomspace(1e-30, 0.36, 200),
            np.geomspace(1e-9, 0.1, 100) - 1 / math.e,
            [0],
        ]
    )
    torch.testing.assert_close(lambert_w(torch.from_numpy(x)), torch.from_numpy(lambertw(x).real), rtol=1e-11, atol=0)
    ends = lambert_w(torch.tensor([-1 / math.e, INF, NAN], dtype=torch.float64))
    assert abs(ends[0] + 1) < 3e-8 and ends[1] == INF and ends[2].isnan()  # the slope at -1/e is infinite


def test_worked_by_hand():
    logits, target = logits_of([0.1, 0.2, 0.4, 3.0])
    assert fl.SmallLoss("cross_entropy", 0.5)(logits, target).item() == pytest.approx(0.15)
    assert fl.SmallLoss("cross_entropy", 0.01)(logits, target).item() == pytest.approx(0.1)
    assert fl.SmallLoss("cross_entropy", 1.0)(logits, target).item() == pytest.approx(3.7 / 4)
    assert fl.ClippedLoss("cross_entropy", 1.0)(logits, target).item() == pytest.approx(1.7 / 4)
    # for losses 0 and log 3 the weights at temperature 1 are 3/4 and 1/4: KL = log 2 - H(1/4) = .1308
    logits, target = logits_of([1e-9, math.log(3)])
    found = fl.Antidote("cross_entropy", math.log(2) - (math.log(4) - 0.75 * math.log(3)), 0.25)(logits, target)
    assert found.item() == pytest.approx(0.25 * math.log(3) + 0.25 * 0.130812, abs=1e-6)
    # (l - tau) / lam = 2 e: W(e) = 1, sigma = 1 / e, 2 e lam / e + lam
    logits, target = logits_of([1.0 + math.e])
    assert fl.SuperLoss("cross_entropy", 0.5, 1.0)(logits, target).item() == pytest.approx(1.5)


def test_ties_are_kept_and_keep_may_change():
    logits, target = logits_of([0.5, 0.2, 0.5, 0.5, 1.0])
    module = fl.SmallLoss("cross_entropy", torch.tensor(0.4), reduction="none")
    assert torch.equal(module(logits, target) > 0, torch.tensor([True, True, True, True, False]))
    module.keep.fill_(1.0)
    assert (module(logits, target) > 0).all()


@pytest.mark.parametrize("name", RUNNING)
def test_infinite_rows_weigh_nothing(name):
    """Their loss is infinite because the network has ruled their label out: they are the worst, not unknown."""
    logits, target = torch.tensor([[0.0, 1.0], [-INF, 1.0], [2.0, 0.0], [0.5, 0.0]]), torch.zeros(4, dtype=torch.int64)
    leaf = logits.requires_grad_()
    loss = RUNNING[name](reduction="none")(leaf, target)
    (grad,) = torch.autograd.grad(loss[[0, 2, 3]].sum(), leaf, retain_graph=True)
    assert loss[[0, 2, 3]].isfinite().all() and grad.isfinite().all() and grad.any()
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert not grad[1].any() and grad.isfinite().all()
    assert loss[1] == INF if name == "super" else loss[1].isfinite()


@pytest.mark.parametrize("name", [*RUNNING, "clipped"])
def test_rows_without_weight_have_no_influence(name):
    """However small or large their losses are beside those of the others."""
    made = {**RUNNING, "clipped": lambda: fl.ClippedLoss("cross_entropy", 0.5)}[name]
    logits = torch.tensor([[8.0, 0.0], [-20.0, 0.0], [-21.0, 0.0], [-90.0, 0.0]], requires_grad=True)
    target, weight = torch.zeros(4, dtype=torch.int64), torch.tensor([0.0, 1.0, 1.0, 0.0])
    loss = made()(logits, target, weight)
    (grad,) = torch.autograd.grad(loss, logits)
    if name != "small":  # which sorts losses without weights
        torch.testing.assert_close(loss, made()(logits[1:3], target[1:3]))
    assert loss.isfinite() and grad.isfinite().all() and not grad[[0, 3]].any()
    rows = fl.Antidote("cross_entropy", 0.5, reduction="none")(logits, target, weight)
    assert not rows[[0, 3]].any() and rows.isfinite().all()


@pytest.mark.parametrize("name", ["small", "antidote"])
def test_infinite_losses_alone_stay_infinite(name):
    logits = torch.tensor([[-INF, 0.0], [-INF, 1.0]], requires_grad=True)
    loss = RUNNING[name]()(logits, torch.zeros(2, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, torch.tensor([[-0.5, 0.5]] * 2))
    assert loss == INF


@pytest.mark.parametrize("kappa", [1e3, 1e6, 1e8, 1e12])
def test_a_high_temperature_leaves_the_mean(kappa):
    logits, target = logits_of([0.3, 1.7, 4.1])
    found = fl.Antidote("cross_entropy", 0.5, kappa)(logits.float(), target)
    assert found.item() == pytest.approx(6.1 / 3 - torch.tensor([0.3, 1.7, 4.1]).var(correction=0).item() / 2 / kappa)


def test_the_share_of_a_tensor_is_what_it_says():
    losses = torch.rand(2100, dtype=torch.float64).tolist()
    logits, target = logits_of(losses)
    for keep, kept in [
        (torch.tensor(0.375, dtype=torch.bfloat16), 787),
        (torch.tensor(0.9, dtype=torch.bfloat16), 1890),
        (torch.tensor(0.1875, dtype=torch.float16), 393),
        (torch.tensor(1 / 3), 700),
        (torch.tensor(0.7, dtype=torch.float16), 1470),
    ]:
        rows = fl.SmallLoss("cross_entropy", keep, reduction="none")(logits, target)
        assert (rows != 0).sum() == kept, keep


def test_antidote_is_the_smallest_value_near_equal_weights():
    torch.manual_seed(0)
    losses = torch.rand(6, dtype=torch.float64) * 3
    logits, target = logits_of(losses.tolist())
    for delta, kappa in ((0.3, 0.05), (5.0, 0.4)):
        found = fl.Antidote("cross_entropy", delta, kappa)(logits, target)
        p = torch.softmax(1.5 * torch.randn(20000, 6, dtype=torch.float64), 1)
        divergence = (p * torch.log(6 * p)).sum(1)
        near = divergence <= delta
        assert near.sum() > 100
        others = ((p * losses).sum(1) + kappa * divergence)[near]
        assert others.min() >= found - 1e-9 and others.min() < found + 0.2


@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics(name):
    make = RUNNING[name]
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, generator=generator), torch.arange(8) % 3) for _ in range(4)]
    running = make(running=True, momentum=0.25)
    fresh = make(running=True).eval()
    torch.testing.assert_close(fresh(*batches[0]), make(running=True, momentum=1.0)(*batches[0]))  # by the batch itself
    assert not fresh.running_moments.any()
    of_batch, count, mean = [], 0.0, 0.0
    for batch in batches:
        alone = make(running=True, momentum=1.0)
        alone(*batch)
        of_batch.append(alone.running_moments[1].item())
        count, mean = 8 + 0.75 * count, (8 * of_batch[-1] + 0.75 * count * mean) / (8 + 0.75 * count)
        running(*batch)
        assert running.running_moments[:2].flatten().tolist() == pytest.approx([count, mean])
    assert len(set(of_batch)) == 4
    before = running.running_moments.clone()
    loss = running.eval()(*batches[0])
    assert loss.dtype == torch.float32
    assert torch.equal(running.running_moments, before) and running.half().running_moments.dtype == torch.float64
    other = make(running=True).eval()
    other.load_state_dict(running.state_dict())
    assert torch.equal(other(*batches[0]), loss)
    nothing = make(running=True)
    assert nothing(batches[0][0], torch.full((8,), -100)) == 0 and not nothing.running_moments[0].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", RUNNING)
def test_rows_without_weight_are_nothing_to_weigh(name, reduction):
    logits, target = torch.randn(4, 2, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    for options, given in [({"weight": torch.tensor([0.0, 1.0])}, {}), ({}, {"sample_weight": torch.zeros(4)})]:
        module = RUNNING[name](reduction=reduction, running=True, **options)
        loss = module(logits, target, **given)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert not loss.any() and not grad.any()
        # The others' statistics are of losses without weights.
        assert name != "antidote" or not module.running_moments.any()


@pytest.mark.parametrize("name", [*RUNNING, "clipped"])
def test_the_default_dtype_changes_nothing(name):
    made = {**RUNNING, "clipped": lambda: fl.ClippedLoss("cross_entropy", 0.5)}
    torch.manual_seed(0)
    logits, target = (3 * torch.randn(64, 10)).requires_grad_(), torch.randint(0, 10, (64,))
    found = []
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            torch.set_default_dtype(dtype)
            loss = made[name]()(logits, target)
            found.append((loss, *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_default_dtype(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_running_tau_is_the_mean_loss():
    logits, target = logits_of([0.1, 0.2, 0.4, 3.0])
    module = fl.SuperLoss("cross_entropy", running=True)
    torch.testing.assert_close(module(logits, target), fl.SuperLoss("cross_entropy", tau=3.7 / 4)(logits, target))
    assert module.running_statistics.mean.item() == pytest.approx(3.7 / 4)


def test_reducers_around_each_other_and_probabilities():
    torch.manual_seed(0)
    logits, target = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3
    rows = fl.CrossEntropyLoss(reduction="none")(logits, target)
    fourth, c = rows.sort().values[3], float(rows.sort().values[1])
    clipped = fl.ClippedLoss("cross_entropy", c)
    torch.testing.assert_close(fl.SmallLoss(clipped, 0.25)(logits, target), rows.clamp(max=c).mean())  # they are equal
    within = fl.ClippedLoss(fl.SmallLoss("cross_entropy", 0.5, reduction="none"), c, reduction="none")(logits, target)
    torch.testing.assert_close(within, torch.where(rows <= fourth, rows.clamp(max=c), 0.0))
    within = fl.ClippedLoss(fl.SmallLoss("cross_entropy", 0.5), c)(logits, target)
    torch.testing.assert_close(within, rows[rows <= fourth].clamp(max=c).mean())  # dropped rows are not averaged
    soft = torch.softmax(torch.randn(8, 3, dtype=torch.float64), 1)
    rows = fl.CrossEntropyLoss(reduction="none")(logits, soft)
    torch.testing.assert_close(fl.SmallLoss("cross_entropy", 0.5)(logits, soft), rows.sort().values[:4].mean())
    elr = fl.SmallLoss(fl.ELRLoss(8, 3), 0.5)
    elr(logits, target, torch.arange(8))
    assert elr.loss.memory.any(1).all()


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: fl.SmallLoss("gce", 0.5), "keep"),
        (lambda: fl.ClippedLoss("gce", 0.5), "c"),
        (lambda: fl.Antidote("gce", 0.5), "kappa"),
        (lambda: fl.SuperLoss("gce"), "lam"),
    ],
)
def test_parameters_cannot_be_learnt(make, name):
    module = make()
    setattr(module, name, nn.Parameter(torch.tensor(0.5)))
    with pytest.raises(RuntimeError, match=f"^{name} of {type(module).__name__} is a constant, got a tensor that req"):
        module(torch.zeros(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "error, message, make",
    [
        (ValueError, r"^keep must satisfy 0 < value <= 1, got 0.0", lambda: fl.SmallLoss("gce", 0.0)),
        (ValueError, r"^every entry of keep must", lambda: fl.SmallLoss("gce", torch.tensor(1.5))),
        (ValueError, r"^c must satisfy", lambda: fl.ClippedLoss("gce", -1.0)),
        (ValueError, r"^delta must satisfy", lambda: fl.Antidote("gce", 0.0)),
        (ValueError, r"^kappa must satisfy", lambda: fl.Antidote("gce", 1.0, 0.0)),
        (ValueError, r"^lam must satisfy", lambda: fl.SuperLoss("gce", 0.0)),
        (ValueError, r"^tau must satisfy", lambda: fl.SuperLoss("gce", tau=NAN)),
        (ValueError, r"^tau must be None with running=True", lambda: fl.SuperLoss("gce", tau=1.0, running=True)),
        (ValueError, r"^momentum must be between", lambda: fl.SuperLoss("gce", running=True, momentum=2.0)),
        (ValueError, r"^reduction must be", lambda: fl.SmallLoss("gce", 0.5, reduction="active_mean")),
        (TypeError, r"^loss must be a name, a function or a Module", lambda: fl.SmallLoss(nn.CrossEntropyLoss(), 0.5)),
    ],
)
def test_bad_input(error, message, make):
    with pytest.raises(error, match=message):
        make()


LOSSES = {
    "small": lambda g: fl.SmallLoss("cross_entropy", 0.6, process_group=g),
    "small running": lambda g: fl.SmallLoss("cross_entropy", 0.6, running=True, process_group=g),
    "clipped": lambda g: fl.ClippedLoss("cross_entropy", 1.0, process_group=g),
    "antidote": lambda g: fl.Antidote("cross_entropy", 0.4, process_group=g),
    "super": lambda g: fl.SuperLoss("cross_entropy", running=True, process_group=g),
    "super clip": lambda g: fl.SuperLoss(fl.LogitClip("gce", 1.0), running=True, process_group=g),
}


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_search_for_a_digit_can_be_compiled(rows):
    """With the default compiler, whose vectors have eight numbers."""
    values = torch.randint(10**6, 2 * 10**9, (rows,), generator=torch.Generator().manual_seed(0))

    def smallest(values):
        return largest(lambda n: (values < n.unsqueeze(1)).sum(1) < 1, -(2**31), 16, values.device)

    torch._dynamo.reset()
    assert torch.compile(smallest, fullgraph=True)(values) == smallest(values) == values.min()


def train_step(group, rows, wrap):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    target, weight = torch.randint(4, (20,), generator=generator), torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    target[::7] = -100
    found = {}
    for name, make in LOSSES.items():
        torch.manual_seed(0)
        model, loss_function = wrap(nn.Linear(3, 4).double()), make(group)
        for scale in (1.0, 2.0):
            model.zero_grad()
            loss = loss_function(scale * model(x[rows]), target[rows], weight[rows])
            loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in model.parameters()), *loss_function.buffers()]
    return found


def worker(rank, world_size, folder):
    with gloo_group(rank, world_size, folder):
        rows = (torch.arange(20) < 13) == (rank == 0)
        torch.save(train_step(dist.group.WORLD, rows, DistributedDataParallel), os.path.join(folder, f"rank{rank}.pt"))


@pytest.mark.slow
@pytest.mark.any_cpu
def test_ranks_together_are_one_process(tmp_path):
    run_ranks(worker, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    alone = train_step(None, slice(None), lambda model: model)
    local = train_step(None, slice(13), lambda model: model)
    for name, (loss, *rest) in alone.items():
        tolerance = {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close((ranks[0][name][0] + ranks[1][name][0]) / 2, loss, **tolerance)
        assert not torch.allclose(local[name][1], rest[0], rtol=1e-3)
        for found in ranks:
            for value, expected in zip(found[name][1:], rest, strict=True):
                torch.testing.assert_close(value, expected, **tolerance)
