"""Table 2 of 2306.05497, its Fashion-MNIST panel: losses under symmetric and asymmetric label noise.

By default a small network, the first 6,000 images and 10 epochs, so that a run takes 13 seconds on one core; ``--full``
has ResNet-32 and all images, as the paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.training.experiments.runs import Runs, Variant, last_and_best, plot, spread, table
from benchmarks.training.options import Options

NAME = "fashion_mnist"
NOISES: dict[str, dict[str, Any]] = {
    "no noise": {"noise": "none"},
    "symmetric 20 %": {"noise": "symmetric", "noise_rate": 0.2},
    "symmetric 40 %": {"noise": "symmetric", "noise_rate": 0.4},
    "symmetric 60 %": {"noise": "symmetric", "noise_rate": 0.6},
    "asymmetric 40 %": {"noise": "asymmetric", "noise_rate": 0.4},
}
FIRST = ("symmetric 40 %", "asymmetric 40 %")  # in all seeds before the others
LOSSES: dict[str, dict[str, Any]] = {
    "CE": {"loss": "cross_entropy"},
    "MAE": {"loss": "mae"},
    "MAE*": {"loss": "mae", "logit_bias": "auto"},
    "AGCE": {"loss": "agce"},
    "genCE": {"loss": "gce"},
    "NCE-AGCE": {"loss": "nce_agce"},
    "NF-MAE": {"loss": "nfl_mae"},
    "NCE-MAE": {"loss": "nce_mae"},
    "biTemp": {"loss": "bi_tempered"},
}

# Losses that came later, with their papers' parameters for CIFAR-10 where those differ from the defaults.
LATER: dict[str, dict[str, Any]] = {
    "NCE-AUE": {"loss": "nce_aue"},
    "CE, smoothing .1": {"loss": "cross_entropy", "loss_args": ("label_smoothing=.1",)},
    "CE, smoothing -1": {"loss": "cross_entropy", "loss_args": ("label_smoothing=-1.",)},
    "CE, smoothing -4": {"loss": "cross_entropy", "loss_args": ("label_smoothing=-4.",)},
    "CE, smoothing -1 after 3 epochs of CE": {
        "loss": "cross_entropy",
        "loss_args": ("label_smoothing=-1.",),
        "cross_entropy_epochs": 3,
    },
    "CORES": {"loss": "cores"},
    "CORES after 3 epochs of CE": {"loss": "cores", "cross_entropy_epochs": 3},
    "Poly": {"loss": "poly"},
    "ANL-CE": {"loss": "anl_ce"},
    "ANL-CE, L1 5e-5": {"loss": "anl_ce", "l1": 5e-5},
    "JAL-CE": {"loss": "jal_ce"},
    "ECE-MAE, m 1e5": {"loss": "ece_mae", "loss_args": ("m=1e5",)},
    "ECE-MAE, m 1e4": {"loss": "ece_mae", "loss_args": ("m=1e4",)},
    "ECE-MAE, m 1e3": {"loss": "ece_mae", "loss_args": ("m=1e3",)},
    "SGCE": {"loss": "sgce"},
    "LDR-KL": {"loss": "ldr_kl"},
    "LDR-KL (10)": {"loss": "ldr_kl", "loss_args": ("temperature=10",)},
    "truncated GCE": {"loss": "truncated_gce"},
    "truncated GCE after 3 epochs of CE": {"loss": "truncated_gce", "cross_entropy_epochs": 3},
    "CE, LogitClip 1": {"loss": "cross_entropy", "wrap": "logit_clip=1"},
    "CE, SuperLoss": {"loss": "cross_entropy", "wrap": "super_loss=1"},
    "ELR": {"loss": "elr"},
}


def recipe(full: bool) -> Options:
    """The same for every loss."""
    if full:
        return Options(
            dataset="fashion-mnist",
            model="resnet32",
            augment="crop-flip",
            optimizer="sgd",
            lr=0.1,
            lr_schedule="cosine",
            warmup=1.0,
            weight_decay=5e-4,
            batch_size=128,
            epochs=60,
        )
    return Options(dataset="fashion-mnist", model="small_cnn", samples=6_000, batch_size=128, epochs=10)


def variants(full: bool) -> list[Variant]:
    """Table 2's losses under every kind of noise, later ones under 40 %."""
    noises = sorted(NOISES, key=lambda noise: noise not in FIRST)
    return [
        Variant(name, {**loss, **NOISES[noise]}, noise, seeds=None if noise in FIRST else 3)
        for noise in noises
        for name, loss in (LOSSES | LATER if noise in FIRST else LOSSES).items()
    ]


def write(runs: Runs, folder: Path) -> None:
    """The table of last and best epochs, and the curves under symmetric noise."""
    noises = [noise for noise in NOISES if runs.of("CE", noise)]
    lines = []
    for name in LOSSES | LATER:
        cells = []
        for noise in noises:
            found = runs.of(name, noise)
            cells += [f"{' / '.join(last_and_best(found))} ({len(found)})" if found else "-"]
        if set(cells) != {"-"}:
            lines.append([name, *cells])
    settings: dict[str, Any] = runs.rows[0]["settings"] if runs.rows else {}
    recipe_text = ", ".join(
        f"{name} {settings.get(name)}" for name in ("model", "samples", "optimizer", "lr", "epochs")
    )
    found_text = [
        [noise, name, spread(row["wrong_labels"]["by_probability"]["f1"] for row in runs.of(name, noise))]
        for noise in noises
        if noise != "no noise"
        for name in ("CE", "genCE", "MAE")
        if runs.of(name, noise)
    ]
    text = (
        f"# Fashion-MNIST with label noise\n\n{recipe_text}. Accuracy on clean test labels, %: last / best epoch, mean "
        "± standard deviation (seeds). Symmetric labels are redrawn among all classes, so that 90 % of the rate is "
        "wrong; asymmetric noise concerns half of the classes. `*`: with a logit bias. The rows after biTemp are of "
        "losses that came later than the paper's table, whose own figures were not at hand.\n\n"
        f"{table(['loss', *noises], lines)}\n\n"
        "Wrong labels among those with the lowest mean probability in the first third of the epochs, as many as there "
        f"are: F1, %\n\n{table(['noise', 'loss', 'F1'], found_text)}\n"
    )
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    plot(folder / f"{NAME}.png", lambda figure: _draw(figure, runs, noises), (13, 8))


def _draw(figure: Any, runs: Runs, noises: list[str]) -> None:
    *axes, last = figure.subplots(2, 3).flatten()
    for ax, noise in zip(axes, noises, strict=False):
        for name in LOSSES:
            if found := runs.of(name, noise):
                curve = [100 * sum(v) / len(v) for v in zip(*(row["top1"] for row in found), strict=True)]
                ax.plot(range(1, len(curve) + 1), curve, label=name, color="black" if name == "CE" else None)
        ax.set(title=noise, xlabel="epoch", ylabel="accuracy on clean test labels, %")
        ax.grid(alpha=0.3)
    last.axis("off")
    last.legend(*axes[0].get_legend_handles_labels(), loc="center")
