"""Whatever torch's losses take in place of a number: bools, NumPy's numbers, tensors of no dimension."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_in
from test_argument_kinds import REAL, WHOLE
from torch.nn import functional as F

import fused_losses as fl
from fused_losses._parameters import Count, OrNone, OrTensor, Range

pytestmark = pytest.mark.any_cpu  # what is given to kernels, not what they make of it

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 4, 2])
RANGES = {
    (name, parameter): rule.range if isinstance(rule, OrNone) else rule
    for name, entry in fl.LOSSES.items()
    for parameter, rule in entry.ranges.items()
    if isinstance(rule, (Range, OrNone))
}
KINDS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda v: torch.tensor(v, dtype=torch.float64),
    "array": np.array,
    "integer": lambda v: torch.tensor(int(v)),
    "int32": lambda v: torch.tensor(int(v), dtype=torch.int32),
    "flag": lambda v: torch.tensor(bool(v)),
    "bool": bool,
    "numpy bool": np.bool_,
}


def number_for(name: str, parameter: str, kind: str) -> float | None:
    """A number of the parameter's range that the kind can hold."""
    if isinstance(RANGES[name, parameter], Count) and ("bool" in kind or kind == "flag"):
        return None
    default = fl.LOSSES[name].parameters[parameter]
    candidates = [1.0, 0.0] if "bool" in kind or kind == "flag" else [default, 0.3, 1.0, 2.0, 0.0, 1e-4]
    whole = kind in ("integer", "int32")
    allowed = [
        v for v in candidates if v is not None and RANGES[name, parameter].holds(v) and (not whole or v == int(v))
    ]
    return allowed[0] if allowed else None


CASES = [case for case in one_in(3, RANGES, KINDS) if number_for(*case.values[0], case.values[1]) is not None]


