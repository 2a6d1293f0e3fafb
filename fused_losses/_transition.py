"""Checks of transition matrices: ``(C, C)``, [i, j] the probability of label j for a sample of class i."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses._checks import check_tensors


def check_matrix(name: str, matrix: Tensor) -> Tensor:
    """Rows of probabilities as float64 on the CPU, summing to 1. Raises a ValueError on anything else."""
    if isinstance(matrix, Tensor):
        check_tensors(**{name: matrix})
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"{name} must be a tensor of shape (C, C), got {shape}")
    if matrix.is_complex():
        raise TypeError(f"{name} must be real, got {matrix.dtype}")
    transition = matrix.detach().to("cpu", torch.float64)
    sums = transition.sum(1)
    # The rounding error of float32 rows of 10,000 classes, or of entries in half precision. NaN fails both tests.
    allowed = max(1e-4, torch.finfo(matrix.dtype).eps if matrix.is_floating_point() else 0.0)
    wrong = ~((transition >= 0).all(1) & ((sums - 1).abs() <= allowed))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        least = float(transition[row].min())
        what = f"an entry of {least:.6g}" if least < 0 else f"a sum of {float(sums[row]):.6g}"
        raise ValueError(f"{name} must be >= 0 with rows that sum to 1, got {what} in row {row}")
    return transition / sums[:, None]


def invert(transition: Tensor) -> Tensor:
    """The inverse in float64; infinite or NaN where there is none. Does not wait for a device."""
    found: Tensor = torch.linalg.inv_ex(transition.double()).inverse
    return found


def check_transition(transition: Tensor, inverse: Tensor | None = None) -> None:
    """Raises a ValueError unless rows sum to 1, and the inverse, if it is wanted, is one. On meta nothing is known."""
    if transition.is_meta:
        return
    check_matrix("transition", transition)
    if inverse is not None:
        norms = [torch.linalg.matrix_norm(m.detach().double(), torch.inf) for m in (transition, inverse)]
        condition = float(norms[0] * norms[1])
        if not condition < 1.0 / (len(transition) * torch.finfo(torch.float64).eps):
            found = f"condition number {condition:.3g}" if math.isfinite(condition) else "it has no inverse"
            raise ValueError(
                f"transition must be invertible, got a singular matrix ({found}); ForwardCorrectionLoss needs no "
                "inverse"
            )
