"""Losses for PyTorch that resist wrong labels, computed in one read of the logits and one write of the gradient.

Modules such as ``GCELoss`` replace ``torch.nn.CrossEntropyLoss``. ``fused_losses.functional`` has the same losses as
functions, ``fused_losses.reference`` in plain PyTorch. Tools are in ``calibration``, ``schedules``, ``diagnostics``,
``cutoffs``, ``noise``, ``scores``, ``parallel`` and ``integrations``.
"""

from fused_losses import _ops as _ops  # first: it checks that torch is new enough

# The order of these is that of LOSSES.
# isort: off
from fused_losses.cross_entropy import CrossEntropyLoss
from fused_losses.softmax import (
    AELoss,
    AGCELoss,
    AUELoss,
    FocalLoss,
    GCELoss,
    JSLoss,
    MAELoss,
    PolyLoss,
    RCELoss,
    SCELoss,
    TaylorCELoss,
)
from fused_losses.clipped import BoundedCELoss, PHuberCELoss, PHuberGCELoss, TruncatedGCELoss
from fused_losses.eps_softmax import ECELoss, ECEMAELoss, EFLMAELoss
from fused_losses.mean_log import CORESLoss, UnhingedLoss
from fused_losses.normalized import NCELoss, NFLLoss, NGCELoss
from fused_losses.active_passive import (
    NCEAGCELoss,
    NCEAUELoss,
    NCEMAELoss,
    NCERCELoss,
    NFLMAELoss,
    NFLRCELoss,
)
from fused_losses.powers import AMSELoss, JALCELoss, JALFLLoss, SGCELoss
from fused_losses.negative import ANLCELoss, ANLFLLoss, NNCELoss, NNFLLoss
from fused_losses.ldr_kl import LDRKLLoss
from fused_losses.bi_tempered import BiTemperedLoss
from fused_losses.margin import HEMLoss, MultiMarginLoss


# isort: on
from fused_losses import (
    calibration,
    cutoffs,
    diagnostics,
    distributed,
    functional,
    integrations,
    noise,
    parallel,
    reference,
    schedules,
    scores,
)
from fused_losses._arguments import LOSSES
from fused_losses._C import build_info, loss_names
from fused_losses._z_error import ZErrorResult
from fused_losses.calibration import hem_margin, hem_plus_margins
from fused_losses.corrections import BackwardCorrectionLoss, ForwardCorrectionLoss, TransitionMatrix
from fused_losses.cutoffs import (
    CutoffCollector,
    optimal_logit_cutoff_from_gaussians,
    optimal_prob_cutoff_from_skewnorm,
    z_error_inlier_mask,
)
from fused_losses.diagnostics import OutlierTracker
from fused_losses.distributed import GlobalMean
from fused_losses.elr import ELRLoss
from fused_losses.gjs import GJSLoss
from fused_losses.linear import LinearLoss
from fused_losses.logit_norm import LogitClip, LogitNorm
from fused_losses.reducers import Antidote, ClippedLoss, SmallLoss
from fused_losses.row_statistics import RowStatistics, row_statistics
from fused_losses.schedules import LogitBiasSchedule, ThresholdSchedule, get_sigma_threshold
from fused_losses.statistics import ClassStatistics, class_statistics
from fused_losses.super_loss import SuperLoss
from fused_losses.z_bce import ZErrorBCEWithLogitsLoss
from fused_losses.z_cross_entropy import ZErrorCrossEntropyLoss
from fused_losses.z_mse import ZMSELoss

__version__ = build_info()["version"]

__all__ = [
    "LOSSES",
    "AELoss",
    "AGCELoss",
    "AMSELoss",
    "ANLCELoss",
    "ANLFLLoss",
    "AUELoss",
    "Antidote",
    "BackwardCorrectionLoss",
    "BiTemperedLoss",
    "BoundedCELoss",
    "CORESLoss",
    "ClassStatistics",
    "ClippedLoss",
    "CrossEntropyLoss",
    "CutoffCollector",
    "ECELoss",
    "ECEMAELoss",
    "EFLMAELoss",
    "ELRLoss",
    "FocalLoss",
    "ForwardCorrectionLoss",
    "GCELoss",
    "GJSLoss",
    "GlobalMean",
    "HEMLoss",
    "JALCELoss",
    "JALFLLoss",
    "JSLoss",
    "LDRKLLoss",
    "LinearLoss",
    "LogitBiasSchedule",
    "LogitClip",
    "LogitNorm",
    "MAELoss",
    "MultiMarginLoss",
    "NCEAGCELoss",
    "NCEAUELoss",
    "NCELoss",
    "NCEMAELoss",
    "NCERCELoss",
    "NFLLoss",
    "NFLMAELoss",
    "NFLRCELoss",
    "NGCELoss",
    "NNCELoss",
    "NNFLLoss",
    "OutlierTracker",
    "PHuberCELoss",
    "PHuberGCELoss",
    "PolyLoss",
    "RCELoss",
    "RowStatistics",
    "SCELoss",
    "SGCELoss",
    "SmallLoss",
    "SuperLoss",
    "TaylorCELoss",
    "ThresholdSchedule",
    "TransitionMatrix",
    "TruncatedGCELoss",
    "UnhingedLoss",
    "ZErrorBCEWithLogitsLoss",
    "ZErrorCrossEntropyLoss",
    "ZErrorResult",
    "ZMSELoss",
    "build_info",
    "calibration",
    "class_statistics",
    "cutoffs",
    "diagnostics",
    "distributed",
    "functional",
    "get_sigma_threshold",
    "hem_margin",
    "hem_plus_margins",
    "integrations",
    "loss_names",
    "noise",
    "optimal_logit_cutoff_from_gaussians",
    "optimal_prob_cutoff_from_skewnorm",
    "parallel",
    "reference",
    "row_statistics",
    "schedules",
    "scores",
    "z_error_inlier_mask",
]
