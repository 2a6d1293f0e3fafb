"""Row losses of logits ``input @ linear_weight.T + linear_bias`` that never exist as a whole.

One sweep goes over the rows in chunks: a GEMM into a buffer that all chunks share, the row kernel, and two GEMMs that
add the chunk's part to the gradients. No kernel here is a GEMM of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses import _ops, _shards
from fused_losses._agreement import Exchange, telling
from fused_losses._arguments import RowLossArguments, acc_dtype, is_ignored
from fused_losses._shards import Shard

# Losses that are exactly 0, with gradient 0, for rows that satisfy every margin.
_SATISFIABLE = ("hem", "multi_margin")
# Rows without gradient are left out of the GEMMs if at most this share of the rows remains. Copying the remaining rows
# is then cheaper than GEMMs of all rows, and the copies fit in chunk_bytes.
_WORTH_SKIPPING = 0.5

# The share of the logits in the memory that a call may take; the rest is for copies and conversions.
_SHARE_OF_LOGITS = 0.75


class Layer(NamedTuple):
    """A linear layer and its input."""

    input: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)

    def to(self, dtype: torch.dtype) -> Layer:
        """All in one dtype."""
        return Layer(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]

    @property
    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """The dtype of each."""
        return tuple(None if t is None else t.dtype for t in self)


class Sweep(NamedTuple):
    """Every row's loss, and the gradients of their sum (empty: not wanted)."""

    values: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


class ChunkOptions(NamedTuple):
    """How a sweep works, in the order of the operator's schema."""

    dtype: torch.dtype  # of the logits
    accumulate_dtype: torch.dtype  # of the sums that become the gradients of weight and bias
    chunk_bytes: int  # for a chunk's logits and their gradient
    skip_rows: bool | None  # leave out rows without gradient; None: on the CPU only, CUDA would wait for their number
    shard: Shard | None = None  # if linear_weight has this rank's classes only; no argument of the operator


def stand_in(layer: Layer, options: ChunkOptions) -> Tensor:
    """A tensor with the shape, dtype and device of the logits and memory for one number."""
    classes = layer.weight.shape[0] if options.shard is None else options.shard.num_classes
    return layer.input.new_zeros((), dtype=options.dtype).expand(layer.input.shape[0], classes)


@torch.no_grad()
def sweep(layer: Layer, args: RowLossArguments, options: ChunkOptions, wanted: Sequence[bool]) -> Sweep:
    """Every row's loss, and the wanted gradients of their sum in input, weight and bias.

    ``args.logits`` is a :func:`stand_in`.
    """
    with torch.autocast(layer.input.device.type, enabled=False):
        skips = layer.input.is_cpu if options.skip_rows is None else options.skip_rows
        skips_satisfied = skips and args.loss in _SATISFIABLE
        counts = skips and not args.target.is_floating_point()
        kept = _worth_keeping(~is_ignored(args.target, args.ignore_index)) if counts else None
        count = layer.input.shape[0] if kept is None else kept.numel()
        size = _rows_per_chunk(count, layer, options, skips_satisfied)
        firsts = range(0, max(count, 1), size)  # one even without rows, for the operators' checks
        shard = options.shard
        exchanges = [] if shard is None else [_shards.exchange_of_chunk(args, shard, min(size, count))] * len(firsts)
        with telling(exchanges):
            made, dtype = _nothing_yet(layer, args, options, wanted), layer.input.dtype
            layer, args = layer.to(options.dtype), args._replace(reduction="none")
            buffer = layer.input.new_empty((min(size, count), layer.weight.shape[0]))
            for first in firsts:
                rows = slice(first, min(first + size, count))
                where = rows if kept is None else kept[rows]
                part = layer.input[where]
                logits = _logits(part, layer, buffer)
                values, grad_logits = _evaluate(args, where, logits, options, any(wanted), exchanges)
                made.values[where] = values
                active = _worth_keeping(values != 0) if skips_satisfied and any(wanted) else None
                if active is not None:
                    where = active + first if isinstance(where, slice) else where[active]
                    part, grad_logits = part[active], grad_logits[active]
                _add_gradients(made, where, part, grad_logits, layer, options, wanted)
            return made._replace(grad_input=made.grad_input.to(dtype))


def _nothing_yet(layer: Layer, args: RowLossArguments, options: ChunkOptions, wanted: Sequence[bool]) -> Sweep:
    """Zeros to add to. The gradient in the input is no sum, as each row is written once: it has the logits' dtype."""
    input, weight, _ = layer
    sum_dtype = torch.promote_types(options.accumulate_dtype, weight.dtype)
    return Sweep(
        input.new_zeros(input.shape[0], dtype=acc_dtype(args.logits)),
        input.new_zeros(input.shape if wanted[0] else (0,), dtype=options.dtype),
        weight.new_zeros(weight.shape if wanted[1] else (0,), dtype=sum_dtype),
        weight.new_zeros(weight.shape[0] if wanted[2] else (0,), dtype=sum_dtype),
    )


