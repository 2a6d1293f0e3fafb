"""Z-Error cross entropy on wrong labels: which statistic, side and threshold find them, and what accuracy it costs.

scikit-learn's digits with 1 to 40 % of the labels wrong; statistics over batches, threshold down from 10 in the first
third of the epochs. Precision and recall are of the rows dropped in at least half of their judgements. Beside it the F1
of as many rows as are wrong, those with the lowest mean probability of their label in the first third of the epochs. By
default the small digits, an MLP 256-256 and 24 epochs (five seconds on one core), and a few of the tests on the first
6,000 images of Fashion-MNIST with a small convolutional network and 10 epochs; ``--full`` has all of its images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.training.experiments.runs import Runs, Variant, plot, spread, table
from benchmarks.training.options import Options

NAME = "z_labels"
RATES = (0.01, 0.05, 0.2, 0.4)
TESTS = (("logit", "two"), ("logit", "lower"), ("prob", "lower"), ("loss", "lower"))
THRESHOLDS = (1.0, 2.0)
IMAGE_TESTS = (("prob", "lower", 1.0), ("prob", "lower", 2.0), ("logit", "two", 2.0))  # those on Fashion-MNIST


def recipe(full: bool) -> Options:
    """Digits and a small network; with ``full`` Fashion-MNIST."""
    if full:
        return Options(dataset="fashion-mnist", model="small_cnn", batch_size=128, epochs=30)
    return Options(dataset="digits", model="mlp:256", batch_size=64, epochs=24)


def variants(full: bool) -> list[Variant]:
    """Cross entropy and every test at every rate."""
    found = []
    for rate in RATES:
        noise = {"noise": "symmetric-excluding", "noise_rate": rate}
        found.append(Variant("CE", noise, f"{rate:g}"))
        for statistic, sided in TESTS:
            for threshold in THRESHOLDS:
                changes = {"z_threshold": threshold, "z_statistic": statistic, "z_sided": sided}
                found.append(Variant(f"{statistic}, {sided}, {threshold:g}", {**noise, **changes}, f"{rate:g}"))
    image = {"dataset": "fashion-mnist", "model": "small_cnn", "samples": 6_000, "batch_size": 128, "epochs": 10}
    for rate in () if full else RATES:
        noise = {**image, "noise": "symmetric-excluding", "noise_rate": rate}
        group = f"Fashion-MNIST {rate:g}"
        found.append(Variant("CE", noise, group))
        for statistic, sided, threshold in IMAGE_TESTS:
            changes = {"z_threshold": threshold, "z_statistic": statistic, "z_sided": sided}
            found.append(Variant(f"{statistic}, {sided}, {threshold:g}", {**noise, **changes}, group))
    return found


def write(runs: Runs, folder: Path) -> None:
    """One table: accuracy, and F1 of what was dropped in half of the epochs and of the lowest probabilities."""
    lines = []
    for variant in variants(full=False):
        found = runs.of(variant.label, variant.group)
        if not found:
            continue
        data, _, rate = variant.group.rpartition(" ")
        wrong = [row["wrong_labels"] for row in found]
        drops = [w["by_drops"] for w in wrong if "by_drops" in w]
        lines.append(
            [
                data or "digits",
                f"{100 * float(rate):g} %",
                variant.label,
                spread(row["top1"][-1] for row in found),
                spread(max(row["top1"]) for row in found),
                spread(d["precision"] for d in drops),
                spread(d["recall"] for d in drops),
                spread(d["f1"] for d in drops),
                spread(w["by_probability"]["f1"] for w in wrong),
                str(len(found)),
            ]
        )
    head = ["data", "wrong", "test, side, threshold", "last epoch, %", "best epoch, %", "precision of drops, %"]
    text = f"# Z-Error and wrong labels\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n\n"
    head += ["recall, %", "F1, %", "F1 by mean probability, %", "seeds"]
    (folder / f"{NAME}.md").write_text(text + table(head, lines) + "\n", encoding="utf-8")
    plot(folder / f"{NAME}.png", lambda figure: _draw(figure, runs), (11, 3.6))


def _draw(figure: Any, runs: Runs) -> None:
    axes = figure.subplots(1, len(RATES), sharey=True)
    for ax, rate in zip(axes, RATES, strict=True):
        labels = [f"{statistic}, {sided}, {t:g}" for statistic, sided in TESTS for t in THRESHOLDS]
        for position, label in enumerate(["CE", *labels]):
            found = runs.of(label, f"{rate:g}")
            if found:
                for value in (row["top1"][-1] for row in found):
                    ax.plot(position, 100 * value, ".", color="black" if label == "CE" else "tab:blue")
        ax.set(title=f"digits, {100 * rate:g} % wrong", xticks=range(1 + len(labels)))
        ax.set_xticklabels(["CE", *labels], rotation=90, fontsize=7)
        ax.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("accuracy after the last epoch, %")
