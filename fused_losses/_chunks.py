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
from fused_losses._arguments import RowLossArguments, acc_dtype
from fused_losses._shards import Shard

# Losses with rows whose value and gradient are exactly 0: every margin is satisfied.
_SATISFIABLE = ("hem", "multi_margin")
# Rows without gradient are left out of the GEMMs where at most this share of the rows remains: copying those is then
# cheaper than GEMMs of all, and the copies fit in chunk_bytes.
_WORTH_SKIPPING = 0.5

Sweep = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # values, gradients of their sum in input, weight, bias (empty: not wanted)


class ChunkOptions(NamedTuple):
    """How a sweep works, in the order of the operator's schema."""

    dtype: torch.dtype  # of the logits
    accumulate_dtype: torch.dtype  # of the sums that become the gradients of weight and bias
    chunk_bytes: int  # for a chunk's logits and their gradient
    skip_rows: bool | None  # leave rows without gradient out; None: on the CPU only, CUDA would wait for their number
    shard: Shard | None = None  # linear_weight has the classes of this rank only; no argument of the operator


def stand_in(input: Tensor, linear_weight: Tensor, options: ChunkOptions) -> Tensor:
    """A tensor with the shape, dtype and device of the logits and memory for one number."""
    classes = linear_weight.shape[0] if options.shard is None else options.shard.num_classes
    return input.new_zeros((), dtype=options.dtype).expand(input.shape[0], classes)


@torch.no_grad()
def sweep(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    args: RowLossArguments,
    options: ChunkOptions,
    wanted: Sequence[bool],
) -> Sweep:
    """Every row's loss, and the wanted gradients of their sum in ``input`` (N, D), weight and bias.

    ``args.logits`` is a :func:`stand_in`.
    """
    with torch.autocast(input.device.type, enabled=False):
        return _sweep(input, linear_weight, linear_bias, args._replace(reduction="none"), options, wanted)


def _sweep(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    args: RowLossArguments,
    options: ChunkOptions,
    wanted: Sequence[bool],
) -> Sweep:
    rows, matrix = input.to(options.dtype), linear_weight.to(options.dtype)
    bias = None if linear_bias is None else linear_bias.to(options.dtype)
    skips = input.is_cpu if options.skip_rows is None else options.skip_rows
    kept = _worth_keeping(args.target != args.ignore_index) if skips and not args.target.is_floating_point() else None
    count = rows.shape[0] if kept is None else kept.numel()
    size = rows_per_chunk(count, matrix, options)
    buffer = rows.new_empty((min(size, count), matrix.shape[0]))
    values = rows.new_zeros(rows.shape[0], dtype=acc_dtype(rows))
    grad_input = torch.zeros_like(rows) if wanted[0] else rows.new_empty(0)
    sum_dtype = torch.promote_types(options.accumulate_dtype, linear_weight.dtype)
    grad_weight = matrix.new_zeros(matrix.shape if wanted[1] else (0,), dtype=sum_dtype)
    grad_bias = matrix.new_zeros(matrix.shape[0] if wanted[2] else (0,), dtype=sum_dtype)

    for first in range(0, max(count, 1), size):  # without rows once, for the operators' checks
        where: slice | Tensor = slice(first, min(first + size, count))
        where = where if kept is None else kept[where]
        part = rows[where]
        samples = None if args.sample_weight is None else args.sample_weight[where]
        chunk = args._replace(
            logits=_logits(part, matrix, bias, buffer[: part.shape[0]]),
            target=args.target[where],
            sample_weight=samples,
        )
        if options.shard is not None:
            values[where], grad_logits = _shards.values_and_gradient(chunk, options.shard, any(wanted))
        elif any(wanted):
            values[where], grad_logits = values_and_gradient(chunk)
        else:
            values[where] = _ops.row_loss(*chunk)
        if not any(wanted):
            continue
        if skips and args.loss in _SATISFIABLE:
            active = _worth_keeping(values[where] != 0)
            if active is not None:
                where = active + first if isinstance(where, slice) else where[active]
                part, grad_logits = part[active], grad_logits[active]
        if wanted[0] and isinstance(where, slice):
            torch.mm(grad_logits, matrix, out=grad_input[where])
        elif wanted[0]:
            grad_input[where] = grad_logits @ matrix
        if wanted[1]:
            _add_product(grad_weight, grad_logits, part, options.chunk_bytes)
        if wanted[2]:
            grad_bias += grad_logits.sum(0, dtype=sum_dtype)
    return values, grad_input.to(input.dtype), grad_weight, grad_bias


