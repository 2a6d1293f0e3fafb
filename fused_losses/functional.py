"""The losses as functions; each has a Module of the same parameters in :mod:`fused_losses`."""

from fused_losses.active_passive import (
    nce_agce_loss,
    nce_aue_loss,
    nce_mae_loss,
    nce_rce_loss,
    nfl_mae_loss,
    nfl_rce_loss,
)
from fused_losses.bi_tempered import bi_tempered_loss
from fused_losses.clipped import bounded_ce_loss, phuber_ce_loss, phuber_gce_loss, truncated_gce_loss
from fused_losses.corrections import backward_correction_loss, forward_correction_loss
from fused_losses.cross_entropy import cross_entropy
from fused_losses.eps_softmax import ece_loss, ece_mae_loss, efl_mae_loss
from fused_losses.gjs import gjs_loss
from fused_losses.ldr_kl import ldr_kl_loss
from fused_losses.linear import linear_loss
from fused_losses.margin import hem_loss, multi_margin_loss
from fused_losses.mean_log import cores_loss, unhinged_loss
from fused_losses.mixed import mixed
from fused_losses.negative import anl_ce_loss, anl_fl_loss, nnce_loss, nnfl_loss
from fused_losses.normalized import nce_loss, nfl_loss, ngce_loss
from fused_losses.powers import amse_loss, jal_ce_loss, jal_fl_loss, sgce_loss
from fused_losses.row_statistics import row_statistics
from fused_losses.softmax import (
    ae_loss,
    agce_loss,
    aue_loss,
    focal_loss,
    gce_loss,
    js_loss,
    mae_loss,
    poly_loss,
    rce_loss,
    sce_loss,
    taylor_ce_loss,
)
from fused_losses.z_bce import z_error_bce_with_logits
from fused_losses.z_cross_entropy import z_error_cross_entropy
from fused_losses.z_mse import z_mse_loss

__all__ = [
    "ae_loss",
    "agce_loss",
    "amse_loss",
    "anl_ce_loss",
    "anl_fl_loss",
    "aue_loss",
    "backward_correction_loss",
    "bi_tempered_loss",
    "bounded_ce_loss",
    "cores_loss",
    "cross_entropy",
    "ece_loss",
    "ece_mae_loss",
    "efl_mae_loss",
    "focal_loss",
    "forward_correction_loss",
    "gce_loss",
    "gjs_loss",
    "hem_loss",
    "jal_ce_loss",
    "jal_fl_loss",
    "js_loss",
    "ldr_kl_loss",
    "linear_loss",
    "mae_loss",
    "mixed",
    "multi_margin_loss",
    "nce_agce_loss",
    "nce_aue_loss",
    "nce_loss",
    "nce_mae_loss",
    "nce_rce_loss",
    "nfl_loss",
    "nfl_mae_loss",
    "nfl_rce_loss",
    "ngce_loss",
    "nnce_loss",
    "nnfl_loss",
    "phuber_ce_loss",
    "phuber_gce_loss",
    "poly_loss",
    "rce_loss",
    "row_statistics",
    "sce_loss",
    "sgce_loss",
    "taylor_ce_loss",
    "truncated_gce_loss",
    "unhinged_loss",
    "z_error_bce_with_logits",
    "z_error_cross_entropy",
    "z_mse_loss",
]
