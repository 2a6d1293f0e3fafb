"""The losses by configuration, with the call that mmsegmentation, mmpretrain and mmdetection make.

Importing this file adds ``FusedLoss`` to mmengine's registry of models (if mmengine is installed), from which the
registries of the other libraries inherit: ``custom_imports = dict(imports=["fused_losses.integrations.mmengine"])``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses import _arguments, z_cross_entropy
from fused_losses._arrays import as_tensor
from fused_losses._parameters import finite
from fused_losses.distributed import kept_weight

try:
    from mmengine.registry import MODELS
except ImportError:
    MODELS = None

__all__ = ["FusedLoss"]

_SMALLEST = torch.finfo(torch.float32).eps  # as mmsegmentation guards avg_factor


class FusedLoss(nn.Module):
    """A classification loss of this package in place of mmsegmentation's ``CrossEntropyLoss``.

    Args:
        loss: the name of a row loss, ``"gce"``, or ``"z_error_cross_entropy"``.
        loss_weight: factor on the result.
        class_weight: one weight per class, a list or a tensor; not the name of a file.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; None for the default of the loss.
        ignore_index: labels that do not count, where the call does not say it. None: 255, unless that is a class, then
            -100.
        loss_name: key of the loss in the log, by default ``"loss_gce"`` for ``loss="gce"``. mmengine adds up and trains
            on the keys that start with "loss".
        **parameters: of the loss's Module, ``q=0.5``, ``logit_bias="auto"``.

    Raises:
        TypeError: a parameter is unknown or no number, ``loss`` no name, or ``class_weight`` holds no numbers.
        ValueError: ``loss`` is unknown, or an option is out of range.

    Example:
        >>> config = dict(type="FusedLoss", loss="gce", q=0.5, loss_weight=1.0)
        >>> head = dict(type="FCNHead", num_classes=19, loss_decode=config)
    """

    def __init__(
        self,
        loss: str,
        loss_weight: float = 1.0,
        *,
        class_weight: Sequence[float] | None = None,
        reduction: str | None = None,
        ignore_index: int | None = None,
        loss_name: str | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        finite.pack("loss_weight", loss_weight)
        if not isinstance(loss, str):
            raise TypeError(f"loss must be the name of a loss, got {type(loss).__name__}")
        stem = loss.removesuffix("_loss")
        modules: dict[str, Any] = {name: entry.module for name, entry in _arguments.LOSSES.items()}
        modules["z_error_cross_entropy"] = z_cross_entropy.ZErrorCrossEntropyLoss
        if stem not in modules:
            raise ValueError(f"loss must be one of {', '.join(modules)}, got {loss!r}")
        if reduction is not None:
            parameters["reduction"] = reduction
        weight = None if class_weight is None else as_tensor("class_weight", class_weight).float()
        self.criterion: Any = modules[stem](weight=weight, **parameters)
        self.reduction: str = self.criterion.reduction
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self._loss_name = f"loss_{stem}" if loss_name is None else loss_name

    @property
    def loss_name(self) -> str:
        """The key of the loss in the log."""
        return self._loss_name

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = None,
    ) -> Tensor:
        """The loss, times ``loss_weight``.

        Args:
            cls_score: logits ``(N, C)`` or ``(N, C, H, W)``.
            label: classes ``(N,)`` or ``(N, H, W)``, or for a loss that takes them probabilities, the shape of
                ``cls_score``, as mmpretrain's Mixup gives; of these none is ignored.
            weight: weight per row or pixel, the shape of classes.
            avg_factor: what a mean divides the sum by. By default that is what the loss's mean divides by; with
                ``weight`` it is, as in mmsegmentation with ``avg_non_ignore=True``, the number of labels that count,
                or the sum of their class weights, and the number of rows of probabilities: the weights of the pixels
                are factors only. Labels that Z-Error drops do not count.
            reduction_override: in place of ``reduction``.
            ignore_index: labels that do not count; mmsegmentation's heads pass theirs, 255.

        Raises:
            ValueError: ``avg_factor`` is given with ``reduction="sum"``.
        """
        reduction = self.reduction if reduction_override is None else reduction_override
        if ignore_index is None:
            ignore_index = self.ignore_index
        if ignore_index is None:
            ignore_index = 255 if cls_score.shape[1] <= 255 else -100
        if label.is_floating_point():
            ignore_index = -100
        criterion = self.criterion
        criterion.ignore_index = ignore_index
        if avg_factor is None and weight is not None and reduction == "mean":
            return self._by_count(cls_score, label, weight)
        if avg_factor is None or reduction == "none":
            criterion.reduction = reduction
            return self.loss_weight * criterion(cls_score, label, weight)  # type: ignore[no-any-return]
        if reduction == "sum":
            raise ValueError(f'avg_factor must be None with reduction="sum", got {avg_factor}')
        criterion.reduction = "sum"
        return self._divided(criterion(cls_score, label, weight), avg_factor)

    def _divided(self, total: Tensor, by: float | Tensor) -> Tensor:
        if isinstance(by, Tensor):
            return total * self.loss_weight / by.to(total.device).clamp(min=_SMALLEST)
        return total * self.loss_weight / max(by, _SMALLEST)  # as a number: a copy would wait for the device

    def _by_count(self, cls_score: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        """The sum with weights, divided by the number of labels that count without them."""
        criterion = self.criterion
        criterion.reduction = "sum"
        if isinstance(criterion, z_cross_entropy.ZErrorCrossEntropyLoss):
            total, counts, _ = criterion(cls_score, label, weight, return_mask=True)
        else:
            total = criterion(cls_score, label, weight)
            if label.is_floating_point():
                return self._divided(total, weight.numel())
            counts = ~_arguments.is_ignored(label, criterion.ignore_index)
        return self._divided(total, kept_weight(counts, label, criterion.weight, None).to(total.dtype))


if MODELS is not None:
    MODELS.register_module(name="FusedLoss", module=FusedLoss, force=True)
