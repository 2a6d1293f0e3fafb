"""Who computes a loss: ours, plain PyTorch in several spellings, and other libraries' kernels.

A provider makes the function of ``(logits, target)`` that computes a case's loss with reduction "mean", or says None if
it does not offer that loss. Before anything is timed, :func:`check` compares value and gradient with float64.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import UPSTREAM, Case, LossFunction
from benchmarks.snippets import SNIPPETS

Make = Callable[[Case], "LossFunction | None"]

# Norm of the difference over the norm of the exact result. Norms, because in float32 a few classes may fall on the
# other side of a threshold (HEM), in any implementation. In half precision others may round intermediate results, but
# not ours.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
OUR_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
LOSS_SCALE = 4096


@dataclass(frozen=True)
class Provider:
    """``copies`` is how many logits-sized tensors an opaque kernel moves per mode, as its authors describe it."""

    name: str
    make: Make
    overwrites_logits: bool = False
    copies: dict[str, float] | None = None


def fused(case: Case) -> LossFunction:
    """Ours."""
    return functools.partial(case.spec.fused, **case.spec.options)


def _reference(case: Case) -> LossFunction:
    return functools.partial(case.spec.reference, **case.spec.options)


def _snippet(case: Case) -> LossFunction | None:
    return SNIPPETS.get(case.loss) if case.dtype in ("float32", "float64") else None


def _torch(case: Case) -> LossFunction | None:
    if case.loss == "cross_entropy":
        return F.cross_entropy
    if case.loss == "smoothed_cross_entropy" and case.dtype != "float16":  # float16: its sum overflows
        return functools.partial(F.cross_entropy, **case.spec.options)
    if case.loss == "multi_margin" and len(case.shape) == 2 and case.dtype in ("float32", "float64"):
        return F.multi_margin_loss
    return None


def _autocast(case: Case) -> LossFunction | None:
    """PyTorch's loss (the shortest spelling of it) on half precision logits, as mixed precision training calls it."""
    function = _torch(case)
    if case.dtype == "bfloat16" and case.loss != "hem":  # HEM has no operator that autocast would run in float32
        function = function or SNIPPETS.get(case.loss)
    if function is None or case.dtype not in ("float16", "bfloat16"):
        return None

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(case.device, dtype=case.torch_dtype):
            return function(logits, target)

    return loss


def _compiled(case: Case) -> LossFunction:
    # The rotation of inputs would make CUDA graphs copy them first; without graphs the opponent is the stronger one.
    mode = "max-autotune-no-cudagraphs" if case.device == "cuda" else None
    torch._dynamo.reset()  # otherwise the ninth shape of a function falls back to eager mode
    compiled: LossFunction = torch.compile(_reference(case), mode=mode, fullgraph=True, dynamic=False)
    return compiled


def _liger(case: Case) -> LossFunction | None:
    if not _kernel_library("liger_kernel", case):
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy

    options = case.spec.options

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        result: Tensor = liger_cross_entropy(logits, target, **options)
        return result

    return loss


def _quack(case: Case) -> LossFunction | None:
    if case.loss != "cross_entropy" or not _kernel_library("quack", case):
        return None
    from quack.cross_entropy import cross_entropy

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        result: Tensor = cross_entropy(logits, target)
        return result if result.dim() == 0 else result.mean()

    return loss


def _kernel_library(module: str, case: Case) -> bool:
    offered = case.loss in ("cross_entropy", "smoothed_cross_entropy") and len(case.shape) == 2
    return offered and case.device == "cuda" and importlib.util.find_spec(module) is not None


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("fused", fused),
        Provider("reference", _reference),
        Provider("snippet", _snippet),
        Provider("torch", _torch),
        Provider("autocast", _autocast),
        Provider("compile", _compiled, copies={}),
        # Its forward reads twice and writes the gradient over the logits; backward multiplies unless upstream is 1.
        Provider("liger", _liger, True, {"fwd": 1, "fwd_train": 3, "fwd_bwd": 3, "fwd_bwd_scaled": 5}),
        Provider("quack", _quack, False, {"fwd": 1, "fwd_train": 1, "fwd_bwd": 3, "fwd_bwd_scaled": 3}),
    )
}
# Ways to write a loss without a kernel of its own. Ratios to "plain PyTorch" are to the fastest of them.
PLAIN = ("reference", "snippet", "torch")


class WrongResult(Exception):
    """A provider computes something other than the loss: its time would mean nothing."""


def first_rows(case: Case, logits: Tensor, target: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """As many of the first rows as have at most ``limit`` logits, at least one."""
    rows = max(1, limit * case.shape[0] // logits.numel())
    return logits[:rows].detach().clone(), target[:rows]


def value_and_gradient(
    case: Case, function: LossFunction, logits: Tensor, target: Tensor, upstream: float = UPSTREAM
) -> tuple[Tensor, Tensor]:
    """Value, and gradient for an ``upstream`` gradient.

    That of float16 cases is multiplied by a loss scale, without which small gradients would vanish.
    """
    leaf = logits.detach().clone().requires_grad_()
    value = function(leaf, target)
    scale = LOSS_SCALE if case.dtype == "float16" else 1
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream * scale))
    return value.detach(), grad


def exact(case: Case, logits: Tensor, target: Tensor, upstream: float = UPSTREAM) -> tuple[Tensor, Tensor]:
    """Value and gradient of the reference in float64."""
    target = target.double() if target.is_floating_point() else target
    return value_and_gradient(case, _reference(case), logits.double(), target, upstream)


def check(
    name: str, case: Case, function: LossFunction, logits: Tensor, target: Tensor, want: tuple[Tensor, Tensor]
) -> None:
    """Raises :class:`WrongResult` unless ``function`` gives the exact value and gradient within rounding."""
    value, grad = value_and_gradient(case, function, logits, target)
    tolerance = (OUR_TOLERANCE if name == "fused" else TOLERANCE)[case.dtype]
    for what, got, wanted in (("loss", value, want[0]), ("gradient", grad, want[1])):
        error = relative_error(got, wanted)
        if not error <= tolerance:
            raise WrongResult(f"{name} computes another {what} of {case.id}: off by {error:.1e} of its norm")


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``."""
    if got.shape != want.shape:
        return float("inf")
    return float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-12))
