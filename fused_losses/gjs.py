"""The generalised Jensen-Shannon divergence of a label and several predictions for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_losses import _ops
from fused_losses._autograd import apply, is_recorded, needs_reference
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import explains_keywords, fraction, python_number
from fused_losses._plain import is_plain
from fused_losses._reference import Rows, zero_at_zero
from fused_losses._row_values import RowsModule, RowValues, plain_rows

_SUM_TOLERANCE = 1e-6
_MOST_VIEWS = 7  # of the kernel


def pack_weights(weights: Any) -> tuple[float, ...]:
    """The weights as numbers; raises unless they are one for the label and some for views, and sum to 1."""
    if isinstance(weights, Tensor):
        weights = weights.tolist()
    weights = python_number(weights)
    if isinstance(weights, str) or not hasattr(weights, "__len__") or len(weights) < 2:
        raise ValueError(
            f"weights must be those of the label and of at least one view, as (0.5, 0.25, 0.25), got {weights!r}"
        )
    packed = tuple(float(fraction.pack(f"weights[{i}]", value)) for i, value in enumerate(weights))
    if abs(sum(packed) - 1.0) > _SUM_TOLERANCE:
        raise ValueError(f"weights must sum to 1, got {sum(packed):.6g}")
    return tuple(value / sum(packed) for value in packed)


def check_views(views: Any, count: int) -> Sequence[Tensor]:
    """The views one by one; raises unless they are so many tensors of one shape."""
    if isinstance(views, Tensor):
        if views.dim() < 2:
            raise ValueError(f"views must have shape (M, N, C), got {tuple(views.shape)}")
        found: Sequence[Tensor] = views.unbind(0)
    elif isinstance(views, (list, tuple)) and all(isinstance(view, Tensor) for view in views):
        found = views
    else:
        kinds = {type(view).__name__ for view in views} if isinstance(views, (list, tuple)) else set()
        got = f"{type(views).__name__}{' of ' * bool(kinds)}{' and '.join(sorted(kinds))}"
        raise TypeError(f"views must be a Tensor (M, N, C) or a list of M tensors (N, C), got {got}")
    if len(found) != count:
        raise ValueError(f"views must be {count}, one for each weight after the label's, got {len(found)}")
    if any(view.shape != found[0].shape for view in found):
        raise ValueError(f"views must have one shape, got {[tuple(view.shape) for view in found]}")
    return found


def _rows(name: str, views: Any, target: Tensor, weights: tuple[float, ...], **options: Any) -> RowValues:
    of_views = [plain_rows(name, view, target, **options) for view in check_views(views, len(weights) - 1)]
    first, logits = of_views[0], [of_view.logits for of_view in of_views]
    return RowValues.of(first, _values(first, weights, logits))


def _normaliser(label: float) -> float:
    return -(1.0 - label) * math.log1p(-label)


def divergence(first: Rows, weights: tuple[float, ...], *views: Tensor) -> Tensor:
    """Every row's value; of ``first`` only the target counts."""
    label, *shares = weights
    log_ps = [torch.log_softmax(view, first.dim) for view in views]
    ps = [log_p.exp() for log_p in log_ps]
    one_hot = torch.zeros_like(first.logits).scatter(first.dim, first.target.unsqueeze(first.dim), 1.0)
    mean = label * one_hot + torch.stack([share * p for share, p in zip(shares, ps, strict=True)]).sum(0)
    log_mean = torch.log(torch.where(mean == 0.0, 1.0, mean))  # a class that no distribution expects adds nothing
    value = -label * first.of_target(log_mean)
    for share, p, log_p in zip(shares, ps, log_ps, strict=True):
        value = value + share * zero_at_zero(p, log_p - log_mean).sum(first.dim)
    return value / _normaliser(label)


def _is_fused(views: Sequence[Tensor]) -> bool:
    """Whether the kernel takes the views: few, alike, with no other derivative than the first, nothing traced."""
    first = views[0]
    alike = all(view.dtype == first.dtype and view.device == first.device for view in views)
    if len(views) > _MOST_VIEWS or not alike or not (first.is_cpu or first.is_cuda):
        return False
    return all(is_plain(view) and not needs_reference(view) for view in views)


def _values(first: Rows, weights: tuple[float, ...], views: Sequence[Tensor]) -> Tensor:
    """Every row's value."""
    if not _is_fused(views):
        return divergence(first, weights, *views)
    if any(is_recorded(view) for view in views):
        return apply(_FusedDivergence, first, weights, *views)  # type: ignore[no-any-return]
    return _ops.gjs_rows_(views, first.target, weights, []).view(first.target.shape)


