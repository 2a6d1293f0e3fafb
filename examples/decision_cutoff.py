"""Where to draw the line between no and yes, on a validation set with wrong labels.

    python examples/decision_cutoff.py

trains a logistic regression on yes/no labels of which some were flipped, chooses a cut-off on a validation set with as
many flipped labels, and judges it on clean labels by the balanced accuracy: the mean of the shares of right answers
among yes and among no. Data: scikit-learn's breast cancer (63 % yes) and its digits, an 8 or not (10 % yes). Cut-offs:
0.5; the one with the best balanced accuracy on the validation set; where Gaussians, or skew-normal densities, fitted to
the inliers of both classes cross (2506.02154). Mean and standard deviation over 30 splits, two minutes. Needs
``pip install rich scikit-learn scipy``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fused_losses as fl

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
FLIPPED = (0.0, 0.05, 0.1, 0.2)


def load(name: str) -> tuple[Array, Labels]:
    """Inputs and right labels, 0 or 1."""
    if name == "breast cancer":
        inputs, labels = load_breast_cancer(return_X_y=True)
        return inputs, labels
    inputs, digits = load_digits(return_X_y=True)
    return inputs, (digits == 8).astype(np.int64)


def best_on_validation(logits: Array, labels: Labels) -> float:
    """The cut-off between two logits that has the best balanced accuracy."""
    false_yes, true_yes, scores = roc_curve(labels, logits, drop_intermediate=False)
    advantage = (true_yes - false_yes)[1:-1]  # twice the balanced accuracy, less 1, of saying yes from scores[1:-1] on
    best = len(advantage) - int(np.argmax(advantage[::-1]))  # of several the lowest
    return float(scores[best] + scores[best + 1]) / 2


def from_gaussians(logits: Array, labels: Labels) -> float:
    """Where Gaussians of the logits cross."""
    return fl.optimal_logit_cutoff_from_gaussians(logits, labels)[0]


def from_skewnorm(logits: Array, labels: Labels) -> float:
    """Where skew-normal densities of the probabilities cross, as a logit."""
    prob = fl.optimal_prob_cutoff_from_skewnorm(logits, labels)
    return math.log(prob / (1 - prob))


CUTOFFS: dict[str, Callable[[Array, Labels], float]] = {
    "0.5": lambda logits, labels: 0.0,
    "best on validation": best_on_validation,
    "Gaussians": from_gaussians,
    "skew-normal": from_skewnorm,
}


def judge(inputs: Array, labels: Labels, flipped: float, seed: int) -> dict[str, float]:
    """The balanced accuracy of every cut-off on one split: half for training, a quarter each for the rest."""
    rng = np.random.default_rng(seed)
    given = np.where(rng.random(len(labels)) < flipped, 1 - labels, labels)
    rows = rng.permutation(len(labels))
    half, quarter = len(rows) // 2, len(rows) * 3 // 4
    training, validation, test = rows[:half], rows[half:quarter], rows[quarter:]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500))
    model.fit(inputs[training], given[training])
    logits, test_logits = model.decision_function(inputs[validation]), model.decision_function(inputs[test])
    return {
        name: balanced_accuracy_score(labels[test], test_logits > choose(logits, given[validation]))
        for name, choose in CUTOFFS.items()
    }


def compare(name: str, flipped: float, splits: int) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the balanced accuracy of every cut-off, in per cent."""
    inputs, labels = load(name)
    runs = [judge(inputs, labels, flipped, seed) for seed in range(splits)]
    found = {cutoff: 100 * np.array([run[cutoff] for run in runs]) for cutoff in CUTOFFS}
    return {cutoff: (float(values.mean()), float(values.std())) for cutoff, values in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 splits instead of 30")
    args = parser.parse_args(argv)
    table = Table("data", "flipped", *CUTOFFS, title="balanced accuracy in per cent")
    cases = [(name, flipped) for name in ("breast cancer", "an 8 or not") for flipped in FLIPPED]
    for name, flipped in track(cases, description="Cases", transient=True):
        found = compare(name, flipped, 3 if args.quick else 30)
        table.add_row(name, f"{flipped:.0%}", *(f"{mean:.1f} ± {std:.1f}" for mean, std in found.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
