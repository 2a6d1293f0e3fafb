"""Autograd of row losses whose logits come in chunks: only the first derivative, in input, weight and bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fused_losses import _ops
from fused_losses._arguments import RowLossArguments, ZErrorRule, is_ignored
from fused_losses._autograd import is_batched, is_last_backward, is_recorded, mark_constant
from fused_losses._checks import check_constants, check_row_loss
from fused_losses._chunks import ChunkOptions, Layer, Sweep, stand_in, sweep, traced_sweep
from fused_losses._plain import in_forward_mode, is_plain
from fused_losses._reference import ACTIVE_GUARD, mean_of
from fused_losses._shards import agree_about_call, check_classes
from fused_losses._z_autograd import masked_first
from fused_losses._z_error import ZOps
from fused_losses._z_reference import ClassScore, class_score
from fused_losses.distributed import sum_of_weights

_ONCE = (
    "linear_loss has a first derivative only: its logits no longer exist when the second is asked for. Without "
    "create_graph=True it works; for second derivatives call the loss on torch.nn.functional.linear(input, "
    "linear_weight, linear_bias)"
)

_NOTHING = [False] * 3  # no gradient wanted


class ChunkedLogits:
    """Logits ``input @ linear_weight.T + linear_bias`` that are computed in chunks whenever a loss reads them.

    Losses are described by arguments whose logits are ``self.stand_in``.
    """

    def __init__(self, layer: Layer, options: ChunkOptions) -> None:
        self.layer = layer
        self.options = options
        self.stand_in = stand_in(layer, options).detach()

    def row_loss(self, args: RowLossArguments) -> Tensor:
        """The loss of these logits."""
        if args.reduction == "none":
            return self.values(args)
        total, values = self.total(args)
        if args.reduction == "sum":
            return total
        guard = ACTIVE_GUARD if args.reduction == "active_mean" else 0.0
        return mean_of(total, sum_of_weights(args, values).to(total.dtype), guard)

    def values(self, args: RowLossArguments) -> Tensor:
        """One loss per row; backward computes the logits again."""
        self._check(args)
        return self._values(args)

    def total(self, args: RowLossArguments) -> tuple[Tensor, Tensor]:
        """The sum of all rows' losses, and as a constant every row's; forward makes the gradients.

        Not in float16: before the sum of the weights divides them and mixed precision multiplies them by the loss
        scale, gradients may be out of its range. Backward then makes them, as for single rows.
        """
        self._check(args)
        is_narrow = torch.float16 in (self.options.dtype, self.layer.input.dtype)
        if self._differentiates() and not is_narrow:
            return _SumOfRows.apply(*self.layer, args, self.options)  # type: ignore[no-any-return, no-untyped-call]
        values = self._values(args)
        return _sum(values), values.detach()

    def _values(self, args: RowLossArguments) -> Tensor:
        if self._differentiates():
            return _ValuesOfRows.apply(*self.layer, args, self.options)  # type: ignore[no-any-return, no-untyped-call]
        return run(self.layer, args, self.options, _NOTHING).values

    def z_ops(self) -> ZOps:
        """What a Z-Error function is made of, for these logits."""

        def class_moments(score: Tensor, target: Tensor, classes: int, statistic: str, ignore_index: int) -> Tensor:
            score = self._target_logits(target) if score.dim() > 1 else score
            return _ops.class_moments(score, target, classes, statistic, ignore_index)

        def score_of(statistic: str, args: RowLossArguments) -> tuple[Tensor, str]:
            if statistic == "logit":
                return self._target_logits(args.target), "class"
            return class_score(self.row_loss, statistic, args)

        def z_error_row_loss(
            args: RowLossArguments, rule: ZErrorRule, judged: ClassScore | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            if judged is None or judged[0].dim() > 1:  # logits are a stand-in here, without numbers
                judged = score_of(rule.statistic, args)
            return masked_first(args, rule, judged, self.row_loss)

        def z_error_loss(*args: Any) -> Any:
            raise NotImplementedError("the binary and the regression form of Z-Error have no class logits")

        return ZOps(self.row_loss, class_moments, z_error_row_loss, z_error_loss)

    def _differentiates(self) -> bool:
        return any(t is not None and is_recorded(t) for t in self.layer)

    def _check(self, args: RowLossArguments) -> None:
        if torch._C._are_functorch_transforms_active() or in_forward_mode(*self.layer, *args.tensors[1:]):
            raise NotImplementedError(
                "linear_loss has no form for the transforms of torch.func, nor a forward-mode derivative: use backward "
                "or torch.autograd.grad, or call the loss on torch.nn.functional.linear(input, linear_weight, "
                "linear_bias)"
            )
        check_row_loss(args)
        if torch.is_grad_enabled():
            check_constants(args, "linear_loss is differentiable in input, linear_weight and linear_bias only")
        shard = self.options.shard
        if shard is not None:
            if args.target.is_floating_point():
                raise RuntimeError(f"{args.loss}: target must hold class indices where classes are sharded")
            check_classes(args, shard.num_classes)
            how = f"chunk_bytes={self.options.chunk_bytes}, skip_rows={self.options.skip_rows}"
            agree_about_call(args, shard, how)

    def _target_logits(self, target: Tensor) -> Tensor:
        """Every row's logit of its target, by a gather instead of a GEMM. Rows without a class get some number."""
        input, linear_weight = self.layer.input.detach(), self.layer.weight.detach()
        linear_bias = None if self.layer.bias is None else self.layer.bias.detach()
        dtype, classes = self.options.dtype, linear_weight.shape[0]
        if target.dim() != 1 or target.is_floating_point():
            raise RuntimeError(
                "Z-Error: target must hold class indices, one per row, got "
                f"{target.dtype} of shape {tuple(target.shape)}"
            )
        index = target.long().clamp(0, classes - 1)
        size = max(1, self.options.chunk_bytes // (8 * max(1, input.shape[1])))
        found = []
        for rows, numbers in zip(input.split(size), index.split(size), strict=True):  # type: ignore[no-untyped-call]
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            products = rows.to(dtype).to(acc) * linear_weight[numbers].to(dtype).to(acc)
            logits = products.sum(1)
            if linear_bias is not None:
                logits += linear_bias[numbers].to(dtype)
            found.append(logits.to(dtype))
        return torch.cat(found)


def run(layer: Layer, args: RowLossArguments, options: ChunkOptions, wanted: list[bool]) -> Sweep:
    """A sweep; one operator where somebody traces, or calls it for many."""
    has_numbers = is_plain(layer.input) and is_plain(layer.weight) and not layer.input.is_meta
    if has_numbers and args.sample_weight is not None:
        has_numbers = not is_batched(args.sample_weight)  # by upstream gradients
    function = sweep if has_numbers else traced_sweep
    return function(layer, args, options, wanted)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64).to(values.dtype)


