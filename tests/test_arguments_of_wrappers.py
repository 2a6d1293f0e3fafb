"""What wrappers, corrections and label noise make of arguments that are rare or wrong."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import wrapped_losses
from torch import nn

import fused_losses as fl
from fused_losses import functional as F
from fused_losses import noise
from fused_losses._common import Criterion, RowLossModule
from fused_losses.integrations.timm import MixupLoss

pytestmark = pytest.mark.any_cpu  # what Python does around kernels

Z, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
META = torch.tensor(0.5, device="meta")
NARROW = [(torch.int8, 129), (torch.uint8, 257), (torch.int16, 2**15 + 1)]


@pytest.mark.parametrize("dtype, classes", NARROW)
def test_noise_refuses_classes_that_a_dtype_does_not_hold(dtype: torch.dtype, classes: int) -> None:
    labels = torch.zeros(8, dtype=dtype)
    with pytest.raises(ValueError, match=f"num_classes {classes} and {dtype}"):
        noise.symmetric(labels, 1.0, classes)
    with pytest.raises(ValueError, match=f"num_classes {classes} and {dtype}"):
        noise.instance_dependent(torch.rand(8, 2), labels, 0.5, classes)
    if classes < 1000:
        with pytest.raises(ValueError, match=f"num_classes {classes} and {dtype}"):
            noise.asymmetric(labels, 1.0, classes, {0: classes - 1})
        with pytest.raises(ValueError, match=f"num_classes {classes} and {dtype}"):
            noise.from_matrix(labels, torch.eye(classes))
    assert noise.symmetric(labels, 1.0, classes - 1).labels.min() >= 0


def test_an_infinite_first_batch_is_judged_by_itself() -> None:
    logits, target = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    logits[0, 0] = -math.inf
    loss = fl.SmallLoss("cross_entropy", 1.0, running=True, reduction="none")
    assert torch.equal(loss(logits, target), F.cross_entropy(logits, target, reduction="none"))
    fine = logits[1:]
    torch.testing.assert_close(loss(fine, target[1:]), F.cross_entropy(fine, target[1:], reduction="none"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 100, 200, 700, 12_345])
def test_share_of_a_tensor_is_the_decimal_that_was_meant(n: int, dtype: torch.dtype) -> None:
    losses = torch.zeros(n, 2)
    losses[:, 0] = torch.linspace(-1.0, 1.0, n)
    for percent in range(1, 101):
        loss = fl.SmallLoss("cross_entropy", torch.tensor(percent / 100, dtype=dtype), reduction="none")
        kept = (loss(losses, torch.zeros(n, dtype=torch.int64)) > 0).sum()
        assert kept == max(1, math.floor(Fraction(percent, 100) * n)), percent


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_logits_whose_square_overflows(t: float) -> None:
    """Kernel and torch's operations agree."""
    far = torch.tensor([[1e25, -5e24, 2.5e24], [1e19, -5e18, 2e18]])
    for make in (lambda v: fl.LogitClip("cross_entropy", v), lambda v: fl.LogitNorm("cross_entropy", v)):
        by_formula = make(torch.tensor(t, requires_grad=True))(far, torch.tensor([0, 0]))
        torch.testing.assert_close(make(t)(far, torch.tensor([0, 0])), by_formula.detach())


def test_a_label_without_share_is_left_out() -> None:
    logits, a, b = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([0]), torch.tensor([2])
    for name in ("nfl", "cross_entropy", "gce", "nce"):
        for reduction in ("mean", "sum", "none"):
            expected = F.mixed(name, logits, a, b, 1.0, reduction=reduction)
            for lam in (torch.tensor(1.0), torch.tensor([1.0])):
                torch.testing.assert_close(F.mixed(name, logits, a, b, lam, reduction=reduction), expected)
                torch.testing.assert_close(F.mixed(name, logits, b, a, 1 - lam, reduction=reduction), expected)


@pytest.mark.parametrize("lam", [torch.tensor(2.0), torch.tensor([0.1, 0.2, -0.1, 1.0]), torch.tensor(math.nan)])
def test_shares_beyond_one(lam: torch.Tensor) -> None:
    for name in ("gce", "nfl"):
        with pytest.raises(ValueError, match=r"lam must be between 0.0 and 1.0, got"):
            F.mixed(name, Z, Y, Y, lam)


