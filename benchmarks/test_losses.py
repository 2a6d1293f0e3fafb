"""Benchmarks of single cases with pytest-benchmark.

    pytest benchmarks -k "hem-fused-4096x1000-float32-fwd_bwd"     (-k takes any part of a name, and "and", "or", "not")
    pytest benchmarks --benchmark-disable                          (checks only: small shapes, every benchmark once)

Names are loss-provider-shape-dtype-mode, on a GPU followed by -cuda. Times are wall times on buffers that rotate; for
ratios between providers use ``python -m benchmarks``, where they take turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.calls import Buffers, Call
from benchmarks.cases import CLASS_COUNTS, LOSSES, MODES, Case, LossFunction
from benchmarks.jobs import CHECKED_LOGITS
from benchmarks.measure import peak_extra_bytes
from benchmarks.providers import PROVIDERS, check, exact, first_rows
from benchmarks.suites import PIXELS

Pair = tuple[torch.Tensor, torch.Tensor]

SHAPES = ((256, 10), *((max(8, (1 << 22) // c), c) for c in CLASS_COUNTS), (4096, 1000), (65536, 10), PIXELS)
SMALL_SHAPES = ((256, 10), (9, 1001), (2, 19, 6, 8))
DTYPES = ("float32", "float16", "bfloat16")
SMALL_HALF_MODES = ("fwd", "fwd_bwd_scaled")
SMALL_COMPILED = ("cross_entropy",)  # the compiler takes seconds for each


def parameters(loss: str, disabled: bool) -> list[Any]:
    """Every provider, shape, dtype and mode of a loss that exists here."""
    shapes = SMALL_SHAPES if disabled else SHAPES
    if LOSSES[loss].kind != "rows":
        shapes = ((600,), (50, 12)) if disabled else ((65536,), (65536, 12))
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found = []
    for device in devices:
        for case in (Case(loss, shape, dtype, device) for shape in shapes for dtype in DTYPES[:: 2 if disabled else 1]):
            for name, provider in PROVIDERS.items():
                if name == "compile" and disabled:
                    if case.loss not in SMALL_COMPILED or case.shape != SMALL_SHAPES[0] or case.dtype != "float32":
                        continue
                elif name != "compile" and provider.make(case) is None:
                    continue
                if name == "reference" and disabled and case.shape != shapes[0]:
                    continue  # tests/ compare it with the fused loss at every shape
                for mode in MODES if case.dtype == "float32" or not disabled else SMALL_HALF_MODES:
                    label = case.id.replace(f"{loss}-", f"{loss}-{name}-", 1)
                    marks = pytest.mark.cuda if device == "cuda" else ()
                    label = f"{label}-{mode}" + ("-cuda" if device == "cuda" else "")
                    found.append(pytest.param(case, name, mode, id=label, marks=marks))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "provider", "mode"} <= set(metafunc.fixturenames):
        disabled = metafunc.config.getoption("benchmark_disable")
        names = [values for loss in LOSSES for values in parameters(loss, disabled)]
        metafunc.parametrize(("case", "provider", "mode"), names)


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, Pair, Pair]:
    """Logits, targets, the rows that are checked and what they must give; tests of a case follow one another."""
    logits, target = case.inputs()
    some = first_rows(case, logits, target, CHECKED_LOGITS[case.device])
    return logits, target, some, exact(case, *some)


@functools.lru_cache(maxsize=1)
def checked_function(case: Case, provider: str) -> LossFunction:
    """The provider's function, made and checked once for all modes."""
    function = PROVIDERS[provider].make(case)
    assert function is not None
    _, _, some, want = inputs_of(case)
    check(provider, case, function, *some, want)
    return function


def test_loss(benchmark: BenchmarkFixture, case: Case, provider: str, mode: str) -> None:
    logits, target, _, _ = inputs_of(case)
    function = checked_function(case, provider)

    buffers = Buffers.of(case, logits, target, count=2 if benchmark.disabled else None)
    call = Call(function, mode, buffers, PROVIDERS[provider].overwrites_logits)
    numbers = iter(range(1 << 62))

    def prepare() -> tuple[tuple[int, Any], dict[str, Any]]:
        i = next(numbers)
        return (i, call.prepare(i)), {}

    def run(i: int, prepared: Any) -> Any:
        result = call.run(i, prepared)
        if case.device == "cuda":
            torch.cuda.synchronize()
        return result

    result = benchmark.pedantic(run, setup=prepare, rounds=30, warmup_rounds=3)
    for tensor in result if isinstance(result, tuple) else (result,):
        assert bool(tensor.isfinite().all())
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(case.floor_bytes(mode) / benchmark.stats.stats.median / 1e9, 2)
        benchmark.extra_info["floor_bytes"] = case.floor_bytes(mode)
        benchmark.extra_info["peak_extra_bytes"] = peak_extra_bytes(call, case.device)
