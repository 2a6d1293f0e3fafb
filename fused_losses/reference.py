"""The losses in plain PyTorch, with the signatures of :mod:`fused_losses.functional`: for tests, comparisons and any
derivative.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from fused_losses import _unregistered, functional, z_bce, z_cross_entropy, z_mse
from fused_losses._arguments import LOSSES

_named = {name: name.removesuffix("_loss") for name in functional.__all__}
globals().update({name: LOSSES[stem].reference for name, stem in _named.items() if stem in LOSSES})
cross_entropy = LOSSES["cross_entropy"].reference
backward_correction_loss = _unregistered.backward_correction_loss
forward_correction_loss = _unregistered.forward_correction_loss
gjs_loss = _unregistered.gjs_loss
z_error_bce_with_logits = z_bce.z_error_bce_with_logits_reference
z_error_cross_entropy = z_cross_entropy.z_error_cross_entropy_reference
z_mse_loss = z_mse.z_mse_loss_reference

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Tensor]:
        """What ``globals()`` got above."""


__all__ = [name for name in functional.__all__ if name in globals()]  # not linear_loss, mixed and row_statistics
