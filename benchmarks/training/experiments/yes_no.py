"""Yes/no labels of many tasks: Z-Error beside binary cross entropy and GCE, with labels flipped or positives missed.

Every image of Fashion-MNIST has 13 labels: ten rare ones (is it a T-shirt, trousers, ...: 10 % are yes) and three that
are not (a garment for the upper body, footwear, an even class number: 30 to 50 %). The first 6,000 images, MLP 256-256,
Adam 1e-3, batch 128, 15 epochs, inputs standardised. "flipped" turns that share of all labels around, "missed" that
share of the yes labels. GCE is ``fl.GCELoss()`` on two logits, 0 and the task's. Z-Error's threshold comes down from 10
in the first third of the epochs. Found wrong labels: those dropped in at least half of their judgements, and as many as
are wrong with the lowest mean probability of the label in the first third of the epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_losses as fl
from benchmarks.training.experiments.runs import Runs, spread, table
from benchmarks.training.options import Options

NAME = "yes_no"
NOISE = (("clean", 0.0), ("flipped", 0.03), ("flipped", 0.1), ("flipped", 0.2), ("missed", 0.3))
SAMPLES, TEST_SAMPLES, EPOCHS, BATCH_SIZE = 6_000, 4_000, 15, 128
GROUPS = ((0, 2, 4, 6), (5, 7, 9), (0, 2, 4, 6, 8))  # classes whose images are a yes
TASKS = 10 + len(GROUPS)
Loss = Callable[[Tensor, Tensor], Tensor]


def gce(logits: Tensor, target: Tensor) -> Tensor:
    """Each label as a choice between two classes, whose logits are 0 and the task's."""
    return fl.functional.gce_loss(torch.stack([torch.zeros_like(logits), logits], 1), target.long())


def _z_error(threshold: float, space: str) -> Callable[[], Loss]:
    return lambda: fl.ZErrorBCEWithLogitsLoss(threshold, space, sided="lower", running=True, num_tasks=TASKS)


LOSSES: dict[str, Callable[[], Loss]] = {
    "BCE": nn.BCEWithLogitsLoss,
    "GCE": lambda: gce,
    "Z, logit, 2": _z_error(2.0, "logit"),
    "Z, prob, 2": _z_error(2.0, "prob"),
    "Z, defaults": lambda: fl.ZErrorBCEWithLogitsLoss(num_tasks=TASKS),
}


def labels_of(classes: Tensor) -> Tensor:
    """The labels (rows, tasks), 0 or 1."""
    groups = [torch.isin(classes, torch.tensor(group)) for group in GROUPS]
    return torch.cat([nn.functional.one_hot(classes, 10).bool(), torch.stack(groups, 1)], 1).float()


