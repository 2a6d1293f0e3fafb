"""The losses of ``log p_y`` and the mean of ``log p_j`` over all classes.

Each loss: its formula in plain PyTorch, which a decorator turns into the fused function, then its Module. The C++ forms
are in ``csrc/losses/mean_log.h``.
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
    """Confidence-regularised cross entropy: ``-log p_y + beta mean_j log p_j``.

    For noisy labels, in the first phase of CORES². The second term is minus the cross entropy of a label drawn at
    random: it rewards confident predictions. Raise ``beta`` from 0 to 2 during training, by assigning the attribute or
    writing into a tensor. ``cross_entropy(label_smoothing=-r)`` is this loss with ``beta = r / (1 + r)``, times ``1 +
    r``.

    The loss has no lower bound, so it needs weight decay or early stopping. A masked class (logit -inf) makes it -inf.

    Source: 2010.02347. Deviation: the paper takes the mean over the distribution of the noisy labels; here all classes
    count alike. Its second phase trains on the rows whose loss is at most the mean over all labels: ``logits.gather(1,
    target[:, None]).squeeze(1) >= logits.mean(1)``.

    Args:
        beta: weight of the second term, >= 0; 0 is cross entropy. A number, or a 0-dim tensor on the device of
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
    """Unhinged loss: ``mean_j z_j - z_y``, linear in the logits z.

    For experiments. It is convex and its sum over all labels is 0, so symmetric noise does not move its minimum. Its
    gradient ``1 / C - [j = y]`` is never 0 and the loss has no lower bound: without strong weight decay or bounded
    logits training diverges. It equals :func:`cores_loss` with ``beta=1``. A masked class (logit -inf) makes it -inf.

    Source: 1505.07634. Deviation: the paper has two classes; the mean over classes is our extension, whose sum over all
    labels is constant as well.

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
