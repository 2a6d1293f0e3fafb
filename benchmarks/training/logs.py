"""Where the numbers of a run go: JSON lines and printed lines; CSV and TensorBoard are Lightning's."""

from __future__ import annotations

import csv
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import fused_losses as fl
from benchmarks.training.options import Options


class JsonLines(Logger):
    """One JSON object a line; a resumed run appends, and may repeat steps that were lost: later lines count."""

    def __init__(self, path: Path, *, resumed: bool) -> None:
        super().__init__()
        self.path = path
        if _writes() and not resumed:
            path.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        """Of the logger."""
        return "json"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: result.json has the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step, **metrics}) + "\n")


def _writes() -> bool:
    """Whether this process is the one that writes files."""
    return getattr(rank_zero_only, "rank", 0) == 0


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity: null in place of them."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def _csv(folder: Path, *, resumed: bool) -> CSVLogger:
    """Lightning's logger deletes the file that it finds; a resumed run keeps its rows."""
    path = folder / "csv" / "metrics.csv"
    rows: list[dict[str, str]] = []
    if _writes() and resumed and path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # half a line, of a break
    logger = CSVLogger(folder, name="csv", version="", flush_logs_every_n_steps=1)
    for row in rows:
        known: Any = {name: value for name, value in row.items() if value}
        logger.experiment.log_metrics(known, known.pop("step"))
    logger.save()
    return logger


def make_loggers(options: Options, *, resumed: bool) -> list[Logger]:
    """The loggers of ``--log``; none without ``--out``. Those of a ``resumed`` run go on with their files."""
    if options.out is None:
        return []
    loggers: list[Logger] = []
    for name in options.log.split(","):
        if name == "json":
            loggers.append(JsonLines(options.out / "metrics.jsonl", resumed=resumed))
        elif name == "csv":
            loggers.append(_csv(options.out, resumed=resumed))
        else:
            try:
                loggers.append(TensorBoardLogger(options.out, name="tensorboard", version=""))
            except ModuleNotFoundError:
                raise SystemExit("--log tensorboard needs tensorboard: pip install tensorboard") from None
    return loggers


class PrintEpochs(lightning.Callback):
    """A line for each epoch."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Prints the epoch's numbers."""
        if trainer.is_global_zero and pl_module.history:
            last = pl_module.history[-1]
            print(
                f"epoch {last['epoch'] + 1}: loss {last['train_loss']:.4f}, top-1 {100 * last['top1']:.2f} %, "
                f"top-5 {100 * last['top5']:.2f} %, {last['samples_per_s']:.0f} samples/s",
                flush=True,
            )


class SatisfiedRows(Callback):
    """The share of training rows with a margin loss of 0 after each epoch, of 2,000: they have no gradient."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts them."""
        data, loss = pl_module.data.train, pl_module.loss
        rows = torch.linspace(0, len(data) - 1, min(2_000, len(data))).long()
        pl_module.eval()
        with torch.no_grad():
            logits = pl_module.logits(data.inputs[rows])
            losses = fl.LOSSES[loss.stem].function(logits, data.target[rows], reduction="none", **loss.call_options())
        pl_module.train()
        self.shares.append(float((losses == 0.0).float().mean()))
