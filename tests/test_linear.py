"""linear_loss and LinearLoss against the loss of torch's linear layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import one_in
from torch.nn import functional as F

import fused_losses as fl
from fused_losses import _ops
from fused_losses.functional import linear_loss

pytestmark = pytest.mark.any_cpu  # the kernels' callers

ROWS, FEATURES, CLASSES = 37, 5, 7
# In half precision both sides round logits, their gradient and the input's gradient at the same places, but chunks are
# added up in another order.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ONE_ROW = 1  # bytes: a chunk has at least one row
CHUNKS = {"one row": ONE_ROW, "ragged": 2 * CLASSES * 8 * 10, "all": 1 << 20}


def problem(dtype=torch.float64, device="cpu", rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(*s, generator=generator) for s in ((rows, FEATURES), (CLASSES, FEATURES), (CLASSES,))]
    target = torch.randint(0, CLASSES, (rows,), generator=generator)
    target[::9] = -100
    sample_weight = torch.rand(rows, generator=generator) + 0.5
    made = [t.to(device, dtype).requires_grad_() for t in tensors]
    return made, target.to(device), sample_weight.to(device)


def close(found, expected, dtype):
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def check(loss, dense, dtype=torch.float64, device="cpu", upstream=3.0, tensors=None, **options):
    """``loss(x, w, b)`` and its gradients against those of ``dense(logits)``."""
    tensors = problem(dtype, device)[0] if tensors is None else tensors
    twins = [t.detach().clone().requires_grad_() for t in tensors]
    found, expected = loss(*tensors), dense(F.linear(*twins))
    assert found.shape == expected.shape and found.dtype == expected.dtype
    close(found, expected, dtype)
    weights = torch.linspace(-upstream, upstream, found.numel(), device=found.device).reshape(found.shape)
    weights = weights if found.dim() else torch.tensor(upstream, device=found.device)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, theirs in zip(tensors, twins, strict=True):
        assert mine.grad.dtype == theirs.grad.dtype
        close(mine.grad, theirs.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignored_rows_are_zero_for_any_upstream_gradient(reduction, dtype):
    (x, w, b), target, _ = problem(dtype, "cpu")
    ignored = target == -100
    loss = linear_loss(x, w, target, "gce", linear_bias=b, chunk_bytes=1, reduction=reduction)
    for upstream, again in ((math.nan, True), (2.0, True), (math.inf, False)):
        above = torch.where(ignored, upstream, 2.0) if loss.dim() else torch.tensor(upstream)
        (grad,) = torch.autograd.grad(loss, x, above.to(loss.dtype), retain_graph=again)
        assert not grad[ignored].any() and grad[~ignored].any(1).all()


def reductions_of(name):
    return fl.LOSSES[name].reductions


@pytest.mark.parametrize(("name", "dtype", "chunk"), one_in(3, fl.LOSSES, TOLERANCE, CHUNKS))
def test_every_loss_is_that_of_the_dense_layer(name, dtype, chunk, device):
    _, target, sample_weight = problem(dtype, device)
    weight = torch.linspace(0.5, 2.0, CLASSES, device=device)
    for reduction in reductions_of(name):
        options = {"weight": weight, "reduction": reduction, "sample_weight": sample_weight, "logit_bias": 0.4}
        # Near a margin the rounding of a logit decides whether a row counts, which no tolerance covers.
        if name in ("hem", "multi_margin") and dtype in (torch.bfloat16, torch.float16) and chunk == "one row":
            continue
        check(
            lambda x, w, b: linear_loss(x, w, target, name, linear_bias=b, chunk_bytes=CHUNKS[chunk], **options),
            lambda logits: fl.LOSSES[name].function(logits, target, **options),
            dtype, device,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_with_smoothing_and_probabilities(smoothing, reduction):
    _, target, sample_weight = problem()
    soft = torch.rand(ROWS, CLASSES, dtype=torch.float64)
    for labels in (target, soft):
        options = {"label_smoothing": smoothing, "reduction": reduction, "sample_weight": sample_weight}
        check(
            lambda x, w, b: linear_loss(x, w, labels, "cross_entropy", linear_bias=b, chunk_bytes=700, **options),
            lambda logits: fl.functional.cross_entropy(logits, labels, **options),
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("statistic", ["logit", "prob", "loss"])
@pytest.mark.parametrize("base", ["gce", "hem", fl.CrossEntropyLoss(torch.linspace(1, 2, CLASSES), logit_bias=1.0)])
def test_z_error_drops_the_rows_that_the_dense_layer_drops(base, statistic, reduction):
    _, target, sample_weight = problem()
    for running in (False, True):
        loss = fl.ZErrorCrossEntropyLoss(1.1, statistic, base, reduction=reduction, running=running)
        twin = copy.deepcopy(loss)
        kept = copy.deepcopy(loss)(F.linear(*problem()[0]), target, return_mask=True).mask.sum()
        assert 0 < kept < (target != -100).sum()
        check(
            lambda x, w, b: linear_loss(
                x, w, target, loss, linear_bias=b, sample_weight=sample_weight, chunk_bytes=700, reduction=reduction
            ),
            lambda logits: twin(logits, target, sample_weight),
        )
        if running:
            torch.testing.assert_close(loss.running_moments, twin.running_moments, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["name", "long name", "function", "module"])
def test_a_loss_is_a_name_a_function_or_a_module(by):
    (x, w, b), target, _ = problem()
    expected = fl.functional.gce_loss(F.linear(x, w, b), target, q=0.4)
    loss = {"name": "gce", "long name": "gce_loss", "function": fl.functional.gce_loss, "module": fl.GCELoss(0.4)}[by]
    own = {} if by == "module" else {"q": 0.4}
    torch.testing.assert_close(linear_loss(x, w, target, loss, linear_bias=b, **own), expected)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_dimensions(shape, reduction):
    x = torch.randn(*shape, FEATURES, dtype=torch.float64, requires_grad=True)
    (_, w, b), _, _ = problem()
    target, sample_weight = torch.randint(0, CLASSES, shape), torch.rand(shape)
    options = {"reduction": reduction}
    check(
        lambda x, w, b: linear_loss(x, w, target, "nce", linear_bias=b, sample_weight=sample_weight, **options),
        lambda z: fl.functional.nce_loss(
            z.reshape(-1, CLASSES), target.reshape(-1), sample_weight=sample_weight.reshape(-1), **options
        ).reshape(shape if reduction == "none" else ()),
        tensors=[x, w, b],
    )  # fmt: skip


def count_gemms(monkeypatch):
    """Counts the GEMMs of the gradients in input (mm; the logits' is addmm) and in weight (addmm_)."""
    found = {"mm": 0, "addmm_": 0}

    def counted(name, real):
        def function(*args, **kwargs):
            found[name] += 1
            return real(*args, **kwargs)

        return function

    monkeypatch.setattr(torch, "mm", counted("mm", torch.mm))
    monkeypatch.setattr(torch.Tensor, "addmm_", counted("addmm_", torch.Tensor.addmm_))
    return found


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_frozen_inputs_get_no_gradient_and_cost_no_gemm(frozen, reduction, monkeypatch):
    tensors, target, _ = problem()
    gemms = count_gemms(monkeypatch)
    for number in frozen:
        tensors[number].requires_grad_(False)
    loss = linear_loss(tensors[0], tensors[1], target, "gce", linear_bias=tensors[2], reduction=reduction)
    if len(frozen) == 3:
        assert not loss.requires_grad
        return
    loss.sum().backward()
    assert gemms == {"mm": 0 if 0 in frozen else 1, "addmm_": 0 if 1 in frozen else 1}
    twins = [t.detach().clone().requires_grad_() for t in tensors]
    fl.functional.gce_loss(F.linear(*twins), target, reduction=reduction).sum().backward()
    for number, (mine, theirs) in enumerate(zip(tensors, twins, strict=True)):
        assert (mine.grad is None) == (number in frozen)
        if mine.grad is not None:
            close(mine.grad, theirs.grad, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradients_add_up_in_float32(dtype):
    """2000 equal contributions of 2^-10 beside one of 1: halves of a unit in the last place would all be lost."""
    rows = 2048
    x = torch.ones(rows, 1, dtype=dtype)
    w = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64)
    sample_weight = torch.full((rows,), 2.0**-10)
    sample_weight[0] = 2.0
    linear_loss(
        x, w, target, "cross_entropy", sample_weight=sample_weight, chunk_bytes=ONE_ROW, reduction="sum"
    ).backward()
    exact = -0.5 * float(sample_weight.sum())
    assert w.grad.dtype == dtype and abs(float(w.grad[0]) / exact - 1) < 2.0**-8


def test_autocast_is_that_of_the_dense_layer():
    _, target, _ = problem()
    tensors = [t.detach().float().requires_grad_() for t in problem()[0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_loss(tensors[0], tensors[1], target, "gce", linear_bias=tensors[2], chunk_bytes=100)
        twins = [t.detach().clone().requires_grad_() for t in tensors]
        expected = fl.functional.gce_loss(F.linear(*twins), target)
    close(loss, expected, torch.bfloat16)
    loss.backward()
    expected.backward()
    for mine, theirs in zip(tensors, twins, strict=True):
        assert mine.grad.dtype == torch.float32
        close(mine.grad, theirs.grad, torch.bfloat16)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_twice_over_one_graph(reduction):
    tensors, target, _ = problem()
    loss = linear_loss(tensors[0], tensors[1], target, "gce", linear_bias=tensors[2], reduction=reduction).sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2.0 * loss, tensors)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, 2.0 * a)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_second_derivative_says_why_not(reduction):
    tensors, target, _ = problem()
    loss = linear_loss(tensors[0], tensors[1], target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(loss, tensors[0], create_graph=True)


def test_function_transforms_raise():
    (x, w, _), target, _ = problem()
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: linear_loss(x, w, target))(x.detach())
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: linear_loss(x, w, target), (x.detach(),), (x.detach(),))


