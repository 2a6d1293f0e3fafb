"""The generalised Jensen-Shannon divergence: numbers, bounds, forms of its arguments. Values are also tested with the
losses around losses."""

from __future__ import annotations

import math

import pytest
import torch

import fused_losses as fl

INF = math.inf


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(3, 6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, -100, 4])


def test_worked_by_hand():
    views, target = torch.tensor([[[math.log(3.0), 0.0]], [[0.0, 0.0]]]), torch.tensor([0])
    # p = (3/4, 1/4) and (1/2, 1/2), m = (.5 + .1875 + .125, .0625 + .125) = (.8125, .1875)
    first = 0.75 * math.log(0.75 / 0.8125) + 0.25 * math.log(0.25 / 0.1875)
    second = 0.5 * math.log(0.5 / 0.8125) + 0.5 * math.log(0.5 / 0.1875)
    value = (-0.5 * math.log(0.8125) + 0.25 * first + 0.25 * second) / (0.5 * math.log(2))
    found = fl.functional.gjs_loss(views, target, (0.5, 0.25, 0.25))
    assert found.item() == pytest.approx(value, rel=1e-6)


def test_one_view_is_the_jensen_shannon_loss(batch):
    views, target = batch
    for pi in (0.1, 0.5, 0.9):
        found = fl.functional.gjs_loss(views[:1], target, (pi, 1 - pi), reduction="none")
        torch.testing.assert_close(found, fl.functional.js_loss(views[0], target, pi=pi, reduction="none"))


def test_gradient_as_published(batch):
    views, target = batch
    leaf, weights = views.requires_grad_(), (0.4, 0.3, 0.2, 0.1)
    fl.functional.gjs_loss(leaf, target, weights, reduction="sum").backward()
    p = views.detach().softmax(2)
    one_hot = torch.nn.functional.one_hot(target.clamp(min=0), 5)
    m = 0.4 * one_hot + sum(share * q for share, q in zip(weights[1:], p, strict=True))
    v = torch.log(p / m)
    z = -1 / (0.6 * math.log(0.6))
    right = torch.stack(
        [z * share * q * (w - (q * w).sum(1, keepdim=True)) for share, q, w in zip(weights[1:], p, v, strict=True)]
    )
    right[:, 4] = 0
    torch.testing.assert_close(leaf.grad, right)


def test_derivatives_where_a_view_is_made_of_another(batch):
    views, target = batch

    def loss(z):
        return fl.functional.gjs_loss([z, z.flip(1), 2.0 * z.flip(1)], target[:3], (0.4, 0.3, 0.2, 0.1))

    leaf = views[0, :3].requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0], first)
    assert torch.autograd.gradcheck(loss, leaf) and torch.autograd.gradgradcheck(loss, leaf)


def test_agreement_is_zero_and_the_bound_is_reached():
    """Zero where all agree with the label, at most H(weights) times Z where all are certain and differ."""
    sure = 200.0 * torch.eye(3)
    weights = (0.5, 0.25, 0.25)
    assert fl.functional.gjs_loss(sure[[0, 0]].unsqueeze(1), torch.tensor([0]), weights).item() == pytest.approx(0)
    entropy = -sum(w * math.log(w) for w in weights)
    found = fl.functional.gjs_loss(sure[[1, 2]].unsqueeze(1), torch.tensor([0]), weights)
    assert found.item() == pytest.approx(entropy / (0.5 * math.log(2)))


def test_forms_of_the_arguments(batch):
    views, target = batch
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25])
    right = fl.functional.gjs_loss(views, target, weights, reduction="none")
    module = fl.GJSLoss([0.25] * 4, reduction="none")
    torch.testing.assert_close(module(list(views), target), right)
    images = views.transpose(1, 2).reshape(3, 1, 5, 2, 3)
    torch.testing.assert_close(module(images, target.view(1, 2, 3)).flatten(), right)
    masked = torch.cat([views, torch.full((3, 6, 1), -INF, dtype=torch.float64)], 2).requires_grad_()
    found = module(masked, target)
    torch.testing.assert_close(found, right)
    assert torch.autograd.grad(found.sum(), masked)[0].isfinite().all()


@pytest.mark.parametrize(
    "error, message, views, weights",
    [
        (ValueError, r"^weights must sum to 1, got 1.2", torch.zeros(2, 3, 4), (0.5, 0.5, 0.2)),
        (ValueError, r"^weights\[0\] must satisfy 0 < value < 1, got 1.0", torch.zeros(1, 3, 4), (1.0, 0.0)),
        (ValueError, r"^weights must be those of the label and", torch.zeros(1, 3, 4), (1.0,)),
        (ValueError, r"^weights must be those of the label and", torch.zeros(1, 3, 4), 0.5),
        (
            ValueError,
            r"^views must be 1, one for each weight after the label's, got 2",
            torch.zeros(2, 3, 4),
            (0.5, 0.5),
        ),
        (ValueError, r"^views must have one shape", [torch.zeros(3, 4), torch.zeros(3, 5)], (0.5, 0.25, 0.25)),
        (TypeError, r"^views must be a Tensor", "views", (0.5, 0.5)),
        (TypeError, r"^views must be a Tensor .*, got list of list$", [[0.0, 1.0]], (0.5, 0.5)),
        (RuntimeError, r"^gjs_loss: ", torch.zeros(1, 3, 4), (0.5, 0.5)),
    ],
)
def test_bad_input(error, message, views, weights):
    target = torch.zeros(3 if error is not RuntimeError else (3, 2), dtype=torch.int64)
    with pytest.raises(error, match=message):
        fl.functional.gjs_loss(views, target, weights)


def test_views_of_different_precision():
    views = [torch.randn(3, 4, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    loss, target = fl.GJSLoss((0.5, 0.2, 0.3)), torch.tensor([0, 1, 2])
    torch.testing.assert_close(loss(views, target), loss([view.double() for view in views], target))


WRAPPED = {
    "super": fl.SuperLoss,
    "norm": lambda loss: fl.LogitNorm(loss, t=0.5),
    "clip": lambda loss: fl.LogitClip(loss, tau=1.0),
    "super of norm": lambda loss: fl.SuperLoss(fl.LogitNorm(loss, t=0.5)),
    "norm of super": lambda loss: fl.LogitNorm(fl.SuperLoss(loss), t=0.5),
    "small of clip": lambda loss: fl.SmallLoss(fl.LogitClip(loss, tau=1.0), keep=0.5),
}


@pytest.mark.parametrize("shape", [(5,), (6, 5), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_find_the_classes_of_views(name, shape):
    torch.manual_seed(0)
    z = 2 * torch.randn(shape, dtype=torch.float64)
    target = torch.randint(5, shape[:-1] if len(shape) < 3 else (3, 2))
    right = WRAPPED[name](fl.JSLoss(0.5))(z, target)
    one, two = WRAPPED[name](fl.GJSLoss((0.5, 0.5))), WRAPPED[name](fl.GJSLoss((0.5, 0.2, 0.3)))
    for views in ([z], z.unsqueeze(0)):
        torch.testing.assert_close(one(views, target), right)
    for views in ([z, z], torch.stack([z, z])):  # that agree
        torch.testing.assert_close(two(views, target), right)
    with pytest.raises(ValueError, match="views must be 2, one for each weight"):
        two([z], target)
