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

    ``early`` has the mean probability of each sample's label over the first third of the epochs: low for wrong labels,
    before they are learned by heart. ``dropped``, of Z-Error losses, how often each was dropped, over all epochs.
    """

    early: OutlierTracker
    dropped: OutlierTracker | None
    target: Tensor
    true: Tensor | None
    names: Callable[[int], str]

    def suspicion(self) -> Tensor:
        """Sample numbers, the most suspicious label first; samples never seen last."""
        return self.early.mean_score().nan_to_num(math.inf).argsort(stable=True)

    def summary(self) -> dict[str, Any]:
        """Precision, recall and F1 where the true labels are known."""
        if self.true is None:
            return {}
        wrong = self.target != self.true
        count = int(wrong.sum())
        found = {"wrong": count, "by_probability": compare(self.suspicion()[:count], wrong)}
        if self.dropped is not None:
            found["by_drops"] = compare(self.dropped.flagged(0.5), wrong)
        return found

    def save(self, path: Path) -> None:
        """A table with a line for each sample, the most suspicious first."""
        score = self.early.mean_score().tolist()
        rate = self.dropped.flag_rate().tolist() if self.dropped is not None else None
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "source", "label", "mean_probability", "true_label", "drop_rate"])
            for i in self.suspicion().tolist():
                true = "" if self.true is None else int(self.true[i])
                drops = "" if rate is None or math.isnan(rate[i]) else f"{rate[i]:.4g}"
                probability = "" if math.isnan(score[i]) else f"{score[i]:.4g}"
                writer.writerow([i, self.names(i), int(self.target[i]), probability, true, drops])


def compare(flagged: Tensor, wrong: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of samples ``flagged`` against the mask ``wrong``; 0 where none is flagged."""
    hits = int(wrong[flagged].sum())
    precision = hits / max(1, len(flagged))
    recall = hits / max(1, int(wrong.sum()))
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(1, len(flagged) + int(wrong.sum()))}
