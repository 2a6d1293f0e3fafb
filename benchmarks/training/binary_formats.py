"""Readers of the files that MNIST and CIFAR are published as."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, H, W) uint8 and labels (N,) of ``part``, "train" or "t10k", from idx files, compressed or not."""
    images, labels = (_read_idx(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        raise SystemExit(
            f"{folder}: {part} must have images (N, H, W) and N labels, got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    return images, labels.long()


def _read_idx(folder: Path, name: str) -> Tensor:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            break
    else:
        raise SystemExit(f"--data must be a folder with {name} or {name}.gz, missing in {folder}")
    # Two zeros, 8 for unsigned bytes, the number of dimensions; then each as a big-endian 32-bit number.
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no idx file of bytes: it begins with {content[:4].hex()}")
    shape = np.frombuffer(content, dtype=">u4", count=content[3], offset=4).astype(int)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * content[3])
    if values.size != shape.prod():
        raise SystemExit(f"{path} must hold {shape.prod()} bytes for shape {tuple(shape)}, got {values.size}")
    return torch.from_numpy(values.reshape(shape).copy())


def read_cifar(folder: Path, num_classes: int, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and (fine) labels (N,) of ``part``, "train" or "test".

    From the binary version or the Python version, in ``folder`` itself or in the folder that their archives make.
    """
    train = [f"data_batch_{i}" for i in range(1, 6)] if num_classes == 10 else ["train"]
    names = train if part == "train" else ["test_batch" if num_classes == 10 else "test"]
    base = f"cifar-{num_classes}"
    tried = [folder, folder / f"{base}-batches-bin", folder / f"{base}-binary", folder / f"{base}-batches-py"]
    for place in [*tried, folder / f"{base}-python"]:
        if (place / f"{names[0]}.bin").is_file():
            pieces = [_read_cifar_binary(place / f"{name}.bin", 1 if num_classes == 10 else 2) for name in names]
            break
        if (place / names[0]).is_file():
            pieces = [_read_cifar_python(place / name) for name in names]
            break
    else:
        raise SystemExit(f"neither {names[0]}.bin nor {names[0]} in {folder} or in a folder {base}-... in it")
    images, labels = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return images, labels


def _read_cifar_binary(path: Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Each row: its labels (the last one is fine), then the red, green and blue pixels."""
    content = np.fromfile(path, dtype=np.uint8)
    row = label_bytes + 3 * 32 * 32
    if content.size == 0 or content.size % row:
        raise SystemExit(f"{path} must hold a multiple of {row} bytes, got {content.size}")
    rows = torch.from_numpy(content.reshape(-1, row))
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].long()


class _Arrays(pickle.Unpickler):
    """Reads the dictionaries of arrays that CIFAR's Python version is, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        # The module's name differs between versions of NumPy.
        found = {"_reconstruct": _empty, "ndarray": np.ndarray, "dtype": np.dtype}.get(name)
        if found is None or module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            raise pickle.UnpicklingError(f"{module}.{name} is not expected in a CIFAR file")
        return found


def _empty(*_: Any) -> Any:
    """The array that a pickle then fills."""
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _read_cifar_python(path: Path) -> tuple[Tensor, Tensor]:
    with path.open("rb") as file:
        found = _Arrays(file, encoding="bytes").load()
    labels = found.get(b"fine_labels", found.get(b"labels"))
    return torch.from_numpy(np.array(found[b"data"])).view(-1, 3, 32, 32), torch.tensor(labels)
