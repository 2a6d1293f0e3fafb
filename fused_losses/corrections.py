"""Losses that know how labels go wrong: forward and backward correction by a transition matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_losses._arguments import check_reduction
from fused_losses._arrays import as_tensor
from fused_losses._autograd import needs_reference
from fused_losses._checks import kind_of
from fused_losses._parameters import explains_keywords, finite, integer, positive_integer
from fused_losses._plain import is_plain, reads_values
from fused_losses._reference import Rows
from fused_losses._row_values import RowsModule, RowValues, check_dense, maybe_any, plain_rows
from fused_losses._transition import check_transition, invert
from fused_losses.cross_entropy import cross_entropy

# Its exponential is far from the end of float32. Only classes that cannot have the label come near: their share is 0.
_LARGEST_LOG = 80.0

_ARGUMENTS = """
    Args:
        logits: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, float16 or bfloat16.
        target: class indices in ``[0, C)`` or ``ignore_index``, the shape of ``logits`` without its class dimension.
        transition: ``(C, C)``, floating point, on the device of ``logits``: entry [i, j] is the probability of label j
            for a sample of class i, and rows sum to 1 (within 1e-4). :func:`fused_losses.noise.estimate_transition`
            estimates it. Gradients flow into a matrix that requires them.
        weight: class weights ``(C,)``: a row's loss is multiplied by ``weight[target]``.
        ignore_index: rows with this target have loss and gradient 0 and do not count in the mean.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum of the weighted losses divided by the sum of the
            weights, or 0 where that is 0.
        sample_weight: one weight per row, the shape of ``target``.

    Returns:
        The loss in float32, float64 for float64 logits; a scalar unless ``reduction="none"``.

    Raises:
        TypeError: ``transition`` is no floating point tensor, or ``ignore_index`` no integer.
        ValueError: ``transition`` is not square, does not fit the logits, has negative entries or rows that do not sum
            to 1{singular}; ``reduction`` is unknown; batch sizes differ. The entries are checked where that
            waits for no device: on the CPU, outside of compiled code, and not if the matrix requires a gradient.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: a target is out of range (on CUDA: a device assertion).
"""

_MODULE_ARGUMENTS = """
    Args:
        transition: ``(C, C)`` as for the function. A tensor, an array or a list is fixed and becomes a buffer. A
            ``Parameter`` is learnt as it is, and the training loop has to keep its rows at a sum of 1. A Module that
            returns the matrix when called without arguments is learnt, too, such as :class:`TransitionMatrix`.
        weight: class weights ``(C,)``, a buffer.
        ignore_index, reduction: as for the function.

    Returns:
        Called with ``(logits, target, sample_weight=None)``: the loss.

    Raises:
        TypeError: ``transition`` holds no numbers, or ``ignore_index`` is no integer.
        ValueError: ``transition`` is no transition matrix, as for the function.
        RuntimeError: ``load_state_dict`` is given one that is none.
"""

_Documented = TypeVar("_Documented")


def _documented(arguments: str) -> Callable[[_Documented], _Documented]:
    """Puts what two docstrings share in the place of ``{arguments}``."""

    def decorate(thing: _Documented) -> _Documented:
        thing.__doc__ = (thing.__doc__ or "").replace("{arguments}", arguments.strip())
        return thing

    return decorate


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


def _forward_values(rows: Rows, transition: Tensor) -> Tensor:
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


def _backward_loss(logits: Tensor, rows: Rows, inverse: Tensor, reduction: str, weighted: bool = True) -> Tensor:
    """The fused cross entropy with rows of the inverse as targets."""
    weight = torch.where(rows.ignored, 0.0, rows.class_weight * rows.sample_weight) if weighted else None
    share = of_target(inverse, rows)
    if maybe_any(rows.ignored):
        ignored = rows.ignored.unsqueeze(rows.dim)
        logits, share = logits.masked_fill(ignored, 0.0), share.masked_fill(ignored, 0.0)
    return cross_entropy(logits, share, sample_weight=weight, reduction=reduction)


@explains_keywords
@_documented(_ARGUMENTS.format(singular=""))
def forward_correction_loss(
    logits: Tensor,
    target: Tensor,
    transition: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the noisy label, which the transition matrix predicts from the clean one.

    For wrong labels whose transition matrix is known or estimated. The network learns the clean classes, the matrix
    explains the noise. With ``T = transition`` and ``q = sum_k p_k T_ky`` the value is ``-log q`` and its gradient in a
    logit ``p_j (1 - T_jy / q)``. The loss is as good as the matrix: a wrong one makes it learn wrong probabilities.

    {arguments}

    A masked class (logit -inf) adds nothing to q. Where no class can have the label, q is 0, the loss infinite and the
    gradient NaN. There is no ``logit_bias``, and targets cannot be class probabilities.

    Example:
        >>> transition = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
        >>> forward_correction_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), transition)
        tensor(0.5108)

    Source: 1609.03683, Theorem 2.
    """
    rows = plain_rows(
        "forward_correction_loss",
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        reduction=reduction,
    )
    check_call(transition, logits, inverse=False)
    return RowValues.of(rows, _forward_values(rows, transition)).reduce(reduction)


