"""Every loss in plain PyTorch, with the signature of its fused function: for tests, comparisons and any derivative."""

from fused_losses._common import LOSSES
from fused_losses.functional import __all__ as __all__
from fused_losses.z_cross_entropy import z_error_cross_entropy_reference as z_error_cross_entropy
from fused_losses.z_error import z_error_bce_with_logits_reference as z_error_bce_with_logits
from fused_losses.z_error import z_mse_loss_reference as z_mse_loss

globals().update({name: LOSSES[name.removesuffix("_loss")].reference for name in __all__ if name.removesuffix("_loss") in LOSSES})
cross_entropy = LOSSES["cross_entropy"].reference
