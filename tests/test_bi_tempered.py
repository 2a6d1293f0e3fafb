"""The bi-tempered loss against an independent computation in 40 digits and against its limits."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from conftest import GRAD_TOLERANCE, LOSS_TOLERANCE, loss_and_grad, one_in

import fused_losses as fl
from fused_losses.bi_tempered import NEWTON_STEPS, _converged_normaliser, _log_exp_t, _published_normaliser

mpmath = pytest.importorskip("mpmath")
MADE = ["function", pytest.param("reference", marks=pytest.mark.any_cpu)]


def exp_t(x, t):
    base = 1 + (1 - t) * x
    if t == 1:
        return mpmath.exp(x)
    return mpmath.mpf(0) if base <= 0 else base ** (1 / (1 - t))


def log_t(x, t):
    return mpmath.log(x) if t == 1 else (x ** (1 - t) - 1) / (1 - t)


@functools.lru_cache(maxsize=1000)
def normaliser(logits, t, num_iters):
    """The authors' iteration, or the root by 130 bisections."""
    top = max(logits)
    x = [z - top for z in logits]
    if t == 1:
        return top + mpmath.log(sum(map(mpmath.exp, x)))
    if t > 1 and num_iters is not None:
        y = x
        for _ in range(num_iters):
            total = sum(exp_t(v, t) for v in y)
            y = [v * total ** (1 - t) for v in x]
        return top - log_t(1 / sum(exp_t(v, t) for v in y), t)
    in_play = len(x) if t > 1 else sum(v > -1 / (1 - t) for v in x)
    lower, upper = mpmath.mpf(0), -log_t(mpmath.mpf(1) / in_play, t)
    for _ in range(130 if num_iters is None else num_iters):
        middle = (lower + upper) / 2
        if sum(exp_t(v - middle, t) for v in x) < 1:
            upper = middle
        else:
            lower = middle
    return top + (lower + upper) / 2


@functools.lru_cache(maxsize=10_000)
def exact(logits, target, t1, t2, smoothing, num_iters):
    """Loss and published gradient of one row."""
    with mpmath.workdps(40):
        logits = tuple(map(mpmath.mpf, logits))
        t1, t2, smoothing = map(mpmath.mpf, (t1, t2, smoothing))
        root = normaliser(logits, t2, num_iters)
        p = [exp_t(z - root, t2) for z in logits]
        spread = smoothing / (len(p) - 1)
        label = [1 - smoothing if j == target else spread for j in range(len(p))]
        loss = sum(q * (log_t(q, t1) - log_t(x, t1)) for q, x in zip(label, p, strict=True) if q)
        loss -= sum(q ** (2 - t1) - x ** (2 - t1) for q, x in zip(label, p, strict=True)) / (2 - t1)
        # A class of probability 0 has no gradient.
        d = [(x - q) * x ** (t2 - t1) if x else mpmath.mpf(0) for q, x in zip(label, p, strict=True)]
        s = [x**t2 for x in p]
        return float(loss), [float(a - b * sum(d) / sum(s)) for a, b in zip(d, s, strict=True)]


# (t1, t2, label_smoothing)
TEMPERATURES = [
    (0.8, 1.2, 0.0), (0.8, 1.2, 0.1), (0.5, 4.0, 0.0), (0.0, 1.5, 0.3), (0.7, 1.0, 0.0), (1.0, 1.0, 0.2),
    (1.0, 1.3, 0.0), (1.0, 1.3, 0.05), (0.2, 0.8, 0.0), (0.2, 0.8, 0.2), (0.5, 0.5, 0.0), (0.3, 0.5, 0.0),
    (0.9, 1.01, 1.0), (0.9, 0.99, 0.5),
]  # fmt: skip
LOGITS = [[1.0, -0.5, 2.0, 0.0, -3.0], [0.25, 0.25, 0.25, 0.25, 0.25], [9.0, -9.0, 0.0, 8.5, 1.0]]


@pytest.mark.parametrize("num_iters", [5, 1, 12, None])
@pytest.mark.parametrize("t1, t2, smoothing", TEMPERATURES)
@pytest.mark.parametrize("made", MADE)
def test_forty_digits(made, t1, t2, smoothing, num_iters, device):
    logits = torch.tensor(LOGITS, dtype=torch.float64, device=device)
    options = {"t1": t1, "t2": t2, "label_smoothing": smoothing, "num_iters": num_iters}
    for target in range(5):
        labels = torch.full((3,), target, device=device)
        loss, grad = loss_and_grad(getattr(fl.LOSSES["bi_tempered"], made), logits, labels, reduction="none", **options)
        expected = [exact(tuple(row), target, t1, t2, smoothing, num_iters) for row in LOGITS]
        values = torch.tensor([value for value, _ in expected], dtype=torch.float64, device=device)
        grads = torch.tensor([row for _, row in expected], dtype=torch.float64, device=device)
        torch.testing.assert_close(loss, values, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grad, grads, rtol=1e-9, atol=1e-12)


