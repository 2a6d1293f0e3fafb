"""HEM and its ablations: train on six classes of Fashion-MNIST, reject the other four and handwritten digits.

2501.12191's uses: networks that know what they do not know, and rare classes. Scores are the largest softmax
probability (MSP) and the largest logit (MLS); AUROC of known against unknown test images. 1,000 images a class; far
outliers are scikit-learn's digits enlarged to 28 pixels. "40 % wrong" redraws labels among the six classes. "1:100" has
all ten classes with 2,000 down to 20 images, and its accuracy is balanced as the test images are; cross entropy's logit
adjustment (2007.07314) subtracts the logarithm of the classes' shares when it predicts. By default a small network, a
part of the images and few epochs, so that a run takes ten seconds on one core; ``--full`` has ResNet-32, 60 epochs and
all images.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.training.experiments.runs import Runs, last_and_best, plot, spread, table
from benchmarks.training.options import Options
from fused_losses.scores import max_logit, max_softmax_probability

NAME = "hem"
KNOWN = 6
LARGEST, SMALLEST, RARE = 2000, 20, 3  # images of the classes of the imbalanced set; the last ones are called rare
SCORES = ("near_msp", "near_mls", "far_msp", "far_mls")


def _margin(margin: str, *others: str) -> dict[str, Any]:
    return {"loss": "multi_margin" if others else "hem", "loss_args": (f"margin={margin}", *others)}


CE, HEM = {"loss": "cross_entropy"}, _margin("auto")
NOISE = {"noise": "symmetric", "noise_rate": 0.4}
UNKNOWN: dict[str, dict[str, Any]] = {
    "CE": CE,
    "HEM": HEM,
    "MM": {"loss": "multi_margin", "loss_args": ("margin=auto",)},
    "MM + maz": _margin("auto", "mean_above_zero=True"),
    "MM + thres": _margin("auto", "threshold=True"),
    "CE, LogitNorm": {**CE, "wrap": "logit_norm=.04"},
    **{f"HEM, margin {margin}": _margin(margin) for margin in (".1", ".2", ".5", "1.", "2.")},
}
NOISY = {"CE": {**CE, **NOISE}, "HEM": {**HEM, **NOISE}}
IMBALANCED = {"CE": CE, "HEM": HEM, "HEM+": _margin("plus")}
GROUPS = {"unknown": UNKNOWN, "40 % wrong": NOISY, "1:100": IMBALANCED}


def recipe(full: bool) -> Options:
    """The same for every loss."""
    options = Options(dataset="fashion-mnist", model="small_cnn", batch_size=128, epochs=8, quiet=True)
    if full:
        options = dataclasses.replace(options, model="resnet32", epochs=60, lr_schedule="cosine")
    return options


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Trains what is missing."""
    from benchmarks.training.engine import fit
    from benchmarks.training.logs import SatisfiedRows
    from benchmarks.training.sources import load

    whole = load(recipe(full))
    known, near = _known(whole, 6000 if full else 1000)
    rows = {"near": near, "far": _digits()}
    for seed in range(seeds):
        for group, losses in GROUPS.items():
            data = _imbalanced(whole) if group == "1:100" else known
            for name, changes in losses.items():
                options = dataclasses.replace(recipe(full), **changes, seed=seed)
                settings = json.loads(json.dumps(options.settings()))
                if not runs.due(name, group, seed, settings):
                    continue
                satisfied = SatisfiedRows()
                model = fit(options, data, [] if name.startswith("CE") else [satisfied])[1].eval()
                row = {"label": name, "group": group, "seed": seed, "settings": settings}
                row["top1"] = [round(epoch["top1"], 5) for epoch in model.history]
                row["satisfied"] = satisfied.shares
                row |= _rare(model, data) if group == "1:100" else _rejection(model, data, rows)
                runs.add(row)
                print(group, name, seed, {key: row[key] for key in row if key != "settings"}, flush=True)


def _logits(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.logits(part) for part in images.split(500)])


def _rejection(model: Any, data: Any, unknown: dict[str, Tensor]) -> dict[str, float]:
    """AUROC of each score for each kind of unknown images."""
    from sklearn.metrics import roc_auc_score

    known = _logits(model, data.validation.inputs)
    found = {}
    for kind, images in unknown.items():
        logits = _logits(model, images)
        for score, function in (("msp", max_softmax_probability), ("mls", max_logit)):
            values = torch.cat([function(known), function(logits)])
            is_known = torch.arange(len(values)) < len(known)
            found[f"{kind}_{score}"] = round(float(roc_auc_score(is_known, values)), 5)
    return found


