"""torch's own samples for its cross entropy, run on ours.

Deviations, each asserted below:

* Nothing left to average gives 0 with zero gradient where torch gives NaN.
* A ``label_smoothing`` out of range is a ValueError at construction; torch raises a RuntimeError at the call.
* Half precision logits give a float32 loss.
* Module arguments other than ``weight`` are keywords; ``size_average`` and ``reduce``, deprecated in torch, do not
  exist.
"""

from __future__ import annotations

import pytest
import torch

import fused_losses as fl

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def of_torch():
    """The Module and the operator with their samples, whose import takes seconds of every process that has it above."""
    pytest.importorskip("expecttest", reason="torch's samples need it")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    module = next(m for m in module_db if m.name == "nn.CrossEntropyLoss")
    return module, next(op for op in op_db if op.name == "nn.functional.cross_entropy")


def results_and_gradients(function, inputs, **options):
    """The loss and the gradients of every floating point input under an upstream gradient that is not 1."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    loss = function(*leaves, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).to(loss.dtype).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], upstream)


def everything_ignored(target, ignore_index):
    return not target.is_floating_point() and bool((target == ignore_index).all())


def check(ours, torchs, inputs, ignore_index, reduction, options):
    actual = results_and_gradients(ours, inputs, **options)
    expected = results_and_gradients(torchs, inputs, **options)
    if reduction == "mean" and everything_ignored(inputs[1], ignore_index):
        assert expected[0].isnan()
        expected = [torch.zeros_like(t) for t in expected]
    # The gradient of the target is there only if it holds probabilities.
    assert len(actual) == len(expected) == 2 + inputs[1].is_floating_point()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_samples(of_torch, dtype, device):
    torch.manual_seed(0)
    module, _ = of_torch
    samples = module.module_inputs_func(module, device, dtype, requires_grad=True, training=True)
    assert len(samples) > 50
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        ours, torchs = fl.CrossEntropyLoss(*args, **kwargs), torch.nn.CrossEntropyLoss(*args, **kwargs)
        assert not sample.forward_input.kwargs
        check(ours, torchs, sample.forward_input.args, torchs.ignore_index, torchs.reduction, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_samples(of_torch, dtype, device):
    torch.manual_seed(0)
    _, operator = of_torch
    samples = list(operator.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) > 15
    for sample in samples:
        inputs = (sample.input, *sample.args)
        ignore_index, reduction = sample.kwargs.get("ignore_index", -100), sample.kwargs.get("reduction", "mean")
        check(fl.functional.cross_entropy, operator.op, inputs, ignore_index, reduction, sample.kwargs)


def test_the_operator_has_no_error_samples(of_torch):
    # If this fails, torch has added such samples: run them here like those of the Module.
    _, operator = of_torch
    assert operator.error_inputs_func is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_error_samples(of_torch, dtype, device):
    module, _ = of_torch
    if module.module_error_inputs_func is None:
        pytest.skip("this torch has no error samples")
    samples = module.module_error_inputs_func(module, device, dtype, requires_grad=True, training=True)
    assert len(samples) >= 7
    deviations = []
    for error in samples:
        assert error.error_on.name == "FORWARD_ERROR"
        sample = error.module_error_input
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        if "label_smoothing" in kwargs:
            deviations.append(kwargs)
            with pytest.raises(ValueError, match=error.error_regex):
                fl.CrossEntropyLoss(*args, **kwargs)
            continue
        with pytest.raises(error.error_type, match=error.error_regex):
            fl.CrossEntropyLoss(*args, **kwargs)(*sample.forward_input.args, **sample.forward_input.kwargs)
    assert deviations == [{"label_smoothing": 1.5}]


def test_nothing_left_to_average_is_zero(device):
    target = torch.full((2,), -100, device=device)
    for function, expected in [(fl.functional.cross_entropy, 0.0), (torch.nn.functional.cross_entropy, torch.nan)]:
        logits = torch.randn(2, 3, device=device, requires_grad=True)
        loss = function(logits, target)
        loss.backward()
        assert torch.equal(torch.isnan(loss), torch.tensor(expected != 0.0, device=device))
        assert expected != 0.0 or loss == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_loss_is_float32(dtype, device):
    logits, target = torch.randn(6, 5, device=device).to(dtype), torch.tensor([0, 1, 2, 3, 4, 0], device=device)
    loss = fl.functional.cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), target))


def test_only_weight_is_positional():
    assert torch.equal(fl.CrossEntropyLoss(torch.ones(3)).weight, torch.ones(3))
    torch.nn.CrossEntropyLoss(None, None, -100)
    with pytest.raises(TypeError, match="positional argument"):
        fl.CrossEntropyLoss(None, None, -100)
    with pytest.raises(TypeError, match="unexpected keyword argument 'size_average'"):
        fl.CrossEntropyLoss(size_average=True)
