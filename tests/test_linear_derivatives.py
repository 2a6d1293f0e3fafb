"""Derivatives that linear_loss is asked for in unusual ways: it gives those of the dense layer or says why not."""

from __future__ import annotations

import pytest
import torch
from test_linear import BAD, CLASSES, FEATURES, ROWS, problem
from torch import nn
from torch.autograd import forward_ad
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fused_losses as fl
from fused_losses.functional import linear_loss

pytestmark = pytest.mark.any_cpu  # the kernels' callers


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_under_a_checkpoint(reduction):
    (x, w, b), target, samples = problem()

    def loss(x, w, b):
        return linear_loss(x, w, target, linear_bias=b, sample_weight=samples, reduction=reduction).sum()

    expected = torch.autograd.grad(loss(x, w, b), (x, w, b))
    found = torch.autograd.grad(checkpoint(loss, x, w, b, use_reentrant=False), (x, w, b))
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_many_upstream_gradients_at_once(reduction):
    (x, w, b), target, _ = problem()
    loss = linear_loss(x, w, target, linear_bias=b, reduction=reduction)
    found = torch.autograd.grad(loss, (x, w), torch.tensor([1.0, -2.0]).double(), is_grads_batched=True)
    loss = linear_loss(x, w, target, linear_bias=b, reduction=reduction)
    for many, one in zip(found, torch.autograd.grad(loss, (x, w)), strict=True):
        torch.testing.assert_close(many, torch.stack([one, -2.0 * one]))
    rows = linear_loss(x, w, target, linear_bias=b, reduction="none")
    found = torch.autograd.grad(rows, w, torch.eye(ROWS).double(), is_grads_batched=True, retain_graph=True)[0]
    for many, one in zip(found, torch.eye(ROWS).double(), strict=True):
        torch.testing.assert_close(many, torch.autograd.grad(rows, w, one, retain_graph=True)[0])


@pytest.mark.parametrize("size", [1e-7, 1e6])
@pytest.mark.parametrize("by", ["weight", "sample_weight"])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_weights_beyond_the_range_of_float16(by, size, is_autocast):
    """Gradients are in its range again when the mean has divided them and a loss scale has multiplied them."""
    (x, w, b), target, _ = problem(torch.float16)
    options = {by: torch.full((CLASSES if by == "weight" else ROWS,), size)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        loss = linear_loss(x, w, target, "cross_entropy", linear_bias=b, **options)
    twins = [t.detach().double().requires_grad_() for t in (x, w, b)]
    expected = fl.functional.cross_entropy(F.linear(*twins), target, **options)
    (1024.0 * loss).backward()
    (1024.0 * expected).backward()
    for mine, theirs in zip((x, w, b), twins, strict=True):
        tolerance = 2e-2 if is_autocast else 4e-3  # as for the dense layer in test_linear.py
        atol = tolerance * float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0, atol=atol)


def test_upstream_gradients_of_float16():
    """One by one, many at once, in compiled code; an infinite one leaves ignored rows at zero."""
    (x, w, _), target, _ = problem(torch.float16)

    def loss(x, w):
        return linear_loss(x, w, target, "gce")

    upstream = torch.tensor([1024.0, 0.5, 0.0, -3.0])
    many = torch.autograd.grad(loss(x, w), (x, w), upstream, is_grads_batched=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for i, factor in enumerate(upstream):
        one = torch.autograd.grad(loss(x, w), (x, w), factor)
        assert all(torch.equal(gradient, all_[i]) for gradient, all_ in zip(one, many, strict=True))
        traced = torch.autograd.grad(compiled(x, w), (x, w), factor)
        assert all(map(torch.equal, one, traced))
    endless = torch.autograd.grad(loss(x, w), x, torch.tensor(torch.inf))[0]
    assert torch.equal(endless.isfinite().all(1), target == -100) and not endless[target == -100].any()


@pytest.mark.parametrize("scale", [1.0 / 16, 256.0])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_small_gradients_in_float16(reduction, scale):
    """Those of many classes need the loss scale before they are rounded; without one they are not rounded as it is."""
    rows, classes = 16, 30_000
    x, w = torch.randn(rows, 8).half(), (0.01 * torch.randn(classes, 8)).half()
    target = torch.randint(classes, (rows,))
    found, expected = [], []
    for dtype, gradients in ((torch.float32, found), (torch.float64, expected)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float32):
            loss = linear_loss(inputs[0], inputs[1], target, "gce", reduction=reduction)
        upstream = scale * (rows if reduction == "mean" else 1)
        gradients += torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))
    tolerance = 1e-3 if scale > 1.0 else 5e-2  # at a scale of 1 it is as good as at smaller ones
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() < tolerance * theirs.norm()