def _rare(model: Any, data: Any) -> dict[str, float]:
    """Accuracy on the rare classes, and both accuracies with logits adjusted to the classes' shares."""
    logits, labels = _logits(model, data.validation.inputs), data.validation.target
    adjusted = logits - torch.bincount(data.train.target).float().log()
    rare = labels >= data.num_classes - RARE
    right = {"": logits.argmax(1) == labels, "adjusted_": adjusted.argmax(1) == labels}
    found = {f"{name}rare": float(hits[rare].float().mean()) for name, hits in right.items()}
    return {**found, "adjusted_top1": float(right["adjusted_"].float().mean())}


def _subset(whole: Any, rows: Tensor, test: Tensor, classes: int) -> Any:
    from benchmarks.training.samples import TensorSamples
    from benchmarks.training.sources import Data

    return Data(
        TensorSamples(whole.train.inputs[rows], whole.published[rows]),
        TensorSamples(whole.validation.inputs[test], whole.validation.target[test]),
        classes,
        whole.mean,
        whole.std,
    )


def _first(whole: Any, counts: list[int]) -> Tensor:
    """Numbers of the first ``counts[c]`` images of each class c."""
    return torch.cat([(whole.published == c).nonzero().flatten()[:count] for c, count in enumerate(counts)])


def _known(whole: Any, per_class: int) -> tuple[Any, Tensor]:
    """The data set with its first classes only, and the test images of the others."""
    test = whole.validation.target < KNOWN
    return _subset(whole, _first(whole, [per_class] * KNOWN), test, KNOWN), whole.validation.inputs[~test]


def _imbalanced(whole: Any) -> Any:
    """All classes; from one to the next there are fewer images by the same factor."""
    classes = whole.num_classes
    counts = [round(LARGEST * (SMALLEST / LARGEST) ** (c / (classes - 1))) for c in range(classes)]
    return _subset(whole, _first(whole, counts), torch.ones_like(whole.validation.target, dtype=torch.bool), classes)


def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] * (255 / 16)
    return F.interpolate(images, size=28, mode="bilinear").round().to(torch.uint8)


def write(runs: Runs, folder: Path) -> None:
    """Accuracy and AUROC of each loss; balanced accuracy with rare classes."""
    lines = []
    for group in ("unknown", "40 % wrong"):
        for name in GROUPS[group]:
            if found := runs.of(name, group):
                cells = [spread(row[column] for row in found) for column in SCORES]
                label = name if group == "unknown" else f"{name}, {group}"
                satisfied = spread(row["satisfied"][-1] for row in found if row["satisfied"])
                lines.append([label, *last_and_best(found), *cells, satisfied, str(len(found))])
    head = ["loss", "last epoch, %", "best epoch, %", "near, MSP", "near, MLS", "far, MSP", "far, MLS"]
    head += ["rows satisfied at the end, %", "seeds"]
    text = f"# HEM: unknown classes, rare classes\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n\n"
    text += f"## Unknown classes\n\nAUROC in %.\n\n{table(head, lines)}\n\n"
    lines = []
    for name in IMBALANCED:
        if found := runs.of(name, "1:100"):
            lines.append([name, *last_and_best(found), spread(row["rare"] for row in found), str(len(found))])
            if name == "CE":
                cells = [spread(row[column] for row in found) for column in ("adjusted_top1", "adjusted_rare")]
                lines.append([f"{name}, logit adjustment", cells[0], "-", cells[1], str(len(found))])
    head = ["loss", "last epoch, %", "best epoch, %", f"the {RARE} rarest classes, last epoch, %", "seeds"]
    text += f"## 1:100\n\n{table(head, lines)}\n"
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    plot(folder / f"{NAME}.png", lambda figure: _draw(figure, runs), (13, 3.8))


def _draw(figure: Any, runs: Runs) -> None:
    ax, curves = figure.subplots(1, 2, width_ratios=(2, 1))
    for name in UNKNOWN:
        if found := [row["satisfied"] for row in runs.of(name, "unknown") if row["satisfied"]]:
            curve = [100 * sum(shares) / len(shares) for shares in zip(*found, strict=True)]
            curves.plot(range(1, len(curve) + 1), curve, label=name)
    curves.set(xlabel="epoch", ylabel="training rows without margin errors, %", title="rows that are satisfied")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=7)
    names = [name for name in UNKNOWN if runs.of(name, "unknown")]
    series = (("near_msp", "near, MSP"), ("near_mls", "near, MLS"), ("far_msp", "far, MSP"), ("far_mls", "far, MLS"))
    for place, (column, label) in enumerate(series):
        for position, name in enumerate(names):
            values = [100 * row[column] for row in runs.of(name, "unknown")]
            x = position + 0.15 * (place - 1.5)
            ax.plot([x] * len(values), values, ".", color=f"C{place}", label=None if position else label)
    ax.set(ylabel="AUROC, %", xticks=range(len(names)), title="unknown classes: one point a seed")
    ax.set_xticklabels(names, rotation=20, fontsize=8)
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize=8)
