"""Normalised losses and their sums: closed-form gradients, symmetry, the detached factor, extreme rows."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GRAD_TOLERANCE, loss_and_grad

import fused_losses as fl

MADE = ["function", "reference"]
NORMALISED = ["nce", "nfl", "ngce"]
SUMS = ["nce_mae", "nce_rce", "nfl_mae", "nfl_rce", "nce_agce"]


def make_rows(device, rows=40, classes=7, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    return logits.to(device), torch.randint(0, classes, (rows,), generator=generator).to(device)


def parts(logits, target):
    """p, log p, p_y and the one-hot labels, each with a class dimension."""
    log_p = torch.log_softmax(logits, 1)
    hot = torch.nn.functional.one_hot(target, logits.shape[1]).to(logits.dtype)
    return log_p.exp(), log_p, hot


def nce(logits, target):
    p, log_p, hot = parts(logits, target)
    total = -log_p.sum(1, keepdim=True)
    value = -(log_p * hot).sum(1, keepdim=True) / total
    return value, ((p - hot) - value * (logits.shape[1] * p - 1)) / total


def nfl(logits, target, gamma, detach):
    p, log_p, hot = parts(logits, target)
    miss = 1 - p
    terms = -(miss**gamma) * log_p
    slopes = miss**gamma if detach else miss**gamma - gamma * p * miss ** (gamma - 1) * log_p
    total = terms.sum(1, keepdim=True)
    value = (terms * hot).sum(1, keepdim=True) / total
    slope_y = (slopes * hot).sum(1, keepdim=True)
    return value, (slope_y * (p - hot) - value * (slopes.sum(1, keepdim=True) * p - slopes)) / total


def ngce(logits, target, q):
    p, _, hot = parts(logits, target)
    powers = p**q
    total = powers.sum(1, keepdim=True)
    missing = logits.shape[1] - total
    power_y = (powers * hot).sum(1, keepdim=True)
    value = (1 - power_y) / missing
    return value, q * (power_y * (p - hot) + value * (powers - p * total)) / missing


def passive(logits, target, scale):
    p, _, hot = parts(logits, target)
    p_y = (p * hot).sum(1, keepdim=True)
    return scale * (1 - p_y), scale * p_y * (p - hot)


def agce(logits, target, a, q):
    p, _, hot = parts(logits, target)
    p_y = (p * hot).sum(1, keepdim=True)
    return ((a + 1) ** q - (a + p_y) ** q) / q, p_y * (a + p_y) ** (q - 1) * (p - hot)


def weighted(alpha, active, beta, other):
    return alpha * active[0] + beta * other[0], alpha * active[1] + beta * other[1]


A = -math.log(1e-4)
CLOSED_FORMS = [
    ("nce", {}, nce),
    ("nfl", {}, lambda z, y: nfl(z, y, 0.5, True)),
    ("nfl", {"gamma": 2.0}, lambda z, y: nfl(z, y, 2.0, True)),
    ("nfl", {"gamma": 2.0, "detach": False}, lambda z, y: nfl(z, y, 2.0, False)),
    ("nfl", {"gamma": 0.5, "detach": False}, lambda z, y: nfl(z, y, 0.5, False)),
    ("nfl", {"gamma": 0.0}, nce),
    ("nfl", {"gamma": 0.0, "detach": False}, nce),
    ("ngce", {}, lambda z, y: ngce(z, y, 0.7)),
    ("ngce", {"q": 2.5}, lambda z, y: ngce(z, y, 2.5)),
    ("nce_mae", {}, lambda z, y: weighted(1, nce(z, y), 1, passive(z, y, 1))),
    (
        "nce_mae",
        {"alpha": 10.0, "beta": 0.3, "mae_scale": 2.0},
        lambda z, y: weighted(10, nce(z, y), 0.3, passive(z, y, 2)),
    ),
    ("nce_rce", {}, lambda z, y: weighted(1, nce(z, y), 1, passive(z, y, A))),
    ("nce_rce", {"alpha": 0.0, "beta": 2.0, "A": 4.0}, lambda z, y: passive(z, y, 8.0)),
    ("nfl_mae", {}, lambda z, y: weighted(1, nfl(z, y, 0.5, True), 1, passive(z, y, 1))),
    (
        "nfl_mae",
        {"alpha": 2.0, "beta": 0.0, "gamma": 1.5, "detach": False, "mae_scale": 3.0},
        lambda z, y: weighted(2, nfl(z, y, 1.5, False), 0, passive(z, y, 3)),
    ),
    ("nfl_rce", {}, lambda z, y: weighted(1, nfl(z, y, 0.5, True), 1, passive(z, y, A))),
    (
        "nfl_rce",
        {"alpha": 2.0, "beta": 0.5, "gamma": 3.0, "detach": False, "A": 2.0},
        lambda z, y: weighted(2, nfl(z, y, 3.0, False), 0.5, passive(z, y, 2)),
    ),
    ("nce_agce", {}, lambda z, y: weighted(1, nce(z, y), 4, agce(z, y, 6.0, 1.5))),
    (
        "nce_agce",
        {"alpha": 10.0, "beta": 0.1, "a": 1.8, "q": 3.0},
        lambda z, y: weighted(10, nce(z, y), 0.1, agce(z, y, 1.8, 3.0)),
    ),
]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name, parameters, closed_form", CLOSED_FORMS)
def test_closed_form(name, parameters, closed_form, made, device):
    logits, target = make_rows(device)
    loss, grad = loss_and_grad(getattr(fl.LOSSES[name], made), logits, target, reduction="none", **parameters)
    expected, expected_grad = closed_form(logits, target)
    torch.testing.assert_close(loss, expected.squeeze(1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad.sum(1), torch.zeros_like(loss), rtol=0, atol=1e-12)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", [*NORMALISED, "nce_mae", "nce_rce", "nfl_mae", "nfl_rce"])
def test_symmetric(name, made, device):
    logits, _ = make_rows(device, rows=30, classes=6)
    options = {"beta": 3.0} if name in SUMS else {}
    function = getattr(fl.LOSSES[name], made)
    per_label = torch.stack(
        [function(logits, torch.full((30,), label, device=device), reduction="none", **options) for label in range(6)]
    )
    scale = {"nce_mae": 1.0, "nfl_mae": 1.0, "nce_rce": A, "nfl_rce": A}.get(name, 0.0)
    expected = 1 + 3 * scale * (6 - 1)
    torch.testing.assert_close(per_label.sum(0), torch.full_like(per_label[0], expected), rtol=1e-12, atol=0)
    assert (per_label >= 0).all()


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ["nfl", "nfl_mae", "nfl_rce"])
def test_the_detached_factor_is_a_constant_in_second_derivatives_too(name, made, device):
    logits, target = make_rows(device, rows=3, classes=4, scale=1.0)

    def frozen(x):
        log_p = torch.log_softmax(x, 1)
        terms = -((1 - log_p.detach().exp()) ** 0.5) * log_p
        value = terms.gather(1, target[:, None]) / terms.sum(1, keepdim=True)
        rest = 1 - log_p.gather(1, target[:, None]).exp()
        return (value + {"nfl": 0.0, "nfl_mae": 1.0, "nfl_rce": A}[name] * rest).mean()

    function = getattr(fl.LOSSES[name], made)
    actual = torch.autograd.functional.hessian(lambda x: function(x, target), logits)
    torch.testing.assert_close(actual, torch.autograd.functional.hessian(frozen, logits), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", [*NORMALISED, *SUMS])
def test_certain_rows_are_finite(name, made, device):
    logits = torch.tensor([[800.0, 0.0, -800.0], [1e6, -1e6, 1.0]], dtype=torch.float64, device=device)
    for detach in [{"detach": True}, {"detach": False}] if "nfl" in name else [{}]:
        for label in range(3):
            target = torch.full((2,), label, device=device)
            function = getattr(fl.LOSSES[name], made)
            loss, grad = loss_and_grad(function, logits, target, reduction="none", **detach)
            assert loss.isfinite().all() and grad.isfinite().all()
            if label == 0:
                assert (loss < 1e-12).all() and (grad.abs() < 1e-2).all()


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ["nce_mae", "nce_rce", "nfl_mae", "nfl_rce", "nce_agce"])
def test_a_weight_of_zero_drops_the_normalised_term(name, made, device):
    # With a target of probability 0 the normalised term alone is not a number.
    logits = torch.tensor([[-math.inf, 0.0, 1.0]], dtype=torch.float64, device=device)
    target = torch.tensor([0], device=device)
    expected = {"mae": 1.0, "rce": A, "agce": (7**1.5 - 6**1.5) / 1.5}[name.split("_")[1]]
    loss, grad = loss_and_grad(getattr(fl.LOSSES[name], made), logits, target, alpha=0.0, beta=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ["nce", "nfl"])
def test_a_masked_class_makes_the_loss_zero(name, made, device):
    logits = torch.tensor([[0.5, 0.0, -math.inf]], dtype=torch.float64, device=device)
    loss, grad = loss_and_grad(getattr(fl.LOSSES[name], made), logits, torch.tensor([0], device=device))
    assert loss.item() == 0.0 and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", [*NORMALISED, *SUMS])
def test_one_class_is_refused(name, made, device):
    for shape in [(3, 1), (1,), (2, 1, 4)]:
        target = torch.zeros(shape[:1] * (len(shape) > 1) + shape[2:], dtype=torch.int64, device=device)
        with pytest.raises(ValueError, match=r"logits must have at least two classes, got shape \["):
            getattr(fl.LOSSES[name], made)(torch.zeros(shape, device=device), target)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", [*NORMALISED, *SUMS])
def test_bias_and_weights(name, made, device):
    logits, target = make_rows(device)
    weight = torch.rand(7, dtype=torch.float64, device=device) + 0.5
    function = getattr(fl.LOSSES[name], made)
    biased = logits + 1.5 * torch.nn.functional.one_hot(target, 7)
    rows = function(biased, target, reduction="none")
    target[:3] = -100
    rows[:3] = 0.0
    total = torch.where(target >= 0, weight[target.clamp(min=0)], 0.0)
    mean = function(logits, target, weight=weight, logit_bias=1.5)
    torch.testing.assert_close(mean, (rows * total).sum() / total.sum(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["nfl", "nfl_mae", "nfl_rce"])
def test_detach_is_a_switch(name):
    for value in (1.0, None, "yes"):
        with pytest.raises(TypeError, match=f"^detach must be True or False, got {value!r}$"):
            fl.LOSSES[name].module(detach=value)
    with pytest.raises(TypeError, match="detach must be True or False"):
        fl.LOSSES[name].function(torch.zeros(2, 3), torch.tensor([0, 1]), detach=0)


def test_constructor_positions():
    nfl_mae = fl.NFLMAELoss(1.0, 2.0, 3.0, 4.0, False)
    assert (nfl_mae.alpha, nfl_mae.beta, nfl_mae.gamma, nfl_mae.mae_scale, nfl_mae.detach) == (
        1.0,
        2.0,
        3.0,
        4.0,
        False,
    )
    assert fl.LOSSES["nfl_mae"].pack({"mae_scale": 4.0, "detach": False}) == (1.0, 1.0, 0.5, 0.0, 4.0)
    assert fl.LOSSES["nfl_rce"].pack({"A": 2.0, "gamma": 3.0}) == (1.0, 1.0, 3.0, 1.0, 2.0)


@pytest.mark.parametrize("name", [*NORMALISED, *SUMS])
def test_float32(name, device):
    logits, target = make_rows(device, classes=100)
    loss, grad = loss_and_grad(fl.LOSSES[name].function, logits.float(), target)
    expected, expected_grad = loss_and_grad(fl.LOSSES[name].reference, logits.float().double(), target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (grad.double() - expected_grad).abs().max() <= GRAD_TOLERANCE[torch.float32] * expected_grad.abs().max()


@pytest.mark.parametrize("classes", [64, 1000])
@pytest.mark.parametrize("name", ["nnfl", "anl_fl"])
def test_what_each_of_many_improbable_classes_adds_is_not_lost(name, classes, device):
    # 8e-7 for each, beside a sum of 16 whose neighbouring numbers are 2e-6 away.
    logits = torch.full((1, classes), -30.0, device=device)
    logits[0, 0] = 0.0
    target = torch.tensor([0], device=device)
    loss, _ = loss_and_grad(fl.LOSSES[name].function, logits, target)
    expected, _ = loss_and_grad(fl.LOSSES[name].reference, logits.double(), target)
    assert expected.abs() > 1e-6
    assert loss.item() == pytest.approx(expected.item(), rel=0.0, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, entry in fl.LOSSES.items() if "min_prob" in entry.ranges])
def test_min_prob_is_below_an_equal_share(name):
    """Else a row of equal logits is 0 / 0; whatever way a call takes, small ones included."""
    entry, target = fl.LOSSES[name], torch.tensor([0, 3])
    assert entry.function(torch.zeros(2, 999), target, min_prob=1e-3).isfinite()
    for classes in (1000, 1200, 9000):
        logits, head = torch.zeros(2, classes), torch.zeros(classes, 3)
        late = entry.module()
        assert late(logits, target).isfinite()
        late.min_prob = 1e-3
        made = entry.module(min_prob=1e-3)
        for call in (
            made,
            late,
            lambda x, y: made(x, y, torch.ones(2)),
            lambda x, y: made(x, y, return_row_stats=True),
            lambda x, y: made(x[0], y[0]),
            lambda x, y: made(x.double().requires_grad_(), y),
            lambda x, y: entry.function(x, y, min_prob=1e-3),
            lambda x, y: entry.function(x, y, min_prob=1e-3, logit_bias=1.0),
            lambda x, y: entry.reference(x, y, min_prob=1e-3),
            lambda x, y: torch.func.grad(lambda z: made(z, y))(x),
            lambda x, y: fl.functional.linear_loss(torch.zeros(2, 3), head, y, entry.function, min_prob=1e-3),
            lambda x, y: fl.functional.linear_loss(torch.zeros(2, 3), head, y, made),
            lambda x, y: fl.functional.mixed(made, x, y, y.flip(0), 0.3),
            lambda x, y: fl.functional.z_error_cross_entropy(x, y, base=made),
            fl.LogitNorm(made),
            fl.SmallLoss(made, 0.5),
            torch.compile(made, backend="eager"),
            torch.compile(made, backend="eager", dynamic=True),
        ):
            share = f"{1 / classes:.6g}"
            message = rf"^min_prob must be below 1 / C, which is {share} for {classes} classes, got 0\.001"
            with pytest.raises(ValueError, match=message):
                call(logits, target)


@pytest.mark.parametrize("name", ["ngce", "sgce"])
def test_small_powers_keep_their_digits_in_the_plain_formula(name):
    logits, target = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 5
    found, right = (fl.LOSSES[name].reference(z, target, q=1e-4) for z in (logits, logits.double()))
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
