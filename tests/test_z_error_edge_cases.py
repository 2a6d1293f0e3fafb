"""Z-Error losses: decisions about odd rows and classes, thresholds, arguments."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from conftest import loss_and_grad

import fused_losses as fl
from fused_losses import functional, reference

# ---- Odd rows and classes --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "plain"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_where_no_score_is_finite_no_row_is_dropped(rows, reduction, module, device):
    """A network that has diverged would otherwise have a loss of 0, the best of all."""
    target = torch.arange(rows, device=device) % 3
    target[3::7] = -100
    counts = target >= 0
    labels = torch.where(counts, (target > 0).double(), math.nan)
    smoothed = fl.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], device=device), label_smoothing=0.1)
    given = fl.class_statistics(torch.randn(60, device=device), torch.arange(60, device=device) % 3, 3)
    both = fl.class_statistics(torch.randn(60, device=device), torch.arange(60, device=device) % 2, 2)
    shared = {"reduction": reduction, "return_mask": True}
    forms = [
        lambda x, options=options, base=base: module.z_error_cross_entropy(x, target, base=base, **options, **shared)
        for base in ("cross_entropy", "hem", smoothed)
        for options in (
            *({"statistic": statistic} for statistic in ("logit", "prob", "loss")),
            {"small_class": "drop"},
            {"statistics": given},
        )
    ]
    forms += [
        lambda x, options=options: module.z_error_bce_with_logits(x[:, 0], labels, **options, **shared)
        for options in ({}, {"space": "prob"}, {"small_class": "drop"}, {"statistics": both})
    ]
    for form in forms:
        for bad in (math.nan, math.inf):
            x = torch.full((rows, 3), bad, device=device, requires_grad=True)
            result = form(x)
            assert torch.equal(result.mask, counts) and result.scores.isnan().all()
            assert not (result.loss[counts] if reduction == "none" else result.loss).isfinite().any()
            grad = torch.autograd.grad(result.loss.sum(), x)[0]
            assert (grad[~counts] == 0).all()
            assert bad == math.inf or grad[counts].isnan().any(1).all()
            with torch.no_grad():
                torch.testing.assert_close(form(x).loss, result.loss, equal_nan=True)
            x.data[0] = 1.0
            with_one = form(x)
            assert not with_one.mask[1:].any() and with_one.loss.isfinite().all()
    infinite = torch.full((rows,), math.inf, device=device, requires_grad=True)
    for statistic in ("residual", "loss"):
        result = module.z_mse_loss(infinite, labels, statistic=statistic, **shared)
        assert torch.equal(result.mask, counts)
        assert not (result.loss[counts] if reduction == "none" else result.loss).isfinite().any()


@pytest.mark.parametrize("criterion", [fl.ZErrorCrossEntropyLoss, fl.ZErrorBCEWithLogitsLoss])
def test_a_diverged_network_has_no_finite_loss_in_eval(criterion, device):
    loss = criterion(running=True).to(device)
    target = torch.arange(60, device=device) % 2
    logits = torch.randn(60, 2, device=device)
    given = (logits, target) if criterion is fl.ZErrorCrossEntropyLoss else (logits[:, 0], target)
    assert loss(*given).isfinite()
    loss.eval()
    assert loss(*given).isfinite() and loss(given[0] * math.nan, target).isnan()


@pytest.mark.parametrize("statistic", ["logit", "prob", "loss"])
def test_dropped_rows_are_zero_for_any_upstream_gradient(statistic, device):
    torch.manual_seed(0)
    logits, target = torch.randn(60, 3, device=device), torch.randint(0, 3, (60,), device=device)
    target[::7] = -100
    labels = (target > 0).float()
    losses = [
        lambda x, reduction: functional.z_error_cross_entropy(
            x, target, threshold=1.0, statistic=statistic, reduction=reduction
        ),
        lambda x, reduction: functional.z_error_bce_with_logits(x[:, 0], labels, threshold=1.0, reduction=reduction),
        lambda x, reduction: functional.z_mse_loss(x[:, 0], x[:, 1].detach(), threshold=1.0, reduction=reduction),
    ]
    for loss in losses:
        _, expected = loss_and_grad(lambda x, _: loss(x, "none"), logits, target)
        dropped = ~expected.any(1)
        assert 5 < dropped.sum() < 40
        for value in (math.nan, math.inf):
            upstream = torch.where(dropped, value, 1.0)
            _, grad = loss_and_grad(lambda x, _: loss(x, "none"), logits, target, upstream)
            assert torch.equal(grad, expected)
            for reduction in ("mean", "sum"):
                upstream = torch.tensor(value, device=device)
                _, grad = loss_and_grad(lambda x, _, how=reduction: loss(x, how), logits, target, upstream)
                assert not grad[dropped].any() and not grad.isfinite().all()


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
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):  # in the paper's code 1e-8 is 0 in float16 and everything is dropped
        constant = module.z_mse_loss(torch.zeros(5, dtype=dtype), torch.full((5,), 3.0, dtype=dtype))
        assert constant.item() == 9.0


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "plain"])
def test_nothing_left_gives_zero(module, device):
    logits = torch.randn(3, 3, device=device, requires_grad=True)
    empty = torch.zeros(0, 3, device=device, requires_grad=True)
    losses = [
        (logits, module.z_error_cross_entropy(logits, torch.arange(3, device=device), small_class="drop")),
        (logits, module.z_error_cross_entropy(logits, torch.full((3,), -100, device=device))),
        (logits, module.z_error_bce_with_logits(logits, torch.full((3, 3), math.nan, device=device))),
        (empty, module.z_error_cross_entropy(empty, torch.zeros(0, dtype=torch.int64, device=device))),
        (empty, module.z_error_bce_with_logits(empty, torch.zeros(0, 3, device=device))),
        (empty, module.z_mse_loss(empty, torch.zeros(0, 3, device=device))),
    ]
    for options in ({"statistic": "target"}, {"statistic": "loss"}, {"statistic": "residual", "per_task": True}):
        losses.append((logits, module.z_mse_loss(logits, torch.full_like(logits, math.nan), **options)))
    for leaf, loss in losses:
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, leaf)[0] == 0).all()


def test_missing_labels_are_dropped(device):
    logits = torch.randn(40, device=device)
    labels = torch.arange(40, device=device) % 2.0
    labels[3:6] = math.nan
    result = functional.z_error_bce_with_logits(logits, labels, threshold=9.0, return_mask=True)
    assert result.mask.logical_not().nonzero().flatten().tolist() == [3, 4, 5]
    assert result.scores.isnan().nonzero().flatten().tolist() == [3, 4, 5]


def test_one_column_is_one_task(device):
    x, label = torch.randn(30, device=device), torch.arange(30, device=device) % 2
    losses = [
        functional.z_error_bce_with_logits(logits, target, threshold=1.0)
        for logits, target in ((x, label), (x[:, None], label), (x[:, None], label[:, None]))
    ]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


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


# ---- Thresholds and given statistics ---------------------------------------------------------------------------------


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
    logits = torch.tensor([2.5, 0.2, -1.1, 1.3, -2.0, 3.0], device=device)
    labels = torch.tensor([1, 1, 0, 1, 0, 1], device=device)
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


# ---- Arguments -------------------------------------------------------------------------------------------------------

X, T = torch.randn(6), torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fl.ZMSELoss(threshold=0.0), ValueError, "threshold must satisfy 0 < value <= inf, got 0.0"),
        (lambda: fl.ZMSELoss(threshold=math.nan), ValueError, "threshold must satisfy 0 < value <= inf, got nan"),
        (lambda: fl.ZMSELoss(num_tasks=3), ValueError, "num_tasks must be 1 without per_task=True, got 3"),
        (lambda: fl.ZMSELoss(statistic="mean"), ValueError, "statistic must be 'target', 'loss' or 'residual', got"),
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
        (lambda: functional.z_mse_loss(X, X * 1j), RuntimeError, "target must be float64"),
        (lambda: functional.z_mse_loss(X, X, sample_weight=X[:2]), ValueError, r"sample_weight must have shape \(6,\)"),
        (lambda: functional.z_mse_loss(X, X, threshold=torch.ones(3)), ValueError, "threshold must be 0-dim or hold"),
        (lambda: functional.z_error_bce_with_logits(X, T[:5]), ValueError, "target must have the shape of the input"),
        (lambda: functional.z_error_bce_with_logits(X[0], T[0]), ValueError, "logits must have .*, got a scalar"),
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
        (lambda: functional.z_error_cross_entropy(X.view(3, 2), T), ValueError, r"input batch_size \(3\) to match"),
        (
            lambda: functional.z_error_cross_entropy(X.view(3, 2), X[:3]),
            RuntimeError,
            "expected target dtype to be Long",
        ),
        (
            lambda: functional.z_error_cross_entropy(X.view(3, 2), T[:3], statistics=fl.class_statistics(X, T, 3)),
            ValueError,
            "statistics must be those of 2 classes, got 3",
        ),
        (lambda: functional.z_mse_loss(X, X, statistics=3), TypeError, "statistics must be ClassStatistics or None"),
        *(
            (call, RuntimeError, r"must be on the device of \w+ \(cpu\), got meta")
            for call in (
                lambda: functional.z_mse_loss(X, X.to("meta")),
                lambda: functional.z_mse_loss(X, X, sample_weight=X.to("meta")),
                lambda: functional.z_error_bce_with_logits(X, T.to("meta")),
                lambda: functional.z_error_bce_with_logits(X, T, threshold=torch.ones(2, device="meta")),
                lambda: functional.z_error_cross_entropy(X.view(3, 2), T[:3], threshold=torch.ones(2, device="meta")),
                lambda: fl.class_statistics(X, T.to("meta"), 2),
                lambda: fl.row_statistics(X.view(3, 2), T[:3].to("meta")),
            )
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["z_mse_loss", "z_error_bce_with_logits", "z_error_cross_entropy"])
def test_reference_has_the_same_signature(name):
    assert inspect.signature(getattr(functional, name)) == inspect.signature(getattr(reference, name))
    assert getattr(functional, name).__name__ == name and getattr(functional, name) is not getattr(reference, name)


def test_repr():
    assert repr(fl.ZMSELoss(1.5)) == "ZMSELoss(threshold=1.5, statistic='target')"
    shown = repr(fl.ZErrorCrossEntropyLoss(torch.tensor(2.0), base="gce", running=True))
    assert "threshold=2.0, statistic='logit', base='gce', sided='two', running=True)" in shown


# ---- Sizes: several pieces of work, tasks that fill vectors and that do not, strides ---------------------------------


@pytest.mark.parametrize(
    "shape", [(20_001,), (20_001, 1), (7001, 3), (301, 64), (140, 129), (67, 300), (3, 5000)], ids=str
)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("function", ["z_error_bce_with_logits", "z_mse_loss"])
def test_sizes(function, layout, shape, device):
    torch.manual_seed(0)
    x, target = 3 * torch.randn(shape, dtype=torch.float64), torch.randint(0, 2, shape).double()
    options = {"sample_weight": torch.rand(shape, dtype=torch.float64), "return_mask": True, "threshold": 1.1}
    if function == "z_error_bce_with_logits":
        target.view(-1)[::7] = math.nan
        options["pos_weight"] = torch.rand(shape[1] if len(shape) == 2 else 1, dtype=torch.float64)
    else:
        target, options["statistic"] = torch.randn(shape, dtype=torch.float64), "residual"
    if layout == "columns":
        x = x.t().contiguous().t()
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    results = []
    for module in (functional, reference):
        leaf = x.to(device).requires_grad_()
        result = getattr(module, function)(leaf, target.to(device), **options)
        (grad,) = torch.autograd.grad(result.loss, leaf)
        results.append((*result, grad))
    assert 0 < results[1][1].double().mean() < 1
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("shape", [(50_000,), (9000, 5), (300, 400)], ids=str)
@pytest.mark.parametrize("function", ["z_error_bce_with_logits", "z_mse_loss"])
def test_same_bits_for_any_number_of_threads(function, shape):
    torch.manual_seed(0)
    x, target = torch.randn(shape).requires_grad_(), torch.randint(0, 2, shape).float()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = getattr(functional, function)(x, target, threshold=1.1, return_mask=True)
            results.append((*result, *torch.autograd.grad(result.loss, x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
