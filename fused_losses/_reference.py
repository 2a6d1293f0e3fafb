"""Row losses in plain PyTorch: what kernels are compared with, and the route of every derivative they do not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses import _ops


def class_dim(logits: Tensor) -> int:
    """The dimension of the classes: 0 for (C,), else 1."""
    return 0 if logits.dim() == 1 else 1


def zero_at_zero(p: Tensor, log_term: Tensor) -> Tensor:
    """``p * log_term``, 0 at p = 0 in value and gradient."""
    empty = p == 0
    return torch.where(empty, 0.0, p * torch.where(empty, 0.0, log_term))


def reduce_rows(values: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """``values`` already hold their weights; the mean divides by the sum of ``weights`` (0 where that is 0)."""
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    denominator = weights.sum()
    empty = denominator == 0
    return torch.where(empty, 0.0, total / torch.where(empty, 1.0, denominator))


@dataclass(frozen=True)
class Rows:
    """One call's rows in plain PyTorch: log-probabilities with the bias in, targets, masks and weights."""

    log_probs: Tensor
    log_p: Tensor
    ignored: Tensor
    class_weight: Tensor
    sample_weight: Tensor

    @staticmethod
    def of(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        logit_bias: float | Tensor,
        ignore_index: int,
    ) -> Rows:
        """Computes in float32 (float64 for float64 logits). Ignored rows are replaced by zeros before anything."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        dim = class_dim(logits)
        target = target.long()
        ignored = target == ignore_index
        safe_target = torch.where(ignored, 0, target)
        index = safe_target.unsqueeze(dim)
        logits = torch.where(ignored.unsqueeze(dim), 0.0, logits)
        if isinstance(logit_bias, Tensor) or logit_bias != 0.0:
            one_hot = torch.zeros_like(logits).scatter(dim, index, 1.0)
            logits = logits + one_hot * logit_bias
        log_probs = torch.log_softmax(logits, dim)
        log_p = log_probs.gather(dim, index).squeeze(dim)
        ones = torch.ones_like(log_p)
        class_weight = ones if weight is None else weight.to(log_p.dtype)[safe_target]
        samples = ones if sample_weight is None else sample_weight.to(log_p.dtype)
        return Rows(log_probs, log_p, ignored, class_weight, samples)

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """Weighs ``values`` (class weights inside already) by sample and reduces them."""
        kept = torch.where(self.ignored, 0.0, values * self.sample_weight)
        weights = torch.where(self.ignored, 0.0, self.class_weight * self.sample_weight)
        return reduce_rows(kept, weights, reduction)


# Value per row, class weights included, from (rows, weight, params)
Evaluate = Callable[[Rows, "Tensor | None", Sequence[float]], Tensor]
SoftEvaluate = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", Sequence[float], str], Tensor]
_evaluate: dict[str, Evaluate] = {}
_evaluate_soft: dict[str, SoftEvaluate] = {}


def register_special(name: str, evaluate: Evaluate, soft_target: SoftEvaluate | None = None) -> None:
    """Registers the reference of a loss that needs more of a row than ``log p_y``."""
    _evaluate[name] = evaluate
    if soft_target is not None:
        _evaluate_soft[name] = soft_target


def register_formula(name: str, formula: Callable[..., Tensor]) -> None:
    """Registers the reference of a loss that is ``formula(log p_y, *params)``."""
    register_special(name, lambda rows, weight, params: rows.class_weight * formula(rows.log_p, *params))


def row_loss_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_bias_tensor: Tensor | None,
    loss: str,
    params: Sequence[float],
    logit_bias: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The operator ``row_loss`` in plain PyTorch."""
    if target.is_floating_point() and loss in _evaluate_soft:
        return _evaluate_soft[loss](logits, target, weight, sample_weight, params, reduction)
    bias = logit_bias if logit_bias_tensor is None else logit_bias_tensor
    rows = Rows.of(logits, target, weight, sample_weight, bias, ignore_index)
    return rows.reduce(_evaluate[loss](rows, weight, params), reduction)


_ops.register_reference(row_loss_reference)
