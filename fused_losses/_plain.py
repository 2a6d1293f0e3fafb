"""Whether a tensor's memory and numbers are there to be looked at, and whether a derivative in it is asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

dispatch_modes = torch._C._len_torch_dispatch_stack


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's memory is there, not traced or wrapped."""
    if torch.compiler.is_compiling() or dispatch_modes():
        return False
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def in_backward() -> bool:
    """Whether a backward pass is running. What is computed then is a checkpoint's recomputation, from which a loss must
    not learn again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def inside_transforms(tensor: Tensor) -> Tensor:
    """What a function transform has wrapped, with all that it is mapped over."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def outside_transforms() -> AbstractContextManager[Any]:
    """Where function transforms are active, a context in which new tensors are none of theirs."""
    active = torch._C._are_functorch_transforms_active()
    return torch._C._DisableFuncTorch() if active else nullcontext()


def in_forward_mode(*tensors: Tensor | None) -> bool:
    """Whether a forward-mode derivative is asked for in one of them."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)  # type: ignore[no-untyped-call]


def reads_values(tensor: Tensor) -> bool:
    """Whether its values are there to be looked at: on the CPU, not traced or wrapped."""
    return tensor.is_cpu and is_plain(tensor) and not torch._C._are_functorch_transforms_active()
