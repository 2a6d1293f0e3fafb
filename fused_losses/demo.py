"""``python -m fused_losses demo``: trains on partly wrong labels with several losses and compares them.

It trains a small network on scikit-learn's handwritten digits after replacing part of the training labels at random,
prints test accuracy and cost of each loss and how many wrong labels were found, and saves a plot and the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_losses as fl
from fused_losses._demo_data import (
    NUM_CLASSES,
    Digits,
    compare_flags,
    corrupt_labels,
    evaluate,
    load_data,
    make_model,
    one_thread,
)
from fused_losses._demo_losses import LossChoice, anneal_threshold, parse_losses
from fused_losses._demo_report import (
    FLAG_RATE,
    Result,
    mean_and_std,
    plot,
    print_accuracy,
    print_detection,
    print_notes,
    save_numbers,
)
from fused_losses.diagnostics import OutlierTracker

__all__ = [
    "add_arguments",
    "check_writable",
    "compare_flags",
    "corrupt_labels",
    "evaluate",
    "load_data",
    "main",
    "make_model",
    "mean_and_std",
    "one_thread",
    "run",
]

DEFAULT_LOSSES = "ce,gce,ece_mae,nce_agce,mae,hem,z_ce,z_ce_default"
RANKED_SHARE = 3  # one part in so many of the epochs, the first, in which labels are ranked
LARGEST = 1_000_000  # of epochs, seeds and rows in a step
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


@dataclass(frozen=True)
class Recipe:
    """What is the same for every loss."""

    noise: float
    epochs: int
    batch_size: int


def plant_wrong_labels(data: Digits, noise: float, seed: int) -> tuple[Tensor, torch.Generator]:
    """The labels to train on, and the generator that goes on to order the batches."""
    generator = torch.Generator().manual_seed(seed)
    return corrupt_labels(data.train_target, NUM_CLASSES, noise, generator), generator


@one_thread()
def train_one(
    loss: nn.Module,
    data: Digits,
    recipe: Recipe,
    seed: int,
    on_epoch: Callable[[], object],
    tracker: OutlierTracker | None = None,
) -> list[float]:
    """Train one network and return its test accuracy after each epoch.

    The seed decides the wrong labels, the initial weights and the order of the batches, so that losses with
    the same seed are compared on equal terms. ``tracker`` is told how probable the labels are in the first third of
    the epochs, and which rows a Z-Error loss dropped in all of them.
    """
    device = data.train_inputs.device
    target, generator = plant_wrong_labels(data, recipe.noise, seed)
    model, loss = make_model(seed).to(device), loss.to(device)
    schedule = anneal_threshold(loss, recipe.epochs)
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=1e-3)
    accuracy = []
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(target), generator=generator).to(device)
        for start in range(0, len(order), recipe.batch_size):
            rows = order[start : start + recipe.batch_size]
            optimizer.zero_grad(set_to_none=True)
            logits = model(data.train_inputs[rows])
            mask = scores = probabilities = None
            if tracker is not None and schedule is not None:
                value, mask, scores = loss(logits, target[rows], return_mask=True)
            else:
                value = loss(logits, target[rows])
            if tracker is not None and RANKED_SHARE * epoch < recipe.epochs:
                probabilities = fl.row_statistics(logits, target[rows])
            if tracker is not None and not (probabilities is None and mask is None):
                tracker.update(rows, mask, scores, row_statistics=probabilities)
            value.backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()
        accuracy.append(evaluate(model, data.test_inputs, data.test_target))
        on_epoch()
    return accuracy


@one_thread()
def time_step(choice: LossChoice, batch_size: int, device: torch.device, rounds: int = 300) -> tuple[float, float]:
    """Median microseconds of forward + backward of the loss alone: fused and plain PyTorch, in turn.

    On the CPU of the thread's own time, so that other programs do not count.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch_size, NUM_CLASSES, generator=generator).to(device).requires_grad_()
    target = torch.randint(NUM_CLASSES, (batch_size,), generator=generator).to(device)
    options = choice.function_options

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, samples in zip((choice.fused, choice.plain), seconds, strict=True):
            synchronize()
            start = clock()
            torch.autograd.grad(function(logits, target, **options), logits)
            synchronize()
            samples.append(clock() - start)
    fused, plain = (statistics.median(samples) * 1e6 for samples in seconds)
    return fused, plain


