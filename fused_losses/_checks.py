"""The checks of ``csrc/ops`` for calls that reach no kernel: while tracing, and where the plain formula computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses._arguments import LOSSES, RowLossArguments, check_reduction, is_distributed, is_ignored
from fused_losses._logit_bias import class_dim
from fused_losses._plain import inside_transforms, is_plain

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INDEX = (torch.int64, torch.int32, torch.int16, torch.uint8)


def row_shape(logits: Tensor) -> tuple[int, ...]:
    """The shape of one number per row: that of the logits without their class dimension."""
    shape, dim = logits.shape, class_dim(logits)
    return (*shape[:dim], *shape[dim + 1 :])


def is_per_row(tensor: Tensor, logits: Tensor) -> bool:
    """Whether it has one number per row. That of a single row, logits ``(C,)``, may have shape (1,), as in torch."""
    return tensor.shape == row_shape(logits) or (logits.dim() == 1 and tensor.shape == (1,))


def check_tensors(of: str = "", /, **values: Any) -> None:
    """Raises unless all are dense tensors of this process; ``of`` begins the message."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{of}{name} must be a Tensor, got {type(value).__name__}")
        if is_distributed(value):
            raise TypeError(f"{of}{name} must be a plain tensor, got a DTensor; pass {name}.to_local()")
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested tensor" if value.is_nested else f"tensor of layout {value.layout}"
            raise RuntimeError(f"{of}{name} must be dense, got a {kind}")


def is_integer_tensor(value: Any) -> bool:
    """Whether it is a tensor of whole numbers, which bools are not."""
    return isinstance(value, Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )


def kind_of(value: Any) -> Any:
    """What an error says was given: the dtype of a tensor, else the type (an array has a dtype, too)."""
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def check_row_loss(args: RowLossArguments) -> None:
    """Raises where the operators would, with their types of error, but for targets out of range."""
    entry = LOSSES.get(args.loss)
    if entry is None:  # a loss of log p_y together with what is done to its logits (WRAPPED in _reference.py)
        return check_rows(args, ("mean", "sum", "none"), takes_probabilities=False)
    check_rows(args, entry.reductions, entry.takes_probabilities)
    check_min_classes(args)


def check_constants(args: RowLossArguments, rule: str) -> None:
    """Raises where a tensor besides the logits wants a gradient and would get none; ``rule`` begins the message."""
    others = {"target": args.target, "weight": args.weight, "sample_weight": args.sample_weight}
    others |= {"logit_bias": args.logit_bias_tensor, LOSSES[args.loss].tensor_parameter or "": args.first_param}
    for name, tensor in others.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{rule}, got {name} that requires a gradient: detach it, or multiply the losses of "
                'reduction="none" by it'
            )


def check_rows(args: RowLossArguments, reductions: tuple[str, ...], takes_probabilities: bool) -> None:
    """As :func:`check_row_loss`, for any loss of rows, in the registry or not."""
    name, logits = args.loss, args.logits
    check_reduction(args.reduction, reductions)
    if logits.dtype not in FLOATING:
        raise RuntimeError(f"{name}: logits must be float64, float32, float16 or bfloat16, got {logits.dtype}")
    if logits.dim() == 0:
        raise RuntimeError(f"{name}: logits must have shape (C,), (N, C) or (N, C, d1, ...), got a scalar")
    _check_target(args, takes_probabilities)
    param = LOSSES[name].tensor_parameter if name in LOSSES else None
    tensors = {"weight": args.weight, "sample_weight": args.sample_weight, param: args.first_param}
    for argument, tensor in tensors.items():
        if not isinstance(tensor, (Tensor, type(None))):
            raise TypeError(f"{name}: {argument} must be a Tensor or None, got {type(tensor).__name__}")
        if tensor is not None:
            check_tensors(f"{name}: ", **{str(argument): tensor})
        if tensor is not None and not (tensor.dtype in FLOATING and tensor.device == logits.device):
            raise RuntimeError(
                f"{name}: {argument} must be a floating point tensor on the device of logits ({logits.device}), got "
                f"{tensor.dtype} on {tensor.device}"
            )
    rows, classes = row_shape(logits), logits.shape[class_dim(logits)]
    if args.weight is not None and args.weight.shape != (classes,):
        raise RuntimeError(
            f"{name}: weight tensor should be defined either for all {classes} classes or no classes but got weight "
            f"tensor of shape {list(args.weight.shape)}"
        )
    if args.sample_weight is not None and not is_per_row(args.sample_weight, logits):
        raise RuntimeError(
            f"{name}: sample_weight must have one entry per row, shape {list(rows)}, got "
            f"{list(args.sample_weight.shape)}"
        )
    if args.first_param is not None and args.first_param.dim() == 1 and args.first_param.shape != (classes,):
        raise ValueError(
            f"{name}: {param} must be a number, 0-dim or of shape ({classes},), got shape "
            f"{list(args.first_param.shape)}"
        )


