"""Any loss of logits whose norm is fixed or bounded: LogitNorm and LogitClip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fused_losses import _ops
from fused_losses._agreement import Exchange, telling
from fused_losses._arguments import LOSSES, RowLossArguments, acc_dtype, is_ignored
from fused_losses._autograd import apply, is_recorded, needs_reference, row_loss
from fused_losses._C import loss_names
from fused_losses._checks import check_row_loss, check_tensors, is_per_row, row_shape
from fused_losses._common import RowLossModule
from fused_losses._logit_bias import class_dim
from fused_losses._parameters import OrTensor, assigned, positive_factor
from fused_losses._plain import is_plain
from fused_losses._reference import WRAPPED, row_loss_reference
from fused_losses._row_values import (
    Loss,
    RowsModule,
    RowValues,
    as_module,
    check_has_rows,
    exchanges,
    row_exchanges,
    row_values,
    rows_of,
)

_FACTOR = OrTensor(positive_factor)
_GUARD = 1e-7  # added to the norm of LogitNorm, as its authors do


# The factor that logits of some norm are multiplied by, and its derivative in the norm.
_Factor = Callable[[Tensor], tuple[Tensor, Tensor]]


def _of_fixed_norm(t: float | Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    factor = 1.0 / (t * (norm + _GUARD))
    return factor, -factor / (norm + _GUARD)


def _of_bounded_norm(tau: float | Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    long = norm > tau
    length = torch.where(long, norm, 1.0)
    factor = torch.where(long, tau / length, 1.0)
    return factor, torch.where(long, -factor / length, 0.0)


def _factor(parameter: float | Tensor, clips: bool) -> _Factor:
    return functools.partial(_of_bounded_norm if clips else _of_fixed_norm, parameter)


def _norm(z: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(z, dim=class_dim(z), keepdim=True)
    return norm


def _clean(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Logits with zeros for masked classes; ignored rows, which may hold anything, are ones, so that no derivative in
    them is NaN."""
    z = logits.masked_fill(logits == -torch.inf, 0.0)
    if is_per_row(target, logits):  # the loss has its say on anything else
        ignored = is_ignored(target, ignore_index).reshape(row_shape(logits))
        z = z.masked_fill(ignored.unsqueeze(class_dim(logits)), 1.0)
    return z


def _rescaled(logits: Tensor, target: Tensor, ignore_index: int, factor_of: _Factor) -> Tensor:
    """``logits`` times the factor of their norm in float32 or better; masked classes stay at -inf."""
    logits = logits.to(acc_dtype(logits))
    z = _clean(logits, target, ignore_index)
    return (z * factor_of(_norm(z))[0]).masked_fill(logits == -torch.inf, -torch.inf)


def _gradient(grad: Tensor, z: Tensor, factor_of: _Factor) -> Tensor:
    """``f g + f' z (z g) / n`` for the factor f of the norm n: the derivative of f z."""
    norm = _norm(z)
    factor, slope = factor_of(norm)
    along = (z * grad).sum(class_dim(z), keepdim=True) * torch.where(norm == 0, 0.0, slope / norm)
    return (grad * factor).addcmul_(z, along)


class _Kernel(NamedTuple):
    """What the operators are given besides the logits."""

    target: Tensor | None  # where its rows may be ignored
    on_device: Tensor | None
    parameter: float
    clips: bool
    ignore_index: int