def rows_per_chunk(rows: int, matrix: Tensor, options: ChunkOptions) -> int:
    """How many rows a chunk has: as many as fit with their gradient, in chunks of about equal size; at least one.

    Ranks with a share of the classes agree about it.
    """
    if options.shard is None:
        bytes_per_row = 2 * matrix.shape[0] * matrix.element_size()
    else:  # made of torch's operators, which allocate intermediate results
        bytes_per_row = 5 * options.shard.largest * max(4, matrix.element_size())
    most = max(1, options.chunk_bytes // max(1, bytes_per_row))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def _worth_keeping(mask: Tensor) -> Tensor | None:
    """The numbers of the rows in ``mask``; None where leaving out the others would not pay. It synchronises."""
    found = mask.nonzero().squeeze(1)
    return found if found.numel() <= _WORTH_SKIPPING * mask.numel() else None


def _logits(rows: Tensor, matrix: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(rows, matrix.t(), out=buffer)
    return torch.addmm(bias, rows, matrix.t(), out=buffer)


def values_and_gradient(args: RowLossArguments) -> tuple[Tensor, Tensor]:
    """Every row's loss and the gradient of their sum: one read of the logits, one write."""
    if args.logits.is_cpu:
        return _ops.row_loss_with_grad(*args)
    values, _, _, grad_logits = _ops.row_loss_with_stats_and_grad(*args)
    return values, grad_logits


def _add_product(total: Tensor, grad_logits: Tensor, rows: Tensor, chunk_bytes: int) -> None:
    """``total += grad_logits.T @ rows``, with products and sums in the dtype of ``total``."""
    if total.dtype == grad_logits.dtype:
        total.addmm_(grad_logits.t(), rows)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, grad_logits.t(), rows, out_dtype=torch.float32, out=total)
    else:  # torch has no GEMM of half precision that sums in float32 here: converts some classes at a time
        rows = rows.to(total.dtype)
        bytes_per_class = max(1, grad_logits.shape[0] * total.element_size())
        step = max(1, chunk_bytes // 8 // bytes_per_class)
        for first in range(0, total.shape[0], step):
            classes = slice(first, first + step)
            total[classes].addmm_(grad_logits[:, classes].t().to(total.dtype), rows)


_SCHEMA = (
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? sample_weight, "
    "Tensor? logit_bias_tensor, Tensor? margin, str loss, float[] params, float logit_bias, int ignore_index, "
    "ScalarType dtype, ScalarType accumulate_dtype, SymInt chunk_bytes, bool? skip_rows, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _unflatten(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *flat: object
) -> tuple[Tensor, Tensor, Tensor | None, RowLossArguments, ChunkOptions, Sequence[bool]]:
    """The operator's arguments as :func:`sweep` takes them."""
    *of_loss, dtype, accumulate_dtype, chunk_bytes, skip_rows, wanted = flat
    options = ChunkOptions(dtype, accumulate_dtype, chunk_bytes, skip_rows)  # type: ignore[arg-type]
    args = RowLossArguments(stand_in(input, linear_weight, options), *of_loss, "none")  # type: ignore[arg-type, call-arg]
    return input, linear_weight, linear_bias, args, options, wanted  # type: ignore[return-value]


@torch.library.custom_op("fused_losses::linear_rows", mutates_args=(), schema=_SCHEMA)
def _operator(*flat: object) -> Sweep:
    return sweep(*_unflatten(*flat))  # type: ignore[arg-type]


@_operator.register_fake
def _fake(*flat: object) -> Sweep:
    input, linear_weight, _, args, options, wanted = _unflatten(*flat)  # type: ignore[arg-type]
    sum_dtype = torch.promote_types(options.accumulate_dtype, linear_weight.dtype)
    return (
        input.new_empty(input.shape[0], dtype=acc_dtype(args.logits)),
        input.new_empty(input.shape if wanted[0] else (0,)),
        linear_weight.new_empty(linear_weight.shape if wanted[1] else (0,), dtype=sum_dtype),
        linear_weight.new_empty(linear_weight.shape[0] if wanted[2] else (0,), dtype=sum_dtype),
    )


def traced_sweep(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    args: RowLossArguments,
    options: ChunkOptions,
    wanted: Sequence[bool],
) -> Sweep:
    """:func:`sweep` as one operator, which traces do not look into."""
    if options.shard is not None:
        raise RuntimeError("linear_loss over sharded classes cannot be traced by torch.compile yet: leave it out")
    of_loss = args[1:-1]  # without the logits, which are made of what is given, and the reduction
    return _operator(input, linear_weight, linear_bias, *of_loss, *options[:-1], list(wanted))  # type: ignore[no-any-return]