def check_min_classes(args: RowLossArguments) -> None:
    """Raises where the loss is not defined for so few classes."""
    if args.logits.shape[class_dim(args.logits)] < LOSSES[args.loss].min_classes:
        shape = list(args.logits.shape)
        raise ValueError(f"{args.loss}: logits must have at least two classes, got shape {shape}")


def check_targets(target: Tensor, ignore_index: int, num_classes: int) -> None:
    """Raises the kernels' IndexError for a class out of range, where looking at the values waits for nobody."""
    target = inside_transforms(target)
    if not (target.is_cpu and is_plain(target)) or target.numel() == 0:
        return
    classes = target.masked_fill(is_ignored(target, ignore_index), 0).long()
    smallest, largest = classes.aminmax()
    if int(smallest) < 0 or int(largest) >= num_classes:
        row = int(((classes < 0) | (classes >= num_classes)).flatten().nonzero()[0])
        raise IndexError(
            f"target must be in [0, {num_classes}) or equal ignore_index={ignore_index}: Target "
            f"{int(target.flatten()[row])} is out of bounds (row {row})"
        )


def _check_target(args: RowLossArguments, takes_probabilities: bool) -> None:
    name, logits, target = args.loss, args.logits, args.target
    rows = row_shape(logits)
    if target.device != logits.device:
        raise RuntimeError(f"{name}: target must be on the device of logits ({logits.device}), got {target.device}")
    if target.shape == logits.shape and target.is_floating_point():
        if not takes_probabilities:
            those = ", ".join(other for other, entry in LOSSES.items() if entry.takes_probabilities)
            raise RuntimeError(
                f"{name}: target must hold class indices of shape {list(rows)}; class probabilities are "
                f"taken by {those}, got shape {list(target.shape)}; {_one_hot(logits)}"
            )
        if args.ignore_index >= 0:
            raise RuntimeError(
                f"{name}: ignore_index is not supported for floating point target, got {args.ignore_index}"
            )
        if args.logit_bias != 0 or args.logit_bias_tensor is not None:
            raise ValueError(
                f"{name}: logit_bias is not supported for class probabilities, which have no single target class"
            )
        return
    if target.shape == logits.shape:
        raise RuntimeError(
            f"{name}: Expected floating point type for target with class probabilities (it has the shape of logits), "
            f"got {target.dtype}; {_one_hot(logits)}"
        )
    if target.dtype not in _INDEX:
        raise RuntimeError(
            f"{name}: expected target dtype to be Long or Byte (or Int, Short) with shape {list(rows)}, got "
            f"{target.dtype} with shape {list(target.shape)}"
        )
    if logits.dim() > 1 and target.dim() >= 1 and target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{name}: Expected input batch_size ({logits.shape[0]}) to match target batch_size ({target.shape[0]})"
        )
    if not is_per_row(target, logits):
        raise RuntimeError(
            f"{name}: Expected target size {list(rows)} for logits of shape {list(logits.shape)}, got "
            f"{list(target.shape)}{'; pass target.squeeze(1)' if _has_one_channel(logits, target) else ''}"
        )


def _one_hot(logits: Tensor) -> str:
    return f"one-hot labels are passed as class indices, target.argmax({class_dim(logits)})"


def _has_one_channel(logits: Tensor, target: Tensor) -> bool:
    return target.dim() == logits.dim() > 1 and target.shape[1] == 1
