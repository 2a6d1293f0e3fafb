"""Modules over the whole registry: copies, pickles, repr, autocast; offsets beyond 2^31."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # Modules call the functions' kernels

NAMES = list(fl.LOSSES)


def make_module(name):
    return fl.LOSSES[name].module(weight=torch.tensor([1.0, 2.0, 0.5]), logit_bias=torch.tensor(0.7), ignore_index=-1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_duplicates_compute_the_same_and_share_nothing(name, duplicate):
    logits, target = torch.randn(9, 3), torch.tensor([0, 1, 2, -1, 0, 1, 2, 0, 1])
    module = make_module(name)
    expected = module(logits, target)
    other = duplicate(module)
    assert torch.equal(other(logits, target), expected) and repr(other) == repr(module)
    module.weight.zero_()
    assert torch.equal(other(logits, target), expected)
    fresh = make_module(name)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.weight, torch.zeros(3)) and fresh.logit_bias == module.logit_bias


def loss_and_gradient(module, logits, target):
    leaf = logits.clone().requires_grad_()
    loss = module(leaf, target)
    upstream = torch.linspace(-1.0, 2.0, loss.numel()).reshape(loss.shape)
    return loss.detach(), *(torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0] for _ in range(2))


@pytest.mark.parametrize("name", NAMES)
def test_small_calls_compute_what_others_do(name, monkeypatch):
    logits, target = torch.randn(9, 3), torch.tensor([0, 1, 2, -1, 0, 1, 2, 0, 1])
    modules = [fl.LOSSES[name].module(ignore_index=-1, reduction=r) for r in fl.LOSSES[name].reductions]
    assert all(m(logits, target) is not None and m._constants for m in modules)
    small = [loss_and_gradient(m, logits, target) for m in modules]
    copies = [loss_and_gradient(pickle.loads(pickle.dumps(m)), logits, target) for m in modules]
    monkeypatch.setattr("fused_losses._autograd._MOST_LOGITS", -1)
    large = [loss_and_gradient(m, logits, target) for m in modules]
    torch.testing.assert_close([small, copies], [large, large], rtol=1e-6, atol=1e-7)


NEW_VALUES = {
    "q": 0.3,
    "reduction": "sum",
    "ignore_index": 2,
    "logit_bias": 0.5,
    "weight": torch.tensor([1.0, 2.0, 0.5]),
}


@pytest.mark.parametrize("option", NEW_VALUES)
def test_a_new_value_counts_from_the_next_call_on(option):
    logits, target = torch.randn(9, 3), torch.tensor([0, 1, 2, 1, 0, 1, 2, 0, 1])
    module, value = fl.GCELoss(), NEW_VALUES[option]
    before = module(logits, target)
    setattr(module, option, value)
    assert module(logits, target) != before
    assert torch.equal(module(logits, target), fl.functional.gce_loss(logits, target, **{option: value}))


def test_a_weight_may_become_a_parameter():
    logits, target, weight = torch.randn(9, 3), torch.tensor([0, 1, 2, 1, 0, 1, 2, 0, 1]), torch.rand(3)
    module = fl.GCELoss()
    module(logits, target)
    module.weight = torch.nn.Parameter(weight)
    torch.testing.assert_close(module(logits, target).detach(), fl.GCELoss(weight=weight)(logits, target))


@pytest.mark.parametrize(("module", "name"), [(fl.GCELoss(), "logit_bias"), (fl.HEMLoss(), "margin")])
def test_a_number_that_becomes_a_buffer_counts_from_the_next_call_on(module, name):
    logits, target = torch.randn(9, 3), torch.tensor([0, 1, 2, 1, 0, 1, 2, 0, 1])
    module(logits, target)
    delattr(module, name)  # as schedules do
    module.register_buffer(name, torch.tensor(2.0))
    assert torch.equal(module(logits, target), type(module)(**{name: 2.0})(logits, target))


@pytest.mark.parametrize("name", NAMES)
def test_repr_names_the_parameters(name):
    entry = fl.LOSSES[name]
    text = repr(entry.module())
    assert text.startswith(f"{entry.module.__name__}(")
    assert all(f"{parameter}=" in text for parameter in entry.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_takes_half_logits_as_they_are(name, device):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(6, 5, device=device), torch.randn(8, 6, device=device)
    target = torch.arange(8, device=device) % 5
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = layer(x)
        logits.retain_grad()
        loss = fl.LOSSES[name].module()(logits, target)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    outside = logits.detach().requires_grad_()
    fl.LOSSES[name].module()(outside, target).backward()
    assert logits.grad.dtype == torch.bfloat16 and torch.equal(logits.grad, outside.grad)
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", NAMES)
def test_rows_beyond_32_bit_offsets(name, classes):
    # Four gigabytes of address space, of which only the pages of two rows are ever touched.
    apart = 2**31 + 64
    logits = torch.empty(apart + classes, dtype=torch.bfloat16).as_strided((2, classes), (apart, 1))
    rows = torch.randn(2, classes).bfloat16()
    logits.copy_(rows)
    target = torch.tensor([1, 3])
    far, near = logits.requires_grad_(), rows.requires_grad_()
    loss, expected = (fl.LOSSES[name].function(x, target, reduction="sum") for x in (far, near))
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(value, x)[0] for value, x in ((loss, far), (expected, near))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "hem", "nfl"])
def test_every_backward_of_a_kept_graph_has_a_gradient_of_its_own(name, dtype, device):
    torch.manual_seed(0)
    logits = torch.randn(50, 7, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, 7, (50,), device=device)
    loss = fl.LOSSES[name].function(logits, target, reduction="mean")
    plain = fl.LOSSES[name].reference(logits, target, reduction="mean")
    grads = []
    for upstream in (0.5, 1.0, 3.0):
        above = torch.tensor(upstream, device=device)
        grads.append(torch.autograd.grad(loss, logits, above, retain_graph=True)[0])
    for upstream, grad in zip((0.5, 1.0, 3.0), grads, strict=True):
        (expected,) = torch.autograd.grad(plain * upstream, logits, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "make", [fl.MAELoss, fl.HEMLoss, fl.ZMSELoss, fl.ZErrorCrossEntropyLoss], ids=lambda c: c.__name__
)
def test_scripting_is_refused_in_words(make):
    with pytest.raises(TypeError, match=rf"{make.__name__} cannot be scripted .*: use torch.compile or torch.export"):
        torch.jit.script(torch.nn.Sequential(make()))


def test_cross_entropy_takes_torchs_names():
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    criterion = fl.CrossEntropyLoss()
    torch.testing.assert_close(criterion(input=logits, target=target), criterion(logits, target))


@pytest.mark.parametrize("name", ["gjs_loss", "forward_correction_loss", "backward_correction_loss"])
def test_references_of_losses_in_no_registry(name, device):
    """The plain formula, with the function's signature, values, derivatives and errors."""
    fused, plain = getattr(fl.functional, name), getattr(fl.reference, name)
    assert inspect.signature(plain) == inspect.signature(fused) and plain.__name__ == name and plain.__doc__
    assert pickle.loads(pickle.dumps(plain)) is plain
    generator = torch.Generator().manual_seed(0)
    shape = (2, 6, 4) if name == "gjs_loss" else (6, 4)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    target = torch.tensor([0, 1, -100, 3, 2, 1], device=device)
    matrix = 0.7 * torch.eye(4, dtype=torch.float64, device=device) + 0.075
    own = (0.5, 0.3, 0.2) if name == "gjs_loss" else matrix
    weight, samples = (torch.linspace(0.5, 2.0, n, dtype=torch.float64, device=device) for n in (4, 6))
    for options in ({}, {"weight": weight, "sample_weight": samples}):
        for reduction in ("mean", "sum", "none"):
            losses = [function(logits, target, own, reduction=reduction, **options) for function in (fused, plain)]
            torch.testing.assert_close(*losses)
            torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in losses))
    for function in (fused, plain):
        with pytest.raises(ValueError, match="reduction must be"):
            function(logits, target, own, reduction="average")
        with pytest.raises(TypeError, match="alpha"):
            function(logits, target, own, alpha=1.0)
        if device == "cpu":
            with pytest.raises(IndexError, match=r"Target 4 is out of bounds \(row 0\)"):
                function(logits, target + 4, own)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_do_not_follow_the_default_dtype(name, default):
    entry = fl.LOSSES[name]
    logits, target = torch.randn(9, 3), torch.tensor([0, 1, 2, -100, 0, 1, 2, 0, 1])
    weight = torch.ones(9).requires_grad_()  # a gradient that plain formulas give
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        leaf = logits.clone().requires_grad_()
        losses = [entry.function(leaf, target), entry.function(leaf, target, sample_weight=weight)]
        losses += [entry.reference(x, target) for x in (leaf, logits.bfloat16())]
        losses += [torch.vmap(lambda x: entry.function(x, target))(logits[None])]
        assert [loss.dtype for loss in losses] == [torch.float32] * 5
        assert entry.function(logits.double(), target).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
