"""Losses around losses and losses of known noise: values, shapes, rows that are ignored, masked or not finite."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GRAD_TOLERANCE, LOSS_TOLERANCE
from wrapped_losses import CASES, CLASSES, ROWS, TRANSITION, batch, expected, value_and_grad

import fused_losses as fl

NAMES = list(CASES)
CLASS_WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
SAMPLE_WEIGHT = torch.linspace(0.3, 1.7, ROWS, dtype=torch.float64)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("name", NAMES)
def test_by_the_published_formula(name):
    case = CASES[name]
    logits, target = batch()
    ones = torch.ones(CLASSES, dtype=torch.float64), torch.ones(ROWS, dtype=torch.float64)
    for weights in (ones, (CLASS_WEIGHT, SAMPLE_WEIGHT)):
        leaf = logits.clone().requires_grad_()
        right = expected(case, leaf, target, *weights)
        for reduction, value in right.items():
            module = case.make(weight=weights[0], reduction=reduction)
            found, grad = value_and_grad(case, module, logits, target, sample_weight=weights[1])
            torch.testing.assert_close(found, value.detach(), rtol=case.tolerance, atol=case.tolerance)
            right_grad = torch.autograd.grad(
                right["sum" if reduction == "none" else reduction], leaf, retain_graph=True
            )
            torch.testing.assert_close(grad, right_grad[0], rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_derivative(name):
    case = CASES[name]
    logits, target = batch(rows=4)
    module = case.make(weight=CLASS_WEIGHT, reduction="sum").eval()
    assert torch.autograd.gradcheck(lambda x: case(module, x, target), logits.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_images_and_single_rows(name):
    case = CASES[name]
    logits, target = batch()
    module = case.make(reduction="none")
    flat, grad = value_and_grad(case, module, logits, target)
    image = logits.t().reshape(1, CLASSES, 1, ROWS)
    found, of_image = value_and_grad(case, module, image, target.view(1, 1, ROWS))
    torch.testing.assert_close(found.flatten(), flat)
    torch.testing.assert_close(of_image.reshape(CLASSES, ROWS).t(), grad)
    one, of_one = value_and_grad(case, case.make(), logits[0], target[0])
    alone, of_row = value_and_grad(case, case.make(), logits[:1], target[:1])
    assert one.dim() == 0 and torch.equal(one, alone) and torch.equal(of_one, of_row[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_logits_give_a_float32_loss(name, dtype):
    case = CASES[name]
    logits, target = batch(dtype)
    for weight, samples in ((None, None), (CLASS_WEIGHT, SAMPLE_WEIGHT)):  # in float64
        module = case.make(weight=weight)
        exact, exact_grad = value_and_grad(case, module, logits.double(), target, sample_weight=samples)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, grad = value_and_grad(case, module, logits, target, sample_weight=samples)
        assert found.dtype == torch.float32 and grad.dtype == dtype
        assert (found - exact).abs() <= LOSS_TOLERANCE[dtype] * (1 + exact.abs())
        assert (grad.double() - exact_grad).abs().max() <= GRAD_TOLERANCE[dtype] * exact_grad.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_may_hold_anything(name):
    case = CASES[name]
    logits, target = batch()
    for reduction in ("none", "mean"):
        right = value_and_grad(case, case.make(reduction=reduction), logits, target)
        for value in (NAN, INF, -INF, 0.0):
            spoilt = logits.clone()
            spoilt[2] = value
            found, grad = value_and_grad(case, case.make(reduction=reduction), spoilt, target)
            assert torch.equal(found, right[0]) and torch.equal(grad, right[1]) and not grad[2].any()
    for value in (NAN, INF):  # the upstream gradient, too
        upstream = torch.ones(ROWS, dtype=logits.dtype)
        upstream[2] = value
        _, grad = value_and_grad(case, case.make(reduction="none"), logits, target, upstream=upstream)
        _, right = value_and_grad(case, case.make(reduction="none"), logits, target)
        torch.testing.assert_close(grad, right)
        assert not grad[2].any()
    nothing, grad = value_and_grad(case, case.make(), logits, torch.full_like(target, -100))
    assert nothing == 0 and not grad.any()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_not_finite_shows_and_touches_no_other(name, bad):
    case = CASES[name]
    logits, target = batch()
    logits[4, 1] = bad
    others = torch.arange(ROWS) != 4
    found, grad = value_and_grad(case, case.make(reduction="none"), logits, target)
    assert found[4].isnan() and found[others].isfinite().all() and grad[others].isfinite().all()
    assert grad[others & (target >= 0)].any(1).any()
    mean, grad = value_and_grad(case, case.make(), logits, target)
    assert mean.isnan() and grad[others].isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].masked])
def test_a_masked_class_is_a_class_that_is_not_there(name):
    case = CASES[name]
    logits, target = batch()
    target[target == 3] = 0
    logits[:, 3] = -INF
    found, grad = value_and_grad(case, case.make(reduction="none"), logits, target)
    there = target != -100
    values, kept = case.rows(logits[there], target[there], torch.ones(ROWS - 1))
    if "norm" not in name and "clip" not in name:  # their reference formula divides infinities
        torch.testing.assert_close(found[there], torch.where(kept, values, 0.0))
    assert found.isfinite().all() and grad.isfinite().all() and not grad[:, 3].any() and grad.any()


def test_the_norm_leaves_masked_classes_out():
    logits, target = batch()
    masked = torch.cat([logits, torch.full((ROWS, 2), -INF, dtype=torch.float64)], 1)
    for make in (lambda: fl.LogitNorm("gce", 0.4), lambda: fl.LogitClip("gce", 1.5)):
        torch.testing.assert_close(make()(masked, target), make()(logits, target))


def test_worked_by_hand():
    logits, target = torch.tensor([[3.0, 4.0]]), torch.tensor([1])
    # z / 5 / .5 = (1.2, 1.6) and 2.5 z / 5 = (1.5, 2): log(1 + e^-.4) and log(1 + e^-.5)
    assert fl.LogitNorm("cross_entropy", 0.5)(logits, target).item() == pytest.approx(0.5130152)
    assert fl.LogitClip("cross_entropy", 2.5)(logits, target).item() == pytest.approx(0.4740770)
    transition = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    even, first = torch.zeros(1, 2), torch.tensor([0])
    # q = .5 .8 + .5 .4 = .6; the inverse is ((1.5, -.5), (-1, 2)), and log 2 (1.5 - .5) = log 2
    assert fl.functional.forward_correction_loss(even, first, transition).item() == pytest.approx(-math.log(0.6))
    assert fl.functional.backward_correction_loss(even, first, transition).item() == pytest.approx(math.log(2))


def test_no_noise_is_cross_entropy():
    logits, target = batch()
    same = torch.eye(CLASSES, dtype=torch.float64)
    right = fl.CrossEntropyLoss()(logits, target)
    for loss in (fl.ForwardCorrectionLoss, fl.BackwardCorrectionLoss):
        torch.testing.assert_close(loss(same)(logits, target), right)
    torch.testing.assert_close(fl.LogitClip("cross_entropy", 1e6)(logits, target), right)


def test_corrections_keep_their_promises():
    """Backward: the mean over the noise is the clean loss. Forward: of a certain prediction q is the matrix's row."""
    logits, _ = batch()
    every = torch.arange(CLASSES).expand(ROWS, -1)
    noisy = torch.stack([fl.BackwardCorrectionLoss(TRANSITION, reduction="none")(logits, y) for y in every.t()], 1)
    clean = torch.stack([fl.CrossEntropyLoss(reduction="none")(logits, y) for y in every.t()], 1)
    torch.testing.assert_close(noisy @ TRANSITION.t(), clean)
    certain = torch.tensor([[60.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rows = torch.stack([fl.functional.forward_correction_loss(certain, y, TRANSITION) for y in every[0].view(4, 1)])
    torch.testing.assert_close(torch.exp(-rows), TRANSITION[0])


def test_forward_correction_keeps_its_digits_far_from_zero():
    z, target = batch(torch.float32, rows=40)
    for far in (z + 1e4, z - 1e4, 1e3 * z):
        found = fl.functional.forward_correction_loss(far, target, TRANSITION, reduction="none")
        exact = fl.functional.forward_correction_loss(far.double(), target, TRANSITION, reduction="none")
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_forward_correction_of_probabilities_that_underflow():
    logits = torch.tensor([[0.0, 300.0, 0.0, 0.0]], requires_grad=True)  # class 1 never has label 0
    loss = fl.functional.forward_correction_loss(logits, torch.tensor([0]), TRANSITION)
    wide = logits.detach().double().requires_grad_()
    log_q = torch.logsumexp(torch.log_softmax(wide, 1) + torch.log(TRANSITION[:, 0]), 1)
    torch.testing.assert_close(loss, -log_q.float().squeeze())
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(-log_q, wide)[0].float())


@pytest.mark.parametrize("name", ["forward_correction_loss", "backward_correction_loss"])
def test_gradients_flow_into_the_matrix(name):
    logits, target = batch(rows=4)
    function = getattr(fl.functional, name)
    matrix = (0.9 * TRANSITION + 0.025).requires_grad_()  # no zeros, where -log q has a kink
    assert torch.autograd.gradcheck(lambda x, t: function(x, target, t), (logits.requires_grad_(), matrix))
    assert function(logits, target, 2 * matrix).isfinite()  # where it is learnt, an optimiser's step may leave the sum


@pytest.mark.parametrize("name", ["forward_correction_loss", "backward_correction_loss"])
def test_a_matrix_of_another_dtype_leaves_that_of_the_loss(name):
    logits, target = batch()
    function = getattr(fl.functional, name)
    for matrix in (TRANSITION, (0.9 * TRANSITION + 0.025).requires_grad_()):
        found = function(logits.float(), target, matrix)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), function(logits, target, matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("off", [2.0**-52, 0.0])
def test_a_matrix_that_rounding_makes_singular_has_no_inverse(off):
    """Its condition number is 1 / off. Up to a tenth of what is refused it is inverted."""
    near = torch.tensor([[0.5, 0.5], [0.5 + off, 0.5 - off]], dtype=torch.float64)
    what = r"condition number 4\.5e\+15" if off else "it has no inverse"
    with pytest.raises(ValueError, match=rf"^transition must be invertible, got a singular matrix \({what}\)"):
        fl.BackwardCorrectionLoss(near)
    fl.BackwardCorrectionLoss(torch.tensor([[0.5, 0.5], [0.5 + 1e-14, 0.5 - 1e-14]], dtype=torch.float64))


@pytest.mark.parametrize("loss", [fl.ForwardCorrectionLoss, fl.BackwardCorrectionLoss])
def test_a_learnt_matrix(loss):
    torch.manual_seed(0)
    logits, target = batch(rows=40)
    matrix = fl.TransitionMatrix(CLASSES)
    criterion = loss(matrix)
    assert dict(criterion.named_parameters()).keys() == {"transition.weight"}
    before = matrix().detach()
    torch.testing.assert_close(before.sum(1), torch.ones(CLASSES))
    (criterion(logits, target) + 1e-4 * matrix.log_volume()).backward()
    assert matrix.weight.grad.any()
    torch.optim.SGD(criterion.parameters(), 10.0).step()
    after = matrix().detach()
    assert not torch.equal(after, before) and (after.diagonal() == after.amax(1)).all()
    torch.testing.assert_close(matrix.log_volume(), torch.linalg.det(after).abs().log())
    parameter = loss(torch.nn.Parameter(TRANSITION.clone()))
    parameter(logits, target).backward()
    assert parameter.transition.grad.any()
    torch.testing.assert_close(parameter(logits, target), loss(TRANSITION)(logits, target))


def test_volminnet_finds_the_matrix():
    """Wide classes, symmetric noise: only the matrix is trained, the predictions are the clean posteriors."""
    torch.manual_seed(0)
    clean = torch.arange(4).repeat(250)
    noisy = fl.noise.from_matrix(clean, TRANSITION).labels
    logits = 20.0 * torch.nn.functional.one_hot(clean, 4)
    matrix = fl.TransitionMatrix(4)
    criterion = fl.ForwardCorrectionLoss(matrix)
    optimizer = torch.optim.Adam(criterion.parameters(), 0.2)
    for _ in range(80):
        optimizer.zero_grad()
        (criterion(logits, noisy) + 1e-4 * matrix.log_volume()).backward()
        optimizer.step()
    assert (matrix().detach() - TRANSITION).abs().max() < 0.09  # 3 standard deviations of 250 draws


def test_bounds_that_the_docstrings_give():
    best = torch.tensor([[1e3, 0.0, 0.0, 0.0]], dtype=torch.float64)
    centred = best - best.mean()
    for module, length in ((fl.LogitNorm("cross_entropy", 0.4), 1 / 0.4), (fl.LogitClip("cross_entropy", 3.0), 3.0)):
        largest = 1 / (1 + 3 * math.exp(-length * math.sqrt(4 / 3)))
        assert module(centred, torch.tensor([0])).item() == pytest.approx(-math.log(largest))


def test_a_row_of_zeros():
    zeros = torch.zeros(1, CLASSES, requires_grad=True)
    loss = fl.LogitNorm("cross_entropy", 0.5)(zeros, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(CLASSES))
    torch.testing.assert_close(zeros.grad, 2e7 * torch.tensor([[0.25, -0.75, 0.25, 0.25]]))


def test_norms_around_other_losses():
    """Whatever is called with logits first: torch's losses, losses of the whole batch, the last layer's options."""
    logits, target = batch()
    criterion = fl.LogitNorm(torch.nn.CrossEntropyLoss(), 0.4)
    torch.testing.assert_close(criterion(logits, target), fl.LogitNorm("cross_entropy", 0.4)(logits, target))
    dropping = fl.ZErrorCrossEntropyLoss(1.0, ignore_index=-100)
    found = fl.LogitClip(dropping, 1.5)(logits, target, return_mask=True)
    torch.testing.assert_close(found.loss, dropping(fl.LogitClip("gce", 1.5).rescale(logits, target), target))
    spoilt = logits.clone()
    spoilt[0] = NAN
    other = fl.LogitNorm(fl.ZErrorCrossEntropyLoss(1.0, base=fl.GCELoss(ignore_index=int(target[0]))), 0.4)
    leaf = spoilt.requires_grad_()
    other(leaf, target.clamp(min=0)).backward()
    assert leaf.grad.isfinite().all()


def test_tensors_as_hyper_parameters_are_buffers():
    logits, target = batch()
    for make, name in ((lambda t: fl.LogitNorm("gce", t), "t"), (lambda t: fl.LogitClip("gce", t), "tau")):
        module = make(torch.tensor(0.5))
        assert name in module.state_dict()
        getattr(module, name).fill_(0.8)
        torch.testing.assert_close(module(logits, target), make(0.8)(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_in_half_precision(dtype):
    logits, target = batch()
    for matrix in (fl.TransitionMatrix(CLASSES).to(dtype), TRANSITION.to(dtype)):
        loss = fl.ForwardCorrectionLoss(matrix)
        loss.transition = loss.transition
        exact = fl.TransitionMatrix(CLASSES)() if isinstance(matrix, torch.nn.Module) else TRANSITION
        expected = fl.ForwardCorrectionLoss(exact.detach().double())(logits, target)
        torch.testing.assert_close(loss(logits, target).to(expected), expected, rtol=0.01, atol=0.01)


def test_a_fixed_matrix_is_saved_checked_and_kept_exact():
    logits, target = batch()
    other = torch.full_like(TRANSITION, 0.1) + 0.6 * torch.eye(CLASSES, dtype=torch.float64)
    for loss in (fl.ForwardCorrectionLoss, fl.BackwardCorrectionLoss):
        saved, fresh = loss(other).state_dict(), loss(TRANSITION)
        assert saved.keys() == {"transition"}
        fresh.load_state_dict(saved)
        torch.testing.assert_close(fresh(logits, target), loss(other)(logits, target))
        with pytest.raises(RuntimeError, match=r"transition must be >= 0 with rows that sum to 1, got a sum of 2 in"):
            fresh.load_state_dict({"transition": 2 * other}, strict=False)
        assert torch.equal(fresh.transition, other)
        with pytest.raises(RuntimeError, match="size mismatch for transition"):
            fresh.load_state_dict({"transition": torch.eye(CLASSES + 1)})
        torch.testing.assert_close(fresh(logits, target), loss(other)(logits, target))
        elsewhere = loss(TRANSITION).to("meta")  # as a checkpoint read on the CPU for a loss on a GPU
        with pytest.warns(UserWarning, match="transition"):  # nothing can be copied there
            elsewhere.load_state_dict(saved)
        assert all(buffer.is_meta for buffer in elsewhere.buffers())
        with torch.device("meta"):
            made_later = loss(torch.empty(CLASSES, CLASSES, dtype=torch.float64))
            assert loss(fl.TransitionMatrix(CLASSES)).transition.weight.is_meta
        made_later.load_state_dict(saved, assign=True)
        torch.testing.assert_close(made_later(logits, target), loss(other)(logits, target))
        assert loss(TRANSITION.numpy()).half().transition.dtype == torch.float64


SINGULAR = torch.full((CLASSES, CLASSES), 0.25)
WRONG = {
    "t": (ValueError, r"^t must satisfy 0 < value < inf, got -1", lambda z, y: fl.LogitNorm("gce", -1.0)),
    "tau": (ValueError, r"^tau must satisfy 0 < value < inf, got 0", lambda z, y: fl.LogitClip("gce", 0.0)),
    "t tensor": (ValueError, r"every entry of t must", lambda z, y: fl.LogitNorm("gce", torch.tensor(-1.0))),
    "name": (ValueError, r"^loss must be one of ", lambda z, y: fl.LogitNorm("nonsense")),
    "option": (ValueError, r"^q must be set on the Module", lambda z, y: fl.LogitNorm(fl.GCELoss(), q=0.5)),
    "square": (
        ValueError,
        r"^transition must be a tensor of shape",
        lambda z, y: fl.ForwardCorrectionLoss(SINGULAR[:3]),
    ),
    "sums": (ValueError, r"sum of 2 in row 0", lambda z, y: fl.ForwardCorrectionLoss(2 * SINGULAR)),
    "sums of a call": (
        ValueError,
        r"sum of 2 in row 0",
        lambda z, y: fl.functional.forward_correction_loss(z, y, 2 * SINGULAR),
    ),
    "NaN": (ValueError, r"sum of nan in row 0", lambda z, y: fl.ForwardCorrectionLoss(NAN * SINGULAR)),
    "negative": (
        ValueError,
        r"must be >= 0",
        lambda z, y: fl.ForwardCorrectionLoss(torch.tensor([[1.5, -0.5], [0, 1]])),
    ),
    "singular": (ValueError, r"^transition must be invertible, got", lambda z, y: fl.BackwardCorrectionLoss(SINGULAR)),
    "singular call": (
        ValueError,
        r"^transition must be invertible, got",
        lambda z, y: fl.functional.backward_correction_loss(z, y, SINGULAR),
    ),
    "classes": (
        ValueError,
        r"^transition must have shape \(4, 4\) as logits have classes, got \(2, 2\)",
        lambda z, y: fl.ForwardCorrectionLoss(torch.eye(2))(z, y),
    ),
    "no matrix": (TypeError, r"^transition must be", lambda z, y: fl.functional.forward_correction_loss(z, y, "gce")),
    "reduction": (
        ValueError,
        r"^reduction must be",
        lambda z, y: fl.ForwardCorrectionLoss(TRANSITION, reduction="max"),
    ),
    "target": (IndexError, r"Target 4 is out", lambda z, y: fl.ForwardCorrectionLoss(TRANSITION)(z, y * 0 + 4)),
    "probabilities": (
        RuntimeError,
        r"ForwardCorrectionLoss: target must hold class indices",
        lambda z, y: fl.ForwardCorrectionLoss(TRANSITION)(z, z.softmax(1)),
    ),
    "sample_weight": (
        RuntimeError,
        r"sample_weight must have one entry per row",
        lambda z, y: fl.ForwardCorrectionLoss(TRANSITION)(z, y, torch.ones(ROWS, 1)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call(*batch())
