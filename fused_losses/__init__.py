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
from fused_losses.statistics import ClassStatistics, class_statistics
from fused_losses.z_cross_entropy import ZErrorCrossEntropyLoss
from fused_losses.z_error import ZErrorBCEWithLogitsLoss, ZMSELoss

__version__ = build_info()["version"]

__all__ = [
    "LOSSES",
    "AELoss",
    "AGCELoss",
    "AUELoss",
    "BoundedCELoss",
    "ClassStatistics",
    "CrossEntropyLoss",
    "FocalLoss",
    "GCELoss",
    "JSLoss",
    "MAELoss",
    "PHuberCELoss",
    "RCELoss",
    "SCELoss",
    "TaylorCELoss",
    "ZErrorBCEWithLogitsLoss",
    "ZErrorCrossEntropyLoss",
    "ZMSELoss",
    "build_info",
    "calibration",
    "class_statistics",
    "functional",
    "loss_names",
    "reference",
]
