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
]
