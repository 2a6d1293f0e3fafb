"""What the demo prints and saves: tables, what they show, the plot, the numbers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_losses._demo_data import NUM_CLASSES, Detection
from fused_losses._demo_losses import START_THRESHOLD, LossChoice
from fused_losses.calibration import solve_logit_bias

if TYPE_CHECKING:
    from rich.console import Console

FLAG_RATE = 0.5  # rows dropped in at least this share of the epochs count as flagged
NOTES = {
    "bias": '* = logit_bias="auto", here {bias:.2f}: a head start for the labelled class, in training only. MAE needs '
    "it with many classes. With ten it helps where a loss would never learn one of them, and lets it learn wrong "
    "labels sooner.",
    "hem": "HEM is made for unknown classes and for imbalance, not for wrong labels: it works hardest on the rows it "
    "has wrong, so the longer it trains the more wrong labels it learns. Labels that people got wrong harm it more "
    "than these random ones.",
    "z_ce": "Z-CE is cross entropy without the rows whose label the network finds unlikely compared with the other "
    "rows of that label: ZErrorCrossEntropyLoss({settings}), its threshold lowered from {start:g} in the first epochs "
    "(ThresholdSchedule). These settings were chosen on these digits; the other losses have their defaults.",
    "z_ce_default": "Z-CE default is the same loss with its defaults, the paper's rule for two classes, its threshold "
    "lowered to 2. A threshold t can find wrong rows only while they are fewer than 1 / (1 + t^2) of the rows with "
    "their label: 20 % for 2, 50 % for 1.",
}


@dataclass
class Result:
    """Test accuracy per seed and epoch of one loss, and microseconds per step of the loss alone."""

    choice: LossChoice
    accuracy: list[list[float]]
    fused_us: float
    plain_us: float
    ranking: list[Detection] = field(default_factory=list)  # per seed: as many rows as are wrong, least probable labels
    detection: list[Detection] = field(default_factory=list)  # per seed, of losses that drop rows: those

    @property
    def best(self) -> list[float]:
        """Highest test accuracy of each seed."""
        return [max(curve) for curve in self.accuracy]

    @property
    def last(self) -> list[float]:
        """Test accuracy of each seed after the last epoch."""
        return [curve[-1] for curve in self.accuracy]


def mean_and_std(values: Sequence[float], digits: int = 3) -> str:
    """``mean +- standard deviation`` of values of several seeds; a dash if a value is NaN."""
    if any(map(math.isnan, values)):
        return "-"
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def print_accuracy(console: Console, results: Sequence[Result], batch_size: int, device: object) -> None:
    """Print accuracy and cost of every loss."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="Test accuracy, and time of the loss")
    table.add_column("loss", no_wrap=True)
    for heading in ("best epoch", "last epoch", "fused", "plain", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.choice.label,
            mean_and_std(result.best),
            mean_and_std(result.last),
            f"{result.fused_us:.0f} us",
            f"{result.plain_us:.0f} us",
            f"{result.plain_us / result.fused_us:.1f}x",
        )
    console.print(table)
    console.print(
        "best epoch: the highest accuracy, chosen by the right test labels; stopping early comes near to it. last "
        f"epoch: what you get without. fused, plain: forward and backward of the loss alone on {batch_size} x "
        f"{NUM_CLASSES} logits, by this package and by the same formula in PyTorch, "
        f"{'one CPU thread' if str(device) == 'cpu' else device}."
    )


