"""Network, loss and data as a LightningModule."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.training.criterion import Schedule, make_loss
from benchmarks.training.networks import make_network
from benchmarks.training.options import Options
from benchmarks.training.report import SampleReport
from benchmarks.training.samples import Batch, EpochBatches, SyntheticSamples, random_bits
from benchmarks.training.sources import Data, Samples
from fused_losses.diagnostics import OutlierTracker
from fused_losses.elr import ELRLoss
from fused_losses.z_cross_entropy import ZErrorCrossEntropyLoss

EARLY = 1 / 3  # the share of the epochs in which wrong labels are told apart best


class Classifier(lightning.LightningModule):
    """Trains ``options.model`` on ``data`` with the loss of the options; ``true`` are the labels without noise."""

    def __init__(self, options: Options, data: Data, true: Tensor | None) -> None:
        super().__init__()
        self.options, self.data, self.true = options, data, true
        self.network = make_network(options.model, data.input_shape, data.num_classes, options.seed)
        if options.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.compile:
            self.network.compile()
        shape = (1, -1, 1, 1)  # of images (rows, channels, height, width)
        self.register_buffer("mean", torch.tensor(data.mean or (0.0,)).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(data.std or (1.0,)).view(shape), persistent=False)
        self.loss: nn.Module | None = None
        self.first_loss: nn.Module | None = None  # of the first epochs
        self.schedules: list[Schedule] = []
        self.history: list[dict[str, float]] = []
        self.tracker = OutlierTracker(len(data.train))
        self._batches_done = 0  # before an interruption
        self._train_loss = torch.zeros(2, dtype=torch.float64)
        self._hits = torch.zeros(3, dtype=torch.float64)
        self._epoch_began = 0.0
        self._seconds_before = 0.0  # of this epoch, before an interruption
        self._images: Tensor | None = None

    @property
    def steps_of_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        batches = len(self.data.train) // self.options.batch_size
        return -(-batches // self.options.accumulate)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps = self.steps_of_epoch * self.options.epochs
        return steps if self.options.max_steps < 0 else min(steps, self.options.max_steps)

    @property
    def early_epochs(self) -> int:
        """Epochs in which the probability of each label is recorded."""
        return max(1, round(self.options.epochs * EARLY))

    def setup(self, stage: str) -> None:
        """Makes the loss, which must know the processes, once."""
        if self.loss is None:
            target = self.data.train.target
            self.loss, self.schedules = make_loss(self.options, target, self.data.num_classes, self.steps)
            first = Options(loss="cross_entropy", plain=self.options.plain)
            self.first_loss, _ = make_loss(first, target, self.data.num_classes, self.steps)

    def configure_model(self) -> None:
        """With FSDP2: shards every block of the network, then the rest, over the processes."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        blocks = getattr(self.network, "blocks", self.network)
        for block in blocks.children():
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    # Data

    def _loader(self, samples: Samples, *, train: bool) -> Any:
        trainer = self.trainer
        batches = EpochBatches(
            len(samples),
            self.options.batch_size,
            shuffle=train,
            seed=self.options.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        if train:
            batches.resume(*divmod(self._batches_done, len(batches)))
        workers = self.options.workers
        return DataLoader(
            samples,
            sampler=batches,
            batch_size=None,  # a sampler's element is a whole batch
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> Any:
        """Batches of this process; after an interruption those that are left of its epoch."""
        return self._loader(self.data.train, train=True)

    def val_dataloader(self) -> Any:
        """Each validation sample once, over all processes."""
        return self._loader(self.data.validation, train=False)

    def logits(self, inputs: Tensor) -> Tensor:
        """The network's logits of inputs as a data set gives them."""
        if inputs.dtype == torch.uint8:
            inputs = inputs.float() / 255.0
        inputs = (inputs - self.mean) / self.std  # type: ignore[operator]
        if self.options.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(inputs)
        return logits

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Gives synthetic samples their images: the same ones in every batch, made once on the device."""
        batch = Batch(*batch)
        if not isinstance(self.data.train, SyntheticSamples):
            return batch
        rows = len(batch.target)
        if self._images is None or len(self._images) < rows:
            self._images = torch.randn(rows, *self.data.input_shape, device=self.device)
        return batch._replace(inputs=self._images[:rows])

    # Training

    def on_train_start(self) -> None:
        """Starts the first epoch's clock, or goes on with that of an interrupted one."""
        self._epoch_began = time.perf_counter() - self._seconds_before
        self._stop_after_max_steps()

    def on_train_batch_end(self, *_: Any) -> None:
        """Ends the training after --max-steps; Lightning then validates, as after an epoch."""
        self._stop_after_max_steps()

    def _stop_after_max_steps(self) -> None:
        # Not Lightning's max_steps, with which a resumed run leaves out an epoch.
        if self.trainer.global_step == self.options.max_steps:
            self.trainer.should_stop = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        # Dropout and the like follow from (seed, batch, process) alone, so that an interruption changes nothing.
        number = torch.tensor([self.trainer.fit_loop.total_batch_idx * self.trainer.world_size + self.global_rank])
        seed = int(random_bits(self.options.seed, 1 << 32, number, 1)[0, 0] >> np.uint64(1))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps stack traces of every call without a GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        logits = self.logits(batch.inputs)
        loss = self.first_loss if self.current_epoch < self.options.cross_entropy_epochs else self.loss
        assert loss is not None
        kept: Tensor | None = None
        if isinstance(loss, ZErrorCrossEntropyLoss):
            value, kept, _ = loss(logits, batch.target, return_mask=True)
        elif isinstance(loss, ELRLoss):
            value = loss(logits, batch.target, batch.numbers)
        else:
            value = loss(logits, batch.target)
        with torch.no_grad():
            if self._train_loss.device != value.device:
                self._train_loss = self._train_loss.to(value.device)
            self._train_loss += torch.stack([value.detach().double(), torch.ones_like(value, dtype=torch.float64)])
            self._observe(batch, logits, kept)
        if self.options.l1 > 0.0:
            value = value + self.options.l1 * sum(p.abs().sum() for p in self.network.parameters())
        return value

    def _observe(self, batch: Batch, logits: Tensor, kept: Tensor | None) -> None:
        early = self.current_epoch < self.early_epochs
        if isinstance(self.data.train, SyntheticSamples) or not (early or kept is not None):
            return
        prob = logits.float().softmax(1).gather(1, batch.target[:, None]).squeeze(1) if early else None
        self.tracker.update(batch.numbers, kept, prob=prob)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, then those of the schedules: before a checkpoint could be saved."""
        super().optimizer_step(*args, **kwargs)
        for schedule in self.schedules:
            schedule.step()

    def configure_optimizers(self) -> Any:
        """The optimizer, with warm-up and decay of its learning rate."""
        options = self.options
        lr = options.lr
        if options.lr_batch is not None:
            lr *= options.batch_size * options.accumulate / options.lr_batch
        parameters = [p for p in self.parameters() if p.requires_grad]
        given: dict[str, Any] = {"lr": lr, "weight_decay": options.weight_decay}
        # One kernel a step. Not for float16: Lightning scales and clips the gradients itself, and torch's fused step
        # would do so again.
        given["fused"] = options.amp != "fp16" and options.strategy != "fsdp"
        optimizer: torch.optim.Optimizer
        if options.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, momentum=options.momentum, **given)
        else:
            kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
            optimizer = kind(parameters, **given)
        warmup = options.warmup * self.steps_of_epoch

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if options.lr_schedule == "constant":
                return 1.0
            return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, self.steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Validation

    def on_validation_epoch_start(self) -> None:
        """Forgets the hits of the last epoch."""
        self._hits = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts rows, and labels among the one and the five highest logits."""
        logits = self.logits(batch.inputs)
        highest = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.target[:, None]
        rows = torch.tensor(float(len(batch.target)), device=logits.device)
        self._hits += torch.stack([rows, highest[:, 0].sum(), highest.sum()]).double()

    def on_validation_epoch_end(self) -> None:
        """Logs accuracy over all processes."""
        if self.trainer.sanity_checking:
            return
        counts = torch.stack([*self._hits, *self._train_loss.to(self.device)])
        rows, first, five, loss, batches = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        seconds = time.perf_counter() - self._epoch_began
        metrics = {
            "train_loss": loss / max(1.0, batches),
            "top1": first / rows,
            "top5": five / rows,
            "samples_per_s": batches / self.trainer.world_size * self.options.batch_size / seconds,
        }
        self._train_loss.zero_()
        self._epoch_began = time.perf_counter()
        self.history.append({"epoch": self.current_epoch, **metrics})
        self.log_dict(metrics, prog_bar=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning does not know of. Sums are those of all processes: a collective call."""
        train_loss = self._train_loss.to(self.device, copy=True)
        checkpoint["training"] = {
            "settings": self.options.settings(),
            "world_size": self.trainer.world_size,
            "history": self.history,
            "train_loss": self.trainer.strategy.reduce(train_loss, reduce_op="sum").cpu(),
            "seconds": time.perf_counter() - self._epoch_began,
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "tracker": self._whole_tracker().state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it, and where in its epoch the training was."""
        state = checkpoint["training"]
        self.history, self._seconds_before = list(state["history"]), state["seconds"]
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        if self.trainer.is_global_zero:  # sums are saved over processes; the others continue from zeros
            self._train_loss = state["train_loss"].to(self.device)
            self.tracker.load_state_dict(state["tracker"])
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        self._batches_done = progress["total"]["processed"]

    def _whole_tracker(self) -> OutlierTracker:
        return self.tracker.all_reduce() if self.trainer.world_size > 1 else self.tracker

    def report(self) -> SampleReport:
        """What is known of the training samples; a collective call."""
        return SampleReport(self._whole_tracker(), self.data.train.target, self.true, self.data.names)
