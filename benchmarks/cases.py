"""What is measured: losses, shapes, dtypes and the inputs made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl
from fused_losses._reference import row_loss_reference

LossFunction = Callable[[Tensor, Tensor], Tensor]

CLASS_COUNTS = (10, 19, 100, 150, 1000, 1001, 21841, 50257, 128256)


@dataclass(frozen=True)
class Loss:
    """A loss under test; ``kind`` says what its input is: rows of logits, binary logits, or numbers to regress.

    A ``wrapped`` one is another one of rescaled logits, or with row statistics.
    """

    name: str
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    kind: str = "rows"
    options: dict[str, Any] = field(default_factory=dict)
    wrapped: bool = False


def formula(loss: str) -> Callable[..., Tensor]:
    """The plain formula without the checks of ``fl.reference``, which would count in small calls."""

    def plain(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return row_loss_reference(fl.LOSSES[loss].arguments(logits, target, **options))

    return plain


def _of_rescaled(loss: str, factor: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The plain loss of logits that are multiplied by a factor of their norm."""

    def plain(logits: Tensor, target: Tensor) -> Tensor:
        z = logits if logits.dtype == torch.float64 else logits.float()
        return formula(loss)(z * factor(z.norm(dim=1, keepdim=True)), target)

    return plain


def _with_statistics(criterion: fl.GCELoss) -> LossFunction:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        value: Tensor = criterion(logits, target, return_row_stats=True)[0]
        return value

    return loss


def _losses() -> dict[str, Loss]:
    found = {name: Loss(name, entry.function, formula(name)) for name, entry in fl.LOSSES.items()}

    def add(name: str, function: str, kind: str = "rows", **options: Any) -> None:
        of_row = function.removesuffix("_loss")
        plain = formula(of_row) if of_row in fl.LOSSES else getattr(fl.reference, function)
        found[name] = Loss(name, getattr(fl.functional, function), plain, kind, options)

    add("mae_auto", "mae_loss", logit_bias="auto")  # MAE*
    add("smoothed_cross_entropy", "cross_entropy", label_smoothing=0.1)
    add("z_error_cross_entropy", "z_error_cross_entropy")
    add("z_error_bce", "z_error_bce_with_logits", "binary")
    add("z_mse", "z_mse_loss", "regression")
    t, tau = 0.04, 20.0
    wrapped = {
        "logit_norm": (fl.LogitNorm("cross_entropy", t), "cross_entropy", lambda norm: 1.0 / (t * (norm + 1e-7))),
        "logit_norm_gce": (fl.LogitNorm("gce", t), "gce", lambda norm: 1.0 / (t * (norm + 1e-7))),
        "logit_clip": (fl.LogitClip("cross_entropy", tau), "cross_entropy", lambda norm: (tau / norm).clamp(max=1.0)),
    }
    for name, (module, loss, factor) in wrapped.items():
        found[name] = Loss(name, module, _of_rescaled(loss, factor), wrapped=True)
    statistics = _with_statistics(fl.GCELoss())
    found["gce_statistics"] = Loss("gce_statistics", statistics, formula("gce"), wrapped=True)
    return found


LOSSES = _losses()
ROW_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.kind == "rows" and not loss.wrapped)
WRAPPED_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.wrapped)
LOSSES_WITHOUT_CLASSES = tuple(name for name, loss in LOSSES.items() if loss.kind != "rows")

# fwd: without gradient. fwd_train: a forward that a backward will follow. "scaled": the upstream gradient is not 1.
MODES = ("fwd", "fwd_train", "bwd", "bwd_scaled", "fwd_bwd", "fwd_bwd_scaled")
UPSTREAM = 0.375
ROWS_PER_CLASS = 16


@dataclass(frozen=True)
class Case:
    """One loss on one input. ``layout`` is "contiguous" or "channels_last"."""

    loss: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    layout: str = "contiguous"

    @property
    def id(self) -> str:
        """For people and for ``pytest -k``: loss, shape, dtype."""
        last = "-channels_last" if self.layout == "channels_last" else ""
        return f"{self.loss}-{shape_name(self.shape)}-{self.dtype}{last}"

    @property
    def spec(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def num_classes(self) -> int | None:
        return self.shape[1] if self.spec.kind == "rows" else None

    @property
    def by_class(self) -> bool:
        """Whether the loss takes statistics of every class."""
        return self.loss.startswith("z_") and self.spec.kind == "rows"

    @property
    def logits_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def floor_bytes(self, mode: str) -> int:
        """What must move at least: the logits once; with a backward the gradient once, too."""
        return self.logits_bytes * (1 if mode == "fwd" else 2)

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Logits of a realistic spread, normal times 3, and targets; the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(self.shape, generator=generator) * 3).to(self.torch_dtype).to(self.device)
        if self.layout == "channels_last":
            logits = logits.contiguous(memory_format=torch.channels_last)
        if self.spec.kind == "regression":
            target = torch.randn(self.shape, generator=generator) * 3
        elif self.spec.kind == "binary":
            target = torch.randint(0, 2, self.shape, generator=generator).float()
        else:
            shape = (self.shape[0], *self.shape[2:])
            # Few classes: in classes too small for statistics Z-Error drops all rows, and would have nothing to do.
            used = max(1, math.prod(shape) // ROWS_PER_CLASS) if self.by_class else self.shape[1]
            target = torch.randint(0, min(used, self.shape[1]), shape, generator=generator)
        return logits, target.to(self.device)


def shape_name(shape: tuple[int, ...], layout: str = "contiguous") -> str:
    """``4096x1000``, or ``2x150x256x256 channels_last``."""
    return "x".join(map(str, shape)) + (" channels_last" if layout == "channels_last" else "")
