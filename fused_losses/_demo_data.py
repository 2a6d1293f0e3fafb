"""Data and network of the demo and the examples: scikit-learn's digits, planted wrong labels, a small MLP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_losses import noise as noise_models

NUM_CLASSES = 10


class Digits(NamedTuple):
    """Scaled pixels (rows, 64) and labels (rows,) of the two halves of the data."""

    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor


def load_data(device: torch.device | str = "cpu") -> Digits:
    """scikit-learn's digits, pixels scaled to [0, 1], 70 % for training; every run has the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    inputs, target = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        inputs / 16.0, target, test_size=0.3, stratify=target, random_state=0
    )
    return Digits(
        torch.as_tensor(train_x, dtype=torch.float32, device=device),
        torch.as_tensor(train_y, dtype=torch.int64, device=device),
        torch.as_tensor(test_x, dtype=torch.float32, device=device),
        torch.as_tensor(test_y, dtype=torch.int64, device=device),
    )


def corrupt_labels(target: Tensor, num_classes: int, noise: float, generator: torch.Generator) -> Tensor:
    """Replace each label, with probability ``noise``, by a class drawn uniformly from all ``num_classes``.

    The draw may hit the right class, so a share of ``noise * (num_classes - 1) / num_classes`` becomes wrong.
    This is the symmetric noise of arXiv 2306.05497. ``target`` stays as it is; ``generator`` is a CPU one.
    """
    return noise_models.symmetric(target, noise, num_classes, seed=generator).labels


def make_model(seed: int) -> nn.Module:
    """The 64-512-512-10 network: large enough to learn wrong labels by heart. Global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, NUM_CLASSES))


def evaluate(model: nn.Module, inputs: Tensor, target: Tensor) -> float:
    """Share of rows whose largest logit is the target. No logit bias: it belongs to training."""
    with torch.no_grad():
        return float((model(inputs).argmax(dim=1) == target).float().mean())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operators on one thread, then as before; also a decorator.

    A second thread gains little on layers this small. When another program uses the cores, it costs a lot: threads that
    wait for each other in every operator made a step 40 times as slow.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Detection(NamedTuple):
    """How well flagged rows agree with the wrong labels; NaN where there is nothing to divide by."""

    precision: float  # share of the flagged rows whose label is wrong
    recall: float  # share of the wrong labels that were flagged
    f1: float


def compare_flags(flagged: Tensor, wrong: Tensor) -> Detection:
    """Precision, recall and F1 of the row numbers ``flagged`` against the bool mask ``wrong`` (rows,)."""
    from sklearn.metrics import precision_recall_fscore_support

    mask = torch.zeros_like(wrong)
    mask[flagged.to(mask.device)] = True
    scores = precision_recall_fscore_support(
        wrong.cpu().numpy(), mask.cpu().numpy(), average="binary", zero_division=float("nan")
    )
    return Detection(*map(float, scores[:3]))
