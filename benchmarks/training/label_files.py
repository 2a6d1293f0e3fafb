"""Files of labels, as ``--noise FILE`` or ``--noise FILE:KEY`` names them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = "labels in a .pt file, an array of numbers in a .npy file, or text with one whole number a line"


def split_key(name: str) -> tuple[Path, str | None]:
    """Path and key of ``name``, FILE or FILE:KEY; folders may have colons, too."""
    path, _, key = name.rpartition(":")
    if Path(name).is_file() or not path:
        return Path(name), None
    return Path(path), key or None


def read_labels(path: Path, key: str | None) -> Tensor:
    """Labels (N,) from a file; nothing in it is run.

    ``.pt`` holds a tensor, an array or a list, or a dictionary of such, from which ``key`` chooses: "worse_label" of
    CIFAR-10N, "noisy_label" of CIFAR-100N. ``.npy`` holds an array of numbers; CIFAR-N's dictionary of this kind, which
    only ``pickle`` reads, is for another order of the images. Other files are text.

    Raises:
        SystemExit: the file does not hold whole numbers in one dimension.
    """
    if not path.is_file():
        raise SystemExit(f"--noise must be a kind of noise or a file of labels, {path} is missing")
    try:
        found = _READERS.get(path.suffix, _read_text)(path)
    except Exception as error:  # torch and numpy raise many kinds for files that are none of theirs
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SystemExit(f"--noise {path} must hold {KINDS}: {reason}") from error
    if isinstance(found, dict):
        named = {str(name): value for name, value in found.items()}
        if key not in named:
            raise SystemExit(f"--noise {path} holds several labels, append :KEY, one of {', '.join(named)}")
        found = named[key]
    elif key is not None:
        raise SystemExit(f"--noise {path} holds one set of labels and has no {key!r}")
    try:
        labels = np.asarray(found)
    except (ValueError, TypeError, RuntimeError):  # lists of unequal length and the like
        labels = np.empty(0, dtype=object)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        got = f"{labels.dtype} of shape {labels.shape}"
        raise SystemExit(f"--noise {path} must hold whole numbers of shape (N,), got {got}")
    return torch.from_numpy(labels.astype(np.int64))


def _read_torch(path: Path) -> Any:
    # CIFAR-N's files hold arrays, which weights_only=True refuses by default.
    with torch.serialization.safe_globals(_array_types()):
        return torch.load(path, weights_only=True, map_location="cpu")


def _array_types() -> list[Any]:
    rebuild = np.array(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
    return [(rebuild, "numpy.core.multiarray._reconstruct"), rebuild, np.ndarray, np.dtype, *dtypes]


def _read_numpy(path: Path) -> Any:
    with path.open("rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_text(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty file has no labels, which is refused for their number
        rows = np.loadtxt(path, dtype=np.int64, ndmin=2)
    return rows[:, 0] if rows.shape[1] <= 1 else rows


_READERS = {".pt": _read_torch, ".npy": _read_numpy}
