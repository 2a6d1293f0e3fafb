"""A step of early-learning regularisation on rows whose place in the memory is known: the fused kernel with its
derivatives, and the same of torch's operations, for what is traced or asks for another derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import _ops
from fused_losses._arguments import acc_dtype
from fused_losses._autograd import apply, is_last_backward, is_one, is_recorded
from fused_losses._logit_bias import class_dim
from fused_losses._reference import Rows

_LOWEST = 1e-4  # probabilities are clamped to [_LOWEST, 1 - _LOWEST] before they are remembered
# A memory of 1 makes the loss infinite; bfloat16 would round to it.
LARGEST = {torch.float32: 1.0, torch.bfloat16: 1.0 - 2.0**-8}


class ElrStep(NamedTuple):
    """What a step is given besides the logits; ``place`` is flat, ``memory`` on the device of the logits."""

    target: Tensor
    ignore_index: int
    place: Tensor
    memory: Tensor
    beta: float | Tensor
    lam: float | Tensor
    updates: bool
    one_row_each: bool  # no sample has two rows


def fused_loss(step: ElrStep, logits: Tensor, scale: Tensor | None = None) -> Tensor:
    """Every row's value, flat, or with ``scale``, one number per row, the sum of their products; updates the memory."""
    if is_recorded(logits):
        return apply(_FusedLoss, logits, step, scale)  # type: ignore[no-any-return]
    values, _ = _run(step, logits, scale, with_grad=False)
    return values if scale is None else (values * scale).sum()


def _run(step: ElrStep, logits: Tensor, scale: Tensor | None, with_grad: bool) -> tuple[Tensor, Tensor]:
    order = None
    if step.updates and not step.one_row_each and not logits.is_cpu:
        order = torch.argsort(step.place, stable=True)
    given = step.beta, step.lam
    numbers, on_device = (0.0, 0.0), None
    if any(isinstance(number, Tensor) and not number.is_cpu for number in given):
        like = logits.new_empty((), dtype=acc_dtype(logits))
        on_device = torch.stack([x.to(like) if isinstance(x, Tensor) else torch.full_like(like, x) for x in given])
    else:
        numbers = float(step.beta), float(step.lam)
    return _ops.elr_rows_(
        logits, step.target, step.place, order, step.memory, on_device, scale, *numbers, step.ignore_index,
        step.updates, with_grad,
    )  # fmt: skip


class _FusedLoss(torch.autograd.Function):
    """The gradient is written with the value. Its own derivatives need no memory, see :func:`_formula_again`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, step: ElrStep, scale: Tensor | None) -> Tensor:
        values, written = _run(step, logits, scale, with_grad=True)
        is_tensor = isinstance(step.lam, Tensor)
        ctx.ignore_index, ctx.lam = step.ignore_index, None if is_tensor else step.lam
        ctx.save_for_backward(logits, step.target, scale, written, step.lam if is_tensor else None)
        return values if scale is None else (values * scale).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_loss,) = grad_outputs
        logits, target, scale, written, lam = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph the gradient must itself be differentiable
            lam = ctx.lam if lam is None else lam
            values = _formula_again(logits, target, ctx.ignore_index, lam, scale, written)
            upstream = grad_loss if scale is None else grad_loss * scale
            return torch.autograd.grad(values, logits, upstream, create_graph=True)[0], None, None
        if scale is not None and written.dtype == logits.dtype and is_one(grad_loss):
            return written if is_last_backward(grad_loss) else written.clone(), None, None
        if scale is not None:  # infinity times the zeros of ignored rows is NaN
            grad_loss = torch.where(scale == 0, 0.0, grad_loss)
        return (written * _per_row(grad_loss, logits)).to(logits.dtype), None, None


def _per_row(numbers: Tensor, logits: Tensor) -> Tensor:
    """As it is multiplied with the logits."""
    dim = class_dim(logits)
    return numbers.reshape(logits.shape[:dim] + logits.shape[dim + 1 :]).unsqueeze(dim)


def _formula_again(
    logits: Tensor, target: Tensor, ignore_index: int, lam: float | Tensor, scale: Tensor | None, written: Tensor
) -> Tensor:
    """Every row's value but for a constant, from the gradient in place of the memory, which may have changed.

    The gradient is ``p - e + lam (q - p)`` with q the softmax of ``z + log(1 - t)``: q is known from it, and the term
    is ``lam (log sum_j q_j e^(z'_j - z_j) - log sum_j p_j e^(z'_j - z_j))`` at logits z' near z.
    """
    rows = Rows.of(logits, target, None, None, 0.0, ignore_index)
    z, dim = rows.logits, rows.dim
    with torch.no_grad():
        p = torch.softmax(z, dim)
        factor = _per_row(torch.ones_like(rows.target, dtype=z.dtype) if scale is None else scale, logits)
        unknown = (factor == 0) | rows.ignored.unsqueeze(dim)  # has no gradient
        one_hot = torch.zeros_like(p).scatter_(dim, rows.target.unsqueeze(dim), 1.0)
        lam = torch.as_tensor(lam, dtype=z.dtype, device=z.device)
        beyond = (written / torch.where(unknown, 1.0, factor) - (p - one_hot)) / torch.where(lam == 0, 1.0, lam)
        q = p + torch.where(unknown, 0.0, beyond)
    moved = torch.log((q * torch.exp(z - z.detach())).sum(dim))
    cross_entropy = -rows.of_target(torch.log_softmax(z, dim))
    values = cross_entropy + lam * (moved - torch.logsumexp(z, dim))
    return torch.where(rows.ignored, 0.0, values).flatten()


def next_memory(memory: Tensor, p: Tensor, usable: Tensor, beta: float | Tensor, dtype: torch.dtype) -> Tensor:
    """What a memory of that dtype remembers of probabilities ``(N, C)``; of unusable rows what it did before."""
    new = p.clamp(_LOWEST, 1.0 - _LOWEST)
    new = new * ((1.0 - beta) / new.sum(1, keepdim=True))
    stored = (beta * memory + new).clamp(max=LARGEST[dtype]).to(dtype).to(memory.dtype)
    return torch.where(usable.unsqueeze(1), stored, memory)


def plain_values(memory: Tensor, target: Tensor, lam: float | Tensor, z: Tensor) -> Tensor:
    """Every row's value, of logits ``(N, C)`` and what is remembered."""
    log_p = torch.log_softmax(z, 1)
    rest = ((1.0 - memory) * log_p.exp()).sum(1)  # 1 - s, without cancellation
    return lam * torch.log(rest) - log_p.gather(1, target.unsqueeze(1)).squeeze(1)
