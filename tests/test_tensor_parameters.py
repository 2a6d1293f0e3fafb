"""Hyper-parameters of row losses that may be 0-dim tensors: values are read at every call, wherever it goes."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import loss_and_grad
from test_values import make_problem

import fused_losses as fl
from fused_losses import functional, reference

NAMES = {name: entry.tensor_parameter for name, entry in fl.LOSSES.items() if entry.tensor_parameter}
VALUES = (0.0, 0.3, 2.0)


def test_which_they_are():
    assert NAMES == {"cores": "beta", "hem": "margin", "multi_margin": "margin"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (33, 10), (9, 600), (3, 6, 4, 5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_is_as_good_as_its_number(name, shape, dtype, device):
    logits, target, weight, sample_weight = make_problem(shape, dtype, device)
    entry, parameter = fl.LOSSES[name], NAMES[name]
    for value in VALUES:
        for reduction in entry.reductions:
            options = {"weight": weight, "sample_weight": sample_weight, "logit_bias": 0.5, "reduction": reduction}
            expected = loss_and_grad(entry.function, logits, target, **options, **{parameter: value})
            for held in (torch.float64, torch.float32):
                tensor = torch.tensor(value, dtype=held, device=device)
                actual = loss_and_grad(entry.function, logits, target, **options, **{parameter: tensor})
                if device == "cpu" and held == torch.float64:
                    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
                torch.testing.assert_close(actual, expected)
            exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            by_formula = loss_and_grad(entry.reference, logits.double(), target, **exact, **{parameter: tensor})
            torch.testing.assert_close(by_formula[0].to(expected[0].dtype), expected[0])


@pytest.mark.any_cpu
@pytest.mark.parametrize("name", NAMES)
def test_a_new_value_takes_effect(name):
    parameter, (logits, target, _, _) = NAMES[name], make_problem((20, 6), torch.float32, "cpu")
    entry = fl.LOSSES[name]
    module = entry.module(**{parameter: torch.tensor(0.1)})
    assert set(module.state_dict()) == {parameter} and f"{parameter}=0.1" in repr(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for value in (0.1, 0.0, 1.5):
        getattr(module, parameter).fill_(value)
        expected = loss_and_grad(entry.function, logits, target, reduction=module.reduction, **{parameter: value})
        for made in (module, compiled):
            torch.testing.assert_close(loss_and_grad(made, logits, target), expected)
    loaded = entry.module(**{parameter: torch.tensor(0.1)})
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(logits, target), module(logits, target))


LEARNT = {
    **{f"{name} {own}": (LOSS, own) for name, own in NAMES.items() for LOSS in [fl.LOSSES[name].module]},
    "norm t": (lambda t: fl.LogitNorm("nce", t), "t"),
    "elr lam": (lambda lam: fl.ELRLoss(8, 5, lam=lam), "lam"),
    "logit_bias": (lambda logit_bias: fl.GCELoss(logit_bias=logit_bias), "logit_bias"),
    "z logit_bias": (lambda logit_bias: fl.ZErrorCrossEntropyLoss(logit_bias=logit_bias), "logit_bias"),
    "weight": (lambda weight: fl.GCELoss(weight=weight, reduction="sum"), "weight"),
    "z weight": (lambda weight: fl.ZErrorCrossEntropyLoss(weight=weight, reduction="sum"), "weight"),
    "gjs weight": (lambda weight: fl.GJSLoss((0.5, 0.5), weight=weight, reduction="sum"), "weight"),
    "corrected weight": (
        lambda weight: fl.ForwardCorrectionLoss(torch.eye(5), weight=weight, reduction="sum"),
        "weight",
    ),
}


@pytest.mark.any_cpu
@pytest.mark.parametrize("name", LEARNT)
def test_what_is_given_as_a_parameter_is_learnt(name):
    make, own = LEARNT[name]
    given = torch.nn.Parameter(torch.full((5,) if own == "weight" else (), 0.5))
    module = make(given).double()  # a buffer would be another tensor from here on
    assert [learnt for learnt, _ in module.named_parameters()] == [own] and own in module.state_dict()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    logits, target = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 5
    views = logits.unsqueeze(0) if "gjs" in name else logits
    index = (torch.arange(8),) if "elr" in name else ()
    module(views, target, *index).backward()
    optimizer.step()
    assert not torch.equal(getattr(module, own), torch.full_like(given, 0.5)) and given is getattr(module, own)


@pytest.mark.any_cpu
@pytest.mark.parametrize("made", [functional, reference], ids=["functional", "reference"])
def test_beta_can_be_learnt(made):
    logits, target, _, _ = make_problem((6, 4), torch.float64, "cpu")
    for value in VALUES:
        beta = torch.tensor(value, dtype=torch.float64, requires_grad=True)

        def function(x, b):
            return made.cores_loss(x, target, beta=b, reduction="none")

        assert torch.autograd.gradcheck(function, (logits.clone().requires_grad_(), beta))
        assert torch.autograd.gradgradcheck(function, (logits.clone().requires_grad_(), beta))


@pytest.mark.parametrize("made", [functional, reference], ids=["functional", "reference"])
def test_a_beta_of_zero_hides_masked_classes(made, device):
    logits = torch.tensor([[0.0, 1.0, -math.inf]], device=device)
    target, beta = torch.tensor([0], device=device), torch.tensor(0.0, device=device)
    loss, grad = loss_and_grad(made.cores_loss, logits, target, beta=beta)
    assert loss.item() == pytest.approx(math.log1p(math.e)) and grad.isfinite().all()
    assert loss_and_grad(made.cores_loss, logits, target, beta=beta + 1)[0] == -math.inf


@pytest.mark.any_cpu
def test_a_tensor_goes_everywhere():
    logits, target, _, _ = make_problem((12, 5), torch.float32, "cpu")
    half, number = torch.tensor(0.5), 0.5
    soft = torch.softmax(logits.flip(0), 1)
    torch.testing.assert_close(
        functional.cores_loss(logits, soft, beta=half), functional.cores_loss(logits, soft, beta=number)
    )
    layer = torch.randn(7, 5)
    for of in (fl.CORESLoss(half), fl.CORESLoss(number)):
        wrapped = fl.SmallLoss(of, keep=0.5)(logits, target), fl.LogitClip(of, 1.0)(logits, target)
        linear = functional.linear_loss(logits, layer, target.clamp(min=0), of)
        mixed = functional.mixed(of, logits, target, target.flip(0), 0.3)
        judged = functional.z_error_cross_entropy(logits, target, base=of, statistic="loss")
        if of.beta is half:
            first = (*wrapped, linear, mixed, judged)
    torch.testing.assert_close((*wrapped, linear, mixed, judged), first)


@pytest.mark.any_cpu
def test_bad_tensors():
    problem = torch.zeros(2, 3), torch.tensor([0, 1])
    for wrong in (torch.ones(3), torch.ones(1), torch.tensor(1)):
        message = r"^beta must be a number or a floating point tensor, 0-dim, got a tensor of shape .* and dtype "
        for made in (fl.CORESLoss, lambda beta: functional.cores_loss(*problem, beta=beta)):
            with pytest.raises(ValueError, match=message):
                made(beta=wrong)
    for entry in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"^every entry of beta must satisfy 0 <= value < inf, got "):
            fl.CORESLoss(beta=torch.tensor(entry))
    arguments = (*problem, None, None, None, torch.tensor(1.0))
    with pytest.raises(ValueError, match="gce: has no parameter that may be a tensor"):
        torch.ops.fused_losses.row_loss(*arguments, "gce", [0.7], 0.0, -100, "mean")
    with pytest.raises(ValueError, match=r"cores: beta must be a number or 0-dim, got shape \[3\]"):
        torch.ops.fused_losses.row_loss(*arguments[:5], torch.ones(3), "cores", [1.0], 0.0, -100, "mean")


THRESHOLDS = {
    "cross entropy": (fl.ZErrorCrossEntropyLoss, functional.z_error_cross_entropy, torch.tensor([0, 1, 2, 0])),
    "binary": (fl.ZErrorBCEWithLogitsLoss, functional.z_error_bce_with_logits, torch.ones(4, 3)),
    "numbers": (fl.ZMSELoss, functional.z_mse_loss, torch.ones(4, 3)),
}


@pytest.mark.any_cpu
@pytest.mark.parametrize("kind", THRESHOLDS)
def test_a_threshold_that_would_get_no_gradient_is_refused(kind):
    module, function, target = THRESHOLDS[kind]
    wanted, message = torch.nn.Parameter(torch.tensor(2.0)), "^threshold is a constant, got a tensor that requires"
    assigned = module()
    with pytest.raises(RuntimeError, match=message):
        module(wanted)
    with pytest.raises(RuntimeError, match=message):
        function(torch.randn(4, 3), target, threshold=wanted)
    del assigned.threshold
    assigned.threshold = wanted
    with pytest.raises(RuntimeError, match=message):
        assigned(torch.randn(4, 3), target)


@pytest.mark.parametrize("name", fl.LOSSES)
def test_a_learnt_bias_may_start_at_zero(name):
    """It is added to the label's logit, and has its derivative there."""
    target = torch.arange(60) % 4  # probable enough for losses that give up rows
    logits = (torch.randn(60, 4) + 2.0 * torch.nn.functional.one_hot(target, 4)).double().requires_grad_()
    bias = torch.zeros((), requires_grad=True)
    loss = fl.LOSSES[name].function(logits, target, logit_bias=bias)
    in_bias, in_logits = torch.autograd.grad(loss, (bias, logits))
    torch.testing.assert_close(in_bias.double(), in_logits.gather(1, target[:, None]).sum(), rtol=1e-5, atol=1e-7)
    assert in_bias != 0


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_may_take_the_place_of_the_number(name):
    logits, target, parameter = torch.randn(6, 4), torch.arange(6) % 4, NAMES[name]
    module, right = (fl.LOSSES[name].module(**{parameter: value}) for value in (0.3, 0.6))
    module(logits, target)
    delattr(module, parameter)
    module.register_buffer(parameter, torch.tensor(0.6))
    torch.testing.assert_close(module(logits, target), right(logits, target))
