"""Bytes that a call moves, counted operator by operator, as if nothing stayed in a cache between two of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# These touch as many entries of their large operand as they return.
_READ_FEW = ("gather", "nll_loss_forward", "nll_loss2d_forward", "index_select")
# These only write, whatever they are given.
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
    """Counts the bytes of the operators called inside; views are free."""

    def __init__(self, skip: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.bytes = 0
        self.skip = (*skip, *_NO_TRAFFIC)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in self.skip:
            return result
        written = sum(map(_size, _tensors(result)))
        inputs = list(_tensors([*args, *(kwargs or {}).values()]))
        if name in _WRITE_ONLY:
            read = 0
        elif name in _READ_FEW:
            read = sum(map(_size, inputs[1:])) + written
        else:
            read = sum(map(_size, inputs))
        self.bytes += read + written
        return result


def moved_bytes(call: Callable[[], Any], fused_unit: bool = False) -> int:
    """Bytes of one ``call``.

    ``fused_unit``: our backward skips the multiplication by an upstream gradient of 1, but cannot look at it while a
    dispatch mode is active, so that multiplication is left out here.
    """
    with Traffic(skip=("mul",) if fused_unit else ()) as traffic:
        call()
    return traffic.bytes
