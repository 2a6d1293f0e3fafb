"""What people do with the loss of a wrapper, of several views or of a linear layer: the uses of test_autograd.py."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import test_autograd as uses
import torch
from conftest import one_in
from gloo_group import group_of_one
from wrapped_losses import CASES, CLASSES, batch

import fused_losses as fl
from fused_losses._autograd import give_away

pytestmark = pytest.mark.any_cpu  # of autograd, not of kernels

LINEAR = [f"linear {reduction}" for reduction in ("none", "sum", "mean")]
NAMES = [*CASES, "mixed", *LINEAR]
USES = [
    uses.plainly,
    uses.twice,
    uses.into_leaf_and_in_place,
    uses.batched,
    uses.batched_after_a_first,
    uses.checkpointed,
    uses.checkpointed_reentrantly,
    uses.offloaded,
    uses.through_hooks,
]


def make(name, target):
    """A loss of the logits alone; each has one state, which no call changes."""
    if name in LINEAR:
        options = {"reduction": name.split()[1], "chunk_bytes": 100}
        return lambda x: fl.functional.linear_loss(x, torch.eye(CLASSES, dtype=x.dtype), target, "gce", **options)
    if name == "mixed":
        return lambda x: fl.functional.mixed("gce", x, target, target.flip(0), 0.3)
    return functools.partial(lambda module, x: CASES[name](module, x, target), CASES[name].make().eval())


def plain_gradient(loss, logits, upstream):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf, upstream)[0]


@pytest.mark.parametrize(("name", "use"), one_in(2, NAMES, USES))
def test_gradient(name, use):
    logits, target = batch()
    loss = make(name, target)
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64) if name == "linear none" else torch.tensor(1.5).double()
    expected = plain_gradient(loss, logits, upstream)
    torch.testing.assert_close(use(loss, logits.clone().requires_grad_(), upstream), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_may_be_changed_by_its_owner(name):
    logits, target = batch()
    leaf = logits.requires_grad_()
    loss = make(name, target)(leaf)
    first, second = (torch.autograd.grad(loss, leaf, torch.ones_like(loss), retain_graph=True)[0] for _ in range(2))
    kept = first.clone()
    assert torch.equal(second, kept)
    second.mul_(3.0)
    assert torch.equal(torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0], kept)


@pytest.mark.parametrize("name", [*NAMES, "gce", "hem", "z_bce", "z_mse", "z_ce"])
def test_inference_mode_records_nothing(name):
    """As in torch, even where gradients are enabled within it."""
    logits, target = batch()
    if name in NAMES:
        loss = make(name, target)
    else:
        loss = uses.as_function_of_logits(name, target.clamp(min=0), "mean")
    leaf = logits.requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        value = loss(leaf)
    value = value if isinstance(value, torch.Tensor) else value.loss
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(leaf).detach())


@pytest.mark.parametrize("changed", ["target", "tau", "lam"])
def test_what_changed_in_between_is_noticed(changed):
    """A second derivative needs what the first does not."""
    logits, target = batch()
    target.clamp_(min=0)  # with ignored rows it is copied
    leaf, number = logits.requires_grad_(), torch.tensor(1.5)
    loss = {
        "target": lambda: fl.GJSLoss((0.5, 0.5))([leaf], target),
        "tau": lambda: fl.LogitClip("nce", number)(leaf, target),
        "lam": lambda: fl.ELRLoss(7, CLASSES, lam=number)(leaf, target, torch.arange(7)),
    }[changed]()
    (target if changed == "target" else number).fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_views_are_not_kept_when_the_graph_is_gone():
    """As tensors that a checkpoint or an offloading hook takes away."""
    views = [torch.randn(7, CLASSES, requires_grad=True) for _ in range(2)]
    loss = fl.GJSLoss((0.5, 0.3, 0.2))(views, torch.zeros(7, dtype=torch.long))
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += [child for child, _ in node.next_functions if child is not None]
    fused = [node for node in nodes if "FusedDivergence" in type(node).__name__]
    assert len(fused) == 1
    assert not any(isinstance(value, (torch.Tensor, fl._reference.Rows)) for value in _flat(vars(fused[0])))


@pytest.mark.parametrize("name", ["nce", "forward"])  # a loss whose logits are rescaled by a kernel of its own
@pytest.mark.parametrize("wrap", [fl.LogitNorm, fl.LogitClip])
def test_targets_are_not_kept_when_the_graph_is_gone(wrap, name):
    loss = fl.NCELoss() if name == "nce" else fl.ForwardCorrectionLoss(torch.eye(CLASSES))
    target = torch.zeros(7, dtype=torch.long)
    value = wrap(loss, 0.5)(torch.randn(7, CLASSES, requires_grad=True), target)
    value.backward()
    alive = weakref.ref(target)
    del target
    assert alive() is None


IN_A_GROUP = {
    "z cross entropy": lambda **options: fl.ZErrorCrossEntropyLoss(**options),
    "z bce": lambda **options: fl.ZErrorBCEWithLogitsLoss(**options),
    "z mse": lambda **options: fl.ZMSELoss(**options),
    "small": lambda **options: fl.SmallLoss("gce", 0.5, **options),
    "antidote": lambda **options: fl.Antidote("gce", 0.5, **options),
    "super": lambda **options: fl.SuperLoss("gce", **options),
}


@pytest.mark.parametrize("name", IN_A_GROUP)
def test_weights_of_a_mean_over_all_ranks_are_constants(name, tmp_path):
    """They are in its divisor, too, which has no derivative. Nothing is learnt from a call that is refused."""
    logits, target = torch.randn(7, CLASSES), torch.arange(7) % CLASSES
    if name in ("z bce", "z mse"):
        target = torch.nn.functional.one_hot(target, CLASSES).float()
    weight = torch.rand(7, requires_grad=True)
    with group_of_one(tmp_path):
        loss = IN_A_GROUP[name](running=True, process_group=torch.distributed.group.WORLD)
        loss(logits, target)
        before = loss.running_moments.clone()
        with pytest.raises(RuntimeError, match=r"^a mean over the rows of all ranks is not differentiable in"):
            loss(logits + 1.0, target + 1.0 if name == "z mse" else target, weight)
        assert torch.equal(loss.running_moments, before)
        with torch.no_grad():
            loss(logits, target, weight)
        loss.reduction = "sum"
        assert torch.autograd.grad(loss(logits, target, weight), weight)[0].abs().sum() > 0


def _flat(value):
    """What is in nested containers."""
    if isinstance(value, dict):
        value = list(value.values())
    return [inner for item in value for inner in _flat(item)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize(
    "make_criterion",
    [
        lambda: fl.SmallLoss("gce", 0.5, running=True),
        lambda: fl.ZErrorCrossEntropyLoss(running=True, num_classes=CLASSES),
    ],
)
def test_running_statistics_know_no_vmap(make_criterion):
    logits, target = batch()
    criterion = make_criterion()
    criterion(logits, target)

    def ensemble():
        return torch.func.vmap(lambda x: criterion(x, target))(torch.stack([logits, logits]))

    with pytest.raises(RuntimeError, match="updates its running statistics in training mode: call eval"):
        ensemble()
    criterion.eval()
    torch.testing.assert_close(ensemble()[1], criterion(logits, target))


def test_forward_mode_of_a_linear_layer_is_refused():
    logits, target = batch()
    loss = make("linear sum", target)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no form for"):
        loss(torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits)))


@pytest.mark.parametrize(
    "make_criterion", [lambda: fl.SmallLoss("cross_entropy", 0.5), lambda: fl.Antidote("gce", 0.5)]
)
def test_weights_have_no_gradient_from_rows_that_do_not_count(make_criterion):
    """Whatever the loss of such a row is: here infinite, and that of no row at all."""
    criterion = make_criterion()
    criterion.loss.weight = torch.nn.Parameter(torch.ones(CLASSES))
    logits = torch.zeros(3, CLASSES)
    logits[0, 0] = -torch.inf
    for target in (torch.tensor([0, 1, 1]), torch.full((3,), -100)):
        samples = torch.ones(3, requires_grad=True)
        for grad in torch.autograd.grad(criterion(logits, target, samples), (criterion.loss.weight, samples)):
            assert grad.isfinite().all()


def test_one_of_many_threads_is_given_the_gradient():
    gradient, upstream, interval = torch.ones(2, CLASSES), torch.ones(()), sys.getswitchinterval()
    contexts, start = [SimpleNamespace() for _ in range(3000)], threading.Barrier(4)

    def take(_):
        with torch.no_grad():
            return [start.wait() >= 0 and give_away(ctx, gradient, upstream) is not None for ctx in contexts]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(take, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert all(sum(taken) == 1 for taken in zip(*found, strict=True))