def _rows_per_chunk(rows: int, layer: Layer, options: ChunkOptions, copies: bool) -> int:
    """How many rows a chunk has: as many as fit, in chunks of about equal size; at least one.

    Ranks with a share of the classes agree about it.
    """
    element = options.dtype.itemsize
    if options.shard is not None:  # made of torch's operators, which allocate intermediate results
        bytes_per_row = 5.0 * options.shard.largest * max(4, element)
    else:
        tensors = (1.0 if layer.weight.is_cpu else 2.0) + (_WORTH_SKIPPING if copies else 0.0)
        bytes_per_row = tensors * layer.weight.shape[0] * element
    most = max(1, int(_SHARE_OF_LOGITS * options.chunk_bytes / max(1.0, bytes_per_row)))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _worth_keeping(mask: Tensor) -> Tensor | None:
    """The numbers of the rows in ``mask``; None where leaving out the others would not pay. It synchronises."""
    found = mask.nonzero().squeeze(1)
    return found if found.numel() <= _WORTH_SKIPPING * mask.numel() else None


def _logits(rows: Tensor, layer: Layer, buffer: Tensor) -> Tensor:
    logits, matrix = buffer[: rows.shape[0]], layer.weight.t()
    if layer.bias is None:
        return torch.mm(rows, matrix, out=logits)
    return torch.addmm(layer.bias, rows, matrix, out=logits)


def _evaluate(
    args: RowLossArguments,
    where: slice | Tensor,
    logits: Tensor,
    options: ChunkOptions,
    with_gradient: bool,
    exchanges: list[Exchange],
) -> tuple[Tensor, Tensor]:
    """The losses of some rows and the gradient of their sum, which may take the place of their logits."""
    samples = None if args.sample_weight is None else args.sample_weight[where]
    args = args._replace(logits=logits, target=args.target[where], sample_weight=samples)
    if options.shard is not None:
        values, grad_logits = _shards.values_and_gradient(args, options.shard, with_gradient, exchanges[0])
        return values, grad_logits.to(logits.dtype)
    if not with_gradient:
        return _ops.row_loss(*args), logits
    if logits.is_cpu:
        return _ops.row_loss_with_grad_(logits, *args), logits
    return _ops.row_loss_with_grad(*args)


def _add_gradients(
    made: Sweep,
    where: slice | Tensor,
    rows: Tensor,
    grad_logits: Tensor,
    layer: Layer,
    options: ChunkOptions,
    wanted: Sequence[bool],
) -> None:
    if wanted[0] and isinstance(where, slice):
        torch.mm(grad_logits, layer.weight, out=made.grad_input[where])
    elif wanted[0]:
        made.grad_input[where] = grad_logits @ layer.weight
    if wanted[1]:
        _add_product(made.grad_weight, grad_logits, rows, options.chunk_bytes)
    if wanted[2]:
        made.grad_bias.add_(grad_logits.sum(0, dtype=made.grad_bias.dtype))


def _add_product(total: Tensor, grad_logits: Tensor, rows: Tensor, chunk_bytes: int) -> None:
    """``total += grad_logits.T @ rows``, with products and sums in the dtype of ``total``."""
    if total.dtype == grad_logits.dtype:
        total.addmm_(grad_logits.t(), rows)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, grad_logits.t(), rows, out_dtype=torch.float32, out=total)
    else:  # torch has no half precision GEMM that sums in float32 here, so some classes at a time are converted
        rows = rows.to(total.dtype)
        bytes_per_class = max(1, grad_logits.shape[0] * total.element_size())
        step = max(1, chunk_bytes // 8 // bytes_per_class)
        for first in range(0, total.shape[0], step):
            classes = slice(first, first + step)
            total[classes].addmm_(grad_logits[:, classes].t().to(total.dtype), rows)


_SCHEMA = (
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? sample_weight, "
    "Tensor? logit_bias_tensor, Tensor? first_param, str loss, float[] params, float logit_bias, int ignore_index, "
    "ScalarType dtype, ScalarType accumulate_dtype, SymInt chunk_bytes, bool? skip_rows, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _unflatten(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *flat: object
) -> tuple[Layer, RowLossArguments, ChunkOptions, Sequence[bool]]:
    """The operator's arguments as :func:`sweep` takes them."""
    *of_loss, dtype, accumulate_dtype, chunk_bytes, skip_rows, wanted = flat
    layer = Layer(input, linear_weight, linear_bias)
    options = ChunkOptions(dtype, accumulate_dtype, chunk_bytes, skip_rows)  # type: ignore[arg-type]
    args = RowLossArguments(stand_in(layer, options), *of_loss, "none")  # type: ignore[arg-type, call-arg]
    return layer, args, options, wanted  # type: ignore[return-value]


@torch.library.custom_op("fused_losses::linear_rows", mutates_args=(), schema=_SCHEMA)
def _operator(*flat: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sweep(*_unflatten(*flat))  # type: ignore[arg-type]


@_operator.register_fake
def _fake(*flat: object) -> Sweep:
    layer, args, options, wanted = _unflatten(*flat)  # type: ignore[arg-type]
    made = _nothing_yet(layer, args, options, wanted)
    return made._replace(grad_input=made.grad_input.to(layer.input.dtype))


def traced_sweep(layer: Layer, args: RowLossArguments, options: ChunkOptions, wanted: Sequence[bool]) -> Sweep:
    """:func:`sweep` as one operator, which traces do not look into."""
    if options.shard is not None:
        raise RuntimeError("linear_loss over sharded classes cannot be traced by torch.compile yet: leave it out")
    of_loss = args[1:-1]  # all but the logits, which are computed from the layer, and the reduction
    return Sweep(*_operator(*layer, *of_loss, *options[:-1], list(wanted)))
