"""Noise-robust losses for PyTorch at the price of one read of the logits and one write of the gradient."""

from fused_losses import _ops as _ops  # first: it checks that torch is the one this was built for

# The order of these is that of the registry and of csrc/losses/registry.h.
# isort: off
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
from fused_losses.normalized import (
    NCEAGCELoss,
    NCELoss,
    NCEMAELoss,
    NCERCELoss,
    NFLLoss,
    NFLMAELoss,
    NFLRCELoss,
    NGCELoss,
)
from fused_losses.bi_tempered import BiTemperedLoss
from fused_losses.margin import HEMLoss, MultiMarginLoss

# isort: on
from fused_losses import calibration, functional, reference
from fused_losses._C import build_info, loss_names
from fused_losses._common import LOSSES

__version__ = build_info()["version"]

__all__ = [
    "LOSSES",
    "AELoss",
    "AGCELoss",
    "AUELoss",
    "BiTemperedLoss",
    "BoundedCELoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GCELoss",
    "HEMLoss",
    "JSLoss",
    "MAELoss",
    "MultiMarginLoss",
    "NCEAGCELoss",
    "NCELoss",
    "NCEMAELoss",
    "NCERCELoss",
    "NFLLoss",
    "NFLMAELoss",
    "NFLRCELoss",
    "NGCELoss",
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