@pytest.mark.parametrize("skip", [None, True, False])
@pytest.mark.parametrize("name", ["hem", "multi_margin", "gce"])
@pytest.mark.parametrize("ignored", [slice(None, None, 3), slice(4, 150)], ids=["few", "most"])  # most: left out, too
def test_rows_without_gradient_may_be_left_out(ignored, name, skip, device):
    (x, w, b), _, _ = problem(device=device, rows=200)
    with torch.no_grad():
        w.mul_(4.0)
        target = F.linear(x, w, b).argmax(1)  # most rows satisfy the margin
        target[[7, 160]], target[ignored] = 0, -100
    for reduction in reductions_of(name):
        check(
            lambda x, w, b: linear_loss(
                x, w, target, name, linear_bias=b, chunk_bytes=5000, skip_rows=skip, reduction=reduction
            ),
            lambda logits: fl.LOSSES[name].function(logits, target, reduction=reduction),
            device=device, tensors=[t.detach().clone().requires_grad_() for t in (x, w, b)],
        )  # fmt: skip


def test_satisfied_and_ignored_rows_reach_no_gemm(monkeypatch):
    rows = []
    real = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda t, a, b, **k: (rows.append(b.shape[0]), real(t, a, b, **k))[1])
    x = torch.eye(10, requires_grad=True)
    w = (torch.eye(10) * 5).requires_grad_()
    target = torch.arange(10)
    target[3] = 4  # the only row beyond its margin
    linear_loss(x, w, target, "hem").backward()
    assert rows == [1]
    rows.clear()
    linear_loss(x, w, torch.tensor([1] * 4 + [-100] * 6), "gce").backward()
    assert rows == [4]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", fl.LOSSES)
