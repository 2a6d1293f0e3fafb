"""The main job on real data: train on partly wrong labels with several losses and compare them.

``python -m fused_losses demo`` trains a small network on scikit-learn's handwritten digits after replacing
part of the training labels at random, prints test accuracy and cost of each loss, and saves plot and numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_losses as fl
from fused_losses.calibration import solve_logit_bias

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_arguments", "main", "run"]

NUM_CLASSES = 10
DEFAULT_LOSSES = "ce,mae,mae*,gce*,agce*"
ALIASES = {"ce": "cross_entropy"}
AUTO_BIAS_NOTE = (
    '* = logit_bias="auto", here {:.2f}: a head start for the labelled class, in training only. Bounded '
    "losses need it with many classes; with few it helps where a loss would never learn one of them."
)
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


class Digits(NamedTuple):
    """Scaled pixels (rows, 64) and labels (rows,) of the two halves of the data."""

    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor


@dataclass(frozen=True)
class Recipe:
    """What is the same for every loss."""

    noise: float
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class LossChoice:
    """A loss as asked for: name in the output, stem in the registry, and whether the bias is on."""

    label: str
    stem: str
    auto_bias: bool

    @property
    def function_options(self) -> dict[str, float]:
        """Options of the functional forms; they take the number that the module works out from "auto"."""
        return {"logit_bias": max(0.0, solve_logit_bias(NUM_CLASSES))} if self.auto_bias else {}

    def module(self) -> nn.Module:
        """A new module with its default parameters."""
        options: dict[str, Any] = {"logit_bias": "auto"} if self.auto_bias else {}
        return fl.LOSSES[self.stem].module(**options)


@dataclass
class Result:
    """Test accuracy per seed and epoch of one loss, and microseconds per step of the loss alone."""

    choice: LossChoice
    accuracy: list[list[float]]
    fused_us: float
    plain_us: float

    @property
    def best(self) -> list[float]:
        """Highest test accuracy of each seed."""
        return [max(curve) for curve in self.accuracy]

    @property
    def last(self) -> list[float]:
        """Test accuracy of each seed after the last epoch."""
        return [curve[-1] for curve in self.accuracy]


def load_data(device: torch.device) -> Digits:
    """scikit-learn's digits, pixels scaled to [0, 1], 70 % for training; every run has the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    inputs, target = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        inputs / 16.0, target, test_size=0.3, stratify=target, random_state=0
    )
    return Digits(
        torch.as_tensor(train_x, dtype=torch.float32, device=device),
        torch.as_tensor(train_y, dtype=torch.int64, device=device),
        torch.as_tensor(test_x, dtype=torch.float32, device=device),
        torch.as_tensor(test_y, dtype=torch.int64, device=device),
    )


def corrupt_labels(target: Tensor, num_classes: int, noise: float, generator: torch.Generator) -> Tensor:
    """Replace each label, with probability ``noise``, by a class drawn uniformly from all ``num_classes``.

    The draw may hit the right class, so a share of ``noise * (num_classes - 1) / num_classes`` becomes wrong.
    This is the symmetric noise of arXiv 2306.05497. ``target`` stays as it is; ``generator`` is a CPU one.
    """
    replace = torch.rand(target.shape, generator=generator) < noise
    random_class = torch.randint(num_classes, target.shape, generator=generator, dtype=target.dtype)
    return torch.where(replace.to(target.device), random_class.to(target.device), target)


