"""transformers' ``Trainer`` with a loss of this package, or any other criterion of ``(logits, target)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["compute_loss"]

_NO_ITEM = -100  # the labels that Trainer leaves out of num_items_in_batch


def compute_loss(criterion: Callable[[Tensor, Tensor], Tensor], *, causal: bool | None = None) -> Callable[..., Tensor]:
    """What ``Trainer(compute_loss_func=...)`` takes, made from a loss.

    The mean over a batch is multiplied by the batch's share of ``num_items_in_batch``, so accumulated batches and ranks
    count by their items. For a plain mean the result is the sum of the losses divided by the number of items, as with
    transformers' own losses; class weights and masks count as the criterion defines it. A batch without labels that
    count has loss 0.

    Without gradients (``Trainer.evaluate``) a Module is called in eval mode: without the logit bias, and its statistics
    do not learn. There a batch without labels that count has loss NaN, as models with a loss of their own give, and
    Trainer leaves it out of the mean. A Module follows the logits to their device.

    Args:
        criterion: a Module or function of logits ``(N, C)`` and labels ``(N,)`` that gives a mean. With another
            ``ignore_index`` than -100, such as 255, accumulated batches and ranks count by all their labels, as Trainer
            counts those.
        causal: whether the logits at a position belong to the label of the next one. None goes by the name of what the
            model returns: ``...CausalLMOutput...`` does, all others do not.

    Returns:
        A function ``(outputs, labels, num_items_in_batch=None)``. It takes logits ``(N, C)``, with positions in between
        as in language models, or with channels first as in segmentation models. Labels have no class dimension, or the
        shape of the logits (several labels, probabilities). Where their shape allows both, classes are last in logits
        of up to 3 dimensions, and second in those of more.

    Raises:
        TypeError: ``criterion`` cannot be called, or ``causal`` is something else; later: there are no labels.
        ValueError: the criterion gives a sum or no reduction; later: it gives more than a number, shapes do not fit, or
            the model returns a tuple, which does not say whether its logits are causal.

    Example:
        >>> trainer = Trainer(model, args, compute_loss_func=compute_loss(fl.GCELoss()))  # doctest: +SKIP
    """
    if not callable(criterion):
        raise TypeError(f"criterion must be a Module or a function, got {type(criterion).__name__}")
    if causal not in (True, False, None):
        raise TypeError(f"causal must be True, False or None, got {causal!r}")
    reduction = _option(criterion, "reduction", "mean")
    if reduction in ("sum", "none"):
        raise ValueError(f"criterion must give a mean, got one with reduction={reduction!r}")
    return functools.partial(_compute_loss, criterion, causal)


def _option(criterion: Any, name: str, default: Any) -> Any:
    """What a criterion is called with, by ``functools.partial`` too."""
    while isinstance(criterion, functools.partial):
        if name in criterion.keywords:
            return criterion.keywords[name]
        criterion = criterion.func
    return getattr(criterion, name, default)


def _compute_loss(
    criterion: Callable[[Tensor, Tensor], Tensor],
    causal: bool | None,
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a Tensor, got {type(labels).__name__}: the Trainer found none in the batch")
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    ignore_index = _option(criterion, "ignore_index", -100)
    labels = labels.to(logits.device)
    if not labels.is_floating_point():
        labels = labels.long()  # no narrower dtype holds every ignore_index
    items = labels.ne(_NO_ITEM)
    if _is_causal(outputs, labels, causal):
        items = items[..., 1:]
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # the logits stay whole, and are not copied
    loss = _call(criterion, *_rows(logits, labels))
    if not torch.is_grad_enabled():
        loss = torch.where(labels.ne(ignore_index).any(), loss, torch.nan)
    if loss.dim() > 0:
        raise ValueError(f"criterion must give a mean, got a loss of shape {tuple(loss.shape)}")
    if num_items_in_batch is None:
        return loss
    of_all = num_items_in_batch  # of none nothing is divided by 0
    of_all = of_all.clamp(min=1) if isinstance(of_all, Tensor) else max(of_all, 1)
    return loss * items.sum() / of_all


def _is_causal(outputs: Any, labels: Tensor, causal: bool | None) -> bool:
    if causal is not None:
        return causal
    if labels.dim() > 1 and not isinstance(outputs, dict):
        raise ValueError(
            "causal must be True or False for a model that returns a tuple, got None: from a tuple nobody can tell "
            "whether its logits are for the next label"
        )
    built_in = type(outputs) in (dict, tuple, list)  # torch.compile cannot search the names of these
    return not built_in and "CausalLMOutput" in type(outputs).__name__


def _rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    channels_first = labels.shape == logits.shape[:1] + logits.shape[2:]
    if channels_first and logits.dim() > 3:  # images, even where C == H == W
        return logits, labels
    if labels.shape == logits.shape[:-1] and not labels.is_floating_point():
        return logits.flatten(0, -2), labels.flatten()
    if labels.shape == logits.shape:
        if logits.dim() > 3:
            logits, labels = logits.movedim(1, -1), labels.movedim(1, -1)
        return logits.flatten(0, -2), labels.flatten(0, -2)
    if logits.shape == (*labels.shape, 1):  # regression
        return logits.squeeze(-1), labels
    if channels_first:
        return logits, labels
    raise ValueError(
        f"labels must have the shape of the logits {tuple(logits.shape)} without the classes, last or second, got "
        f"{tuple(labels.shape)}; logits of lower resolution have to be interpolated by the model"
    )


def _call(criterion: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(criterion, nn.Module):
        return criterion(logits, labels)
    if any(buffer.device != logits.device for buffer in criterion.buffers()):
        criterion.to(logits.device)
    if torch.is_grad_enabled() or not criterion.training:
        return criterion(logits, labels)  # type: ignore[no-any-return]
    modes = [(module, module.training) for module in criterion.modules()]
    criterion.eval()
    try:
        return criterion(logits, labels)  # type: ignore[no-any-return]
    finally:
        for module, mode in modes:
            module.training = mode
