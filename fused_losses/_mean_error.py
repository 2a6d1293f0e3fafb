"""The average of ``d loss / d logit of the labelled class`` over standard normal logits of the other classes.

A loss of ``p_y`` alone sees the other classes through ``S``, the sum of their exponentials: one class with logit
``log S`` does as well. The distribution of ``S`` follows from its characteristic function, so the average is a sum
over a few thousand nodes for any number of classes. Other losses are averaged over a fixed random sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
RowLoss = Callable[[Tensor, Tensor], Tensor]  # (N, C) logits, (N,) targets -> (N,) values

_SEED = 0
_SAMPLE_ELEMENTS = 1 << 20  # logits in the random sample ...
_SAMPLE_ROWS = (16, 1 << 17)  # ... within these bounds of its rows
_CHUNK_ELEMENTS = 1 << 21
_MEAN = math.exp(0.5)  # of e^z for standard normal z ...
_VARIANCE = math.e**2 - math.e  # ... and its variance
_TAIL_MASS = 1e-14  # probability left out above the largest node
_SPECTRUM_END = math.log(1e-15)  # log |characteristic function| beyond which it is taken as 0


def mean_slopes(loss: RowLoss, num_classes: int, z: Array) -> Array:
    """<d loss / d z_0> for every value of ``z`` (n,); the label is class 0, the other logits are N(0, 1)."""
    if depends_on_target_only(loss, num_classes):
        return _exact_means(loss, num_classes, z)
    return _sample_means(loss, num_classes, z)


def target_slopes(loss: RowLoss, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N,) and derivatives (N,) with respect to the logit of class 0, the label of every row of (N, C)."""
    logits = logits.detach().requires_grad_()
    with torch.enable_grad():
        values = loss(logits, logits.new_zeros(len(logits), dtype=torch.int64))
        if values.shape != logits.shape[:1]:
            raise ValueError(
                f'loss must return one value per row (reduction="none"), got shape {tuple(values.shape)} '
                f"for {len(logits)} rows"
            )
        (gradient,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), gradient[:, 0]


def depends_on_target_only(loss: RowLoss, num_classes: int) -> bool:
    """Tries whether replacing the other classes by one of the same total changes value or slope."""
    if num_classes == 2:
        return True
    constants = [-8.0, -3.0, -0.5, 1.0, 4.0, math.log(num_classes)]
    kinds = len(constants) + 3
    rows = kinds * min(max(_SAMPLE_ELEMENTS // (8 * kinds * num_classes), 1), 100)
    others = torch.from_numpy(np.random.default_rng(_SEED).standard_normal((rows, num_classes - 1)))
    top, total = others.amax(1), others.logsumexp(1)
    # With the target's logit above all others and below their total, a loss that asks for the largest one notices.
    by_kind = torch.stack([*(torch.full_like(top, z) for z in constants), top - 0.1, (top + total) / 2, total + 0.1])
    target_logits = by_kind[torch.arange(rows) % kinds, torch.arange(rows)]
    logits = torch.cat([target_logits[:, None], others], dim=1)
    merged = torch.stack([target_logits, total], dim=1)
    expected = target_slopes(loss, logits)
    try:
        found = target_slopes(loss, merged)
    except (IndexError, RuntimeError, ValueError):  # it has something per class, for example class weights
        return False
    # No coarser than rounding: the sum of K exponentials is good to 1e-13 for a million classes.
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))


def _exact_means(loss: RowLoss, num_classes: int, z: Array) -> Array:
    log_sum, weight = log_sum_distribution(num_classes - 1)
    means = np.empty(len(z))
    for index, value in enumerate(z):
        logits = torch.from_numpy(np.column_stack([np.full(len(log_sum), value), log_sum]))
        means[index] = weight @ target_slopes(loss, logits)[1].numpy()
    return means


