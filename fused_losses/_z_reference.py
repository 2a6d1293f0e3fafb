"""The Z-Error operators in plain PyTorch, with the operators' signatures: what kernels are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_losses._arguments import RowLossArguments, ZErrorLossArguments, ZErrorRule, acc_dtype
from fused_losses._logit_bias import class_dim
from fused_losses._reference import reduce_rows, row_loss_reference

ClassScore = tuple[Tensor, str]


def _groups(target: Tensor, num_groups: int, statistic: str, ignore_index: int) -> Tensor:
    """Every row's group; -1: none."""
    if statistic.startswith("class"):
        group = target.long()
        valid = (group != ignore_index) & (group >= 0) & (group < num_groups)
        return torch.where(valid, group, -1)
    binary = statistic.startswith("bce")
    task = torch.arange(num_groups // 2 if binary else num_groups, device=target.device)
    if not binary:
        column = task.expand(target.shape) if target.dim() > 1 else torch.zeros_like(target, dtype=torch.int64)
        return torch.where(target.isnan(), -1, column)
    return torch.where(target > 0.5, 2 * task + 1, torch.where(target <= 0.5, 2 * task, -1))


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


def _judge(group: Tensor, score: Tensor, moments: Tensor, rule: ZErrorRule) -> tuple[Tensor, Tensor]:
    """Mask and standardised scores. Where no row has a finite score, none with a label is dropped: NaN, not 0."""
    index = group.clamp(min=0)
    count, mean, m2 = moments[:, index]
    std = (m2 / (count - 1)).sqrt()
    regression = rule.statistic.startswith("mse")
    constant = torch.zeros_like(std, dtype=torch.bool) if regression else std < 1e-8
    std = std + 1e-8 if regression else torch.where(constant, 1.0, std)
    valid = (group >= 0) & score.isfinite()
    small = (count < rule.min_count) | (count <= 1)
    z = torch.where(valid & ~small, (score - mean) / std, torch.nan)
    limits = rule.threshold_tensor
    if limits is None:
        limits = torch.tensor(rule.threshold, dtype=torch.float64)
    limit = limits.to(score.device).flatten().double()[index % limits.numel()]
    mirrored = (group % 2 == 0) if rule.statistic.startswith("bce") else torch.zeros_like(valid)
    oriented = torch.where(mirrored, -z, z)
    if rule.tail == "both":
        near = z.abs() <= limit
    else:
        near = oriented >= -limit if rule.tail == "low" else oriented <= limit
    kept = valid & torch.where(small, rule.keep_small, near | constant)
    return torch.where(valid.any(), kept, group >= 0), z


def z_error_mask(score: Tensor, target: Tensor, ignore_index: int, rule: ZErrorRule) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``z_error_mask`` in plain PyTorch; ``rule.moments`` are given."""
    moments = rule.moments
    assert moments is not None
    group = _groups(target, moments.shape[1], "class", ignore_index)
    mask, z = _judge(group, _scores(score, target, group, rule.statistic), moments, rule)
    return mask, torch.where((group >= 0) & ~mask, ignore_index, target.long()), z


def class_score(row_loss: Callable[[RowLossArguments], Tensor], statistic: str, args: RowLossArguments) -> ClassScore:
    """What rows are judged by, a constant for every derivative, and the word for it in :func:`z_error_mask`."""
    logits = args.logits.detach()
    if statistic == "logit":
        return logits, "class"
    if statistic == "prob":
        nothing = (None, None, None, None)
        plain = RowLossArguments(logits, args.target, *nothing, "cross_entropy", (0.0,), 0.0, args.ignore_index, "none")
        return row_loss(plain), "class_prob"
    with torch.no_grad():
        return row_loss(args._replace(logits=logits, weight=None, sample_weight=None, reduction="none")), "class"


def z_error_row_loss(
    args: RowLossArguments, rule: ZErrorRule, judged: ClassScore | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Any row loss of the rows that are kept, in plain PyTorch: loss, mask and scores."""
    with torch.no_grad():
        score, word = judged or class_score(row_loss_reference, rule.statistic, args)
        rule = rule._replace(statistic=word)
        if rule.moments is None:
            classes = args.logits.shape[class_dim(args.logits)]
            rule = rule._replace(moments=class_moments(score, args.target, classes, word, args.ignore_index))
        mask, kept_target, scores = z_error_mask(score, args.target, args.ignore_index, rule)
    return row_loss_reference(args._replace(target=kept_target)), mask, scores


def z_error_loss(args: ZErrorLossArguments, rule: ZErrorRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The binary and the regression form in plain PyTorch: loss, denominator, mask and scores."""
    input, target = args.input, args.target
    tasks = input.shape[-1] if input.dim() > 1 else 1
    groups = 2 * tasks if rule.statistic.startswith("bce") else tasks
    moments = class_moments(input, target, groups, rule.statistic) if rule.moments is None else rule.moments
    group = _groups(target, groups, rule.statistic, -100)
    mask, z = _judge(group, _scores(input, target, group, rule.statistic), moments, rule)
    loss = masked_loss(args, mask, rule.statistic)
    weights = mask.to(loss.dtype)
    if args.sample_weight is not None:
        weights = torch.where(mask, args.sample_weight.detach(), 0.0)
    return loss, weights.sum(), mask, z


def masked_loss(args: ZErrorLossArguments, mask: Tensor, statistic: str) -> Tensor:
    """The loss of the rows in ``mask``.

    Dropped rows are replaced by zeros before anything, so that neither value nor derivative can be NaN.
    """
    dtype = acc_dtype(args.input)
    x, y = (torch.where(mask, tensor.to(dtype), 0.0) for tensor in (args.input, args.target))
    if statistic.startswith("mse"):
        values = (x - y).square()
    else:
        # torch's own function is not differentiable in pos_weight
        factor = 1.0 if args.pos_weight is None else args.pos_weight.to(dtype)
        values = -(factor * y * F.logsigmoid(x) + (1.0 - y) * F.logsigmoid(-x))
    weights = torch.ones_like(values) if args.sample_weight is None else args.sample_weight.to(dtype)
    kept = torch.where(mask, values * weights, 0.0)
    return reduce_rows(kept, torch.where(mask, weights, 0.0), args.reduction)
