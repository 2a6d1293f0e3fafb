"""What people do with a loss after `loss = criterion(...)`: every loss under every such use, with every reduction.

Each use yields the gradient in the logits for the upstream gradient that it is given; it is compared with the plain
formula's, in float64 and under torch's own autograd.
"""

from __future__ import annotations

import gc
import itertools
import math

import emulated_cuda
import pytest
import torch
from conftest import one_in
from gloo_group import group_of_one
from torch.utils.checkpoint import checkpoint

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # of autograd, not of kernels

Z_LOSSES = {
    "z_mse": lambda x, y, reduction, m: m.z_mse_loss(x[:, 0], y.to(x.dtype), threshold=1.3, reduction=reduction),
    "z_bce": lambda x, y, reduction, m: m.z_error_bce_with_logits(x[:, 0], y % 2, threshold=1.3, reduction=reduction),
    "z_ce": lambda x, y, reduction, m: m.z_error_cross_entropy(x, y, threshold=1.3, reduction=reduction),
    "z_ce_loss_of_gce": lambda x, y, reduction, m: m.z_error_cross_entropy(
        x, y, threshold=1.3, statistic="loss", base="gce", reduction=reduction
    ),
}
NAMES = [*fl.LOSSES, *Z_LOSSES]
ROWS, CLASSES = 40, 3
EXACT = {  # by default their gradient is the one of the papers, not the derivative that the plain formula has
    "bi_tempered": {"num_iters": None},
}


def loss_of(name, x, y, reduction, module=fl.functional):
    if name in Z_LOSSES:
        return Z_LOSSES[name](x, y, reduction, module)
    function = getattr(module, name if name == "cross_entropy" else f"{name}_loss")
    return function(x, y, reduction=reduction, **EXACT.get(name, {}))


def as_function_of_logits(name, target, reduction):
    return lambda x: loss_of(name, x, target, reduction)


def problem(name, reduction, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=generator, dtype=dtype)
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    if name not in ("z_mse", "z_bce"):
        target[3] = -100
    upstream = torch.randn(ROWS if reduction == "none" else (), generator=generator, dtype=dtype)
    return logits, target, upstream


# ---- uses: each returns the gradient of sum(upstream * loss) in x ---------------------------------------------------


def plainly(loss, x, upstream):
    return torch.autograd.grad(loss(x), x, upstream)[0]


def twice(loss, x, upstream):
    value = loss(x)
    (first,) = torch.autograd.grad(value, x, upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, x, upstream)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)  # a gradient that was given away is not touched again
    return second


def into_leaf_and_in_place(loss, x, upstream):
    value = loss(x)
    value.backward(upstream, retain_graph=True)
    x.grad.mul_(2.0)
    value.backward(upstream)
    return x.grad / 3.0


def with_unit_upstream_scaled_before(loss, x, upstream):
    return torch.autograd.grad((loss(x) * upstream).sum(), x)[0]


def lazily_negated(loss, x, upstream):
    return torch.autograd.grad(loss(x), x, torch._neg_view(-upstream))[0]


def through_complex(loss, x, upstream):
    value = loss(x)
    number = torch.complex(torch.zeros_like(value), value).conj().resolve_conj()
    return torch.autograd.grad(torch.view_as_real(number)[..., 1], x, -upstream)[0]


def batched(loss, x, upstream):
    stacked = torch.stack([upstream, 2.0 * upstream])
    one, two = torch.autograd.grad(loss(x), x, stacked, is_grads_batched=True)[0]
    torch.testing.assert_close(2.0 * one, two)
    return one


def batched_after_a_first(loss, x, upstream):
    value = loss(x)
    torch.autograd.grad(value, x, torch.ones_like(upstream), retain_graph=True)
    return torch.autograd.grad(value, x, upstream[None], is_grads_batched=True)[0][0]


def create_graph(loss, x, upstream):
    with torch.autograd.set_detect_anomaly(True):  # of which finite rows have none, hidden ones included
        return torch.autograd.grad(loss(x), x, upstream, create_graph=True)[0].detach()


