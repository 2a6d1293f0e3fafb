"""Z-Error for regression beside squared, absolute, Huber's and Tukey's error, with spoilt targets.

scikit-learn's Friedman 1 (ten inputs, five of them matter, noise of standard deviation 1), 2,000 training rows, targets
standardised by their median and 1.4826 times the median absolute deviation, MLP 64-64, Adam 1e-3, batch 128, 40 epochs.
Spoilt targets are out of range (6 deviations up or down) or in range (another row's target). Huber's delta is 1.345,
Tukey's c 4.685, both times a residual scale that is the batch's median absolute deviation; "Huber, delta 1" is torch's
`nn.HuberLoss()` as it is. Z-Error's threshold comes down from 10 in the first third of the epochs, with statistics over
batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_losses as fl
from benchmarks.training.experiments.runs import Runs, plot, spread, table
from benchmarks.training.options import Options

NAME = "robust_regression"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)
KINDS = ("out of range", "in range")
ROWS, EPOCHS, BATCH_SIZE = 2_000, 40, 128
Loss = Callable[[Tensor, Tensor], Tensor]


def _scaled(residual: Tensor) -> Tensor:
    """Residuals in units of their spread, which is a constant for autograd."""
    return residual / (1.4826 * residual.detach().abs().median()).clamp(min=1e-6)


def huber(input: Tensor, target: Tensor) -> Tensor:
    """Squared up to 1.345 deviations, then linear (Huber 1964)."""
    u = _scaled(input - target).abs()
    return torch.where(u <= 1.345, 0.5 * u * u, 1.345 * (u - 0.6725)).mean()


def tukey(input: Tensor, target: Tensor) -> Tensor:
    """Constant from 4.685 deviations on (Beaton and Tukey 1974)."""
    v = 1.0 - (_scaled(input - target) / 4.685).square().clamp(max=1.0)
    return (4.685**2 / 6.0) * (1.0 - v**3).mean()


LOSSES: dict[str, Callable[[], Loss]] = {
    "squared": nn.MSELoss,
    "absolute": nn.L1Loss,
    "Huber": lambda: huber,
    "Huber, delta 1": nn.HuberLoss,
    "Tukey": lambda: tukey,
    "Z, target, 2": lambda: fl.ZMSELoss(2.0, running=True),
    "Z, residual, 2": lambda: fl.ZMSELoss(2.0, "residual", running=True),
    "Z, residual, 1.5": lambda: fl.ZMSELoss(1.5, "residual", running=True),
    "Z, loss, 2": lambda: fl.ZMSELoss(2.0, "loss", running=True),
}


def measure(runs: Runs, seeds: int, full: bool) -> None:
    """Trains what is missing; the size is the same with ``full``."""
    for seed in range(seeds):
        for kind in KINDS:
            for share in SHARES:
                for name, loss in LOSSES.items():
                    group = f"{kind} {share:g}"
                    if runs.due(name, group, seed, Options().settings()):
                        error = train(loss(), kind, share, seed)
                        runs.add({"label": name, "group": group, "seed": seed, "settings": {}, "error": error})


def train(loss: Loss, kind: str, share: float, seed: int) -> list[float]:
    """Root mean squared error on clean test targets after each epoch, in units of the noise."""
    from sklearn.datasets import make_friedman1

    inputs, targets = map(torch.as_tensor, make_friedman1(2 * ROWS, noise=1.0, random_state=seed))
    inputs, targets = 2.0 * inputs.float() - 1.0, targets.float()
    centre = targets[:ROWS].median()
    scale = 1.4826 * (targets[:ROWS] - centre).abs().median()
    targets = (targets - centre) / scale
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(ROWS, generator=generator)[: round(share * ROWS)]
    given = targets[:ROWS].clone()
    if kind == "in range":
        given[wrong] = targets[torch.randint(ROWS, (len(wrong),), generator=generator)]
    else:
        given[wrong] += 6.0 * torch.randint(0, 2, (len(wrong),), generator=generator).mul(2).sub(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    scheduler = fl.ThresholdSchedule(loss, 10.0, loss.threshold, EPOCHS // 3) if isinstance(loss, fl.ZMSELoss) else None
    errors = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(ROWS, generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss(model(inputs[rows]).squeeze(1), given[rows]).backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        with torch.no_grad():
            test = model(inputs[ROWS:]).squeeze(1) - targets[ROWS:]
        errors.append(round(float(test.square().mean().sqrt() * scale), 4))
    return errors


def write(runs: Runs, folder: Path) -> None:
    """A table for each kind of spoilt targets."""
    parts = [f"# Robust regression\n\n{(__doc__ or '').split(chr(10), 2)[2].strip()}\n"]
    seeds = max((len(runs.of("squared", f"{kind} {share:g}")) for kind in KINDS for share in SHARES), default=0)
    for kind in KINDS:
        lines = []
        for name in LOSSES:
            cells = [
                spread((row["error"][-1] for row in runs.of(name, f"{kind} {share:g}")), 1.0, 2) for share in SHARES
            ]
            lines.append([name, *cells])
        head = ["loss", *(f"{100 * share:g} %" for share in SHARES)]
        parts.append(
            f"## Spoilt targets {kind}\n\nRoot mean squared error on clean test targets after the last epoch, in "
            f"units of the noise (1.00 is perfect), {seeds} seeds.\n\n{table(head, lines)}\n"
        )
    (folder / f"{NAME}.md").write_text("\n".join(parts), encoding="utf-8")
    plot(folder / f"{NAME}.png", lambda figure: _draw(figure, runs), (10, 4))


def _draw(figure: Any, runs: Runs) -> None:
    axes = figure.subplots(1, len(KINDS), sharey=True)
    for ax, kind in zip(axes, KINDS, strict=True):
        for name in LOSSES:
            points = []
            for share in SHARES:
                if found := runs.of(name, f"{kind} {share:g}"):
                    points.append((100 * share, sum(row["error"][-1] for row in found) / len(found)))
            if points:
                style = "--" if name.startswith("Z") else "-"
                ax.plot(*zip(*points, strict=True), style, marker=".", label=name)
        ax.set(title=f"spoilt targets {kind}", xlabel="spoilt targets, %", ylim=(1.0, 4.0))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test error / noise")
    axes[0].legend(fontsize=8)
