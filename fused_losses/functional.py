"""The fused losses as functions."""

from fused_losses.cross_entropy import cross_entropy
from fused_losses.softmax import (
    ae_loss,
    agce_loss,
    aue_loss,
    bounded_ce_loss,
    focal_loss,
    gce_loss,
    js_loss,
    mae_loss,
    phuber_ce_loss,
    rce_loss,
    sce_loss,
    taylor_ce_loss,
)
from fused_losses.z_cross_entropy import z_error_cross_entropy
from fused_losses.z_error import z_error_bce_with_logits, z_mse_loss

__all__ = [
    "ae_loss",
    "agce_loss",
    "aue_loss",
    "bounded_ce_loss",
    "cross_entropy",
    "focal_loss",
    "gce_loss",
    "js_loss",
    "mae_loss",
    "phuber_ce_loss",
    "rce_loss",
    "sce_loss",
    "taylor_ce_loss",
    "z_error_bce_with_logits",
    "z_error_cross_entropy",
    "z_mse_loss",
]
