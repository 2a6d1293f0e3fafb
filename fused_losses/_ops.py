"""The operators; the only file that touches ``torch.ops``.

A kernel sees memory; beside each operator is what tracing sees of it, shapes and dtypes (its "fake" implementation).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from fused_losses._arguments import RowLossArguments, RowLossConstants, ZErrorLossArguments, ZErrorRule, acc_dtype
from fused_losses._checks import check_row_loss, row_shape
from fused_losses._logit_bias import class_dim

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "libfused_losses_ops.so"


def _require_binaries() -> None:
    module = importlib.util.find_spec("fused_losses._C")
    # With an editable installation, Python finds the module of that beside other sources.
    if module is None or Path(str(module.origin)).parent != _FOLDER or not _LIBRARY.exists():
        raise ImportError(
            f"fused_losses in {_FOLDER} is not built for this Python. If these are the sources and it is installed, "
            "start Python in another folder, since it looks in the current one first; if it is not installed, run "
            "pip install --no-build-isolation ."
        )


_require_binaries()
from fused_losses import _C  # noqa: E402


def _require_torch() -> None:
    minimum, running = _C.build_info()["torch_minimum"], torch.__version__
    if TorchVersion(running) < minimum:
        raise ImportError(f"fused_losses needs torch {minimum} or newer, but torch {running} is running")


_require_torch()
torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]

Tensors2 = tuple[Tensor, Tensor]
Tensors3 = tuple[Tensor, Tensor, Tensor]
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Tensors6 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

row_loss: Callable[..., Tensor] = torch.ops.fused_losses.row_loss.default
row_loss_with_grad: Callable[..., Tensors2] = torch.ops.fused_losses.row_loss_with_grad.default
row_loss_with_grad_: Callable[..., Tensor] = torch.ops.fused_losses.row_loss_with_grad_.default
row_loss_with_stats: Callable[..., Tensors3] = torch.ops.fused_losses.row_loss_with_stats.default
row_loss_with_bits: Callable[..., Tensors3] = torch.ops.fused_losses.row_loss_with_bits.default
row_loss_with_stats_and_grad: Callable[..., Tensors4] = torch.ops.fused_losses.row_loss_with_stats_and_grad.default
row_loss_backward: Callable[..., Tensor] = torch.ops.fused_losses.row_loss_backward.default
row_loss_backward_: Callable[..., None] = torch.ops.fused_losses.row_loss_backward_.default
mixed_loss: Callable[..., Tensor] = torch.ops.fused_losses.mixed_loss.default
mixed_loss_with_grad: Callable[..., Tensors3] = torch.ops.fused_losses.mixed_loss_with_grad.default
mixed_loss_backward: Callable[..., Tensor] = torch.ops.fused_losses.mixed_loss_backward.default
mixed_loss_backward_: Callable[..., None] = torch.ops.fused_losses.mixed_loss_backward_.default
row_statistics: Callable[..., Tensors2] = torch.ops.fused_losses.row_statistics.default
elr_rows_: Callable[..., Tensors2] = torch.ops.fused_losses.elr_rows_.default
gjs_rows_: Callable[..., Tensor] = torch.ops.fused_losses.gjs_rows_.default
rescale_logits: Callable[..., Tensors2] = torch.ops.fused_losses.rescale_logits.default
rescale_logits_backward: Callable[..., Tensor] = torch.ops.fused_losses.rescale_logits_backward.default
row_loss_and_statistics: Callable[..., Tensors3] = torch.ops.fused_losses.row_loss_and_statistics.default
row_loss_with_grad_and_statistics: Callable[..., Tensors4] = (
    torch.ops.fused_losses.row_loss_with_grad_and_statistics.default
)
row_loss_with_stats_and_statistics: Callable[..., Tensors5] = (
    torch.ops.fused_losses.row_loss_with_stats_and_statistics.default
)
row_loss_with_bits_and_statistics: Callable[..., Tensors5] = (
    torch.ops.fused_losses.row_loss_with_bits_and_statistics.default
)
row_loss_with_stats_and_grad_and_statistics: Callable[..., Tensors6] = (
    torch.ops.fused_losses.row_loss_with_stats_and_grad_and_statistics.default
)
class_moments: Callable[..., Tensor] = torch.ops.fused_losses.class_moments.default
z_error_mask: Callable[..., Tensors3] = torch.ops.fused_losses.z_error_mask.default
z_error_class_loss: Callable[..., Tensors6] = torch.ops.fused_losses.z_error_class_loss.default
z_error_loss: Callable[..., Tensors4] = torch.ops.fused_losses.z_error_loss.default
update_moments_: Callable[..., None] = torch.ops.fused_losses.update_moments_.default
z_error_loss_backward: Callable[..., Tensor] = torch.ops.fused_losses.z_error_loss_backward.default

# For small calls; the last argument is what packs a call's constants. `_op` saves a tenth of the time.
packed_row_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.ops.fused_losses.row_loss.packed._op
packed_row_loss_with_grad: Callable[[Tensor, Tensor, Tensor], Tensors2] = (
    torch.ops.fused_losses.row_loss_with_grad.packed._op
)
z_error_kept_target: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor] = (
    torch.ops.fused_losses.z_error_kept_target.default._op
)
# threshold, statistic, tail, min_count, keep_small, ignore_index, momentum
ZErrorConstants = tuple[float, str, str, int, bool, int, float]


class PackedConstants(NamedTuple):
    """What a call of a row loss says besides its tensors, and the same as one tensor for the operators."""

    values: RowLossConstants
    tensor: Tensor

    def __reduce__(self) -> tuple[Callable[..., PackedConstants], tuple[RowLossConstants]]:
        """Copies and pickles hold the values: the tensor belongs to this build."""
        return pack_constants, (self.values,)


@functools.lru_cache(maxsize=1000)  # hyper-parameters may change from call to call
def pack_constants(values: RowLossConstants) -> PackedConstants:
    """Packs them for operators. Raises a ValueError for an unknown reduction. Not for traces."""
    return PackedConstants(values, torch.ops.fused_losses.row_loss_constants(*values))


@functools.lru_cache(maxsize=1000)
def pack_z_error_constants(values: ZErrorConstants) -> Tensor:
    """Packs them for :data:`z_error_kept_target`. Not for traces."""
    return torch.ops.fused_losses.z_error_constants(*values)  # type: ignore[no-any-return]


def _fake(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Registers what tracing sees of the operator of that name."""
    name = implementation.__name__.removeprefix("_fake_")

    def checked(*args: Any, **kwargs: Any) -> Any:
        result = implementation(*args, **kwargs)
        _check_meta(name, args)
        return result

    torch.library.register_fake(f"fused_losses::{name}", checked)
    return implementation


