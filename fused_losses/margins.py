"""The margins of the high error margin losses, from the number of training samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["hem_margin", "hem_plus_margins"]


def hem_margin(num_samples: int, M: float = 2000.0) -> float:
    """The margin of HEM for a training set: ``sqrt(M / num_samples)``.

    Fewer samples need a larger margin to generalise.

    Args:
        num_samples: training samples of all classes together, at least 1.
        M: the paper's constant, > 0.

    Returns:
        The margin, in units of the logits.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> hem_margin(50_000)  # CIFAR-10 and CIFAR-100
        0.2

    Source: 2501.12191, mu = sqrt(M / N) with M = 2000.
    """
    if not 1 <= num_samples < math.inf:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    _check_constant(M)
    return math.sqrt(M / num_samples)


def hem_plus_margins(
    class_counts: Sequence[float] | Tensor | npt.NDArray[Any], M: float = 2000.0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The margins of HEM+, one per class: ``sqrt(M / (C * class_counts[i]))``.

    Rare classes get a larger margin; with equally many samples in all ``C`` classes every margin is that of
    :func:`hem_margin`.

    Args:
        class_counts: training samples of each class ``(C,)``, all at least 1.
        M: the paper's constant, > 0.
        dtype: of the result, torch's default dtype if None.

    Returns:
        The margins ``(C,)`` on the CPU, in units of the logits, for ``HEMLoss(margin=...)``.

    Raises:
        ValueError: ``class_counts`` is not one-dimensional or empty, or a class has no samples (its margin would be
            infinite; leave the class out or give it a count of your choice), or ``M`` is out of range.

    Example:
        >>> hem_plus_margins([5000, 500])
        tensor([0.4472, 1.4142])

    Source: 2501.12191, mu_i = sqrt(M / (n s_i)). Other code clamps ``mu_i`` relative to the mean; nothing is clamped
    here.
    """
    _check_constant(M)
    if isinstance(class_counts, Tensor):
        class_counts = class_counts.detach().cpu().numpy()
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError(f"class_counts must have one count per class, got shape {counts.shape}")
    bad = np.flatnonzero(~((counts >= 1.0) & (counts < math.inf)))
    if bad.size:
        raise ValueError(f"class_counts must be at least 1 for every class, got {counts[bad[0]]:g} for class {bad[0]}")
    return torch.from_numpy(np.sqrt(M / (counts.size * counts))).to(dtype or torch.get_default_dtype())


def _check_constant(M: float) -> None:
    if not 0.0 < M < math.inf:
        raise ValueError(f"M must satisfy 0 < value < inf, got {M}")
