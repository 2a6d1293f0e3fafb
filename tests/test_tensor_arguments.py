"""Tensors as arguments: which are refused, by name; the plain formulas refuse what the kernels refuse."""

from __future__ import annotations

import math

import pytest
import torch

import fused_losses as fl
from fused_losses import functional

pytestmark = pytest.mark.any_cpu  # errors

NAMES = list(fl.LOSSES)
Z = torch.linspace(-1.0, 1.0, 20).reshape(4, 5)
Y = torch.tensor([0, 1, 2, 3])


def meta(value=1.0):
    return torch.tensor(value, device="meta")


@pytest.mark.parametrize("argument", ["weight", "sample_weight"])
@pytest.mark.parametrize("value", ["x", 2.0, True, 0])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_tensors_in_small_calls_too(name, value, argument):
    with pytest.raises((RuntimeError, TypeError), match=argument):
        fl.LOSSES[name].function(Z, Y, **{argument: value})


ON_META = {
    **{f"{name} bias": lambda n=name: fl.LOSSES[n].function(Z, Y, logit_bias=meta()) for name in NAMES},
    "module": lambda: fl.GCELoss(logit_bias=torch.tensor(1.0)).to("meta")(Z, Y),
    "margin": lambda: functional.hem_loss(Z, Y, margin=meta()),
    "beta": lambda: functional.cores_loss(Z, Y, beta=meta()),
    "mixed": lambda: functional.mixed("gce", Z, Y, Y, 0.3, logit_bias=meta()),
    "linear": lambda: functional.linear_loss(Z, torch.ones(7, 5), Y, "gce", logit_bias=meta()),
    "Z-Error bias": lambda: functional.z_error_cross_entropy(Z, Y, logit_bias=meta()),
    "Z-Error threshold": lambda: functional.z_error_cross_entropy(Z, Y, threshold=meta()),
    "Z-Error MSE": lambda: functional.z_mse_loss(Z, Z, threshold=meta()),
}


@pytest.mark.parametrize("call", ON_META.values(), ids=ON_META)
def test_a_number_without_memory_is_no_number(call):
    with pytest.raises(RuntimeError, match=r"(bias|margin|beta|threshold)\w* must be .*on the device of"):
        call()


WRONG = {
    "target (N, 1)": ({"target": Y[:, None]}, "target"),
    "one-hot": ({"target": torch.eye(5)[:4].long()}, "target"),
    "boolean target": ({"target": Y > 1}, "target"),
    "list as target": ({"target": [0, 1, 2, 3]}, "target"),
    "integer logits": ({"logits": Z.long()}, "logits"),
    "weight of 4": ({"weight": torch.ones(4)}, "weight"),
    "list as weight": ({"weight": [1.0] * 5}, "weight"),
    "integer weight": ({"weight": torch.ones(5).long()}, "weight"),
    "sample_weight (N, 1)": ({"sample_weight": torch.ones(4, 1)}, "sample_weight"),
    "complex sample_weight": ({"sample_weight": torch.ones(4) + 0j}, "sample_weight"),
}


