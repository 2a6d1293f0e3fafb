"""What wrappers make of the loss inside: its class weights, and a subclass that computes something else."""

from __future__ import annotations

import itertools

import pytest
import torch

import fused_losses as fl

pytestmark = pytest.mark.any_cpu  # Python around the kernels

WEIGHT = torch.tensor([4.0, 1.0, 0.0, 0.25, 1.5], dtype=torch.float64)
SAMPLES = torch.linspace(0.5, 2.0, 12, dtype=torch.float64)
NOTHING_CHANGES = {
    "small": lambda loss, reduction: fl.SmallLoss(loss, 1.0, reduction=reduction),
    "clipped": lambda loss, reduction: fl.ClippedLoss(loss, 1e9, reduction=reduction),
    "small of clipped": lambda loss, reduction: fl.SmallLoss(fl.ClippedLoss(loss, 1e9), 1.0, reduction=reduction),
    "within a norm": lambda loss, reduction: fl.SmallLoss(fl.LogitClip(loss, 1e9), 1.0, reduction=reduction),
}


def problem(pixels=False):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 5, 2, 2) if pixels else (12, 5)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 5, (*shape[:1], *shape[2:]), generator=generator)
    target.view(-1)[[1, 7]] = torch.tensor([-100, 2])  # an ignored row, one whose label has no weight
    soft = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(1)
    return logits, target, soft, SAMPLES.view(target.shape)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, -1.5])
@pytest.mark.parametrize("name", NOTHING_CHANGES)
def test_weights_within_a_row_are_those_of_the_loss(name, smoothing, reduction, pixels):
    """Label smoothing and class probabilities give every class its own weight."""
    logits, target, soft, samples = problem(pixels)
    loss = fl.CrossEntropyLoss(WEIGHT, label_smoothing=smoothing, reduction=reduction)
    wrapped = NOTHING_CHANGES[name](fl.CrossEntropyLoss(WEIGHT, label_smoothing=smoothing), reduction)
    for labels, sample_weight in itertools.product((target, soft), (None, samples)):
        expected, found = loss(logits, labels, sample_weight), wrapped(logits, labels, sample_weight)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["cross_entropy", "mae", "nce"])
def test_rows_are_judged_without_weights_whatever_their_labels_are(name):
    """Labels as indices and as one-hot probabilities are the same rows; twice the weights change nothing."""
    logits, target, _, samples = problem()
    target = target.clamp(min=0)
    one_hot = torch.nn.functional.one_hot(target, 5).double()
    made = {
        "small": lambda weight: fl.SmallLoss(name, 0.5, reduction="sum", weight=weight),
        "clipped": lambda weight: fl.ClippedLoss(name, 0.9, reduction="sum", weight=weight),
        "super": lambda weight: fl.SuperLoss(name, reduction="sum", weight=weight),
        "antidote": lambda weight: fl.Antidote(name, 0.5, reduction="sum", weight=weight),
    }
    for make in made.values():
        by_index = make(WEIGHT)(logits, target, samples)
        torch.testing.assert_close(make(WEIGHT)(logits, one_hot, samples), by_index)
        torch.testing.assert_close(make(2.0 * WEIGHT)(logits, one_hot, samples), 2.0 * by_index)
    smooth = fl.CrossEntropyLoss(WEIGHT, label_smoothing=0.2)
    shares = 0.8 * one_hot + 0.04
    values = -(WEIGHT * shares * logits.log_softmax(1)).sum(1)
    of_row = (WEIGHT * shares).sum(1)
    expected = torch.where(values / of_row > 1.2, 1.2, values / of_row) * of_row
    torch.testing.assert_close(fl.ClippedLoss(smooth, 1.2, reduction="none")(logits, target), expected)


class Softer(fl.GCELoss):
    def forward(self, logits, target, *args, **options):
        return super().forward(logits / 4.0, target, *args, **options)


class Renamed(fl.GCELoss):
    """Another constructor, the same loss."""

    def __init__(self):
        super().__init__(q=0.5)


OUTER = {
    "small": lambda loss: fl.SmallLoss(loss, 1.0),
    "clipped": lambda loss: fl.ClippedLoss(loss, 1e9),
    "z-error": lambda loss: fl.ZErrorCrossEntropyLoss(float("inf"), base=loss),
    "global mean": lambda loss: fl.GlobalMean(loss),
    "linear": lambda loss: lambda x, y: fl.functional.linear_loss(x, torch.eye(5, dtype=x.dtype), y, loss),
    "mixed": lambda loss: lambda x, y: fl.functional.mixed(loss, x, y, y, 0.5),
    "parallel": lambda loss: fl.parallel.ClassParallel(loss, None, 0, 5),
}


@pytest.mark.parametrize("name", OUTER)
def test_a_forward_that_is_not_called_is_refused(name):
    logits, target, _, _ = problem()
    with pytest.raises(TypeError, match=r"must have the forward of fused_losses.*got Softer, which overrides it"):
        OUTER[name](Softer())(logits, target)
    if name not in ("global mean", "parallel"):  # which ask ranks
        torch.testing.assert_close(OUTER[name](Renamed())(logits, target), fl.GCELoss(q=0.5)(logits, target))
    norm = fl.LogitClip(Softer(), 1e9)  # calls it
    torch.testing.assert_close(norm(logits, target), fl.GCELoss()(logits / 4.0, target))
    with pytest.raises(TypeError, match="got SmallerLoss, which overrides it"):
        fl.ClippedLoss(
            type("SmallerLoss", (fl.SmallLoss,), {"forward": Softer.forward, "__module__": __name__})("mae", 0.5), 1.0
        )


def test_errors_name_the_loss_inside_a_norm():
    logits, target, _, _ = problem()
    with pytest.raises((RuntimeError, ValueError), match="gce: sample_weight must"):
        fl.LogitNorm("gce")(logits, target, torch.ones(3))


def test_every_loss_can_be_compiled_in_one_process():
    """What is compiled too often is not compiled at all, counted by the code of forward."""
    logits, target, _, _ = problem()
    for name in ("mae", "gce", "agce", "aue", "ae", "rce", "sce", "taylor_ce", "js", "focal"):
        module = fl.LOSSES[name].module()
        torch.testing.assert_close(
            torch.compile(module, fullgraph=True, backend="eager")(logits, target), module(logits, target)
        )
