"""Thresholds and logit biases that change during training.

The value is ``start + (end - start) * f``, where ``f`` grows from 0 to 1 with the calls of ``step``:

* ``mode="linear"``: ``f = k / steps`` after ``k`` calls, 1 from ``steps`` on;
* ``mode="cosine"``: ``f = (1 - cos(pi k / steps)) / 2``, flat at both ends;
* ``mode="peak"``: ``f = 1`` as soon as the metric given to ``step`` has passed its peak, which is when it has not
  improved for more than ``patience`` calls in a row. Until then ``f = 0``, or linear if ``steps`` is given;
* ``mode="plateau"``: each time the metric has not improved for more than ``patience`` calls in a row, the distance to
  ``end`` is multiplied by ``factor``. A distance below 0.1 % of the whole becomes 0.

The constructor writes ``start`` into the loss Module. A float attribute becomes, once, a 0-dim float64 buffer on the
device of the Module's other tensors: from then on it is in ``module.state_dict()`` and moves with
``module.to(device)``. Writing it neither recompiles nor waits for the device, and a captured CUDA graph sees the new
value. Build the schedule before capturing a graph, before loading a ``state_dict``, and before the first call of a
compiled Module, which would compile again. A Module wrapped by ``torch.compile``, ``DataParallel``,
``DistributedDataParallel`` or ``FullyShardedDataParallel`` may be given as it is.

An attribute that is a tensor already is overwritten in place. If it has one value per class ``(C,)``, every class moves
from its own start to its own end, and a single number for ``start`` or ``end`` counts for all classes.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_losses._arrays import Numbers, as_tensor, check_keys
from fused_losses._parameters import Range, check_choice, check_number, finite, non_negative, positive, switch
from fused_losses._unwrap import owns, unwrap

__all__ = ["LogitBiasSchedule", "ThresholdSchedule", "get_sigma_threshold"]

_MODES = ("linear", "cosine", "peak", "plateau")
_PATIENCE = {"peak": 1, "plateau": 5}
_comparable = Range("be a number", lambda v: v == v)  # but NaN
_below_one = Range("satisfy 0 <= value < 1", lambda v: 0.0 <= v < 1.0)
_SNAP = 1e-3  # a rest of the way smaller than this share is skipped


def get_sigma_threshold(epoch: float, max_epochs: int, start_sigma: float = 100.0, end_sigma: float = 2.0) -> float:
    """The threshold of an epoch, moving linearly from ``start_sigma`` to ``end_sigma``.

    For Z-Error losses with a training loop of your own; :class:`ThresholdSchedule` does the same for a Module. The
    value is ``start_sigma + (end_sigma - start_sigma) * epoch / max_epochs``: loose while the network knows nothing,
    tight later.

    Args:
        epoch: epochs done, 0 for the first; fractions are fine. Clamped to [0, ``max_epochs``].
        max_epochs: epochs until ``end_sigma`` is reached, at least 1 and finite.
        start_sigma: threshold at epoch 0, in standard deviations, > 0 and finite. Of n rows none has ``|z| > (n - 1) /
            sqrt(n)``, which is 15.9 for 256 rows, so the default 100 drops nothing for most of the training. It is that
            of the paper's code; the paper's text says 10, which we recommend.
        end_sigma: threshold from ``max_epochs`` on, > 0 and finite.

    Returns:
        The threshold in standard deviations.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.

    Example:
        >>> get_sigma_threshold(5, 10, start_sigma=10.0)
        6.0

    Source: 2506.02154, sigma annealing. Deviation: the paper's formula is not clamped, so it passes ``end_sigma`` after
    ``max_epochs``, and divides by 0 for ``max_epochs=0``.
    """
    done, epochs = check_number("epoch", epoch), check_number("max_epochs", max_epochs)
    if not 1 <= epochs < math.inf:
        raise ValueError(f"max_epochs must be at least 1{' and finite' * (epochs == math.inf)}, got {max_epochs}")
    done = _comparable.pack("epoch", done)
    start = positive.pack("start_sigma", check_number("start_sigma", start_sigma))
    end = positive.pack("end_sigma", check_number("end_sigma", end_sigma))
    progress = min(max(done / epochs, 0.0), 1.0)
    return end if progress == 1.0 else start + (end - start) * progress


def _whole(name: str, value: Any, smallest: int, where: str = "") -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = smallest - 1
    if isinstance(value, bool) or number < smallest:
        raise ValueError(f"{name} must be an integer >= {smallest}{where}, got {value!r}")
    return number


class _Schedule:
    """``start + (end - start) * fraction`` in a buffer of a Module; :meth:`step` moves ``fraction`` from 0 to 1."""

    name: str  # of the Module's attribute
    rule: str  # completes the sentence "start must ..."
    about_inf = ""

    def __init__(
        self,
        module: nn.Module,
        start: Numbers | None,
        end: Numbers,
        steps: int | None,
        *,
        mode: str,
        factor: float,
        patience: int | None,
        min_delta: float,
        maximize: bool | None,
    ) -> None:
        check_choice("mode", mode, _MODES)
        if mode == "plateau" and steps is not None:
            raise ValueError(f"steps must be left out with mode='plateau', got {steps}")
        if steps is not None or mode in ("linear", "cosine"):
            steps = _whole("steps", steps, 1, f" with mode={mode!r}")
        factor = _below_one.pack("factor", check_number("factor", factor))
        patience = _PATIENCE.get(mode, 0) if patience is None else _whole("patience", patience, 0)
        min_delta = non_negative.pack("min_delta", check_number("min_delta", min_delta))
        maximize = mode == "peak" if maximize is None else bool(switch.pack("maximize", maximize))
        module = unwrap(module)
        self.module = module
        self.mode, self.steps, self.factor, self.patience = mode, steps, factor, patience
        self.min_delta, self.maximize = min_delta, maximize
        self.step_count, self.num_bad_steps, self.fraction = 0, 0, 0.0
        self.best = -math.inf if maximize else math.inf

        current = self._current()
        shape = current.shape if isinstance(current, Tensor) else torch.Size()
        self.start = self._checked("start", current if start is None else start, shape)
        self.end = self._checked("end", end, shape)
        if not isinstance(current, Tensor):
            self._make_buffer()
        self._write()

    @property
    def value(self) -> float | Tensor:
        """The present value: a float, or a float64 tensor ``(C,)`` if the Module has one value per class."""
        if self.fraction in (0.0, 1.0):  # both ends are exact, and may be inf
            now = self.end if self.fraction else self.start
        else:
            now = self.start + (self.end - self.start) * self.fraction
        return float(now) if now.dim() == 0 else now.clone()

    def step(self, metric: float | Tensor | None = None) -> None:
        """Moves on. Call it once per epoch, or per batch if ``steps`` counts batches.

        Args:
            metric: required with ``mode="peak"`` and ``"plateau"``, not taken by the others: the number to watch, such
                as the accuracy or the loss on validation data. NaN counts as no improvement. Under
                DistributedDataParallel give the same number on every rank.

        Raises:
            TypeError: ``metric`` is missing or no number, or given with a mode that does not watch one.
        """
        watching = self.mode in _PATIENCE
        if watching != (metric is not None):
            rule = "needs a metric" if watching else "takes no metric"
            raise TypeError(f"step() {rule} with mode={self.mode!r}, got {metric!r}")
        number = None if metric is None else check_number("metric", metric)
        self.step_count += 1
        if self.steps is not None and self.fraction < 1.0:
            progress = min(self.step_count / self.steps, 1.0)
            self.fraction = 0.5 - 0.5 * math.cos(math.pi * progress) if self.mode == "cosine" else progress
        if number is not None:
            self._watch(number)
        self._write()

    def _watch(self, metric: float) -> None:
        better = metric > self.best + self.min_delta if self.maximize else metric < self.best - self.min_delta
        if better:
            self.best, self.num_bad_steps = metric, 0
            return
        self.num_bad_steps += 1
        if self.num_bad_steps > self.patience:
            self.num_bad_steps = 0
            left = 0.0 if self.mode == "peak" else (1.0 - self.fraction) * self.factor
            self.fraction = 1.0 if left < _SNAP else 1.0 - left

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after :meth:`load_state_dict` on a schedule built with the same options."""
        return {
            "start": self.start.clone(),
            "end": self.end.clone(),
            "step_count": self.step_count,
            "fraction": self.fraction,
            "best": self.best,
            "num_bad_steps": self.num_bad_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave and writes the value into the Module.

        Raises:
            TypeError: it is no dictionary, or a value no number.
            ValueError: keys are missing or unknown, the values are for another number of classes, or a value cannot be.
        """
        expected = self.state_dict()
        check_keys(state_dict, expected)
        loaded: dict[str, Any] = {}
        for name in ("start", "end"):
            value, shape = as_tensor(f"state_dict[{name!r}]", state_dict[name]), expected[name].shape
            if value.shape != shape:
                raise ValueError(f"state_dict[{name!r}] must have shape {tuple(shape)}, got {tuple(value.shape)}")
            loaded[name] = self._checked(name, value, shape)
        for name in ("step_count", "num_bad_steps"):
            loaded[name] = _whole(name, state_dict[name], 0)
        fraction, best = (check_number(name, state_dict[name]) for name in ("fraction", "best"))
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must satisfy 0 <= value <= 1, got {fraction}")
        if fraction not in (0.0, 1.0) and not torch.stack((loaded["start"], loaded["end"])).isfinite().all():
            raise ValueError(f"fraction must be 0 or 1 where start or end is inf, got {fraction}")
        best = _comparable.pack("best", best)  # nothing would ever be better than NaN
        vars(self).update(loaded, fraction=fraction, best=best)
        self._write()

    def _current(self) -> float | Tensor:
        if not isinstance(self.module, nn.Module) or not hasattr(self.module, self.name):
            raise TypeError(f"module must have an attribute {self.name!r}, {type(self.module).__name__} has none")
        if not owns(self.module, self.name):
            raise TypeError(
                f"module must hold {self.name!r} itself to be scheduled, {type(self.module).__name__} has it from its "
                "class or from a Module inside it: pass that one, or set the attribute"
            )
        current: Any = getattr(self.module, self.name)
        if isinstance(current, str):  # "auto" depends on the number of classes, which is not known here
            return math.nan
        if isinstance(current, Tensor):
            return current
        if isinstance(current, bool) or not isinstance(current, (int, float, np.number)):
            hint = ": give torch.tensor(...)" if isinstance(current, (tuple, list)) else ""
            raise TypeError(
                f"module.{self.name} must be a number or a tensor to be scheduled, got {type(current).__name__}{hint}"
            )
        return float(current)

    def _checked(self, argument: str, value: Numbers, shape: torch.Size) -> Tensor:
        result = as_tensor(argument, value).to("cpu", torch.float64, copy=True)
        if result.dim() > 0 and result.shape != shape:
            raise ValueError(
                f"{argument} must be a number or have the shape {tuple(shape)} of module.{self.name}, "
                f"got shape {tuple(result.shape)}"
            )
        if not self._holds(result).all():
            hint = self.about_inf if result.isinf().any() else ""
            if argument == "start" and isinstance(getattr(self.module, self.name), str):
                hint = f"; module.{self.name} is no number: give start"
            raise ValueError(f"{argument} must {self.rule}, got {result.tolist()}{hint}")
        return result.expand(shape).clone()

    def _holds(self, value: Tensor) -> Tensor:
        return value.isfinite()

    def _make_buffer(self) -> None:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        delattr(self.module, self.name)
        self.module.register_buffer(self.name, torch.zeros((), dtype=torch.float64, device=device))

    def _write(self) -> None:
        # Looked up at every write: module.to() may have replaced the buffer.
        buffer: Tensor = getattr(self.module, self.name)
        value = self.value
        with torch.no_grad():
            # fill_ takes the number as an argument of its kernel: no copy from the host, so no synchronisation.
            if isinstance(value, float):
                buffer.fill_(value)
            else:
                buffer.copy_(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(value={self.value}, fraction={self.fraction:.4g}, mode={self.mode!r})"


class ThresholdSchedule(_Schedule):
    """Moves the ``threshold`` of a Z-Error loss during training, from loose to tight.

    How the value moves in each mode is at the top of :mod:`fused_losses.schedules`. Call :meth:`step` after every
    epoch.

    Args:
        module: the loss; its ``threshold`` is a number, a 0-dim tensor or a tensor ``(C,)``.
        start: first value in standard deviations, > 0, a number or ``(C,)``. The default 10 drops nothing. None: what
            the Module has. With ``mode="peak"`` and without ``steps`` it may be inf.
        end: last value, likewise. It may also be larger than ``start``.
        steps: calls of :meth:`step` until ``end``, at least 1; optional with ``mode="peak"``, left out with "plateau".
        mode: "linear", "cosine", "peak" or "plateau".
        factor: for "plateau": what is left of the distance to ``end`` after one plateau, 0 <= factor < 1.
        patience: for "peak" and "plateau": calls in a row without improvement that are allowed, 1 and 5 by default.
        min_delta: a change of the metric up to this size is no improvement, >= 0.
        maximize: True if a larger metric is better. By default True with "peak", False with "plateau".

    Raises:
        TypeError: ``module`` has no ``threshold`` that can be scheduled, or an argument is no number.
        ValueError: an argument is out of range.

    Example:
        >>> criterion = fl.ZErrorCrossEntropyLoss(statistic="prob", sided="lower")
        >>> schedule = ThresholdSchedule(criterion, start=10.0, end=2.0, steps=4)
        >>> for epoch in range(4):
        ...     schedule.step()  # after the epoch's training
        >>> float(criterion.threshold)
        2.0

    Source: 2506.02154, sigma annealing; "linear" from 100 to 2 is :func:`get_sigma_threshold`. The other modes are
    ours.
    """

    name = "threshold"
    rule = "satisfy 0 < value < inf"
    about_inf = "; mode='peak' without steps alone takes inf, because it goes there at once"

    def __init__(
        self,
        module: nn.Module,
        start: Numbers | None = 10.0,
        end: Numbers = 2.0,
        steps: int | None = None,
        *,
        mode: str = "linear",
        factor: float = 0.5,
        patience: int | None = None,
        min_delta: float = 0.0,
        maximize: bool | None = None,
    ) -> None:
        options: dict[str, Any] = {"factor": factor, "patience": patience, "min_delta": min_delta, "maximize": maximize}
        super().__init__(module, start, end, steps, mode=mode, **options)

    def _holds(self, value: Tensor) -> Tensor:
        moves_at_once = self.mode == "peak" and self.steps is None  # nothing lies between a number and inf
        return (value > 0.0) & (value.isfinite() | moves_at_once)


class LogitBiasSchedule(_Schedule):
    """Moves the ``logit_bias`` of a loss during training, as a rule to 0.

    How the value moves in each mode is at the top of :mod:`fused_losses.schedules`. Call :meth:`step` after every
    epoch.

    Args:
        module: the loss; its ``logit_bias`` is a number or a 0-dim tensor.
        start: first value in units of the logits, finite. None: what the Module has. For a Module with
            ``logit_bias="auto"`` give ``calibration.solve_logit_bias(num_classes)``, because the Module does not know
            the number of classes.
        end: last value, finite.
        steps: calls of :meth:`step` until ``end``, at least 1; optional with ``mode="peak"``, left out with "plateau".
        mode: "linear", "cosine", "peak" or "plateau".
        factor: for "plateau": what is left of the distance to ``end`` after one plateau, 0 <= factor < 1.
        patience: for "peak" and "plateau": calls in a row without improvement that are allowed, 1 and 5 by default.
        min_delta: a change of the metric up to this size is no improvement, >= 0.
        maximize: True if a larger metric is better. By default True with "peak", False with "plateau".

    Raises:
        TypeError: ``module`` has no ``logit_bias`` that can be scheduled, or an argument is no number.
        ValueError: an argument is out of range.

    Example:
        >>> criterion = fl.MAELoss()
        >>> start = fl.calibration.solve_logit_bias(100)
        >>> schedule = LogitBiasSchedule(criterion, start=start, steps=90, mode="cosine")
        >>> round(schedule.value, 2)
        3.03

    Source: 2306.05497, the losses marked "**". We could not read the paper's own schedule: the modes and the end 0 are
    ours.
    """

    name = "logit_bias"
    rule = f"be between {finite.low} and {finite.high}"

    def _holds(self, value: Tensor) -> Tensor:
        return value.abs() <= finite.high

    def _current(self) -> float | Tensor:
        base = getattr(self.module, "base", None)
        if isinstance(base, nn.Module):
            raise TypeError(f"module must hold the logit_bias that counts, which is that of its base: pass {base}")
        return super()._current()

    def __init__(
        self,
        module: nn.Module,
        start: Numbers | None = None,
        end: Numbers = 0.0,
        steps: int | None = None,
        *,
        mode: str = "linear",
        factor: float = 0.5,
        patience: int | None = None,
        min_delta: float = 0.0,
        maximize: bool | None = None,
    ) -> None:
        options: dict[str, Any] = {"factor": factor, "patience": patience, "min_delta": min_delta, "maximize": maximize}
        super().__init__(module, start, end, steps, mode=mode, **options)
