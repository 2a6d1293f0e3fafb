"""What :class:`fused_losses.OutlierTracker` is told of a batch, as tensors of the right kind and shape."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fused_losses._arrays import Numbers, as_tensor
from fused_losses._checks import is_integer_tensor

_ROUNDING = 1e-3  # a probability computed in low precision may be this much above 1


class RowLogProbs(Protocol):
    """Something that has the log-probability of every row's label."""

    @property
    def log_prob(self) -> Tensor:
        """Of the shape of the labels."""


def rows_of(name: str, values: Numbers, shape: torch.Size | None) -> Tensor:
    """An argument of ``update`` as a tensor of its kind (index, mask, or numbers) and of the given shape."""
    if hasattr(values, "log_prob"):
        raise TypeError(
            f"{name} must be a tensor, an array or a list; give a {type(values).__name__} as row_statistics="
        )
    tensor = as_tensor(name, values)
    if tensor.numel() == 0 and not isinstance(values, (Tensor, np.ndarray)):
        tensor = tensor.to({"index": torch.int64, "mask": torch.bool}.get(name, torch.float64))
    elif name not in ("index", "mask") and isinstance(values, (list, tuple)) and tensor.dtype == torch.int64:
        tensor = tensor.double()  # a list such as [0, 1] may hold probabilities
    if name == "index" and not is_integer_tensor(tensor):
        raise TypeError(f"index must hold integers, got {tensor.dtype}")
    if name == "mask" and tensor.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True = kept; other numbers by keyword), got {tensor.dtype}")
    if name not in ("index", "mask") and not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)} of index, got {tuple(tensor.shape)}")
    return tensor


def check_samples(rows: Tensor, num_samples: int, device: torch.device) -> None:
    """Raises an IndexError where that needs no waiting for a device; there, ``index_put_`` asserts."""
    if rows.numel() and "cpu" in (rows.device.type, device.type):
        smallest, largest = (int(end) for end in torch.aminmax(rows.long()))
        worst = smallest if smallest < 0 else largest
        if not 0 <= worst < num_samples:
            raise IndexError(f"index must be in [0, {num_samples}), got {worst}")


def label_probability(
    shape: torch.Size,
    device: torch.device,
    *,
    row_statistics: RowLogProbs | None,
    log_prob: Numbers | None,
    prob: Numbers | None,
) -> Tensor | None:
    """The probability of every row's label, float64, from the one argument that is given."""
    named = {"row_statistics": row_statistics, "log_prob": log_prob, "prob": prob}
    given = [name for name, value in named.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"the probability must be given in one way, got {' and '.join(given)}")
    if row_statistics is not None:
        if not hasattr(row_statistics, "log_prob"):
            raise TypeError(f"row_statistics must have log_prob, got {type(row_statistics).__name__}")
        log_prob = row_statistics.log_prob
    name, values = ("prob", prob) if log_prob is None else ("log_prob", log_prob)
    tensor = rows_of(name, values, shape)  # type: ignore[arg-type]
    probs = tensor.to(device, torch.float64)
    if name == "log_prob":
        probs = probs.exp()
    possible = probs.isnan() | ((probs >= 0.0) & (probs <= 1.0 + _ROUNDING))
    if "cpu" not in (tensor.device.type, device.type):
        torch._assert_async(possible.all(), f"{name} must be that of a probability between 0 and 1")
    elif not possible.all():
        rule = "be between 0 and 1" if name == "prob" else "not be above 0"
        raise ValueError(f"{name} must {rule}, got {float(tensor[~possible.to(tensor.device)].flatten()[0])}")
    return probs.clamp(max=1.0)
