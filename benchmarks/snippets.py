"""Losses as a user would write them in a few lines of PyTorch: no options, no checks, mean over rows.

They are opponents, not references: class weights, ignored rows and masked classes, which cost time in
``fused_losses.reference``, are absent. The classes are dimension 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def aue(logits: Tensor, target: Tensor) -> Tensor:
    a, q = 5.5, 3.0
    return (((a - _p_target(logits, target)) ** q - (a - 1.0) ** q) / q).mean()


def ae(logits: Tensor, target: Tensor) -> Tensor:
    return torch.exp(-_p_target(logits, target) / 2.5).mean()


def rce(logits: Tensor, target: Tensor) -> Tensor:
    return RCE_A * (1.0 - _p_target(logits, target)).mean()


def taylor_ce(logits: Tensor, target: Tensor) -> Tensor:
    miss = 1.0 - _p_target(logits, target)
    return (miss + 0.5 * miss**2).mean()


def phuber_ce(logits: Tensor, target: Tensor) -> Tensor:
    tau = 10.0
    log_p = F.log_softmax(logits, 1).gather(1, target.unsqueeze(1))
    p = log_p.exp()
    return torch.where(p <= 1.0 / tau, math.log(tau) + 1.0 - tau * p, -log_p).mean()


def bounded_ce(logits: Tensor, target: Tensor) -> Tensor:
    return torch.log(1.1 / (_p_target(logits, target) + 0.1)).mean()


def agce(logits: Tensor, target: Tensor) -> Tensor:
    a, q = 0.6, 0.6
    return (((a + 1.0) ** q - (a + _p_target(logits, target)) ** q) / q).mean()


def sce(logits: Tensor, target: Tensor) -> Tensor:
    return 0.1 * F.cross_entropy(logits, target) + rce(logits, target)


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """The form of torchvision's focal loss for class indices, without its alpha."""
    ce = F.cross_entropy(logits, target, reduction="none")
    return ((1.0 - torch.exp(-ce)) ** 2 * ce).mean()


def nce(logits: Tensor, target: Tensor) -> Tensor:
    log_probs = F.log_softmax(logits, 1)
    return (log_probs.gather(1, target.unsqueeze(1)) / log_probs.sum(1, keepdim=True)).mean()


def nce_mae(logits: Tensor, target: Tensor) -> Tensor:
    return nce(logits, target) + 0.5 * mae(logits, target)


def nce_rce(logits: Tensor, target: Tensor) -> Tensor:
    return nce(logits, target) + rce(logits, target)


def hem(logits: Tensor, target: Tensor) -> Tensor:
    index = target.unsqueeze(1)
    errors = (logits - logits.gather(1, index) + 0.2).clamp_min(0.0).scatter(1, index, 0.0)
    counted = (errors >= errors.mean(1, keepdim=True)) & (errors > 0.0)
    rows = torch.where(counted, errors, 0.0).sum(1) / (counted.sum(1) + 1e-6)
    return rows.sum() / ((rows > 0.0).sum() + 1e-6)


_ALL = (
    mae,
    mae_auto,
    gce,
    aue,
    ae,
    rce,
    taylor_ce,
    phuber_ce,
    bounded_ce,
    agce,
    sce,
    focal,
    nce,
    nce_mae,
    nce_rce,
    hem,
)
SNIPPETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {function.__name__: function for function in _ALL}
