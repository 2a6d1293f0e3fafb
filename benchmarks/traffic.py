"""Bytes that a call moves, counted operator by operator, as if nothing stayed in a cache between two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read as many entries of their large operand as they return.
_READ_FEW = ("gather", "nll_loss_forward", "nll_loss2d_forward", "index_select")
# Operators that only write, whatever they are given.
_WRITE_ONLY = ("zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_NO_TRAFFIC = ("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh")


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _size(tensor: Tensor) -> int:
    """Bytes of the distinct entries: broadcast dimensions count once."""
    entries = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return entries * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Counts the bytes of the operators called inside; views are free.

    While a dispatch mode is active our forward saves statistics and our backward reads the logits a second time. With
    ``at_once`` they are counted as they work without it: forward writes the gradient while it has the logits at hand.
    """

    def __init__(self, at_once: bool = False) -> None:
        super().__init__()
        self.bytes = 0
        self.at_once = at_once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in _NO_TRAFFIC:
            return result
        written = sum(map(_size, _tensors(result)))
        if self.at_once and name == "row_loss_backward":
            self.bytes += written
            return result
        if self.at_once and name == "row_loss_with_stats":
            written = _size(result[0])
        inputs = list(_tensors([*args, *(kwargs or {}).values()]))
        if name in _WRITE_ONLY:
            read = 0
        elif name in _READ_FEW:
            read = sum(map(_size, inputs[1:])) + written
        else:
            read = sum(map(_size, inputs))
        self.bytes += read + written
        return result


def moved_bytes(call: Callable[[], Any], at_once: bool = False) -> int:
    """Bytes of one ``call``; for ``at_once`` see :class:`Traffic`."""
    with Traffic(at_once) as traffic:
        call()
    return traffic.bytes
