"""Every loss in plain PyTorch, with the signature of its fused function: for tests, comparisons and any derivative."""

from fused_losses._common import LOSSES
from fused_losses.functional import __all__ as __all__

globals().update({name: LOSSES[name.removesuffix("_loss")].reference for name in __all__ if name != "cross_entropy"})
cross_entropy = LOSSES["cross_entropy"].reference
