"""Decision cut-offs of a binary classifier, from the scores of a validation set.

In each class the rows more than some standard deviations from the mean are left out. A distribution is fitted to what
remains of each class, and the cut-off is where the two densities are equal. How frequent the classes are plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses._arrays import as_tensor, check_keys
from fused_losses._crossings import SkewNormal, gaussian_crossing, skewnorm_crossing
from fused_losses._parameters import check_number, positive_or_inf

__all__ = [
    "CutoffCollector",
    "optimal_logit_cutoff_from_gaussians",
    "optimal_prob_cutoff_from_skewnorm",
    "z_error_inlier_mask",
]

Array = npt.NDArray[np.float64]
_Rows = TypeVar("_Rows", Tensor, npt.NDArray[Any])

# A class whose scores spread less than this counts as constant (the rule of the losses).
_CONSTANT_STD = 1e-8
# Squares of logits, and of their quotients by the smallest standard deviation, stay in float64's range.
_LARGEST = 1e100


def z_error_inlier_mask(logits: _Rows, labels: _Rows, threshold: float = 2.0) -> _Rows:
    """Tells which rows lie within ``threshold`` standard deviations of the mean of their class.

    For binary labels. With x the scores of the rows with one label, a row is kept where ``|x - mean| / std <=
    threshold``, with the unbiased standard deviation, in float64. A class with a standard deviation below 1e-8 keeps
    all its rows.

    Args:
        logits: scores ``(N,)`` or ``(N, 1)``, a tensor of any device and dtype, or an array.
        labels: 0 or 1 per row, the shape of ``logits``. Rows with another label (soft, or NaN for a missing one) are
            not kept.
        threshold: in standard deviations, > 0; inf keeps every row with a finite score and a label. Of n rows none has
            ``|z| > (n - 1) / sqrt(n)``, so 2 drops nothing from a class with fewer than six rows.

    Returns:
        A bool tensor or array, as ``logits`` is one, of its shape: True for rows that are kept.

    Raises:
        TypeError: ``logits`` or ``labels`` is neither tensor nor array, or ``threshold`` no number.
        ValueError: shapes do not fit, or ``threshold`` is not positive.

    Example:
        >>> z_error_inlier_mask(np.array([2.5, 0.2, -1.1, 1.3, -2.0, 3.0]), np.array([1, 1, 0, 1, 0, 1]), 1.1)
        array([ True, False,  True,  True,  True,  True])

    Source: 2506.02154, the inlier mask of the cut-off code. Deviation: a score that is not finite drops its own row,
    where the paper's code drops the whole class. The only row of a class is dropped, as there, but for a threshold
    of inf. Scores beyond about 1e150, whose squares leave float64, are not told apart.
    """
    threshold = _check_threshold("threshold", threshold)
    scores, classes = _tensors(logits, labels)
    mask = _inliers(scores, classes, threshold).reshape(logits.shape)
    return mask if isinstance(logits, Tensor) else mask.numpy()


def optimal_logit_cutoff_from_gaussians(
    logits: Tensor | npt.NDArray[Any], labels: Tensor | npt.NDArray[Any], z_threshold: float = 2.0
) -> tuple[float, float]:
    """The logit at which Gaussians fitted to the inliers of both classes have equal density.

    For choosing the decision threshold of a binary classifier on a validation set with some wrong labels. With mean
    ``m_c`` and standard deviation ``s_c`` (population form) of the inliers of class c, it solves ``N(x; m_0, s_0) =
    N(x; m_1, s_1)``, a quadratic equation that always has real roots. Of two roots it takes the one nearest to the
    midpoint of the means, which is the one between the means if there is one.

    Args:
        logits: ``(N,)`` or ``(N, 1)``, a tensor of any device and dtype, or an array.
        labels: 0 or 1 per row, the shape of ``logits``; other rows are left out.
        z_threshold: rows further than this from the mean of their class are left out (:func:`z_error_inlier_mask`), in
            standard deviations, > 0; inf leaves out none.

    Returns:
        The cut-off as a logit, and its sigmoid. Predict class 1 above it (if ``m_1 > m_0``).

    Raises:
        TypeError: ``logits`` or ``labels`` is neither tensor nor array, or ``z_threshold`` no number.
        ValueError: an argument is out of range; a class has fewer than 2 inliers, or only equal ones; both Gaussians
            are the same; a finite logit with a label is beyond 1e100, where squares leave float64.

    Example:
        >>> logits = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
        >>> optimal_logit_cutoff_from_gaussians(logits, np.array([0, 0, 0, 1, 1, 1]))
        (0.0, 0.5)

    Source: 2506.02154, cut-off from Gaussians. Deviations: the quadratic equation is solved without cancellation;
    constant or identical classes raise a ValueError, where the paper's code fails inside numpy.
    """
    z_threshold = _check_threshold("z_threshold", z_threshold)
    scores, classes = _tensors(logits, labels)
    used = scores[(classes >= 0) & scores.isfinite()]
    if (used.abs() > _LARGEST).any():
        raise ValueError(
            f"logits must be between {-_LARGEST:g} and {_LARGEST:g}, got {float(used[used.abs().argmax()]):g}"
        )
    first, second = _inlier_classes(scores, classes, z_threshold, "logits")
    cutoff = gaussian_crossing(float(first.mean()), float(first.std()), float(second.mean()), float(second.std()))
    return cutoff, _sigmoid(cutoff)


def optimal_prob_cutoff_from_skewnorm(
    logits: Tensor | npt.NDArray[Any], labels: Tensor | npt.NDArray[Any], z_threshold: float = 2.0
) -> float:
    """The probability at which skew-normal densities fitted to the inliers of both classes are equal.

    For the same use as :func:`optimal_logit_cutoff_from_gaussians`. Probabilities ``sigmoid(logits)`` gather at 0 and
    1, which skew-normal distributions follow better than Gaussians. They are fitted by maximum likelihood
    (``scipy.stats.skewnorm.fit``). Between the modes there is at most one crossing, and it is taken; else the crossing
    in [0.001, 0.999] nearest to the midpoint of the modes.

    Args:
        logits: ``(N,)`` or ``(N, 1)``, a tensor of any device and dtype, or an array. Logits, not probabilities.
        labels: 0 or 1 per row, the shape of ``logits``; other rows are left out.
        z_threshold: rows whose probability is further than this from the mean of their class are left out, in standard
            deviations, > 0; inf leaves out none.

    Returns:
        The cut-off as a probability.

    Raises:
        ImportError: scipy is not installed.
        TypeError: ``logits`` or ``labels`` is neither tensor nor array, or ``z_threshold`` no number.
        ValueError: an argument is out of range; a class has fewer than 2 inliers, or only equal ones; a fit fails; the
            densities do not cross.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> logits = np.concatenate([rng.normal(-2, 1, 500), rng.normal(2, 1, 500)])
        >>> 0.4 < optimal_prob_cutoff_from_skewnorm(logits, np.repeat([0, 1], 500)) < 0.6
        True

    Source: 2506.02154, cut-off from skew-normal distributions. Deviations: the paper's code searches [0.001, 0.999] at
    once, where the root finder returns any of several crossings, or an end of the interval where both densities are 0.
    Where nothing crosses it returns the midpoint of the mean probabilities, which here is a ValueError.
    """
    z_threshold = _check_threshold("z_threshold", z_threshold)
    scores, classes = _tensors(logits, labels)
    pair = _inlier_classes(scores.sigmoid(), classes, z_threshold, "probabilities")
    densities = [SkewNormal.fit(samples, label) for label, samples in enumerate(pair)]
    return skewnorm_crossing(*densities)


class CutoffCollector:
    """Collects logits and labels of a validation set batch by batch, for a cut-off over all of it.

    The rows are kept on the CPU in float64, 9 bytes each: the statistics of the whole set are needed before a row can
    be left out. Several tasks need a collector each.

    Example:
        >>> collector = CutoffCollector()
        >>> collector.update(torch.tensor([-3.0, -2.0, -1.0]), torch.tensor([0, 0, 0]))
        >>> collector.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 1, 1]))
        >>> collector.logit_cutoff_from_gaussians()
        (0.0, 0.5)
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, logits: Tensor | npt.NDArray[Any], labels: Tensor | npt.NDArray[Any]) -> None:
        """Adds a batch; waits for the device the tensors are on.

        Args:
            logits: ``(N,)`` or ``(N, 1)``.
            labels: 0 or 1, the shape of ``logits``. Rows with another label, NaN included, are skipped.

        Raises:
            TypeError: an argument is neither tensor nor array.
            ValueError: the shapes do not fit.
        """
        scores, classes = _tensors(logits, labels)
        scores, classes = scores.cpu(), classes.cpu()
        known = classes >= 0
        self._logits.append(scores[known])
        self._labels.append(classes[known])

    @property
    def logits(self) -> Tensor:
        """What was collected, float64 ``(N,)``."""
        return torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *self._logits])

    @property
    def labels(self) -> Tensor:
        """The label of each row, int8 ``(N,)``, 0 or 1."""
        return torch.cat([torch.empty(0, dtype=torch.int8, device="cpu"), *self._labels])

    def __len__(self) -> int:
        """The number of rows collected."""
        return sum(map(len, self._logits))

    def inlier_mask(self, threshold: float = 2.0) -> Tensor:
        """:func:`z_error_inlier_mask` of the rows collected."""
        return z_error_inlier_mask(self.logits, self.labels, threshold)

    def logit_cutoff_from_gaussians(self, z_threshold: float = 2.0) -> tuple[float, float]:
        """:func:`optimal_logit_cutoff_from_gaussians` of the rows collected."""
        return optimal_logit_cutoff_from_gaussians(self.logits, self.labels, z_threshold)

    def prob_cutoff_from_skewnorm(self, z_threshold: float = 2.0) -> float:
        """:func:`optimal_prob_cutoff_from_skewnorm` of the rows collected."""
        return optimal_prob_cutoff_from_skewnorm(self.logits, self.labels, z_threshold)

    def merge(self, other: CutoffCollector) -> CutoffCollector:
        """A new collector with the rows of both.

        Raises:
            TypeError: ``other`` is something else.
        """
        if not isinstance(other, CutoffCollector):
            raise TypeError(f"other must be a CutoffCollector, got {type(other).__name__}")
        return _collector([self.logits, other.logits], [self.labels, other.labels])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CutoffCollector:
        """A new collector with the rows of all ranks, in the order of the ranks; every rank has to call it.

        ``DistributedSampler`` repeats a few rows to fill the last batch unless told to drop them; they count twice.

        Args:
            group: process group, None for the default one.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("all_reduce needs torch.distributed.init_process_group() first")
        parts: list[tuple[Array, npt.NDArray[np.int8]]] = [None] * dist.get_world_size(group)  # type: ignore[list-item]
        dist.all_gather_object(parts, (self.logits.numpy(), self.labels.numpy()), group=group)
        return _collector([torch.from_numpy(part[0]) for part in parts], [torch.from_numpy(part[1]) for part in parts])

    def state_dict(self) -> dict[str, Tensor]:
        """The rows collected."""
        return {"logits": self.logits, "labels": self.labels}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Replaces the rows collected by those of a :meth:`state_dict`.

        Raises:
            TypeError: it is no dictionary, of tensors or arrays.
            ValueError: keys are missing or unknown, or the rows do not fit.
        """
        check_keys(state_dict, ("logits", "labels"))
        loaded = CutoffCollector()
        loaded.update(state_dict["logits"], state_dict["labels"])
        self._logits, self._labels = loaded._logits, loaded._labels

    def __repr__(self) -> str:
        return f"CutoffCollector({len(self)} rows)"


