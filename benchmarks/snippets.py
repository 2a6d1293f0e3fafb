"""Losses as a user would write them in a few lines of PyTorch: no options, no checks, mean over rows.

They are opponents, not references: class weights, ignored rows and masked classes, which cost time in
``fused_losses.reference``, are absent. The classes are dimension 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.calibration import solve_logit_bias

RCE_A = -math.log(1e-4)


def _p_target(logits: Tensor, target: Tensor) -> Tensor:
    return logits.softmax(1).gather(1, target.unsqueeze(1))


def mae(logits: Tensor, target: Tensor) -> Tensor:
    return 2.0 * (1.0 - _p_target(logits, target)).mean()


def mae_auto(logits: Tensor, target: Tensor) -> Tensor:
    """The bias is added by a one-hot matrix, as in published code."""
    bias = max(0.0, solve_logit_bias(logits.shape[1]))
    one_hot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    if logits.dim() > 2:
        one_hot = one_hot.movedim(-1, 1)
    return mae(logits + bias * one_hot, target)


def gce(logits: Tensor, target: Tensor) -> Tensor:
    return ((1.0 - _p_target(logits, target) ** 0.7) / 0.7).mean()


def agce(logits: Tensor, target: Tensor) -> Tensor:
    a, q = 0.6, 0.6
    return (((a + 1.0) ** q - (a + _p_target(logits, target)) ** q) / q).mean()


def sce(logits: Tensor, target: Tensor) -> Tensor:
    passive = RCE_A * (1.0 - _p_target(logits, target)).mean()
    return 0.1 * F.cross_entropy(logits, target) + passive


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """The form of torchvision's focal loss for class indices, without its alpha."""
    ce = F.cross_entropy(logits, target, reduction="none")
    return ((1.0 - torch.exp(-ce)) ** 2 * ce).mean()


def nce(logits: Tensor, target: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits, 1)
    return (log_probs.gather(1, target.unsqueeze(1)) / log_probs.sum(1, keepdim=True)).mean()


def nce_mae(logits: Tensor, target: Tensor) -> Tensor:
    return nce(logits, target) + 0.5 * mae(logits, target)


def hem(logits: Tensor, target: Tensor) -> Tensor:
    index = target.unsqueeze(1)
    errors = (logits - logits.gather(1, index) + 0.2).clamp_min(0.0).scatter(1, index, 0.0)
    counted = (errors >= errors.mean(1, keepdim=True)) & (errors > 0.0)
    rows = torch.where(counted, errors, 0.0).sum(1) / (counted.sum(1) + 1e-6)
    return rows.sum() / ((rows > 0.0).sum() + 1e-6)


SNIPPETS = {f.__name__: f for f in (mae, mae_auto, gce, agce, sce, focal, nce, nce_mae, hem)}
