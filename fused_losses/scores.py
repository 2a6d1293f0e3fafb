"""How sure a classifier is: scores for rejecting inputs of unknown classes."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses._checks import kind_of

__all__ = ["max_logit", "max_softmax_probability"]


def max_softmax_probability(logits: Tensor) -> Tensor:
    """The largest softmax probability of every row; inputs of unknown classes tend to have a low one.

    Computed as ``1 / sum_j exp(z_j - max z)``.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating point. -inf masks a class; one class of a row must
            not be masked.

    Returns:
        The shape of ``logits`` without the class dimension, in [1/C, 1]; float32, or float64 for float64 logits. NaN
        where a row has NaN or +inf. Differentiable.

    Raises:
        TypeError: ``logits`` is no floating point tensor.
        ValueError: there is no class.

    Example:
        >>> max_softmax_probability(torch.tensor([[0.0, 0.0], [0.0, 20.0]]))
        tensor([0.5000, 1.0000])

    Source: Hendrycks, Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples" (1610.02136);
    used for HEM in 2501.12191.
    """
    logits, dim = _checked(logits)
    return (logits - logits.amax(dim, keepdim=True)).logsumexp(dim).neg().exp()


def max_logit(logits: Tensor) -> Tensor:
    """The largest logit of every row; inputs of unknown classes tend to have a low one.

    Unlike the largest probability it tells rows where all classes are unlikely from rows where two are likely.

    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, floating point.

    Returns:
        The shape of ``logits`` without the class dimension; float32, or float64 for float64 logits. NaN where a row has
        NaN. Differentiable.

    Raises:
        TypeError: ``logits`` is no floating point tensor.
        ValueError: there is no class.

    Example:
        >>> max_logit(torch.tensor([[1.0, 3.0], [-2.0, -5.0]]))
        tensor([ 3., -2.])

    Source: Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings" (1911.11132); used for HEM
    in 2501.12191.
    """
    logits, dim = _checked(logits)
    return logits.amax(dim)


def _checked(logits: Tensor) -> tuple[Tensor, int]:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating point tensor, got {kind_of(logits)}")
    dim = 0 if logits.dim() == 1 else 1
    if logits.dim() == 0 or logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")
    return (logits if logits.dtype == torch.float64 else logits.float()), dim