def measure(choice: LossChoice, data: Digits, recipe: Recipe, seeds: int, on_epoch: Callable[[], object]) -> Result:
    """Time one loss and train with it once per seed."""
    device = data.train_inputs.device
    result = Result(choice, [], *time_step(choice, recipe.batch_size, device))
    for seed in range(seeds):
        tracker = OutlierTracker(len(data.train_target), device=device)
        result.accuracy.append(train_one(choice.module(), data, recipe, seed, on_epoch, tracker))
        target, _ = plant_wrong_labels(data, recipe.noise, seed)
        wrong = target != data.train_target
        result.ranking.append(compare_flags(tracker.rank()[: int(wrong.sum())], wrong))
        if choice.masks:
            result.detection.append(compare_flags(tracker.flagged(FLAG_RATE), wrong))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to a parser."""

    def add(flag: str, parse: Callable[[str], object], default: object, metavar: str, text: str) -> None:
        parser.add_argument(flag, type=parse, default=default, metavar=metavar, help=f"{text} (default: %(default)s)")

    names = (
        "losses, separated by commas; `python -m fused_losses info` lists them, ce is cross_entropy. z_ce is "
        "ZErrorCrossEntropyLoss with settings for many wrong labels, z_ce_default the same with its defaults. A "
        'trailing star means logit_bias="auto"; quote it against the shell: --losses "ce,gce,gce*"'
    )
    out = "the plot (.png) or a folder for it; the numbers are saved next to it as .json"
    add("--losses", parse_losses, DEFAULT_LOSSES, "NAMES", names)
    add("--noise", _parse_noise, 0.4, "P", "probability that a training label is redrawn at random")
    add("--epochs", _parse_count, 60, "N", "passes over the training data")
    add("--seeds", _parse_count, 3, "N", "number of repeats")
    add("--batch-size", _parse_count, 128, "N", "rows in a step")
    add("--device", _parse_device, "cpu", "NAME", "cpu, cuda or cuda:INDEX")
    add("--out", _parse_out, "fused_losses_demo.png", "PATH", out)


def _parse_noise(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")


def _parse_count(text: str) -> int:
    # The length first: converting a text of thousands of digits raises another error.
    if not text.isdecimal() or len(text) > 20 or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {LARGEST}, got {text[:24]!r}")
    return int(text)


def _parse_device(text: str) -> torch.device:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:INDEX, got {text!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r} is not there: {torch.cuda.device_count()} CUDA devices found")
    return torch.device(text)


def _parse_out(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() == ".png" and not path.is_dir():
        return path
    if path.suffix and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a .png file or a folder, got {text!r}")
    return path / "fused_losses_demo.png"


def check_writable(option: str, *paths: Path) -> None:
    """Ends the program with one line unless the files can be written; makes their folders, leaves files alone."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"cannot create the folder of {option}: {error}") from None
        existed = path.exists()
        try:
            path.open("ab").close()
            if not existed:
                path.unlink()
        except OSError as error:
            raise SystemExit(f"cannot write {option}: {error}") from None


def run(args: argparse.Namespace) -> int:
    """Train, measure, print and save; ``args`` comes from a parser that `add_arguments` filled."""
    missing = [name for module, name in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"the demo needs {', '.join(missing)}: pip install {' '.join(missing)}")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    check_writable("--out", args.out, args.out.with_suffix(".json"))
    console = Console(highlight=False, markup=False)
    recipe = Recipe(args.noise, args.epochs, args.batch_size)
    data = load_data(args.device)
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(args.losses) * args.seeds * args.epochs)
        for choice in args.losses:
            progress.update(task, description=choice.label)
            results.append(measure(choice, data, recipe, args.seeds, lambda: progress.advance(task)))
            if not console.is_terminal:  # no bar is shown there, and minutes of silence look like a hang
                console.print(f"{choice.label}: trained, {len(results)} of {len(args.losses)} losses")

    corruption = f"{args.noise:.0%} of the training labels redrawn at random"
    wrong = args.noise * (NUM_CLASSES - 1) / NUM_CLASSES
    console.print(
        f"\nHandwritten digits: {len(data.train_target)} training rows, {corruption}, so that about {wrong:.0%} of the "
        f"labels are wrong; {len(data.test_target)} test rows with right labels; {args.epochs} epochs. "
        f"{f'Means of {args.seeds} seeds +- standard deviation.' if args.seeds > 1 else 'One seed.'}"
    )
    print_accuracy(console, results, args.batch_size, args.device)
    print_detection(console, results)
    print_notes(console, results)
    plot(results, f"Handwritten digits, {corruption}", args.out)
    versions = {"torch": torch.__version__, "fused_losses": fl.__version__}
    settings = {**asdict(recipe), "seeds": args.seeds, "device": str(args.device), **versions}
    save_numbers(results, settings, args.out.with_suffix(".json"))
    console.print(f"plot: {args.out}\nnumbers: {args.out.with_suffix('.json')}", soft_wrap=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with command-line arguments (``sys.argv`` by default)."""
    parser = argparse.ArgumentParser(prog="python -m fused_losses demo", description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))
