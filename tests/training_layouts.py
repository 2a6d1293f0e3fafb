"""Miniatures of the published layouts of data sets, and what is in them."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]


def _random(*shape: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path: Path, values: Bytes) -> None:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()) if path.suffix == ".gz" else head + values.tobytes())


def mnist(folder: Path, suffix: str = ".gz") -> tuple[Tensor, Tensor]:
    """Writes 60 training and 20 test images; returns the training ones and their labels."""
    for part, count in (("train", 60), ("t10k", 20)):
        images, labels = _random(count, 28, 28, seed=count), np.arange(count, dtype=np.uint8) % 10
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return torch.from_numpy(_random(60, 28, 28, seed=60)), torch.arange(60) % 10


def cifar10(folder: Path) -> tuple[Tensor, Tensor]:
    """The binary version: ten images in each of five files."""
    inner = folder / "cifar-10-batches-bin"
    inner.mkdir()
    pixels, labels = _random(60, 3072), np.arange(60, dtype=np.uint8) % 10
    rows = np.concatenate([labels[:, None], pixels], axis=1)
    for i in range(5):
        rows[10 * i : 10 * i + 10].tofile(inner / f"data_batch_{i + 1}.bin")
    rows[50:].tofile(inner / "test_batch.bin")
    return torch.from_numpy(pixels[:50]).view(50, 3, 32, 32), torch.arange(50) % 10


def cifar10_python(folder: Path) -> tuple[Tensor, Tensor]:
    """The Python version of the same images."""
    inner = folder / "cifar-10-batches-py"
    inner.mkdir()
    pixels, labels = _random(60, 3072), [i % 10 for i in range(60)]
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(10 * i, 10 * i + 10)
        # The published files were written by Python 2: their strings are byte strings.
        content = pickle.dumps({b"data": pixels[part], b"labels": labels[part]}, protocol=4)
        (inner / name).write_bytes(content)
    return torch.from_numpy(pixels[:50]).view(50, 3, 32, 32), torch.arange(50) % 10


def cifar100(folder: Path) -> tuple[Tensor, Tensor]:
    """The binary version: a coarse and a fine label before each image."""
    pixels, fine = _random(120, 3072), np.arange(120, dtype=np.uint8) % 100
    rows = np.concatenate([fine[:, None] // 5, fine[:, None], pixels], axis=1)
    rows[:100].tofile(folder / "train.bin")
    rows[100:].tofile(folder / "test.bin")
    return torch.from_numpy(pixels[:100]).view(100, 3, 32, 32), torch.arange(100)


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(_random(size[1], size[0], 3, seed=seed)).save(path)


def image_folder(folder: Path) -> tuple[list[Path], Tensor]:
    """Two classes, three training images and two validation images each."""
    files = []
    for part, count in (("train", 3), ("val", 2)):
        for cls in ("cat", "dog"):
            for i in range(count):
                path = folder / part / cls / f"{i}.{'png' if i else 'jpg'}"
                write_image(path, seed=i)
                files += [path] if part == "train" else []
    return sorted(files), torch.tensor([0, 0, 0, 1, 1, 1])


def webvision(folder: Path) -> tuple[list[Path], Tensor]:
    """Three classes from two sources, with metadata: six of Google's images and three of Flickr's."""
    info = folder / "info"
    info.mkdir()
    files, labels = [], []
    for part, count in (("google", 2), ("flickr", 1)):
        lines, notes = [], []
        for cls in range(3):
            (folder / f"{part}_json").mkdir(exist_ok=True)
            entries = [{"title": f"{part} {cls} {i}"} for i in range(count)]
            (folder / f"{part}_json" / f"q000{cls}.json").write_text(json.dumps(entries))
            for i in range(count):
                name = f"{part}/q000{cls}/image {i}.jpg"  # a space, as file names from the web may have
                write_image(folder / name, seed=cls)
                lines.append(f"{name} {cls}")
                notes.append(f"{part}/q000{cls}.json {i}")
                files.append(folder / name)
                labels.append(cls)
        (info / f"train_filelist_{part}.txt").write_text("\n".join(lines) + "\n")
        (info / f"train_meta_list_{part}.txt").write_text("\n".join(notes) + "\n")
    for cls in range(3):
        write_image(folder / "val_images_256" / f"val{cls:06}.jpg", seed=cls)
    (info / "val_filelist.txt").write_text("".join(f"val{cls:06}.jpg {cls}\n" for cls in range(3)))
    return files, torch.tensor(labels)


IN_MEMORY: dict[str, tuple[str, Callable[[Path], tuple[Tensor, Tensor]]]] = {
    "fashion-mnist": ("fashion-mnist", mnist),
    "cifar10-binary": ("cifar10", cifar10),
    "cifar10-python": ("cifar10", cifar10_python),
    "cifar100-binary": ("cifar100", cifar100),
}
IN_FILES: dict[str, tuple[str, Callable[[Path], tuple[list[Path], Tensor]]]] = {
    "imagefolder": ("imagefolder", image_folder),
    "webvision": ("webvision", webvision),
}
