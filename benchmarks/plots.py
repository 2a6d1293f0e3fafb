"""The report's pictures. Black, grey, markers and hatches tell things apart: they survive a greyscale print."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter

from benchmarks.cases import LOSSES, shape_name
from benchmarks.providers import PLAIN
from benchmarks.results import Results, Row
from benchmarks.suites import SWEPT_CLASSES
from benchmarks.targets import Index

OURS: dict[str, Any] = {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 1.6, "markersize": 4}
OWN_PLAIN: dict[str, Any] = {"color": "0.45", "marker": "s", "linestyle": "--", "linewidth": 1.0, "markersize": 3.5}
TORCH_CE: dict[str, Any] = {"color": "0.65", "marker": "^", "linestyle": ":", "linewidth": 1.2, "markersize": 3.5}
COLUMNS = 4


def _swept(index: Index) -> dict[str, list[Row]]:
    """Our rows of the sweep over the number of classes, by loss: those with the same number of logits."""
    found: dict[str, list[Row]] = {}
    rows = [r for r in index.rows if r.provider == "fused" and r.mode == "fwd_bwd" and len(r.shape) == 2]
    million = [r for r in rows if r.num_classes == SWEPT_CLASSES[-1]]
    if not million:
        return {}
    size = million[0].floor_bytes
    for row in rows:
        same_size = 0.4 < row.floor_bytes / size < 2.5 and row.dtype == million[0].dtype
        if row.num_classes in SWEPT_CLASSES and same_size and row.threads == 1:
            found.setdefault(row.loss, []).append(row)
    return {name: _one_per_class(rows, size) for name, rows in found.items()}


def _one_per_class(rows: list[Row], size: int) -> list[Row]:
    """Where other parts of a suite have the same number of classes, the row closest in size."""
    best: dict[int, Row] = {}
    for row in rows:
        kept = best.get(row.num_classes)
        if kept is None or abs(row.floor_bytes - size) < abs(kept.floor_bytes - size):
            best[row.num_classes] = row
    return [best[c] for c in sorted(best)]


def copy_share(index: Index, title: str, path: Path) -> bool:
    """Share of the copy's bandwidth against the number of classes, a panel for every loss."""
    swept = _swept(index)
    if not swept:
        return False
    names = [name for name in LOSSES if len(swept.get(name, [])) > 1]
    lines = -(-(len(names) + 1) // COLUMNS)
    size = (11, 1.75 * lines)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    panels = list(axes.flat)
    baseline = _peer_line(index, swept.get("cross_entropy", []), ("torch",))
    for panel, name in zip(panels, names, strict=False):
        if baseline[0]:
            panel.plot(*baseline, **TORCH_CE)
        own = _peer_line(index, swept[name], ("reference", "snippet") if name == "cross_entropy" else PLAIN)
        if own[0]:
            panel.plot(*own, **OWN_PLAIN)
        panel.plot([r.num_classes for r in swept[name]], [100 * r.share_of_copy for r in swept[name]], **OURS)
        panel.set_title(name, fontsize=9, pad=3)
        panel.axhline(100.0, color="black", linewidth=0.8)
        _class_axis(panel)
    panels[0].set_ylim(0.0, 1.05 * max(100.0, *(100 * r.share_of_copy for rows in swept.values() for r in rows)))
    for panel in panels[len(names) :]:
        panel.axis("off")
    for column in range(COLUMNS):  # the last panel of every column has the tick labels
        last = max((i for i in range(column, len(names), COLUMNS)), default=None)
        if last is not None:
            panels[last].tick_params(labelbottom=True)
            panels[last].set_xlabel("classes", fontsize=8)
    legend = [
        Line2D([], [], **OURS, label="fused_losses"),
        Line2D([], [], **OWN_PLAIN, label="the same loss, fastest plain PyTorch\n(measured for some)"),
        Line2D([], [], **TORCH_CE, label="F.cross_entropy, in every panel"),
        Line2D([], [], color="black", linewidth=0.8, label="100 %: a copy of the logits"),
    ]
    panels[-1].legend(handles=legend, loc="center", fontsize=8, frameon=False)
    figure.supylabel("useful bytes per second, % of copy_ (forward + backward)", fontsize=10)
    figure.suptitle(f"Share of copy bandwidth by number of classes\n{title}", fontsize=11)
    _save(figure, path)
    return True


def _peer_line(index: Index, rows: list[Row], providers: tuple[str, ...]) -> tuple[list[int], list[float]]:
    found = [(row.num_classes, index.fastest(row, providers)) for row in rows]
    return [c for c, peer in found if peer], [100 * peer.share_of_copy for _, peer in found if peer]


def _class_axis(panel: Any) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator([10, 1000, 100_000]))
    panel.set_xticks([10, 1000, 100_000], ["10", "1k", "100k"], fontsize=8)
    panel.xaxis.set_minor_locator(FixedLocator([2, 100, 10_000, 1_000_000]))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(axis="y", labelsize=8)
    panel.grid(True, color="0.9", linewidth=0.6)


