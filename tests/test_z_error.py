"""Z-Error losses: the paper's numbers, masks against loops in numpy, odd rows and classes, gradients."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import fused_losses as fl
from fused_losses import functional, reference

OPS = torch.ops.fused_losses
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = ["z_mse_loss", "z_error_bce_with_logits", "z_error_cross_entropy"]
# The paper's demo
DEMO = torch.tensor([2.5, 0.2, -1.1, 1.3, -2.0, 3.0])
DEMO_LABELS = torch.tensor([1, 1, 0, 1, 0, 1])


def mask_by_loops(score, group, threshold, *, tail="both", min_count=2, keep_small=False, constant=True):
    """Which rows are kept, in float64; `threshold(group)`; `constant`: std below 1e-8 keeps all, else 1e-8 is added."""
    score, group = score.detach().double().cpu().numpy(), group.cpu().numpy()
    mask = np.zeros(score.shape, dtype=bool)
    for c in np.unique(group[group >= 0]):
        rows = (group == c) & np.isfinite(score)
        x = score[rows]
        if len(x) < max(min_count, 2):
            mask[rows] = keep_small
            continue
        std = x.std(ddof=1)
        if constant and std < 1e-8:
            mask[rows] = True
            continue
        z = (x - x.mean()) / (std if constant else std + 1e-8)
        mask[rows] = {"both": abs(z), "low": -z, "high": z}[tail] <= threshold(c)
    return torch.from_numpy(mask)


def check_loss(result, values, mask, weights, leaf, reduction="mean", rtol=1e-5, grad_rtol=1e-5):
    """Value and gradient of a result against plain row values of which `mask` is selected."""
    assert torch.equal(result.mask.cpu(), mask.cpu())
    mask = mask.to(values.device)
    kept = torch.where(mask, values * weights, 0.0)
    expected = kept if reduction == "none" else kept.sum()
    if reduction == "mean":
        expected = expected / torch.where(mask, weights, 0.0).sum()
    (grad,) = torch.autograd.grad(result.loss.sum(), leaf, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(result.loss.double(), expected.double(), rtol=rtol, atol=rtol)
    scale = expected_grad.abs().max().double()
    assert ((grad.double() - expected_grad.double()).abs() <= grad_rtol * scale + 1e-7).all()
    assert grad.dtype == leaf.dtype
    assert result.loss.dtype == (torch.float64 if leaf.dtype == torch.float64 else torch.float32)


def tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}[dtype]


def grad_tolerance(dtype):
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


# ---- The paper's numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "plain"])
@pytest.mark.parametrize(
    "threshold, loss, mask",
    [
        (1.1, 0.1565, [1, 0, 1, 1, 1, 1]),
        (1.3, 0.2301, [1, 1, 1, 1, 1, 1]),
        (2.0, 0.2301, [1, 1, 1, 1, 1, 1]),
        (0.5, 0.2410, [0, 0, 0, 1, 0, 0]),
    ],
)
def test_demo_of_the_paper(module, threshold, loss, mask, device):
    result = module.z_error_bce_with_logits(
        DEMO.to(device), DEMO_LABELS.to(device), threshold=threshold, return_mask=True
    )
    assert result.loss.item() == pytest.approx(loss, abs=5e-5)
    assert result.mask.int().tolist() == mask
    # Two classes of cross entropy with logits (0, x) are the same problem but for the mirror image of class 0.
    logits = torch.stack([-DEMO / 2, DEMO / 2], 1).to(device)
    two = module.z_error_cross_entropy(logits, DEMO_LABELS.to(device), threshold=threshold, return_mask=True)
    assert two.loss.item() == pytest.approx(loss, abs=5e-5) and torch.equal(two.mask, result.mask)


def test_scores_of_the_demo(device):
    scores = fl.ZErrorBCEWithLogitsLoss()(DEMO.to(device), DEMO_LABELS.to(device), return_mask=True).scores.cpu()
    for label in (0, 1):
        x = DEMO[label == DEMO_LABELS].double()
        torch.testing.assert_close(scores[label == DEMO_LABELS], (x - x.mean()) / x.std())


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "plain"])
def test_squared_error_by_hand(module, device):
    """Targets 1, 2, 3, 2, 1, 90: mean 16.5, std 36.0; z of the last is 2.04."""
    target = torch.tensor([1.0, 2, 3, 2, 1, 90], device=device)
    result = module.z_mse_loss(torch.zeros(6, device=device), target, return_mask=True)
    assert result.loss.item() == pytest.approx(3.8) and result.mask.tolist() == [True] * 5 + [False]
    assert module.z_mse_loss(torch.zeros(6, device=device), target, threshold=2.1).item() == pytest.approx(8119 / 6)


# ---- Masks, losses and gradients against loops ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("statistic", ["target", "loss", "residual"])
def test_squared_error(statistic, dtype, device):
    torch.manual_seed(0)
    target = torch.randn(5000, device=device).to(dtype)
    x = (target + torch.randn(5000, device=device) * 0.3).to(dtype).requires_grad_()
    weight = torch.rand(5000, device=device) + 0.5
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    residual = x.double() - target.double()
    score = {"target": target, "loss": residual**2, "residual": residual}[statistic]
    mask = mask_by_loops(score, torch.zeros(5000, dtype=torch.int64), lambda c: 1.5, constant=False)
    assert 0.05 < 1 - mask.float().mean() < 0.3
    for reduction in ("none", "mean", "sum"):
        options = {"statistic": statistic, "reduction": reduction, "sample_weight": weight, "threshold": 1.5}
        result = functional.z_mse_loss(x, target, **options, return_mask=True)
        values = (x.to(acc) - target.to(acc)) ** 2
        check_loss(result, values, mask, weight.to(acc), x, reduction, tolerance(dtype), grad_tolerance(dtype))
        plain = reference.z_mse_loss(x, target, **options, return_mask=True)
        check_loss(plain, values, mask, weight.to(acc), x, reduction, tolerance(dtype), grad_tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("space", ["logit", "prob"])
@pytest.mark.parametrize("sided", ["two", "lower"])
@pytest.mark.parametrize("tasks", [None, 1, 3])
def test_binary(tasks, sided, space, dtype, device):
    torch.manual_seed(0)
    shape = (900,) if tasks is None else (900, tasks)
    label = torch.randint(0, 2, shape).double()
    x = torch.randn(shape, dtype=torch.float64) * 1.5 + 2 * label - 1
    label.view(-1)[::17] = math.nan
    x, label = x.to(dtype).to(device).requires_grad_(), label.to(torch.float32).to(device)
    weight, pos_weight = torch.rand(900, device=device) + 0.5, torch.rand(tasks or 1, device=device) + 0.5
    score = x.double() if space == "logit" else torch.sigmoid(x.double())
    task = torch.arange(tasks or 1, device=device).expand(900, -1).reshape(shape)
    group = torch.where(label.isnan(), -1, 2 * task + label.nan_to_num().long())
    oriented = torch.where(label == 0, -score, score)
    mask = mask_by_loops(
        oriented if sided == "lower" else score,
        group,
        lambda c: (1.2, 1.4)[c % 2],
        tail="low" if sided == "lower" else "both",
    )
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = weight.to(acc).reshape([900] + [1] * (len(shape) - 1)).expand(shape)
    options = {"space": space, "sided": sided, "threshold": (1.2, 1.4), "sample_weight": weight}
    for reduction in ("none", "mean"):
        for module in (functional, reference):
            result = module.z_error_bce_with_logits(
                x, label, **options, pos_weight=pos_weight, reduction=reduction, return_mask=True
            )
            values = F.binary_cross_entropy_with_logits(
                x.to(acc), label.nan_to_num().to(acc), pos_weight=pos_weight.to(acc), reduction="none"
            )
            check_loss(result, values, mask, weights, x, reduction, tolerance(dtype), grad_tolerance(dtype))


@pytest.mark.parametrize("shape", [(600, 5), (4, 5, 12, 13)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("statistic", ["logit", "prob", "loss"])
@pytest.mark.parametrize("sided", ["two", "lower"])
def test_classes(sided, statistic, dtype, shape, device):
    torch.manual_seed(0)
    logits = (torch.randn(shape, dtype=torch.float64, device=device) * 2).to(dtype).requires_grad_()
    target = torch.randint(0, 5, shape[:1] + shape[2:], device=device)
    target.view(-1)[:7] = -100
    weight, samples = (torch.rand(n, dtype=torch.float64, device=device) + 0.5 for n in ((5,), target.shape))
    threshold = torch.tensor([0.8, 1.0, 1.2, 1.4, 1.6], dtype=torch.float64, device=device)
    options = {"weight": weight, "reduction": "none"}
    values = reference.gce_loss(logits, target, **options)
    plain_loss = functional.gce_loss(logits.detach(), target, reduction="none")
    picked = logits.detach().gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1).double()
    likelihood = torch.exp(-functional.cross_entropy(logits.detach(), target, reduction="none"))
    score = {"logit": picked, "prob": likelihood, "loss": plain_loss}[statistic]
    tail = "both" if sided == "two" else "high" if statistic == "loss" else "low"
    mask = mask_by_loops(score, target, lambda c: threshold[c].item(), tail=tail)
    weights = weight[target.clamp(min=0)] * samples
    result = functional.z_error_cross_entropy(
        logits,
        target,
        base="gce",
        statistic=statistic,
        sided=sided,
        threshold=threshold,
        weight=weight,
        sample_weight=samples,
        return_mask=True,
    )
    ones = torch.where(mask.to(device), values / weight[target.clamp(min=0)], 0.0)
    check_loss(result, ones, mask, weights, logits, "mean", tolerance(dtype) * 2, grad_tolerance(dtype))


@pytest.mark.parametrize("name", list(fl.LOSSES))
def test_every_row_loss_is_a_base(name, device):
    """Dropped rows count like ignored ones, in value and gradient; as a name, a function name and a Module."""
    torch.manual_seed(0)
    logits = (torch.randn(80, 4, device=device) * 2).requires_grad_()
    target, samples = torch.randint(0, 4, (80,), device=device), torch.rand(80, device=device) + 0.5
    entry = fl.LOSSES[name]
    for statistic in ("logit", "loss"):
        for base in (name, entry.function.__name__, entry.module()):
            module = fl.ZErrorCrossEntropyLoss(1.2, statistic, base).to(device)
            result = module(logits, target, samples, return_mask=True)
            kept = torch.where(result.mask, target, -100)
            assert 0 < result.mask.sum() < 80
            expected = entry.function(logits, kept, sample_weight=samples, reduction="mean")
            assert torch.equal(result.loss, expected)
            grads = [torch.autograd.grad(loss, logits)[0] for loss in (result.loss, expected)]
            assert torch.equal(*grads) and (grads[0][~result.mask] == 0).all()


def test_options_of_a_module_as_base(device):
    torch.manual_seed(0)
    logits, target = torch.randn(60, 4, device=device), torch.randint(0, 4, (60,), device=device)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], device=device)
    base = fl.GCELoss(q=0.5, weight=weight, ignore_index=2, logit_bias=1.0, reduction="sum").to(device)
    result = fl.ZErrorCrossEntropyLoss(1.0, base=base)(logits, target, return_mask=True)
    assert not result.mask[target == 2].any() and result.scores[target == 2].isnan().all()
    kept = torch.where(result.mask, target, 2)
    expected = functional.gce_loss(logits, kept, q=0.5, weight=weight, ignore_index=2, logit_bias=1.0)
    assert torch.equal(result.loss, expected)
    with pytest.raises(ValueError, match="weight must be set on the Module given as base"):
        fl.ZErrorCrossEntropyLoss(base=base, weight=weight)
    with pytest.raises(ValueError, match="ignore_index must be set on the Module given as base, got 1"):
        functional.z_error_cross_entropy(logits, target, base=base, ignore_index=1)


@pytest.mark.parametrize("layout", ["channels_last", "crop", "transposed"])
def test_strides(layout, device):
    torch.manual_seed(0)
    big = torch.randn(3, 5, 8, 9, device=device)
    logits = {
        "channels_last": big.to(memory_format=torch.channels_last),
        "crop": big[:, :, 1:6, 2:7],
        "transposed": big.transpose(2, 3),
    }[layout]
    target = torch.randint(0, 5, (3, *logits.shape[2:]), device=device)
    mine, plain = (
        f.z_error_cross_entropy(logits, target, threshold=1.0, return_mask=True) for f in (functional, reference)
    )
    torch.testing.assert_close(mine.loss, plain.loss)
    torch.testing.assert_close(mine.scores, plain.scores)
    x, y = big[:, :3, 0, 0].t(), (big[:, :3, 1, 1] > 0).t()
    torch.testing.assert_close(
        functional.z_error_bce_with_logits(x, y, threshold=1.0), reference.z_error_bce_with_logits(x, y, threshold=1.0)
    )
    torch.testing.assert_close(
        functional.z_mse_loss(big[:, 1:4, ::2, 3:], big[:, :3, 1::2, :6], threshold=1.0),
        reference.z_mse_loss(big[:, 1:4, ::2, 3:], big[:, :3, 1::2, :6], threshold=1.0),
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_index_types(dtype, device):
    torch.manual_seed(0)
    logits, target = torch.randn(100, 5, device=device), torch.randint(0, 5, (100,), device=device)
    assert torch.equal(
        functional.z_error_cross_entropy(logits, target.to(dtype), threshold=1.0),
        functional.z_error_cross_entropy(logits, target, threshold=1.0),
    )
    labels = (target > 2).to(dtype)
    assert torch.equal(
        functional.z_error_bce_with_logits(logits[:, 0], labels, threshold=1.0),
        functional.z_error_bce_with_logits(logits[:, 0], target > 2, threshold=1.0),
    )


# ---- Odd rows and classes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_row_touches_no_other(bad, device):
    torch.manual_seed(0)
    logits, target = torch.randn(40, 3, device=device), torch.randint(0, 3, (40,), device=device)
    poisoned = logits.clone()
    poisoned[5] = bad
    without = torch.arange(40, device=device) != 5
    for statistic in ("logit", "prob", "loss"):
        x, clean = poisoned.clone().requires_grad_(), logits[without].clone().requires_grad_()
        loss = functional.z_error_cross_entropy(x, target, threshold=1.5, statistic=statistic)
        expected = functional.z_error_cross_entropy(clean, target[without], threshold=1.5, statistic=statistic)
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, clean)[0]
        torch.testing.assert_close(grads[0][without], grads[1])
        assert (grads[0][5] == 0).all()
    labels = (target > 0).float()
    for space in ("logit", "prob"):
        x, clean = poisoned[:, 0].clone().requires_grad_(), logits[without, 0].clone().requires_grad_()
        loss = functional.z_error_bce_with_logits(x, labels, threshold=1.5, space=space)
        expected = functional.z_error_bce_with_logits(clean, labels[without], threshold=1.5, space=space)
        torch.testing.assert_close(loss, expected)
        grads = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, clean)[0]
        torch.testing.assert_close(grads[0][without], grads[1])
        assert grads[0][5] == 0
    for statistic, column in (("target", 1), ("loss", 0), ("residual", 0)):
        x, y = logits[:, 0].clone(), logits[:, 1].clone()
        (x if column == 0 else y)[5] = bad
        x.requires_grad_()
        loss = functional.z_mse_loss(x, y, threshold=1.5, statistic=statistic)
        expected = functional.z_mse_loss(logits[without, 0], logits[without, 1], threshold=1.5, statistic=statistic)
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.isfinite().all() and grad[5] == 0


def test_small_classes(device):
    """Class 0 has three rows, class 1 two, class 2 one; class 3 is absent."""
    logits = torch.randn(6, 4, device=device, generator=torch.Generator(device).manual_seed(0))
    target = torch.tensor([0, 0, 0, 1, 1, 2], device=device)
    mask = {}
    for min_count in (1, 2, 3, 4):
        for small_class in ("drop", "keep"):
            result = functional.z_error_cross_entropy(
                logits, target, min_count=min_count, small_class=small_class, return_mask=True
            )
            mask[min_count, small_class] = result.mask.int().tolist()
    assert mask[1, "drop"] == mask[2, "drop"] == [1, 1, 1, 1, 1, 0]  # one row never has a standard deviation
    assert mask[3, "drop"] == [1, 1, 1, 0, 0, 0]
    assert mask[4, "drop"] == [0] * 6
    assert all(mask[n, "keep"] == [1] * 6 for n in (1, 2, 3, 4))


def test_two_rows_are_kept_from_a_threshold_of_0_7071(device):
    logits, labels = torch.tensor([0.3, 5.0], device=device), torch.tensor([1, 1], device=device)
    for threshold, kept in ((0.7071, False), (0.7072, True)):
        result = functional.z_error_bce_with_logits(logits, labels, threshold=threshold, return_mask=True)
        assert result.mask.tolist() == [kept, kept]


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "plain"])
def test_constant_class_is_kept(module, device):
    logits = torch.tensor([0.1, 0.1, 0.1, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64, device=device)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1], device=device)
    result = module.z_error_bce_with_logits(logits, labels, threshold=0.5, return_mask=True)
    assert result.mask.tolist() == [True] * 3 + [False, True, True, False]
    for dtype in DTYPES:  # in the paper's code 1e-8 is 0 in float16 and everything is dropped
        constant = module.z_mse_loss(torch.zeros(5, dtype=dtype), torch.full((5,), 3.0, dtype=dtype))
        assert constant.item() == 9.0


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "plain"])
def test_nothing_left_gives_zero(module, device):
    one = torch.tensor([0.7], device=device, requires_grad=True)
    logits = torch.randn(3, 3, device=device, requires_grad=True)
    empty = torch.zeros(0, 3, device=device, requires_grad=True)
    losses = [
        (one, module.z_mse_loss(one, torch.ones(1, device=device))),
        (one, module.z_error_bce_with_logits(one, torch.ones(1, device=device))),
        (logits, module.z_error_cross_entropy(logits, torch.tensor([0, 1, 2], device=device))),
        (logits, module.z_error_bce_with_logits(logits, torch.full((3, 3), math.nan, device=device))),
        (empty, module.z_error_cross_entropy(empty, torch.zeros(0, dtype=torch.int64, device=device))),
        (empty, module.z_error_bce_with_logits(empty, torch.zeros(0, 3, device=device))),
        (empty, module.z_mse_loss(empty, torch.zeros(0, 3, device=device))),
    ]
    for leaf, loss in losses:
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, leaf)[0] == 0).all()


def test_soft_and_missing_labels_are_dropped(device):
    logits = torch.randn(40, device=device)
    labels = torch.arange(40, device=device) % 2.0
    labels[3], labels[4], labels[5] = 0.5, math.nan, 2.0
    result = functional.z_error_bce_with_logits(logits, labels, threshold=9.0, return_mask=True)
    assert result.mask.logical_not().nonzero().flatten().tolist() == [3, 4, 5]
    assert result.scores.isnan().nonzero().flatten().tolist() == [3, 4, 5]


def test_targets_out_of_range_are_reported():
    logits = torch.randn(6, 3)
    for statistic in ("logit", "prob", "loss"):
        with pytest.raises(IndexError, match="Target 3 is out of bounds"):
            functional.z_error_cross_entropy(logits, torch.tensor([0, 0, 1, 1, 2, 3]), statistic=statistic)


def test_ignore_index_that_is_a_class(device):
    torch.manual_seed(0)
    logits, target = torch.randn(50, 3, device=device), torch.randint(0, 3, (50,), device=device)
    rows = target != 1
    result = functional.z_error_cross_entropy(logits, target, threshold=1.2, ignore_index=1, return_mask=True)
    other = functional.z_error_cross_entropy(logits[rows], target[rows], threshold=1.2, return_mask=True)
    torch.testing.assert_close(result.loss, other.loss)
    assert torch.equal(result.mask[rows], other.mask) and not result.mask[~rows].any()


# ---- Thresholds and given statistics --------------------------------------------------------------------------------


def test_forms_of_a_threshold(device):
    torch.manual_seed(0)
    logits, target = torch.randn(90, 3, device=device), torch.randint(0, 3, (90,), device=device)
    forms = [1.25, torch.tensor(1.25, device=device), torch.full((3,), 1.25, device=device), torch.tensor(1.25)]
    losses = [functional.z_error_cross_entropy(logits, target, threshold=form) for form in forms]
    losses.append(fl.ZErrorCrossEntropyLoss([1.25] * 3).to(device)(logits, target))
    assert all(torch.equal(losses[0], loss) for loss in losses)
    labels = (torch.randn(90, 3, device=device) > 0).float()
    table = torch.tensor([[1.0, 1.5]] * 3, device=device)
    forms = [(1.0, 1.5), table[0], table, table.flatten()]
    losses = [functional.z_error_bce_with_logits(logits, labels, threshold=form) for form in forms]
    assert all(torch.equal(losses[0], loss) for loss in losses)
    assert not torch.equal(losses[0], functional.z_error_bce_with_logits(logits, labels, threshold=(1.5, 1.0)))


def test_a_tensor_threshold_is_a_buffer_and_takes_effect(device):
    logits, labels = DEMO.to(device), DEMO_LABELS.to(device)
    module = fl.ZErrorBCEWithLogitsLoss(torch.tensor(1.1)).to(device)
    assert "threshold" in module.state_dict()
    assert module(logits, labels).item() == pytest.approx(0.1565, abs=5e-5)
    module.threshold.fill_(1.3)
    assert module(logits, labels).item() == pytest.approx(0.2301, abs=5e-5)


def test_given_statistics_replace_the_batchs(device):
    torch.manual_seed(0)
    logits, target = torch.randn(200, 3, device=device), torch.randint(0, 3, (200,), device=device)
    statistics = fl.class_statistics(logits, target, 3)
    whole = functional.z_error_cross_entropy(logits, target, threshold=1.0, return_mask=True)
    for module in (functional, reference):
        part = module.z_error_cross_entropy(
            logits[:10], target[:10], threshold=1.0, statistics=statistics, return_mask=True
        )
        assert torch.equal(part.mask, whole.mask[:10])


# ---- Running statistics ---------------------------------------------------------------------------------------------


def test_running_statistics_start_with_the_first_batch(device):
    torch.manual_seed(0)
    logits, target = torch.randn(64, 4, device=device), torch.randint(0, 4, (64,), device=device)
    running, plain = fl.ZErrorCrossEntropyLoss(1.2, running=True), fl.ZErrorCrossEntropyLoss(1.2)
    assert torch.equal(running(logits, target), plain(logits, target))
    expected = fl.class_statistics(logits, target, 4)
    torch.testing.assert_close(running.running_statistics.mean, expected.mean)
    torch.testing.assert_close(running.running_statistics.std, expected.std)


def test_running_statistics_are_a_fading_merge(device):
    """Two batches: the first one's rows weigh 1 - momentum. Class 2 is in the first only and keeps what it has."""
    torch.manual_seed(0)
    first, second = torch.randn(30, 3, device=device), torch.randn(20, 3, device=device) + 1
    y1, y2 = torch.arange(30, device=device) % 3, torch.arange(20, device=device) % 2
    module = fl.ZErrorCrossEntropyLoss(running=True, momentum=0.25)
    module(first, y1)
    module(second, y2)
    x1, x2 = (z.double().gather(1, y.unsqueeze(1)).squeeze(1) for z, y in ((first, y1), (second, y2)))
    for c in (0, 1):
        x = torch.cat([x1[y1 == c], x2[y2 == c]])
        weight = torch.cat([torch.full((10,), 0.75), torch.ones(10)]).to(x)
        mean = (weight * x).sum() / weight.sum()
        # Each part's spread fades around its own mean; what lies between the means is added.
        m2 = (weight * (x - mean) ** 2).sum()
        torch.testing.assert_close(module.running_statistics.count[c], weight.sum())
        torch.testing.assert_close(module.running_statistics.mean[c], mean)
        torch.testing.assert_close(module.running_statistics.std[c], (m2 / (weight.sum() - 1)).sqrt())
    torch.testing.assert_close(module.running_statistics.mean[2], x1[y1 == 2].mean())
    torch.testing.assert_close(module.running_statistics.count[2], x1.new_tensor(10.0))