def test_parameters_that_require_a_gradient() -> None:
    x = torch.tensor(0.5, requires_grad=True)
    for name, loss in (
        ("c", fl.ClippedLoss("gce", x)), ("lam", fl.SuperLoss("gce", x)), ("tau", fl.SuperLoss("gce", 1.0, x)),
        ("keep", fl.SmallLoss("gce", x)), ("delta", fl.Antidote("gce", x)), ("kappa", fl.Antidote("gce", 0.5, x)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"^{name} of .* is a constant, got a tensor that requires a gradient"):
            loss(Z, Y)


def test_parameters_on_another_device() -> None:
    for name, loss in (
        ("t", fl.LogitNorm("gce", META)), ("tau", fl.LogitClip("gce", META)), ("t", fl.LogitNorm("nfl", META)),
        ("keep", fl.SmallLoss("gce", META)), ("lam", fl.SuperLoss("gce", META)), ("c", fl.ClippedLoss("gce", META)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"^{name} of .* must be on the device of logits .cpu., got meta"):
            loss(Z, Y)


def test_sparse_options_are_named() -> None:
    classes, samples = torch.ones(3).to_sparse(), torch.ones(4).to_sparse()
    eye = torch.eye(3)
    for name, call in (
        ("sample_weight", lambda: F.forward_correction_loss(Z, Y, eye, sample_weight=samples)),
        ("weight", lambda: F.backward_correction_loss(Z, Y, eye, weight=classes)),
        ("transition", lambda: F.forward_correction_loss(Z, Y, eye.to_sparse())),
        ("transition", lambda: fl.BackwardCorrectionLoss(eye.to_sparse())),
        ("weight", lambda: F.gjs_loss([Z, Z], Y, (0.5, 0.3, 0.2), weight=classes)),
        ("sample_weight", lambda: fl.ELRLoss(4, 3)(Z, Y, torch.arange(4), samples)),
        ("sample_weight", lambda: fl.SmallLoss("gce", 0.5)(Z, Y, samples)),
        ("weight", lambda: fl.SuperLoss("gce", weight=classes)(Z, Y)),
        ("weight", lambda: F.mixed("nfl", Z, Y, Y, 0.5, weight=classes)),
        ("lam", lambda: F.mixed("gce", Z, Y, Y, samples)),
    ):
        with pytest.raises(RuntimeError, match=f"^{name} must be dense, got a tensor of layout"):
            call()


def test_no_classes_and_no_matrix() -> None:
    none = torch.zeros(4, 0)
    for call in (
        lambda: F.forward_correction_loss(none, Y, torch.zeros(0, 0)),
        lambda: F.gjs_loss([none, none], Y, (0.5, 0.3, 0.2)),
    ):
        with pytest.raises(ValueError, match=r"logits must have at least one class"):
            call()
    with pytest.raises(ValueError, match=r"^transition must be a tensor of shape"):
        fl.BackwardCorrectionLoss(torch.rand(5))


def test_linear_loss_under_function_transforms() -> None:
    head, features = torch.zeros(3, 2), torch.ones(4, 2)
    for transform in (
        lambda: torch.func.grad(lambda x: F.linear_loss(x, head, Y))(features),
        lambda: torch.func.vmap(lambda x: F.linear_loss(x, head, Y))(features.expand(2, 4, 2)),
    ):
        with pytest.raises(NotImplementedError, match=r"^linear_loss has no form for the transforms of torch.func"):
            transform()


def test_rows_that_are_no_probabilities() -> None:
    for row in ([0.5, 0.2, 0.0], [-0.5, 1.5, 0.0]):
        with pytest.raises(ValueError, match="target must hold probabilities"):
            MixupLoss(fl.NFLLoss())(Z[:1], torch.tensor([row]))


@pytest.mark.parametrize("name", wrapped_losses.CASES)
def test_errors_of_calls_name_what_users_know(name: str) -> None:
    case, (logits, target) = wrapped_losses.CASES[name], wrapped_losses.batch()
    module = case.make()
    calls = [
        (lambda: case(module, logits, target, no_option=1), "'no_option'"),
        (lambda: module(logits, target, *[None] * 4), "too many|takes"),
    ]
    if case.takes_index:
        calls.append((lambda: module(logits, target), "'index'"))
    for call, what in calls:
        with pytest.raises(TypeError, match=rf"^\w+(\.forward\(\)| inside a wrapper:) .*({what})"):
            call()


def test_a_wrapper_does_not_take_row_statistics() -> None:
    with pytest.raises(TypeError, match=r"^GCELoss inside a wrapper: got .* 'return_row_stats'"):
        fl.SuperLoss("gce")(Z, Y, return_row_stats=True)


def test_arguments_can_be_named() -> None:
    gjs, forward = fl.GJSLoss((0.5, 0.3, 0.2)), fl.ForwardCorrectionLoss(torch.eye(3))
    assert torch.equal(gjs(views=[Z, Z], target=Y), gjs([Z, Z], Y))
    assert torch.equal(forward(logits=Z, target=Y, sample_weight=None), forward(Z, Y))


WORDS, NUMBERS = ["bogus", None, "Sum", 1, math.nan], [-1.0, math.nan, math.inf, "x"]
INTEGERS, SWITCHES, COUNTS = [None, 1.5, "x", 2**70], ["x", None, math.nan, np.ones(2)], [*NUMBERS, 0, 1.5, None, 2**70]
OF_ROWS: dict[str, list[Any]] = {"reduction": WORDS, "ignore_index": INTEGERS}
RUNNING: dict[str, list[Any]] = {"reduction": WORDS, "running": SWITCHES, "momentum": NUMBERS}
Z_ERROR = RUNNING | {"threshold": [-1.0, math.nan, "x", None]}
SMALL = {"min_count": COUNTS, "small_class": WORDS, "sided": WORDS}
MATRICES = [5 * torch.eye(3), -torch.eye(3), None, "x", torch.ones(3), torch.tensor(math.nan).expand(3, 3)]
BINARY = torch.tensor([0.0, 1.0, 1.0, 0.0])
# How to make each Module, what it is called with, and wrong values of its options.
ASSIGNED: dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, list[Any]]]] = {
    fl.SmallLoss: (lambda: fl.SmallLoss("gce", 0.5, running=True), (Z, Y), RUNNING | {"keep": [*NUMBERS, 0.0, 2.0]}),
    fl.ClippedLoss: (lambda: fl.ClippedLoss("gce", 0.5), (Z, Y), {"reduction": WORDS, "c": [*NUMBERS, 0.0]}),
    fl.Antidote: (
        lambda: fl.Antidote("gce", 0.5, running=True),
        (Z, Y),
        RUNNING | {"delta": [*NUMBERS, 0.0, None], "kappa": [*NUMBERS, 0.0]},
    ),
    fl.SuperLoss: (
        lambda: fl.SuperLoss("gce", running=True),
        (Z, Y),
        RUNNING | {"lam": [*NUMBERS, 0.0], "tau": [math.nan, "x", torch.ones(2)]},
    ),
    fl.ForwardCorrectionLoss: (
        lambda: fl.ForwardCorrectionLoss(torch.eye(3)), (Z, Y), OF_ROWS | {"transition": MATRICES},
    ),
    fl.BackwardCorrectionLoss: (
        lambda: fl.BackwardCorrectionLoss(torch.eye(3)),
        (Z, Y),
        OF_ROWS | {"transition": [*MATRICES, torch.full((3, 3), 1 / 3)]},
    ),
    fl.GJSLoss: (
        lambda: fl.GJSLoss((0.5, 0.5)),
        ([Z], Y),
        OF_ROWS | {"weights": [(0.9, 0.9), (0.5, math.nan), np.array(2.0), 0.5, None, "x"]},
    ),
    fl.LogitNorm: (lambda: fl.LogitNorm("gce"), (Z, Y), {"reduction": WORDS, "t": [*NUMBERS, 0.0, None]}),
    fl.LogitClip: (lambda: fl.LogitClip("nfl", 1.0), (Z, Y), {"reduction": WORDS, "tau": [*NUMBERS, 0.0, None]}),
    fl.ELRLoss: (
        lambda: fl.ELRLoss(4, 3),
        (Z, Y, torch.arange(4)),
        OF_ROWS | {"beta": [*NUMBERS, 2.0], "lam": NUMBERS, "num_samples": COUNTS, "num_classes": COUNTS},
    ),
    fl.LinearLoss: (
        lambda: fl.LinearLoss(3, 3),
        (Z, Y),
        {"reduction": [word for word in WORDS if word], "chunk_bytes": COUNTS, "skip_rows": ["x", math.nan]},
    ),
    fl.ZErrorCrossEntropyLoss: (
        lambda: fl.ZErrorCrossEntropyLoss(running=True),
        (Z, Y),
        Z_ERROR | SMALL | OF_ROWS | {"statistic": WORDS, "base": ["x", None], "logit_bias": [math.nan, "x", None]},
    ),
    fl.ZErrorBCEWithLogitsLoss: (
        lambda: fl.ZErrorBCEWithLogitsLoss(running=True), (Z[:, 0], BINARY), Z_ERROR | SMALL | {"space": WORDS},
    ),
    fl.ZMSELoss: (
        lambda: fl.ZMSELoss(running=True),
        (Z[:, 0], BINARY),
        Z_ERROR | {"statistic": WORDS, "per_task": SWITCHES},
    ),
}  # fmt: skip
# Given once: what a Module is built of, its sizes, and where it is.
_BUILT = {"self", "loss", "options", "weight", "pos_weight", "process_group", "bias", "in_features", "device", "dtype"}
_BUILT |= {"memory", "memory_dtype", "accumulate_dtype", "shard", "num_tasks"}


