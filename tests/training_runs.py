"""What tests of the training driver share: a run of a second, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.training.options import Options

ROOT = Path(__file__).parents[1]
SMALL = Options(dataset="digits", samples=320, batch_size=64, epochs=3, noise="symmetric", quiet=True, device="cpu")
MARKS = [
    pytest.mark.any_cpu,
    pytest.mark.usefixtures("one_thread"),
    # Lightning's advice about workers, logging intervals and the like
    pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning"),
]


def weights(folder: Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / name, weights_only=False)["state_dict"]
    return state
