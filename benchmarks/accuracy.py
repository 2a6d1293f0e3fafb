"""Largest errors of value and gradient against float64, ours and plain PyTorch's.

The exact result is the reference in float64 on the same (already rounded) logits, with the batch mean of 256 x 1000 and
two rows that are rarer: a certain one and a hopeless one. Errors are relative: of the
value to the value, of the gradient to its largest entry. The largest over two batches counts. The gradient
is taken for an upstream gradient of 1 and for another.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from benchmarks.cases import LOSSES, UPSTREAM, Case, LossFunction
from benchmarks.providers import PROVIDERS, exact, value_and_gradient
from benchmarks.snippets import SNIPPETS

SHAPE, FLAT_SHAPE, SEEDS = (256, 1000), (16384,), 2
DTYPES = ("float32", "float16", "bfloat16")
PROVIDER_NAMES = ("fused", "reference", "plain")


def function_of(provider: str, case: Case) -> LossFunction | None:
    """The provider's loss; "plain" is the shortest spelling in PyTorch, in the dtype of the logits."""
    if provider == "plain":
        return PROVIDERS["torch"].make(case) or SNIPPETS.get(case.loss)
    return PROVIDERS[provider].make(case)


def errors(case: Case) -> dict[str, dict[str, float]]:
    """For each provider the largest errors of value and gradient; infinite where a result is not finite."""
    worst: dict[str, dict[str, float]] = {}
    functions = {name: function_of(name, case) for name in PROVIDER_NAMES}
    for seed in range(SEEDS):
        logits, target = case.inputs(seed)
        if case.spec.kind == "rows":
            logits[0, target[0]], logits[1, target[1]] = 25.0, -25.0
        want = exact(case, logits, target, 1.0)
        for name, function in functions.items():
            if function is not None:
                unit = value_and_gradient(case, function, logits, target, 1.0)
                scaled = value_and_gradient(case, function, logits, target, UPSTREAM)[1]
                found = {
                    "value_error": largest(unit[0], want[0]),
                    "gradient_error": largest(unit[1], want[1]),
                    "scaled_gradient_error": largest(scaled, UPSTREAM * want[1]),
                }
                before = worst.setdefault(name, found)
                worst[name] = {what: max(error, before[what]) for what, error in found.items()}
    return worst


def largest(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``want``."""
    error = float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def measure(device: str) -> list[dict[str, Any]]:
    """One row for every loss, dtype and provider; JSON has no infinity, None stands for it."""
    rows = []
    for name, loss in LOSSES.items():
        for dtype in DTYPES:
            case = Case(name, SHAPE if loss.kind == "rows" else FLAT_SHAPE, dtype, device)
            for provider, found in errors(case).items():
                numbers = {what: error if math.isfinite(error) else None for what, error in found.items()}
                rows.append({"loss": name, "dtype": dtype, "device": device, "provider": provider, **numbers})
    return rows
