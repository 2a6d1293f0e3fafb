"""The operators; the only file that touches ``torch.ops``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fused_losses import _C

_FOLDER = Path(__file__).parent
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _require_matching_torch() -> None:
    built, running = _C.build_info()["torch"], torch.__version__
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"fused_losses was compiled against torch {built} but torch {running} is running. "
            f"Rebuild it from its source folder: {_REBUILD}"
        )


_require_matching_torch()
torch.ops.load_library(str(_FOLDER / "libfused_losses_ops.so"))  # type: ignore[no-untyped-call]

row_loss: Callable[..., Tensor] = torch.ops.fused_losses.row_loss.default
row_loss_reference: Callable[..., Tensor] = torch.ops.fused_losses.row_loss_reference.default
class_moments: Callable[..., Tensor] = torch.ops.fused_losses.class_moments.default
z_error_mask: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.fused_losses.z_error_mask.default
z_error_row_loss: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.fused_losses.z_error_row_loss.default
z_error_loss: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = torch.ops.fused_losses.z_error_loss.default

_library = torch.library.Library("fused_losses", "IMPL")  # type: ignore[no-untyped-call]


def register_reference(implementation: Callable[..., Tensor]) -> None:
    """Makes ``implementation`` the operator ``row_loss_reference`` and the batching rule of ``row_loss``."""
    for name, key in [("row_loss_reference", "CompositeImplicitAutograd"), ("row_loss", "FuncTorchBatched")]:
        _library.impl(name, implementation, key)  # type: ignore[no-untyped-call]


def register_z_error_reference(implementation: Callable[..., Tensor]) -> None:
    """Makes ``implementation`` the operator ``z_error_loss_reference``."""
    _library.impl("z_error_loss_reference", implementation, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
