"""The published formulas of tests/cpp/naive_losses.h, with at least 113 bits, for the Python tests.

A loss has one row there: its hand-worked value, its value at p_y = 0 and its formula.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "cpp"
CXX = shlex.split(os.environ.get("CXX", "g++"))


class NaiveLoss(NamedTuple):
    """A row of naive_losses.h."""

    index: int
    hand_worked: float  # value with default parameters for logits (0, log 3) and label 0
    at_zero: float  # value with default parameters for logits (-inf, 0, 1) and label 0

    def row(self, params: Sequence[float], logits: Sequence[float], target: int) -> tuple[float, list[float]]:
        """Value and gradient of one row."""
        numbers = (ctypes.c_double * len(params))(*params)
        row, grad = (ctypes.c_double * len(logits))(*logits), (ctypes.c_double * len(logits))()
        value = _library().naive_row_loss(self.index, numbers, len(logits), row, target, grad)
        return value, list(grad)


@functools.cache
def naive_losses() -> dict[str, NaiveLoss]:
    """All of them by name."""
    library = _library()
    return {
        library.naive_name(i).decode(): NaiveLoss(i, library.naive_hand_worked(i), library.naive_at_zero(i))
        for i in range(library.naive_count())
    }


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled()))
    library.naive_name.restype = ctypes.c_char_p
    for name in ("naive_hand_worked", "naive_at_zero", "naive_row_loss"):
        getattr(library, name).restype = ctypes.c_double
    return library


def _compiled() -> Path:
    """The library; compiled once for all processes that run tests."""
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler: {CXX[0]!r} (CXX) is not on PATH")
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*naive*")))
    compiled = ROOT / "build" / f"naive-{hashlib.sha256(text + str(CXX).encode()).hexdigest()[:16]}.so"
    if not compiled.exists():
        compiled.parent.mkdir(exist_ok=True)
        partial = compiled.with_suffix(f".{os.getpid()}")
        source = str(SOURCES / "naive_library.cpp")
        for quad in (
            ["-DFL_QUAD", "-x", "c++", source, "-lquadmath"],
            ["-DFL_QUAD", source],
        ):  # not every machine has a quad precision library
            command = [*CXX, "-std=gnu++20", "-O1", "-shared", "-fPIC", "-o", str(partial), *quad]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                break
        assert result.returncode == 0, result.stderr
        partial.rename(compiled)
    return compiled
