"""Every parameter of every loss at the ends of its range: value and gradient in float32 are within a hundredth of a
computation with 80 digits; beyond the ends there is an error that names the parameter and the range."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from mpmath import mp, mpf

import fused_losses as fl
from fused_losses._parameters import OrNone, OrTensor, Range, Switch

NAMES = [name for name in fl.LOSSES if name not in ("hem", "multi_margin")]
# The promise is a hundredth of the value and of a row's largest gradient, but for what rounding leaves of the largest
# among all rows: terms cancel in the gradient of a row that is nearly certain, or without hope, and in the value of one
# that is just right. NEGLIGIBLE: float32 flushes 1e-38 to zero, times the factors allowed.
TOLERANCE, ROUNDING, NEGLIGIBLE = 1e-2, 1e-6, 1e-20
mp.dps = 80


# ---- Exact values: lp are the log-probabilities, frozen the same as constants, y is the target --------------------


def _mae(lp, y, scale):
    return scale * (1 - mp.exp(lp[y]))


def _agce(lp, y, a, q):
    return ((a + 1) ** q - (a + mp.exp(lp[y])) ** q) / q


def _aue(lp, y, a, q):
    return ((a - mp.exp(lp[y])) ** q - (a - 1) ** q) / q


def _js(lp, y, pi):
    p, h = mp.exp(lp[y]), -(1 - pi) * mp.log(1 - pi)
    m = pi + (1 - pi) * p
    return (-pi * mp.log(m) + (1 - pi) * (p * (lp[y] - mp.log(m)) - (1 - p) * mp.log(1 - pi))) / h


def _phuber(lp, y, tau):
    return -lp[y] if lp[y] > -mp.log(tau) else 1 + mp.log(tau) - tau * mp.exp(lp[y])


def _taylor(lp, y, order):
    return mp.fsum((1 - mp.exp(lp[y])) ** k / k for k in range(1, int(order) + 1))


def _focal(lp, j, gamma):
    return -((1 - mp.exp(lp[j])) ** gamma) * lp[j]


def _cross_entropy(lp, y, s):
    return -(1 - s) * lp[y] - s / len(lp) * mp.fsum(lp)


def _nce(lp, y):
    return lp[y] / mp.fsum(lp)


def _nfl(lp, y, gamma, detach, frozen):
    terms = [-((1 - mp.exp(f)) ** gamma) * x for x, f in zip(lp, frozen if detach else lp, strict=True)]
    return terms[y] / mp.fsum(terms)


def _ngce(lp, y, q):
    return (1 - mp.exp(q * lp[y])) / mp.fsum(1 - mp.exp(q * x) for x in lp)


def _sum(alpha, active, beta, passive):
    return (alpha * active() if alpha else mpf(0)) + (beta * passive() if beta else mpf(0))


EXACT = {
    "cross_entropy": lambda lp, frozen, y, label_smoothing: _cross_entropy(lp, y, label_smoothing),
    "mae": lambda lp, frozen, y, scale: _mae(lp, y, scale),
    "gce": lambda lp, frozen, y, q: (1 - mp.exp(q * lp[y])) / q,
    "agce": lambda lp, frozen, y, a, q: _agce(lp, y, a, q),
    "aue": lambda lp, frozen, y, a, q: _aue(lp, y, a, q),
    "ae": lambda lp, frozen, y, a: mp.exp(-mp.exp(lp[y]) / a),
    "rce": lambda lp, frozen, y, A: _mae(lp, y, A),
    "sce": lambda lp, frozen, y, alpha, beta: -alpha * lp[y] + beta * _mae(lp, y, -mp.log(mpf("1e-4"))),
    "taylor_ce": lambda lp, frozen, y, order: _taylor(lp, y, order),
    "phuber_ce": lambda lp, frozen, y, tau: _phuber(lp, y, tau),
    "js": lambda lp, frozen, y, pi: _js(lp, y, pi),
    "focal": lambda lp, frozen, y, gamma: _focal(lp, y, gamma),
    "bounded_ce": lambda lp, frozen, y, a: mp.log((1 + a) / (mp.exp(lp[y]) + a)),
    "nce": lambda lp, frozen, y: _nce(lp, y),
    "nfl": lambda lp, frozen, y, gamma, detach: _nfl(lp, y, gamma, detach, frozen),
    "ngce": lambda lp, frozen, y, q: _ngce(lp, y, q),
    "nce_mae": lambda lp, frozen, y, alpha, beta, mae_scale: _sum(
        alpha, lambda: _nce(lp, y), beta, lambda: _mae(lp, y, mae_scale)
    ),
    "nce_rce": lambda lp, frozen, y, alpha, beta, A: _sum(alpha, lambda: _nce(lp, y), beta, lambda: _mae(lp, y, A)),
    "nfl_mae": lambda lp, frozen, y, alpha, beta, gamma, detach, mae_scale: _sum(
        alpha, lambda: _nfl(lp, y, gamma, detach, frozen), beta, lambda: _mae(lp, y, mae_scale)
    ),
    "nfl_rce": lambda lp, frozen, y, alpha, beta, gamma, detach, A: _sum(
        alpha, lambda: _nfl(lp, y, gamma, detach, frozen), beta, lambda: _mae(lp, y, A)
    ),
    "nce_agce": lambda lp, frozen, y, alpha, beta, a, q: _sum(
        alpha, lambda: _nce(lp, y), beta, lambda: _agce(lp, y, a, q)
    ),
}  # fmt: skip


def exact_by_differences(name, logits, y, parameters):
    """Value and dL/dz: dL/dlog p_j by differences, far below all that matters, then through the softmax."""
    z = [mpf(x) for x in logits]
    lse = mp.log(mp.fsum(mp.exp(x) for x in z))
    frozen = [x - lse for x in z]
    numbers = {k: v if isinstance(v, bool) else mpf(v) for k, v in parameters.items()}
    h = mpf("1e-22")

    def value(j, step):
        return EXACT[name]([x + step if i == j else x for i, x in enumerate(frozen)], frozen, y, **numbers)

    slopes = [(value(j, h) - value(j, -h)) / (2 * h) for j in range(len(z))]
    total = mp.fsum(slopes)
    return value(0, 0), [s - mp.exp(x) * total for s, x in zip(slopes, frozen, strict=True)]


def exact_bi_tempered(logits, y, parameters):
    """1906.03361 with labels 1 - s and s / (C - 1); the normaliser by bisection."""
    z = [mpf(x) for x in logits]
    t1, t2, s = (mpf(parameters[k]) for k in ("t1", "t2", "label_smoothing"))

    def log_t(x, t):
        return mp.log(x) if t == 1 else (x ** (1 - t) - 1) / (1 - t)

    def exp_t(x):
        if t2 == 1:
            return mp.exp(x)
        inside = 1 + (1 - t2) * x
        return inside ** (1 / (1 - t2)) if inside > 0 else mpf(0)

    low, high = max(z), max(z) - log_t(mpf(1) / len(z), t2)  # the largest alone, or all as large as it
    for _ in range(180):
        middle = (low + high) / 2
        low, high = (middle, high) if mp.fsum(exp_t(x - middle) for x in z) > 1 else (low, middle)
    p = [exp_t(x - low) for x in z]
    label = [1 - s if j == y else s / (len(z) - 1) for j in range(len(z))]
    value = mpf(0)
    for q_j, p_j in zip(label, p, strict=True):
        if q_j > 0:
            of_p = log_t(p_j, t1) if p_j > 0 else (-1 / (1 - t1) if t1 < 1 else -mp.inf)
            value += q_j * (log_t(q_j, t1) - of_p)
        value -= (q_j ** (2 - t1) - p_j ** (2 - t1)) / (2 - t1)
    d = [(p_j - q_j) * p_j ** (t2 - t1) if p_j > 0 else mpf(0) for p_j, q_j in zip(p, label, strict=True)]
    escort = [p_j**t2 if p_j > 0 else mpf(0) for p_j in p]
    return value, [d_j - e / mp.fsum(escort) * mp.fsum(d) for d_j, e in zip(d, escort, strict=True)]


def exact(name, logits, y, parameters):
    if name == "bi_tempered":
        return exact_bi_tempered(logits, y, parameters)
    return exact_by_differences(name, logits, y, parameters)


# ---- The ends of the ranges ----------------------------------------------------------------------------------------


def range_of(rule) -> Range | None:
    rule = rule.range if isinstance(rule, OrNone | OrTensor) else rule
    return rule if isinstance(rule, Range) else None


def edges(rule) -> list:
    """The smallest and the largest allowed numbers, and those next to where the formula changes."""
    if isinstance(rule, Switch):
        return [False, True]
    if isinstance(rule, OrNone):
        return [None]
    candidates = [rule.low, rule.high, 0.0, 1.0, 1.0 - 1e-16, 1.0 + 1e-9, 1.01, 1e-6]
    return [v for v in dict.fromkeys(candidates) if rule.holds(v)]


# (name, parameters): every parameter at each of its edges, the others at their defaults; the ends of all together.
def cases():
    for name in NAMES:
        entry = fl.LOSSES[name]
        fixed = {"num_iters": None} if name == "bi_tempered" else {}
        for parameter, rule in entry.ranges.items():
            for value in edges(rule):
                yield name, entry.parameters | fixed | {parameter: value}
        ends = []
        for rule in entry.ranges.values():
            found, own = edges(rule), range_of(rule)
            ends.append(found if own is None else [min(found), max(found)])
        for values in itertools.product(*ends):
            yield name, dict(zip(entry.ranges, values, strict=True)) | fixed


def rows():
    """Logits and targets: ordinary, certain, hopeless and undecided ones. Three nines are what losses see in training;
    of a p nearer to 1 float32 does not have a hundredth of 1 - p in every kernel."""
    generator = torch.Generator().manual_seed(0)
    ordinary, certain, hopeless, lost = torch.randn(4, 5, generator=generator)
    certain[1], hopeless[2], lost[3] = 8.0, -20.0, -60.0
    yield torch.stack([ordinary, 3 * ordinary, certain, hopeless, lost, torch.zeros(5)]), [0, 4, 1, 2, 3, 0]
    yield torch.tensor([[0.0, 0.0], [-7.0, 0.0], [0.0, 8.0]]), [1, 1, 0]


ROWS = list(rows())


def assert_right(loss, grad, expected, context):
    value_rounding = ROUNDING * max(abs(v) for v, _ in expected if mp.isfinite(v)) + NEGLIGIBLE
    rounding = ROUNDING * max(abs(g) for _, grads in expected for g in grads) + NEGLIGIBLE
    for value, of_row, (exact_value, exact_grad) in zip(loss.tolist(), grad.tolist(), expected, strict=True):
        if mp.isinf(exact_value):
            assert value == math.inf and all(map(math.isfinite, of_row)), context
            continue
        assert abs(value - exact_value) <= TOLERANCE * abs(exact_value) + value_rounding, (context, value, exact_value)
        allowed = TOLERANCE * max(map(abs, exact_grad)) + rounding
        for g, exact_g in zip(of_row, exact_grad, strict=True):
            assert abs(g - exact_g) <= allowed, (context, of_row, list(map(float, exact_grad)))


CASES = list({repr(case): case for case in cases()}.values())


@pytest.mark.parametrize("name", NAMES)
def test_right_at_the_ends_of_every_range(name, device):
    entry = fl.LOSSES[name]
    tried = 0
    for parameters in [parameters for of, parameters in CASES if of == name]:
        try:
            entry.pack(parameters)
        except ValueError as error:  # each is in its range, but together they are not
            assert name in ("agce", "aue", "nce_agce")
            parameter = str(error).partition(" must be at ")[0]
            assert parameter in ("a", "q") and str(error).endswith(f", got {parameters[parameter]}")
            continue
        tried += 1
        for logits, target in ROWS:
            expected = [exact(name, z, y, parameters) for z, y in zip(logits.tolist(), target, strict=True)]
            labels = torch.tensor(target, device=device)
            for function, dtype in itertools.product((entry.function, entry.reference), (torch.float32, torch.float64)):
                x = logits.to(device, dtype).requires_grad_()
                loss = function(x, labels, reduction="none", **parameters)
                (grad,) = torch.autograd.grad(loss.sum(), x)
                assert_right(loss, grad, expected, (function, dtype, parameters))
    assert tried > 0


@pytest.mark.parametrize("name", fl.LOSSES)
def test_beyond_the_ends_of_every_range(name):
    entry = fl.LOSSES[name]
    for parameter, rule in entry.ranges.items():
        bounds = range_of(rule)
        if bounds is None:
            continue
        beyond = [bounds.low / 2 if bounds.low > 0 else bounds.low - 1.0, bounds.high * 1.001]
        for value in [v for v in beyond if math.isfinite(v) and not bounds.holds(v)]:
            for made in (entry.module, entry.function, entry.reference):
                arguments = () if made is entry.module else (torch.zeros(2, 3), torch.tensor([0, 1]))
                with pytest.raises(ValueError, match=rf"^{parameter} must (be|satisfy) .*[0-9].*, got {value}$"):
                    made(*arguments, **{parameter: value})
