"""High error margin and multi-class margin losses: worked numbers, torch's loss, ties, margins, reductions."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import loss_and_grad

import fused_losses as fl

MADE = ["function", "reference"]
VARIANTS = [
    ("hem", {}),
    ("hem", {"margin": 0.0}),
    ("multi_margin", {}),
    ("multi_margin", {"mean_above_zero": True}),
    ("multi_margin", {"threshold": True}),
    ("multi_margin", {"mean_above_zero": True, "threshold": True}),
    ("multi_margin", {"p": 2}),
]


def make_rows(device, shape=(60, 7), dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    rows = shape[:1] + shape[2:]
    return logits.to(dtype).to(device), torch.randint(0, shape[1], rows, generator=generator).to(device)


def row_by_row(name, logits, target, margin=None, mean_above_zero=False, threshold=False, p=1):
    """The definition in scalar arithmetic: value, number of counted errors and gradient of one row (a list)."""
    if name == "hem":
        mean_above_zero = threshold = True
    margin = (0.2 if name == "hem" else 1.0) if margin is None else margin
    margins = margin if isinstance(margin, list) else [margin] * len(logits)
    errors = [
        0.0 if j == target else max(0.0, z - logits[target] + mu)
        for j, (z, mu) in enumerate(zip(logits, margins, strict=True))
    ]
    least = sum(errors) / len(errors) if threshold else 0.0
    counted = [j for j, e in enumerate(errors) if e >= least and e > 0]
    divisor = len(counted) + 1e-6 if mean_above_zero else len(logits)
    grad = [p * errors[j] ** (p - 1) / divisor if j in counted else 0.0 for j in range(len(logits))]
    grad[target] = -sum(grad)
    return sum(errors[j] ** p for j in counted) / divisor, grad


@pytest.mark.parametrize("name, parameters", VARIANTS)
@pytest.mark.parametrize("made", MADE)
def test_matches_the_definition(made, name, parameters, device):
    logits, target = make_rows(device)
    loss, grad = loss_and_grad(getattr(fl.LOSSES[name], made), logits, target, reduction="none", **parameters)
    expected = [row_by_row(name, z, y, **parameters) for z, y in zip(logits.tolist(), target.tolist(), strict=True)]
    values = torch.tensor([value for value, _ in expected], dtype=torch.float64, device=device)
    grads = torch.tensor([row for _, row in expected], dtype=torch.float64, device=device)
    torch.testing.assert_close(loss, values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, grads, rtol=1e-12, atol=1e-14)
    assert (values == 0).any()  # rows that satisfy their margins were among them
    mean = getattr(fl.LOSSES[name], made)(logits, target, reduction="mean", **parameters)
    torch.testing.assert_close(mean, values.mean())
    active = getattr(fl.LOSSES[name], made)(logits, target, reduction="active_mean", **parameters)
    torch.testing.assert_close(active, values.sum() / ((values > 0).sum().item() + 1e-6), rtol=1e-12, atol=0)


@pytest.mark.parametrize("made", MADE)
def test_worked_example(made, device):
    # Errors [0, 0, 0.5, 0.3]: mean 0.2, HEM 0.4, multi-margin 0.2.
    logits = torch.tensor([[0.0, -4.0, 0.3, 0.1]], dtype=torch.float64, device=device)
    target = torch.tensor([0], device=device)
    hem = getattr(fl.LOSSES["hem"], made)(logits, target)
    assert hem.item() == pytest.approx(0.8 / (2 + 1e-6) / (1 + 1e-6), rel=1e-12)
    assert hem.item() == pytest.approx(0.4, abs=1e-6)
    multi_margin = getattr(fl.LOSSES["multi_margin"], made)
    assert multi_margin(logits, target, margin=0.2).item() == pytest.approx(0.2, rel=1e-12)
    thresholded = multi_margin(logits, target, margin=0.2, threshold=True)
    assert thresholded.item() == pytest.approx(0.2, rel=1e-12)
    both = multi_margin(logits, target, margin=0.2, threshold=True, mean_above_zero=True)
    assert both.item() == hem.item()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("margin, p", [(0.0, 1), (0.2, 1), (1.0, 1), (3.0, 1), (0.0, 2), (1.0, 2)])
@pytest.mark.parametrize("made", MADE)
def test_multi_margin_is_torchs(made, margin, p, reduction, device):
    logits, target = make_rows(device)
    torchs = torch.nn.MultiMarginLoss(p=p, margin=margin, reduction=reduction)
    ours = getattr(fl.LOSSES["multi_margin"], made)
    expected = loss_and_grad(torchs, logits, target)
    # torch counts errors of exactly 0, too; random logits have none
    actual = loss_and_grad(ours, logits, target, margin=margin, p=p, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    weight = torch.rand(7, dtype=torch.float64, device=device)
    rows = ours(logits, target, margin=margin, p=p, reduction="none", weight=weight)
    torch.testing.assert_close(
        rows, torch.nn.MultiMarginLoss(p=p, margin=margin, reduction="none", weight=weight)(logits, target)
    )


@pytest.mark.parametrize("shape", [(70, 7), (9, 257), (3, 7, 4, 5)])
@pytest.mark.parametrize("reduction", ["none", "mean", "active_mean"])
def test_squared_errors_in_float32(shape, reduction, device):
    logits, target = make_rows(device, shape)
    margin = torch.rand(shape[1], generator=torch.Generator().manual_seed(3)).to(device)
    entry, options = fl.LOSSES["multi_margin"], {"p": 2, "margin": margin, "reduction": reduction}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        rounded = logits.to(dtype)
        expected = loss_and_grad(entry.reference, rounded.double(), target, **options)
        actual = loss_and_grad(entry.function, rounded, target, **options)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance * y.abs().max().item())


@pytest.mark.parametrize("classes", [3, 300])
def test_squares_that_overflow(classes, device):
    """An infinite loss of finite logits has torch's gradient; a masked target has an infinite one."""
    logits = torch.zeros(3, classes, device=device)
    logits[0, 1] = 1e30
    logits[1, 0] = -math.inf
    logits[2, :] = -math.inf
    target = torch.zeros(3, dtype=torch.int64, device=device)
    for made in MADE:
        loss, grad = loss_and_grad(getattr(fl.LOSSES["multi_margin"], made), logits, target, p=2, reduction="none")
        assert loss.tolist() == [math.inf, math.inf, 0.0]
        assert grad[0, 1].item() == pytest.approx(2e30 / classes) and grad[0, 0] == -grad[0, 1:].sum()
        assert grad[1, 0] == -math.inf and (grad[1, 1:] == math.inf).all() and (grad[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", MADE)
def test_an_error_at_the_threshold_counts(made, dtype, device):
    # Errors 0, 1, 1, 2 have mean 1: the two that equal it count.
    logits = torch.tensor([[0.0, 1.0, 1.0, 2.0]], dtype=dtype, device=device)
    target = torch.tensor([0], device=device)
    loss, grad = loss_and_grad(getattr(fl.LOSSES["hem"], made), logits, target, margin=0.0, reduction="none")
    assert loss.item() == pytest.approx(4 / (3 + 1e-6), rel=1e-6)
    torch.testing.assert_close(grad.float().cpu(), torch.tensor([[-1.0, 1 / 3, 1 / 3, 1 / 3]]), rtol=5e-3, atol=1e-6)
    # Errors 0, 3, 3, 3, 1, 5 have mean 2.5; where all are 0, none counts.
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0, 1.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype, device=device)
    _, grad = loss_and_grad(getattr(fl.LOSSES["hem"], made), logits, target.expand(2), margin=0.0, reduction="none")
    assert (grad != 0).tolist() == [[True, True, True, True, False, True], [False] * 6]
    _, grad = loss_and_grad(getattr(fl.LOSSES["hem"], made), logits[1:], target, margin=1.0, reduction="none")
    assert (grad != 0).all()


@pytest.mark.parametrize("made", MADE)
def test_the_threshold_divides_by_the_number_of_classes(made, device):
    # Errors 0, 2 and 47 times 1 have the mean 49 / 49 = 1, so all 48 that are not 0 count. Multiplied with the rounded
    # 1 / 49 the mean would not be 1, which is why the kernel divides.
    logits = torch.ones(1, 49, device=device)
    logits[0, 0] = 0.0
    logits[0, 1] = 2.0
    _, grad = loss_and_grad(
        getattr(fl.LOSSES["hem"], made), logits, torch.tensor([0], device=device), margin=0.0, reduction="none"
    )
    assert (grad != 0).all()


@pytest.mark.parametrize("name, parameters", VARIANTS)
@pytest.mark.parametrize("made", MADE)
def test_rows_that_satisfy_every_margin(made, name, parameters, device):
    logits = torch.tensor([[5.0, 0.0, 1.0], [0.0, 9.0, -1.0]], dtype=torch.float64, device=device)
    target = torch.tensor([0, 1], device=device)
    for reduction in ("active_mean", "mean", "sum", "none"):
        loss, grad = loss_and_grad(getattr(fl.LOSSES[name], made), logits, target, reduction=reduction, **parameters)
        assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(40, 5), (3, 5, 4, 6)], ids=str)
