"""Targets that are class probabilities: the sum of the classes' losses, each with its share."""

from __future__ import annotations

import math

import emulated_cuda
import pytest
import torch
from conftest import GRAD_FLOOR, GRAD_TOLERANCE, LOSS_TOLERANCE, one_in

import fused_losses as fl

NAMES = [name for name, entry in fl.LOSSES.items() if entry.takes_probabilities]
ROWS, CLASSES = 6, 5


def problem(shape=(ROWS, CLASSES), dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=dtype).to(device)
    share = torch.softmax(torch.randn(shape, generator=generator, dtype=torch.float64), 1).to(device)
    return logits.requires_grad_(), share


def expected(name, logits, share, weight=None, sample_weight=None):
    """Row losses, one class at a time by the loss of class indices."""
    total = 0.0
    for k in range(share.shape[1]):
        target = torch.full_like(share[:, 0], k, dtype=torch.int64)
        factor = 1.0 if weight is None else weight[k]
        total = total + share[:, k] * factor * fl.LOSSES[name].reference(logits, target, reduction="none")
    return total if sample_weight is None else total * sample_weight


@pytest.mark.any_cpu
def test_which_losses_take_them():
    # Functions of log p_y, and of the mean log-probability besides.
    assert [name for name, entry in fl.LOSSES.items() if entry.sums in ((), ("log_probs",))] == NAMES


SHAPES = [(ROWS, CLASSES), (3, CLASSES, 2, 2), (2, 37)]  # 37: vectors of classes


@pytest.mark.parametrize(("name", "shape", "reduction"), one_in(3, NAMES, SHAPES, ["none", "sum", "mean"]))
def test_sum_of_the_classes_losses(name, shape, reduction, device):
    logits, share = problem(shape, device=device)
    weight, samples = torch.rand(shape[1]).double().to(device), torch.rand(share[:, 0].shape).double().to(device)
    rows = expected(name, logits, share, weight, samples)
    divisor = samples.sum() if reduction == "mean" else 1.0
    want = rows if reduction == "none" else rows.sum() / divisor
    for made in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        value = made(logits, share, weight=weight, sample_weight=samples, reduction=reduction)
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (value, want)))


@pytest.mark.parametrize("name", NAMES)
def test_certain_labels_are_class_indices(name):
    logits, _ = problem()
    target = torch.arange(ROWS) % CLASSES
    one_hot = torch.nn.functional.one_hot(target, CLASSES).double()
    masked = logits.detach().clone()
    masked[:, 4] = -math.inf  # where the share is 0
    for z, y, u in ((logits, target, one_hot), (masked[:4], target[:4], one_hot[:4])):
        if z is not logits and name.startswith("nce"):
            continue  # the sum over classes is infinite
        z = z.detach().requires_grad_()
        losses = [fl.LOSSES[name].module()(z, labels) for labels in (y, u)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in losses))


