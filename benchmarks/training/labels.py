"""The labels to train on: as published, with noise, or from a file."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.training.label_files import read_labels, split_key
from benchmarks.training.options import NOISES, Options
from benchmarks.training.samples import TensorSamples
from benchmarks.training.sources import Data
from fused_losses import noise


def apply_noise(data: Data, options: Options) -> Tensor | None:
    """Replaces the training labels as ``--noise`` says; returns the true labels (N,), None where nobody knows them."""
    data.train.target = _noisy(data, options)
    return data.published if data.labels_are_true else None


def _noisy(data: Data, options: Options) -> Tensor:
    target, rate, classes = data.published, options.noise_rate, data.num_classes
    # Not the seed itself, from which weights and the order of batches are drawn.
    seed = torch.Generator().manual_seed(1_000_003 * (options.seed + 1))
    if options.noise == "none":
        return target
    if options.noise in ("symmetric", "symmetric-excluding"):
        return noise.symmetric(target, rate, classes, redraw=options.noise == "symmetric", seed=seed).labels
    if options.noise == "asymmetric":
        if data.pairs is None:
            raise SystemExit(f"--noise asymmetric has no pairs of classes for {options.dataset}")
        return noise.asymmetric(target, rate, classes, data.pairs, seed=seed).labels
    if options.noise == "instance":
        if not isinstance(data.train, TensorSamples):
            raise SystemExit("--noise instance needs images in memory")
        inputs = data.train.inputs
        scaled = inputs.float() / 255.0 if inputs.dtype == torch.uint8 else inputs
        return noise.instance_dependent(scaled, target, rate, classes, seed=seed).labels
    path, key = split_key(options.noise)
    if not path.suffix and not path.is_file():
        raise SystemExit(f"--noise must be one of {', '.join(NOISES)} or a file, got {options.noise!r}")
    labels = read_labels(path, key)
    if labels.shape != target.shape:
        raise SystemExit(f"--noise {path} must hold {len(target)} labels, got {len(labels)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise SystemExit(
            f"--noise {path} must hold labels in [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    return labels