class _Rescale(torch.autograd.Function):
    """The first derivative in the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, kernel: _Kernel, parameter: float | Tensor) -> Tensor:
        rescaled, norms = _ops.rescale_logits(logits, *kernel)
        ctx.save_for_backward(logits, target, norms, parameter if isinstance(parameter, Tensor) else None)
        ctx.by_class, ctx.constants = kernel.target is not None, kernel[2:]
        return rescaled

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, norms, parameter = ctx.saved_tensors
        number, clips, ignore_index = ctx.constants
        (grad,) = grad_outputs
        if torch.is_grad_enabled() or not is_plain(grad):  # under create_graph it must itself be differentiable
            z = _clean(logits.to(acc_dtype(logits)), target, ignore_index)
            factor_of = _factor(number if parameter is None else parameter, clips)
            return _gradient(grad, z, factor_of).to(logits.dtype), None, None, None
        on_device = None if parameter is None else _split(parameter)[1]
        kernel = _Kernel(target if ctx.by_class else None, on_device, *ctx.constants)
        return _ops.rescale_logits_backward(grad, norms, logits, *kernel), None, None, None


def _ignore_index(loss: nn.Module) -> int:
    """That of the row loss inside."""
    for inner in ("loss", "base"):
        if isinstance(getattr(loss, inner, None), nn.Module):
            return _ignore_index(getattr(loss, inner))
    return int(getattr(loss, "ignore_index", -100))


# ---- In one read of the logits -------------------------------------------------------------------------------------

_ONE_READ = "rescaled_logits"  # the operators' name of a loss together with the rescaling (csrc/losses/rescaled.h)
_OWN_PARAMETERS = 3  # of the loss inside, at most
_NAMES = tuple(loss_names())  # the loss inside goes by its place among them


def _is_known(args: RowLossArguments) -> bool:
    """Whether the kernels of one read know the loss, with such options and targets."""
    of_log_p = LOSSES[args.loss].of_log_p or (args.loss == "cross_entropy" and args.params[0] == 0.0)
    return of_log_p and args.logit_bias_tensor is None and not args.target.is_floating_point()


def _in_one_read(args: RowLossArguments, parameter: float | Tensor, clips: bool) -> RowLossArguments:
    """The loss of logits that are rescaled first."""
    number, on_device = _split(parameter)
    own = (*args.params, *(0.0,) * (_OWN_PARAMETERS - len(args.params)))
    params = (number, float(clips), args.logit_bias, float(_NAMES.index(args.loss)), *own)
    return args._replace(loss=_ONE_READ, params=params, first_param=on_device, logit_bias=0.0)


def _by_operations_of_torch(args: RowLossArguments) -> Tensor:
    """What :func:`_in_one_read` describes."""
    number, clips, bias, place, *own = args.params
    factor_of = _factor(number if args.first_param is None else args.first_param, bool(clips))
    rescaled = _rescaled(args.logits, args.target, args.ignore_index, factor_of)
    inside = args._replace(loss=_NAMES[int(place)], params=tuple(own), first_param=None, logit_bias=bias)
    return row_loss_reference(inside._replace(logits=rescaled))


WRAPPED[_ONE_READ] = _by_operations_of_torch


def _split(parameter: float | Tensor) -> tuple[float, Tensor | None]:
    """A number for kernels, and the tensor that takes its place: one whose value may not be asked for here."""
    if isinstance(parameter, Tensor) and not (parameter.is_cpu and is_plain(parameter)):
        return 1.0, parameter
    return float(parameter), None


def _tensors(module: nn.Module) -> list[Tensor | None]:
    """Those of the module itself; small calls have no time for its iterators."""
    return [*module._buffers.values(), *module._parameters.values()]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _LogitWrapper(RowsModule):
    """Hands rescaled logits to a loss, or has one kernel do both."""

    _checks: ClassVar = {"reduction": lambda name, value: value}  # the loss inside may have others
    _clips: ClassVar[bool]  # whether the parameter bounds the norm, or fixes it

    def __init__(self, loss: Loss, options: dict[str, Any]) -> None:
        super().__init__()
        self.loss = as_module(loss, options)

    @property
    def reduction(self) -> str:
        """That of the loss."""
        return str(self.loss.reduction)

    @reduction.setter
    def reduction(self, reduction: str) -> None:
        self.loss.reduction = reduction  # type: ignore[assignment]

    def _parameter(self) -> float | Tensor:
        """What the factor depends on besides the norm."""
        raise NotImplementedError

    def rescale(self, logits: Tensor, target: Tensor) -> Tensor:
        """The logits that the loss gets."""
        check_tensors(f"{type(self).__name__}: ", logits=logits, target=target)
        self._check_parameters(logits)
        ignore_index, parameter = _ignore_index(self.loss), self._parameter()
        if not (is_plain(logits) and is_plain(target) and self._reaches_kernels(logits, target)):
            return _rescaled(logits, target, ignore_index, _factor(parameter, self._clips))
        number, on_device = _split(parameter)
        by_class = target if is_per_row(target, logits) and not target.is_floating_point() else None
        kernel = _Kernel(by_class, on_device, number, self._clips, ignore_index)
        if not is_recorded(logits):
            return _ops.rescale_logits(logits, *kernel)[0]
        return apply(_Rescale, logits, target, kernel, parameter)  # type: ignore[no-any-return]

    def _given(self, logits: Any, target: Tensor) -> Any:
        """What the loss inside is called with: of several views each is rescaled."""
        views = self._views(logits)
        return self.rescale(logits, target) if views is None else [self.rescale(view, target) for view in views]

    def _reaches_kernels(self, logits: Tensor, target: Tensor, *others: Tensor | None) -> bool:
        """Whether a kernel may take the call: no other derivative than that in the logits is asked for."""
        on_device = logits.is_cpu or logits.is_cuda
        return on_device and not needs_reference(logits, *_tensors(self), *others)

    def _known_arguments(
        self, logits: Tensor, target: Tensor, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> RowLossArguments | None:
        """The call of the loss inside where a kernel of one read takes it, rescaling included; else None.

        Those are for registered losses of log p_y. Whatever else is wanted of a loss is the loss's own business.
        """
        loss = self.loss
        of_row = len(inputs) + len(options) <= 1 and options.keys() <= {"sample_weight"}
        if not isinstance(loss, RowLossModule) or type(loss) not in LOSSES[loss.stem].modules:
            return None  # and errors of what communicates are for the way that tells other ranks
        if not of_row or _has_hooks(loss):
            return None
        check_tensors(f"{type(self).__name__}: ", logits=logits, target=target)
        self._check_parameters(logits)
        sample_weight = inputs[0] if inputs else options.get("sample_weight")
        traced = torch.compiler.is_compiling()
        if not (traced or (is_plain(logits) and is_plain(target))):
            return None
        if not self._reaches_kernels(logits, target, sample_weight, *_tensors(loss)):
            return None
        args = loss._arguments(logits, target, sample_weight)
        return args if _is_known(args) else None

    def forward(self, logits: Tensor, target: Tensor, *inputs: Any, **options: Any) -> Any:
        """The loss of the rescaled logits; further arguments are the loss's."""
        if args := self._known_arguments(logits, target, inputs, options):
            try:
                return row_loss(_in_one_read(args, self._parameter(), self._clips))
            except (RuntimeError, ValueError):
                check_row_loss(args)  # the same of the loss that was given
                raise
        with telling(self._exchanges()):
            return self.loss(self._given(logits, target), target, *inputs, **options)

    def _exchanges(self) -> list[Exchange]:
        """What a call communicates: what the loss does."""
        return exchanges(self.loss)

    def _row_exchanges(self) -> list[Exchange]:
        """What :meth:`rows` communicates."""
        return row_exchanges(self.loss)

    def rows(self, logits: Tensor, target: Tensor, *inputs: Any, **options: Any) -> RowValues:
        """Every row's loss."""
        check_has_rows(self.loss)
        if args := self._known_arguments(logits, target, inputs, options):
            check_row_loss(args)
            return rows_of(_in_one_read(args, self._parameter(), self._clips))
        return row_values(self.loss, self._given(logits, target), target, *inputs, **options)


