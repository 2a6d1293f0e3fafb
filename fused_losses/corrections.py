"""Losses that know how labels go wrong: forward and backward correction by a transition matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused_losses._arguments import acc_dtype
from fused_losses._arrays import as_tensor
from fused_losses._corrections import backward_loss, check_call, forward_values
from fused_losses._parameters import explains_keywords, finite, positive_integer
from fused_losses._reference import Rows
from fused_losses._row_values import RowsModule, RowValues, plain_rows
from fused_losses._transition import check_transition, invert

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
    return RowValues.of(rows, forward_values(rows, transition)).reduce(reduction)


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
    return backward_loss(logits, rows, inverse, reduction)


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
        self.init = float(finite.pack("init", init))
        self.weight = nn.Parameter(torch.empty(classes, classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to ``init``, as after ``to_empty``."""
        nn.init.constant_(self.weight, -self.init)

    def forward(self) -> Tensor:
        """The matrix ``(C, C)``, in float32 where the weight is in half precision."""
        weight = self.weight.to(acc_dtype(self.weight))
        one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        entries = one + torch.sigmoid(weight) * (1.0 - one)
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
    _known: Tensor | None = None  # the buffer that was checked, and whose inverse is kept

    def __init__(
        self,
        transition: Tensor | nn.Module,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        if not isinstance(transition, (nn.Parameter, nn.Module)):
            self.register_buffer("transition", None)
        self.transition = transition
        self.register_buffer("weight", weight)

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks and takes another matrix."""
        if name != "transition":
            super().__setattr__(name, value)
            return
        matrix = value if isinstance(value, (nn.Parameter, nn.Module)) else as_tensor("transition", value)
        # Neither in compiled code nor for a replica of DataParallel: it would break the code, or wait for the device.
        takes = not (torch.compiler.is_compiling() or getattr(self, "_is_replica", False))
        if takes:
            with torch.no_grad():
                self._check(matrix() if isinstance(matrix, nn.Module) else matrix)
        super().__setattr__(name, matrix)
        if takes:
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
        self._known = self._buffers.get("transition")

    def _is_known(self, matrix: Tensor) -> bool:
        """Whether it is the buffer that was taken: not another, of ``torch.func.functional_call`` or a replica."""
        return matrix is self._known

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _CorrectionLoss:
        is_known = self._known is not None and self._is_known(self.matrix())
        super()._apply(fn, recurse)
        if is_known:
            self._known = self._buffers["transition"]
        return self

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
        rows, matrix = self._rows(logits, target, sample_weight), self.matrix()
        if "transition" in self._buffers and not self._is_known(matrix):
            check_call(matrix, logits, inverse=False)
        return RowValues.of(rows, forward_values(rows, matrix))


@_documented(_MODULE_ARGUMENTS)
class BackwardCorrectionLoss(_CorrectionLoss):
    """A weighted sum of the cross entropies of all labels, whose mean over the noise is the loss of the clean label.

    Module form of :func:`fused_losses.functional.backward_correction_loss`, which explains the loss. A fixed matrix is
    inverted once, when it is given, assigned or loaded: numbers written into ``transition`` later have no effect.

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
        super()._take()
        if self._known is not None:
            self.register_buffer("inverse", invert(self._known), persistent=False)

    def _inverse(self, logits: Tensor) -> Tensor:
        matrix = self.matrix()
        if "transition" not in self._buffers:
            return invert(matrix)
        if self._is_known(matrix):
            return self.inverse
        inverse = check_call(matrix, logits, inverse=True)
        assert inverse is not None
        return inverse

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of ``logits`` for ``target``; ``sample_weight`` is one weight per row."""
        rows = self._rows(logits, target, sample_weight)
        return backward_loss(logits, rows, self._inverse(logits), self.reduction)

    def rows(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> RowValues:
        """Every row's loss."""
        rows = self._rows(logits, target, sample_weight)
        return RowValues.of(rows, backward_loss(logits, rows, self._inverse(logits), "none", weighted=False))
