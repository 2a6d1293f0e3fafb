"""Noise-robust losses for PyTorch at the price of one read of the logits and one write of the gradient."""

from fused_losses import _ops as _ops  # first: it checks that torch is the one this was built for

# isort: split
from fused_losses import calibration, functional, reference
from fused_losses._C import build_info, loss_names
from fused_losses._common import LOSSES
from fused_losses.cross_entropy import CrossEntropyLoss
from fused_losses.softmax import (
    AELoss,
    AGCELoss,
    AUELoss,
    BoundedCELoss,
    FocalLoss,
    GCELoss,
    JSLoss,
    MAELoss,
    PHuberCELoss,
    RCELoss,
    SCELoss,
    TaylorCELoss,
)

__version__ = build_info()["version"]

__all__ = [
    "LOSSES",
    "AELoss",
    "AGCELoss",
    "AUELoss",
    "BoundedCELoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GCELoss",
    "JSLoss",
    "MAELoss",
    "PHuberCELoss",
    "RCELoss",
    "SCELoss",
    "TaylorCELoss",
    "build_info",
    "calibration",
    "functional",
    "loss_names",
    "reference",
]
