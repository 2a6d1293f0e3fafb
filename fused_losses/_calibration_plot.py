"""The plot behind the choice of bias and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_mean_target_error(
    losses: str | nn.Module | Sequence[str | nn.Module | Callable[..., Tensor]] | Mapping[str, Any],
    num_classes: int | Iterable[int],
    z: Tensor | npt.NDArray[Any] | None = None,
    *,
    initial_logits: Tensor | npt.NDArray[Any] | None = None,
) -> Figure:
    """Plots the mean derivative of a loss against the logit of the labelled class, over a histogram of initial logits.

    A loss can learn where its curve is away from 0 under the histogram. Curves that leave the histogram as the number
    of classes grows show why bounded losses stop learning. ``logit_bias`` shifts a curve to the left.

    Args:
        losses: a loss as :func:`fused_losses.calibration.mean_target_error` takes it, several of them, or a dict from
            label to loss.
        num_classes: one number of classes or several; there is a curve for each loss and number.
        z: logits of the labelled class ``(n,)`` to draw at; by default 121 from -5 to 10.
        initial_logits: logits of an untrained network, any shape, for the histogram; by default N(0, 1), which the
            curves assume of the other classes anyway.

    Returns:
        A matplotlib ``Figure``; ``.savefig(path)`` writes it. No window is opened.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or an argument of ``mean_target_error`` is out of range.

    Example:
        >>> losses = {"MAE": "mae", "MAE with bias": fl.MAELoss(logit_bias="auto")}
        >>> figure = plot_mean_target_error(losses, 100, z=np.array([-2.0, 0.0, 2.0]))
        >>> figure.savefig("mae.png")  # doctest: +SKIP

    Source: 2306.05497, Figures 1 to 3. The sign is that of the derivative: below 0, descent raises the logit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_mean_target_error needs matplotlib: pip install matplotlib") from error
    from fused_losses.calibration import mean_target_error  # here: calibration imports this file

    named = _named(losses)
    counts = list(num_classes) if isinstance(num_classes, Iterable) else [num_classes]
    if not named or not counts:
        raise ValueError(f"losses and num_classes must not be empty, got {losses!r} and {num_classes!r}")
    positions = np.linspace(-5.0, 10.0, 121) if z is None else _flat(z)

    figure = Figure(figsize=(7.0, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    styles = ["-", "--", "-.", ":"]  # one per loss; the colour tells the number of classes
    for row, (label, loss) in enumerate(named.items()):
        for column, count in enumerate(counts):
            axes.plot(
                positions,
                mean_target_error(loss, count, positions),
                color=f"C{(column if len(counts) > 1 else row) % 10}",
                linestyle=styles[(row if len(counts) > 1 else 0) % len(styles)],
                label=f"{label}, K = {count}",
            )
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_xlabel("logit of the labelled class")
    axes.set_ylabel("mean error, dL / d logit")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)

    initial = _normal_sample() if initial_logits is None else _flat(initial_logits)
    histogram = axes.twinx()
    heights, _, _ = histogram.hist(initial, bins=40, density=True, color="grey", alpha=0.25)
    histogram.set_ylim(0.0, 1.6 * np.max(heights))  # the curves stay readable above it
    histogram.set_ylabel("density of initial logits", color="grey")
    histogram.set_yticks([])
    return figure


def _named(losses: Any) -> dict[str, Any]:
    if isinstance(losses, Mapping):
        return dict(losses)
    if isinstance(losses, str) or callable(losses):
        losses = [losses]
    return {_label(loss): loss for loss in losses}


def _label(loss: Any) -> str:
    if isinstance(loss, nn.Module):
        return repr(loss)
    return loss if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))


def _flat(values: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.detach().double().cpu().numpy().ravel() if isinstance(values, Tensor) else np.ravel(values)


def _normal_sample() -> npt.NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((index + 0.5) / 4000) for index in range(4000)])