class LogitNorm(_LogitWrapper):
    """Any loss of logits that are divided by their norm.

    For rejecting inputs of unknown classes and against over-confidence; not made for wrong labels. Longer logits always
    lower cross entropy; here only their direction counts. With z the logits of a row, the loss gets ``z / (t (|z| +
    1e-7))`` with the Euclidean norm. Predict from the logits as they are; for :mod:`fused_losses.scores` take the
    normalised ones (:meth:`rescale`).

    Args:
        loss: a name ("gce"), a function of :mod:`fused_losses.functional`, or any Module that is called with ``(logits,
            target, ...)``, another wrapper of this package included.
        t: temperature, > 0, a number or a 0-dim tensor (a buffer). .04 is the authors' value for CIFAR-10. The
            probability of a label is at most ``1 / (1 + (C - 1) exp(-sqrt(C / (C - 1)) / t))``, which should be near 1.
        **options: those of the Module of ``loss``, where ``loss`` is a name or a function.

    Returns:
        Called with ``(logits, target, ...)``: what the loss returns; row statistics are those of the rescaled logits.
        Logits are ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)`` in any floating dtype; the normalised ones are float32,
        or float64.

    Raises:
        TypeError: there is no such loss, ``t`` is no number, or logits are a DTensor.
        ValueError: ``t`` is out of range, or options are given beside a Module.

    Squares of logits must not overflow: in float32, which computes half precision too, this holds up to ``|z| =
    1.8e19``; beyond, the norm is infinite and the logits become zeros.

    A masked class (logit -inf) has no part in the norm. A row of zeros keeps the loss log C, but its gradient is
    multiplied by ``1e7 / t``: do not initialise the last layer with zeros.

    Cost: one kernel reads the logits once and writes the gradient around a registered loss of log p_y, which cross
    entropy is without label smoothing, for class indices outside of function transforms, in compiled code, too. A step
    of 4096 x 1000 float32 logits took 10.9 ms on one CPU thread, cross entropy alone 7.2. Around other losses, and with
    a tensor as ``logit_bias``, the rescaled logits are written and read once more, and backward reads the logits and
    the loss's gradient: 15.1 ms where the loss is cross entropy.

    Example:
        >>> criterion = LogitNorm("cross_entropy", t=0.5)
        >>> criterion(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
        tensor(0.5130)

    Source: ICML 2022, "Mitigating Neural Network Overconfidence with Logit Normalization", Eq. 6.
    """

    _checks: ClassVar = {"t": assigned(_FACTOR)}
    t: float | Tensor
    _clips = False

    def __init__(self, loss: Loss, t: float | Tensor = 0.04, **options: Any) -> None:
        super().__init__(loss, options)
        self._set("t", t, _FACTOR)

    def _parameter(self) -> float | Tensor:
        return self.t

    def _shown(self) -> dict[str, Any]:
        return {"t": self.t}


