"""Largest errors of value and gradient against float64, ours and plain PyTorch's.

The exact result is the reference in float64 on the same (already rounded) logits, with the batch mean of 256 x 1000 and
two rows that are rarer: a certain one and a hopeless one. Errors are relative: of the
value to the value, of the gradient to its largest entry. The largest over three batches counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.cases import LOSSES, Case
from benchmarks.providers import PROVIDERS, exact, value_and_gradient
from benchmarks.snippets import SNIPPETS

SHAPE, FLAT_SHAPE, SEEDS = (256, 1000), (65536,), 3
DTYPES = ("float32", "float16", "bfloat16")
PROVIDER_NAMES = ("fused", "reference", "plain")


def errors(provider: str, case: Case) -> tuple[float, float] | None:
    """Largest relative error of value and gradient, NaN if one is not finite; None: the loss is not offered."""
    if provider == "plain":  # in the dtype of the logits, as a user would call it
        function = PROVIDERS["torch"].make(case) or SNIPPETS.get(case.loss)
    else:
        function = PROVIDERS[provider].make(case)
    if function is None:
        return None
    worst = [0.0, 0.0]
    for seed in range(SEEDS):
        logits, target = case.inputs(seed)
        if case.spec.kind == "rows":
            logits[0, target[0]], logits[1, target[1]] = 25.0, -25.0
        found = value_and_gradient(case, function, logits, target)
        for i, (got, want) in enumerate(zip(found, exact(case, logits, target), strict=True)):
            difference = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
            worst[i] = float(torch.maximum(torch.tensor(worst[i]), difference.cpu()))  # keeps NaN, as max() does not
    return worst[0], worst[1]


def finite(error: float) -> float | None:
    """None where there is no number, for JSON."""
    return error if math.isfinite(error) else None


def measure(device: str) -> list[dict[str, Any]]:
    """One row for every loss, dtype and provider."""
    rows = []
    for name, loss in LOSSES.items():
        for dtype in DTYPES:
            case = Case(name, SHAPE if loss.kind == "rows" else FLAT_SHAPE, dtype, device)
            for provider in PROVIDER_NAMES:
                found = errors(provider, case)
                if found is not None:
                    row = {"loss": name, "dtype": dtype, "device": device, "provider": provider}
                    rows.append({**row, "value_error": finite(found[0]), "gradient_error": finite(found[1])})
    return rows