# For logits (1, -0.5, 2, 0, -3). The numbers come from `exact`; written down, they show a change of both sides, too.
GOLDEN = [
    (0, 0.8, 1.2, 0.0, 5, 1.075204539994362,
     [-0.4460991885750532, 0.02724825716071671, 0.37200014901763934, 0.042888078708805104, 0.0039627036878920459]),
    (0, 0.8, 1.2, 0.0, None, 1.0752044746281566,
     [-0.44609905524876795, 0.02724826469318445, 0.37199999819747387, 0.042888085311136749, 0.0039627070469728806]),
    (1, 0.8, 1.2, 0.1, 5, 1.4305962639762823,
     [0.063043671316267161, -0.32194117546189868, 0.24763119998058069, 0.015154562028751337, -0.0038882578637005085]),
    (0, 0.7, 1.0, 0.0, 5, 0.99918483778712199,
     [-0.52167898488681139, 0.015333864054952773, 0.47507041076324334, 0.030933516407402535, 0.00034119366121274974]),
    (1, 0.2, 0.8, 0.0, 5, 0.9916582832564367,
     [-0.063000806560986537, -0.099570187010222879, 0.19757511927252822, -0.035004125701318808, 0.0]),
    (1, 0.2, 0.8, 0.0, None, 0.9960338621157512,
     [-0.063748557577279937, -0.10072604353271253, 0.20004885874001392, -0.035574257630021445, 0.0]),
]  # fmt: skip


@pytest.mark.parametrize("target, t1, t2, smoothing, num_iters, value, gradient", GOLDEN)
@pytest.mark.parametrize("made", MADE)
def test_golden(made, target, t1, t2, smoothing, num_iters, value, gradient, device):
    logits = torch.tensor(LOGITS[:1], dtype=torch.float64, device=device)
    options = {"t1": t1, "t2": t2, "label_smoothing": smoothing, "num_iters": num_iters}
    labels = torch.tensor([target], device=device)
    loss, grad = loss_and_grad(getattr(fl.LOSSES["bi_tempered"], made), logits, labels, **options)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert grad[0].tolist() == pytest.approx(gradient, rel=1e-10, abs=1e-14)


T2 = [0.1, 0.5, 0.8, 0.99, 1.01, 1.1, 1.2, 1.5, 2.0, 4.0]


@pytest.mark.slow
@pytest.mark.any_cpu  # torch's operators
@pytest.mark.parametrize(("t2", "classes", "sd"), one_in(4, T2, [2, 10, 100, 1000], [0.1, 1.0, 5.0]))
def test_newton_converges(t2, classes, sd):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, classes, generator=generator, dtype=torch.float64) * sd
    x -= x.amax(1, keepdim=True)

    def error(root):
        log_p, absent = _log_exp_t(x - root, t2)
        return (torch.where(absent, 0.0, log_p.exp()).sum(1) - 1).abs().max()

    assert NEWTON_STEPS == 10
    assert error(_converged_normaliser(x, t2, 1)) < 1e-12
    published = [error(_published_normaliser(x, t2, n, 1)) for n in (5, 40)]
    assert published[1] < 1e-6 and published[1] <= published[0] + 1e-12


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("made", MADE)
def test_both_temperatures_one_is_cross_entropy(made, smoothing, device):
    logits = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.arange(20, device=device) % 6
    options = {"t1": 1.0, "t2": 1.0, "label_smoothing": smoothing}
    label = torch.full((20, 6), smoothing / 5, dtype=torch.float64, device=device)
    label.scatter_(1, target[:, None], 1 - smoothing)
    entropy = -torch.special.xlogy(label, label).sum(1).mean()

    def cross_entropy(x, _):
        return torch.nn.functional.cross_entropy(x, label) - entropy

    actual = loss_and_grad(getattr(fl.LOSSES["bi_tempered"], made), logits, target, **options)
    torch.testing.assert_close(actual, loss_and_grad(cross_entropy, logits, target), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("t2", [0.5, 0.9, 1.0, 1.2, 3.0])
@pytest.mark.parametrize("made", MADE)
def test_bounds(made, t2, device):
    logits = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device) * 30
    target = torch.arange(200, device=device) % 8
    function = getattr(fl.LOSSES["bi_tempered"], made)
    loss = function(logits, target, reduction="none", t2=t2, num_iters=None)
    # The upper bound is -log_t1(0): the other term, (sum p^(2 - t1) - 1) / (2 - t1), is at most 0.
    assert (loss >= -1e-12).all() and (loss <= 5.0 + 1e-12).all()


