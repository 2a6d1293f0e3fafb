"""Bounded losses and many classes: strings of three digits, 1000 classes, 40 % of the labels redrawn at random.

The message of 2306.05497, Table 3, on real images: with many classes bounded losses stop learning, and a logit bias
(``*``), a scheduled one (``**``) or parameters matched to the number of classes (``+``) bring them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training.experiments.runs import Runs, Variant, last_and_best, plot, table
from benchmarks.training.options import Options
from fused_losses.calibration import match_parameter, solve_logit_bias

NAME = "many_classes"
CLASSES = 1000
TARGETS = (0.05, 0.1, 0.15, 0.3)  # C, the mean activation that the bias is solved for
NCE_AGCE = ("alpha=10", "beta=.1", "a=1.8", "q=3")  # the parameters of 2106.03110 for CIFAR-100
# Losses that came later, with their papers' parameters for WebVision where they give some.
LATER: dict[str, dict[str, Any]] = {
    "CE, smoothing .1": {"loss": "cross_entropy", "loss_args": ("label_smoothing=.1",)},
    "CE, smoothing -1": {"loss": "cross_entropy", "loss_args": ("label_smoothing=-1.",)},
    "CORES": {"loss": "cores"},
    "CORES after 3 epochs of CE": {"loss": "cores", "cross_entropy_epochs": 3},
    "ANL-CE (20, 1)": {"loss": "anl_ce", "loss_args": ("alpha=20", "beta=1")},
    "ANL-CE (20, 1), L1 5e-6": {"loss": "anl_ce", "loss_args": ("alpha=20", "beta=1"), "l1": 5e-6},
    "JAL-CE (50, 1, 30)": {"loss": "jal_ce", "loss_args": ("alpha=50", "beta=1", "a=30")},
    "ECE-MAE (.015, .3, 1e3)": {"loss": "ece_mae", "loss_args": ("alpha=.015", "beta=.3", "m=1e3")},
    "ECE-MAE, m 1e4": {"loss": "ece_mae"},
    "SGCE": {"loss": "sgce"},
    "LDR-KL": {"loss": "ldr_kl"},
    "ELR (.9, 7)": {"loss": "elr", "loss_args": ("beta=.9", "lam=7")},
}
NF_MAE = ("alpha=10", "beta=1")  # those of 2006.13554 for CIFAR-100
LOSSES = {
    "MAE": {"loss": "mae"},
    "GCE": {"loss": "gce"},
    "NCE-AGCE": {"loss": "nce_agce"},
    "NF-MAE": {"loss": "nfl_mae"},
}
COLOURS = {
    "CE": "black",
    "biTemp": "tab:blue",
    "MAE": "tab:orange",
    "GCE": "tab:green",
    "NCE-AGCE": "tab:red",
    "NF-MAE": "tab:purple",
}
STYLES = {"+": ":", "*": "-", "**": "--"}
NOTES = """A small network and few epochs, so that a run takes a quarter of a minute on one core: losses that learn are
still learning at the end. `--full` has 200,000 strings, `mlp:512` and 40 epochs.