def test_momentum_zero_forgets_nothing():
    torch.manual_seed(0)
    logits, target = torch.randn(300, 3), torch.randint(0, 3, (300,))
    module = fl.ZErrorCrossEntropyLoss(running=True, momentum=0.0)
    for part in range(0, 300, 50):
        module(logits[part : part + 50], target[part : part + 50])
    torch.testing.assert_close(module.running_statistics.std, fl.class_statistics(logits, target, 3).std)


def test_running_statistics_find_what_a_small_batch_cannot():
    """Three rows a class never exceed z = 1.155."""
    torch.manual_seed(0)
    small, running = fl.ZErrorCrossEntropyLoss(), fl.ZErrorCrossEntropyLoss(running=True)
    target = torch.arange(4).repeat(3)
    for _ in range(40):
        running(F.one_hot(target, 4) * 4.0 + torch.randn(12, 4) * 0.3, target)
    logits = F.one_hot(target, 4) * 4.0
    logits[2] = torch.tensor([4.0, 0.0, -4.0, 0.0])
    assert small(logits, target, return_mask=True).mask.all()
    assert running(logits, target, return_mask=True).mask.logical_not().nonzero().flatten().tolist() == [2]


def test_running_statistics_in_eval_and_state_dict(device):
    torch.manual_seed(0)
    logits, target = torch.randn(64, 4, device=device), torch.randint(0, 4, (64,), device=device)
    module = fl.ZErrorCrossEntropyLoss(1.2, running=True)
    module(logits, target)
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = module(logits * 3, target, return_mask=True)
    assert torch.equal(module.state_dict()["running_moments"], before["running_moments"])
    restored = fl.ZErrorCrossEntropyLoss(1.2, running=True).to(device)
    restored.load_state_dict(before)
    restored.eval()
    assert torch.equal(restored(logits * 3, target, return_mask=True).mask, other.mask)
    assert module.half().running_moments.dtype == torch.float64
    fresh = fl.ZErrorCrossEntropyLoss(running=True).eval()
    assert fresh(logits, target) == 0  # nothing is known of any class
    with pytest.raises(ValueError, match="running statistics are those of 4 classes, got a batch with 3"):
        module.train()(logits[:, :3], target.clamp(max=2))
    with pytest.raises(RuntimeError, match="only with running=True"):
        _ = fl.ZMSELoss().running_statistics