@pytest.mark.parametrize("t2", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("made", MADE)
def test_masked_classes_and_non_finite_rows(made, t2, device):
    function = getattr(fl.LOSSES["bi_tempered"], made)
    inf = math.inf
    short = torch.tensor([[0.3, -0.2]], dtype=torch.float64, device=device)
    masked = torch.tensor([[0.3, -inf, -0.2, -inf]], dtype=torch.float64, device=device)
    first = torch.tensor([0], device=device)
    # The bisection starts from bounds of the classes in play alone, so masked classes change nothing at all.
    loss, grad = loss_and_grad(function, masked, first, t2=t2)
    expected, expected_grad = loss_and_grad(function, short, first, t2=t2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[:, ::2], expected_grad)
    assert torch.equal(grad[:, 1::2], torch.zeros_like(expected_grad))
    for bad in (math.nan, inf):
        for label in (0, 1):
            row = torch.tensor([[0.3, bad, -0.2]], dtype=torch.float64, device=device)
            loss, grad = loss_and_grad(function, row, torch.tensor([label], device=device), t2=t2)
            assert loss.isnan() and grad.isnan().all()
    # A target of probability 0: for t1 < 1 the loss is at its bound.
    loss, grad = loss_and_grad(function, masked, torch.tensor([1], device=device), t2=t2)
    assert 3.0 < loss.item() <= 5.0 and grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.any_cpu
@pytest.mark.parametrize("t1, t2", [(0.8, 1.2), (0.3, 0.7), (0.6, 1.0), (1.0, 1.4), (0.2, 3.0)])
def test_every_derivative(t1, t2):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, -100, 1])

    for made in ("function", "reference"):
        entry = getattr(fl.LOSSES["bi_tempered"], made)

        def function(x, entry=entry):
            return entry(x, target, t1=t1, t2=t2, num_iters=None, label_smoothing=0.1, reduction="none")

        assert torch.autograd.gradcheck(function, logits, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, logits)


def test_torch_func():
    logits = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.arange(20).view(5, 4) % 3
    for made in (fl.functional.bi_tempered_loss, fl.reference.bi_tempered_loss):
        grads = torch.func.vmap(torch.func.grad(made))(logits, target)
        for x, y, grad in zip(logits, target, grads, strict=True):
            torch.testing.assert_close(grad, loss_and_grad(made, x, y)[1], rtol=1e-10, atol=1e-12)
        hessian = torch.func.hessian(made)(logits[0], target[0])
        expected = torch.autograd.functional.hessian(lambda x, made=made: made(x, target[0]), logits[0])
        torch.testing.assert_close(hessian, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t2", [0.55, 0.83, 1.0, 1.2, 2.0])
@pytest.mark.parametrize("num_iters", [5, None])
def test_low_precision(dtype, t2, num_iters, device):
    # With t2 = 0.8, say, a rounded logit can lie exactly at -1 / (1 - t2), where the published bisection decides
    # whether the class is in play; precisions then differ by the error of its 5 steps.
    logits = (torch.randn(30, 50, generator=torch.Generator().manual_seed(0)) * 3).to(dtype).to(device)
    target = torch.arange(30, device=device)
    options = {"t1": min(0.8, t2 / 2), "t2": t2, "num_iters": num_iters, "label_smoothing": 0.1}
    loss, grad = loss_and_grad(fl.functional.bi_tempered_loss, logits, target, **options)
    expected, expected_grad = loss_and_grad(fl.reference.bi_tempered_loss, logits.double(), target, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS_TOLERANCE[dtype])
    error = (grad.double() - expected_grad).abs().max()
    assert error <= GRAD_TOLERANCE[dtype] * expected_grad.abs().max()


def test_number_of_iterations():
    problem = torch.zeros(2, 3), torch.tensor([0, 1])
    for value, error in [(0, ValueError), (2.5, ValueError), (-1, ValueError), (True, TypeError), ("5", TypeError)]:
        with pytest.raises(error, match=r"^num_iters must be "):
            fl.BiTemperedLoss(num_iters=value)
        with pytest.raises(error, match=r"^num_iters must be "):
            fl.functional.bi_tempered_loss(*problem, num_iters=value)
    assert fl.LOSSES["bi_tempered"].pack({"num_iters": None}) == (0.8, 1.2, 0.0, 0.0)
    assert fl.BiTemperedLoss(num_iters=None).num_iters is None
