"""The losses inside other libraries' training loops; none of these libraries is needed until it is used.

* :mod:`~fused_losses.integrations.huggingface`: transformers' ``Trainer``;
* :mod:`~fused_losses.integrations.timm`: Mixup and CutMix;
* :mod:`~fused_losses.integrations.mmengine`: configuration files of mmengine, mmsegmentation, mmpretrain.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["huggingface", "mmengine", "timm"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
