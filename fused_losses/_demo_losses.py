"""The losses that the demo can be asked for: every row loss of the registry, and Z-Error cross entropy."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fused_losses as fl
from fused_losses._demo_data import NUM_CLASSES
from fused_losses.calibration import solve_logit_bias
from fused_losses.schedules import ThresholdSchedule

ALIASES = {
    "ce": "cross_entropy",
    "z_error_cross_entropy": "z_ce",
    "zerrorcrossentropyloss": "z_ce",
}
# Settings of Z-Error cross entropy, by name in --losses. "z_ce" looks at the probability of the label, drops only rows
# where that is low, and remembers earlier batches, because the 13 rows that a class has in a batch say little.
# Its threshold leaves room for 1 / (1 + 1^2) = 50 % wrong labels; "z_ce_default" (2, two-sided, logits of the batch)
# for 20 %.
Z_SETTINGS: dict[str, dict[str, Any]] = {
    "z_ce": {"threshold": 1.0, "statistic": "prob", "sided": "lower", "running": True},
    "z_ce_default": {"threshold": 2.0},
}
Z_LABELS = {"z_ce": "Z-CE", "z_ce_default": "Z-CE default"}
START_THRESHOLD = 10.0  # drops nothing: at first the network knows nothing about any row
ANNEAL_EPOCHS = 10


@dataclass(frozen=True)
class LossChoice:
    """A loss as asked for: name in the output, stem in the registry or in `Z_SETTINGS`, whether the bias is on."""

    label: str
    stem: str
    auto_bias: bool = False

    @property
    def masks(self) -> bool:
        """Whether the loss drops rows and can say which."""
        return self.stem in Z_SETTINGS

    @property
    def settings(self) -> dict[str, Any]:
        """Parameters that differ from the loss's defaults."""
        return Z_SETTINGS.get(self.stem, {})

    @property
    def fused(self) -> Callable[..., Tensor]:
        """The loss as a function."""
        return fl.functional.z_error_cross_entropy if self.masks else fl.LOSSES[self.stem].function

    @property
    def plain(self) -> Callable[..., Tensor]:
        """The loss as a function in plain PyTorch."""
        return fl.reference.z_error_cross_entropy if self.masks else fl.LOSSES[self.stem].reference

    @property
    def function_options(self) -> dict[str, Any]:
        """Options of the functions; they take the number that the module works out from "auto".

        Running statistics belong to the Module: the functions judge rows by their batch.
        """
        bias = {"logit_bias": max(0.0, solve_logit_bias(NUM_CLASSES))} if self.auto_bias else {}
        return {**bias, **{name: value for name, value in self.settings.items() if name != "running"}}

    def module(self) -> nn.Module:
        """A new module with the default parameters, or those of `Z_SETTINGS`."""
        options: dict[str, Any] = {"logit_bias": "auto"} if self.auto_bias else {}
        if self.masks:
            return fl.ZErrorCrossEntropyLoss(**options, **self.settings)
        return fl.LOSSES[self.stem].module(**options)


def anneal_threshold(loss: nn.Module, epochs: int) -> ThresholdSchedule | None:
    """A schedule that tightens a Z-Error loss's threshold in the first epochs; None for other losses."""
    if not isinstance(loss, fl.ZErrorCrossEntropyLoss):
        return None
    end = loss.threshold
    if not isinstance(end, float):
        raise TypeError(f"the loss must have a number as threshold, got {type(end).__name__}")
    return ThresholdSchedule(loss, start=START_THRESHOLD, end=end, steps=min(ANNEAL_EPOCHS, max(1, epochs // 3)))


def parse_losses(text: str) -> list[LossChoice]:
    """The losses named in ``text``, separated by commas, without repeats."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one loss")
    return list(dict.fromkeys(map(_parse_loss, names)))


def _parse_loss(name: str) -> LossChoice:
    plain = name.removesuffix("*")
    key = plain.lower().replace("-", "_").removesuffix("_loss")
    modules = {entry.module.__name__.lower(): stem for stem, entry in fl.LOSSES.items()}
    stem = ALIASES.get(key, modules.get(key, key))
    if stem not in fl.LOSSES and stem not in Z_SETTINGS:
        known = ", ".join(["ce", *Z_SETTINGS, *fl.LOSSES])
        raise argparse.ArgumentTypeError(f"unknown loss {plain!r}; known: {known}")
    auto_bias = name.endswith("*")
    choice = LossChoice(_label(stem) + "*" * auto_bias, stem, auto_bias)
    if auto_bias and "logit_bias" not in inspect.signature(choice.fused).parameters:
        raise argparse.ArgumentTypeError(f"{plain!r} has no logit_bias, so {name!r} means nothing")
    return choice


def _label(stem: str) -> str:
    if stem == "cross_entropy":
        return "CE"
    return Z_LABELS.get(stem) or fl.LOSSES[stem].module.__name__.removesuffix("Loss")