class _FusedDivergence(torch.autograd.Function):
    """The first derivative in the views, written with the value."""

    @staticmethod
    def forward(ctx: Any, first: Rows, weights: tuple[float, ...], *views: Tensor) -> Tensor:
        gradients = [view.new_empty(view.shape) for view in views]
        values = _ops.gjs_rows_(views, first.target, weights, gradients)
        ctx.weights = weights
        ctx.save_for_backward(first.target, *views, *gradients)
        return values.view(first.target.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_values,) = grad_outputs
        target, *saved = ctx.saved_tensors
        views, written = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if torch.is_grad_enabled():  # under create_graph the gradient must itself be differentiable
            wanted = ctx.needs_input_grad[2:]
            views = [view.view_as(view) for view in views]  # of which none is made of another, whatever was given
            asked = [view for view, is_wanted in zip(views, wanted, strict=True) if is_wanted]
            first = Rows.of(views[0], target, None, None, 0.0, -100, any_ignored=False)  # they were replaced before
            values = divergence(first, ctx.weights, *views)
            found = iter(torch.autograd.grad(values, asked, grad_values, create_graph=True))
            return None, None, *(next(found) if is_wanted else None for is_wanted in wanted)
        upstream = grad_values.unsqueeze(class_dim(views[0]))
        return None, None, *(gradient * upstream for gradient in written)


@explains_keywords
def gjs_loss(
    views: Tensor | Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float],
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence: how far a label and the predictions for several views are from their mean.

    For wrong labels, in training with augmentations: the more the views agree with each other, the less a label that
    contradicts them counts. With ``p_i`` the probabilities of view i, e the one-hot label, ``w = weights`` and their
    weighted mean ``m = w_0 e + sum_i w_i p_i``, the value is ``Z (w_0 KL(e, m) + sum_i w_i KL(p_i, m))`` with ``Z = -1
    / ((1 - w_0) log(1 - w_0))`` and the Kullback-Leibler divergence KL. Its gradient in logit j of view i is ``Z w_i
    p_ij (v_j - sum_k p_ik v_k)`` with ``v = log(p_i / m)``. With one view it is :func:`js_loss`.

    Drawbacks: M views cost M forward passes, and the weights have to fit the share of wrong labels and the number of
    classes.

    Args:
        views: logits ``(M, N, C)`` or ``(M, N, C, d1, ...)``, or a list of M tensors ``(N, C, ...)``; float64, float32,
            float16 or bfloat16.
        target: class indices in ``[0, C)`` or ``ignore_index``, ``(N,)`` or ``(N, d1, ...)``, for all views.
        weights: M + 1 numbers between 0 and 1 that sum to 1 (within 1e-6), the label's first. The authors use .9, .05,
            .05 for CIFAR-10 with symmetric noise, .5, .25, .25 for CIFAR-100 and .1, .45, .45 for WebVision.
        weight: class weights ``(C,)``: a row's loss is multiplied by ``weight[target]``.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum of the weighted losses divided by the sum of the
            weights, or 0 where that is 0.
        sample_weight: one weight per row, the shape of ``target``.

    Returns:
        The loss in float32, float64 for float64 logits; a scalar unless ``reduction="none"``.

    Raises:
        TypeError: ``views`` is neither a tensor nor a list of tensors, or ``ignore_index`` no integer.
        ValueError: weights are out of range or not one more than views; views differ in shape; ``reduction`` is
            unknown; batch sizes differ.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: a target is out of range (on CUDA: a device assertion).

    A masked class (logit -inf) adds nothing. There is no ``logit_bias``, and targets cannot be class probabilities.

    Example:
        >>> views = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
        >>> gjs_loss(views, torch.tensor([0]), (0.5, 0.25, 0.25))
        tensor(0.4799)

    Source: 2105.04522, Eq. 3 to 5. Deviation: its code clamps m at 1e-7; here nothing is clamped.
    """
    return _rows(
        "gjs_loss",
        views,
        target,
        pack_weights(weights),
        weight=weight,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        reduction=reduction,
    ).reduce(reduction)


class GJSLoss(RowsModule):
    """Generalised Jensen-Shannon divergence: how far a label and the predictions for several views are from their mean.

    Module form of :func:`fused_losses.functional.gjs_loss`, which explains the loss.

    Args:
        weights, ignore_index, reduction: as for the function.
        weight: as for the function; a buffer.

    Returns:
        Called with ``(views, target, sample_weight=None)``: the loss.

    Raises:
        TypeError: ``ignore_index`` is no integer.
        ValueError: an argument is out of range.

    Example:
        >>> criterion = GJSLoss((0.5, 0.25, 0.25))
        >>> views = [torch.randn(8, 3, requires_grad=True) for _ in range(2)]  # of the same 8 inputs, augmented twice
        >>> criterion(views, torch.arange(8) % 3).backward()
    """

    _checks: ClassVar = {"weights": lambda name, value: pack_weights(value)}
    weight: Tensor | None

    def __init__(
        self,
        weights: Sequence[float],
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.weights = pack_weights(weights)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, views: Tensor | Sequence[Tensor], target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``views`` for ``target``; ``sample_weight`` is one weight per row."""
        return self.rows(views, target, sample_weight).reduce(self.reduction)

    def rows(self, views: Tensor | Sequence[Tensor], target: Tensor, sample_weight: Tensor | None = None) -> RowValues:
        """Every row's loss."""
        return _rows(
            "GJSLoss",
            views,
            target,
            self.weights,
            weight=self.weight,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
            reduction=self.reduction,
        )

    def _views(self, logits: Any) -> Sequence[Tensor]:
        return check_views(logits, len(self.weights) - 1)

    def _shown(self) -> dict[str, Any]:
        return {"weights": self.weights, **self._unusual(weight=None, ignore_index=-100, reduction="mean")}