def test_running_statistics_of_the_other_losses(device):
    torch.manual_seed(0)
    x, y = torch.randn(2, 80, device=device)
    for module, target in ((fl.ZMSELoss(running=True), y), (fl.ZErrorBCEWithLogitsLoss(running=True), y > 0)):
        for _ in range(2):
            assert module(x, target).isfinite()
        assert module.running_statistics.count.sum() == pytest.approx(80 * 1.9)


# ---- Derivatives ----------------------------------------------------------------------------------------------------


def test_gradcheck():
    """Finite differences see the mask move with the statistics only if a row crosses the threshold: none is close."""
    torch.manual_seed(2)
    x = torch.randn(12, dtype=torch.float64, requires_grad=True)
    y = torch.randn(12, dtype=torch.float64)
    for f in (
        lambda x: functional.z_mse_loss(x, y, threshold=1.1),
        lambda x: functional.z_mse_loss(x, y, threshold=1.1, statistic="residual", reduction="none"),
        lambda x: functional.z_error_bce_with_logits(x, y > 0, threshold=1.1, pos_weight=torch.tensor(2.0).double()),
        lambda x: functional.z_error_cross_entropy(x.view(6, 2), (y > 0)[:6].long(), threshold=0.9, base="gce"),
    ):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


def test_other_inputs_are_differentiable():
    torch.manual_seed(2)
    x, y = torch.randn(2, 12, dtype=torch.float64)
    w, p = torch.rand(12, dtype=torch.float64, requires_grad=True), torch.tensor([1.5], dtype=torch.float64)
    p.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: functional.z_mse_loss(x, y, threshold=1.1, sample_weight=w), w)
    assert torch.autograd.gradcheck(
        lambda p: functional.z_error_bce_with_logits(x, y > 0, threshold=1.1, pos_weight=p), p
    )
    t = y.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: functional.z_mse_loss(x, t, threshold=1.1), t)


