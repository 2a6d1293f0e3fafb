"""Runs a training: Lightning's Trainer with our parts."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from benchmarks.training.checkpoints import LAST, AverageWeights, Checkpoints, WholeFiles
from benchmarks.training.classifier import Classifier
from benchmarks.training.criterion import make_loss
from benchmarks.training.labels import apply_noise
from benchmarks.training.logs import PrintEpochs, make_loggers, to_json
from benchmarks.training.options import Options, checked
from benchmarks.training.samples import SyntheticSamples
from benchmarks.training.sources import Data, adapt, load

PRECISIONS: dict[str, Any] = {"none": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def fit(options: Options, data: Data | None = None, watchers: Sequence[Callback] = ()) -> tuple[Trainer, Classifier]:
    """Trains as ``options`` say.

    ``data`` may be given to save loading it again; labels, seed and augmentation become those of ``options``.
    ``watchers`` are further callbacks of the Trainer.

    Raises:
        SystemExit: an option, a file or a checkpoint does not fit; or SIGTERM arrived, after a checkpoint.
    """
    checked(options)
    make_loss(options, torch.zeros(2, dtype=torch.int64), 10, 1)  # refuses a bad loss before data are looked for
    if data is None:
        data = load(options)
    else:
        adapt(data, options)
    model = Classifier(options, data, apply_noise(data, options))
    checkpoint = _checkpoint(options)
    trainer = make_trainer(options, watchers, resumed=checkpoint is not None)
    try:
        trainer.fit(model, ckpt_path=checkpoint, weights_only=False)
    except SIGTERMException:
        raise SystemExit(128 + 15) from None  # what a shell reports for SIGTERM
    return trainer, model


def run(options: Options, data: Data | None = None) -> dict[str, Any]:
    """:func:`fit`, then the numbers that ``result.json`` holds."""
    began = time.perf_counter()
    trainer, model = fit(options, data)
    report = None if isinstance(model.data.train, SyntheticSamples) else model.report()
    result = {
        "settings": options.settings(),
        "classes": model.data.num_classes,
        "training_samples": len(model.data.train),
        "world_size": trainer.world_size,
        "device": str(trainer.strategy.root_device),
        "seconds": round(time.perf_counter() - began, 1),
        "last": model.history[-1] if model.history else None,
        "best": max(model.history, key=lambda epoch: epoch["top1"], default=None),
        "history": model.history,
        "wrong_labels": {} if report is None else report.summary(),
    }
    if options.out is not None and trainer.is_global_zero:
        (options.out / "result.json").write_text(to_json(result, indent=1) + "\n")
        if report is not None:
            report.save(options.out / "samples.csv")
    return result


def make_trainer(options: Options, watchers: Sequence[Callback] = (), *, resumed: bool = False) -> Trainer:
    """Lightning's Trainer; the environment of torchrun or SLURM says how many processes there are."""
    callbacks = [*watchers, Checkpoints(options.out, options.checkpoint_steps)]
    if options.ema is not None:
        callbacks.append(AverageWeights(decay=options.ema))
    processes = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = {"auto": "gpu" if torch.cuda.is_available() else "cpu"}.get(options.device, options.device)
    if options.sync_batchnorm and processes and accelerator == "cpu":
        raise SystemExit("--sync-batchnorm must be left out on the CPU, where torch has none, got --device cpu")
    if not options.quiet:
        callbacks.append(PrintEpochs())
    else:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"lightning\..*")
    return Trainer(
        accelerator=accelerator,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes else 1,
        num_nodes=_nodes() if processes else 1,
        strategy=_strategy(options, processes),
        precision=PRECISIONS[options.amp],
        sync_batchnorm=options.sync_batchnorm,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip,
        max_epochs=options.epochs,
        callbacks=callbacks,
        plugins=[WholeFiles()],
        logger=make_loggers(options, resumed=resumed) or False,
        log_every_n_steps=50,
        enable_checkpointing=True,
        enable_progress_bar=not options.quiet and sys.stderr.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # ours shares batches out itself
        default_root_dir=options.out,
    )


def _nodes() -> int:
    return max(1, int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _strategy(options: Options, processes: bool) -> Any:
    if options.strategy == "fsdp":
        size = int(os.environ.get("WORLD_SIZE", 1))
        return ModelParallelStrategy(size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return DDPStrategy(gradient_as_bucket_view=True) if processes or options.strategy == "ddp" else "auto"


def _checkpoint(options: Options) -> Path | None:
    """The checkpoint to go on from, if it was left by the same settings."""
    if not options.resume:
        return None
    if options.out is None:
        raise SystemExit("--resume needs --out, the folder of the run to go on with")
    path = options.out / LAST
    if not path.is_file():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["training"]["settings"]
    given = options.settings()
    different = [name for name in given if name not in saved or saved[name] != given[name]]
    if different:
        changes = ", ".join(f"{name}: {saved.get(name)!r} -> {given[name]!r}" for name in different)
        raise SystemExit(f"--resume must have the settings of {path}; changed: {changes}")
    return path
