"""Largest errors of value and gradient against float64, ours and plain PyTorch's.

The exact result is the reference in float64 on the same (already rounded) logits, with the batch mean of 256 x 1000 and
the rows that a batch of natural images would not have: a certain one and a hopeless one. Errors are relative: of the
value to the value, of the gradient to its largest entry. The largest over three batches counts.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import LOSSES, Case
from benchmarks.providers import PROVIDERS, exact

SHAPE, FLAT_SHAPE, SEEDS = (256, 1000), (65536,), 3
DTYPES = ("float32", "float16", "bfloat16")
PROVIDER_NAMES = ("fused", "reference", "snippet", "torch")


def errors(provider: str, case: Case) -> tuple[float, float] | None:
    """Largest relative error of value and gradient; None if the provider does not offer the loss."""
    function = PROVIDERS[provider].make(case)
    if function is None:
        return None
    worst = [0.0, 0.0]
    for seed in range(SEEDS):
        logits, target = case.inputs(seed)
        if case.spec.kind == "rows":
            logits[0, target[0]], logits[1, target[1]] = 25.0, -25.0
        leaf = logits.clone().requires_grad_()
        value = function(leaf, target)
        (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, 0.37))
        for i, (got, want) in enumerate(zip((value, grad), exact(case, logits, target), strict=True)):
            difference = (got.detach().double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
            worst[i] = max(worst[i], float(difference))
    return worst[0], worst[1]


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
                    rows.append({**row, "value_error": found[0], "gradient_error": found[1]})
    return rows