@pytest.mark.parametrize("made", MADE)
def test_active_mean(made, shape, device):
    logits, target = make_rows(device, shape)
    target.view(-1)[::5] = -100
    kept = target >= 0
    weight = torch.rand(5, dtype=torch.float64, device=device) + 0.5
    sample_weight = torch.rand(target.shape, dtype=torch.float64, device=device) + 0.5
    function = getattr(fl.LOSSES["hem"], made)
    rows = function(logits, target, reduction="none")
    assert (rows[~kept] == 0).all() and ((rows == 0) & kept).any()
    for options, counts in [
        ({}, torch.ones_like(rows)),
        ({"weight": weight}, weight[target.clamp(min=0)]),
        ({"sample_weight": sample_weight}, sample_weight),
        ({"weight": weight, "sample_weight": sample_weight}, weight[target.clamp(min=0)] * sample_weight),
    ]:
        active = counts[rows > 0].sum() + 1e-6
        loss, grad = loss_and_grad(function, logits, target, **options)
        torch.testing.assert_close(loss, (rows * counts).sum() / active, rtol=1e-12, atol=0)
        _, of_sum = loss_and_grad(function, logits, target, reduction="sum", **options)
        torch.testing.assert_close(grad, of_sum / active, rtol=1e-12, atol=1e-15)
        mean = function(logits, target, reduction="mean", **options)
        torch.testing.assert_close(mean, (rows * counts).sum() / counts[kept].sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("made", MADE)
def test_default_reductions(made, device):
    logits, target = make_rows(device)
    hem, multi_margin = (getattr(fl.LOSSES[name], made) for name in ("hem", "multi_margin"))
    assert torch.equal(hem(logits, target), hem(logits, target, reduction="active_mean"))
    assert torch.equal(multi_margin(logits, target), multi_margin(logits, target, reduction="mean"))
    for threshold in (False, True):
        options = {"mean_above_zero": True, "threshold": threshold}
        active = multi_margin(logits, target, reduction="active_mean", **options)
        assert torch.equal(multi_margin(logits, target, **options), active)
        assert torch.equal(
            fl.MultiMarginLoss(**options)(logits, target), fl.functional.multi_margin_loss(logits, target, **options)
        )
    torch.testing.assert_close(
        multi_margin(logits, target, margin=0.2, mean_above_zero=True, threshold=True),
        hem(logits, target),
        rtol=0,
        atol=0,
    )
    assert fl.HEMLoss().reduction == "active_mean" and fl.MultiMarginLoss().reduction == "mean"
    assert fl.MultiMarginLoss(mean_above_zero=True).reduction == "active_mean"
    assert fl.MultiMarginLoss(mean_above_zero=True, reduction="sum").reduction == "sum"


@pytest.mark.parametrize("shape", [(30, 5), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("made", MADE)
def test_a_margin_per_class(made, shape, device):
    logits, target = make_rows(device, shape)
    margins = [0.0, 0.1, 0.5, 1.0, 2.0]
    tensor = torch.tensor(margins, dtype=torch.float64, device=device)
    flat = logits.movedim(1, -1).reshape(-1, 5).tolist()
    labels = target.reshape(-1).tolist()
    for margin_index in ("target", "competitor"):
        loss, grad = loss_and_grad(
            getattr(fl.LOSSES["hem"], made), logits, target, margin=tensor, margin_index=margin_index, reduction="none"
        )
        expected = [
            row_by_row("hem", z, y, margin=margins[y] if margin_index == "target" else margins)
            for z, y in zip(flat, labels, strict=True)
        ]
        assert loss.reshape(-1).tolist() == pytest.approx([value for value, _ in expected], rel=1e-12, abs=1e-14)
        grads = torch.tensor([row for _, row in expected], dtype=torch.float64, device=device)
        torch.testing.assert_close(grad.movedim(1, -1).reshape(-1, 5), grads, rtol=1e-12, atol=1e-14)
    loss = getattr(fl.LOSSES["multi_margin"], made)(logits, target, margin=tensor, reduction="none")
    expected = [row_by_row("multi_margin", z, y, margin=margins[y])[0] for z, y in zip(flat, labels, strict=True)]
    assert loss.reshape(-1).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("margin_index", ["target", "competitor"])
@pytest.mark.parametrize("made", MADE)
def test_equal_margins_in_any_form(made, margin_index, device):
    logits, target = make_rows(device)
    function = getattr(fl.LOSSES["hem"], made)
    expected = loss_and_grad(function, logits, target, margin=0.5)
    for margin in (
        torch.tensor(0.5, device=device),
        torch.full((7,), 0.5, device=device),
        torch.full((7,), 0.5, device=device).half(),
    ):
        actual = loss_and_grad(function, logits, target, margin=margin, margin_index=margin_index)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("made", MADE)
def test_the_margin_is_differentiable(made):
    logits, target = make_rows("cpu", (6, 4))
    for size in ((), (4,)):
        for margin_index in ("target", "competitor"):
            margin = (torch.rand(size, dtype=torch.float64) + 0.5).requires_grad_()

            def function(x, mu, margin_index=margin_index):
                return getattr(fl.LOSSES["hem"], made)(x, target, margin=mu, margin_index=margin_index)

            assert torch.autograd.gradcheck(function, (logits.clone().requires_grad_(), margin))


@pytest.mark.parametrize("name", ["hem", "multi_margin"])
@pytest.mark.parametrize("made", MADE)
def test_a_logit_bias_shifts_the_margin(made, name, device):
    logits, target = make_rows(device)
    function = getattr(fl.LOSSES[name], made)
    for bias in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        shifted = loss_and_grad(function, logits, target, margin=1.0, logit_bias=bias)
        torch.testing.assert_close(shifted, loss_and_grad(function, logits, target, margin=0.7), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name, parameters", VARIANTS)
@pytest.mark.parametrize("made", MADE)
def test_non_finite_logits(made, name, parameters, device):
    inf = math.inf
    function = getattr(fl.LOSSES[name], made)
    for bad in (math.nan, inf):
        for column in range(3):
            logits = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]], device=device)
            logits[0, column] = bad
            for label in range(3):
                target = torch.tensor([label, 0], device=device)
                loss, grad = loss_and_grad(function, logits, target, reduction="none", **parameters)
                assert not loss[0].isfinite() and not grad[0].isfinite().any()
                assert loss[1].isfinite() and grad[1].isfinite().all()
                for reduction in ("mean", "sum", "active_mean"):
                    loss, grad = loss_and_grad(function, logits, target, reduction=reduction, **parameters)
                    assert not loss.isfinite() and not grad[0].isfinite().any() and grad[1].isfinite().all()
    # The only row: nothing must hide it.
    loss, grad = loss_and_grad(
        function, torch.tensor([[inf, 0.0]], device=device), torch.tensor([0], device=device), **parameters
    )
    assert not loss.isfinite() and not grad.isfinite().any()
    # A masked class has error 0 and still counts in C; with a masked target every other error is infinite.
    logits = torch.tensor([[0.0, -inf, 0.5], [-inf, -inf, 0.5]], device=device)
    target = torch.tensor([0, 0], device=device)
    loss, grad = loss_and_grad(function, logits, target, reduction="none", **parameters)
    plain, plain_grad = loss_and_grad(
        function, torch.tensor([[0.0, -99.0, 0.5]], device=device), target[:1], reduction="none", **parameters
    )
    assert torch.equal(loss[:1], plain) and torch.equal(grad[:1], plain_grad)
    assert loss[1] == inf and (grad[:, 1] == 0).all()


@pytest.mark.slow
@pytest.mark.any_cpu
@pytest.mark.parametrize("name, parameters", VARIANTS)
def test_derivatives_and_torch_func(name, parameters):
    logits, target = make_rows("cpu", (6, 4))
    for made in MADE:
        entry = getattr(fl.LOSSES[name], made)

        def function(x, y=target, entry=entry):
            return entry(x, y, **parameters)

        x = logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, x)
        torch.testing.assert_close(
            torch.func.grad(function)(logits), loss_and_grad(entry, logits, target, **parameters)[1]
        )
        grads = torch.func.vmap(torch.func.grad(function))(logits, target)
        for z, y, grad in zip(logits, target, grads, strict=True):
            torch.testing.assert_close(grad, loss_and_grad(entry, z, y, **parameters)[1])