LAYOUTS = {  # of the logits and of the probabilities: contiguous, pixels, channels last, gaps
    "rows": ((40, 10), lambda t: t),
    "many classes": ((5, 230), lambda t: t),
    "odd rows": ((3, 1001), lambda t: t),
    "rows of a block": ((2, 2056), lambda t: t),
    "columns": ((5, 230), lambda t: t.t().contiguous().t()),
    "pixels": ((2, 10, 3, 7), lambda t: t),
    "channels last": ((2, 130, 2, 3), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "every other": ((2, 10, 3, 7), lambda t: t.repeat_interleave(2, -1)[..., ::2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype, device):
    shape, arrange = LAYOUTS[layout]
    logits, share = problem(shape, dtype, device)
    weight = 0.5 + torch.rand(shape[1], device=device)
    for name in ("gce", "nce_agce", "ece", "unhinged"):  # tests/cpp has all of them
        z, exact = arrange(logits.detach()).requires_grad_(), logits.detach().double().requires_grad_()
        for u in (share.to(dtype), arrange(share.to(torch.float32))):
            value = fl.LOSSES[name].function(z, u, weight=weight)
            want = fl.LOSSES[name].reference(exact, u.double(), weight=weight.double())
            assert value.dtype == torch.float32
            rtol = LOSS_TOLERANCE[dtype]
            torch.testing.assert_close(value.double(), want, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")
            (grad,), (slope,) = torch.autograd.grad(value, z), torch.autograd.grad(want, exact)
            assert grad.dtype == dtype and grad.stride() == torch.empty_like(z).stride()
            atol = GRAD_TOLERANCE[dtype] * slope.abs().max().item() + GRAD_FLOOR[dtype]
            torch.testing.assert_close(grad.double(), slope, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


WEIGHTS = {"without weights": (), "of classes": ("weight",), "of samples": ("sample_weight",)}


@pytest.mark.parametrize(
    ("dtype", "weights", "layout"),
    one_in(3, [torch.float64, torch.float32, torch.bfloat16], WEIGHTS, LAYOUTS),
)
def test_mean_of_every_layout(layout, weights, dtype, device):
    """As training takes it: the gradient for an upstream gradient of 1, again in a second backward, and of others."""
    shape, arrange = LAYOUTS[layout]
    logits, share = problem(shape, dtype, device)
    made = {"weight": 0.5 + torch.rand(shape[1], device=device), "sample_weight": torch.rand_like(share[:, 0]) + 0.1}
    options = {name: made[name] for name in WEIGHTS[weights]}
    tolerance = {"rtol": 0, "atol": GRAD_TOLERANCE[dtype]}  # of gradients times the rows
    for name in ("cross_entropy", "gce", "nce", "unhinged"):
        z, exact = arrange(logits.detach()).requires_grad_(), logits.detach().double().requires_grad_()
        value = fl.LOSSES[name].function(z, arrange(share), **options)
        rows = expected(name, exact, share, **{key: tensor.double() for key, tensor in options.items()})
        want = rows.sum() / (options["sample_weight"].sum() if "sample_weight" in options else rows.numel())
        slope = torch.autograd.grad(want, exact)[0]
        for upstream in (1.0, 1.0, -0.5):
            (grad,) = torch.autograd.grad(value, z, torch.tensor(upstream).to(value), retain_graph=True)
            largest = slope.abs().max()
            torch.testing.assert_close(grad.double() / largest, upstream * slope / largest, **tolerance)


@pytest.mark.parametrize("name", ["gce", "nce_agce", "ece"])
def test_upstream_gradients_and_second_backward(name, device):
    logits, share = problem((4, 130), torch.float32, device)
    upstream = torch.rand(4, device=device)
    rows = fl.LOSSES[name].reference(logits.double(), share, reduction="none")
    for reduction, above in (("none", upstream), ("sum", torch.tensor(-3.0)), ("mean", torch.tensor(0.5))):
        value = fl.LOSSES[name].function(logits, share, reduction=reduction)
        want = (rows * above.double()).sum() / (4 if reduction == "mean" else 1)
        slope = torch.autograd.grad(want, logits, retain_graph=True)[0]
        for _ in range(2):
            grad = torch.autograd.grad(value, logits, above.to(device), retain_graph=True)[0]
            torch.testing.assert_close(grad, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_without_saved_numbers_is_right_or_refused(name, device):
    """By the operator: cross entropy on CUDA has always saved some."""
    logits, share = problem((4, 130), torch.float32, device)
    args = fl.LOSSES[name].arguments(logits.detach(), share, reduction="none")
    upstream, nothing = torch.rand(4, device=device), torch.empty(0, device=device)
    (slope,) = torch.autograd.grad(fl.LOSSES[name].reference(logits, share, reduction="none"), logits, upstream)
    if name == "cross_entropy" and (emulated_cuda.is_emulated() or device == "cuda"):
        with pytest.raises(RuntimeError, match="no gradient from logits and class probabilities alone"):
            fl._ops.row_loss_backward(upstream, nothing, nothing, *args)
    else:
        found = fl._ops.row_loss_backward(upstream, nothing, nothing, *args)
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


def test_a_share_of_zero_hides_its_class(device):
    logits = torch.tensor([[0.0, -math.inf, 1.0]] * 2, device=device).repeat(1, 50).requires_grad_()
    share = torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.5, 0.5]], device=device).repeat(1, 50) / 50
    for name in [n for n in NAMES if n not in ("cores", "unhinged")]:  # the others have the mean of all log p
        values, want = (
            f(logits, share, reduction="none") for f in (fl.LOSSES[name].function, fl.LOSSES[name].reference)
        )
        assert values[0].isfinite()
        torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        grads = [torch.autograd.grad(v[0], logits, retain_graph=True)[0][0] for v in (values, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gce", "nce"])
def test_in_a_linear_loss(name):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 4, generator=generator).requires_grad_(), torch.randn(7, 4, generator=generator)
    share = torch.softmax(torch.randn(6, 7, generator=generator), 1)
    value = fl.functional.linear_loss(x, weight, share, loss=name)
    want = fl.LOSSES[name].reference(x @ weight.t(), share)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (value, want)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    logits, share = problem((6, 40), torch.float32)
    losses = [fl.GCELoss(reduction=reduction), torch.compile(fl.GCELoss(reduction=reduction), backend="aot_eager")]
    values = [loss(logits, share) for loss in losses]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), logits)[0] for v in values))


@pytest.mark.any_cpu
def test_what_needs_one_label_is_refused():
    logits, share = problem()
    for name in NAMES:
        with pytest.raises(ValueError, match="logit_bias is not supported for class probabilities"):
            fl.LOSSES[name].function(logits, share, logit_bias=1.0)
        with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target, got 1"):
            fl.LOSSES[name].function(logits, share, ignore_index=1)


@pytest.mark.parametrize("name", ["cross_entropy", "gce"])
def test_the_plain_formula_of_half_precision_computes_in_float32(name):
    logits, target = torch.randn(5, 7).bfloat16(), torch.softmax(torch.randn(5, 7), 1)
    found, right = (fl.LOSSES[name].reference(z, target) for z in (logits, logits.float()))
    torch.testing.assert_close(found, right)
