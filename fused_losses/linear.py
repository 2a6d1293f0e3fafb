"""The last linear layer and its loss in one, for so many classes that their logits would fill the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fused_losses._agreement import Exchange, telling
from fused_losses._arguments import LOSSES, LossEntry, RowLossArguments, check_reduction, entry_named, is_distributed
from fused_losses._checks import FLOATING, check_tensors
from fused_losses._chunks import ChunkOptions, Layer
from fused_losses._common import Criterion, RowLossModule, check_forward
from fused_losses._linear_autograd import ChunkedLogits
from fused_losses._logit_bias import LogitBias
from fused_losses._parameters import not_negative_integer, positive_integer, switch
from fused_losses._shards import CALL, Shard
from fused_losses._unwrap import make_weight
from fused_losses.distributed import GlobalMean
from fused_losses.parallel import ClassParallel, sum_gradient
from fused_losses.z_cross_entropy import ZErrorCrossEntropyLoss

CHUNK_BYTES = 64 << 20

Loss = str | Callable[..., Any] | nn.Module
_DEFAULTS: dict[str, Any] = {"weight": None, "ignore_index": -100, "logit_bias": 0.0}


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: Loss = "gce",
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str | None = None,
    logit_bias: LogitBias = 0.0,
    sample_weight: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    accumulate_dtype: torch.dtype = torch.float32,
    skip_rows: bool | None = None,
    **parameters: Any,
) -> Tensor:
    """A row loss of ``input @ linear_weight.T + linear_bias``, without ever having all logits in memory.

    For many classes, where the logits take most of the memory. Rows go through in chunks: one GEMM for the logits, into
    a buffer that is used again, the kernel of the loss, and two GEMMs for the gradients. Under "mean" and "sum" forward
    makes the gradients and backward multiplies them by the upstream gradient. "none" computes the logits a second time
    in backward, and so does float16, whose range might not hold gradients without the loss scale. Beyond inputs and
    gradients it needs ``chunk_bytes``, and a sum for the weight's gradient where ``linear_weight`` has half precision.
    Results are deterministic. Nothing waits for a GPU unless ``skip_rows=True``.

    Args:
        input: features ``(..., D)``; float64, float32, float16 or bfloat16. Autocast works as for a linear layer.
        linear_weight: ``(C, D)``, of the dtype of ``input``.
        target: class indices in ``[0, C)`` or ``ignore_index``, shape ``(...)``; or class probabilities ``(..., C)``,
            where the loss takes them.
        loss: a name ("gce" or "gce_loss"), a function of :mod:`fused_losses.functional`, or a Module: of a row loss,
            :class:`GlobalMean`, :class:`ClassParallel` or :class:`ZErrorCrossEntropyLoss`. A Module brings its own
            options. Z-Error needs the scores of the rows before the loss: ``statistic="logit"`` gathers one row of
            ``linear_weight`` per row, "prob" and "loss" take a fourth GEMM.
        linear_bias: ``(C,)``, or None.
        weight, ignore_index, logit_bias, sample_weight: as for the loss; rows are those of ``target``.
        reduction: as for the loss; None for the default of the loss, or of the Module.
        chunk_bytes: size of a chunk's logits and their gradient, an integer >= 1; a chunk has at least one row. A
            larger one is faster on a GPU.
        accumulate_dtype: in which the gradients of weight and bias are summed, unless theirs is wider.
        skip_rows: leave rows without gradient out of the GEMMs where they are at least half of the rows: ignored rows,
            rows that Z-Error dropped, rows that satisfy the margins of HEM. None: on the CPU only, because counting
            them waits for a GPU.
        parameters: of the loss, such as ``q`` or ``label_smoothing``, where it is a name or a function.

    Returns:
        The loss in float32, float64 for float64 ``input``; a scalar, or of shape ``(...)`` under "none".

    Raises:
        TypeError: ``loss`` is none of these, or a parameter is unknown.
        ValueError: shapes do not fit, values are out of range, or options are given beside a Module.
        RuntimeError: dtypes or devices do not fit; a tensor besides input, linear_weight and linear_bias requires a
            gradient; a second derivative is taken; another rank of those that share the classes has failed, in any
            chunk but after the last one's numbers were exchanged.
        IndexError: a target is out of range (on CUDA: a device assertion).

    Example:
        >>> features, head = torch.ones(2, 3, requires_grad=True), torch.zeros(10, 3)
        >>> linear_loss(features, head, torch.tensor([4, 9]), "mae")
        tensor(1.8000, grad_fn=...)
    """
    options = {"weight": weight, "ignore_index": ignore_index, "logit_bias": logit_bias}
    of_chunks = ChunkOptions(torch.float32, accumulate_dtype, chunk_bytes, skip_rows)
    layer = Layer(input, linear_weight, linear_bias)
    group = _class_group(loss, linear_weight)
    with telling(_exchanges(loss, group, reduction)):
        if group is None and is_distributed(linear_weight):
            placements = linear_weight.placements  # type: ignore[attr-defined]
            raise ValueError(f"linear_weight must be sharded over one mesh dimension by Shard(0), got {placements}")
        layer, shard = (layer, None) if group is None else _local_classes(loss, layer)
        logits, shape = _chunked(layer, target, of_chunks._replace(shard=shard))
        rows = target.reshape(-1, logits.stand_in.shape[1]) if target.shape != shape else target.reshape(-1)
        samples = None if sample_weight is None else _flat_weights(sample_weight, shape)
        values = _loss_of(loss, logits, rows, samples, reduction, options, parameters)
        return values if values.dim() == 0 or values.shape == shape else values.reshape(shape)


def _loss_of(
    loss: Loss,
    logits: ChunkedLogits,
    target: Tensor,
    sample_weight: Tensor | None,
    reduction: str | None,
    options: dict[str, Any],
    parameters: dict[str, Any],
) -> Tensor:
    if not isinstance(loss, nn.Module):
        entry = find_loss(loss)
        given: dict[str, Any] = {} if reduction is None else {"reduction": reduction}
        arguments = entry.arguments(
            logits.stand_in, target, sample_weight=sample_weight, **options, **given, **parameters
        )
        return logits.row_loss(arguments)
    check_module(loss)
    _check_no_options(options, parameters)
    if isinstance(loss, ZErrorCrossEntropyLoss):
        if logits.options.shard is not None:
            raise TypeError("loss must be one with a form for sharded classes, got ZErrorCrossEntropyLoss")
        found = loss.evaluate(logits.z_ops(), logits.stand_in, target, sample_weight, reduction=reduction)
        assert isinstance(found, Tensor)
        return found
    arguments = _with_reduction(_row_loss_of(loss)._arguments(logits.stand_in, target, sample_weight), reduction)
    if isinstance(loss, GlobalMean) and arguments.reduction not in ("none", "sum"):
        return loss.evaluate(arguments, logits.total)
    return logits.row_loss(arguments)


def find_loss(loss: Any) -> LossEntry:
    """The registry entry of a name or a function."""
    if isinstance(loss, str):
        return entry_named(loss, or_else=", a loss function or a Module")
    for entry in LOSSES.values():
        if loss is entry.function:
            return entry
    name = getattr(loss, "__name__", type(loss).__name__)
    raise TypeError(
        f"loss must be a name, a row-loss function of fused_losses or a Module of one, got {name}"
        + (": Z-Error is taken as ZErrorCrossEntropyLoss" if name.startswith("z_") else "")
    )


def check_module(loss: nn.Module) -> None:
    """Raises unless :func:`linear_loss` takes the Module."""
    if not isinstance(loss, (RowLossModule, GlobalMean, ClassParallel, ZErrorCrossEntropyLoss)):
        raise TypeError(
            "loss must be a row-loss Module of fused_losses, GlobalMean, ClassParallel or ZErrorCrossEntropyLoss, got "
            f"{type(loss).__name__}"
        )
    for module in (loss, _row_loss_of(loss)):
        check_forward(module)


def _row_loss_of(loss: nn.Module) -> Any:
    return loss.loss if isinstance(loss, (GlobalMean, ClassParallel)) else loss


def _check_no_options(options: dict[str, Any], parameters: dict[str, Any]) -> None:
    for name, value in {**options, **parameters}.items():
        if name not in _DEFAULTS or isinstance(value, Tensor) or value != _DEFAULTS[name]:
            raise ValueError(f"{name} must be set on the Module given as loss, got {value!r} beside it")


def _with_reduction(args: RowLossArguments, reduction: str | None) -> RowLossArguments:
    if reduction is None:
        return args
    check_reduction(reduction, LOSSES[args.loss].reductions)
    return args._replace(reduction=reduction)


def _flat_weights(sample_weight: Tensor, shape: torch.Size) -> Tensor:
    check_tensors(sample_weight=sample_weight)
    if sample_weight.shape != shape:
        raise ValueError(f"sample_weight must have shape {tuple(shape)}, got {tuple(sample_weight.shape)}")
    return sample_weight.reshape(-1)


def _chunked(layer: Layer, target: Tensor, options: ChunkOptions) -> tuple[ChunkedLogits, torch.Size]:
    """The logits in chunks, and the shape of the rows."""
    input, linear_weight, linear_bias = layer
    tensors = {"input": input, "linear_weight": linear_weight, "target": target}
    if linear_bias is not None:
        tensors["linear_bias"] = linear_bias
    check_tensors(**tensors)
    _check_shapes(input, linear_weight, target, linear_bias, options.shard)
    size = _check_options(options.chunk_bytes, options.accumulate_dtype, options.skip_rows)
    options = options._replace(dtype=_dtype_of_logits(tensors), chunk_bytes=size)
    flat = input.unsqueeze(0).flatten(0, -2)  # not by reshape, which would not know how many rows of no features
    return ChunkedLogits(Layer(flat, linear_weight, linear_bias), options), input.shape[:-1]


def _check_options(chunk_bytes: int, accumulate_dtype: torch.dtype, skip_rows: bool | None) -> int:
    size = int(positive_integer.pack("chunk_bytes", chunk_bytes))
    if not (isinstance(accumulate_dtype, torch.dtype) and accumulate_dtype in FLOATING):
        raise ValueError(f"accumulate_dtype must be float64, float32, float16 or bfloat16, got {accumulate_dtype!r}")
    if not (skip_rows is None or isinstance(skip_rows, bool)):
        raise ValueError(f"skip_rows must be True, False or None, got {skip_rows!r}")
    return size


def _class_group(loss: Loss, linear_weight: Any) -> tuple[dist.ProcessGroup | None] | None:
    """The group whose ranks share the classes, if any; what it holds may be None for the default group."""
    if isinstance(loss, ClassParallel):
        return (loss.process_group,)
    return (linear_weight.device_mesh.get_group(0),) if _is_sharded(linear_weight) else None


def _is_sharded(linear_weight: Any) -> bool:
    return is_distributed(linear_weight) and [p.is_shard(0) for p in linear_weight.placements] == [True]


def _exchanges(
    loss: Loss, class_group: tuple[dist.ProcessGroup | None] | None, reduction: str | None
) -> list[Exchange]:
    """What a call communicates, as far as it may bring news."""
    of_classes = [] if class_group is None else [Exchange.over(class_group[0], CALL)]
    of_rows = loss._exchanges(reduction) if isinstance(loss, (GlobalMean, ZErrorCrossEntropyLoss)) else []
    return of_classes + of_rows


def _local_classes(loss: Loss, layer: Layer) -> tuple[Layer, Shard]:
    """The tensors of this rank, and which classes its weight has.

    A DTensor weight also means that the gradients of ``input`` are to be added up over its ranks.
    """
    input: Any
    linear_weight: Any
    linear_bias: Any
    input, linear_weight, linear_bias = layer
    if isinstance(loss, ClassParallel):
        return layer, loss.shard_of("linear_weight", linear_weight, 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = linear_weight.device_mesh, linear_weight.placements
    _, offset = compute_local_shape_and_global_offset(linear_weight.shape, mesh, placements)
    group, classes = mesh.get_group(0), linear_weight.shape[0]
    if linear_bias is not None:
        if not is_distributed(linear_bias) or linear_bias.placements != placements:
            raise ValueError(f"linear_bias must be a DTensor placed as linear_weight, {placements}")
        linear_bias = linear_bias.to_local()
    if is_distributed(input):
        if not all(p.is_replicate() for p in input.placements):
            raise ValueError(f"input must be replicated where linear_weight is sharded, got {input.placements}")
        input = input.to_local()
    shard = Shard(group, offset[0], classes, -(-classes // mesh.size()))
    return Layer(sum_gradient(input, group), linear_weight.to_local(), linear_bias), shard


def _check_shapes(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, shard: Shard | None
) -> None:
    if linear_weight.dim() != 2 or (linear_weight.shape[0] == 0 and shard is None):
        raise ValueError(f"linear_weight must have shape (C, D) with C >= 1, got {tuple(linear_weight.shape)}")
    classes, features = linear_weight.shape
    if input.dim() == 0 or input.shape[-1] != features:
        raise ValueError(f"input must have shape (..., {features}) as linear_weight has, got {tuple(input.shape)}")
    if linear_bias is not None and linear_bias.shape != (classes,):
        raise ValueError(f"linear_bias must have shape ({classes},), got {tuple(linear_bias.shape)}")
    shape = input.shape[:-1]
    if target.shape != shape and not (target.is_floating_point() and target.shape == (*shape, classes)):
        probabilities = f", or {(*shape, classes)} for probabilities" if shard is None else ""
        raise ValueError(f"target must have shape {tuple(shape)}{probabilities}, got {tuple(target.shape)}")


def _dtype_of_logits(tensors: dict[str, Tensor]) -> torch.dtype:
    """That of ``input``, or autocast's; raises where dtypes or devices differ."""
    input, device = tensors["input"], tensors["input"].device
    if input.dtype not in FLOATING:
        raise RuntimeError(f"input must be float64, float32, float16 or bfloat16, got {input.dtype}")
    has_autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    autocast = has_autocast and input.dtype != torch.float64
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise RuntimeError(f"{name} must be on the device of input ({device}), got {tensor.device}")
        if name == "target":
            continue
        allowed = (torch.float32, torch.float16, torch.bfloat16) if autocast else (input.dtype,)
        if tensor.dtype not in allowed:
            raise RuntimeError(
                f"{name} must be floating point, of the dtype of input unless autocast is enabled: got {tensor.dtype} "
                f"beside {input.dtype}"
            )
    return torch.get_autocast_dtype(device.type) if autocast else input.dtype