def spoil(labels: Tensor, kind: str, share: float, generator: torch.Generator) -> Tensor:
    """The labels to train on."""
    hit = torch.rand(labels.shape, generator=generator) < share
    if kind == "missed":
        hit &= labels == 1
    return torch.where(hit, 1 - labels, labels)


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Trains what is missing; the size is the same with ``full``."""
    from benchmarks.training.sources import load

    data = load(Options(dataset="fashion-mnist"))
    images = torch.cat([data.train.inputs[:SAMPLES], data.validation.inputs[:TEST_SAMPLES]])  # type: ignore[union-attr]
    inputs = (images.flatten(1).float() / 255 - data.mean[0]) / data.std[0]
    labels = labels_of(torch.cat([data.train.target[:SAMPLES], data.validation.target[:TEST_SAMPLES]]))
    for seed in range(seeds):
        for kind, share in NOISE:
            for name, loss in LOSSES.items():
                group = f"{kind} {share:g}"
                if runs.due(name, group, seed, Options().settings()):
                    row = {"label": name, "group": group, "seed": seed, "settings": {}}
                    runs.add({**row, **train(loss(), inputs, labels, kind, share, seed)})


def train(loss: Loss, inputs: Tensor, labels: Tensor, kind: str, share: float, seed: int) -> dict[str, Any]:
    """Area under the ROC curve on clean test labels after each epoch, of rare and of other tasks; what was found."""
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(seed)
    given = spoil(labels[:SAMPLES], kind, share, generator)
    wrong = (given != labels[:SAMPLES]).flatten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [inputs.shape[1], 256, 256, TASKS]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    z_error = loss if isinstance(loss, fl.ZErrorBCEWithLogitsLoss) else None
    scheduler = None if z_error is None else fl.ThresholdSchedule(z_error, 10.0, z_error.threshold, EPOCHS // 3)
    dropped, improbable = fl.OutlierTracker(wrong.numel()), fl.OutlierTracker(wrong.numel())
    auc = []
    for epoch in range(EPOCHS):
        for rows in torch.randperm(SAMPLES, generator=generator).split(BATCH_SIZE):
            logits, target = model(inputs[rows]), given[rows]
            numbers = (rows.unsqueeze(1) * TASKS + torch.arange(TASKS)).flatten()
            if epoch < EPOCHS // 3:
                probability = torch.sigmoid(torch.where(target > 0.5, logits, -logits)).detach()
                improbable.update(numbers, prob=probability.flatten())
            if z_error is None:
                value = loss(logits, target)
            else:
                value, mask, scores = z_error(logits, target, return_mask=True)
                dropped.update(numbers, mask.flatten(), scores.flatten())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        with torch.no_grad():
            areas = torch.as_tensor(roc_auc_score(labels[SAMPLES:], model(inputs[SAMPLES:]), average=None))
        auc.append([round(float(areas[:10].mean()), 5), round(float(areas[10:].mean()), 5)])
    found = {"by_probability": _f1(improbable.rank()[: int(wrong.sum())], wrong)}
    if z_error is not None:
        found["by_drops"] = _f1(dropped.flagged(0.5), wrong)
    return {"auc": auc, "found": found}


def _f1(numbers: Tensor, wrong: Tensor) -> list[float]:
    """Precision, recall and F1 of the numbered labels."""
    hits, count = float(wrong[numbers].sum()), float(wrong.sum())
    precision, recall = hits / max(len(numbers), 1), hits / max(count, 1)
    return [round(x, 4) for x in (precision, recall, 2 * hits / max(len(numbers) + count, 1))]


def write(runs: Runs, folder: Path) -> None:
    """A table for each noise."""
    parts = [f"# Yes/no labels\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n"]
    for kind, share in NOISE:
        lines = []
        for name in LOSSES:
            found = runs.of(name, f"{kind} {share:g}")
            cells = [spread(pick(row["auc"])[task] for row in found) for task in (0, 1) for pick in (_last, _best)]
            drops = [row["found"]["by_drops"] for row in found if "by_drops" in row["found"] and share > 0]
            cells += [spread(d[number] for d in drops) for number in range(3)]
            cells.append(spread(row["found"]["by_probability"][2] for row in found if share > 0))
            lines.append([name, *cells])
        head = ["loss", "rare tasks, last epoch", "best", "other tasks, last epoch", "best"]
        head += ["dropped: precision, %", "recall, %", "F1, %", "F1 by mean probability, %"]
        title = "Clean labels" if share == 0 else f"{100 * share:g} % {kind}"
        count = max((len(runs.of(name, f"{kind} {share:g}")) for name in LOSSES), default=0)
        parts.append(f"## {title}\n\nArea under the ROC curve in per cent, {count} seeds.\n\n{table(head, lines)}\n")
    (folder / f"{NAME}.md").write_text("\n".join(parts), encoding="utf-8")


def _last(auc: list[list[float]]) -> list[float]:
    return auc[-1]


def _best(auc: list[list[float]]) -> list[float]:
    return [max(column) for column in zip(*auc, strict=True)]