@pytest.mark.parametrize(("key", "kind"), CASES)
def test_it_counts_as_the_number_that_it_holds(key: tuple[str, str], kind: str) -> None:
    name, parameter = key
    entry, number = fl.LOSSES[name], number_for(name, parameter, kind)
    given = KINDS[kind](number)
    for function in (entry.function, entry.reference):
        assert torch.equal(function(X, Y, **{parameter: given}), function(X, Y, **{parameter: number}))
    expected, assigned = entry.module(**{parameter: number}), entry.module()
    setattr(assigned, parameter, given)
    made = entry.module(**{parameter: given})
    for module in (made, assigned, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        kept = getattr(module, parameter)
        assert type(kept) in (float, int) and kept == number and not module.state_dict()
        assert torch.equal(module(X, Y), expected(X, Y))
    assert repr(made).replace(".0", "") == repr(expected).replace(".0", "")


def test_as_torch() -> None:
    """Accepted where torch accepts it, with torch's value; an array of no dimension besides."""
    half = torch.tensor(0.5)
    for value in (
        True, np.True_, np.float32(0.5), np.array(0.5), half, half.double(), half.half(), torch.tensor(1),
        torch.tensor(True), half.reshape(1), torch.tensor([0.5, 0.5]), half.clone().requires_grad_(), "0.5", None,
    ):  # fmt: skip
        for theirs, ours in [
            (
                lambda v: F.cross_entropy(X, Y, label_smoothing=v),
                lambda v: fl.functional.cross_entropy(X, Y, label_smoothing=v),
            ),
            (
                lambda v: torch.nn.CrossEntropyLoss(label_smoothing=v)(X, Y),
                lambda v: fl.CrossEntropyLoss(label_smoothing=v)(X, Y),
            ),
        ]:
            try:
                expected = theirs(value)
            except TypeError:
                if isinstance(value, np.ndarray):
                    continue
                with pytest.raises(TypeError, match=r"^label_smoothing must be a number, got "):
                    ours(value)
            else:
                torch.testing.assert_close(ours(value), expected)
    for value in (
        True,
        np.array(1),
        np.int64(1),
        torch.tensor(1),
        torch.tensor(1, dtype=torch.uint8),
        torch.tensor(1.0),
    ):
        try:
            expected = F.cross_entropy(X, Y, ignore_index=value)
        except TypeError:
            with pytest.raises(TypeError, match=r"^ignore_index must be an integer, got "):
                fl.CrossEntropyLoss(ignore_index=value)
        else:
            module = fl.CrossEntropyLoss(ignore_index=value)
            assert type(module.ignore_index) is int
            torch.testing.assert_close(module(X, Y), expected)
    for value in (1, True, 2.0, torch.tensor(2), torch.tensor(2.0), np.array(2)):
        ours = fl.MultiMarginLoss(p=value)(X, Y)
        torch.testing.assert_close(ours, F.multi_margin_loss(X, Y, p=int(value)))


@pytest.mark.parametrize("name", [name for name in (*REAL, *WHOLE) if name != "pairs from"])
def test_other_arguments(name: str) -> None:
    """Of the wrappers, the Z-Error losses and the helpers."""
    call, number = (REAL | WHOLE)[name]
    given = torch.tensor(number, dtype=torch.float64 if name in REAL else torch.int64)
    if name in REAL and isinstance(number, int):
        torch.testing.assert_close(call(torch.tensor(number)), call(number))
    torch.testing.assert_close(call(given), call(number))


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)], ids=["bool", "numpy bool", "flag"])
def test_a_bool_is_no_count(value: Any) -> None:
    for name, call in {
        "num_iters": lambda: fl.BiTemperedLoss(num_iters=value),
        "order": lambda: fl.functional.taylor_ce_loss(X, Y, order=value),
        "min_count": lambda: fl.ZErrorCrossEntropyLoss(min_count=value),
        "num_tasks": lambda: fl.ZErrorBCEWithLogitsLoss(num_tasks=value),
        "in_features": lambda: fl.LinearLoss(value, 3),
        "num_samples": lambda: fl.ELRLoss(value, 3),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got "):
            call()


def test_what_modules_keep() -> None:
    two, half = torch.tensor(2), torch.tensor(0.5)
    judged = fl.ZErrorCrossEntropyLoss(1.0, running=True, momentum=half, min_count=two, num_classes=torch.tensor(5))
    of_labels = fl.ZErrorBCEWithLogitsLoss((half, np.float32(1.0)), min_count=two)
    layer = fl.LinearLoss(two, two, chunk_bytes=torch.tensor(100))
    for kept in (judged.momentum, judged.min_count, judged.num_groups, of_labels.min_count, layer.chunk_bytes):
        assert type(kept) in (float, int)
    assert of_labels.threshold == (0.5, 1.0) and all(type(x) is float for x in of_labels.threshold)
    assert fl.SmallLoss("gce", True).keep == 1 and fl.HEMLoss(True).margin == 1
    judged.momentum = half
    assert judged(X, Y).isfinite()


def test_in_compiled_code() -> None:
    for module in (fl.GCELoss(torch.tensor(0.3)), fl.CrossEntropyLoss(label_smoothing=True)):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X, Y), module(X, Y))


def test_no_derivative_is_lost() -> None:
    message = "^q must be a number, got a tensor that requires a gradient, and would get none$"
    q = torch.tensor(0.7)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return fl.functional.gce_loss(X, Y, q=value)

    for call in (
        lambda: torch.func.grad(loss)(q),
        lambda: torch.func.jvp(loss, (q,), (q,)),
        lambda: fl.GCELoss(torch.nn.Parameter(q)),
        lambda: setattr(fl.GCELoss(), "q", torch.nn.Parameter(q)),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    module = fl.GCELoss()
    del module.q
    with pytest.raises(TypeError, match=r"^q must be a number, got a buffer, whose later values would not count$"):
        module.register_buffer("q", q)


def test_what_has_a_place_for_tensors_keeps_them() -> None:
    """As before: those that a schedule may write."""
    assert isinstance(fl.HEMLoss(torch.tensor(0.5)).margin, torch.Tensor)
    assert isinstance(fl.MAELoss(logit_bias=torch.tensor(0.5)).logit_bias, torch.Tensor)
    for wrong in (lambda: fl.HEMLoss(torch.tensor(1)), lambda: fl.MAELoss(logit_bias=torch.tensor(1))):
        with pytest.raises(ValueError, match="floating point tensor"):
            wrong()
    assert OrTensor(Range("be 1", lambda v: v == 1)).pack("x", True) == 1