def test_options_of_all_wrappers_are_in_the_table() -> None:
    public = (getattr(fl, name) for name in fl.__all__)
    modules = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Criterion)}
    assert ASSIGNED.keys() == {kind for kind in modules if not issubclass(kind, (RowLossModule, fl.GlobalMean))}
    for kind, (_, _, wrong) in ASSIGNED.items():
        options = inspect.signature(kind.__init__).parameters.keys() - _BUILT
        assert options - {"num_classes"} <= wrong.keys(), kind
        if "running" in options:
            assert wrong.keys() >= RUNNING.keys()


@pytest.mark.parametrize("kind", ASSIGNED)
def test_wrong_values_can_be_neither_given_nor_assigned(kind: type[nn.Module]) -> None:
    make, inputs, wrong = ASSIGNED[kind]
    make()(*inputs)
    for name, values in wrong.items():
        for value in values:
            module = make()
            with pytest.raises((ValueError, TypeError), match=name):
                setattr(module, name, value)
                module(*inputs)
    if "running" in wrong:
        for value in SWITCHES:
            required = (0.5,) if kind in (fl.SmallLoss, fl.Antidote) else ()
            loss = ("gce",) if issubclass(kind, (fl.SmallLoss, fl.Antidote, fl.SuperLoss)) else ()
            with pytest.raises(TypeError, match=r"^running must be True or False, got"):
                kind(*loss, *required, running=value)


