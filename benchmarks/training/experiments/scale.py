"""What losses send in a step on 8, 64 and 512 processes, counted on the real code, and what it costs to merge.

One process plays rank 0 of a group whose collectives do nothing (torch's "fake" backend), which makes the calls of a
real run; the bytes of every tensor given to a collective are added up. A ring all-reduce of b bytes sends and receives
2 b (N - 1) / N on each of N ranks, an all-gather of b bytes from each rank receives b (N - 1). Times are from one CPU
core: of the loss with its gradient, and of merging the statistics of N ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fused_losses as fl
from benchmarks.training.experiments.runs import Runs, table
from fused_losses.parallel import ClassParallel
from fused_losses.statistics import merge_moments

NAME = "scale"
RANKS = (8, 64, 512)
ROWS, CLASSES, MANY = 256, 1000, 2**20  # rows of a rank
REPEATS = 15
LOSSES: dict[str, Callable[[int, int], Any]] = {
    "a loss as it is": lambda ranks, classes: fl.GCELoss(),
    "GlobalMean(loss)": lambda ranks, classes: fl.GlobalMean(fl.GCELoss()),
    "GlobalMean(HEMLoss)": lambda ranks, classes: fl.GlobalMean(fl.HEMLoss(margin=0.2)),
    "Z-Error, process_group": lambda ranks, classes: fl.ZErrorCrossEntropyLoss(
        1.0, "prob", sided="lower", running=True, num_classes=classes, process_group=dist.group.WORLD
    ),
}


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Counts bytes and takes times where they are missing."""
    if runs.rows:
        return
    for ranks in RANKS:
        with fake_group(ranks):
            for name, make in LOSSES.items():
                runs.add({"kind": "bytes", "loss": name, "ranks": ranks, **collectives(make(ranks, CLASSES), CLASSES)})
            sent = collectives(
                ClassParallel(fl.GCELoss(), None, 0, MANY), MANY // ranks
            )  # all ranks have the same rows
            runs.add({"kind": "bytes", "loss": f"ClassParallel, {MANY} classes", "ranks": ranks, **sent})
        for classes in (CLASSES, 100 * CLASSES):
            if ranks * classes <= RANKS[-1] * CLASSES:
                parts = torch.rand(ranks, 3, classes, dtype=torch.float64) + 1.0
                seconds = median_time(lambda parts=parts: merge_moments(parts))  # type: ignore[misc]
                runs.add({"kind": "merge", "ranks": ranks, "classes": classes, "seconds": seconds})
    logits = torch.randn(ROWS, CLASSES, requires_grad=True)
    target = torch.randint(0, CLASSES, (ROWS,))
    for name, loss in (("GCE", fl.GCELoss()), ("HEM", fl.HEMLoss(0.2)), ("CE", fl.CrossEntropyLoss())):
        runs.add({"kind": "local", "loss": name, "seconds": median_time(lambda c=loss: c(logits, target).backward())})  # type: ignore[misc]


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """Rank 0 of a group whose collectives do nothing; the others say that they have the next classes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def gather(found: list[Any], mine: tuple[int, int, int], group: Any = None) -> None:
        found[:] = [(rank * mine[1], mine[1], mine[2]) for rank in range(ranks)]

    original = dist.all_gather_object
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    dist.all_gather_object = gather  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.all_gather_object = original
        dist.destroy_process_group()


def collectives(loss: Any, classes: int) -> dict[str, int]:
    """Bytes given to all-reduces and to all-gathers by a training step of ``loss``, and the calls."""
    logits = torch.randn(ROWS, classes, requires_grad=True)
    target = torch.randint(0, classes, (ROWS,))
    found = {"all_reduce": 0, "all_gather": 0, "calls": 0}
    originals: dict[str, Any] = {"all_reduce": dist.all_reduce, "all_gather": dist.all_gather}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if name == "all_reduce" else args[1]
            found[name] += tensor.numel() * tensor.element_size()
            found["calls"] += 1
            return originals[name](*args, **kwargs)

        return call

    loss(logits, target)  # ranks agree about some things in the first call only
    try:
        for name in originals:
            setattr(dist, name, counted(name))
        loss(logits, target).backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return found


def median_time(function: Callable[[], Any]) -> float:
    """Seconds of a call, the median of several after a warm-up."""
    times = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return float(torch.tensor(times[2:]).median())


def received(row: dict[str, Any]) -> float:
    """Bytes that each rank receives."""
    ranks = row["ranks"]
    return float(2 * row["all_reduce"] * (ranks - 1) / ranks + row["all_gather"] * (ranks - 1))


def size(value: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000.0 or unit == "GB":
            return f"{value:.3g} {unit}"
        value /= 1000.0
    raise AssertionError


def write(runs: Runs, folder: Path) -> None:
    """Bytes a step by loss and number of processes; times."""
    names = dict.fromkeys(row["loss"] for row in runs.rows if row["kind"] == "bytes")
    lines = []
    for name in names:
        rows = [row for row in runs.rows if row["kind"] == "bytes" and row["loss"] == name]
        lines.append([name, str(rows[0]["calls"]), *(size(received(row)) for row in rows)])
    gradient = 4 * 25_557_032  # ResNet-50's parameters, float32
    cells = [size(2 * gradient * (ranks - 1) / ranks) for ranks in RANKS]
    lines.append(["for comparison: gradients of ResNet-50, float32", "DDP's buckets", *cells])
    head = ["loss", "collectives", *(f"{ranks} processes" for ranks in RANKS)]
    text = f"# Losses on many processes\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n\n"
    text += "## Bytes that each rank receives in a step\n\n"
    text += f"{ROWS} rows a rank, {CLASSES} classes.\n\n{table(head, lines)}\n\n"
    lines = [
        [f"merging the statistics of {row['ranks']} ranks, {row['classes']} classes", f"{1e3 * row['seconds']:.2f}"]
        for row in runs.rows
        if row["kind"] == "merge"
    ]
    lines += [
        [f"{row['loss']}, {ROWS} x {CLASSES}, forward and backward", f"{1e3 * row['seconds']:.2f}"]
        for row in runs.rows
        if row["kind"] == "local"
    ]
    text += f"## Times\n\n{table(['what', 'ms'], lines)}\n"
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
