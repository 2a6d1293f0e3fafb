"""When Z-Error should tighten: fixed numbers of epochs against schedules that watch noisy validation labels.

scikit-learn's digits; a fifth of the training rows, with labels as wrong as the others, is the validation set that
schedules and early stopping look at. The threshold goes from 10 to 1 (probability of the label, lower side, statistics
over batches): linearly over some epochs, where the validation accuracy has passed its peak, or halfway whenever it has
not improved for a while. MLP 256-256, Adam 1e-3, batch 64, 40 epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_losses as fl
from benchmarks.training.experiments.runs import Runs, plot, spread, table
from benchmarks.training.options import Options
from benchmarks.training.report import compare
from fused_losses import noise

NAME = "z_annealing"
RATES = (0.05, 0.2, 0.4)
EPOCHS = 40
BASES = ("cross_entropy", "gce")
# What ThresholdSchedule is given; None trains without Z-Error.
SCHEDULES: dict[str, dict[str, Any] | None] = {
    "no Z-Error": None,
    "linear, 3 epochs": {"steps": 3},
    "linear, 10 epochs": {"steps": 10},
    "linear, all epochs": {"steps": EPOCHS},
    "peak": {"mode": "peak"},
    "plateau": {"mode": "plateau", "maximize": True, "patience": 1},
}


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Trains what is missing; the size is the same with ``full``."""
    for seed in range(seeds):
        for base in BASES:
            for rate in RATES:
                for name, schedule in SCHEDULES.items():
                    if runs.due(name, f"{base} {rate:g}", seed, Options().settings()):
                        row = train(base, schedule, rate, seed)
                        runs.add({"label": name, "group": f"{base} {rate:g}", "seed": seed, "settings": {}, **row})


def train(base: str, schedule: dict[str, Any] | None, rate: float, seed: int) -> dict[str, Any]:
    """Clean test and noisy validation accuracy of each epoch, where the threshold came down, which rows it dropped."""
    from benchmarks.training.criterion import make_loss
    from benchmarks.training.networks import make_network
    from benchmarks.training.samples import Request
    from benchmarks.training.sources import load

    data = load(Options(dataset="digits"))
    generator = torch.Generator().manual_seed(seed)
    inputs, true = data.train[Request(0, torch.arange(len(data.train)))][:2]
    test, test_labels = data.validation[Request(0, torch.arange(len(data.validation)))][:2]
    labels = noise.symmetric(true, rate, 10, redraw=False, seed=generator).labels
    order = torch.randperm(len(true), generator=generator)
    held, rows = order[: len(order) // 5], order[len(order) // 5 :]
    model = make_network("mlp:256", inputs.shape[1:], 10, seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss: Any = make_loss(Options(loss=base), true, 10, steps=1)[0]
    scheduler = None
    if schedule is not None:
        loss = fl.ZErrorCrossEntropyLoss(1.0, "prob", loss, sided="lower", running=True, num_classes=10)
        scheduler = fl.ThresholdSchedule(loss, 10.0, 1.0, **schedule)
    found: dict[str, Any] = {"top1": [], "validation": [], "threshold": []}
    for _ in range(EPOCHS):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(64):
            optimizer.zero_grad()
            loss(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
        found["validation"].append(_accuracy(model, inputs[held], labels[held]))
        found["top1"].append(_accuracy(model, test, test_labels))
        if scheduler is not None:
            watched = scheduler.mode in ("peak", "plateau")
            scheduler.step(found["validation"][-1]) if watched else scheduler.step()
            found["threshold"].append(round(float(scheduler.value), 3))
    if scheduler is not None:
        with torch.no_grad():
            mask = loss.eval()(model(inputs[rows]), labels[rows], return_mask=True).mask
        found["dropped"] = compare((~mask).nonzero().flatten(), (labels != true)[rows])
    return found


def _accuracy(model: Any, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return round(float((model(inputs).argmax(1) == labels).float().mean()), 5)


def stopped(row: dict[str, Any]) -> float:
    """Test accuracy of the epoch with the best noisy validation accuracy, the first of several."""
    best = max(range(EPOCHS), key=lambda epoch: (row["validation"][epoch], -epoch))
    return float(row["top1"][best])


def write(runs: Runs, folder: Path) -> None:
    """The table, and the curves without and with Z-Error."""
    lines = []
    for rate in RATES:
        for base in BASES:
            for name in SCHEDULES:
                if found := runs.of(name, f"{base} {rate:g}"):
                    dropped = [row["dropped"] for row in found if "dropped" in row]
                    lines.append(
                        [
                            f"{100 * rate:g} %",
                            fl.LOSSES[base].module.__name__,
                            name,
                            spread(row["top1"][-1] for row in found),
                            spread(max(row["top1"]) for row in found),
                            spread(stopped(row) for row in found),
                            spread(each["precision"] for each in dropped),
                            spread(each["recall"] for each in dropped),
                            str(len(found)),
                        ]
                    )
    head = ["wrong", "loss", "threshold", "last epoch, %", "best epoch, %", "stopped by noisy validation, %"]
    head += ["precision of drops at the end, %", "recall, %", "seeds"]
    text = f"# When Z-Error should tighten\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n\n"
    (folder / f"{NAME}.md").write_text(text + table(head, lines) + "\n", encoding="utf-8")
    plot(folder / f"{NAME}.png", lambda figure: _draw(figure, runs), (11, 3.8))


def _draw(figure: Any, runs: Runs) -> None:
    axes = figure.subplots(1, len(RATES))
    for ax, rate in zip(axes, RATES, strict=True):
        for name in SCHEDULES:
            if found := runs.of(name, f"{BASES[0]} {rate:g}"):
                curve = [100 * sum(v) / len(v) for v in zip(*(row["top1"] for row in found), strict=True)]
                black = SCHEDULES[name] is None
                ax.plot(range(1, EPOCHS + 1), curve, label=name, color="black" if black else None)
        ax.set(title=f"{100 * rate:g} % wrong, cross entropy", xlabel="epoch")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on clean test labels, %")
    axes[0].legend(fontsize=8)