@pytest.mark.parametrize("stem", fl.LOSSES)
def test_no_other_word_or_number_is_taken_by_a_row_loss(stem: str) -> None:
    for wrap in (lambda loss: loss, lambda loss: fl.LogitNorm(loss), lambda loss: MixupLoss(loss)):
        for name, value in [(name, value) for name, values in OF_ROWS.items() for value in values]:
            loss = fl.LOSSES[stem].module()
            setattr(loss, name, value)
            with pytest.raises((ValueError, TypeError), match=rf"^(\w+: )?{name} must be"):
                wrap(loss)(Z, Y)


def test_assigned_numbers_count() -> None:
    small, norm, gjs = fl.SmallLoss("gce", 0.5), fl.LogitNorm("gce"), fl.GJSLoss((0.5, 0.5))
    small.keep, norm.t, gjs.weights = np.float64(1.0), torch.tensor(0.5), [0.9, 0.1]
    assert type(small.keep) is float and gjs.weights == (0.9, 0.1)
    assert torch.equal(small(Z, Y), F.gce_loss(Z, Y))
    assert torch.equal(norm(Z, Y), fl.LogitNorm("gce", 0.5)(Z, Y))
    assert torch.equal(gjs([Z], Y), F.gjs_loss([Z], Y, (0.9, 0.1)))
    hem = fl.LogitNorm("hem")
    hem.reduction = "active_mean"  # what the loss inside has
    assert hem(Z, Y) == fl.LogitNorm("hem")(Z, Y)
