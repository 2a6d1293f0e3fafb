"""timm's Mixup and CutMix, whose targets are class probabilities, for losses that take class indices."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses._arguments import LOSSES
from fused_losses._common import RowLossModule
from fused_losses._plain import reads_values
from fused_losses.mixed import mixed

__all__ = ["MixupLoss"]


class MixupLoss(torch.nn.Module):
    """Lets any row loss take the targets of ``timm.data.Mixup``, as the criterion of a loop or of ``timm.task``.

    With target probabilities u the loss of a row is ``sum_k u_k loss(logits, k)``. A loss that takes probabilities gets
    u as it is; with class weights or a logit bias only cross entropy does, which refuses the latter. For all others the
    two labels of a row are found in u and given to :func:`fused_losses.functional.mixed`; then timm's
    ``label_smoothing`` has to be 0, because it gives every class a share. A mean with class weights divides by ``sum_k
    u_k weight[k]`` over all rows, that of cross entropy by the number of rows, as torch's. Class indices are passed on,
    so the same criterion serves validation.

    Args:
        loss: the Module of a row loss; its options apply.

    Raises:
        TypeError: ``loss`` is no Module of a row loss. Z-Error losses are none: they compare a row with those of its
            class, and a mixed row has two.
        ValueError: at a call, where two labels have to be found, a row has more of them (on CUDA: a device assertion,
            in compiled code: RuntimeError) or holds no probabilities (looked at on the CPU only, in eager mode).

    Example:
        >>> task = timm.task.ClassificationTask(model, MixupLoss(fl.GCELoss()))  # doctest: +SKIP
    """

    def __init__(self, loss: RowLossModule) -> None:
        super().__init__()
        if not isinstance(loss, RowLossModule):
            raise TypeError(f"loss must be the Module of a row loss, got {type(loss).__name__}")
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of ``logits`` ``(N, C)`` for probabilities ``(N, C)`` or class indices ``(N,)``."""
        if not target.is_floating_point() or self._takes_probabilities():
            whole: Tensor = self.loss(logits, target)
            return whole
        shares, labels = _two_labels(target)
        # Of a row that was mixed with one of its own class the second label has share 0; it could be any class.
        second = torch.where(shares[1] > 0.0, labels[1], labels[0])
        return mixed(self.loss, logits, labels[0], second, shares[0].clamp(max=1.0))

    def _takes_probabilities(self) -> bool:
        loss = self.loss
        if loss.stem == "cross_entropy":
            return True
        bias = loss.logit_bias if loss.training else 0.0
        has_bias = isinstance(bias, (Tensor, str)) or bias != 0.0
        # With class weights the mean divides by the weights of both labels, as if each were the only one of a row.
        return LOSSES[loss.stem].takes_probabilities and loss.weight is None and not has_bias


def _two_labels(target: Tensor) -> tuple[Tensor, Tensor]:
    """The shares and the labels of the two classes that have any, each ``(2, N)``."""
    shares, labels = (found.T.contiguous() for found in target.topk(2, dim=1))
    rest = target.sum(1) - shares.sum(0)
    message = "target must have two labels in a row where the loss takes no probabilities (label_smoothing=0)"
    if reads_values(target):
        if bool(((target < 0).any(1) | ((target.sum(1) - 1.0).abs() > 1e-2)).any()):
            raise ValueError("target must hold probabilities, >= 0 with rows that sum to 1, got a row that does not")
        if rest.numel() and float(rest.max()) > 1e-3:
            raise ValueError(f"{message}, got a row with {float(rest.max()):.3g} on others")
    elif not torch._C._are_functorch_transforms_active():  # torch has no form of the assertion for vmap
        torch._assert_async((rest <= 1e-3).all(), message)
    return shares, labels
