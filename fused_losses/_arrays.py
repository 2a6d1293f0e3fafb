"""Numbers as users have them - tensors, NumPy arrays, lists - as tensors, and what they saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Numbers = Tensor | npt.ArrayLike


def as_tensor(name: str, values: Any) -> Tensor:
    """``values`` without its graph: a tensor as it is, anything else as a new tensor on the CPU.

    Raises:
        TypeError: ``values``, called ``name``, holds something else than real numbers or bools, or rows of unequal
            length.
    """
    if isinstance(values, Tensor) and not values.is_complex():
        return values.detach()
    kind = f"a tensor of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
    try:
        if isinstance(values, Tensor):
            raise TypeError
        # A copy: torch takes no negative strides, no read-only arrays and no foreign byte order.
        array = np.array(values)
        array = array.astype(array.dtype.newbyteorder("="))
        if array.size == 0 and not isinstance(values, np.ndarray):
            array = array.astype(np.int64)  # an empty list does not say what it would hold
        kind = f"{kind} of {array.dtype}"
        if np.iscomplexobj(array):
            raise TypeError
        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor, an array or a list of numbers, got {kind}") from None


def check_keys(state_dict: Any, keys: Iterable[str]) -> None:
    """Raises unless it is a dictionary with these keys."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dictionary, got {type(state_dict).__name__}")
    if state_dict.keys() != set(keys):
        raise ValueError(f"state_dict must have the keys {sorted(keys)}, got {sorted(map(str, state_dict))}")
