"""Which labels of the training set to check: a count per sample of what the losses dropped and found improbable."""

from __future__ import annotations

import csv
import enum
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._agreement import Exchange, gather
from fused_losses._arrays import Numbers, check_keys
from fused_losses._observations import RowLogProbs, check_samples, label_probability, rows_of
from fused_losses._parameters import check_choice, check_index, check_number

__all__ = ["OutlierTracker"]


class _Count(enum.IntEnum):
    """Columns of the counts of a sample's observations."""

    SEEN = 0
    JUDGED = 1
    FLAGGED = 2
    SCORED = 3
    WITH_PROB = 4


class _Sum(enum.IntEnum):
    """Columns of what is summed over a sample's observations."""

    SCORE = 0
    PROB = 1


class OutlierTracker:
    """Collects, for every training sample, how probable its label was found and how often it was dropped.

    For finding wrong labels while training: call :meth:`update` in every step of the first third of the training, and
    check the labels in the order of :meth:`rank`. A row without a score or probability (ignored, missing label, class
    too small) is not counted. A sample that comes twice counts twice. Under DistributedDataParallel every rank has a
    tracker of its own, with the sample numbers of the whole data set, and :meth:`all_reduce` adds them up.

    It takes 36 bytes per sample. Updates do not wait for ``device``.

    Args:
        num_samples: size of the data set, at least 1; sample numbers are in ``[0, num_samples)``.
        device: where the counts are kept. With "cpu" every update copies its rows there.

    Raises:
        TypeError: ``num_samples`` is no integer.
        ValueError: ``num_samples`` is below 1.

    Example:
        >>> tracker = OutlierTracker(4)
        >>> tracker.update([0, 1, 3], mask=[True, False, True], prob=[0.9, 0.1, 0.7])
        >>> tracker.update([0, 1, 3], mask=[True, False, False], prob=[0.8, 0.2, 0.5])
        >>> tracker.flagged(0.9), tracker.rank()
        (tensor([1]), tensor([1, 3, 0]))

    Source: the use of the mask is that of 2506.02154; counting and ranking are ours.
    """

    def __init__(self, num_samples: int, *, device: torch.device | str = "cpu") -> None:
        self.num_samples = check_index("num_samples", num_samples, 1)
        self._counts = torch.zeros(self.num_samples, len(_Count), dtype=torch.int32, device=device)
        self._sums = torch.zeros(self.num_samples, len(_Sum), dtype=torch.float64, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A process that torch has spawned gets a tracker of its own, no share in the tensors of its parent."""
        vars(self).update(state, _counts=state["_counts"].clone(), _sums=state["_sums"].clone())

    @property
    def times_seen(self) -> Tensor:
        """How often each sample was given to :meth:`update` with something to record, int64 ``(num_samples,)``."""
        return self._count(_Count.SEEN)

    @property
    def times_judged(self) -> Tensor:
        """How often each sample came with a mask, int64 ``(num_samples,)``."""
        return self._count(_Count.JUDGED)

    @property
    def times_flagged(self) -> Tensor:
        """How often the mask dropped each sample, int64 ``(num_samples,)``."""
        return self._count(_Count.FLAGGED)

    @torch.no_grad()
    def update(
        self,
        index: Numbers,
        mask: Numbers | None = None,
        score: Numbers | None = None,
        *,
        row_statistics: RowLogProbs | None = None,
        log_prob: Numbers | None = None,
        prob: Numbers | None = None,
    ) -> None:
        """Records one batch. Every argument may be a tensor, an array or a list.

        Give a mask, a score, a probability of the label (in one of three ways), or several of them.

        Args:
            index: number of each row's sample in the data set, integers of any shape. A sample may occur several times.
            mask: bool, the shape of ``index``, True for rows that were **kept** (as in every mask of this package).
            score: numbers of the shape of ``index``, such as the z-scores of a Z-Error loss; their mean per sample is
                kept. A row with score NaN is left out, together with its mask. An infinite score is left out of the
                mean only.
            row_statistics: what ``fused_losses.row_statistics(logits, target)`` gives, or any object with the
                log-probabilities of the labels as ``log_prob``.
            log_prob: log-probability of each row's label, the shape of ``index``; that is minus the cross entropy
                without weights. A row with NaN is left out.
            prob: probability of each row's label, likewise.

        Raises:
            TypeError: a dtype does not fit, or there is nothing to record.
            ValueError: shapes differ, a probability is not between 0 and 1, or it is given in two ways.
            IndexError: an index is out of range. If tensors and counts are on a CUDA device, indices and probabilities
                out of range are device assertions, because a check would wait for the device.
        """
        rows = rows_of("index", index, None)
        device = self._counts.device
        counts = torch.zeros(*rows.shape, len(_Count), dtype=torch.int32, device=device)
        sums = torch.zeros(*rows.shape, len(_Sum), dtype=torch.float64, device=device)
        kept = None if mask is None else rows_of("mask", mask, rows.shape)
        scores = None if score is None else rows_of("score", score, rows.shape)
        probs = label_probability(rows.shape, device, row_statistics=row_statistics, log_prob=log_prob, prob=prob)
        if kept is None and scores is None and probs is None:
            raise TypeError("update() needs a mask, a score or a probability (row_statistics, log_prob or prob)")
        check_samples(rows, self.num_samples, device)

        known = torch.ones(rows.shape, dtype=torch.bool, device=device)
        if scores is not None:
            scores = scores.to(device, torch.float64)
            known = ~scores.isnan()
            usable = scores.isfinite()
            counts[..., _Count.SCORED] = usable
            sums[..., _Sum.SCORE] = torch.where(usable, scores, 0.0)
        if kept is not None:
            counts[..., _Count.JUDGED] = known
            counts[..., _Count.FLAGGED] = known & ~kept.to(device)
        seen = known if kept is not None or scores is not None else torch.zeros_like(known)
        if probs is not None:
            given = ~probs.isnan()
            seen = seen | given
            counts[..., _Count.WITH_PROB] = given
            sums[..., _Sum.PROB] = torch.where(given, probs, 0.0)
        counts[..., _Count.SEEN] = seen
        place = (rows.flatten().to(device, torch.int64),)
        self._counts.index_put_(place, counts.reshape(-1, len(_Count)), accumulate=True)
        self._sums.index_put_(place, sums.reshape(-1, len(_Sum)), accumulate=True)

    def _count(self, kind: _Count) -> Tensor:
        return self._counts[:, kind].long()

    def flag_rate(self) -> Tensor:
        """The share of its masks in which each sample was dropped: float64 ``(num_samples,)``, NaN without a mask."""
        return self._counts[:, _Count.FLAGGED].double() / self._counts[:, _Count.JUDGED]

    def mean_score(self) -> Tensor:
        """The mean finite score of each sample: float64 ``(num_samples,)``, NaN without a score."""
        return self._sums[:, _Sum.SCORE] / self._counts[:, _Count.SCORED]

    def mean_probability(self) -> Tensor:
        """The mean probability of each sample's label: float64 ``(num_samples,)``, NaN without a probability."""
        return self._sums[:, _Sum.PROB] / self._counts[:, _Count.WITH_PROB]

    def flagged(self, min_rate: float, *, min_seen: int = 1) -> Tensor:
        """The samples that were dropped in at least the share ``min_rate`` of their masks.

        What a loss drops it does not learn, so it drops it again: late in training most samples have a rate near 0 or
        1, and any ``min_rate`` gives the same answer. :meth:`rank` orders the samples instead.

        Args:
            min_rate: smallest rate, 0 <= min_rate <= 1.
            min_seen: samples with fewer masks are left out, at least 1.

        Returns:
            Sample numbers, int64, ascending.

        Raises:
            TypeError: ``min_rate`` is no number, or ``min_seen`` no integer.
            ValueError: an argument is out of range.
            RuntimeError: samples were seen, but none with a mask.
        """
        rate = check_number("min_rate", min_rate)
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"min_rate must be between 0 and 1, got {min_rate}")
        min_seen = check_index("min_seen", min_seen, 1)
        judged = self._count(_Count.JUDGED)
        if self._count(_Count.SEEN).any() and not judged.any():
            raise RuntimeError("flagged() needs masks, and update() was given none; rank() orders samples without")
        return torch.nonzero((judged >= min_seen) & (self.flag_rate() >= rate)).flatten()

    def rank(self, *, by: str = "auto", suspicious: str = "low", min_seen: int = 1) -> Tensor:
        """The samples in the order in which to check their labels, the most suspicious first.

        The order is by the mean probability of the label, lowest first. It tells most over the first third of the
        training, before wrong labels are memorised: stop updating then. It does not say how many labels are wrong.

        Args:
            by: ``"probability"``, ``"score"``, or ``"auto"``: probabilities if :meth:`update` was given any, else
                scores.
            suspicious: which mean scores come first: ``"low"`` (z of logits and probabilities of class labels),
                ``"high"`` (losses, and z of losses) or ``"both"``, those far from 0 (z of targets and residuals). It
                has no effect on probabilities. z of yes/no labels is suspicious where it is low for yes and high for
                no: give probabilities, or ``torch.where(target > 0.5, z, -z)``.
            min_seen: samples with fewer such numbers are left out, at least 1.

        Returns:
            Sample numbers, int64; equals in ascending order.

        Raises:
            TypeError: ``min_seen`` is no integer.
            ValueError: an option is unknown or out of range.
        """
        check_choice("by", by, ("auto", "probability", "score"))
        check_choice("suspicious", suspicious, ("low", "high", "both"))
        min_seen = check_index("min_seen", min_seen, 1)
        if by == "auto":
            by = "probability" if bool(self._counts[:, _Count.WITH_PROB].any()) else "score"
        count = self._counts[:, _Count.WITH_PROB if by == "probability" else _Count.SCORED]
        mean = self.mean_probability() if by == "probability" else self.mean_score()
        candidates = torch.nonzero(count >= min_seen).flatten()
        if by == "score":
            mean = {"low": mean, "high": -mean, "both": -mean.abs()}[suspicious]
        return candidates[torch.argsort(mean[candidates], stable=True)]

    def to_csv(self, path: str | Path) -> None:
        """Writes a table with one line per sample, in the order of the data set.

        Columns: ``index``, ``times_seen``, ``times_judged``, ``times_flagged``, and, each empty where there is nothing
        to average, ``flag_rate``, ``mean_score`` and ``mean_probability``.

        Args:
            path: the file; it is replaced if it exists.
        """
        columns = {
            "times_seen": self.times_seen,
            "times_judged": self.times_judged,
            "times_flagged": self.times_flagged,
            "flag_rate": self.flag_rate(),
            "mean_score": self.mean_score(),
            "mean_probability": self.mean_probability(),
        }
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", *columns])
            for index, row in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True)):
                writer.writerow([index, *("" if math.isnan(value) else repr(value) for value in row)])

    def merge(self, other: OutlierTracker) -> OutlierTracker:
        """A new tracker with what both have recorded.

        Raises:
            TypeError: ``other`` is something else.
            ValueError: they are for data sets of different size.
        """
        if not isinstance(other, OutlierTracker):
            raise TypeError(f"other must be an OutlierTracker, got {type(other).__name__}")
        if other.num_samples != self.num_samples:
            raise ValueError(f"other must have num_samples={self.num_samples}, got {other.num_samples}")
        result = self._copy()
        result._counts += other._counts.to(result._counts.device)
        result._sums += other._sums.to(result._sums.device)
        return result

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> OutlierTracker:
        """A new tracker with what all ranks have recorded, the same on each; every rank has to call it.

        This tracker stays as it is, so that it can go on and be reduced again after the next epoch.

        Args:
            group: process group, None for the default one.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised; trackers of other ranks are for more or fewer
                samples (between GPUs: a device assertion).
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed.init_process_group() first")
        nothing = torch.empty(0, device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
        gather(Exchange.over(group, "tracker"), f"all_reduce of {self.num_samples} samples", nothing)
        result = self._copy()
        for own in (result._counts, result._sums):
            # NCCL takes tensors on CUDA devices only.
            moved = own.cuda() if dist.get_backend(group) == "nccl" else own
            dist.all_reduce(moved, group=group)
            if moved is not own:
                own.copy_(moved)
        return result

    def _copy(self) -> OutlierTracker:
        result = OutlierTracker(self.num_samples, device=self._counts.device)
        result._counts.copy_(self._counts)
        result._sums.copy_(self._sums)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after :meth:`load_state_dict`, as tensors."""
        return {"counts": self._counts.clone(), "sums": self._sums.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            TypeError: it is no dictionary of tensors.
            ValueError: keys are missing or unknown, it is for a data set of another size, or numbers are not what
                :meth:`update` makes.
        """
        own: dict[str, Tensor] = {"counts": self._counts, "sums": self._sums}
        check_keys(state_dict, own)
        for name, tensor in own.items():
            if not isinstance(state_dict[name], Tensor):
                raise TypeError(f"state_dict must hold tensors, got {name} of type {type(state_dict[name]).__name__}")
            if state_dict[name].shape != tensor.shape:
                raise ValueError(
                    f"state_dict must be for num_samples={self.num_samples}, got {name} of shape "
                    f"{tuple(state_dict[name].shape)}"
                )
            if state_dict[name].dtype != tensor.dtype:
                raise ValueError(f"state_dict must hold {name} of {tensor.dtype}, got {state_dict[name].dtype}")
        if (state_dict["counts"] < 0).any() or state_dict["sums"].isnan().any():
            raise ValueError("state_dict must hold counts that are not negative and sums that are not NaN, got others")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])

    def __repr__(self) -> str:
        return f"OutlierTracker(num_samples={self.num_samples})"
