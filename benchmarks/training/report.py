"""Which training labels look wrong, and how many of those flagged are."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_losses.diagnostics import OutlierTracker


@dataclass
class SampleReport:
    """What a run learned about its training samples.

    ``tracker`` has the mean probability of each sample's label over the first third of the epochs, low for wrong labels
    before they are learned by heart, and, of Z-Error losses, how often each was dropped, over all epochs.
    """

    tracker: OutlierTracker
    target: Tensor
    true: Tensor | None
    names: Callable[[int], str]

    def summary(self) -> dict[str, Any]:
        """Precision, recall and F1 where the true labels are known."""
        if self.true is None:
            return {}
        wrong = self.target != self.true
        count = int(wrong.sum())
        found = {"wrong": count, "by_probability": compare(self.tracker.rank()[:count], wrong)}
        if self.tracker.times_judged.any():
            found["by_drops"] = compare(self.tracker.flagged(0.5), wrong)
        return found

    def save(self, path: Path) -> None:
        """A table with a line for each sample, the most suspicious first, those never trained on last."""
        probability, rate = self.tracker.mean_probability(), self.tracker.flag_rate()
        order = probability.nan_to_num(math.inf).argsort(stable=True)
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "source", "label", "true_label", "mean_probability", "drop_rate"])
            for i in order.tolist():
                true = "" if self.true is None else int(self.true[i])
                numbers = ("" if math.isnan(value[i]) else f"{float(value[i]):.4g}" for value in (probability, rate))
                writer.writerow([i, self.names(i), int(self.target[i]), true, *numbers])


def compare(flagged: Tensor, wrong: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of samples ``flagged`` against the mask ``wrong``; 0 where none is flagged."""
    hits = int(wrong[flagged].sum())
    precision = hits / max(1, len(flagged))
    recall = hits / max(1, int(wrong.sum()))
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(1, len(flagged) + int(wrong.sum()))}
