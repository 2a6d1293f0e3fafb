"""The options of a training run: one field each, from the command line or from an experiment."""

# ruff: noqa: RUF009  option() is dataclasses.field
from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.networks import check_name

DATASETS = (
    *("webvision", "imagefolder", "fashion-mnist", "cifar10", "cifar100", "digits", "digit-strings", "synthetic"),
)
NOISES = ("none", "symmetric", "symmetric-excluding", "asymmetric", "instance")


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field with its line in ``--help``."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Options:
    """Everything that decides the result of a run, and where it goes."""

    dataset: str = option("digits", "what to train on", DATASETS)
    data: Path | None = option(None, "folder of the data set; not needed for digits, digit-strings, synthetic")
    classes: int | None = option(
        None, "webvision: only the first N classes (50 is its mini subset); synthetic: how many"
    )
    samples: int | None = option(
        None, "training samples of digit-strings and synthetic; the first N of others in memory"
    )
    webvision_parts: str = option("google,flickr", "webvision: lists to train on; the mini subset is google's")
    image_size: int = option(224, "pixels of a side, for photographs")
    augment: str = option("none", "images in memory: pad, crop and flip at random", ("none", "crop-flip"))

    noise: str = option(
        "none",
        f"wrong training labels: {', '.join(NOISES)}, or a file of labels (.pt, .npy or text), FILE:KEY for CIFAR-N",
    )
    noise_rate: float = option(
        0.4,
        "probability that a label is replaced; of instance the mean, so that 0 makes wrong labels, too",
    )

    model: str = option("mlp", "resnet32, resnet34, resnet50, wide_resnet101_2, small_cnn, mlp, mlp:WIDTH or timm:NAME")
    loss: str = option("cross_entropy", "name of a loss, as in `python -m fused_losses info`, or elr")
    loss_args: tuple[str, ...] = option((), "its parameters, as q=.7; margin=auto and margin=plus for HEM and HEM+")
    wrap: str = option(
        "none", "around the loss: logit_norm=T, logit_clip=TAU, super_loss=LAM, small_loss=KEEP, clipped_loss=C"
    )
    cross_entropy_epochs: int = option(0, "epochs with cross entropy first, for losses that cannot begin by themselves")
    logit_bias: str = option("0", "number added to the label's logit in training, or auto")
    bias_schedule: str = option("none", "bring the bias to 0 by the end", ("none", "linear", "cosine"))
    plain: bool = option(False, "the loss in plain PyTorch instead of the fused one")
    z_threshold: float | None = option(None, "drop rows this many standard deviations from their class (Z-Error)")
    z_statistic: str = option("prob", "what Z-Error tests", ("logit", "prob", "loss"))
    z_sided: str = option("lower", "which side Z-Error drops", ("lower", "two"))
    z_running: bool = option(True, "Z-Error statistics over batches")
    z_anneal: float = option(1 / 3, "share of the epochs in which the threshold comes down from 10")

    batch_size: int = option(256, "rows of a forward pass, of all processes together")
    accumulate: int = option(1, "batches of a step")
    epochs: int = option(12, "passes over the training data")
    max_steps: int = option(-1, "end after so many steps, with a validation; -1: after the epochs")
    optimizer: str = option("adam", "", ("sgd", "adam", "adamw"))
    lr: float = option(1e-3, "learning rate after the warm-up")
    lr_batch: int | None = option(None, "rows of a step that --lr is for: scaled linearly to the actual ones")
    lr_schedule: str = option("constant", "after the warm-up", ("constant", "cosine"))
    warmup: float = option(0.0, "epochs in which the learning rate rises linearly")
    momentum: float = option(0.9, "of sgd")
    weight_decay: float = option(0.0, "of the optimizer")
    l1: float = option(0.0, "factor of the sum of all parameters' absolute values, added to the loss")
    clip: float | None = option(None, "largest norm of the gradient")
    ema: float | None = option(None, "validate and keep a moving average of the weights, with this decay")

    device: str = option("auto", "where to train", ("auto", "cpu", "cuda"))
    strategy: str = option("auto", "how processes share the network", ("auto", "ddp", "fsdp"))
    sync_batchnorm: bool = option(False, "batch normalisation over all processes, of GPUs")
    amp: str = option("none", "arithmetic of forward and backward", ("none", "bf16", "fp16"))
    channels_last: bool = option(False, "memory layout of the images")
    compile: bool = option(False, "torch.compile the network")
    workers: int = option(0, "processes that prepare batches")
    seed: int = option(0, "of everything random")

    out: Path | None = option(None, "folder for checkpoints, logs and the report; none: only what is printed")
    log: str = option("json,csv", "of json, csv, tensorboard")
    checkpoint_steps: int | None = option(None, "save every N steps, beside the end of each epoch")
    resume: bool = option(False, "go on from --out's last checkpoint, if there is one")
    quiet: bool = option(False, "no progress bar")

    def folder(self) -> Path:
        """The data's folder.

        Raises:
            SystemExit: none was given.
        """
        if self.data is None:
            raise SystemExit(f"--dataset {self.dataset} needs --data, its folder")
        return self.data

    def settings(self) -> dict[str, Any]:
        """What decides the result, without what only says where it goes or how it is watched."""
        free = {"out", "log", "checkpoint_steps", "resume", "quiet", "workers", "device"}
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options on a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Trains a classifier with a loss of fused_losses; under torchrun on many processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = typing.get_type_hints(Options)
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if types[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif types[field.name] == tuple[str, ...]:
            parser.add_argument(flag, nargs="*", default=field.default, metavar="NAME=VALUE", help=text)
        else:
            kind = next(t for t in (*typing.get_args(types[field.name]), types[field.name]) if t is not type(None))
            choices = field.metadata["choices"]
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(
                flag, type=kind, default=field.default, choices=choices, metavar=metavar, help=text or " "
            )
    found = vars(parser.parse_args(arguments))
    found["loss_args"] = tuple(found["loss_args"])
    return checked(Options(**found))


AT_LEAST = {
    **dict.fromkeys(("batch_size", "accumulate", "epochs", "image_size", "samples", "classes", "lr_batch"), 1),
    **dict.fromkeys(("cross_entropy_epochs", "workers"), 0),
    **{"checkpoint_steps": 1, "max_steps": -1},
}
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("noise_rate", "z_anneal"), ("be between 0 and 1", lambda x: 0.0 <= x <= 1.0)),
    **dict.fromkeys(("seed",), ("satisfy 0 <= value < 2**32", lambda x: 0 <= x < 2**32)),
    **dict.fromkeys(("ema",), ("satisfy 0 < value < 1", lambda x: 0.0 < x < 1.0)),
    **dict.fromkeys(("momentum",), ("satisfy 0 <= value < 1", lambda x: 0.0 <= x < 1.0)),
    **dict.fromkeys(("z_threshold", "clip"), ("satisfy 0 < value < inf", lambda x: 0.0 < x < math.inf)),
    **dict.fromkeys(
        ("lr", "weight_decay", "warmup", "l1"), ("satisfy 0 <= value < inf", lambda x: 0.0 <= x < math.inf)
    ),
}


def checked(options: Options) -> Options:
    """``options`` themselves.

    Raises:
        SystemExit: a number is out of range, a device is not there.
    """
    for name, least in AT_LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name, (rule, holds) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise SystemExit(f"--{name.replace('_', '-')} must {rule}, got {value}")
    if options.strategy == "fsdp" and (options.ema is not None or options.l1 > 0.0):
        raise SystemExit("--strategy fsdp excludes --ema and --l1, which need whole weights on every process")
    check_name(options.model)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device must be there, got cuda, of which torch {torch.__version__} sees none")
    unknown = set(options.log.split(",")) - {"json", "csv", "tensorboard"}
    if unknown:
        raise SystemExit(f"--log must be of json, csv, tensorboard, got {', '.join(sorted(unknown))}")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--out must be a folder that can be made, got {options.out} ({error.strerror})") from None
    return options
