"""Batches of samples whose every random choice follows from (seed, epoch, sample) alone.

So neither the number of workers and processes nor an interruption changes what a sample looks like or when it comes:
a resumed run continues exactly, and N processes see together what one would.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

PADDING = 4  # pixels around an image before it is cropped to its size


class Batch(NamedTuple):
    """``inputs`` (rows, ...), labels to train on ``target`` (rows,), and ``numbers`` of the samples (rows,)."""

    inputs: Tensor
    target: Tensor
    numbers: Tensor


class Request(NamedTuple):
    """What a loader asks for: samples by number, in the state they have in an epoch."""

    epoch: int
    numbers: Tensor


def random_bits(seed: int, epoch: int, numbers: Tensor, count: int) -> npt.NDArray[np.uint64]:
    """``count`` random 64-bit words for each sample: (samples, count)."""
    keys = (numbers.numpy().astype(np.uint64)[:, None] * np.uint64(count)) + np.arange(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return _mix(keys ^ _mix(np.uint64(epoch) ^ _mix(np.uint64(seed))))


def _mix(x: Any) -> Any:
    """SplitMix64: a bijection of 64-bit words that looks random (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class EpochBatches(Sampler[Request]):
    """The batches of this process, in an order that depends on seed and epoch.

    A batch of ``batch_size`` rows is shared out over ``world_size`` processes. Training (``shuffle``) leaves out the
    samples that fill no batch, other ones in every epoch; validation covers each sample once, in order.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise SystemExit(f"--batch-size must be a multiple of the {world_size} processes, got {batch_size}")
        if shuffle and num_samples < batch_size:
            raise SystemExit(f"--batch-size must be at most the {num_samples} training samples, got {batch_size}")
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.done = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def resume(self, epoch: int, done: int) -> None:
        """Leaves out the first ``done`` batches of ``epoch``, which were trained before an interruption."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        """All batches of an epoch, those done before an interruption included."""
        if self.shuffle:
            return self.num_samples // self.batch_size
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Request]:
        order = torch.arange(self.num_samples)
        if self.shuffle:
            order = order[np.argsort(random_bits(self.seed, self.epoch, order, 1)[:, 0], kind="stable")]
        share = self.batch_size // self.world_size
        for batch in range(self.done, len(self)):
            first = batch * self.batch_size + self.rank * share
            yield Request(self.epoch, order[first : first + share])
        self.done = 0


class TensorSamples(Dataset[Batch]):
    """Samples in memory: ``inputs`` (N, features) or images (N, C, H, W), float or uint8.

    ``augment``: images are padded, cropped to their size and flipped at random.
    """

    def __init__(self, inputs: Tensor, target: Tensor, *, augment: bool = False, seed: int = 0) -> None:
        self.inputs, self.target, self.augment, self.seed = inputs, target, augment, seed

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, request: Request) -> Batch:
        epoch, numbers = request
        inputs = self.inputs[numbers]
        if self.augment:
            inputs = crop_and_flip(inputs, random_bits(self.seed, epoch, numbers, 3))
        return Batch(inputs, self.target[numbers], numbers)


def crop_and_flip(images: Tensor, bits: npt.NDArray[np.uint64]) -> Tensor:
    """Each image (rows, C, H, W) shifted by up to PADDING pixels and flipped or not, by three words of ``bits``."""
    rows, _, height, width = images.shape
    down, right, flip = torch.from_numpy((bits % np.array([9, 9, 2], dtype=np.uint64)).astype(np.int64)).unbind(1)
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    y = torch.arange(height) + down[:, None]
    x = torch.arange(width) + right[:, None]
    x = torch.where(flip[:, None] == 1, x.flip(1), x)
    number = torch.arange(rows)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).contiguous()


class FileSamples(Dataset[Batch]):
    """Images in files, decoded by Pillow; ``transform`` makes tensors (3, ``size``, ``size``) of bytes of them.

    Transforms draw from torch's global generator, which is seeded for each sample.
    """

    def __init__(
        self, files: Sequence[Path], target: Tensor, transform: Callable[[Any], Tensor], size: int, *, seed: int = 0
    ) -> None:
        # A list of millions of paths would be copied into every worker as its reference counts change.
        self.names = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        self.target, self.transform, self.size, self.seed = target, transform, size, seed

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, request: Request) -> Batch:
        epoch, numbers = request
        words = random_bits(self.seed, epoch, numbers, 1)[:, 0]
        # A process may have no row of the last validation batch.
        images = torch.empty(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        for image, number, word in zip(images, numbers.tolist(), words, strict=True):
            image.copy_(self._image(number, int(word >> np.uint64(1))))
        return Batch(images, self.target[numbers], numbers)

    def _image(self, number: int, seed: int) -> Tensor:
        from PIL import Image

        path = os.fsdecode(self.names[number])
        try:
            with Image.open(path) as file:
                image = _eight_bits(file).convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
            raise RuntimeError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image)


def _eight_bits(image: Any) -> Any:
    """Grey values of 16 bits scaled to 8, which ``convert`` would cut off at 255."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"grey values must have 8 or 16 bits, got {values.min()} to {values.max()} ({image.mode})")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


class SyntheticSamples(Dataset[Batch]):
    """Labels without images, at WebVision's size: the network's inputs are made on its device.

    ``inputs`` of a batch is an empty tensor (rows, 0) of the images' shape otherwise.
    """

    image_shape = (3, 224, 224)

    def __init__(self, num_samples: int, num_classes: int) -> None:
        numbers = torch.arange(operator.index(num_samples))
        self.target = torch.from_numpy((random_bits(0, 0, numbers, 1)[:, 0] % np.uint64(num_classes)).astype(np.int64))

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, request: Request) -> Batch:
        numbers = request.numbers
        return Batch(torch.empty(len(numbers), 0), self.target[numbers], numbers)
