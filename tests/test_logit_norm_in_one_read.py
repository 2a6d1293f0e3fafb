"""LogitNorm and LogitClip of losses of log p_y, which one kernel computes: against the definition in float64, and
against two kernels, one after the other."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial

import pytest
import torch
from conftest import GRAD_FLOOR, GRAD_TOLERANCE, LOSS_TOLERANCE
from torch import nn

import fused_losses as fl
from fused_losses import _ops

OF_LOG_P = ["cross_entropy", *(name for name, entry in fl.LOSSES.items() if entry.of_log_p)]
REDUCTIONS = ["none", "sum", "mean"]
OTHER_PARAMETERS = {"focal": {"gamma": 0.5}, "sce": {"alpha": 2.0, "beta": 0.5}, "taylor_ce": {"order": 4}}
LAYOUTS = {
    "row": ((5,), lambda z: z),
    "rows": ((9, 10), lambda z: z),
    "long rows": ((5, 300), lambda z: z),
    "transposed": ((6, 33), lambda z: z.t().contiguous().t()),
    "strided": ((7, 12), lambda z: torch.stack([z, z], -1)[..., 0]),
    "pixels": ((2, 19, 3, 2), lambda z: z),
    "one class": ((3, 1), lambda z: z),
}


def make(clips, loss, parameter=None, **options):
    return fl.LogitClip(loss, parameter or 1.5, **options) if clips else fl.LogitNorm(loss, parameter or 0.3, **options)


def rescaled(z, parameter, clips):
    """In float64; masked classes stay masked."""
    dim = 0 if z.dim() == 1 else 1
    there = torch.where(z == -math.inf, 0.0, z)
    norm = there.square().sum(dim, keepdim=True).sqrt()
    factor = (parameter / norm).clamp(max=1.0) if clips else 1.0 / (parameter * (norm + 1e-7))
    return torch.where(z == -math.inf, z, there * factor)


def problem(layout, dtype, device, seed):
    """Logits, targets, class weights and sample weights; one row is ignored, some classes are masked."""
    shape, arrange = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    z = 2.0 * torch.randn(shape, generator=generator)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    classes = shape[min(1, len(shape) - 1)]
    target = torch.randint(classes, rows, generator=generator)
    if len(shape) > 1 and classes > 2:
        target.view(-1)[1] = -100
        z[0, 2] = -math.inf
        target[0] = torch.where(target[0] == 2, 0, target[0])
    weight, sample_weight = torch.rand(classes, generator=generator) + 0.2, torch.rand(rows, generator=generator) + 0.2
    return arrange(z.to(dtype)).to(device), target.to(device), weight.to(device), sample_weight.to(device)


@pytest.fixture
def counted(monkeypatch):
    """How often logits are rescaled by a kernel of their own."""
    calls = []
    of_torch = _ops.rescale_logits
    monkeypatch.setattr(_ops, "rescale_logits", lambda *args: calls.append(args) or of_torch(*args))
    return calls


def value_and_grad(loss, logits, upstream=None):
    leaf = logits.detach().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]


@pytest.mark.parametrize("clips", [False, True], ids=["norm", "clip"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [5, 32, 33, 101, 261, 401])
def test_ignored_rows_have_gradient_zero(classes, dtype, clips, device):
    """Whatever they hold, for any upstream gradient, in each backward; odd numbers of classes among them."""
    z = torch.randn(9, classes, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    target = torch.arange(9, device=device) % classes
    for filling, reduction in itertools.product((1.0, math.nan, -math.inf), REDUCTIONS):
        spoiled, labels = z.clone(), target.clone()
        spoiled[::2], labels[::2] = filling, -100
        leaf = spoiled.requires_grad_()
        loss = make(clips, "gce", reduction=reduction)(leaf, labels)
        for upstream in (1.0, 1.0, 0.5, math.nan):
            (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream), retain_graph=True)
            assert not grad[::2].any()
            assert grad[1::2].isfinite().all() == math.isfinite(upstream)


@pytest.mark.parametrize("clips", [False, True], ids=["norm", "clip"])
@pytest.mark.parametrize("name", OF_LOG_P)
def test_the_definition(name, clips, device, counted):
    """Calls drawn at random from all dtypes, layouts and options."""
    own, parameter = OTHER_PARAMETERS.get(name, {}), 1.5 if clips else 0.3
    draw = random.Random(f"{name} {clips}")
    for seed in range(15):
        layout, dtype = draw.choice(list(LAYOUTS)), draw.choice(list(GRAD_TOLERANCE))
        logits, target, weight, sample_weight = problem(layout, dtype, device, seed)
        options = {"reduction": draw.choice(REDUCTIONS), "logit_bias": draw.choice([0.0, 1.25, -3.0])}
        options |= {"weight": draw.choice([None, weight])}
        samples = draw.choice([None, sample_weight])
        criterion = make(clips, name, parameter, **own, **options)
        of_rows = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed))
        upstream = 0.5 + (of_rows if options["reduction"] == "none" else of_rows.mean()).to(device)
        upstream = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
        value, grad = value_and_grad(partial(criterion, target=target, sample_weight=samples), logits, upstream)

        def exact(z, target=target, samples=samples, options=options):
            wide = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
            each = None if samples is None else samples.double()
            z = rescaled(z, parameter, clips)
            return fl.LOSSES[name].reference(z, target, sample_weight=each, **own, **wide)

        right, right_grad = value_and_grad(exact, logits.double(), upstream.double())
        there, what = logits != -math.inf, (layout, dtype, options)
        assert value.dtype == upstream.dtype and grad.dtype == dtype
        assert ((value.double() - right).abs() <= LOSS_TOLERANCE[dtype] * (1.0 + right.abs())).all(), what
        size = float(right_grad[there].abs().max())
        error = float((grad.double() - right_grad)[there].abs().max())
        assert error <= GRAD_TOLERANCE[dtype] * size + GRAD_FLOOR[dtype], (what, error / max(size, 1e-30))
        assert not grad[~there].any()
        assert torch.equal(criterion(logits, target, samples), value)  # without a gradient
    assert not counted


@pytest.mark.parametrize("clips", [False, True], ids=["norm", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unusual_rows_are_as_in_two_reads(dtype, clips, device, monkeypatch):
    inf, nan = math.inf, math.nan
    rows = [
        [0.0, 0.0, 0.0, 0.0],
        [nan, 1.0, 2.0, 0.5],
        [1.0, nan, 2.0, 0.5],
        [inf, 1.0, 2.0, 0.5],
        [1.0, 1.0, inf, 0.5],
        [-inf, -inf, -inf, -inf],
        [-inf, 1.0, 2.0, 0.5],
        [1.0, -inf, -inf, -inf],
        [-inf, -inf, 1.0, -inf],
        [1e30, -inf, 1e25, 0.0],
        [1e-30, 2e-30, 0.0, 0.0],
        [1e4, -1e4, 3.0, 4.0],
        [3e18, 3e18, -2e18, 0.0],
        [80.0, 0.0, 0.0, 1.0],
        [0.0, 80.0, 0.0, 1.0],
    ]
    logits, target = torch.tensor(rows, dtype=dtype, device=device), torch.zeros(len(rows), dtype=torch.int64)
    target = target.to(device)
    for name in ("cross_entropy", "gce", "focal", "taylor_ce"):
        criterion = make(clips, name, reduction="none")
        found = value_and_grad(lambda z, of=criterion: of(z, target).sum(), logits)[1]
        values = criterion(logits, target)
        with monkeypatch.context() as patched:
            patched.setattr(type(criterion), "_known_arguments", lambda *args, **options: None)
            right = value_and_grad(lambda z, of=criterion: of(z, target).sum(), logits)[1]
            torch.testing.assert_close(values, criterion(logits, target), equal_nan=True, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.isfinite().all(1), right.isfinite().all(1)), name
        close = {"rtol": GRAD_TOLERANCE[dtype], "atol": GRAD_TOLERANCE[dtype]}
        whole = right.isfinite().all(1)
        sizes = right[whole].abs().amax(1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(found[whole] / sizes, right[whole] / sizes, **close)
    largest = torch.tensor([[3e38, 1.0, -3e38, 0.0]], dtype=dtype, device=device)  # whose squares have no sum
    for found in value_and_grad(lambda z: make(clips, "cross_entropy")(z, target[:1]), largest):
        assert found.isfinite().all()


@pytest.mark.parametrize("parameter", [1e-15, 1e-3, 1e15])
@pytest.mark.parametrize("clips", [False, True], ids=["norm", "clip"])
def test_parameters_at_their_ends(clips, parameter, device):
    for loss, layout in itertools.product(("cross_entropy", "gce"), ("rows", "long rows", "one class")):
        logits, target, *_ = problem(layout, torch.float32, device, 5)
        found = value_and_grad(partial(make(clips, loss, parameter), target=target), logits)
        exact = partial(fl.LOSSES[loss].reference, target=target)
        right = value_and_grad(lambda z, of=exact: of(rescaled(z, parameter, clips)), logits.double())
        assert abs(float(found[0]) - float(right[0])) <= 1e-5 * (1.0 + abs(float(right[0])))
        there = logits != -math.inf
        size = float(right[1][there].abs().max())
        lost = 1e-36  # exponentials below the smallest normal number, times factors
        assert float((found[1] - right[1])[there].abs().max()) <= 3e-5 * size + lost


def test_digits_of_a_certain_row(device):
    """1 - p_y is 1e-10: what is computed from p_y alone would be 0."""
    logits = torch.tensor([[20.0, -3.0, -2.0, 0.5]], device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    for loss, clips, parameter in itertools.product(("cross_entropy", "mae"), (False, True), (0.04, 22.0)):
        if clips == (parameter < 1):
            continue
        found = value_and_grad(lambda z: make(clips, loss, parameter)(z, target), logits)
        right = value_and_grad(
            lambda z: fl.LOSSES[loss].reference(rescaled(z, parameter, clips), target),
            logits.double(),
        )
        assert 0 < right[0] < 1e-6
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("clips", [False, True], ids=["norm", "clip"])
def test_second_derivatives_and_tensors_as_parameter(clips, device):
    logits, target, *_ = problem("rows", torch.float64, device, 3)
    logits = logits.masked_fill(logits == -math.inf, 0.3)
    criterion = make(clips, "cross_entropy", logit_bias=0.5)
    few = target.clamp(min=0)[:3]
    assert torch.autograd.gradgradcheck(lambda z: criterion(z, few), logits[:3].requires_grad_())
    parameter = torch.tensor(0.7, dtype=torch.float64, device=device)
    module = make(clips, "gce", parameter).to(device)
    right = value_and_grad(lambda z: make(clips, "gce", 0.7)(z, target), logits)
    for a, b in zip(value_and_grad(lambda z: module(z, target), logits), right, strict=True):
        torch.testing.assert_close(a, b)
    of_parameter = next(module.buffers()).requires_grad_()
    found = torch.autograd.grad(module(logits, target), of_parameter)[0]
    steps = [make(clips, "gce", 0.7 + h)(logits, target) for h in (-1e-5, 1e-5)]
    torch.testing.assert_close(found, (steps[1] - steps[0]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_gradient_that_is_asked_for_twice(device):
    logits, target, *_ = problem("rows", torch.float32, device, 0)
    leaf = logits.requires_grad_()
    loss = fl.LogitNorm("gce")(leaf, target)
    first, second = (torch.autograd.grad(loss, leaf, torch.tensor(3.0, device=device), retain_graph=True) for _ in "12")
    torch.testing.assert_close(first, second)


class _Halved(fl.GCELoss):
    def forward(self, *args, **options):
        return 0.5 * super().forward(*args, **options)


def with_hook(seen):
    loss = fl.GCELoss()
    loss.register_forward_hook(lambda *args: seen.append(args))
    return loss


def test_what_takes_two_reads(counted):
    """Other losses and whatever else is asked of one; each result by the definition."""
    logits, target, *_ = problem("rows", torch.float32, "cpu", 0)
    target = target.clamp(min=0)
    logits[0, 2] = 0.0
    z = rescaled(logits.double(), 0.3, False).float()
    seen = []
    calls = {
        "another loss": (fl.NGCELoss(), {}),
        "a sum over classes": (fl.CrossEntropyLoss(label_smoothing=0.1), {}),
        "another bias": (fl.GCELoss(logit_bias=torch.tensor(0.5)), {}),
        "of torch": (nn.CrossEntropyLoss(), {}),
        "by its subclass": (_Halved(), {}),
        "hooks": (with_hook(seen), {}),
        "statistics": (fl.GCELoss(), {"return_row_stats": True}),
        "a wrapper": (fl.LogitClip("gce", 0.9), {}),
    }
    for number, (what, (loss, options)) in enumerate(calls.items(), 1):
        found, right = fl.LogitNorm(loss, 0.3)(logits, target, **options), loss(z, target, **options)
        if options:
            found, right = found[0], right[0]
        torch.testing.assert_close(found, right, msg=what)
        assert len(counted) == number
    assert len(seen) == 2
    probabilities = torch.rand(logits.shape).softmax(1)
    found = fl.LogitNorm(fl.GCELoss(), 0.3)(logits, probabilities)
    torch.testing.assert_close(found, fl.GCELoss()(z, probabilities))


def test_rows_and_what_is_made_of_them(device, counted):
    logits, target, weight, sample_weight = problem("rows", torch.float64, device, 1)
    inside = fl.GCELoss(weight=weight, logit_bias=0.5)
    rows = fl.LogitNorm(inside, 0.3).to(device).rows(logits, target, sample_weight)
    z = rescaled(logits, 0.3, False)
    right = fl.functional.gce_loss(z, target, logit_bias=0.5, reduction="none")
    torch.testing.assert_close(rows.values, right)
    assert torch.equal(rows.kept, target != -100)
    torch.testing.assert_close(rows.weight[rows.kept], weight.double()[target[rows.kept]] * sample_weight[rows.kept])
    both = fl.SuperLoss(fl.LogitNorm("gce", 0.3))(logits, target), fl.SuperLoss("gce")(z, target)
    torch.testing.assert_close(*both)
    assert not counted
    with pytest.raises(RuntimeError, match="weight tensor should be defined"):
        fl.LogitNorm(fl.GCELoss(weight=weight[1:]), 0.3).rows(logits, target)


def test_bad_calls_say_what_is_wrong():
    logits, target, weight, _ = problem("rows", torch.float32, "cpu", 0)
    criterion, short_weight = fl.LogitNorm("gce"), fl.LogitNorm("gce", weight=weight[1:])
    for error, words, call in (
        (IndexError, "Target 10 is out of bounds", lambda: criterion(logits, target.clamp(min=0) * 0 + 10)),
        (RuntimeError, "expected target dtype", lambda: criterion(logits, target == 1)),
        (ValueError, "to match target batch_size", lambda: criterion(logits, target[1:])),
        (RuntimeError, "sample_weight must have one entry per row", lambda: criterion(logits, target, weight)),
        (RuntimeError, "weight tensor should be defined", lambda: short_weight(logits, target)),
        (RuntimeError, "logits must be float64", lambda: criterion(target, target)),
        (TypeError, "target must be a Tensor", lambda: criterion(logits, 3)),
        (TypeError, "unexpected keyword", lambda: criterion(logits, target, nonsense=1)),
    ):
        with pytest.raises(error, match=words):
            call()


def traced(criterion, *inputs):
    """The compiled criterion, and the code of what was traced."""
    found = []

    def backend(graph, _):
        found.append(graph.print_readable(print_output=False))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=backend)
    compiled(*inputs)
    return compiled, "".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("on_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("clips", [False, True], ids=["norm", "clip"])
def test_compiled_code_reads_the_logits_once(clips, on_tensor, reduction, device):
    parameter = torch.tensor(0.8, device=device) if on_tensor else 0.8
    criterion = make(clips, "focal", parameter, gamma=0.5, reduction=reduction)
    logits, target, _, sample_weight = problem("rows", torch.float32, device, 3)
    compiled, code = traced(criterion, logits.requires_grad_(), target, sample_weight)
    assert "rescaled_logits" in code and "linalg" not in code
    for factor in (0.8, 1.7):
        if on_tensor:
            parameter.fill_(factor)
        right = value_and_grad(lambda z: criterion(z, target, sample_weight).sum(), logits)
        found = value_and_grad(lambda z: compiled(z, target, sample_weight).sum(), logits)
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


def test_compiled_code_of_other_losses_rescales_by_torch(device):
    criterion = make(False, "nce")
    logits, target, *_ = problem("rows", torch.float32, device, 3)
    compiled, code = traced(criterion, logits.requires_grad_(), target)
    assert "rescaled_logits" not in code and "vector_norm" in code
    right = value_and_grad(lambda z: criterion(z, target), logits)
    torch.testing.assert_close(value_and_grad(lambda z: compiled(z, target), logits), right, rtol=1e-5, atol=1e-6)
