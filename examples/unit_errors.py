"""Regression with unit errors in the targets: squared error, Z-Error with two statistics, absolute error.

    python examples/unit_errors.py

takes scikit-learn's diabetes data (442 patients, ten measurements, a score of disease progression from 25 to 346) and
spoils some of the training targets: converted as from Celsius to Fahrenheit (x 1.8 + 32), or with the decimal point
moved to the right (x 10) or left (/ 10). A linear model is trained with each loss and tested on clean targets. Who wins
is printed from what was measured, also where it is not this package. About half a minute on two cores. Needs
``pip install rich scikit-learn``.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.demo import mean_and_std, one_thread

ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda target: target,
    "x1.8+32": lambda target: 1.8 * target + 32.0,
    "x10": lambda target: 10.0 * target,
    "/10": lambda target: target / 10.0,
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "MSE": nn.MSELoss,
    "ZMSE target": lambda: fl.ZMSELoss(statistic="target"),
    "ZMSE loss": lambda: fl.ZMSELoss(statistic="loss"),
    "MAE (L1)": nn.L1Loss,
}
SHARES = (0.05, 0.1, 0.2)
BATCH_SIZE = 64


class Outcome(NamedTuple):
    """Root mean squared error on clean test targets, and the shares of spoilt and of good rows that were dropped."""

    test_error: float
    spoilt_dropped: float
    good_dropped: float


def load_patients(seed: int) -> list[Tensor]:
    """Inputs for training and test, standardised by the training half, then targets; the seed decides the split."""
    split = train_test_split(*load_diabetes(return_X_y=True), test_size=0.3, random_state=seed)
    train_inputs, test_inputs, train_target, test_target = (torch.as_tensor(part).float() for part in split)
    mean, std = train_inputs.mean(dim=0), train_inputs.std(dim=0)
    return [(train_inputs - mean) / std, (test_inputs - mean) / std, train_target, test_target]


@one_thread()
def train(loss_name: str, error: str, share: float, seed: int, epochs: int = 60) -> Outcome:
    """Train a linear model on targets of which ``share`` have the unit error, with Adam, and test it.

    The seed decides split, spoilt rows, initial weights and order, so losses with the same seed are on equal terms.
    """
    train_inputs, test_inputs, clean, test_target = load_patients(seed)
    generator = torch.Generator().manual_seed(seed)
    spoilt = torch.rand(len(clean), generator=generator) < share
    target = torch.where(spoilt, ERRORS[error](clean), clean)
    mean, std = target.mean(), target.std()  # of what a user has: the spoilt targets
    target = (target - mean) / std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Linear(train_inputs.shape[1], 1)
    loss = LOSSES[loss_name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        order = torch.randperm(len(target), generator=generator)
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            optimizer.zero_grad(set_to_none=True)
            loss(model(train_inputs[rows]).squeeze(1), target[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        difference = model(test_inputs).squeeze(1) * std + mean - test_target
        dropped = _dropped(loss, model(train_inputs).squeeze(1), target)
    return Outcome(float(difference.square().mean().sqrt()), *(_share(dropped[rows]) for rows in (spoilt, ~spoilt)))


def _dropped(loss: nn.Module, prediction: Tensor, target: Tensor) -> Tensor:
    """Rows that the trained model's loss leaves out, judged by all training rows together."""
    if not isinstance(loss, fl.ZMSELoss):
        return torch.zeros_like(target, dtype=torch.bool)
    mask: Tensor = loss(prediction, target, return_mask=True).mask
    return ~mask


def _share(rows: Tensor) -> float:
    return float(rows.double().mean())  # NaN if there are none


def scenarios(shares: Sequence[float]) -> list[tuple[str, float]]:
    """Every error with every share, and clean targets once."""
    return [("none", 0.0), *((error, share) for error in ERRORS if error != "none" for share in shares)]


def winners(results: dict[tuple[str, float], dict[str, list[Outcome]]]) -> str:
    """A sentence per kind of error: which loss has the lowest mean test error in how many settings."""
    lines = []
    for error in ERRORS:
        best: Counter[str] = Counter()
        for (kind, _), outcomes in results.items():
            if kind == error:
                means = {name: statistics.fmean(o.test_error for o in found) for name, found in outcomes.items()}
                best[min(means, key=means.__getitem__)] += 1
        score = ", ".join(f"{name} in {count}" for name, count in best.most_common())
        lines.append(f"Lowest mean error with {error + ':':<9}{score} of {best.total()}")
    return "\n".join(lines)


EXPLANATION = (
    'ZMSE "target" judges the targets by themselves: it finds those far out of range (x 10), and never a tenth of a '
    'target, which is less than two standard deviations below the mean. ZMSE "loss" judges the squared error: it can '
    "find a wrong target within the range, but large errors first pull the model and widen the standard deviation that "
    "they are measured by, and on clean data it drops good rows. Both leave in the smaller of the errors and, the more "
    "errors there are, more of them. Absolute error bounds the pull of every row and needs no threshold: it is the one "
    "to beat. Differences below the spread over seeds mean little."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with command-line arguments (``sys.argv`` by default)."""
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one share of errors, two seeds, few epochs: seconds")
    options = parser.parse_args(argv)
    shares, seeds, epochs = ((0.1,), range(2), 30) if options.quick else (SHARES, range(5), 60)
    console = Console(highlight=False)
    errors = Table(box=box.SIMPLE, title="Root mean squared error on clean test targets (lower is better)")
    dropped = Table(box=box.SIMPLE, title="Training rows dropped at the end: spoilt / good")
    errors.add_column("errors")
    dropped.add_column("errors")
    for name, make in LOSSES.items():
        errors.add_column(name, justify="right", no_wrap=True)
        if isinstance(make(), fl.ZMSELoss):
            dropped.add_column(name, justify="right")
    results = {}
    for error, share in track(scenarios(shares), "training", console=console, transient=True):
        outcomes = {name: [train(name, error, share, seed, epochs) for seed in seeds] for name in LOSSES}
        results[error, share] = outcomes
        label = f"{error} {share:.0%}" if share else error
        errors.add_row(label, *(mean_and_std([o.test_error for o in found], 1) for found in outcomes.values()))
        shares_of = ([statistics.fmean(column) for column in zip(*found, strict=True)] for found in outcomes.values())
        texts = (f"{spoilt:.0%} / {good:.0%}" if share else f"- / {good:.0%}" for _, spoilt, good in shares_of)
        masking = [isinstance(make(), fl.ZMSELoss) for make in LOSSES.values()]
        dropped.add_row(label, *(text for text, masks in zip(texts, masking, strict=True) if masks))
    console.print(errors, dropped)
    console.print(f"{len(seeds)} seeds (split, spoilt rows, weights), mean +- standard deviation.")
    console.print(winners(results))
    console.print(EXPLANATION)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
