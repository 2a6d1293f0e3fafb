"""How a loss is corrected by a transition matrix: the checks of a call's matrix, and every row's value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_losses._autograd import needs_reference
from fused_losses._checks import kind_of
from fused_losses._plain import is_plain, reads_values
from fused_losses._reference import Rows
from fused_losses._row_values import check_dense, maybe_any
from fused_losses._transition import check_transition, invert
from fused_losses.cross_entropy import cross_entropy

# Its exponential is far from the end of float32. Only classes that cannot have the label come near: their share is 0.
_LARGEST_LOG = 80.0


def check_call(transition: Any, logits: Tensor, inverse: bool) -> Tensor | None:
    """Checks a function's matrix; the inverse if it is wanted."""
    if not isinstance(transition, Tensor) or not transition.is_floating_point():
        raise TypeError(f"transition must be a floating point tensor, got {kind_of(transition)}")
    check_dense(transition=transition)
    if transition.device != logits.device:
        raise RuntimeError(f"transition must be on the device of logits ({logits.device}), got {transition.device}")
    if transition.dim() != 2 or transition.shape[0] != transition.shape[1]:
        raise ValueError(f"transition must have shape (C, C), got {tuple(transition.shape)}")
    found = invert(transition) if inverse else None
    if reads_values(transition) and not transition.requires_grad:
        check_transition(transition, found)
    return found


def of_target(matrix: Tensor, rows: Rows) -> Tensor:
    """The row of ``matrix`` that belongs to each row's target, in the place of its logits."""
    classes = rows.num_classes
    if matrix.shape[0] != classes:
        raise ValueError(
            f"transition must have shape ({classes}, {classes}) as logits have classes, got {tuple(matrix.shape)}"
        )
    return F.embedding(rows.target, matrix.to(rows.logits.dtype)).movedim(-1, rows.dim)


def forward_values(rows: Rows, transition: Tensor) -> Tensor:
    """With ``a = z + log T[:, y]``, ``-log q`` is the log-sum-exp of z less that of a, so the difference of two fused
    cross entropies of any class, but for its ``log T[class, y]``. Digits are lost the least with z relative to its
    maximum, and with the class where a is largest."""
    if not is_plain(rows.logits) or needs_reference(rows.logits, transition):
        return forward_formula(rows, transition)
    few = rows.target.numel() < rows.num_classes
    columns = transition.t().to(rows.logits.dtype).contiguous()  # its rows are read as a whole
    a = rows.logits - rows.logits.detach().amax(rows.dim, keepdim=True)
    a.add_(of_target(columns, rows).log_() if few else of_target(columns.log(), rows))
    top = a.detach().max(rows.dim).indices
    possible = transition[top, rows.target].to(a.dtype)
    of_all = cross_entropy(rows.logits, top, reduction="none")
    value = of_all - cross_entropy(a, top, reduction="none") - torch.log(possible)
    return torch.where(possible == 0, of_all + torch.inf, value)


def forward_formula(rows: Rows, transition: Tensor) -> Tensor:
    """Every row's ``-log q``."""
    column = of_target(transition.t(), rows)
    log_p = rows.log_probs
    # q is computed relative to the largest p that contributes: so p that underflow still have a loss and a gradient.
    largest = torch.where(column > 0, log_p, -torch.inf).amax(rows.dim, keepdim=True).detach()
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    q = (torch.exp((log_p - shift).clamp(max=_LARGEST_LOG)) * column).sum(rows.dim)
    return -(shift.squeeze(rows.dim) + torch.log(q))


def backward_loss(logits: Tensor, rows: Rows, inverse: Tensor, reduction: str, weighted: bool = True) -> Tensor:
    """The fused cross entropy with rows of the inverse as targets."""
    weight = torch.where(rows.ignored, 0.0, rows.class_weight * rows.sample_weight) if weighted else None
    share = of_target(inverse, rows)
    if maybe_any(rows.ignored):
        ignored = rows.ignored.unsqueeze(rows.dim)
        logits, share = logits.masked_fill(ignored, 0.0), share.masked_fill(ignored, 0.0)
    return cross_entropy(logits, share, sample_weight=weight, reduction=reduction)
