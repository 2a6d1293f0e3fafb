"""Classes spread over processes give what one process gives with all of them."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from gloo_group import gloo_group, run_ranks
from parallel_errors import check_errors, check_one_bad_rank, check_one_bad_rank_of_a_mesh
from parallel_layouts import LAYOUTS
from parallel_problem import CLASSES, CLOSE, FEATURES, ROWS, Count, bounds, problem, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fused_losses as fl
from fused_losses import _agreement
from fused_losses.functional import linear_loss
from fused_losses.parallel import ClassParallel, sum_gradient

pytestmark = [
    pytest.mark.any_cpu,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"),
]
NAMES = list(fl.LOSSES)

MARGINS = ("hem", "multi_margin")


def losses(reduction):
    weight = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
    for name in NAMES:
        yield name, fl.LOSSES[name].module(reduction=reduction)
        yield (
            f"weighted {name}",
            fl.LOSSES[name].module(weight=weight, logit_bias=torch.tensor(0.7), reduction=reduction),
        )
    yield "smooth", fl.CrossEntropyLoss(label_smoothing=0.2, reduction=reduction)
    yield "weighted smooth", fl.CrossEntropyLoss(weight, label_smoothing=0.2, logit_bias=0.5, reduction=reduction)
    yield "exact nfl", fl.NFLLoss(detach=False, reduction=reduction)
    yield "ngce of a small power", fl.NGCELoss(1e-3, reduction=reduction)
    yield "sgce of a small power", fl.SGCELoss(1e-3, reduction=reduction)
    yield "cores of a tensor", fl.CORESLoss(torch.tensor(0.7), reduction=reduction)
    yield "half of a sum", fl.JALFLLoss(alpha=0.0, reduction=reduction)
    for index in ("target", "competitor"):
        yield f"hem by {index}", fl.HEMLoss(weight, index, weight=weight, logit_bias=0.3, reduction=reduction)
    for own in ({"mean_above_zero": True}, {"threshold": True}, {"p": 2}):
        yield f"multi_margin {own}", fl.MultiMarginLoss(**own, weight=weight, reduction=reduction)


def check_plain(rank, world_size):
    x, w, b, target, samples = problem()
    first, end = bounds(rank, world_size)
    some = ("gce", "weighted nfl_mae", "weighted smooth", "ngce", "hem", "weighted hem", "weighted ldr_kl")
    active = [(name, loss) for name, loss in losses("mean") if isinstance(loss, fl.HEMLoss | fl.MultiMarginLoss)]
    for reduction in ("mean", "sum", "none", "active_mean"):
        for name, loss in active if reduction == "active_mean" else losses(reduction):
            if reduction in ("sum", "none") and name not in some:
                continue
            loss.reduction = reduction
            dense = step(lambda x, w, b: loss(F.linear(x, w, b), target, samples), (x, w, b))
            sharded = ClassParallel(loss, dist.group.WORLD, first, CLASSES)
            wanted = [dense[0], dense[1], dense[2][first:end], dense[3][first:end]]

            def apart(x, w, b):
                return sharded(F.linear(sum_gradient(x), w, b), target, samples)

            def together(x, w, b):
                return linear_loss(
                    sum_gradient(x), w, target, sharded, linear_bias=b, sample_weight=samples, chunk_bytes=800
                )

            for head in (apart, together):
                found = step(head, (x, w[first:end], b[first:end]))
                for value, expected in zip(found, wanted, strict=True):
                    assert torch.allclose(value, expected, **CLOSE), (name, reduction, head.__name__)
                with torch.inference_mode(rank == 0), torch.no_grad():  # one rank may want less than another
                    value = head(x, w[first:end], b[first:end])
                assert torch.allclose(value, dense[0], **CLOSE), (name, reduction, head.__name__, "inference mode")


# Collectives of forward, and the bytes per row that a rank hands to them: a function of p_y needs the maximum, the sum
# of exponentials and the target's logit; what is summed up over the classes adds to that.
TRAFFIC = {
    (1, 16): "cores unhinged nce nce_mae nce_rce nce_agce nce_aue ngce sgce amse",
    (2, 20): "nfl nfl_mae nfl_rce nnce nnfl",
    (2, 24): "anl_ce jal_fl",
    (2, 28): "anl_fl",
    (2, 16): "multi_margin",  # the label's logit and whether there is NaN, then errors and their number
    (1, 20): "jal_ce",
    (3, 20): "hem",  # and the mean error in between
}


def check_traffic(rank, world_size):
    x, w, b, target, _ = problem(torch.float32)
    first, end = bounds(rank, world_size)
    logits = F.linear(x, w, b)[:, first:end].requires_grad_()
    found = {}
    for name in NAMES:
        sharded = ClassParallel(fl.LOSSES[name].module(), None, first, CLASSES)
        _agreement._known.clear()  # messages may be as long as those of the loss before
        with torch.no_grad():
            sharded(logits, target)  # ranks agree about classes and the length of their messages
        with Count() as forward:
            loss = sharded(logits, target)
        with Count() as backward:
            loss.backward()
        with Count() as without, torch.no_grad():
            sharded(logits, target)
        # What tells calls apart; two sums over classes that no row changes; news of failures with sums of terms.
        once = 16 + 8 * (name not in MARGINS) + 4 * (forward.calls - 1)
        found[name] = forward.calls, (forward.bytes - once) / ROWS
        assert (backward.calls, without.calls) == (0, forward.calls), name
    more = {name: each for each, names in TRAFFIC.items() for name in names.split()}
    all_logits = 1, 4 * bounds(0, world_size)[1]  # as many from every rank as from the one that has most classes
    more |= {"ldr_kl": all_logits, "bi_tempered": all_logits}
    assert found == {name: more.get(name, (1, 12)) for name in NAMES}


def check_lengths(rank, world_size):
    """Batches of any size, with one collective unless ranks must agree about a longer message."""
    first, end = bounds(rank, world_size)
    loss = fl.GCELoss(reduction="sum")
    sharded = ClassParallel(loss, None, first, CLASSES)
    sharded.shard(end - first)
    _agreement._known.clear()
    for rows, collectives in ((3, 2), (40, 2), (40, 1), (30, 1), (2, 1), (0, 1), (40, 2)):
        logits, target = torch.arange(float(rows * CLASSES)).view(rows, CLASSES).sin(), torch.arange(rows) % CLASSES
        with Count() as sent:
            found = sharded(logits[:, first:end], target)
        assert sent.calls == collectives, rows
        torch.testing.assert_close(found, loss(logits, target))
    for name in NAMES:
        logits = torch.zeros(0, end - first, requires_grad=True)
        nothing = ClassParallel(fl.LOSSES[name].module(), None, first, CLASSES)(logits, torch.zeros(0).long())
        nothing.backward()
        assert nothing == 0.0 and logits.grad.shape == logits.shape, name


def check_half(rank, world_size):
    x, w, b, target, _ = problem(torch.bfloat16)
    first, end = bounds(rank, world_size)
    logits = F.linear(x, w, b)
    for name in ("gce", "nce", "ngce"):
        loss = fl.LOSSES[name].module()
        whole, part = logits.clone().requires_grad_(), logits[:, first:end].clone().requires_grad_()
        expected, found = loss(whole, target), ClassParallel(loss, None, first, CLASSES)(part, target)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        expected.backward()
        found.backward()
        torch.testing.assert_close(part.grad, whole.grad[:, first:end], rtol=2e-2, atol=1e-4)
        alike = [torch.empty_like(found) for _ in range(world_size)]
        dist.all_gather(alike, found.detach())
        assert all(torch.equal(a, alike[0]) for a in alike)
        again = logits[:, first:end].clone().requires_grad_()
        repeated = ClassParallel(loss, None, first, CLASSES)(again, target)
        repeated.backward()
        assert torch.equal(repeated, found) and torch.equal(again.grad, part.grad)


def check_range(rank, world_size):
    """float16 with weights beyond its range, and ignored rows under any upstream gradient."""
    x, w, b, target, _ = problem(torch.float16)
    first, end = bounds(rank, world_size)
    for size in (1e-7, 1e6):
        whole, part = (z.clone().requires_grad_() for z in (F.linear(x, w, b), F.linear(x, w, b)[:, first:end]))
        samples, loss = torch.full((ROWS,), size), fl.GCELoss()
        (1024.0 * loss(whole, target, samples)).backward()
        (1024.0 * ClassParallel(loss, None, first, CLASSES)(part, target, samples)).backward()
        torch.testing.assert_close(part.grad, whole.grad[:, first:end], rtol=4e-3, atol=1e-3)
    for upstream in (torch.inf, torch.nan):
        part.grad = None
        values = ClassParallel(fl.GCELoss(reduction="none"), None, first, CLASSES)(part, target)
        values.backward(torch.where(target == -100, upstream, 1.0))
        assert part.grad.isfinite().all() and not part.grad[target == -100].any()


def check_powers(rank, world_size):
    """Powers of p that are all near 1, or one of them: to what float32 makes of a logit of 60, relative 6e-8."""
    classes = 4001
    first, end = classes * rank // world_size, classes * (rank + 1) // world_size
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, classes, generator=generator) * torch.tensor([0.1, 1.0, 5.0, 20.0]).repeat(10)[:, None]
    target = torch.arange(40) * 100
    for loss in (*(kind(q) for kind in (fl.NGCELoss, fl.SGCELoss) for q in (1e-4, 0.05, 0.7, 3.0)), fl.AMSELoss(1.0)):
        loss.reduction = "none"
        whole, part = logits.double().requires_grad_(), logits[:, first:end].clone().requires_grad_()
        expected, found = loss(whole, target), ClassParallel(loss, None, first, classes)(part, target)
        (gradient,) = torch.autograd.grad(expected.sum(), whole)
        (of_part,) = torch.autograd.grad(found.sum(), part)
        for value, exact in ((found, expected), (of_part, gradient[:, first:end])):
            torch.testing.assert_close(value.double(), exact, rtol=0, atol=float(1e-5 * exact.detach().abs().max()))


def check_masked(rank, world_size):
    """Ranks without a finite logit in some rows, and one without classes; a class of weight 0 may be masked."""
    first, end = (0, 0) if rank == 0 and world_size > 1 else bounds(rank - 1, world_size - 1) if rank else (0, CLASSES)
    x, w, b, _, _ = problem()
    logits, target = F.linear(x, w, b), torch.full((ROWS,), CLASSES - 1)
    logits[::3, : CLASSES - 2] = -torch.inf
    weight = torch.ones(CLASSES, dtype=torch.float64)
    weight[: CLASSES - 2] = 0.0
    for loss in (fl.GCELoss(), fl.CrossEntropyLoss(weight, label_smoothing=0.3), fl.NGCELoss(), fl.SGCELoss(0.05)):
        whole, part = logits.clone().requires_grad_(), logits[:, first:end].clone().requires_grad_()
        expected, found = loss(whole, target), ClassParallel(loss, None, first, CLASSES)(part, target)
        torch.testing.assert_close(found, expected, **CLOSE)
        expected.backward()
        found.backward()
        torch.testing.assert_close(part.grad, whole.grad[:, first:end], **CLOSE)


def check_images(rank, world_size):
    first, end = bounds(rank, world_size)
    torch.manual_seed(0)
    logits, target = torch.randn(2, CLASSES, 3, 2, dtype=torch.float64), torch.randint(0, CLASSES, (2, 3, 2))
    for reduction in ("none", "mean"):
        loss = fl.GCELoss(reduction=reduction)
        whole, part = logits.clone().requires_grad_(), logits[:, first:end].clone().requires_grad_()
        expected, found = loss(whole, target), ClassParallel(loss, None, first, CLASSES)(part, target)
        torch.testing.assert_close(found, expected, **CLOSE)
        expected.sum().backward()
        found.sum().backward()
        torch.testing.assert_close(part.grad, whole.grad[:, first:end], **CLOSE)


def check_dtensor(rank, world_size):
    x, w, b, target, samples = problem()
    mesh = init_device_mesh("cpu", (world_size,))
    logits = F.linear(x, w, b)
    for placement in (Shard(0), Shard(1), Shard(-1), Replicate()):
        for loss in (fl.CrossEntropyLoss(label_smoothing=0.1), fl.NCELoss(), fl.GCELoss(reduction="sum"), fl.HEMLoss()):
            whole, part = logits.clone().requires_grad_(), distribute_tensor(logits, mesh, [placement]).requires_grad_()
            expected, found = loss(whole, target, samples), loss(part, target, samples)
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, expected, **CLOSE)
            constant = part.detach()
            with torch.inference_mode():
                torch.testing.assert_close(loss(constant, target, samples), expected, **CLOSE)
            (2 * expected).backward()
            (2 * found).backward()
            assert isinstance(part.grad, DTensor)
            torch.testing.assert_close(part.grad.full_tensor(), whole.grad, **CLOSE)


def check_margins_of_odd_rows(rank, world_size):
    """Ties at the threshold, masked classes and rows that are not finite, ignored or not, as in one process."""
    first, end = bounds(rank, world_size)
    tied = torch.arange(ROWS * CLASSES, dtype=torch.float64).view(ROWS, CLASSES).mul(0.7).sin().mul(3).round()
    masked, odd = tied.clone(), tied.clone()
    masked[:, 4], masked[5, :] = -torch.inf, -torch.inf
    masked[5, 2] = 0.0
    odd[3], odd[6, 1], odd[7, CLASSES - 1], odd[8, 8] = torch.nan, torch.nan, torch.inf, torch.inf
    target = torch.arange(ROWS) % CLASSES
    target[3] = -100
    for logits in (tied, masked, odd):
        for name, loss in losses("none"):
            if not isinstance(loss, fl.HEMLoss | fl.MultiMarginLoss):
                continue
            whole, part = logits.clone().requires_grad_(), logits[:, first:end].clone().requires_grad_()
            expected, found = loss(whole, target), ClassParallel(loss, None, first, CLASSES)(part, target)
            torch.testing.assert_close(found, expected, equal_nan=True, msg=name, **CLOSE)
            expected.sum().backward()
            found.sum().backward()
            torch.testing.assert_close(part.grad, whole.grad[:, first:end], equal_nan=True, msg=name, **CLOSE)


def check_two_dimensions(rank, world_size):
    x, w, b, target, samples = problem()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    whole = F.linear(x, w, b).requires_grad_()
    part = distribute_tensor(whole.detach(), mesh, [Shard(0), Shard(1)]).requires_grad_()
    loss = fl.NCEMAELoss()
    expected, found = loss(whole, target, samples), loss(part, target, samples)
    torch.testing.assert_close(found, expected, **CLOSE)
    expected.backward()
    found.backward()
    torch.testing.assert_close(part.grad.full_tensor(), whole.grad, **CLOSE)


def check_tensor_parallel_head(rank, world_size):
    x, w, b, target, _ = problem()
    mesh = init_device_mesh("cpu", (world_size,))
    dense = step(lambda x, w, b: fl.functional.gce_loss(F.linear(x, w, b), target), (x, w, b))
    head = nn.Linear(FEATURES, CLASSES).double()
    criterion = fl.LinearLoss(FEATURES, CLASSES, "gce", dtype=torch.float64, chunk_bytes=300)
    for layer in (head, criterion.linear):
        with torch.no_grad():
            layer.weight.copy_(w)
            layer.bias.copy_(b)
    head = parallelize_module(head, mesh, ColwiseParallel(use_local_output=False))
    criterion.linear = parallelize_module(criterion.linear, mesh, ColwiseParallel())
    torch.testing.assert_close(criterion.logits(x), F.linear(x, w, b), **CLOSE)
    for layer, run in (
        (head, lambda x: fl.GCELoss()(head(x), target)),
        (criterion.linear, lambda x: criterion(x, target)),
    ):
        features = x.clone().requires_grad_()
        loss = run(features)
        loss.backward()
        torch.testing.assert_close(loss.detach(), dense[0], **CLOSE)
        for found, expected in zip(
            (features.grad, layer.weight.grad.full_tensor(), layer.bias.grad.full_tensor()), dense[1:], strict=True
        ):
            torch.testing.assert_close(found, expected, **CLOSE)


def check_data_parallel(rank, world_size):
    """DDP and FSDP2 of a LinearLoss, each rank with its rows; FSDP2 gathers the weight once for all chunks."""
    x, w, b, target, _ = problem()
    target = torch.arange(ROWS) % CLASSES
    dense = step(lambda x, w, b: fl.functional.gce_loss(F.linear(x, w, b), target), (x, w, b))
    rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    for wrap in (DistributedDataParallel, fully_shard):
        for reduction in ("mean", "none"):
            criterion = fl.LinearLoss(
                FEATURES, CLASSES, "gce", dtype=torch.float64, reduction=reduction, chunk_bytes=300
            )
            with torch.no_grad():
                criterion.linear.weight.copy_(w)
                criterion.linear.bias.copy_(b)
            wrapped = wrap(criterion)
            with CommDebugMode() as sent:
                wrapped(x[rows], target[rows]).mean().backward()
            if wrap is fully_shard and world_size > 1:
                counts = {str(op): count for op, count in sent.comm_counts.items() if count}
                assert counts == {"c10d._allgather_base_": 1, "c10d._reduce_scatter_base_": 1}
            for p, expected in zip((criterion.linear.weight, criterion.linear.bias), dense[2:], strict=True):
                grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                torch.testing.assert_close(grad, expected, **CLOSE)


def check_second_derivative(rank, world_size):
    """A penalty on the gradient of the features, which every rank has whole."""
    x, w, _, _, _ = problem()
    first, end = bounds(rank, world_size)

    def penalty(features, x, w):
        (grad,) = torch.autograd.grad((F.linear(features(x), w) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), (x, w))

    expected = penalty(lambda x: x, x.requires_grad_(), w.requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = penalty(sum_gradient, x, w[first:end].detach().requires_grad_())
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    torch.testing.assert_close(found[1], expected[1][first:end], **CLOSE)


CHECKS = {
    "plain": check_plain,
    "traffic": check_traffic,
    "lengths": check_lengths,
    "half": check_half,
    "range": check_range,
    "images": check_images,
    "powers": check_powers,
    "masked": check_masked,
    "margins of odd rows": check_margins_of_odd_rows,
    "errors": check_errors,
    "one bad rank": check_one_bad_rank,
    "one bad rank of a mesh": check_one_bad_rank_of_a_mesh,
    "dtensor": check_dtensor,
    "head": check_tensor_parallel_head,
    "data": check_data_parallel,
    "second derivative": check_second_derivative,
    "mesh": check_two_dimensions,
    **LAYOUTS,
}


def worker(rank, world_size, folder, names):
    with gloo_group(rank, world_size, folder):
        for name in names:
            CHECKS[name](rank, world_size)
            open(os.path.join(folder, f"{name}{rank}"), "w").close()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 3, 4))])
def test_ranks_together_are_one_process(world_size, tmp_path):
    names = [n for n in CHECKS if (n != "mesh" or world_size == 4) and ("bad" not in n or world_size in (2, 4))]
    run_ranks(worker, world_size, tmp_path, names)
    assert all((tmp_path / f"{n}{r}").exists() for n in names for r in range(world_size))