def checkpointed(loss, x, upstream):
    return torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x, upstream)[0]


def checkpointed_reentrantly(loss, x, upstream):
    checkpoint(loss, x, use_reentrant=True).backward(upstream)
    return x.grad


def offloaded(loss, x, upstream):
    with torch.autograd.graph.save_on_cpu():
        value = loss(x)
    return torch.autograd.grad(value, x, upstream)[0]


def through_hooks(loss, x, upstream):
    leaf, seen = x, []
    value = loss(leaf * 1.0)
    value.register_hook(lambda grad: seen.append(grad) or grad * 3.0)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    assert len(seen) == 1
    return grad / 3.0


def by_compiled_autograd(loss, x, upstream):
    torch._dynamo.reset()
    value = loss(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        value.backward(upstream)
    return x.grad


def by_func_vjp(loss, x, upstream):
    _, pull_back = torch.func.vjp(loss, x.detach())
    return pull_back(upstream)[0]


def by_func_jvp(loss, x, upstream):
    directions = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    tangents = torch.func.vmap(lambda v: torch.func.jvp(loss, (x.detach(),), (v,))[1])(directions)
    return (tangents * upstream).reshape(x.numel(), -1).sum(1).view_as(x)


USES = [
    plainly,
    twice,
    into_leaf_and_in_place,
    with_unit_upstream_scaled_before,
    lazily_negated,
    through_complex,
    batched,
    batched_after_a_first,
    create_graph,
    checkpointed,
    checkpointed_reentrantly,
    offloaded,
    through_hooks,
    by_func_vjp,
    by_func_jvp,
]


@pytest.mark.parametrize(("name", "use"), one_in(3, NAMES, USES))
def test_gradient(name, use):
    for reduction in ("none", "mean", "sum"):
        logits, target, upstream = problem(name, reduction)
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss_of(name, leaf, target, reduction, fl.reference), leaf, upstream)
        actual = use(as_function_of_logits(name, target, reduction), logits.clone().requires_grad_(), upstream)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# One for each torch.autograd.Function; the others do the same.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["agce", "z_bce", "z_ce_loss_of_gce"]
    + [pytest.param(name, marks=pytest.mark.long) for name in ("cross_entropy", "nfl", "hem", "z_mse", "z_ce")],
)
def test_compiled_autograd(name):
    for reduction in ("none", "mean"):
        logits, target, upstream = problem(name, reduction)
        loss = as_function_of_logits(name, target, reduction)
        expected = plainly(loss, logits.clone().requires_grad_(), upstream)
        for _ in range(2):  # the second time from the cache of compiled graphs
            actual = by_compiled_autograd(loss, logits.clone().requires_grad_(), upstream)
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_zero_upstream(name):
    logits, target, _ = problem(name, "mean")
    leaf = logits.clone().requires_grad_()
    for zero in (torch.zeros((), dtype=logits.dtype), torch._efficientzerotensor((), dtype=logits.dtype)):
        (grad,) = torch.autograd.grad(loss_of(name, leaf, target, "mean"), leaf, zero)
        assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_keep_gradient_zero_under_an_overflowed_loss_scale(name, dtype):
    for reduction, upstream in itertools.product(("none", "mean", "sum"), (math.inf, -math.inf, math.nan)):
        logits, target, like = problem(name, reduction, dtype)
        ignored = target == -100
        leaf = logits.clone().requires_grad_()
        loss = loss_of(name, leaf, target, reduction)
        (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(like, upstream, dtype=loss.dtype))
        assert torch.equal(grad[ignored], torch.zeros_like(grad[ignored]))
        assert not grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", fl.LOSSES)