class LogitClip(_LogitWrapper):
    """Any loss of logits whose norm is at most a constant.

    For wrong labels: it bounds any loss, and the gradient of a row that the network finds impossible. With z the logits
    of a row, the loss gets ``tau z / |z|`` where the Euclidean norm ``|z|`` exceeds ``tau``, else z.

    Args:
        loss: a name ("cross_entropy"), a function of :mod:`fused_losses.functional`, or any Module that is called with
            ``(logits, target, ...)``, another wrapper of this package included.
        tau: the largest norm, > 0, a number or a 0-dim tensor (a buffer). No value fits all data: the probability of a
            label is at most ``1 / (1 + (C - 1) exp(-tau sqrt(C / (C - 1))))``, which must leave room for right labels.
        **options: those of the Module of ``loss``, where ``loss`` is a name or a function.

    Returns:
        Called with ``(logits, target, ...)``: what the loss returns; row statistics are those of the rescaled logits.
        Logits are ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)`` in any floating dtype; the clipped ones are float32,
        or float64.

    Raises:
        TypeError: there is no such loss, ``tau`` is no number, or logits are a DTensor.
        ValueError: ``tau`` is out of range, or options are given beside a Module.

    Squares of logits must not overflow: in float32, which computes half precision too, this holds up to ``|z| =
    1.8e19``; beyond, the norm is infinite and the logits become zeros.

    A masked class (logit -inf) has no part in the norm. The cost is that of :class:`LogitNorm`.

    Example:
        >>> criterion = LogitClip("cross_entropy", tau=2.5)
        >>> criterion(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
        tensor(0.4741)

    Source: 2212.04055, Eq. 3. Deviation: the authors' code rescales logits longer than ``temp`` to the length ``1 /
    temp``, which is ``LogitNorm(loss, t=temp)`` for those, and leaves the others alone.
    """

    _checks: ClassVar = {"tau": assigned(_FACTOR)}
    tau: float | Tensor
    _clips = True

    def __init__(self, loss: Loss, tau: float | Tensor, **options: Any) -> None:
        super().__init__(loss, options)
        self._set("tau", tau, _FACTOR)

    def _parameter(self) -> float | Tensor:
        return self.tau

    def _shown(self) -> dict[str, Any]:
        return {"tau": self.tau}
