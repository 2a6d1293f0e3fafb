"""What torch puts around a Module: wrappers, and hooks that make its weight."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

# Where each wrapper keeps the wrapped Module. Wrappers are looked up among the modules that are imported already: to
# import them all would take seconds, and one that wraps something has been imported.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "module"),
)


def unwrap(module: Any) -> Any:
    """``module`` without ``torch.compile`` and the data-parallel wrappers; anything else as it is.

    Wrappers hand attributes through for reading, but an attribute or a buffer that is set ends up on the wrapper.
    """
    for place, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(place), name, None)
        if wrapper is not None and isinstance(module, wrapper):
            return unwrap(getattr(module, attribute))
    return module


def owns(module: nn.Module, name: str) -> bool:
    """Whether ``module`` itself has the attribute, parameter or buffer, and not its class or a Module inside it."""
    return any(name in held for held in (vars(module), module._buffers, module._parameters))


def make_weight(layer: nn.Module, input: Any) -> None:
    """What a call of a layer does before it reads its weight, for whoever reads that without calling the layer.

    Pruning, and the older spectral and weight norm of torch, make the weight in a hook; other hooks are not run.
    """
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is not None and isinstance(layer, sharded):
        raise RuntimeError(
            "linear must not be sharded by fully_shard on its own, as nobody calls it: give the LinearLoss itself, or "
            "the Module around it, to fully_shard"
        )
    for hook in layer._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(layer, (input,))