class LinearLoss(Criterion):
    """The last linear layer of a model together with its loss, for many classes.

    Module form of :func:`fused_losses.functional.linear_loss`, which explains the computation. The layer is
    ``self.linear``, the loss ``self.loss``; ``logits(input)`` is for prediction. Under ``fully_shard`` the weight is
    gathered once, for all chunks. Hooks of the layer are not run, but for those of torch that make its weight (pruning,
    spectral and weight norm).

    Args:
        in_features: D, the width of ``input``.
        num_classes: C.
        loss: as for :func:`linear_loss`.
        bias: whether the layer has a bias.
        reduction, chunk_bytes, accumulate_dtype, skip_rows: as for :func:`linear_loss`.
        device, dtype: of the layer.
        **options: those of the Module of ``loss`` (parameters, ``weight``, ``ignore_index``, ``logit_bias``), where
            ``loss`` is a name or a function.

    Returns:
        Called with ``(input, target, sample_weight=None)``: the loss of features ``(..., D)``.

    Raises:
        TypeError: ``loss`` is none of these, an option is unknown, or a size is no integer.
        ValueError: an argument is out of range, or options are given beside a Module.

    Example:
        >>> criterion = LinearLoss(8, 1000, "agce", ignore_index=-1)
        >>> features, labels = torch.randn(4, 8), torch.tensor([7, 0, 999, -1])
        >>> criterion(features, labels).backward()
        >>> criterion.logits(features).argmax(-1).shape
        torch.Size([4])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: Loss = "gce",
        bias: bool = True,
        *,
        reduction: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        accumulate_dtype: torch.dtype = torch.float32,
        skip_rows: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        chunk_bytes = _check_options(chunk_bytes, accumulate_dtype, skip_rows)
        switch.pack("bias", bias)
        in_features = int(not_negative_integer.pack("in_features", in_features))
        num_classes = int(positive_integer.pack("num_classes", num_classes))
        if isinstance(loss, nn.Module):
            check_module(loss)
            _check_no_options({}, options)
            self.loss = loss
        else:
            if reduction is not None:
                options["reduction"] = reduction
            self.loss = find_loss(loss).module(**options)
        if reduction is not None:
            of_rows = _row_loss_of(self.loss)
            check_reduction(
                reduction, *([LOSSES[of_rows.stem].reductions] if isinstance(of_rows, RowLossModule) else [])
            )
        self.linear = nn.Linear(in_features, num_classes, bool(bias), device=device, dtype=dtype)
        self.reduction = reduction
        self.chunk_bytes = chunk_bytes
        self.accumulate_dtype = accumulate_dtype
        self.skip_rows = skip_rows

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of features ``(..., D)`` for ``target``."""
        make_weight(self.linear, input)
        return linear_loss(
            input,
            self.linear.weight,
            target,
            self.loss,
            linear_bias=self.linear.bias,
            reduction=self.reduction,
            sample_weight=sample_weight,
            chunk_bytes=self.chunk_bytes,
            accumulate_dtype=self.accumulate_dtype,
            skip_rows=self.skip_rows,
        )

    def logits(self, input: Tensor) -> Tensor:
        """All logits, ``(..., C)``. A sharded weight is gathered, for which all ranks have to call it."""
        make_weight(self.linear, input)
        given: Any = (self.linear.weight, self.linear.bias)
        weight, bias = (each.full_tensor() if is_distributed(each) else each for each in given)
        return F.linear(input, weight, bias)

    def _shown(self) -> dict[str, Any]:
        return self._unusual(reduction=None, chunk_bytes=CHUNK_BYTES, accumulate_dtype=torch.float32, skip_rows=None)
