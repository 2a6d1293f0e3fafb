"""Which share of a training step the loss takes, in plain PyTorch and fused.

Timed parts on one CPU core, medians: forward and backward of the network with a given gradient of the logits and a step
of Adam ("the rest"); forward and backward of the loss on leaf logits. Plain is the reference formula (for cross entropy
torch's own function). On a GPU: ``python -m benchmarks.training --dataset synthetic``, with and without ``--plain``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl
from benchmarks.training.experiments.runs import Runs, table
from benchmarks.training.experiments.scale import median_time

NAME = "cost"
LOSSES = ("cross_entropy", "gce", "nce_agce", "nfl_mae", "hem", "bi_tempered")
MODELS: tuple[tuple[str, tuple[int, ...], int, int], ...] = (  # name, shape of an image, classes, rows
    ("mlp:128", (1, 8, 24), 1000, 256),
    ("mlp:512", (1, 8, 24), 1000, 256),
    ("small_cnn", (1, 28, 28), 10, 128),
    ("resnet32", (3, 32, 32), 10, 32),
)


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Takes the times where they are missing; the size is the same with ``full``."""
    from benchmarks.training.networks import make_network

    for model, shape, classes, rows in MODELS:
        if any(row["model"] == model for row in runs.rows):
            continue
        network = make_network(model, shape, classes, seed=0)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        images, target = torch.rand(rows, *shape), torch.randint(0, classes, (rows,))
        gradient = torch.randn(rows, classes) / rows
        # Before steps along a gradient of no loss, which make logits so large that probabilities are subnormal.
        logits = network(images).detach().requires_grad_()

        def rest(network: Any = network, optimizer: Any = optimizer, x: Tensor = images, g: Tensor = gradient) -> None:
            optimizer.zero_grad()
            network(x).backward(g)
            optimizer.step()

        row: dict[str, Any] = {"model": model, "rows": rows, "classes": classes, "rest": median_time(rest)}
        for name in LOSSES:
            row[name] = {kind: median_time(call) for kind, call in _calls(name, logits, target).items()}
        runs.add(row)


def _calls(name: str, logits: Tensor, target: Tensor) -> dict[str, Callable[[], None]]:
    from benchmarks.training.criterion import PlainLoss

    options: dict[str, Any] = {"margin": 0.2} if name == "hem" else {}
    fused: Any = fl.LOSSES[name].module(**options)
    plain: Any = torch.nn.CrossEntropyLoss() if name == "cross_entropy" else PlainLoss(fused)
    losses = {"plain": plain, "fused": fused}

    def step(loss: Any) -> None:
        loss(logits, target).backward()

    return {kind: partial(step, loss) for kind, loss in losses.items()}


def write(runs: Runs, folder: Path) -> None:
    """Share of the step for every model and loss."""
    lines = []
    for row in runs.rows:
        for name in LOSSES:
            cells = []
            for kind in ("plain", "fused"):
                seconds = row[name][kind]
                cells.append(f"{1e3 * seconds:.2f} ms = {100 * seconds / (seconds + row['rest']):.1f} %")
            label = f"{row['model']}, {row['rows']} x {row['classes']}"
            lines.append([label, f"{1e3 * row['rest']:.1f}", name, *cells])
    head = ["model, rows x classes", "the rest, ms", "loss", "plain, share of the step", "fused, share of the step"]
    text = f"# The loss in a step\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n\n{table(head, lines)}\n"
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
