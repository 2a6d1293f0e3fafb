"""What a drop-in takes, and what it says about the rest: NumPy numbers, layouts, shapes passed by mistake."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import fused_losses as fl
from fused_losses import functional

pytestmark = pytest.mark.any_cpu  # arguments

NAMES = list(fl.LOSSES)
LOGITS, TARGET = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
NUMBERS = [
    (name, parameter)
    for name, entry in fl.LOSSES.items()
    for parameter, default in entry.parameters.items()
    if isinstance(default, (int, float)) and not isinstance(default, bool)
]


@pytest.mark.parametrize("name, parameter", NUMBERS)
def test_numpy_numbers_are_numbers(name, parameter):
    entry = fl.LOSSES[name]
    default = entry.parameters[parameter]
    kinds = [np.int64, np.int32, np.array] if isinstance(default, int) else [np.float32, np.float64, np.array]
    for kind in kinds:
        value = kind(default)
        expected = entry.function(LOGITS, TARGET, **{parameter: value.item()})
        module = entry.module(**{parameter: value})
        assert torch.equal(entry.function(LOGITS, TARGET, **{parameter: value}), expected)
        assert torch.equal(
            entry.reference(LOGITS, TARGET, **{parameter: value}),
            entry.reference(LOGITS, TARGET, **{parameter: value.item()}),
        )
        assert torch.equal(module(LOGITS, TARGET), expected)
        assert "np." not in repr(module) and "array" not in repr(module)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_options(name):
    entry = fl.LOSSES[name]
    for options in ({"ignore_index": np.int64(2)}, {"logit_bias": np.float32(0.5)}, {"logit_bias": np.array(0.5)}):
        expected = entry.function(LOGITS, TARGET, **{k: v.item() for k, v in options.items()})
        assert torch.equal(entry.function(LOGITS, TARGET, **options), expected)
        assert torch.equal(entry.module(**options)(LOGITS, TARGET), expected)


ASSIGNED = {
    "super lam": (lambda: fl.SuperLoss("gce"), "lam", 0.5),
    "small keep": (lambda: fl.SmallLoss("gce", 0.7), "keep", 0.5),
    "clipped c": (lambda: fl.ClippedLoss("gce", 0.7), "c", 0.5),
    "antidote delta": (lambda: fl.Antidote("gce", 0.7), "delta", 0.5),
    "norm t": (lambda: fl.LogitNorm("gce"), "t", 0.5),
    "norm t around a loss of its own": (lambda: fl.LogitNorm("nfl"), "t", 0.5),
    "gce q": (fl.GCELoss, "q", 0.5),
    "gce ignore_index": (fl.GCELoss, "ignore_index", 2),
    "gce logit_bias": (fl.GCELoss, "logit_bias", 0.5),
    "z threshold": (lambda: fl.ZErrorCrossEntropyLoss(running=True, num_classes=3), "threshold", 0.5),
    "z momentum": (lambda: fl.ZErrorCrossEntropyLoss(running=True, num_classes=3), "momentum", 0.5),
    "forward ignore_index": (lambda: fl.ForwardCorrectionLoss(torch.eye(3)), "ignore_index", 2),
}


@pytest.mark.parametrize("name", ASSIGNED)
def test_numpy_numbers_can_be_assigned(name):
    make, attribute, value = ASSIGNED[name]
    for kind in [np.int64, np.int32, np.array] if isinstance(value, int) else [np.float64, np.float32, np.array]:
        found, expected = make(), make()
        setattr(expected, attribute, value)
        setattr(found, attribute, kind(value))
        assert repr(found) == repr(expected)
        assert torch.equal(found(LOGITS, TARGET), expected(LOGITS, TARGET))
        torch._dynamo.reset()
        compiled = torch.compile(found, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(LOGITS, TARGET), expected(LOGITS, TARGET))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.array])
def test_numpy_integers_made_in_compiled_code(kind):
    for call in (
        lambda n: functional.gce_loss(LOGITS, TARGET, ignore_index=n),
        lambda n: functional.taylor_ce_loss(LOGITS, TARGET, order=n),
        lambda n: functional.z_error_cross_entropy(LOGITS, TARGET, min_count=n),
        lambda n: fl.row_statistics(LOGITS, TARGET, n).margin.nan_to_num(),
        lambda n: functional.linear_loss(LOGITS, torch.eye(3), TARGET, ignore_index=n),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(lambda call=call: call(kind(2)), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(), call(2))


def test_numpy_thresholds():
    expected = functional.z_error_cross_entropy(LOGITS, TARGET, threshold=1.0)
    for threshold in (np.float32(1.0), np.array(1.0), 1, np.int32(1)):
        assert torch.equal(functional.z_error_cross_entropy(LOGITS, TARGET, threshold=threshold), expected)
        assert torch.equal(fl.ZErrorCrossEntropyLoss(threshold)(LOGITS, TARGET), expected)


@pytest.mark.parametrize("name", NAMES)
def test_none_is_named(name):
    function = fl.LOSSES[name].function
    for bias in (0.0, "auto"):
        with pytest.raises(TypeError, match=f"{name}: logits must be a Tensor, got None"):
            function(None, TARGET, logit_bias=bias)
    with pytest.raises(TypeError, match=f"{name}: target must be a Tensor, got None"):
        function(LOGITS, None)


@pytest.mark.parametrize("argument", ["logits", "target", "weight", "sample_weight"])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_tensors_are_named(name, argument):
    values = {"logits": LOGITS, "target": TARGET, "weight": torch.ones(3), "sample_weight": torch.ones(4)}
    values[argument] = values[argument].to_sparse()
    logits, target, *_ = values.values()
    options = {key: value for key, value in values.items() if key == argument} if "weight" in argument else {}
    with pytest.raises(
        RuntimeError, match=f"{name}: {argument} must be dense, got a tensor of layout torch.sparse_coo"
    ):
        fl.LOSSES[name].function(logits, target, **options)


@pytest.mark.parametrize("function", [functional.z_mse_loss, functional.z_error_bce_with_logits])
def test_z_error_names_what_is_no_dense_tensor(function):
    x = torch.rand(4, 3)
    first = next(iter(inspect.signature(function).parameters))
    with pytest.raises(TypeError, match=f"^{first} must be a Tensor, got NoneType"):
        function(None, x)
    with pytest.raises(RuntimeError, match=f"^{first} must be float64, float32, float16 or bfloat16, got torch.int64"):
        function(x.long(), x)
    with pytest.raises(TypeError, match="target must be a Tensor, got NoneType"):
        function(x, None)
    with pytest.raises(RuntimeError, match="target must be dense, got a tensor of layout"):
        function(x, x.to_sparse())
    with pytest.raises(TypeError, match="logits must be a Tensor, got NoneType"):
        functional.z_error_cross_entropy(None, TARGET)
    with pytest.raises(TypeError, match="target must be a Tensor, got NoneType"):
        functional.z_error_cross_entropy(LOGITS, None)


@pytest.mark.parametrize("name", NAMES)
def test_labels_in_the_wrong_shape_say_what_to_pass(name):
    function = fl.LOSSES[name].function
    one_hot = torch.nn.functional.one_hot(TARGET, 3)
    pixels, channel = torch.randn(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.int64)
    weight = torch.ones(3, requires_grad=True)  # through the plain formula
    for options in ({}, {"weight": weight}):
        with pytest.raises(RuntimeError, match=r"one-hot labels are passed as class indices, target.argmax\(1\)"):
            function(LOGITS, one_hot, **options)
        with pytest.raises(RuntimeError, match=r"Expected target size \[2, 4, 4\] .*; pass target.squeeze\(1\)"):
            function(pixels, channel, **options)


def test_a_tensor_where_a_number_is_wanted_names_the_weights():
    with pytest.raises(TypeError, match="q must be a number, got Tensor; class weights are given as weight="):
        fl.GCELoss(torch.ones(10))


@pytest.mark.parametrize("name", NAMES)
def test_a_single_row_may_have_its_target_in_a_list(name):
    """As in torch: logits (C,) with a target (1,) are a row without a batch, and the loss has no dimension either."""
    entry, one = fl.LOSSES[name], torch.tensor([0.5])
    for made in (entry.function, entry.reference, entry.module()):
        results = []
        for target, weight in ((TARGET[1], one[0]), (TARGET[1:2], one), (TARGET[1:2].to(torch.uint8), one[0])):
            logits = LOGITS[1].clone().requires_grad_()
            loss = made(logits, target, sample_weight=weight)
            results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
        for value, gradient in results[1:]:
            assert value.shape == () and torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])
    assert entry.function(LOGITS[1], TARGET[1:2], reduction="none").shape == ()
    with pytest.raises(RuntimeError, match=r"Expected target size \[\] for logits of shape \[3\], got \[2\]"):
        entry.function(LOGITS[1], TARGET[:2])


def test_what_had_no_memory_can_be_reset() -> None:
    """``to_empty`` leaves whatever was in the memory; ``reset_parameters`` of every Module makes it new."""
    logits, target = torch.randn(6, 3), torch.arange(6) % 3
    for make in (
        lambda: fl.TransitionMatrix(3, init=1.0),
        lambda: fl.ZErrorCrossEntropyLoss(running=True, num_classes=3),
        lambda: fl.SuperLoss("gce", running=True),
        lambda: fl.ELRLoss(6, 3),
    ):
        module, new = make(), make()
        if not isinstance(module, fl.TransitionMatrix):
            module(logits, target, *([torch.arange(6)] if isinstance(module, fl.ELRLoss) else []))
        module = module.to("meta").to_empty(device="cpu")
        for tensor in module.state_dict().values():
            tensor.data.fill_(7.0)
        module.reset_parameters()
        assert all(map(torch.equal, module.state_dict().values(), new.state_dict().values()))
    fl.ZMSELoss().reset_parameters()  # nothing to reset
