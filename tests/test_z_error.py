"""Z-Error losses: the paper's numbers, masks, values and gradients against loops in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fused_losses as fl
from fused_losses import functional, reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
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


# ---- The paper's numbers ---------------------------------------------------------------------------------------------


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


# ---- Masks, losses and gradients against loops -----------------------------------------------------------------------


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
            # On CUDA one of them was written by forward, which divides before it multiplies by the weight.
            rounding = grad_tolerance(logits.dtype) if device == "cuda" else 0.0
            assert (grads[0] - grads[1]).abs().max() <= rounding * grads[1].abs().max()
            assert (grads[0][~result.mask] == 0).all()


@pytest.mark.parametrize("statistic", ["logit", "prob", "loss"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["cross_entropy", "smoothed", "gce", "hem", "bi_tempered"])
def test_same_result_with_and_without_gradients(name, reduction, weighted, statistic, device):
    """Masked rows first or rows first: the two orders of work, and plain PyTorch, agree."""
    torch.manual_seed(0)
    logits = (torch.randn(3000, 7, device=device) * 2).requires_grad_()
    target, samples = torch.randint(0, 7, (3000,), device=device), torch.rand(3000, device=device)
    logits.data[5], target[6], samples[7] = math.nan, -100, 0.0
    base, weight = name, torch.rand(7, device=device) if weighted else None
    if name == "smoothed":
        base = fl.CrossEntropyLoss(weight, label_smoothing=0.2, logit_bias=torch.tensor(0.7, device=device))
    options = {"sample_weight": samples} if weighted else {}
    if name != "smoothed":
        options["weight"] = weight
    options |= {"base": base, "statistic": statistic, "threshold": 1.3, "reduction": reduction, "return_mask": True}
    plain = reference.z_error_cross_entropy(logits, target, **options)
    with torch.no_grad():
        constant = functional.z_error_cross_entropy(logits, target, **options)
    result = functional.z_error_cross_entropy(logits, target, **options)
    assert 0.05 < (~result.mask).float().mean() < 0.5 and not result.mask[5:7].any()
    for other in (constant, result):
        assert torch.equal(other.mask, plain.mask)
        torch.testing.assert_close(other.scores, plain.scores, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(other.loss, plain.loss, rtol=1e-5, atol=1e-6)
    mine, theirs = (torch.autograd.grad(r.loss.sum(), logits)[0] for r in (result, plain))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_second_derivatives(dtype, device):
    """Of float16, whose backward recomputes, and of float64, whose forward writes the gradient."""
    torch.manual_seed(0)
    logits = torch.randn(40, 3, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, 3, (40,), device=device)
    seconds = []
    for module in (functional, reference):
        loss = module.z_error_cross_entropy(logits, target, base="gce", threshold=1.0, reduction="sum")
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), logits)[0])
    assert seconds[0].abs().max() > 0
    torch.testing.assert_close(*seconds)


def test_options_of_a_module_as_base(device):
    torch.manual_seed(0)
    logits, target = torch.randn(60, 4, device=device), torch.randint(0, 4, (60,), device=device)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], device=device)
    base = fl.GCELoss(q=0.5, weight=weight, ignore_index=2, logit_bias=1.0, reduction="sum").to(device)
    result = fl.ZErrorCrossEntropyLoss(1.0, base=base)(logits, target, return_mask=True)
    assert not result.mask[target == 2].any() and result.scores[target == 2].isnan().all()
    kept = torch.where(result.mask, target, 2)
    expected = functional.gce_loss(logits, kept, q=0.5, weight=weight, ignore_index=2, logit_bias=1.0)
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)
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


@pytest.mark.parametrize("module", [functional, reference])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8])
def test_squared_error_of_counts(dtype, module, device):
    """Integer targets, as nn.MSELoss takes them: exact where the input's own dtype would round them."""
    counts = torch.tensor([1, 2, 3, 2, 1, 101], dtype=dtype, device=device)
    for of_input in (torch.float64, torch.float32, torch.bfloat16):
        predicted = torch.zeros(6, dtype=of_input, device=device, requires_grad=True)
        for threshold, expected in ((1e6, F.mse_loss(predicted.double(), counts)), (2.0, 19.0 / 5.0)):
            loss = module.z_mse_loss(predicted, counts, threshold=threshold)
            assert loss.item() == pytest.approx(float(expected), rel=1e-6)
            assert torch.autograd.grad(loss, predicted)[0].dtype is of_input