@explains_keywords
@_documented(_ARGUMENTS.format(singular=" or is singular"))
def backward_correction_loss(
    logits: Tensor,
    target: Tensor,
    transition: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """A weighted sum of the cross entropies of all labels, whose mean over the noise is the loss of the clean label.

    For wrong labels whose transition matrix is known. With ``t = (transition^-1)[y]`` the value is ``-sum_k t_k log
    p_k``, the cross entropy with ``t`` as target. Its mean over the noise is right for any network. But some ``t_k``
    are negative, so the loss has no lower bound and varies much, and a network that can memorise labels drives it to
    minus infinity. :func:`forward_correction_loss` is the usual choice.

    {arguments}

    A masked class (logit -inf) makes the loss infinite unless its ``t_k`` is 0. There is no ``logit_bias``, and targets
    cannot be class probabilities.

    Example:
        >>> transition = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
        >>> backward_correction_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), transition)
        tensor(-0.1867)

    Source: 1609.03683, Theorem 1.
    """
    rows = plain_rows(
        "backward_correction_loss",
        logits,
        target,
        weight=weight,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        reduction=reduction,
    )
    inverse = check_call(transition, logits, inverse=True)
    assert inverse is not None
    return _backward_loss(logits, rows, inverse, reduction)


class TransitionMatrix(nn.Module):
    """A transition matrix that is learnt: rows sum to 1, and the diagonal entry is the largest of each row.

    For :class:`ForwardCorrectionLoss` where the matrix is not known. Train
    ``ForwardCorrectionLoss(TransitionMatrix(C))`` together with the network, with ``1e-4 * log_volume()`` added to the
    loss: it prefers the smallest matrix that explains the labels. A call without arguments returns the matrix ``(C,
    C)``: with ``s = sigmoid(weight)``, the entries are 1 on the diagonal and ``s_ij`` elsewhere, divided by the sum of
    their row.

    Args:
        num_classes: C, at least 1.
        init: entries off the diagonal start at ``sigmoid(-init)`` times the diagonal, a number. 2.0 is the authors'
            value for CIFAR-10.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.

    Example:
        >>> TransitionMatrix(3)().diagonal()
        tensor([0.8075, 0.8075, 0.8075], grad_fn=...)

    Source: VolMinNet, 2102.02400, section 3. The parametrisation is that of the authors' code.
    """

    def __init__(self, num_classes: int, init: float = 2.0) -> None:
        super().__init__()
        classes = int(positive_integer.pack("num_classes", num_classes))
        self.weight = nn.Parameter(torch.full((classes, classes), -float(finite.pack("init", init))))

    def forward(self) -> Tensor:
        """The matrix ``(C, C)``."""
        one = torch.eye(len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
        entries = one + torch.sigmoid(self.weight) * (1.0 - one)
        return entries / entries.sum(1, keepdim=True)

    def log_volume(self) -> Tensor:
        """The log of the absolute determinant of the matrix, a scalar."""
        return torch.linalg.slogdet(self()).logabsdet  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The size."""
        return f"num_classes={len(self.weight)}"


class _CorrectionLoss(RowsModule):
    """Base of both: the matrix, fixed or learnt."""

    weight: Tensor | None
    transition: Tensor | nn.Module
    _precise: tuple[str, ...] = ("transition",)

    def __init__(
        self,
        transition: Tensor | nn.Module,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if isinstance(transition, (nn.Parameter, nn.Module)):
            self.transition = transition
        else:
            self.register_buffer("transition", as_tensor("transition", transition))
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = integer("ignore_index", ignore_index), reduction
        with torch.no_grad():
            self._check(self.matrix())
        self._take()

    def matrix(self) -> Tensor:
        """The transition matrix as it is now."""
        found = self.transition
        matrix: Tensor = found() if isinstance(found, nn.Module) else found
        return matrix

    def _check(self, matrix: Tensor) -> None:
        """Raises a ValueError unless a matrix is one for this loss."""
        check_transition(matrix)

    def _take(self) -> None:
        """Makes what a call needs of a matrix that is new."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(prefix + "transition")
        if saved is not None and "transition" in self._buffers:
            try:
                self._check(saved)
            except ValueError as error:
                args[-1].append(f"{prefix}{error}")  # torch collects the messages and raises
                return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if saved is not None:
            self._take()

    def _rows(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> Rows:
        options = {"weight": self.weight, "ignore_index": self.ignore_index, "sample_weight": sample_weight}
        return plain_rows(type(self).__name__, logits, target, **options)

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` for ``target``; ``sample_weight`` is one weight per row."""
        return self.rows(logits, target, sample_weight).reduce(self.reduction)

    def _shown(self) -> dict[str, Any]:
        own = {} if isinstance(self.transition, nn.Module) else {"transition": self.transition}
        return own | self._unusual(weight=None, ignore_index=-100, reduction="mean")


@_documented(_MODULE_ARGUMENTS)
class ForwardCorrectionLoss(_CorrectionLoss):
    """Cross entropy of the noisy label, which the transition matrix predicts from the clean one.

    Module form of :func:`fused_losses.functional.forward_correction_loss`, which explains the loss.

    {arguments}

    Example:
        >>> logits, labels = torch.randn(8, 3, requires_grad=True), torch.arange(8) % 3
        >>> fixed = ForwardCorrectionLoss([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
        >>> fixed(logits, labels).backward()
        >>> learnt = ForwardCorrectionLoss(matrix := TransitionMatrix(3))  # give its parameters to the optimizer
        >>> (learnt(logits, labels) + 1e-4 * matrix.log_volume()).backward()
    """

    def rows(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> RowValues:
        """Every row's loss."""
        rows = self._rows(logits, target, sample_weight)
        return RowValues.of(rows, _forward_values(rows, self.matrix()))


@_documented(_MODULE_ARGUMENTS)
class BackwardCorrectionLoss(_CorrectionLoss):
    """A weighted sum of the cross entropies of all labels, whose mean over the noise is the loss of the clean label.

    Module form of :func:`fused_losses.functional.backward_correction_loss`, which explains the loss. A fixed matrix is
    inverted once, when it is given or loaded: numbers written into ``transition`` later have no effect.

    {arguments}

    Example:
        >>> logits, labels = torch.randn(8, 3, requires_grad=True), torch.arange(8) % 3
        >>> criterion = BackwardCorrectionLoss(noise.symmetric_matrix(0.4, 3))
        >>> criterion(logits, labels).backward()
    """

    inverse: Tensor
    _precise = ("transition", "inverse")

    def _check(self, matrix: Tensor) -> None:
        check_transition(matrix)
        check_transition(matrix, invert(matrix))

    def _take(self) -> None:
        if "transition" in self._buffers:
            self.register_buffer("inverse", invert(self.matrix()), persistent=False)

    def _inverse(self) -> Tensor:
        return self.inverse if "transition" in self._buffers else invert(self.matrix())

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` for ``target``; ``sample_weight`` is one weight per row."""
        return _backward_loss(logits, self._rows(logits, target, sample_weight), self._inverse(), self.reduction)

    def rows(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> RowValues:
        """Every row's loss."""
        rows = self._rows(logits, target, sample_weight)
        return RowValues.of(rows, _backward_loss(logits, rows, self._inverse(), "none", weighted=False))