def _wanted(ctx: Any) -> list[bool]:
    return list(ctx.needs_input_grad[:3])


def _results(ctx: Any, gradients: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """What a backward returns: the wanted gradients, in the dtypes of their tensors, and nothing for the options."""
    made = zip(_wanted(ctx), gradients, ctx.dtypes, strict=True)
    return *(gradient.to(dtype) if wanted else None for wanted, gradient, dtype in made), None, None


class _SumOfRows(torch.autograd.Function):
    """The sum, whose gradients are made in forward, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        layer, (args, options) = Layer(*given[:3]), given[3:]
        values, *gradients = run(layer, args, options, _wanted(ctx))
        by_class = not args.target.is_floating_point()
        ctx.save_for_backward(*gradients, args.target if by_class else None)
        ctx.ignore_index = args.ignore_index
        ctx.dtypes = layer.dtypes
        mark_constant(ctx, values)
        return _sum(values), values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        check_once()
        upstream = grad_outputs[0]
        if upstream is None:
            return (None,) * 5
        *gradients, target = ctx.saved_tensors
        factors = [upstream] * len(gradients)
        if target is not None and ctx.needs_input_grad[0]:  # infinity times the zeros of ignored rows is NaN
            factors[0] = torch.where(is_ignored(target, ctx.ignore_index), 0.0, upstream).unsqueeze(1)
        scaled = zip(gradients, factors, strict=True)
        if not is_last_backward(upstream):
            return _results(ctx, (made * by for made, by in scaled))
        # `.data`: autograd need not notice the change, as this saved tensor is given away and nobody reads it again.
        return _results(ctx, (made.data.mul_(by) for made, by in scaled))


class _ValuesOfRows(torch.autograd.Function):
    """One loss per row. Backward is the sweep of a sum in which every row's weight is its upstream gradient."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        layer, (args, options) = Layer(*given[:3]), given[3:]
        ctx.save_for_backward(*layer, *args[1:6])
        ctx.constants = args.constants, options
        ctx.dtypes = layer.dtypes
        return run(layer, args, options, _NOTHING).values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        check_once()
        saved = ctx.saved_tensors  # once: a checkpoint refuses a second look, other hooks would do their work again
        layer, of_loss = Layer(*saved[:3]), saved[3:]
        constants, options = ctx.constants
        args = RowLossArguments(stand_in(layer, options).detach(), *of_loss, *constants)
        upstream = grad_outputs[0]
        weight = upstream if args.sample_weight is None else upstream * args.sample_weight
        if options.dtype != torch.float16:
            return _results(ctx, run(layer, args._replace(sample_weight=weight), options, _wanted(ctx))[1:])
        scale = _small_scale(weight, args.weight)
        made = run(layer, args._replace(sample_weight=weight / scale), options, _wanted(ctx))[1:]
        return _results(ctx, (gradient.mul_(scale) for gradient in made))


def _small_scale(of_rows: Tensor, of_classes: Tensor | None) -> Tensor:
    """What the weights of rows are at most where that is below 1, else 1: gradients of so little would vanish in
    float16."""
    largest = torch.cat([of_rows.abs(), of_rows.new_zeros(1)]).amax()  # of no rows 0
    if of_classes is not None:
        largest = largest * of_classes.abs().amax()
    return torch.where(largest > 0, largest, 1.0).clamp(max=1.0)


def check_once() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(_ONCE)