def test_an_expected_upstream_gradient_gives_the_same_bits(name, dtype, reduction):
    """CUDA's forward writes the gradient for the upstream gradient of the step before.

    Whether that was right depends on when the device was done with that step. The gradient must not.
    """
    logits, labels, _ = problem(name, reduction, dtype)
    criterion = fl.LOSSES[name].module(reduction=reduction)
    for classes, soft in itertools.product((3, 40), (False, True)):
        if soft and not fl.LOSSES[name].takes_probabilities:
            continue
        leaf = torch.cat([logits] * 14, dim=1)[:, :classes].clone().requires_grad_()
        target = leaf.detach().softmax(1) if soft else labels
        for upstream in (1.0, 0.25, 0.3):
            for options in ({},) if soft else ({}, {"return_row_stats": True}):
                grads = []
                for _ in range(3):
                    loss = criterion(leaf, target, **options)
                    loss = loss[0] if options else loss
                    grads += torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
                assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_expected_upstream_gradient_of_two_labels_gives_the_same_bits(dtype, reduction):
    logits, target, _ = problem("mae", reduction, dtype)
    leaf = logits.clone().requires_grad_()
    for upstream, lam in itertools.product((1.0, 0.25, 0.3), (0.3, torch.linspace(0.0, 1.0, ROWS))):
        grads = []
        for _ in range(3):
            loss = fl.functional.mixed("mae", leaf, target, target.flip(0), lam, reduction=reduction)
            grads += torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_the_last_upstream_gradient_is_expected_by_kernels_that_write_for_it():
    logits, target, _ = problem("cross_entropy", "mean", torch.float32)
    args = fl._arguments.RowLossArguments(
        logits, target, None, None, None, None, "cross_entropy", (0.0,), 0.0, -100, "mean"
    )
    for upstream in (0.25, 1.0, 0.5):
        for again in (False, True):
            _, stats, saved, grad = fl._ops.row_loss_with_stats_and_grad(*args)
            if again:
                assert saved[0] == ROWS - 1 and saved[1] == (upstream if emulated_cuda.is_emulated() else 1.0)
            fl._ops.row_loss_backward_(torch.tensor(upstream), stats, saved, grad, *args)
    for upstream in (0.25, 1.0, 0.5):
        for again in (False, True):
            _, written_for, grad = fl._ops.mixed_loss_with_grad(target.flip(0), None, 0.3, *args)
            if again:
                assert written_for == (upstream if emulated_cuda.is_emulated() else 1.0)
            fl._ops.mixed_loss_backward_(torch.tensor(upstream), written_for, grad, target.flip(0), None, 0.3, *args)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients(name):
    logits, target, _ = problem(name, "mean")
    expected = loss_of(name, logits.clone().requires_grad_(), target, "mean").detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(loss_of(name, logits, target, "mean"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy", "agce", "hem"])
def test_a_checkpoint_frees_the_memory_of_the_gradient(name):
    """Nothing of the logits' size stays alive where torch's saved-tensor hooks cannot reach it."""
    logits = torch.randn(1000, 100, requires_grad=True)
    target = torch.randint(0, 100, (1000,))
    gc.collect()
    before = tensors_of_size(logits)
    value = checkpoint(lambda x: loss_of(name, x, target, "mean"), logits, use_reentrant=False)
    assert tensors_of_size(logits) == before
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        value = loss_of(name, logits * 1.0, target, "mean")
    assert packed.count(logits.shape) >= 2  # the logits and the gradient that forward wrote
    value.backward()


def tensors_of_size(like):
    """Memory of that many bytes, whoever owns it, counted by address."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == like.shape]
    return len({t.data_ptr() for t in found})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy", "nce_mae", "hem", "z_ce"])
def test_a_module_under_ddp(name, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, CLASSES)
    inputs, target = torch.randn(ROWS, 5), torch.randint(0, CLASSES, (ROWS,))

    def gradient(wrap):
        model.weight.grad = None
        loss_of(name, wrap(model)(inputs), target, "mean").backward()
        return model.weight.grad.clone()

    with group_of_one(tmp_path):
        found = gradient(torch.nn.parallel.DistributedDataParallel)
    torch.testing.assert_close(found, gradient(lambda module: module))