def make_model(seed: int) -> nn.Module:
    """The 64-512-512-10 network: large enough to learn wrong labels by heart. Global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, NUM_CLASSES))


def evaluate(model: nn.Module, inputs: Tensor, target: Tensor) -> float:
    """Share of rows whose largest logit is the target. No logit bias: it belongs to training."""
    with torch.no_grad():
        return float((model(inputs).argmax(dim=1) == target).float().mean())


def train_one(loss: nn.Module, data: Digits, recipe: Recipe, seed: int, on_epoch: Callable[[], object]) -> list[float]:
    """Train one network and return its test accuracy after each epoch.

    The seed decides the wrong labels, the initial weights and the order of the batches, so that losses with
    the same seed are compared on equal terms.
    """
    device = data.train_inputs.device
    generator = torch.Generator().manual_seed(seed)
    target = corrupt_labels(data.train_target, NUM_CLASSES, recipe.noise, generator)
    model, loss = make_model(seed).to(device), loss.to(device)
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=1e-3)
    accuracy = []
    for _ in range(recipe.epochs):
        order = torch.randperm(len(target), generator=generator).to(device)
        for start in range(0, len(order), recipe.batch_size):
            rows = order[start : start + recipe.batch_size]
            optimizer.zero_grad(set_to_none=True)
            loss(model(data.train_inputs[rows]), target[rows]).backward()
            optimizer.step()
        accuracy.append(evaluate(model, data.test_inputs, data.test_target))
        on_epoch()
    return accuracy


def time_step(choice: LossChoice, batch_size: int, device: torch.device, rounds: int = 300) -> tuple[float, float]:
    """Median microseconds of forward + backward of the loss alone: fused and plain PyTorch, in turn."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch_size, NUM_CLASSES, generator=generator).to(device).requires_grad_()
    target = torch.randint(NUM_CLASSES, (batch_size,), generator=generator).to(device)
    entry = fl.LOSSES[choice.stem]
    options: dict[str, Any] = {**choice.function_options}

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, samples in zip((entry.function, entry.reference), seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            torch.autograd.grad(function(logits, target, **options), logits)
            synchronize()
            samples.append(time.perf_counter() - start)
    fused, plain = (statistics.median(samples) * 1e6 for samples in seconds)
    return fused, plain


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Test accuracy per epoch: the mean over seeds as a line, smallest to largest as a band."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # Lightness rises from one line to the next and line styles differ, so the plot survives printing in grey.
    colours = [colormaps["viridis"](0.85 * index / max(1, len(results) - 1)) for index in range(len(results))]
    styles = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3))]
    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (result, colour) in enumerate(zip(results, colours, strict=True)):
        by_epoch = list(zip(*result.accuracy, strict=True))
        epochs = range(1, len(by_epoch) + 1)
        mean, low, high = ([of(seeds) for seeds in by_epoch] for of in (statistics.fmean, min, max))
        axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            epochs,
            mean,
            color=colour,
            linestyle=styles[index % len(styles)],
            linewidth=2.0,
            marker="o" if len(by_epoch) == 1 else None,
            label=f"{result.choice.label}  {mean[-1]:.3f}",
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (clean labels)")
    axes.set_title(f"{title}\nline: mean over seeds, band: lowest to highest seed", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="loss, last epoch", handlelength=4.0, frameon=False)
    figure.savefig(path)


def save_numbers(results: Sequence[Result], settings: dict[str, Any], path: Path) -> None:
    """Everything behind the table and the plot, as JSON."""
    losses = [
        {
            "name": result.choice.label,
            "stem": result.choice.stem,
            **result.choice.function_options,
            "test_accuracy_per_seed_and_epoch": result.accuracy,
            "best_test_accuracy": result.best,
            "last_test_accuracy": result.last,
            "fused_microseconds_per_step": result.fused_us,
            "plain_microseconds_per_step": result.plain_us,
        }
        for result in results
    ]
    path.write_text(json.dumps({"settings": settings, "losses": losses}, indent=1) + "\n", encoding="utf-8")


def report(console: Console, results: Sequence[Result], batch_size: int) -> None:
    """Print the table of results."""
    from rich import box
    from rich.table import Table

    title = f"Test accuracy; forward + backward of the loss on {batch_size} x {NUM_CLASSES} logits"
    table = Table(box=box.SIMPLE, title=title)
    table.add_column("loss")
    for heading in ("best epoch", "last epoch", "fused", "plain", "plain/fused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.choice.label,
            _mean_and_std(result.best),
            _mean_and_std(result.last),
            f"{result.fused_us:.0f} us",
            f"{result.plain_us:.0f} us",
            f"{result.plain_us / result.fused_us:.1f}x",
        )
    console.print(table)