def test_modules_keep_tensor_margins():
    module = fl.HEMLoss(margin=torch.tensor([0.1, 0.2, 0.3]), margin_index="competitor")
    assert set(module.state_dict()) == {"margin"}
    logits, target = make_rows("cpu", (5, 3))
    expected = fl.functional.hem_loss(logits, target, margin=torch.full((3,), 0.7), margin_index="competitor")
    module.margin.fill_(0.7)
    assert torch.equal(module(logits, target), expected)
    assert repr(module) == "HEMLoss(margin=Tensor[3], margin_index='competitor')"
    assert repr(fl.HEMLoss(margin=torch.tensor(0.5))).startswith("HEMLoss(margin=0.5, ")


def test_bad_margins():
    problem = torch.zeros(2, 3), torch.tensor([0, 1])
    for name in ("hem", "multi_margin"):
        entry = fl.LOSSES[name]
        for wrong in (torch.zeros(2, 3), torch.tensor([1, 2, 3])):
            message = r"^margin must be a number or a floating point tensor, 0-dim or of shape \(C,\), got a tensor of "
            with pytest.raises(ValueError, match=message):
                entry.module(margin=wrong)
            with pytest.raises(ValueError, match=message):
                entry.function(*problem, margin=wrong)
        for entries in ([0.1, -0.1, 0.0], [0.1, math.nan, 0.0], [0.1, math.inf, 0.0]):
            with pytest.raises(ValueError, match=r"^every entry of margin must satisfy 0 <= value < inf, got "):
                entry.module(margin=torch.tensor(entries))
        for made in MADE:
            with pytest.raises(ValueError, match=r"margin must be .*0-dim or of shape .*, got"):
                getattr(entry, made)(*problem, margin=torch.zeros(4))