@pytest.mark.parametrize(("given", "named"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_plain_formulas_broadcast_nothing(name, given, named):
    logits = "input" if name == "cross_entropy" else "logits"
    given = {logits if key == "logits" else key: value for key, value in given.items()}
    for function in (fl.LOSSES[name].function, fl.LOSSES[name].reference):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=f"{named}|{logits}"):
            function(**{logits: Z, "target": Y, **given})


OUT_OF_RANGE = {
    "margin": (lambda t: functional.hem_loss(Z, Y, margin=t), -1.0),
    "margin of multi-margin": (lambda t: functional.multi_margin_loss(Z, Y, margin=t), -1e-3),
    "beta": (lambda t: functional.cores_loss(Z, Y, beta=t), -1.0),
    "Z-Error threshold": (lambda t: functional.z_error_cross_entropy(Z, Y, threshold=t), 0.0),
    "binary threshold": (lambda t: functional.z_error_bce_with_logits(Z, Z.sigmoid(), threshold=t), -1.0),
    "MSE threshold": (lambda t: functional.z_mse_loss(Z, Z, threshold=t), 0.0),
    "Z-Error module": (fl.ZErrorCrossEntropyLoss, 0.0),
    "binary module": (fl.ZErrorBCEWithLogitsLoss, 0.0),
    "MSE module": (fl.ZMSELoss, 0.0),
}


@pytest.mark.parametrize(("call", "bad"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_numbers_in_tensors_are_in_range(call, bad):
    call(torch.tensor(0.5))
    for value in (bad, math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"(margin|beta|threshold) must satisfy 0 <=? value <=? inf, got {value}"):
            call(torch.tensor(value))


def test_every_entry_is_in_range():
    margins = torch.tensor([0.1, 0.2, math.nan, 0.3, 0.4])
    for call in (
        lambda t: functional.hem_loss(Z, Y, margin=t),
        lambda t: functional.z_error_cross_entropy(Z, Y, threshold=t),
        fl.ZErrorCrossEntropyLoss,
    ):
        call(margins.nan_to_num(1.0))
        with pytest.raises(ValueError, match=r"every entry of (margin|threshold) must .* got nan"):
            call(margins)


def test_a_threshold_per_task_and_label_has_that_shape():
    logits, labels = torch.tensor([0.0, 1.0, 2.0, 9.0])[:, None].expand(4, 4), torch.ones(4, 4)
    threshold = torch.full((4, 2), 0.5)
    threshold[:, 1] = 100.0  # of label 1: nothing is dropped
    loss = fl.ZErrorBCEWithLogitsLoss
    assert loss(threshold)(logits, labels, return_mask=True).mask.all()
    for module in (functional, fl.reference):
        with pytest.raises(ValueError, match=r"threshold must .* shape \(4, 2\), got shape \(2, 4\)"):
            module.z_error_bce_with_logits(logits, labels, threshold=threshold.T)
        with pytest.raises(ValueError, match=r"threshold must have at most one dimension, got shape \(1, 5\)"):
            module.z_error_cross_entropy(Z, Y, threshold=torch.ones(1, 5))


def test_smoothing_may_be_a_tensor_as_in_torch():
    expected = torch.nn.functional.cross_entropy(Z, Y, label_smoothing=0.25)
    torch.testing.assert_close(functional.cross_entropy(Z, Y, label_smoothing=torch.tensor(0.25)), expected)
    torch.testing.assert_close(fl.CrossEntropyLoss(label_smoothing=torch.tensor(0.25))(Z, Y), expected)
    with pytest.raises(TypeError, match="label_smoothing must be a number"):
        functional.cross_entropy(Z, Y, label_smoothing=torch.tensor([0.25, 0.5]))


def test_moments_of_half_precision_are_assigned_in_full():
    trained = fl.ZErrorCrossEntropyLoss(running=True, num_classes=5)
    trained(Z, Y)
    state = {name: tensor.bfloat16() for name, tensor in trained.state_dict().items()}
    fresh = fl.ZErrorCrossEntropyLoss(running=True, num_classes=5)
    fresh.load_state_dict(state, assign=True)
    assert fresh.running_moments.dtype == torch.float64
    fresh(Z, Y)


def test_a_reduction_is_checked_with_any_loss():
    for loss in ("gce", fl.GCELoss(), fl.ZErrorCrossEntropyLoss(), fl.GlobalMean(fl.GCELoss())):
        with pytest.raises(ValueError, match=r"reduction must be .* got 'foo'"):
            fl.LinearLoss(3, 4, loss, reduction="foo")


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["logit", "prob", "loss"])
def test_z_error_compiles_once(statistic):
    torch._dynamo.reset()
    graphs = []
    plain = fl.ZErrorCrossEntropyLoss(1.0, statistic)
    compiled = torch.compile(plain, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for _ in range(2):
        torch.testing.assert_close(compiled(Z, Y), plain(Z, Y))
    assert len(graphs) == 1
    layer = fl.LinearLoss(5, 4, plain)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(Z, Y), layer(Z, Y))