def _sample_means(loss: RowLoss, num_classes: int, z: Array) -> Array:
    # Rows come in pairs of opposite sign: the errors of odd functions cancel. All values of z are averaged over the
    # same rows, so the means are smooth in z and in the parameters of the loss.
    rows = min(max(_SAMPLE_ELEMENTS // num_classes, _SAMPLE_ROWS[0]), _SAMPLE_ROWS[1]) // 2
    chunk = max(1, _CHUNK_ELEMENTS // (2 * num_classes))
    generator = np.random.default_rng(_SEED)
    totals = np.zeros(len(z))
    for start in range(0, rows, chunk):
        others = generator.standard_normal((min(chunk, rows - start), num_classes - 1))
        logits = torch.from_numpy(np.pad(np.concatenate([others, -others]), [(0, 0), (1, 0)]))
        for index, value in enumerate(z):
            logits[:, 0] = float(value)
            totals[index] += float(target_slopes(loss, logits)[1].sum())
    return totals / (2 * rows)


@functools.lru_cache(maxsize=32)
def log_sum_distribution(count: int) -> tuple[Array, Array]:
    """Nodes ``log S`` and weights (they sum to 1) of ``S = e^(z_1) + ... + e^(z_count)``, z standard normal."""
    if count == 1:
        step = 0.01
        node = np.arange(-10.0, 10.0 + step / 2, step)
        return node, np.exp(-0.5 * node**2) * (step / math.sqrt(2.0 * math.pi))
    if count == 2:  # the density of S falls off too slowly for a Fourier series of moderate length
        step = 0.1
        node = np.arange(-9.0, 9.0 + step / 2, step)
        weight = np.exp(-0.5 * node**2) * (step / math.sqrt(2.0 * math.pi))
        return np.logaddexp(node[:, None], node).ravel(), np.outer(weight, weight).ravel()
    return _fourier_distribution(count)


def _fourier_distribution(count: int) -> tuple[Array, Array]:
    """The density of S on a uniform grid: the inverse Fourier transform of its characteristic function."""
    mean, spread = count * _MEAN, 10.0 * math.sqrt(count * _VARIANCE)
    # Far out, S is large because a single term is.
    largest_term = math.exp(-NormalDist().inv_cdf(_TAIL_MASS / count))
    low, high = max(0.0, mean - spread), mean + spread + largest_term
    scan = np.exp(np.arange(-15.0, 15.0, 0.02))
    end = float(scan[np.argmax(_log_characteristic(scan, count).real < _SPECTRUM_END)])

    size = max(1 << 13, 1 << math.ceil(math.log2(end * (high - low) / math.pi)))
    frequency = np.arange(0.0, end, 2.0 * math.pi / (high - low))[: size // 2]
    spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
    spectrum[: len(frequency)] = np.exp(np.conj(_log_characteristic(frequency, count)) + 1j * frequency * low)
    weight = np.fft.irfft(spectrum, size)
    node = low + (high - low) / size * np.arange(size)
    kept = (node > 0.0) & (weight > 1e-18)  # the others are rounding errors of the transform
    return np.log(node[kept]), weight[kept] / weight[kept].sum()


def _log_characteristic(frequency: Array, count: int) -> npt.NDArray[np.complex128]:
    """log E[exp(i t S)] for frequencies t >= 0.

    E[exp(i t e^z)] oscillates without end along the real axis. Moving the path to z + i pi/2 turns i e^z into -e^z:
    the integrand becomes exp(pi^2 / 8 - i pi z / 2) N(z) exp(-t e^z), which the trapezoid rule sums to rounding.
    Subtracting 1 (the same integral at t = 0) keeps the digits that the power ``count`` needs at small t.
    """
    step = 0.1
    node = np.arange(-14.0, 14.0 + step / 2, step)
    factor = np.exp(-0.5 * node**2 + math.pi**2 / 8.0 - 0.5j * math.pi * node) * (step / math.sqrt(2.0 * math.pi))
    parts = np.array_split(frequency, len(frequency) // 8192 + 1)
    minus_one = np.concatenate([np.expm1(-np.outer(part, np.exp(node))) @ factor for part in parts])
    result: npt.NDArray[np.complex128] = count * np.log1p(minus_one)
    return result