def _check_meta(name: str, args: Sequence[Any]) -> None:
    """Raises where some tensors are on the meta device: a call with real ones would return memory that nobody wrote."""
    # One number may be on the CPU beside tensors elsewhere.
    tensors = {i: arg for i, arg in enumerate(args) if isinstance(arg, Tensor) and (arg.dim() > 0 or arg.is_meta)}
    if len({tensor.is_meta for tensor in tensors.values()}) < 2:
        return
    names = [argument.name for argument in getattr(torch.ops.fused_losses, name).default._schema.arguments]
    (first, device), *_ = [(names[i], tensor.device) for i, tensor in tensors.items()]
    for i, tensor in tensors.items():
        if tensor.device != device:
            raise RuntimeError(f"{name}: {names[i]} must be on the device of {first} ({device}), got {tensor.device}")


def _empty_loss(args: RowLossArguments) -> Tensor:
    check_row_loss(args)
    shape = row_shape(args.logits) if args.reduction == "none" else ()
    return args.logits.new_empty(shape, dtype=acc_dtype(args.logits))


@_fake
def _fake_row_loss(*args: Any) -> Tensor:
    return _empty_loss(RowLossArguments(*args))


@_fake
def _fake_row_loss_with_grad(*args: Any) -> Tensors2:
    return _empty_loss(RowLossArguments(*args)), torch.empty_like(args[0])


