"""Label noise for experiments: wrong labels of a known kind, and an estimate of the transition matrix of real ones.

Each function takes correct labels and returns :class:`NoisyLabels`: the labels to train on, and which of them changed.
Draws happen on the CPU from ``seed``, so that a seed gives the same labels on every device. An integer seed does not
touch torch's global random state; a ``torch.Generator`` is advanced. Rows labelled ``ignore_index`` stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses._arguments import is_ignored
from fused_losses._checks import is_integer_tensor, kind_of
from fused_losses._parameters import check_index, check_num_classes, closed_fraction, integer, positive, switch
from fused_losses._transition import check_matrix

__all__ = [
    "CIFAR100_SUPERCLASSES",
    "PAIRS",
    "NoisyLabels",
    "asymmetric",
    "estimate_transition",
    "from_matrix",
    "instance_dependent",
    "pair_matrix",
    "symmetric",
    "symmetric_matrix",
]

Seed = int | torch.Generator

# The super-class of each of CIFAR-100's classes, in the order of its fine labels.
CIFAR100_SUPERCLASSES = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)


def _next_in_group(groups: tuple[int, ...]) -> dict[int, int]:
    """Each class to the next one of its group, the last to the first."""
    members: dict[int, list[int]] = {}
    for cls, group in enumerate(groups):
        members.setdefault(group, []).append(cls)
    return {cls: peers[(i + 1) % len(peers)] for peers in members.values() for i, cls in enumerate(peers)}


#: Which class each class is mistaken for, by data set; classes that are not named keep their labels.
PAIRS: dict[str, dict[int, int]] = {
    # truck -> car, bird -> plane, deer -> horse, cat <-> dog (1609.03683)
    "cifar10": {9: 1, 2: 0, 4: 7, 3: 5, 5: 3},
    # each class to the next of its super-class (1609.03683)
    "cifar100": _next_in_group(CIFAR100_SUPERCLASSES),
    # 2 -> 7, 3 -> 8, 7 -> 1, 5 <-> 6 (1609.03683)
    "mnist": {2: 7, 3: 8, 7: 1, 5: 6, 6: 5},
    # boot -> sneaker -> sandal, pullover -> shirt, coat <-> dress (1805.07836)
    "fashion-mnist": {9: 7, 7: 5, 2: 6, 4: 3, 3: 4},
}


class NoisyLabels(NamedTuple):
    """``labels`` to train on, in dtype, shape and device of those given; ``flipped`` (bool): where they changed."""

    labels: Tensor
    flipped: Tensor


def symmetric(
    labels: Tensor,
    rate: float,
    num_classes: int,
    redraw: bool = True,
    *,
    seed: Seed = 0,
    ignore_index: int = -100,
) -> NoisyLabels:
    """Replaces labels by random ones, whatever their class.

    Args:
        labels: class indices in ``[0, num_classes)``, integers of any shape and device.
        rate: probability that a label is replaced, 0 to 1.
        num_classes: number of classes C, at least 1 (2 if ``redraw`` is False).
        redraw: True: the new label is drawn from all C classes and may be the old one, so a share of ``rate (C - 1) /
            C`` becomes wrong. False: it is drawn from the other C - 1, so a share of ``rate`` becomes wrong.
        seed: an integer or a generator on the CPU.
        ignore_index: label of rows that stay as they are.

    Raises:
        TypeError: ``labels`` is no integer tensor, ``rate`` no number, ``redraw`` no bool, ``num_classes``, ``seed`` or
            ``ignore_index`` no integer.
        ValueError: an argument is out of range.

    Example:
        >>> labels, flipped = symmetric(torch.arange(10), 0.4, num_classes=10)
        >>> torch.equal(flipped, labels != torch.arange(10))
        True

    Source: ``redraw=True`` is the noise of 2306.05497, False that of 2006.13554 and most tables of other papers. The
    same rate means different shares of wrong labels.
    """
    num_classes, given = _check_labels(labels, num_classes, ignore_index)
    rate = closed_fraction.pack("rate", rate)
    redraw = bool(switch.pack("redraw", redraw))
    if not redraw and num_classes < 2:
        raise ValueError(f"num_classes must be at least 2 with redraw=False, got {num_classes}")
    generator = _generator(seed)
    replace = torch.rand(given.shape, generator=generator, dtype=torch.float32, device="cpu") < rate
    if redraw:
        drawn = torch.randint(num_classes, given.shape, generator=generator, device="cpu")
    else:
        step = torch.randint(1, num_classes, given.shape, generator=generator, device="cpu")
        drawn = (given + step) % num_classes
    return _result(labels, torch.where(replace, drawn, given), ignore_index)


def asymmetric(
    labels: Tensor,
    rate: float,
    num_classes: int,
    pairs: Mapping[int, int] | str,
    *,
    seed: Seed = 0,
    ignore_index: int = -100,
) -> NoisyLabels:
    """Replaces labels by the label of one similar class.

    Args:
        labels: class indices in ``[0, num_classes)``, integers of any shape and device.
        rate: probability that a label of a class in ``pairs`` is replaced, 0 to 1. Where classes have no pair, the
            share of wrong labels is smaller: half of it for CIFAR-10 and Fashion-MNIST.
        num_classes: number of classes.
        pairs: a mapping from each class to the one it is mistaken for, or a name in :data:`PAIRS`.
        seed: an integer or a generator on the CPU.
        ignore_index: label of rows that stay as they are.

    Raises:
        TypeError: ``labels`` is no integer tensor, ``rate`` no number, ``pairs`` no mapping of integers.
        ValueError: an argument is out of range, or the name is unknown.

    Example:
        >>> asymmetric(torch.tensor([9, 8]), 1.0, 10, "cifar10").labels  # truck -> car; ships stay ships
        tensor([1, 8])

    Source: 1609.03683; the pairs of Fashion-MNIST are those of 1805.07836.
    """
    return from_matrix(labels, pair_matrix(rate, num_classes, pairs), seed=seed, ignore_index=ignore_index)


def from_matrix(labels: Tensor, matrix: Tensor, *, seed: Seed = 0, ignore_index: int = -100) -> NoisyLabels:
    """Draws each label anew from the row of its class in a transition matrix.

    Args:
        labels: class indices in ``[0, C)``, integers of any shape and device.
        matrix: ``(C, C)``, a tensor: ``matrix[i, j]`` is the probability of label j for a sample of class i; >= 0, rows
            sum to 1.
        seed: an integer or a generator on the CPU.
        ignore_index: label of rows that stay as they are.

    Raises:
        TypeError: ``labels`` is no integer tensor.
        ValueError: ``matrix`` is no transition matrix, or a label is out of range.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> from_matrix(torch.tensor([0, 1, 1]), swap).labels
        tensor([1, 0, 0])
    """
    transition = check_matrix("matrix", matrix)
    _, given = _check_labels(labels, len(transition), ignore_index)
    generator = _generator(seed)
    drawn = given.clone()
    for cls, rows in _rows_of_classes(given, ignore_index):
        new = torch.multinomial(transition[cls], len(rows), replacement=True, generator=generator)
        drawn.view(-1)[rows] = new
    return _result(labels, drawn, ignore_index)


def instance_dependent(
    inputs: Tensor,
    labels: Tensor,
    rate: float,
    num_classes: int,
    *,
    std: float = 0.1,
    seed: Seed = 0,
    ignore_index: int = -100,
) -> NoisyLabels:
    """Noise that depends on the input: similar samples of a class get the same wrong label.

    Each sample has a rate q of its own, normal around ``rate`` and truncated to [0, 1]. Class y has a random projection
    ``W_y`` (features x C, standard normal). A sample x of class y keeps its label with probability 1 - q and gets label
    j != y with probability q times the softmax of ``x W_y`` over the classes other than y.

    Args:
        inputs: ``(N, ...)``, floating point and finite; flattened to features. Give pixels in [0, 1] or standardised
            ones, as the authors do: the larger the inputs, the more one wrong label wins for each sample.
        labels: class indices ``(N,)`` in ``[0, num_classes)``.
        rate: mean share of wrong labels, 0 to 1. Truncation moves it away from 0 and 1: ``rate=0`` with ``std=0.1``
            makes 8 % wrong.
        num_classes: number of classes C, at least 2.
        std: spread of q, > 0. 0.1 is the authors' value.
        seed: an integer or a generator on the CPU.
        ignore_index: label of rows that stay as they are.

    Raises:
        TypeError: ``labels`` is no integer tensor, or ``inputs`` no floating point tensor.
        ValueError: an argument is out of range.

    Example:
        >>> labels = torch.arange(8) % 4
        >>> instance_dependent(torch.rand(8, 16), labels, 0.4, num_classes=4).labels.shape
        torch.Size([8])

    Source: Xia et al. 2020 (2006.07836), algorithm 2. Deviation: only the projections of one class at a time are in
    memory, so that many classes fit.
    """
    num_classes, given = _check_labels(labels, num_classes, ignore_index)
    rate, std = closed_fraction.pack("rate", rate), positive.pack("std", std)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise TypeError(f"inputs must be a floating point tensor, got {kind_of(inputs)}")
    if given.dim() != 1 or inputs.shape[:1] != given.shape:
        raise ValueError(
            f"labels must have shape (N,) and inputs (N, ...), got {tuple(given.shape)} and {tuple(inputs.shape)}"
        )
    if not (finite := inputs.float().isfinite()).all():
        bad = inputs[~finite].flatten()[0].item()
        raise ValueError(f"inputs must be finite in float32, got {bad}")
    generator = _generator(seed)
    rates = _truncated_normal(rate, std, len(given), generator)
    flips = torch.rand(given.shape, generator=generator, dtype=torch.float64, device="cpu") < rates
    features = inputs.detach().unsqueeze(-1).flatten(1)
    drawn = given.clone()
    projections = torch.empty(features.shape[1], num_classes, dtype=torch.float32, device="cpu")
    for cls, rows in _rows_of_classes(given, ignore_index):
        projections.normal_(generator=generator)
        rows = rows[flips[rows]]  # these labels change for certain: q no longer matters
        scores = features[rows.to(features.device)].cpu().float() @ projections
        if not scores.isfinite().all():
            raise ValueError(f"inputs must be small enough for scores in float32, got {features.abs().max().item():g}")
        scores[:, cls] = -torch.inf
        if len(rows):
            drawn[rows] = torch.multinomial(scores.softmax(1), 1, generator=generator).squeeze(1)
    return _result(labels, drawn, ignore_index)


def symmetric_matrix(rate: float, num_classes: int, redraw: bool = True) -> Tensor:
    """The transition matrix of :func:`symmetric`: float64 ``(C, C)``, as :func:`from_matrix` takes it.

    Arguments and errors are those of :func:`symmetric`.

    Example:
        >>> symmetric_matrix(0.4, 2)
        tensor([[0.8000, 0.2000],
                [0.2000, 0.8000]], dtype=torch.float64)
    """
    rate, redraw = closed_fraction.pack("rate", rate), bool(switch.pack("redraw", redraw))
    num_classes = check_num_classes(num_classes, 1 if redraw else 2)
    others = num_classes if redraw else num_classes - 1
    matrix = torch.full((num_classes, num_classes), rate / others, dtype=torch.float64)
    matrix.fill_diagonal_(1.0 - rate + (rate / num_classes if redraw else 0.0))
    return matrix


def pair_matrix(rate: float, num_classes: int, pairs: Mapping[int, int] | str) -> Tensor:
    """The transition matrix of :func:`asymmetric`: float64 ``(C, C)``, as :func:`from_matrix` takes it.

    Arguments and errors are those of :func:`asymmetric`.

    Example:
        >>> pair_matrix(0.4, 2, {0: 1})
        tensor([[0.6000, 0.4000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    rate = closed_fraction.pack("rate", rate)
    num_classes = check_num_classes(num_classes, 1)
    if isinstance(pairs, str):
        if pairs not in PAIRS:
            raise ValueError(f"pairs must be a mapping or one of {', '.join(PAIRS)}, got {pairs!r}")
        pairs = PAIRS[pairs]
    if not isinstance(pairs, Mapping):
        raise TypeError(f"pairs must be a mapping or one of {', '.join(PAIRS)}, got {type(pairs).__name__}")
    matrix = torch.eye(num_classes, dtype=torch.float64)
    for pair in pairs.items():
        source, to = (check_index("a class in pairs", cls) for cls in pair)
        if not (0 <= source < num_classes and 0 <= to < num_classes and source != to):
            raise ValueError(f"pairs must lead from a class in [0, {num_classes}) to another, got {source}: {to}")
        matrix[source, source], matrix[source, to] = 1.0 - rate, rate
    return matrix


def estimate_transition(probabilities: Tensor, quantile: float | None = None) -> Tensor:
    """Estimates the transition matrix of the labels, from a network trained on them.

    For :class:`fused_losses.ForwardCorrectionLoss`. An anchor point of class i is a sample that surely belongs to it;
    what the network predicts for it is the distribution of the noisy labels of class i. The sample with the highest
    predicted probability of i is taken for one.

    Args:
        probabilities: predicted ``(N, C)``, rows sum to 1, of a network trained on the noisy labels with a proper loss
            such as cross entropy and not yet memorising them: on a validation set, or early in training.
        quantile: the anchor of a class is the sample at this quantile of its predicted probability, 0 to 1. 1 is the
            highest, which one odd sample decides. None: .97, the authors' value, or the median of a class with its
            equal share of the rows, ``1 - .5 / C``, whichever is higher.

    Returns:
        ``(C, C)``: entry [i, j] is the probability of label j for a sample of class i, rows sum to 1; float64 on the
        device of ``probabilities``.

    Raises:
        TypeError: ``probabilities`` is no floating point tensor.
        ValueError: a row is no distribution, or an argument is out of range.

    Example:
        >>> estimate_transition(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]), quantile=1.0)
        tensor([[0.9000, 0.1000],
                [0.2000, 0.8000]], dtype=torch.float64)

    Source: 1609.03683, Eq. 12 and 13.
    """
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be a floating point tensor, got {kind_of(probabilities)}")
    if probabilities.dim() != 2 or 0 in probabilities.shape:
        raise ValueError(f"probabilities must have shape (N, C), got {tuple(probabilities.shape)}")
    p = probabilities.detach().double()
    # In half precision rows sum to 1 within C roundings of at most 2^-9 each: near enough to be rescaled.
    if not ((p >= 0).all() and (p.sum(1) - 1).abs().max() <= 0.01):
        raise ValueError(
            "probabilities must be >= 0 with rows that sum to 1, got entries from "
            f"{float(p.min()):.4g} and sums from {float(p.sum(1).min()):.4g} to {float(p.sum(1).max()):.4g}; pass "
            "logits.softmax(1)"
        )
    if quantile is None:
        quantile = max(0.97, 1.0 - 0.5 / p.shape[1])
    quantile = closed_fraction.pack("quantile", quantile)
    anchors = p.kthvalue(1 + round(quantile * (len(p) - 1)), dim=0).indices
    chosen = p[anchors]
    return chosen / chosen.sum(1, keepdim=True)


def _check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[int, Tensor]:
    """The number of classes, and the labels as a contiguous int64 tensor on the CPU."""
    num_classes = check_num_classes(num_classes, 1)
    if not is_integer_tensor(labels):
        raise TypeError(f"labels must be an integer tensor, got {kind_of(labels)}")
    if num_classes - 1 > torch.iinfo(labels.dtype).max:
        raise ValueError(
            f"labels must have a dtype that holds every class, got num_classes {num_classes} and {labels.dtype}"
        )
    integer("ignore_index", ignore_index)
    given = labels.detach().to("cpu", torch.int64).contiguous()
    bad = (given != ignore_index) & ((given < 0) | (given >= num_classes))
    if bad.any():
        raise ValueError(f"labels must be in [0, {num_classes}) or {ignore_index}, got {int(given[bad][0])}")
    return num_classes, given


def _generator(seed: Seed) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        if seed.device.type != "cpu":
            raise ValueError(f"seed must be an integer or a generator on the CPU, got one on {seed.device}")
        return seed
    return torch.Generator().manual_seed(check_index("seed", seed, most=2**64 - 1))


def _rows_of_classes(labels: Tensor, ignore_index: int) -> list[tuple[int, Tensor]]:
    """The classes that occur, ascending, each with the numbers of its rows (in the flattened labels)."""
    flat = labels.view(-1)
    order = flat.argsort(stable=True)
    classes, counts = torch.unique_consecutive(flat[order], return_counts=True)
    rows = torch.split(order, counts.tolist())
    return [(cls, part) for cls, part in zip(classes.tolist(), rows, strict=True) if cls != ignore_index]


def _truncated_normal(mean: float, std: float, count: int, generator: torch.Generator) -> Tensor:
    """Normal numbers in [0, 1], by the inverse of their distribution function."""
    low, high = torch.special.ndtr((torch.arange(2, dtype=torch.float64, device="cpu") - mean) / std)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    normal: Tensor = torch.special.ndtri(low + (high - low) * uniform)
    return (mean + std * normal).clamp(0.0, 1.0)


def _result(labels: Tensor, drawn: Tensor, ignore_index: int) -> NoisyLabels:
    moved = drawn.to(labels.device, labels.dtype)
    noisy = torch.where(is_ignored(labels, ignore_index), labels, moved)
    return NoisyLabels(noisy, noisy != labels)