def test_bad_options():
    problem = torch.zeros(2, 3), torch.tensor([0, 1])
    for wrong in ("both", None, 0):
        message = f"^margin_index must be 'target' or 'competitor', got {wrong!r}$"
        with pytest.raises(ValueError, match=message):
            fl.HEMLoss(margin_index=wrong)
        with pytest.raises(ValueError, match=message):
            fl.functional.hem_loss(*problem, margin_index=wrong)
    for switch in ("mean_above_zero", "threshold"):
        with pytest.raises(TypeError, match=f"^{switch} must be True or False, got 1$"):
            fl.functional.multi_margin_loss(*problem, **{switch: 1})
    for made in (fl.MultiMarginLoss, lambda **own: fl.functional.multi_margin_loss(*problem, **own)):
        for p in (0, 3, 1.5, math.nan):
            with pytest.raises(ValueError, match=f"^p must be 1 or 2, got {p}$"):
                made(p=p)
        for switch in ("mean_above_zero", "threshold"):
            with pytest.raises(ValueError, match=r"^p must be 1 with mean_above_zero or threshold"):
                made(p=2, **{switch: True})
    for name in ("hem", "multi_margin"):
        message = "reduction must be 'none', 'mean', 'sum' or 'active_mean', got 'average'"
        with pytest.raises(ValueError, match=message):
            fl.LOSSES[name].module(reduction="average")
        for made in MADE:
            with pytest.raises(ValueError, match=message):
                getattr(fl.LOSSES[name], made)(*problem, reduction="average")
    for made in MADE:
        with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'active_mean'"):
            getattr(fl.LOSSES["gce"], made)(*problem, reduction="active_mean")


def test_a_learnt_margin_that_left_its_range_spoils_its_rows_alone():
    for bad in (math.nan, math.inf):
        margin = torch.tensor([1.0, bad, 1.0], requires_grad=True)
        values = fl.functional.hem_loss(torch.eye(3), torch.arange(3), margin=margin, reduction="none")
        assert values.isnan().tolist() == [False, True, False]