def print_detection(console: Console, results: Sequence[Result]) -> None:
    """Print how well the rows that a tracker named agree with the planted wrong labels."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="Wrong labels found by an OutlierTracker in these trainings")
    for heading in ("loss", "rows"):
        table.add_column(heading, no_wrap=True)
    for heading in Detection._fields:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        for name, found in (("ranked", result.ranking), ("dropped", result.detection)):
            if found:
                table.add_row(result.choice.label, name, *map(mean_and_std, zip(*found, strict=True)))
    console.print(table)
    console.print(
        "ranked: the rows whose label was least probable in the first third of the epochs, as many as are wrong "
        f"(OutlierTracker.rank). dropped: those that a Z-Error loss dropped in at least {FLAG_RATE:.0%} of the epochs "
        "(OutlierTracker.flagged). precision: how many of them are wrong; recall: how many of the wrong are among "
        "them; f1: the harmonic mean of both."
    )


def print_notes(console: Console, results: Sequence[Result]) -> None:
    """Print what the numbers show and what they do not."""
    means = {result.choice.label: statistics.fmean(result.last) for result in results}
    lost = {result.choice.label: statistics.fmean(result.best) - means[result.choice.label] for result in results}
    if len(results) > 1:
        winner, loser = (of(means, key=means.__getitem__) for of in (max, min))
        fallen = max(lost, key=lost.__getitem__)
        fall = f"; {fallen} loses most between its best and its last epoch ({lost[fallen]:.3f})"
        console.print(
            f"\nHere {winner} ends highest ({means[winner]:.3f}) and {loser} lowest ({means[loser]:.3f})"
            f"{fall if lost[fallen] >= 0.0005 else ''}. "
            "Differences below the spread over seeds mean nothing. Which loss to take for other data does not follow "
            "from these digits: see README.md, Which loss."
        )
    for result in results:
        settings = ", ".join(f"{name}={value!r}" for name, value in result.choice.settings.items())
        if note := NOTES.get(result.choice.stem):
            console.print(note.format(settings=settings, start=START_THRESHOLD))
    if any(result.choice.auto_bias for result in results):
        console.print(NOTES["bias"].format(bias=max(0.0, solve_logit_bias(NUM_CLASSES))))


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Test accuracy per epoch: the mean over seeds as a line, smallest to largest as a band."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # Lightness rises from one line to the next and line styles differ, so the plot survives printing in grey.
    colours = [colormaps["viridis"](0.85 * index / max(1, len(results) - 1)) for index in range(len(results))]
    styles = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)), (0, (3, 1))]
    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (result, colour) in enumerate(zip(results, colours, strict=True)):
        by_epoch = list(zip(*result.accuracy, strict=True))
        epochs = range(1, len(by_epoch) + 1)
        mean, low, high = ([of(seeds) for seeds in by_epoch] for of in (statistics.fmean, min, max))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            epochs,
            mean,
            color=colour,
            linestyle=styles[index % len(styles)],
            linewidth=2.0,
            marker="o" if len(by_epoch) == 1 else None,
            label=f"{result.choice.label}  {mean[-1]:.3f}",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (clean labels)")
    axes.set_title(f"{title}\nline: mean over seeds, band: lowest to highest seed", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="loss, last epoch", handlelength=4.0, frameon=False)
    figure.savefig(path)


def save_numbers(results: Sequence[Result], settings: dict[str, Any], path: Path) -> None:
    """Everything behind the tables and the plot, as JSON."""
    losses = [
        {
            "name": result.choice.label,
            "stem": result.choice.stem,
            **result.choice.settings,
            **result.choice.function_options,
            "test_accuracy_per_seed_and_epoch": result.accuracy,
            "best_test_accuracy": result.best,
            "last_test_accuracy": result.last,
            "fused_microseconds_per_step": result.fused_us,
            "plain_microseconds_per_step": result.plain_us,
            **({"wrong_labels_ranked": [_without_nan(found) for found in result.ranking]} if result.ranking else {}),
            **({"wrong_labels_found": [_without_nan(found) for found in result.detection]} if result.detection else {}),
        }
        for result in results
    ]
    path.write_text(json.dumps({"settings": settings, "losses": losses}, indent=1) + "\n", encoding="utf-8")


def _without_nan(found: Detection) -> dict[str, float | None]:
    """As a dictionary with None for NaN, which JSON does not have."""
    return {name: None if math.isnan(value) else value for name, value in found._asdict().items()}