def _mean_and_std(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to a parser."""

    def add(flag: str, parse: Callable[[str], object], default: object, metavar: str, text: str) -> None:
        parser.add_argument(flag, type=parse, default=default, metavar=metavar, help=f"{text} (default: %(default)s)")

    names = (
        "losses, separated by commas; `python -m fused_losses info` lists them, ce is cross_entropy. A "
        'trailing star means logit_bias="auto"; quote it against the shell: --losses "ce,gce,gce*"'
    )
    out = "the plot (.png) or a folder for it; the numbers are saved next to it as .json"
    add("--losses", _parse_losses, DEFAULT_LOSSES, "NAMES", names)
    add("--noise", _parse_noise, 0.4, "P", "probability that a training label is redrawn at random")
    add("--epochs", _parse_count, 100, "N", "passes over the training data")
    add("--seeds", _parse_count, 3, "N", "number of repeats")
    add("--batch-size", _parse_count, 128, "N", "rows in a step")
    add("--device", _parse_device, "cpu", "NAME", "cpu, cuda or cuda:INDEX")
    add("--out", _parse_out, "fused_losses_demo.png", "PATH", out)


def _parse_losses(text: str) -> list[LossChoice]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one loss")
    return list(dict.fromkeys(map(_parse_loss, names)))


def _parse_loss(name: str) -> LossChoice:
    plain = name.removesuffix("*")
    key = plain.lower().removesuffix("_loss")
    modules = {entry.module.__name__.lower(): stem for stem, entry in fl.LOSSES.items()}
    stem = ALIASES.get(key, modules.get(key, key))
    if stem not in fl.LOSSES:
        raise argparse.ArgumentTypeError(f"unknown loss {plain!r}; known: {', '.join(['ce', *fl.LOSSES])}")
    auto_bias = name.endswith("*")
    if auto_bias and "logit_bias" not in inspect.signature(fl.LOSSES[stem].function).parameters:
        raise argparse.ArgumentTypeError(f"{plain!r} has no logit_bias, so {name!r} means nothing")
    label = "CE" if stem == "cross_entropy" else fl.LOSSES[stem].module.__name__.removesuffix("Loss")
    return LossChoice(label + "*" * auto_bias, stem, auto_bias)


def _parse_noise(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= float(text) <= 1.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
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


def run(args: argparse.Namespace) -> int:
    """Train, measure, print and save; ``args`` comes from a parser that `add_arguments` filled."""
    missing = [name for module, name in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"the demo needs {', '.join(missing)}: pip install 'fused_losses[demo]'")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot create the folder of --out: {error}") from None
    console = Console(highlight=False, markup=False)
    recipe = Recipe(args.noise, args.epochs, args.batch_size)
    data = load_data(args.device)
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(args.losses) * args.seeds * args.epochs)
        for choice in args.losses:
            progress.update(task, description=choice.label)
            fused_us, plain_us = time_step(choice, args.batch_size, args.device)
            accuracy = [
                train_one(choice.module(), data, recipe, seed, lambda: progress.advance(task))
                for seed in range(args.seeds)
            ]
            results.append(Result(choice, accuracy, fused_us, plain_us))

    report(console, results, args.batch_size)
    corruption = f"{args.noise:.0%} of the training labels redrawn at random"
    console.print(
        f"{len(data.train_target)} training rows, {corruption}; {len(data.test_target)} test rows with clean "
        f"labels; {args.epochs} epochs; {args.seeds} seed(s), mean +- standard deviation. Only clean test "
        "labels can tell which epoch was best; the last one is what training gives you."
    )
    if any(choice.auto_bias for choice in args.losses):
        console.print(AUTO_BIAS_NOTE.format(max(0.0, solve_logit_bias(NUM_CLASSES))))
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
