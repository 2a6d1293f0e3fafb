"""Where the numbers of a run go: JSON lines and printed lines; CSV and TensorBoard are Lightning's."""

from __future__ import annotations

import json
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
    """One JSON object a line, appended; a resumed run may repeat steps that were lost, later lines count."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

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
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def make_loggers(options: Options) -> list[Logger]:
    """The loggers of ``--log``; none without ``--out``."""
    if options.out is None:
        return []
    loggers: list[Logger] = []
    for name in options.log.split(","):
        if name == "json":
            loggers.append(JsonLines(options.out / "metrics.jsonl"))
        elif name == "csv":
            loggers.append(CSVLogger(options.out, name="csv", version=""))
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
