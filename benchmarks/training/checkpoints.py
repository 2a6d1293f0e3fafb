"""Checkpoints, saved only where a resumed run goes on exactly as the unbroken one would have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

LAST, BEST = "last.ckpt", "best.ckpt"
LOSSES = ("loss.", "first_loss.")  # how names of the losses' buffers begin


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that replace the former one when they are whole, on any file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes beside ``path``, since moving a file from another file system is copying it."""
        part = Path(f"{path}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves last.ckpt after each epoch, every ``steps`` steps and when SIGTERM stops the run; best.ckpt by accuracy.

    SIGTERM stops all processes together: after an optimizer step, or after a batch of a validation, which a resumed run
    does again as a whole. Without ``folder`` nothing is saved.
    """

    def __init__(self, folder: Path | None, steps: int | None) -> None:
        self.folder, self.steps, self.terminated = folder, steps, False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Takes the place of Lightning's handler, which communicates in the midst of whatever a process is doing."""
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = self._terminate

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    def _stops(self, trainer: Trainer) -> bool:
        """Whether SIGTERM has reached any process."""
        return trainer.strategy.reduce_boolean_decision(self.terminated, all=False)

    def _save(self, trainer: Trainer, name: str) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / name)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Saves between two steps, not between the batches of one; the end of an epoch has its own checkpoint."""
        progress = trainer.fit_loop.epoch_loop
        ends = progress.batch_progress.is_last_batch or trainer.global_step == pl_module.steps
        if ends or progress._should_accumulate():
            return
        stops = self._stops(trainer)
        if stops or (self.steps is not None and trainer.global_step % self.steps == 0):
            self._save(trainer, LAST)
        if stops:
            raise SIGTERMException

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stops before a validation is over, unless it is that after --max-steps, which a resumed run has done."""
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        if progress.is_last_batch or trainer.should_stop or not self._stops(trainer):
            return
        # As if its first batch had just begun: Lightning then runs the validation again.
        progress.reset()
        progress.increment_ready()
        progress.increment_started()
        self._save(trainer, LAST)
        raise SIGTERMException

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves after the validation; the best epoch first, as a run that stops between the two does it again."""
        if pl_module.history[-1] is max(pl_module.history, key=lambda epoch: epoch["top1"]):
            self._save(trainer, BEST)
        self._save(trainer, LAST)


class AverageWeights(EMAWeightAveraging):
    """The moving average of the network; the losses are made later, and their buffers are not averaged."""

    swapped = False  # in validation the module has the average, and the average the module's weights

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Validates the average."""
        super().on_validation_epoch_start(trainer, pl_module)
        self.swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Trains on."""
        super().on_validation_epoch_end(trainer, pl_module)
        self.swapped = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Saves the average as the module's state, with the losses, and the weights in training beside it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        module = checkpoint["current_model_state"]
        averaged = {**module, **checkpoint["state_dict"]}
        checkpoint["current_model_state"], checkpoint["state_dict"] = (
            (averaged, module) if self.swapped else (module, averaged)
        )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Loads both."""
        averaged = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(LOSSES)}
        super().on_load_checkpoint(trainer, pl_module, {**checkpoint, "state_dict": averaged})
