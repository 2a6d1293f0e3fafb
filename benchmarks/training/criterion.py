"""The loss that the options ask for, with its schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fused_losses as fl
from benchmarks.cases import formula
from benchmarks.training.options import Options
from fused_losses.calibration import solve_logit_bias
from fused_losses.schedules import LogitBiasSchedule, ThresholdSchedule

ALIASES = {"ce": "cross_entropy"}
ELR = {"beta": 0.7, "lam": 3.0}  # its parameters; it is no function of a row alone and in no registry
WRAPPERS: dict[str, Any] = {
    "logit_norm": fl.LogitNorm,
    "logit_clip": fl.LogitClip,
    "super_loss": fl.SuperLoss,
    "small_loss": fl.SmallLoss,
    "clipped_loss": fl.ClippedLoss,
}
START_THRESHOLD = 10.0  # drops nothing: at first the network knows nothing about any row

Schedule = LogitBiasSchedule | ThresholdSchedule


class PlainLoss(nn.Module):
    """The reference formula of a row loss, with that loss's options."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss: Any = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of ``logits`` for ``target``."""
        options = self.loss.call_options()
        return formula(self.loss.stem)(logits, target, reduction=self.loss.reduction, **options)


def make_loss(options: Options, target: Tensor, num_classes: int, steps: int) -> tuple[nn.Module, list[Schedule]]:
    """The loss for labels ``target`` and what moves its numbers during ``steps`` steps."""
    if options.loss == "elr":
        return _elr(options, len(target), num_classes), []
    loss = _row_loss(options, target, num_classes)
    wrapped = _wrapped(options, loss)
    schedules: list[Schedule] = []
    if options.bias_schedule != "none":
        start = _bias(options, num_classes)
        schedules.append(LogitBiasSchedule(loss, start=start, end=0.0, steps=max(1, steps), mode=options.bias_schedule))
    if options.z_threshold is not None:
        if options.plain:
            raise SystemExit("--plain and --z-threshold exclude each other")
        if options.bias_schedule != "none":
            raise SystemExit("--bias-schedule and --z-threshold exclude each other")
        z_loss = fl.ZErrorCrossEntropyLoss(
            threshold=options.z_threshold,
            statistic=options.z_statistic,
            sided=options.z_sided,
            running=options.z_running,
            base=loss,
            num_classes=num_classes,
            process_group=dist.group.WORLD if world_size() > 1 else None,
        )
        if options.z_anneal > 0.0:
            annealing = max(1, round(steps * options.z_anneal))
            schedules.append(ThresholdSchedule(z_loss, START_THRESHOLD, options.z_threshold, steps=annealing))
        return z_loss, schedules
    if options.plain:
        return PlainLoss(loss), schedules
    return (fl.GlobalMean(loss) if world_size() > 1 else wrapped), schedules


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _row_loss(options: Options, target: Tensor, num_classes: int) -> Any:
    stem = ALIASES.get(options.loss, options.loss).removesuffix("_loss")
    if stem not in fl.LOSSES:
        raise SystemExit(f"--loss must be elr or one of {', '.join(fl.LOSSES)}, got {options.loss!r}")
    given: dict[str, Any] = _loss_args(options, stem, fl.LOSSES[stem].parameters)
    if fl.LOSSES[stem].tensor_parameter == "margin" and "margin" in given:
        given["margin"] = _margin(given["margin"], target, num_classes)
    bias: float | str = "auto" if options.logit_bias == "auto" else _value(options.logit_bias)
    try:
        return fl.LOSSES[stem].module(logit_bias=bias, **given)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--loss {stem}: {error}") from error


def _loss_args(options: Options, stem: str, known: Mapping[str, Any]) -> dict[str, Any]:
    given = {}
    for argument in options.loss_args:
        name, equals, text = argument.partition("=")
        if not equals or name not in known:
            names = ", ".join(known) or "none"
            raise SystemExit(f"--loss-args must be NAME=VALUE with a parameter of {stem} ({names}), got {argument!r}")
        given[name] = _value(text)
    return given


def _elr(options: Options, samples: int, num_classes: int) -> nn.Module:
    """Early-learning regularisation; the batches of several processes are dealt out anew in every epoch."""
    excluded = {
        "several processes": world_size() > 1,
        "--plain": options.plain,
        "--wrap": options.wrap != "none",
        "--z-threshold": options.z_threshold is not None,
        "--logit-bias": options.logit_bias != "0",
        "--bias-schedule": options.bias_schedule != "none",
    }
    if any(excluded.values()):
        names = ", ".join(name for name, there in excluded.items() if there)
        raise SystemExit(f"--loss elr excludes {names}")
    try:
        return fl.ELRLoss(samples, num_classes, **_loss_args(options, "elr", ELR))
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--loss elr: {error}") from error


def _wrapped(options: Options, loss: Any) -> Any:
    if options.wrap == "none":
        return loss
    if options.plain or options.z_threshold is not None or world_size() > 1:
        raise SystemExit("--wrap excludes --plain, --z-threshold and several processes")
    name, _, text = options.wrap.partition("=")
    try:
        return WRAPPERS[name](loss, float(text))
    except (KeyError, TypeError, ValueError) as error:
        known = ", ".join(WRAPPERS)
        raise SystemExit(f"--wrap must be NAME=NUMBER of {known}, got {options.wrap!r} ({error})") from error


def _margin(value: Any, target: Tensor, num_classes: int) -> Any:
    if value == "auto":
        return fl.hem_margin(len(target))
    if value == "plus":
        return fl.hem_plus_margins(torch.bincount(target, minlength=num_classes).clamp(min=1))
    return value


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        return text


def _bias(options: Options, num_classes: int) -> float:
    return max(0.0, solve_logit_bias(num_classes)) if options.logit_bias == "auto" else float(options.logit_bias)
