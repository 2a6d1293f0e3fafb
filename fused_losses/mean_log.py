"""The losses of ``log p_y`` and the mean of ``log p_j`` over all classes.

Each loss: the plain PyTorch formula, decorated into the fused function, then its Module. The C++ twins are in
``csrc/losses/mean_log.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_losses._arguments import LOSSES, CallOptions
from fused_losses._common import RowLossModule, RowLossOptions
from fused_losses._declare import loss_of_row
from fused_losses._parameters import OrTensor, factor
from fused_losses._reference import Rows

_beta = OrTensor(factor)


@loss_of_row({"beta": _beta}, takes_probabilities=True, sums=("log_probs",))
def cores_loss(rows: Rows, *, beta: float | Tensor = 2.0, **options: Unpack[CallOptions]) -> Tensor:
    """Confidence-regularised cross entropy: ``-log p_y + beta mean_j log p_j``. 2010.02347, for uniform labels.

    For noisy labels, in the first phase of CORES²: cross entropy less ``beta`` times that of a label drawn at random,
    which rewards confident predictions over those that fit wrong labels. The paper raises ``beta`` from 0 to 2 during
    training: assign the attribute, or write into a tensor. Its expectation is over the distribution of the noisy
    labels, here all classes count alike. ``label_smoothing = -r`` of cross entropy is this with
    ``beta = r / (1 + r)``, times ``1 + r``.

    There is no lower bound: the more the logits of other classes fall, the lower the loss, so weight decay or early
    stopping is needed. A class masked by a logit of -inf makes it -inf. The paper's sieve keeps the rows whose loss is
    at most the mean over all labels, that is ``logits.gather(1, target[:, None]).squeeze(1) >= logits.mean(1)``.

    Args:
        beta: weight of the regulariser, >= 0; 0 is cross entropy. A number or a 0-dim tensor on the device of
            ``logits``.

    Example:
        >>> cores_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), beta=1.0)
        tensor(0.)
    """
    if not isinstance(beta, Tensor):
        return -rows.log_p if beta == 0.0 else beta * (rows.sum_log_probs() / rows.num_classes) - rows.log_p
    beta, random_label = beta.to(rows.logits), rows.sum_log_probs() / rows.num_classes
    hidden = (beta == 0.0) & (random_label == -torch.inf)  # 0 times the infinite logarithm of a masked class
    return beta * torch.where(hidden, 0.0, random_label) - rows.log_p


class CORESLoss(RowLossModule, stem="cores"):
    """Module form of :func:`cores_loss`."""

    beta: float | Tensor

    def __init__(self, beta: float | Tensor = 2.0, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({"beta": beta}, **options)
        _beta.check_entries("beta", beta)


@loss_of_row({}, takes_probabilities=True, sums=("log_probs",))
def unhinged_loss(rows: Rows, **options: Unpack[CallOptions]) -> Tensor:
    """Unhinged loss: ``mean_j z_j - z_y``, linear in the logits. 1505.07634, for many classes.

    Convex and, over labels, of constant sum: the one such loss that symmetric noise cannot move. The paper's is for two
    classes and bounded weights; the mean over classes is the form that sums to a constant for more. Its gradient,
    ``1 / C - [j = y]``, never vanishes and the loss has no lower bound: without strong weight decay or bounded logits
    training diverges. It is :func:`cores_loss` with ``beta=1``. A class masked by a logit of -inf makes it -inf.

    Example:
        >>> unhinged_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        tensor(-0.5000)
    """
    value: Tensor = LOSSES["cores"].formula(rows, beta=1.0)
    return value


class UnhingedLoss(RowLossModule, stem="unhinged"):
    """Module form of :func:`unhinged_loss`."""

    def __init__(self, **options: Unpack[RowLossOptions]) -> None:
        super().__init__({}, **options)
