"""Every parameter of every loss at the ends of its range: value and gradient in float32 are within a hundredth of the
published formula in 34 digits; beyond the ends there is an error that names the parameter and the range."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from naive import naive_losses

import fused_losses as fl
from fused_losses._parameters import OrNone, OrTensor, Range, Switch

pytestmark = pytest.mark.any_cpu  # the C++ programs take every instruction set through the parameters

NAMES = [name for name, entry in fl.LOSSES.items() if "active_mean" not in entry.reductions]
# Promised: an error of at most a hundredth of the value, and of the largest gradient of the row. Besides it may be as
# large as ROUNDING times the largest of all rows, because terms cancel: in the gradient of a row that is nearly certain
# or hopeless, and in the value of one that is just right. NEGLIGIBLE: what float32 flushes to zero, below 1e-38, times
# the largest factors that are allowed.
TOLERANCE, ROUNDING, NEGLIGIBLE = 1e-2, 1e-6, 1e-20


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
    rule = range_of(rule)
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
    value_rounding = ROUNDING * max(abs(v) for v, _ in expected if math.isfinite(v)) + NEGLIGIBLE
    rounding = ROUNDING * max(abs(g) for _, grads in expected for g in grads) + NEGLIGIBLE
    for value, of_row, (exact_value, exact_grad) in zip(loss.tolist(), grad.tolist(), expected, strict=True):
        if math.isinf(exact_value):
            assert value == math.inf and all(map(math.isfinite, of_row)), context
            continue
        assert abs(value - exact_value) <= TOLERANCE * abs(exact_value) + value_rounding, (context, value, exact_value)
        allowed = TOLERANCE * max(map(abs, exact_grad)) + rounding
        for g, exact_g in zip(of_row, exact_grad, strict=True):
            assert abs(g - exact_g) <= allowed, (context, of_row, exact_grad)


CASES = list({repr(case): case for case in cases()}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_right_at_the_ends_of_every_range(name, device):
    entry = fl.LOSSES[name]
    tried = 0
    for parameters in [parameters for of, parameters in CASES if of == name]:
        try:
            entry.pack(parameters)
        except ValueError as error:  # each is in its range, but together they are refused
            assert entry.check is not None
            parameter = str(error).partition(" must be at ")[0]
            assert parameter in ("a", "q", "margin") and str(error).endswith(f", got {parameters[parameter]}")
            continue
        tried += 1
        for logits, target in ROWS:
            exact, params = naive_losses()[name], entry.pack(parameters)
            expected = [exact.row(params, z, y) for z, y in zip(logits.tolist(), target, strict=True)]
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


@pytest.mark.parametrize("name", fl.LOSSES)
def test_no_number_of_classes_makes_a_row_nan(name):
    """At the ends of every range: a finite value and gradient, or a ValueError that names what is too large for C."""
    entry = fl.LOSSES[name]
    cases = [{}] + [{p: v} for p, rule in entry.ranges.items() if range_of(rule) for v in edges(rule)]
    for classes, parameters in itertools.product((1, 2, 999, 1000, 8192, 9000), cases):
        rows = torch.stack([torch.zeros(classes), torch.linspace(-1.0, 1.0, classes)])
        for logits, made in itertools.product((rows[:1], rows), (entry.function, entry.reference, entry.module)):
            x, target = logits.clone().requires_grad_(), torch.zeros(len(logits), dtype=torch.int64)
            try:
                loss = entry.module(**parameters)(x, target) if made is entry.module else made(x, target, **parameters)
            except ValueError as error:
                named = [p for p in (*parameters, "logits") if p in str(error)]
                assert named and "got" in str(error), error
                continue
            (grad,) = torch.autograd.grad(loss, x)
            assert loss.isfinite() and grad.isfinite().all(), (parameters, classes, made)


@pytest.mark.parametrize(("a", "q"), [(1.0 + 1e-6, 0.4), (1.5, 0.4), (1.0 + 1e-7, 0.5)])
def test_a_of_aue_beside_a_small_power(a, q):
    logits, target = torch.tensor([[30.0, 0.0], [0.0, 1.0], [0.0, 30.0]]), torch.zeros(3, dtype=torch.int64)
    found = fl.functional.aue_loss(logits, target, a=a, q=q, reduction="none")
    right = fl.reference.aue_loss(logits.double(), target, a=a, q=q, reduction="none")
    torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-3)