def test_function_transforms():
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, dtype=torch.float64)
    logits, target = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 3, (30,))
    for f, z in (
        (lambda z: functional.z_mse_loss(z, y, threshold=1.2), x),
        (lambda z: functional.z_error_bce_with_logits(z, y > 0, threshold=1.2), x),
        (lambda z: functional.z_error_cross_entropy(z, target, threshold=1.2), logits),
    ):
        leaf = z.clone().requires_grad_()
        torch.testing.assert_close(torch.func.grad(f)(z), torch.autograd.grad(f(leaf), leaf)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no batching rule: torch loops and says so
            torch.testing.assert_close(torch.func.vmap(f)(torch.stack([z, z * 2])), torch.stack([f(z), f(z * 2)]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_stride_zero_and_scaled_upstream(reduction, device):
    x = torch.randn(50, device=device, requires_grad=True)
    loss = functional.z_error_bce_with_logits(x, x.detach() > 0, threshold=1.0, reduction=reduction)
    (ones,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, x, torch.full_like(loss, 8.0))
    torch.testing.assert_close(scaled, ones * 8)


def test_same_bits_for_any_number_of_threads():
    torch.manual_seed(0)
    x, y = torch.randn(2, 30_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            loss = functional.z_error_bce_with_logits(leaf, y > 0, threshold=1.2)
            results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    torch.manual_seed(0)
    x, y = torch.randn(2, 12)
    w, target = torch.rand(12), torch.arange(12) % 3
    moments = OPS.class_moments(x, target, 3)
    rule = (None, [1.1], "both", 2, False)
    score = torch.randn(12, 3, requires_grad=True)
    for arguments in ((x, target, moments, *rule, -100, True), (score, target, moments, *rule, -100, False)):
        assert set(opcheck(OPS.z_error_mask.default, arguments).values()) == {"SUCCESS"}
    for statistic, target in (("mse_loss", y), ("bce_logit", (y > 0).float())):
        groups = 1 if statistic == "mse_loss" else 2
        moments = OPS.class_moments(x, target, groups, statistic)
        for reduction in ("none", "mean"):
            arguments = (moments, None, w, None, [1.1], statistic, "both", 2, False, True, reduction)
            leaf = x.clone().requires_grad_()
            assert set(opcheck(OPS.z_error_loss.default, (leaf, target, *arguments)).values()) == {"SUCCESS"}
            loss, denominator, mask, _ = OPS.z_error_loss(x, target, *arguments)
            backward = (torch.ones_like(loss), denominator, mask, x, target, None, w, statistic, reduction)
            assert set(opcheck(OPS.z_error_loss_backward.default, backward).values()) == {"SUCCESS"}


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda running: fl.ZMSELoss(1.2, running=running),
        lambda running: fl.ZErrorBCEWithLogitsLoss((1.2, 1.3), running=running),
        lambda running: fl.ZErrorCrossEntropyLoss(torch.tensor(1.2), running=running),
        lambda running: fl.ZErrorCrossEntropyLoss(1.2, "loss", fl.GCELoss(q=0.4), running=running),
        lambda running: fl.ZErrorCrossEntropyLoss(1.2, "prob", "mae", running=running),
    ],
    ids=["mse", "bce", "logit", "loss", "prob"],
)
def test_compile_fullgraph(make, running):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, other = make(running), make(running)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    classes = isinstance(module, fl.ZErrorCrossEntropyLoss)
    for rows in (40, 50, 60):
        x = torch.randn(rows, 4, requires_grad=True) if classes else torch.randn(rows, requires_grad=True)
        y = torch.randint(0, 4, (rows,)) if classes else torch.arange(rows) % 2.0
        results = [f(x, y, return_mask=True) for f in (compiled, module)]
        assert torch.equal(results[0].mask, results[1].mask)
        torch.testing.assert_close(results[0].loss, results[1].loss)
        grads = [torch.autograd.grad(result.loss, x)[0] for result in results]
        torch.testing.assert_close(*grads)


# ---- Arguments ------------------------------------------------------------------------------------------------------

X, T = torch.randn(6), torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fl.ZMSELoss(threshold=0.0), ValueError, "threshold must satisfy 0 < value < inf, got 0.0"),
        (lambda: fl.ZMSELoss(threshold=math.nan), ValueError, "threshold must satisfy 0 < value < inf, got nan"),
        (lambda: fl.ZMSELoss(statistic="mean"), ValueError, "statistic must be 'target' or 'loss' or 'residual', got"),
        (lambda: fl.ZMSELoss(reduction="avg"), ValueError, "reduction must be"),
        (lambda: fl.ZMSELoss(running=True, momentum=2.0), ValueError, "momentum must be between"),
        (lambda: fl.ZErrorBCEWithLogitsLoss(space="p"), ValueError, "space must be 'logit' or 'prob', got 'p'"),
        (lambda: fl.ZErrorBCEWithLogitsLoss(sided="upper"), ValueError, "sided must be 'two' or 'lower', got 'upper'"),
        (lambda: fl.ZErrorBCEWithLogitsLoss((1.0, -1.0)), ValueError, "threshold must satisfy"),
        (lambda: fl.ZErrorBCEWithLogitsLoss(small_class="x"), ValueError, "small_class must be 'drop' or 'keep'"),
        (lambda: fl.ZErrorCrossEntropyLoss(min_count=0), ValueError, "min_count must be an integer >= 1, got 0"),
        (lambda: fl.ZErrorCrossEntropyLoss([2.0, 0.0]), ValueError, "threshold must satisfy"),
        (lambda: fl.ZErrorCrossEntropyLoss(base="hinge"), ValueError, "base must be one of cross_entropy, .*'hinge'"),
        (lambda: fl.ZErrorCrossEntropyLoss(base=torch.nn.CrossEntropyLoss()), TypeError, "base must be the name of"),
        (lambda: fl.ZErrorCrossEntropyLoss(torch.tensor(2)), ValueError, "threshold must be floating point"),
        (lambda: functional.z_mse_loss(X, X[:, None]), ValueError, "target must have the shape of the input"),
        (lambda: functional.z_mse_loss(X, T), RuntimeError, "target must be float64"),
        (lambda: functional.z_mse_loss(X, X, sample_weight=X[:2]), ValueError, r"sample_weight must have shape \(6,\)"),
        (lambda: functional.z_mse_loss(X, X, threshold=torch.ones(3)), ValueError, "threshold must be 0-dim or hold"),
        (lambda: functional.z_error_bce_with_logits(X, T[:5]), ValueError, "target must have the shape of the input"),
        (lambda: functional.z_error_bce_with_logits(X.view(1, 2, 3), T.view(1, 2, 3)), ValueError, "logits must have"),
        (
            lambda: functional.z_error_bce_with_logits(X.view(3, 2), T.view(3, 2), pos_weight=torch.ones(3)),
            ValueError,
            r"pos_weight must hold one number or one per task \(2\), got shape \[3\]",
        ),
        (
            lambda: functional.z_error_cross_entropy(X.view(3, 2), T[:3], threshold=torch.ones(3)),
            ValueError,
            "threshold must be 0-dim or hold one number per class",
        ),
        (lambda: functional.z_error_cross_entropy(X.view(3, 2), T), ValueError, "target must have the shape of the lo"),
        (lambda: functional.z_error_cross_entropy(X.view(3, 2), X[:3]), RuntimeError, "target must hold class indices"),
        (
            lambda: functional.z_error_cross_entropy(X.view(3, 2), T[:3], statistics=fl.class_statistics(X, T, 3)),
            ValueError,
            "num_classes must be that of the logits, 2, got 3",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_has_the_same_signature(name):
    import inspect

    assert inspect.signature(getattr(functional, name)) == inspect.signature(getattr(reference, name))
    assert getattr(functional, name).__name__ == name and getattr(functional, name) is not getattr(reference, name)


def test_repr():
    assert repr(fl.ZMSELoss(1.5)) == "ZMSELoss(threshold=1.5, statistic='target')"
    shown = repr(fl.ZErrorCrossEntropyLoss(torch.tensor(2.0), base="gce", running=True))
    assert "threshold=2.0, running=True, momentum=0.1, statistic='logit', base='gce', sided='two'" in shown