def test_gradients_may_take_the_place_of_the_logits(name, dtype):
    """On the CPU: to the last bit, in vertical and horizontal tiles, with and without what a bias or weights add."""
    for classes in (3, 33, 101, 5003):
        logits = (torch.randn(19, classes) * torch.linspace(0.1, 30, 19)[:, None]).to(dtype)
        target = torch.arange(19) % classes
        target[::7] = -100
        for options in ({}, {"weight": torch.linspace(0.5, 2.0, classes), "logit_bias": -2.5}):
            args = fl.LOSSES[name].arguments(logits, target, reduction="none", **options)
            values, gradient = _ops.row_loss_with_grad(*args)
            own = logits.clone()
            assert torch.equal(_ops.row_loss_with_grad_(own, *args._replace(logits=own)), values)
            assert torch.equal(own, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_without_numbers(reduction):
    layer = fl.LinearLoss(5, 7, "gce", reduction=reduction).to("meta")
    input = torch.empty(4, 5, device="meta", requires_grad=True)
    loss = layer(input, torch.empty(4, dtype=torch.long, device="meta"))
    assert loss.is_meta and loss.shape == (() if reduction == "mean" else (4,))
    loss.sum().backward()
    assert input.grad.shape == (4, 5) and layer.linear.weight.grad.shape == (7, 5)


def test_nothing_left_is_zero_and_nan_stays_in_its_row():
    (x, w, b), target, _ = problem()
    ignored = torch.full_like(target, -100)
    loss = linear_loss(x, w, ignored, linear_bias=b)
    loss.backward()
    assert loss == 0 and all(not t.grad.any() for t in (x, w, b))
    with torch.no_grad():
        x[5] = torch.nan
    values = linear_loss(x, w, target, "hem", linear_bias=b, reduction="none", chunk_bytes=300)
    assert values.isnan().nonzero().tolist() == [[5]]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", ["gce", "hem"])
def test_compiled_without_breaks(name, reduction):
    (x, w, b), target, _ = problem()

    def step(x, w, b):
        return linear_loss(x, w, target, name, linear_bias=b, reduction=reduction, chunk_bytes=700)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    check(compiled, lambda logits: fl.LOSSES[name].function(logits, target, reduction=reduction), tensors=[x, w, b])


def test_module_trains_and_is_saved_like_a_linear_layer():
    torch.manual_seed(0)
    x, target = torch.randn(64, FEATURES), torch.randint(0, CLASSES, (64,))
    criterion = fl.LinearLoss(FEATURES, CLASSES, "agce", a=1.0, weight=torch.ones(CLASSES), logit_bias=1.0)
    assert set(criterion.state_dict()) == {"linear.weight", "linear.bias", "loss.weight"}
    again = fl.LinearLoss(FEATURES, CLASSES, fl.AGCELoss(a=1.0, weight=torch.zeros(CLASSES)))
    again.load_state_dict(criterion.state_dict())
    dense = fl.AGCELoss(a=1.0, weight=torch.ones(CLASSES), logit_bias=1.0)
    torch.testing.assert_close(criterion(x, target), dense(criterion.logits(x), target))
    torch.testing.assert_close(criterion.eval()(x, target), dense.eval()(criterion.logits(x), target))
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
    first = criterion(x, target)
    for _ in range(20):
        optimizer.zero_grad()
        criterion(x, target).backward()
        optimizer.step()
    assert criterion(x, target) < first
    assert not fl.LinearLoss(2, 3, bias=False).linear._parameters["bias"]


def test_no_features():
    """The logits are the bias."""
    target, bias = torch.tensor([0, 2, 1]), torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    features, weight = torch.zeros(3, 0, requires_grad=True), torch.zeros(3, 0, requires_grad=True)
    loss = linear_loss(features, weight, target, "gce", linear_bias=bias)
    expected = fl.reference.gce_loss(bias.expand(3, 3), target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, bias, retain_graph=True)[0] for each in (loss, expected)))
    assert [g.shape for g in torch.autograd.grad(loss, (features, weight))] == [(3, 0), (3, 0)]


