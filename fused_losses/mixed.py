"""Two labels a row: the loss of batches made by mixup and CutMix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses._arguments import LOSSES, REDUCTIONS, check_reduction
from fused_losses._common import RowLossModule
from fused_losses._parameters import closed_fraction


def _function_and_options(
    loss: str | Callable[..., Tensor] | nn.Module,
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    if isinstance(loss, RowLossModule):
        return LOSSES[loss.stem].function, loss.call_options() | {"reduction": loss.reduction}
    if isinstance(loss, nn.Module):
        raise TypeError(f"loss must be a name, a function or a Module of a row loss, got {type(loss).__name__}")
    if callable(loss):
        return loss, {}
    stem = str(loss).removesuffix("_loss")
    if stem not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[stem].function, {}


def _sum_of_weights(target: Tensor, samples: Tensor, options: dict[str, Any]) -> Tensor:
    counted = target != options.get("ignore_index", -100)
    weight = options.get("weight")
    of_class = 1.0 if weight is None else weight[torch.where(counted, target.long(), 0)]
    return torch.where(counted, samples * of_class, 0.0).sum()


def mixed(
    loss: str | Callable[..., Tensor] | nn.Module,
    logits: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    **options: Any,
) -> Tensor:
    """``lam loss(a) + (1 - lam) loss(b)``: the loss of inputs that are mixed from two with different labels.

    For mixup (1710.09412) and CutMix (1905.04899) with any row loss, without a matrix of targets. The logits are read
    once for each label.

    Args:
        loss: a name ("gce"), a function of :mod:`fused_losses.functional` or a Module, whose options are taken.
        logits: as for the loss.
        target_a: class indices, weighted by ``lam``.
        target_b: class indices, weighted by ``1 - lam``, as ``target_a``.
        lam: in [0, 1]: one number for all rows, or a tensor, 0-dim or of the shape of the targets.
        **options: of the loss: its parameters, ``weight``, ``ignore_index``, ``reduction``, ``logit_bias``,
            ``sample_weight``.

    Returns:
        As the loss does. With one ``lam`` the mean is ``lam`` times that of one label plus ``1 - lam`` times that of
        the other, each over its own weights; with ``lam`` per row it is the sum of both over the sum of all weights.

    Raises:
        ValueError: ``lam`` is a number outside [0, 1]; an unknown loss or reduction ("active_mean" cannot be mixed).
        RuntimeError: shapes or dtypes that do not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> mixed("mae", logits, torch.tensor([0]), torch.tensor([1]), 0.75)
        tensor(0.6192)
    """
    function, own = _function_and_options(loss)
    options = own | options
    reduction = options.setdefault("reduction", "mean")
    check_reduction(reduction, REDUCTIONS)
    if not isinstance(lam, Tensor):
        closed_fraction.pack("lam", lam)
    elif lam.dim() > 0 and lam.shape != target_a.shape:
        raise RuntimeError(
            f"lam must be a number, 0-dim or of the shape of target_a, {tuple(target_a.shape)}, got {tuple(lam.shape)}"
        )
    if reduction == "none" or not isinstance(lam, Tensor) or lam.dim() == 0:
        return lam * function(logits, target_a, **options) + (1.0 - lam) * function(logits, target_b, **options)
    samples = options.pop("sample_weight", None)
    samples = lam if samples is None else lam * samples, 1.0 - lam if samples is None else (1.0 - lam) * samples
    options["reduction"] = "sum"
    parts = [
        function(logits, target, sample_weight=weight, **options)
        for target, weight in zip((target_a, target_b), samples, strict=True)
    ]
    if reduction == "sum":
        return parts[0] + parts[1]
    total = _sum_of_weights(target_a, samples[0], options) + _sum_of_weights(target_b, samples[1], options)
    empty = total == 0
    return torch.where(empty, 0.0, (parts[0] + parts[1]) / torch.where(empty, 1.0, total))
