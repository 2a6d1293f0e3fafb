"""Which training samples the losses kept throwing out, so that somebody can look at their labels."""

from __future__ import annotations

import csv
import math
import operator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["OutlierTracker"]


class OutlierTracker:
    """Counts how often each training sample was dropped by the mask of a Z-Error loss.

    Samples that are flagged epoch after epoch are the ones whose labels are worth checking. All counts are sums over
    what was seen, so a sample that appears twice (drawn with replacement, or repeated by ``DistributedSampler`` to fill
    the last batch) just counts as two observations and its rate stays a rate. Under DistributedDataParallel every rank
    keeps its own tracker, indexed by the number of the sample in the data set, and :meth:`all_reduce` sums them up.

    Updates on ``device`` do not synchronise with the host. 32 bytes per sample.

    Args:
        num_samples: size of the data set; indices are in ``[0, num_samples)``.
        device: where the counts live. On "cpu" (default) every update copies its rows there.

    Raises:
        TypeError: ``num_samples`` is not an integer.
        ValueError: ``num_samples`` < 1.

    Example:
        >>> tracker = OutlierTracker(4)
        >>> tracker.update(torch.tensor([0, 1, 3]), torch.tensor([True, False, True]))
        >>> tracker.update(torch.tensor([0, 1, 3]), torch.tensor([True, False, False]))
        >>> tracker.flagged(0.9)
        tensor([1])

    Source: the use of the mask of 2506.02154; the bookkeeping is ours.
    """

    def __init__(self, num_samples: int, *, device: torch.device | str = "cpu") -> None:
        try:
            self.num_samples = operator.index(num_samples)
        except TypeError:
            raise TypeError(f"num_samples must be an integer, got {num_samples!r}") from None
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        # Rows: observations, flags, observations with a score.
        self._counts = torch.zeros(3, self.num_samples, dtype=torch.int64, device=device)
        self._score_sum = torch.zeros(self.num_samples, dtype=torch.float64, device=device)

    @property
    def times_seen(self) -> Tensor:
        """Observations of each sample, int64 ``(num_samples,)``."""
        return self._counts[0].clone()

    @property
    def times_flagged(self) -> Tensor:
        """Observations of each sample that the mask dropped, int64 ``(num_samples,)``."""
        return self._counts[1].clone()

    @torch.no_grad()
    def update(self, index: Tensor, mask: Tensor, score: Tensor | None = None) -> None:
        """Records one batch.

        Args:
            index: number of each row's sample in the data set, integers of any shape; a sample may occur repeatedly.
            mask: bool, the shape of ``index``, True for rows that were **kept** (as every mask of this package).
            score: what was tested (a loss, a z-score, ...), floating point, the shape of ``index``; averaged per
                sample. Scores that are not finite are left out of the average.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: shapes differ.
            IndexError: an index is out of range (if ``index`` is on a CUDA device and the counts too: a device
                assertion, because a check would wait for the device).
        """
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
            raise TypeError(f"index must hold integers, got {index.dtype}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor (True = kept), got {mask.dtype}")
        if score is not None and not score.is_floating_point():
            raise TypeError(f"score must be floating point, got {score.dtype}")
        for name, tensor in (("mask", mask), ("score", score)):
            if tensor is not None and tensor.shape != index.shape:
                raise ValueError(f"{name} must have the shape {tuple(index.shape)} of index, got {tuple(tensor.shape)}")
        device = self._counts.device
        rows = index.detach().flatten().to(device, torch.int64)
        if device.type == "cpu" and rows.numel():
            worst = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
            if not 0 <= worst < self.num_samples:
                raise IndexError(f"index must be in [0, {self.num_samples}), got {worst}")
        flags = ~mask.detach().flatten().to(device)
        self._add(0, rows, torch.ones_like(rows))
        self._add(1, rows, flags.long())
        if score is not None:
            values = score.detach().flatten().to(device, torch.float64)
            usable = values.isfinite()
            self._add(2, rows, usable.long())
            self._score_sum.index_put_((rows,), torch.where(usable, values, 0.0), accumulate=True)

    def _add(self, row: int, index: Tensor, amount: Tensor) -> None:
        self._counts[row].index_put_((index,), amount, accumulate=True)

    def flag_rate(self) -> Tensor:
        """Share of the observations of each sample that were dropped: float64 ``(num_samples,)``, NaN if never seen."""
        return self._counts[1].double() / self._counts[0]

    def mean_score(self) -> Tensor:
        """Mean finite score of each sample: float64 ``(num_samples,)``, NaN if there was none."""
        return self._score_sum / self._counts[2]

    def flagged(self, min_rate: float, *, min_seen: int = 1) -> Tensor:
        """The samples dropped in at least the share ``min_rate`` of their observations.

        Args:
            min_rate: smallest rate, 0 <= min_rate <= 1.
            min_seen: samples with fewer observations are left out, at least 1.

        Returns:
            Their indices, int64, ascending. Sort by ``flag_rate()[result]`` or ``mean_score()[result]`` to look at the
            worst first.

        Raises:
            ValueError: an argument is out of range.
        """
        if not 0.0 <= min_rate <= 1.0:
            raise ValueError(f"min_rate must be between 0 and 1, got {min_rate}")
        if min_seen < 1:
            raise ValueError(f"min_seen must be at least 1, got {min_seen}")
        seen = self._counts[0] >= min_seen
        return torch.nonzero(seen & (self.flag_rate() >= min_rate)).flatten()

    def to_csv(self, path: str | Path) -> None:
        """Writes a table with one line per sample, in the order of the data set.

        Columns: ``index``, ``times_seen``, ``times_flagged``, ``flag_rate`` (empty for samples never seen) and
        ``mean_score`` (empty without a finite score).

        Args:
            path: the file; it is replaced if it exists.
        """

        def text(value: float) -> str:
            return "" if math.isnan(value) else repr(value)

        columns = (self._counts[0], self._counts[1], self.flag_rate(), self.mean_score())
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "times_seen", "times_flagged", "flag_rate", "mean_score"])
            rows = zip(*(column.tolist() for column in columns), strict=True)
            writer.writerows(
                [i, seen, flags, text(rate), text(score)] for i, (seen, flags, rate, score) in enumerate(rows)
            )

    def merge(self, other: OutlierTracker) -> OutlierTracker:
        """A new tracker with the observations of both.

        Raises:
            ValueError: they are for data sets of different size.
        """
        if other.num_samples != self.num_samples:
            raise ValueError(f"other must have num_samples={self.num_samples}, got {other.num_samples}")
        result = self._copy()
        result._counts += other._counts.to(result._counts.device)
        result._score_sum += other._score_sum.to(result._score_sum.device)
        return result

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> OutlierTracker:
        """A new tracker with the observations of all ranks, the same on each; a collective call.

        This tracker stays as it is, so that it can go on and be reduced again after the next epoch.

        Args:
            group: process group, None for the default one.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed.init_process_group() first")
        result = self._copy()
        for own in (result._counts, result._score_sum):
            # NCCL moves tensors of CUDA devices only.
            moved = own.cuda() if dist.get_backend(group) == "nccl" else own
            dist.all_reduce(moved, group=group)
            if moved is not own:
                own.copy_(moved)
        return result

    def _copy(self) -> OutlierTracker:
        result = OutlierTracker(self.num_samples, device=self._counts.device)
        result._counts.copy_(self._counts)
        result._score_sum.copy_(self._score_sum)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after :meth:`load_state_dict`, as tensors."""
        return {"counts": self._counts.clone(), "score_sum": self._score_sum.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            ValueError: keys are missing or unknown, or it is for a data set of another size.
        """
        own: dict[str, Tensor] = {"counts": self._counts, "score_sum": self._score_sum}
        if state_dict.keys() != own.keys():
            raise ValueError(f"state_dict must have the keys {sorted(own)}, got {sorted(state_dict)}")
        for name, tensor in own.items():
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict must be for num_samples={self.num_samples}, got {name} of shape "
                    f"{tuple(state_dict[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])

    def __repr__(self) -> str:
        return f"OutlierTracker(num_samples={self.num_samples})"