def test_forward_mode_is_refused_in_any_tensor():
    (x, w, b), target, samples = (problem()[0], *problem()[1:])
    given = {"input": x, "linear_weight": w, "linear_bias": b, "sample_weight": samples}
    given = {name: tensor.detach() for name, tensor in given.items()}
    for name in given:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            linear_loss(target=target, **{**given, name: forward_ad.make_dual(given[name], given[name])})


def test_a_global_mean_is_no_function_of_its_weights():
    """Its divisor is a constant, so that their gradient would be wrong: an error says so."""
    logits, target = torch.randn(4, 3, requires_grad=True), torch.arange(4) % 3
    samples = torch.ones(4, requires_grad=True)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        losses = fl.GlobalMean(fl.GCELoss()), fl.ZErrorCrossEntropyLoss(process_group=group)
        for loss in losses:
            with pytest.raises(RuntimeError, match="sample_weight and weight, got one that requires a gradient"):
                loss(logits, target, samples)
            with torch.no_grad():
                loss(logits, target, samples)
            loss(logits, target, samples.detach()).backward()
        weighted = fl.GlobalMean(fl.GCELoss(reduction="sum"))(logits, target, samples)
        expected = fl.GCELoss(reduction="sum")(logits, target, samples)
        assert torch.equal(*(torch.autograd.grad(each, samples)[0] for each in (weighted, expected)))
    finally:
        destroy_process_group()


JAGGED = torch.nested.nested_tensor([torch.zeros(FEATURES)], layout=torch.jagged)
MORE_BAD = {
    "input must be dense, got a tensor of layout": {"input": torch.zeros(3, FEATURES).to_sparse()},
    "linear_weight must be dense, got a nested": {"linear_weight": JAGGED},
    "gce: weight must be dense": {"weight": torch.ones(CLASSES).to_sparse()},
    "input must be float64": {"input": torch.zeros(3, FEATURES).to(torch.float8_e5m2)},
    "accumulate_dtype must be float64": {"accumulate_dtype": torch.float8_e5m2},
    "target must hold class indices": {"loss": fl.ZErrorCrossEntropyLoss(), "target": torch.zeros(3, CLASSES)},
}


@pytest.mark.parametrize("message", MORE_BAD)
def test_bad_arguments_are_named(message):
    given = {"input": torch.zeros(3, FEATURES), "linear_weight": torch.zeros(CLASSES, FEATURES)}
    with pytest.raises(RuntimeError if "accumulate" not in message else ValueError, match=message):
        linear_loss(**{**given, "target": torch.zeros(3, dtype=torch.int64), **MORE_BAD[message]})


def test_the_module_checks_its_options_at_once():
    for name in ("chunk_bytes", "accumulate_dtype", "skip_rows"):
        ((message, bad),) = ((m, b) for m, b in BAD.items() if name in b)
        with pytest.raises(ValueError, match=message):
            fl.LinearLoss(FEATURES, CLASSES, **bad)
    assert fl.LinearLoss(FEATURES, CLASSES, fl.GlobalMean(fl.HEMLoss()), reduction="active_mean").reduction
    with pytest.raises(ValueError, match="reduction must be"):
        fl.LinearLoss(FEATURES, CLASSES, fl.GlobalMean(fl.GCELoss()), reduction="active_mean")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    "wrap",
    [nn.utils.spectral_norm, nn.utils.weight_norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.5)],
    ids=["spectral_norm", "weight_norm", "pruned"],
)
def test_weights_that_hooks_make(wrap):
    """They do so before a call of the layer, which is not called."""
    made = []
    for dense in (False, True):
        torch.manual_seed(0)
        criterion = fl.LinearLoss(4, 7)
        wrap(criterion.linear)
        optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
        x, target = torch.randn(6, 4), torch.arange(6)
        for _ in range(3):
            optimizer.zero_grad()
            loss = criterion.loss(criterion.linear(x), target) if dense else criterion(x, target)
            loss.backward()
            assert all(p.grad is not None for p in criterion.parameters())
            optimizer.step()
        logits = criterion.eval().linear(x) if dense else criterion.eval().logits(x)
        made.append((loss, logits, *criterion.parameters()))
    for found, expected in zip(*made, strict=True):
        torch.testing.assert_close(found, expected)