`*`: with a logit bias, `**`: brought to 0 by the end, GCE+: q matched to the number of classes. 2306.05497 claims for
WebVision, with networks for photographs, that MAE, NCE-AGCE and NF-MAE learn 1000 classes only with the bias, and that
genCE does with q = 0.48; its figures were not at hand."""


def recipe(full: bool) -> Options:
    """Digits of scikit-learn and a small network; for a GPU a wider one, more strings and more epochs."""
    options = Options(dataset="digit-strings", model="mlp:128", noise="symmetric", noise_rate=0.4, epochs=8, lr=2e-3)
    if full:
        options.model, options.samples, options.epochs, options.lr = "mlp:512", 200_000, 40, 1e-3
    return options


def variants(full: bool) -> list[Variant]:
    """Baselines, each loss beside its starred and matched version, schedules; a sweep over C with one seed."""

    def biased(target: float) -> str:
        return f"{solve_logit_bias(CLASSES, target):.4f}"

    def starred(name: str, schedule: str = "none", target: float = 0.15) -> dict[str, Any]:
        return {**LOSSES[name], "logit_bias": biased(target), "bias_schedule": schedule}

    matched = match_parameter("gce", "q", CLASSES, 100, 0.7)
    found = [Variant("CE", {"loss": "cross_entropy"}), Variant("biTemp", {"loss": "bi_tempered"})]
    for name, changes in LOSSES.items():  # in pairs, so that a part of the runs says something already
        found += [Variant(name, changes), Variant(f"{name}*", starred(name))]
        if name == "GCE":
            found.append(Variant("GCE+", {"loss": "gce", "loss_args": (f"q={matched:.4f}",)}))
    found += [Variant(f"{name}**", starred(name, "cosine")) for name in ("MAE", "GCE", "NCE-AGCE")]
    found.append(Variant("NCE-AGCE (10, .1, 1.8, 3)", {"loss": "nce_agce", "loss_args": NCE_AGCE}))
    found.append(Variant("NF-MAE (10, 1)", {"loss": "nfl_mae", "loss_args": NF_MAE}))
    found += [Variant(name, changes) for name, changes in LATER.items()]
    found.append(Variant("MAE** linear", starred("MAE", "linear"), seeds=1))
    for name in ("MAE", "GCE", "NCE-AGCE"):
        found += [Variant(sweep_label(name, c), starred(name, "none", c), seeds=1) for c in TARGETS if c != 0.15]
    found.append(Variant("MAE** cosine C=.3", starred("MAE", "cosine", 0.3), seeds=1))
    return found


def sweep_label(name: str, target: float) -> str:
    """Of a run with a bias for another C than the default."""
    return f"{name}*" if target == 0.15 else f"{name}* C={target:g}"


def write(runs: Runs, folder: Path) -> None:
    """The table and two pictures: accuracy against epoch, and against C."""
    rows = []
    for variant in variants(full=False):
        found = runs.of(variant.label)
        if found:
            bias = found[0]["settings"]["logit_bias"]
            rows.append([variant.label, bias, *last_and_best(found), str(len(found))])
    baseline = runs.of("CE")
    recipe_text = describe(baseline[0]["settings"]) if baseline else ""
    text = f"# {CLASSES} classes: strings of three digits\n\n{recipe_text}\n\n{NOTES}\n\n"
    head = ["loss", "logit bias", "last epoch, %", "best epoch, %", "seeds"]
    (folder / f"{NAME}.md").write_text(text + table(head, rows) + "\n", encoding="utf-8")
    plot(folder / f"{NAME}_epochs.png", lambda figure: _draw_epochs(figure, runs), (8, 5))
    if any(runs.of(sweep_label(name, c)) for name in LOSSES for c in TARGETS if c != 0.15):
        plot(folder / f"{NAME}_bias.png", lambda figure: _draw_bias(figure, runs), (6, 4))


def describe(settings: dict[str, Any]) -> str:
    """The recipe in words."""
    return (
        f"`--dataset {settings['dataset']} --noise {settings['noise']} --noise-rate {settings['noise_rate']:g} "
        f"--model {settings['model']} --optimizer {settings['optimizer']} --lr {settings['lr']:g} "
        f"--batch-size {settings['batch_size']} --epochs {settings['epochs']}`; accuracy on clean test labels, "
        "mean and standard deviation over seeds."
    )


def _curves(runs: Runs, labels: Sequence[str]) -> dict[str, list[float]]:
    curves = {}
    for label in labels:
        found = runs.of(label)
        if found:
            curves[label] = [
                100.0 * sum(values) / len(values) for values in zip(*(r["top1"] for r in found), strict=True)
            ]
    return curves


def _draw_epochs(figure: Any, runs: Runs) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ("plain", ["CE", "biTemp", *LOSSES]),
        ("adapted", ["CE", "GCE+", "GCE*", "MAE*", "MAE**", "NCE-AGCE*", "NCE-AGCE**"]),
    )
    for ax, (title, labels) in zip(axes, panels, strict=True):
        for label, curve in _curves(runs, labels).items():
            base = label.rstrip("*+")
            style = STYLES.get(label[len(base) :], "-")
            ax.plot(range(1, len(curve) + 1), curve, style, label=label, color=COLOURS[base])
        ax.set(title=title, xlabel="epoch")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("accuracy on clean test labels, %")


def _draw_bias(figure: Any, runs: Runs) -> None:
    ax = figure.subplots()
    for name in ("MAE", "GCE", "NCE-AGCE"):
        points = [(c, found[0]["top1"][-1] * 100) for c in TARGETS if (found := runs.of(sweep_label(name, c)))]
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", color=COLOURS[name], label=f"{name}*")
    for label, colour, style in (("CE", "black", "-"), ("GCE", "tab:green", "-"), ("GCE+", "tab:green", ":")):
        if found := runs.of(label):
            ax.axhline(found[0]["top1"][-1] * 100, color=colour, linestyle=style, linewidth=1, label=label)
    ax.set(xlabel="C: mean activation of the label at the start", ylabel="accuracy after the last epoch, %")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
