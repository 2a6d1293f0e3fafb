"""The Z-Error operators in plain PyTorch, with the operators' signatures: what kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_losses import _ops
from fused_losses._reference import class_dim, reduce_rows


def _groups(target: Tensor, num_groups: int, statistic: str, ignore_index: int) -> Tensor:
    """Every row's group; -1: none."""
    if statistic.startswith("class"):
        group = target.long()
        valid = (group != ignore_index) & (group >= 0) & (group < num_groups)
        return torch.where(valid, group, -1)
    if not statistic.startswith("bce"):
        return torch.zeros(target.shape, dtype=torch.int64, device=target.device)
    task = torch.arange(num_groups // 2, device=target.device)
    return torch.where(target == 1, 2 * task + 1, torch.where(target == 0, 2 * task, -1))


def _scores(score: Tensor, target: Tensor, group: Tensor, statistic: str) -> Tensor:
    x = score.detach().double()
    if statistic.startswith("class") and score.dim() == target.dim() + 1:
        dim = class_dim(score)
        return x.gather(dim, group.clamp(min=0).unsqueeze(dim)).squeeze(dim)
    if statistic == "class_prob":
        return torch.exp(-x)
    if statistic == "bce_prob":
        return torch.where(x.isfinite(), torch.sigmoid(x), torch.nan)
    if statistic == "mse_target":
        return target.detach().double()
    if statistic in ("mse_residual", "mse_loss"):
        residual = x - target.detach().double()
        return residual if statistic == "mse_residual" else residual * residual
    return x


def class_moments(
    score: Tensor, target: Tensor, num_classes: int, statistic: str = "class", ignore_index: int = -100
) -> Tensor:
    """The operator ``class_moments`` in plain PyTorch: two passes in float64."""
    group = _groups(target, num_classes, statistic, ignore_index)
    x = _scores(score, target, group, statistic)
    valid = (group >= 0) & x.isfinite()
    index = torch.where(valid, group, num_classes).flatten()  # one group more, for rows that do not count
    x = torch.where(valid, x, 0.0).flatten()
    bins = torch.zeros(num_classes + 1, dtype=torch.float64, device=score.device)
    count = bins.index_add(0, index, valid.flatten().double())
    mean = bins.index_add(0, index, x) / count.clamp(min=1)
    m2 = bins.index_add(0, index, (x - mean[index]).square())
    return torch.stack([count, mean, m2])[:, :num_classes]


def _judge(
    group: Tensor,
    score: Tensor,
    moments: Tensor,
    threshold: Tensor,
    statistic: str,
    tail: str,
    min_count: int,
    keep_small: bool,
) -> tuple[Tensor, Tensor]:
    """Mask and standardised scores."""
    count, mean, m2 = moments[:, group.clamp(min=0)]
    std = (m2 / (count - 1)).sqrt()
    regression = statistic.startswith("mse")
    constant = torch.zeros_like(std, dtype=torch.bool) if regression else std < 1e-8
    std = std + 1e-8 if regression else torch.where(constant, 1.0, std)
    valid = (group >= 0) & score.isfinite()
    small = (count < min_count) | (count <= 1)
    z = torch.where(valid & ~small, (score - mean) / std, torch.nan)
    limit = threshold.flatten().double()[group.clamp(min=0) % threshold.numel()]
    mirrored = (group % 2 == 0) if statistic.startswith("bce") else torch.zeros_like(valid)
    oriented = torch.where(mirrored, -z, z)
    if tail == "both":
        near = z.abs() <= limit
    else:
        near = oriented >= -limit if tail == "low" else oriented <= limit
    return valid & torch.where(small, keep_small, near | constant), z


def _threshold(threshold: Sequence[float], threshold_tensor: Tensor | None, like: Tensor) -> Tensor:
    if threshold_tensor is not None:
        return threshold_tensor.to(like.device)
    return torch.tensor(threshold, dtype=torch.float64, device=like.device)


def z_error_mask(
    score: Tensor,
    target: Tensor,
    moments: Tensor,
    threshold_tensor: Tensor | None,
    threshold: Sequence[float],
    tail: str,
    min_count: int,
    keep_small: bool,
    ignore_index: int,
    with_scores: bool,
    statistic: str = "class",
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``z_error_mask`` in plain PyTorch."""
    group = _groups(target, moments.shape[1], "class", ignore_index)
    x = _scores(score, target, group, statistic)
    limit = _threshold(threshold, threshold_tensor, score)
    mask, z = _judge(group, x, moments, limit, "class", tail, min_count, keep_small)
    return mask, torch.where((group >= 0) & ~mask, ignore_index, target.long()), z


def class_score(
    row_loss: Callable[..., Tensor], statistic: str, arguments: tuple[Any, ...], num_classes: int
) -> tuple[Tensor, Tensor, int, str, int]:
    """What rows are judged by, as arguments of ``class_moments``; ``arguments``: those of ``row_loss``."""
    logits, target, _, _, bias_tensor, margin, loss, params, logit_bias, ignore_index, _ = arguments
    with torch.no_grad():
        score, word = logits.detach(), "class"
        if statistic == "prob":
            word = "class_prob"
            score = row_loss(score, target, None, None, None, None, "cross_entropy", [0.0], 0.0, ignore_index, "none")
        elif statistic == "loss":
            score = row_loss(
                score, target, None, None, bias_tensor, margin, loss, params, logit_bias, ignore_index, "none"
            )
    return score, target, num_classes, word, ignore_index


def z_error_row_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``z_error_row_loss`` in plain PyTorch."""
    of_row_loss = arguments[:11]
    moments, threshold_tensor, threshold, statistic, tail, min_count, keep_small, with_scores = arguments[11:]
    logits, ignore_index = of_row_loss[0], of_row_loss[9]
    judged = class_score(_ops.row_loss_reference, statistic, of_row_loss, logits.shape[class_dim(logits)])
    with torch.no_grad():
        mask, kept_target, scores = z_error_mask(
            judged[0],
            judged[1],
            class_moments(*judged) if moments is None else moments,
            threshold_tensor,
            threshold,
            tail,
            min_count,
            keep_small,
            ignore_index,
            with_scores,
            judged[3],
        )
    return _ops.row_loss_reference(logits, kept_target, *of_row_loss[2:]), mask, scores


def z_error_loss(
    input: Tensor,
    target: Tensor,
    moments: Tensor | None,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    threshold_tensor: Tensor | None,
    threshold: Sequence[float],
    statistic: str,
    tail: str,
    min_count: int,
    keep_small: bool,
    with_scores: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``z_error_loss`` in plain PyTorch."""
    tasks = input.shape[1] if input.dim() == 2 else 1
    groups = 2 * tasks if statistic.startswith("bce") else 1
    if moments is None:
        moments = class_moments(input, target, groups, statistic)
    group = _groups(target, groups, statistic, -100)
    score = _scores(input, target, group, statistic)
    limit = _threshold(threshold, threshold_tensor, input)
    mask, z = _judge(group, score, moments, limit, statistic, tail, min_count, keep_small)
    loss = masked_loss(input, target, mask, pos_weight, sample_weight, statistic, reduction)
    weights = mask.to(loss.dtype) if sample_weight is None else torch.where(mask, sample_weight.detach(), 0.0)
    return loss, weights.sum(), mask, z


def masked_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor,
    pos_weight: Tensor | None,
    sample_weight: Tensor | None,
    statistic: str,
    reduction: str,
) -> Tensor:
    """The operator ``z_error_loss_reference``: the loss of the rows in ``mask``.

    Dropped rows are replaced by zeros before anything, so that neither value nor derivative can be NaN.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    x, y = (torch.where(mask, tensor.to(dtype), 0.0) for tensor in (input, target))
    if statistic.startswith("mse"):
        values = (x - y).square()
    else:
        # torch's own function is not differentiable in pos_weight
        factor = 1.0 if pos_weight is None else pos_weight.to(dtype)
        values = -(factor * y * F.logsigmoid(x) + (1.0 - y) * F.logsigmoid(-x))
    weights = torch.ones_like(values) if sample_weight is None else sample_weight.to(dtype)
    kept = torch.where(mask, values * weights, 0.0)
    return reduce_rows(kept, torch.where(mask, weights, 0.0), reduction)


_ops.register_z_error_reference(masked_loss)
