"""Z-Error's masks and cut-offs on planted outliers, against the batch size: Figures 2 to 6 of 2506.02154.

Synthetic, as there: logits of two balanced classes are N(-2, 1) and N(2, 1), a planted outlier has the other class's
logit (a wrong label); regression targets are N(0, 1), a planted outlier lies 6 above or below. 10 % are planted. The
paper gives neither distances nor repeats nor its score; ours is F1 of the dropped rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fused_losses as fl
from benchmarks.training.experiments.runs import Runs, plot, table
from benchmarks.training.report import compare

NAME = "z_detection"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
THRESHOLDS = (1.5, 2.0)
ROWS = 8_192  # judged for each point and seed, in batches of each size; four times as many for the rare class
SHIFT = 6.0
CUTOFF_REPEATS = 20

Rows = tuple[Tensor, Tensor, Tensor]  # scores, labels or targets, which are planted


def classification(rows: int, seed: int, planted: float = 0.1, minority: float = 0.5) -> Rows:
    """Logits, labels, planted; a share ``minority`` of the rows is of class 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=generator) < minority).float()
    wrong = torch.rand(rows, generator=generator) < planted
    centre = torch.where(wrong, 2.0 - 4.0 * labels, 4.0 * labels - 2.0)
    return centre + torch.randn(rows, generator=generator), labels, wrong


def regression(rows: int, seed: int, planted: float = 0.1) -> Rows:
    """Predictions (0, as before training), targets, planted."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(rows, generator=generator) < planted
    side = torch.where(torch.rand(rows, generator=generator) < 0.5, -SHIFT, SHIFT)
    targets = torch.randn(rows, generator=generator) + torch.where(wrong, side, torch.zeros(()))
    return torch.zeros(rows), targets, wrong


def dropped(loss: Any, first: Tensor, second: Tensor, size: int) -> Tensor:
    """Which rows ``loss`` drops from batches of ``size``."""
    masks = [loss(a, b, return_mask=True).mask for a, b in zip(first.split(size), second.split(size), strict=True)]
    return ~torch.cat(masks)


def points(seed: int, threshold: float) -> list[dict[str, Any]]:
    """Detection for every task, kind of statistics and batch size."""
    found = _imbalanced(threshold, seed)
    tasks: dict[str, tuple[Callable[..., Any], Rows]] = {
        "classification": (fl.ZErrorBCEWithLogitsLoss, classification(ROWS, seed)),
        "regression": (fl.ZMSELoss, regression(ROWS, seed)),
    }
    for task, (loss, (first, second, wrong)) in tasks.items():
        for name in ("batch", "running", "data set"):
            for size in (ROWS,) if name == "data set" else SIZES:
                flags = dropped(loss(threshold, running=name == "running"), first, second, size)
                row = {"task": task, "statistics": name, "threshold": threshold, "size": size, "seed": seed}
                found.append({**row, **compare(flags.nonzero().flatten(), wrong)})
    return found


def _imbalanced(threshold: float, seed: int) -> list[dict[str, Any]]:
    """1:100: how the planted rows of the rare class are found."""
    logits, labels, wrong = classification(4 * ROWS, seed, minority=0.01)
    rare = labels == 1.0
    found = []
    for size in (*SIZES, len(logits)):
        for name in ("batch", "running") if size < len(logits) else ("data set",):
            flags = dropped(fl.ZErrorBCEWithLogitsLoss(threshold, running=name == "running"), logits, labels, size)
            scores = compare(flags[rare].nonzero().flatten(), wrong[rare])
            kept = float((~flags & ~wrong)[rare].sum() / (~wrong)[rare].sum())
            row = {"task": "rare class", "statistics": name, "threshold": threshold, "size": size, "seed": seed}
            found.append({**row, **scores, "kept": kept})
    return found


def cutoffs(size: int) -> list[dict[str, Any]]:
    """Gaussian and skew-normal cut-offs of many validation sets of ``size`` rows (Figure 3)."""
    found = []
    for repeat in range(CUTOFF_REPEATS):
        logits, labels, _ = classification(size, 1000 * size + repeat)
        row: dict[str, Any] = {"size": size, "repeat": repeat}
        for name, fit in (("gaussian", _gaussian), ("skewnorm", fl.optimal_prob_cutoff_from_skewnorm)):
            try:
                row[name] = fit(logits, labels)
            except ValueError:  # too few inliers, or densities that do not cross
                row[name] = None
        found.append(row)
    return found


def _gaussian(logits: Tensor, labels: Tensor) -> float:
    return fl.optimal_logit_cutoff_from_gaussians(logits, labels)[1]


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Measures what is missing; the size is the same with ``full``."""
    for seed in range(seeds):
        for threshold in THRESHOLDS:
            done = [row for row in runs.rows if row.get("seed") == seed and row.get("threshold") == threshold]
            for row in points(seed, threshold) if not done else ():
                runs.add({"kind": "detection", **row})
    for size in SIZES:
        done = [row for row in runs.rows if row["kind"] == "cutoff" and row["size"] == size]
        for row in cutoffs(size) if not done else ():
            runs.add({"kind": "cutoff", **row})