def _collector(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> CutoffCollector:
    result = CutoffCollector()
    for part in zip(logits, labels, strict=True):
        result.update(*part)
    return result


def _check_threshold(name: str, threshold: float) -> float:
    return positive_or_inf.pack(name, check_number(name, threshold))


def _tensors(logits: Tensor | npt.NDArray[Any], labels: Tensor | npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Scores (N,) in float64 and classes (N,) in int8 on the device of the logits: 0, 1, or -1 for no class."""
    scores, marks = _tensor("logits", logits), _tensor("labels", labels)
    if scores.shape != marks.shape:
        raise ValueError(f"labels must have the shape {tuple(scores.shape)} of logits, got {tuple(marks.shape)}")
    if scores.dim() != 1 and not (scores.dim() == 2 and scores.shape[1] == 1):
        raise ValueError(f"logits must have shape (N,) or (N, 1), got {tuple(scores.shape)}")
    marks = marks.to(scores.device).flatten()
    classes = (marks == 1).to(torch.int8) - (~((marks == 0) | (marks == 1))).to(torch.int8)
    return scores.flatten().double(), classes


def _tensor(name: str, rows: Tensor | npt.NDArray[Any]) -> Tensor:
    if isinstance(rows, (Tensor, np.ndarray)):
        return as_tensor(name, rows)
    raise TypeError(f"{name} must be a tensor or an array, got {type(rows).__name__}")


def _inliers(scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    kept = torch.zeros_like(classes, dtype=torch.bool)
    for label in (0, 1):
        member = (classes == label) & scores.isfinite()
        count = member.sum()
        mean = torch.where(member, scores, 0.0).sum() / count
        distance = torch.where(member, scores - mean, 0.0).abs()
        std = (distance.square().sum() / (count - 1)).sqrt()  # NaN for one row: the comparison below drops it
        kept |= member & ((std < _CONSTANT_STD) | (distance / std <= threshold) | (threshold == math.inf))
    return kept


def _inlier_classes(scores: Tensor, classes: Tensor, threshold: float, what: str) -> tuple[Array, Array]:
    """The inliers of class 0 and of class 1; raises if a class leaves nothing to fit."""
    kept = _inliers(scores, classes, threshold)
    result = []
    for label in (0, 1):
        member = classes == label
        samples = np.sort(scores[kept & member].cpu().numpy())  # the same rows in another order are the same class
        if len(samples) < 2:
            raise ValueError(
                f"class {label} must have at least 2 inliers, got {len(samples)} of {int(member.sum())} rows "
                f"(z_threshold={threshold})"
            )
        if samples.std() < _CONSTANT_STD:
            raise ValueError(
                f"class {label} must have {what} that differ, all {len(samples)} inliers are {samples.mean():g} "
                f"(standard deviation {samples.std():.1g})"
            )
        result.append(samples)
    return result[0], result[1]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))