@_fake
def _fake_row_loss_with_grad_(grad_logits: Tensor, *args: Any) -> Tensor:
    return _empty_loss(RowLossArguments(*args))


@_fake
def _fake_row_loss_with_stats(*flat: Any) -> Tensors3:
    args = RowLossArguments(*flat)
    loss, logits, rows = _empty_loss(args), args.logits, math.prod(row_shape(args.logits))
    count = _C.stats_count(args.loss, [float(p) for p in args.params], args.target.is_floating_point())
    most = _C.most_classes_without_stats(args.loss)
    if logits.is_cuda and logits.dtype is not torch.float64 and logits.shape[class_dim(logits)] <= most:
        count = 0
    divides = args.reduction in ("mean", "active_mean")
    return loss, loss.new_empty((count, rows)), loss.new_empty(() if divides else (0,))


@_fake
def _fake_row_loss_with_bits(*args: Any) -> Tensors3:  # on CUDA stats may have more rows, but in no trace
    loss, stats, denominator = _fake_row_loss_with_stats(*args)
    return loss, stats, denominator


@_fake
def _fake_row_loss_with_stats_and_grad(*flat: Any) -> Tensors4:
    loss, stats, denominator = _fake_row_loss_with_stats(*flat)
    if flat[0].is_cuda:  # backward recomputes them
        stats = stats[:0]
    if RowLossArguments(*flat).reduction != "none":  # with the upstream gradient that the written one is for
        denominator = loss.new_empty(2)
    return loss, stats, denominator, torch.empty_like(flat[0])


@_fake
def _fake_row_loss_backward(
    grad_loss: Tensor, stats: Tensor, denominator: Tensor, logits: Tensor, *rest: Any
) -> Tensor:
    return torch.empty_like(logits)


@_fake
def _fake_row_loss_backward_(*args: Any) -> None:
    return None


@_fake
def _fake_mixed_loss(target: Tensor, lam: Tensor | None, lam_of_all: float, *args: Any) -> Tensor:
    return _empty_loss(RowLossArguments(*args))


@_fake
def _fake_mixed_loss_with_grad(target: Tensor, lam: Tensor | None, lam_of_all: float, *args: Any) -> Tensors3:
    logits = args[0]
    upstream = logits.new_empty((), dtype=acc_dtype(logits))
    return _empty_loss(RowLossArguments(*args)), upstream, torch.empty_like(logits)


@_fake
def _fake_mixed_loss_backward(
    grad_loss: Tensor, target: Tensor, lam: Tensor | None, lam_of_all: float, logits: Tensor, *rest: Any
) -> Tensor:
    return torch.empty_like(logits)


@_fake
def _fake_mixed_loss_backward_(*args: Any) -> None:
    return None


@_fake
def _fake_row_statistics(logits: Tensor, target: Tensor, ignore_index: int) -> Tensors2:
    rows = math.prod(row_shape(logits))
    return logits.new_empty((5, rows), dtype=acc_dtype(logits)), logits.new_empty((rows,), dtype=torch.int64)


@_fake
def _fake_row_loss_and_statistics(*flat: Any) -> Tensors3:
    args = RowLossArguments(*flat)
    return _empty_loss(args), *_fake_row_statistics(args.logits, args.target, args.ignore_index)


@_fake
def _fake_row_loss_with_grad_and_statistics(*flat: Any) -> Tensors4:
    loss, *statistics = _fake_row_loss_and_statistics(*flat)
    return loss, torch.empty_like(flat[0]), *statistics