def _at(index: Index, shape: tuple[int, ...]) -> list[Row]:
    """Our float rows of training steps at a shape, on one thread, in the order of the registry; suites may repeat."""
    rows = [
        r
        for r in index.rows
        if (r.provider, r.mode, r.shape, r.threads) == ("fused", "fwd_bwd", shape, 1) and r.layout == "contiguous"
    ]
    dtypes = {r.dtype for r in rows}
    dtype = "float32" if "float32" in dtypes else min(dtypes, default="float32")
    return sorted((r for r in rows if r.dtype == dtype), key=lambda r: list(LOSSES).index(r.loss))


def _over_ours(index: Index, shape: tuple[int, ...], providers: tuple[str, ...]) -> dict[str, float]:
    """By loss: the time of the fastest of the providers that were measured over ours."""
    found = [(row, index.fastest(row, providers)) for row in _at(index, shape)]
    return {row.loss: peer.time_us / row.time_us for row, peer in found if peer is not None}


def _bar_shapes(index: Index) -> list[tuple[int, ...]]:
    """The two shapes at which most losses were compared with plain PyTorch, the one with more classes first."""
    counts = Counter(
        row.shape
        for row in index.rows
        if (row.provider, row.mode) == ("reference", "fwd_bwd") and len(row.shape) == 2 and row.floor_bytes > 5_000_000
    )
    best = sorted(counts, key=lambda shape: (-counts[shape], -shape[1]))[:2]
    return sorted(best, key=lambda shape: -shape[1])


def speed_up(index: Index, title: str, path: Path) -> bool:
    """Bars: fastest plain PyTorch over ours for every loss; diamonds: the compiler."""
    shapes = _bar_shapes(index)
    plain = [_over_ours(index, shape, PLAIN) for shape in shapes]
    compiled = [_over_ours(index, shape, ("compile",)) for shape in shapes]
    names = sorted({n for column in plain for n in column}, key=lambda n: max(c.get(n, 0.0) for c in plain))
    if not names:
        return False
    figure, axis = plt.subplots(figsize=(8.5, 0.36 * len(names) + 1.8), layout="constrained")
    height = 0.8 / len(shapes)
    styles: list[dict[str, Any]] = [{"color": "0.25"}, {"color": "0.8", "hatch": "////", "edgecolor": "0.3"}]
    for k, shape in enumerate(shapes):
        places = [i + 0.4 - (k + 0.5) * height for i in range(len(names))]
        style = styles[k % len(styles)]
        bars, diamonds = ([column[k].get(name, math.nan) for name in names] for column in (plain, compiled))
        axis.barh(places, bars, height, label=f"plain PyTorch, {shape_name(shape)}", **style)
        for place, number in zip(places, bars, strict=True):
            if not math.isnan(number):
                axis.annotate(
                    f"{number:.1f}", (number, place), (3, 0), textcoords="offset points", va="center", fontsize=7
                )
        label = "torch.compile of the reference" if k == 0 else None
        axis.plot(diamonds, places, "D", color="white", markeredgecolor="black", markersize=5, label=label)
    axis.axvline(1.0, color="black", linewidth=1.0, linestyle="--")
    spelled = {row.loss for row in index.rows if row.provider in ("snippet", "torch")}
    labels = [name if name in spelled else f"{name} *" for name in names]
    axis.set_yticks(range(len(names)), labels, fontsize=9)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel(
        "time over that of fused_losses, forward + backward (1: as fast)\n"
        "* plain PyTorch is fused_losses.reference, with weights and ignored rows;\n"
        "otherwise torch's function or a few lines without them, whichever is fastest"
    )
    axis.set_title(f"Speed-up over the fastest plain PyTorch\n{title}", fontsize=11)
    axis.legend(loc="lower right", fontsize=8)
    axis.grid(True, axis="x", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw(results: Results, device: str, folder: Path, suffix: str = "") -> list[Path]:
    """Writes the pictures that the rows of ``device`` suffice for and returns their paths; names end in ``suffix``."""
    index = Index(row for row in results.rows if row.device == device)
    machine = results.machine
    where = machine.get("gpu") or f"{machine['processor']}, 1 thread"
    paths = {draws: folder / f"{draws.__name__}{suffix}.png" for draws in (copy_share, speed_up)}
    return [path for draws, path in paths.items() if draws(index, where, path)]
