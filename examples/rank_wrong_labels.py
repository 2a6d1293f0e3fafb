"""Rank labels by how suspicious they are, while training, and compare with rankings that cost extra trainings.

    python examples/rank_wrong_labels.py

plants wrong labels in scikit-learn's digits (10, 20 and 40 % of the labels redrawn at random) and asks each method for
as many rows as are wrong, so that precision, recall and F1 are the same number for a ranking. An OutlierTracker is fed
in one ordinary training: with the probability of every row's label over the first third of the epochs, and with the
mask and the scores of a Z-Error loss after that. For comparison the same network is trained five times more to get
out-of-fold probabilities, which are ranked as they are and by cleanlab (if it is installed). Three minutes on one
core. Needs ``pip install rich scikit-learn``.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.demo import compare_flags, corrupt_labels, load_data, make_model, mean_and_std, one_thread

NOISE = (0.1, 0.2, 0.4)
NUM_CLASSES = 10
BATCH_SIZE = 128
FOLDS = 5
Z_ERROR = "Z-Error on "


def make_loss(name: str) -> nn.Module:
    """Z-Error with the settings of the demo, around a base loss, or that loss alone."""
    base = name.removeprefix(Z_ERROR)
    if base == name:
        return fl.LOSSES[name].module()
    return fl.ZErrorCrossEntropyLoss(
        1.0, statistic="prob", base=base, sided="lower", running=True, num_classes=NUM_CLASSES
    )


@one_thread()
def train(
    loss_name: str, inputs: Tensor, target: Tensor, epochs: int, seed: int
) -> tuple[nn.Module, fl.OutlierTracker]:
    """Train with a tracker that sees probabilities in the first third of the epochs, then masks and scores."""
    generator = torch.Generator().manual_seed(seed)
    model, loss = make_model(seed), make_loss(loss_name)
    early = max(1, epochs // 3)
    masks = isinstance(loss, fl.ZErrorCrossEntropyLoss)
    schedule = fl.ThresholdSchedule(loss, end=1.0, steps=early) if masks else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    tracker = fl.OutlierTracker(len(target))
    for epoch in range(epochs):
        for rows in torch.randperm(len(target), generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad(set_to_none=True)
            logits = model(inputs[rows])
            if masks:
                value, mask, scores = loss(logits, target[rows], return_mask=True)
            else:
                value = loss(logits, target[rows])
            value.backward()
            optimizer.step()
            if epoch < early:
                tracker.update(rows, row_statistics=fl.row_statistics(logits, target[rows]))
            elif masks:
                tracker.update(rows, mask, scores)
        if schedule is not None:
            schedule.step()
    return model, tracker


def out_of_fold(inputs: Tensor, target: Tensor, epochs: int, seed: int) -> Tensor:
    """Probabilities ``(rows, classes)`` from networks that have not seen the row."""
    probs = torch.zeros(len(target), NUM_CLASSES)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for seen, held_out in folds.split(inputs.numpy(), target.numpy()):
        model, _ = train("cross_entropy", inputs[seen], target[seen], max(1, epochs // 3), seed)
        with torch.no_grad():
            probs[held_out] = model(inputs[held_out]).softmax(1)
    return probs


def find(noise: float, epochs: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The rows that each method names, and the mask of the wrong labels."""
    data = load_data()
    generator = torch.Generator().manual_seed(seed)
    target = corrupt_labels(data.train_target, NUM_CLASSES, noise, generator)
    wrong = target != data.train_target
    count = int(wrong.sum())
    found = {}
    for loss_name in ("cross_entropy", "gce", Z_ERROR + "cross_entropy", Z_ERROR + "gce"):
        _, tracker = train(loss_name, data.train_inputs, target, epochs, seed)
        label = loss_name.replace("cross_entropy", "CE")
        found[f"{label}: rank()"] = tracker.rank()[:count]
        if loss_name.startswith(Z_ERROR):
            found[f'{label}: rank(by="score")'] = tracker.rank(by="score")[:count]
            found[f"{label}: flagged(0.5)"] = tracker.flagged(0.5)
    probs = out_of_fold(data.train_inputs, target, epochs, seed)
    of_label = probs.gather(1, target[:, None]).squeeze(1)
    found[f"out of fold, {FOLDS} trainings"] = of_label.argsort()[:count]
    return found | _cleanlab(target, probs, count), wrong


def _cleanlab(target: Tensor, probs: Tensor, count: int) -> dict[str, Tensor]:
    if importlib.util.find_spec("cleanlab") is None:
        return {}
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    quality = get_label_quality_scores(target.numpy(), probs.numpy(), method="normalized_margin")
    issues = find_label_issues(target.numpy(), probs.numpy(), n_jobs=1)
    return {
        "cleanlab, normalized margin": torch.as_tensor(quality.argsort()[:count].copy()),
        "cleanlab, find_label_issues": torch.as_tensor(issues).nonzero().flatten(),
    }


CONCLUSION = (
    "rank(): mean probability of the label over the first third of one training; it costs one read of the logits, "
    "where out-of-fold probabilities cost five trainings more. flagged() and cleanlab's find_label_issues decide for "
    "themselves how many rows to name; all others were told how many labels are wrong."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with command-line arguments (``sys.argv`` by default)."""
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one noise level, one seed, few epochs: seconds")
    options = parser.parse_args(argv)
    noises, seeds, epochs = ((0.2,), range(1), 9) if options.quick else (NOISE, range(3), 30)
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False, title="Rows named against the planted wrong labels")
    for heading, side in (
        ("noise", "right"),
        ("method", "left"),
        *((h, "right") for h in ("precision", "recall", "F1")),
    ):
        table.add_column(heading, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for noise in track(noises, "training", console=console, transient=True):
        runs = [find(noise, epochs, seed) for seed in seeds]
        for method in runs[0][0]:
            scores = [compare_flags(found[method], wrong) for found, wrong in runs]
            spreads = (mean_and_std(column, digits=2) for column in zip(*scores, strict=True))
            columns = (spread.replace(" +- ", "±") for spread in spreads)  # fits into 80 columns
            table.add_row(f"{noise:.0%}", method, *columns)
        table.add_section()
    console.print(table)
    repeats = f"means of {len(seeds)} seeds ± standard deviation" if len(seeds) > 1 else "one seed"
    console.print(f"{epochs} epochs; {repeats}.")
    console.print(CONCLUSION)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
