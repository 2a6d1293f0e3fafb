"""HEM and its ablations: train on six classes of Fashion-MNIST, reject the other four and handwritten digits.

2501.12191's use: networks that know what they do not know. Scores are the largest softmax probability (MSP) and the
largest logit (MLS); AUROC of known against unknown test images. 2,000 images a class; far outliers are scikit-learn's
digits enlarged to 28 pixels.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training.experiments.runs import Runs, plot, spread, table
from benchmarks.training.options import Options
from fused_losses.scores import max_logit, max_softmax_probability

NAME = "hem"
KNOWN = 6
PER_CLASS = 2000
LOSSES: dict[str, dict[str, Any]] = {
    "CE": {"loss": "cross_entropy"},
    "HEM": {"loss": "hem", "loss_args": ("margin=auto",)},
    "MM": {"loss": "multi_margin", "loss_args": ("margin=auto",)},
    "MM + maz": {"loss": "multi_margin", "loss_args": ("margin=auto", "mean_above_zero=True")},
    "MM + thres": {"loss": "multi_margin", "loss_args": ("margin=auto", "threshold=True")},
    "HEM, margin .1": {"loss": "hem", "loss_args": ("margin=.1",)},
    "HEM, margin 1": {"loss": "hem", "loss_args": ("margin=1.",)},
    "HEM, margin 2": {"loss": "hem", "loss_args": ("margin=2.",)},
}


def recipe(full: bool) -> Options:
    """The same for every loss; with ``full`` ResNet-32 and longer."""
    options = Options(dataset="fashion-mnist", model="small_cnn", batch_size=128, epochs=8, quiet=True)
    if full:
        options = dataclasses.replace(options, model="resnet32", epochs=60, lr_schedule="cosine")
    return options


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Trains what is missing."""
    from sklearn.metrics import roc_auc_score

    from benchmarks.training.engine import fit
    from benchmarks.training.sources import load

    whole = load(recipe(full))
    known, near = _known(whole)
    far = _digits()
    for seed in range(seeds):
        for name, changes in LOSSES.items():
            options = dataclasses.replace(recipe(full), **changes, seed=seed)
            settings = json.loads(json.dumps(options.settings()))
            if runs.has(name, "", seed, settings):
                continue
            model = fit(options, known)[1].eval()
            rows = {"known": known.validation.inputs, "near": near, "far": far}
            with torch.no_grad():
                logits = {
                    part: torch.cat([model.logits(x) for x in images.split(500)]) for part, images in rows.items()
                }
            row: dict[str, Any] = {"label": name, "group": "", "seed": seed, "settings": settings}
            row["top1"] = [round(epoch["top1"], 5) for epoch in model.history]
            for part in ("near", "far"):
                for score, function in (("msp", max_softmax_probability), ("mls", max_logit)):
                    values = torch.cat([function(logits["known"]), function(logits[part])])
                    is_known = torch.arange(len(values)) < len(logits["known"])
                    row[f"{part}_{score}"] = round(float(roc_auc_score(is_known, values)), 5)
            runs.add(row)
            print(name, seed, {key: row[key] for key in row if "_m" in key}, row["top1"][-1], flush=True)


def _known(whole: Any) -> tuple[Any, Tensor]:
    """The data set with its first classes only, and the test images of the others."""
    from benchmarks.training.samples import TensorSamples
    from benchmarks.training.sources import Data

    target = whole.train.target
    rows = torch.cat([(target == cls).nonzero().flatten()[:PER_CLASS] for cls in range(KNOWN)])
    test = whole.validation.target < KNOWN
    data = Data(
        TensorSamples(whole.train.inputs[rows], target[rows]),
        TensorSamples(whole.validation.inputs[test], whole.validation.target[test]),
        KNOWN,
        whole.mean,
        whole.std,
    )
    return data, whole.validation.inputs[~test]


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] * (255 / 16)
    return F.interpolate(images, size=28, mode="bilinear").round().to(torch.uint8)


def write(runs: Runs, folder: Path) -> None:
    """Accuracy and AUROC of each loss."""
    lines = []
    columns = ("near_msp", "near_mls", "far_msp", "far_mls")
    for name in LOSSES:
        found = runs.of(name)
        if found:
            cells = [spread(row[column] for row in found) for column in columns]
            accuracy = [spread(row["top1"][-1] for row in found), spread(max(row["top1"]) for row in found)]
            lines.append([name, *accuracy, *cells, str(len(found))])
    head = ["loss", "last epoch, %", "best epoch, %", "near, MSP", "near, MLS", "far, MSP", "far, MLS", "seeds"]
    text = f"# HEM: unknown classes\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n\nAUROC in %.\n\n"
    (folder / f"{NAME}.md").write_text(text + table(head, lines) + "\n", encoding="utf-8")
    plot(folder / f"{NAME}.png", lambda figure: _draw(figure, runs), (7, 3.5))


def _draw(figure: Any, runs: Runs) -> None:
    ax = figure.subplots()
    names = [name for name in LOSSES if runs.of(name)]
    for shift, (column, label) in enumerate(
        (("near_msp", "near, MSP"), ("near_mls", "near, MLS"), ("far_mls", "far, MLS"))
    ):
        values = [100 * sum(row[column] for row in runs.of(name)) / len(runs.of(name)) for name in names]
        ax.bar([i + 0.25 * (shift - 1) for i in range(len(names))], values, 0.25, label=label)
    ax.set(ylabel="AUROC, %", ylim=(50, 100), xticks=range(len(names)))
    ax.set_xticklabels(names, rotation=20, fontsize=8)
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize=8)