def _mean(rows: Sequence[dict[str, Any]], value: str, **wanted: Any) -> float:
    chosen = [row[value] for row in rows if all(row[name] == given for name, given in wanted.items())]
    return float(np.mean(chosen)) if chosen else float("nan")


def write(runs: Runs, folder: Path) -> None:
    """Tables of F1 and of the cut-offs' spread, and their picture."""
    rows = [row for row in runs.rows if row["kind"] == "detection"]
    seeds = len({row["seed"] for row in rows})
    protocol = (__doc__ or "").split("\n", 2)[2].strip()
    parts = [
        f"# Planted outliers\n\n{protocol} {ROWS} rows, means over {seeds} seeds;\n"
        "the last column has the statistics of the whole data set.\n"
    ]
    for task in ("classification", "regression", "rare class"):
        lines = []
        for threshold in THRESHOLDS:
            wanted = {"task": task, "threshold": threshold}
            whole = _mean(rows, "f1", statistics="data set", **wanted)
            for name in ("batch", "running"):
                values = [_mean(rows, "f1", statistics=name, size=size, **wanted) for size in SIZES]
                lines.append([f"{threshold:g}", name, *(f"{value:.2f}" for value in (*values, whole))])
        title = "1:100 imbalance, outliers of the rare class" if task == "rare class" else task.capitalize()
        head = ["threshold", "statistics", *(str(size) for size in SIZES), "data set"]
        parts.append(f"## {title}: F1 against batch size\n\n{table(head, lines)}\n")
    spreads = [row for row in runs.rows if row["kind"] == "cutoff"]
    if spreads:
        lines = [[name, *(_cutoff(spreads, name, size) for size in SIZES)] for name in ("gaussian", "skewnorm")]
        parts.append(
            "## Cut-off as a probability against rows (Figure 3)\n\nMean ± standard deviation of "
            f"{CUTOFF_REPEATS} sets of rows, and how many gave one; the true one is .5.\n\n"
            f"{table(['fit', *map(str, SIZES)], lines)}\n"
        )
    (folder / f"{NAME}.md").write_text("\n".join(parts), encoding="utf-8")
    plot(folder / f"{NAME}.png", lambda figure: _draw(figure, rows), (10, 4))


def _cutoff(rows: Sequence[dict[str, Any]], name: str, size: int) -> str:
    values = [row[name] for row in rows if row["size"] == size and row[name] is not None]
    return f"{np.mean(values):.2f} ± {np.std(values):.2f} ({len(values)})" if values else "none"


def _draw(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    titles = {
        "classification": "classification, 10 % wrong labels",
        "regression": "regression, 10 % outliers",
        "rare class": "rare class at 1:100",
    }
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (task, title) in zip(axes, titles.items(), strict=True):
        for threshold, colour in zip(THRESHOLDS, ("tab:blue", "tab:orange"), strict=True):
            wanted = {"task": task, "threshold": threshold}
            for name, style in (("batch", "-"), ("running", "--")):
                values = [_mean(rows, "f1", statistics=name, size=size, **wanted) for size in SIZES]
                ax.plot(SIZES, values, style, marker=".", color=colour, label=f"{threshold:g} σ, {name}")
            whole = _mean(rows, "f1", statistics="data set", **wanted)
            ax.axhline(whole, linestyle=":", color=colour, label=f"{threshold:g} σ, data set")
        ax.set(title=title, xlabel="batch size", xscale="log", xticks=SIZES, xticklabels=SIZES, ylim=(0, 1))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("F1 of the dropped rows")
    axes[0].legend(fontsize=7)