@_fake
def _fake_row_loss_with_stats_and_statistics(*flat: Any) -> Tensors5:
    _, *statistics = _fake_row_loss_and_statistics(*flat)
    return *_fake_row_loss_with_stats(*flat), *statistics


@_fake
def _fake_row_loss_with_bits_and_statistics(*flat: Any) -> Tensors5:  # as without statistics: in no trace
    loss, stats, denominator, row_stats, argmax = _fake_row_loss_with_stats_and_statistics(*flat)
    return loss, stats, denominator, row_stats, argmax


@_fake
def _fake_row_loss_with_stats_and_grad_and_statistics(*flat: Any) -> Tensors6:
    _, *statistics = _fake_row_loss_and_statistics(*flat)
    return *_fake_row_loss_with_stats_and_grad(*flat), *statistics


@_fake
def _fake_elr_rows_(logits: Tensor, target: Tensor, *args: Any) -> Tensors2:
    values, with_grad = logits.new_empty(target.numel(), dtype=acc_dtype(logits)), args[-1]
    return values, values.new_empty(logits.shape if with_grad else (0,))


@_fake
def _fake_gjs_rows_(views: list[Tensor], target: Tensor, *args: Any) -> Tensor:
    return views[0].new_empty(target.numel())


@_fake
def _fake_rescale_logits(logits: Tensor, target: Tensor | None, *args: Any) -> Tensors2:
    rescaled = torch.empty_like(logits, dtype=acc_dtype(logits))
    return rescaled, rescaled.new_empty(rescaled.numel() // rescaled.shape[class_dim(logits)])


@_fake
def _fake_rescale_logits_backward(grad_rescaled: Tensor, norms: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits)


@_fake
def _fake_class_moments(
    score: Tensor, target: Tensor, num_classes: int, statistic: str = "class", ignore_index: int = -100
) -> Tensor:
    return score.new_empty((3, num_classes), dtype=torch.float64)


def _empty_scores(rows: Tensor, wanted: bool) -> Tensor:
    return rows.new_empty(rows.shape if wanted else (0,), dtype=torch.float64)


@_fake
def _fake_z_error_mask(score: Tensor, target: Tensor, ignore_index: int, *rule: Any) -> Tensors3:
    mask = target.new_empty(target.shape, dtype=torch.bool)
    kept_target = target.new_empty(target.shape, dtype=torch.int64)
    return mask, kept_target, _empty_scores(target, ZErrorRule(*rule).with_scores)


@_fake
def _fake_z_error_class_loss(
    values: Tensor,
    score: Tensor,
    target: Tensor,
    num_classes: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_bias_tensor: Tensor | None,
    label_smoothing: float,
    logit_bias: float,
    unweighted: bool,
    ignore_index: int,
    reduction: str,
    *rule: Any,
) -> Tensors6:
    loss = values.new_empty(target.shape if reduction == "none" else (), dtype=acc_dtype(values))
    masked = _fake_z_error_mask(score, target, ignore_index, *rule)
    return loss, loss.new_empty(()), *masked, loss.new_empty(target.shape if unweighted else (0,))


@_fake
def _fake_z_error_loss(*flat: Any) -> Tensors4:
    args, rule = ZErrorLossArguments(*flat[:5]), ZErrorRule(*flat[5:])
    input = args.input
    loss = input.new_empty(input.shape if args.reduction == "none" else (), dtype=acc_dtype(input))
    mask = input.new_empty(input.shape, dtype=torch.bool)
    return loss, loss.new_empty(()), mask, _empty_scores(input, rule.with_scores)


@_fake
def _fake_z_error_loss_backward(
    grad_loss: Tensor, denominator: Tensor, mask: Tensor, statistic: str, input: Tensor, *rest: Any
) -> Tensor:
    return input.new_empty(input.shape)


@_fake
def _fake_update_moments_(running: Tensor, batch: Tensor, momentum: float) -> None:
    return None