BAD = {
    "input must have shape": {"input": torch.zeros(3, 4)},
    "linear_weight must have shape": {"linear_weight": torch.zeros(4)},
    "linear_bias must have shape": {"linear_bias": torch.zeros(3)},
    "target must have shape": {"target": torch.zeros(4, dtype=torch.int64)},
    "loss must be one of": {"loss": "nope"},
    "ZErrorCrossEntropyLoss": {"loss": fl.functional.z_error_cross_entropy},
    "got CrossEntropyLoss": {"loss": torch.nn.CrossEntropyLoss()},
    "weight must be set on the Module": {"loss": fl.GCELoss(), "weight": torch.ones(CLASSES)},
    "q must be set on the Module": {"loss": fl.GCELoss(), "q": 0.3},
    "unexpected keyword argument 'a'": {"loss": "gce", "a": 0.3},
    "q must satisfy": {"loss": "gce", "q": -1.0},
    "reduction must be": {"reduction": "avg"},
    "sample_weight must have shape": {"sample_weight": torch.ones(2)},
    "chunk_bytes must be an integer": {"chunk_bytes": 0},
    "accumulate_dtype must be": {"accumulate_dtype": torch.int64},
    "skip_rows must be": {"skip_rows": "yes"},
    "beside torch.float32": {"linear_weight": torch.zeros(CLASSES, FEATURES, dtype=torch.float64)},
    "sample_weight that requires": {"sample_weight": torch.ones(3, requires_grad=True)},
    "active_mean": {"loss": fl.GCELoss(), "reduction": "active_mean"},
    "must be a Tensor": {"input": [1.0]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    given = {"input": torch.zeros(3, FEATURES), "linear_weight": torch.zeros(CLASSES, FEATURES, requires_grad=True)}
    given |= {"target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        linear_loss(**{**given, **BAD[message]})
    if "loss" in BAD[message] and "reduction" not in BAD[message] and len(BAD[message]) == 1:
        with pytest.raises((ValueError, TypeError), match=message):
            fl.LinearLoss(FEATURES, CLASSES, **BAD[message])


def test_a_target_out_of_range_is_an_index_error():
    (x, w, _), target, _ = problem()
    target[4] = CLASSES
    with pytest.raises(IndexError, match=str(CLASSES)):
        linear_loss(x, w, target)
