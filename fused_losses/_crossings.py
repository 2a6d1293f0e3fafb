"""Where two fitted densities are equal."""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# A skew-normal crossing is looked for between these probabilities, as in the paper's code.
_LOWEST, _HIGHEST = 0.001, 0.999


def gaussian_crossing(mean_0: float, std_0: float, mean_1: float, std_1: float) -> float:
    """Where N(mean_0, std_0) equals N(mean_1, std_1), nearest to the midpoint of the means: between them if possible.

    With u = x - midpoint and d half the distance of the means, the difference of the log densities is
    a u^2 + b u + c. Its discriminant is a sum of terms that are not negative, so nothing cancels; of the two roots
    q / a and c / q with q = -(b + sign(b) sqrt(discriminant)) / 2 neither subtracts like from like.
    """
    if mean_0 == mean_1 and std_0 == std_1:
        raise ValueError(
            f"classes 0 and 1 have the same mean {mean_0:g} and the same spread {std_0:g}: no cut-off exists"
        )
    # In units of the smaller spread, which keeps squares in range.
    unit = min(std_0, std_1)
    half, precision_0, precision_1 = (mean_1 - mean_0) / (2.0 * unit), (unit / std_0) ** 2, (unit / std_1) ** 2
    log_ratio = math.log(std_1 / std_0)
    a = 0.5 * (precision_1 - precision_0)
    b = -half * (precision_0 + precision_1)
    c = half**2 * a + log_ratio
    discriminant = 4.0 * half**2 * precision_0 * precision_1 + 2.0 * (precision_0 - precision_1) * log_ratio
    q = -0.5 * (b + math.copysign(math.sqrt(discriminant), b))
    roots = [c / q] if a == 0.0 else [q / a, c / q]
    # The narrower density is the larger one in an interval around its mean, so at most one root lies between the means.
    # It is the nearest to the midpoint: every other root is further from it than the means are.
    return 0.5 * (mean_0 + mean_1) + min(roots, key=abs) * unit


@dataclass(frozen=True)
class SkewNormal:
    """The density ``2 / scale * phi(t) * Phi(shape t)`` with ``t = (x - location) / scale``."""

    shape: float
    location: float
    scale: float

    @staticmethod
    def fit(samples: Array, label: int) -> SkewNormal:
        """Maximum likelihood."""
        stats = _scipy("stats")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of trial values out of range; the result is checked
            try:
                shape, location, scale = map(float, stats.skewnorm.fit(samples))
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"class {label}: no skew-normal density could be fitted ({error})") from error
        if not (math.isfinite(shape) and math.isfinite(location) and 0.0 < scale < math.inf):
            raise ValueError(f"class {label}: the skew-normal fit gave {shape=:g}, {location=:g}, {scale=:g}")
        return SkewNormal(shape, location, scale)

    def log_density(self, x: Array) -> Array:
        """The logarithm, which does not underflow where the density does; ``log(2 / sqrt(2 pi))`` left out."""
        t = (x - self.location) / self.scale
        result: Array = -0.5 * t**2 + _scipy("special").log_ndtr(self.shape * t) - math.log(self.scale)
        return result

    def mode(self) -> float:
        """Where the density is largest; never further than one scale from the location."""
        found = _scipy("optimize").minimize_scalar(
            lambda x: -self.log_density(np.asarray(x)),
            bounds=(self.location - self.scale, self.location + self.scale),
            method="bounded",
        )
        return float(found.x)


def skewnorm_crossing(first: SkewNormal, second: SkewNormal) -> float:
    """Where the densities are equal: between their modes if possible, else nearest to the midpoint of the modes."""

    def difference(x: Array) -> Array:
        return first.log_density(x) - second.log_density(x)

    modes = first.mode(), second.mode()
    low, high = np.clip(sorted(modes), _LOWEST, _HIGHEST)
    middle = 0.5 * (low + high)
    at_low, at_high = (float(difference(np.asarray(x))) for x in (low, high))
    if not at_low * at_high < 0.0:
        grid = np.linspace(_LOWEST, _HIGHEST, 9981)
        positive = difference(grid) > 0.0
        changes = np.flatnonzero(positive[1:] != positive[:-1])
        if changes.size == 0:
            raise ValueError(
                f"the densities of classes 0 and 1 (modes {modes[0]:.4g} and {modes[1]:.4g}) do not cross between "
                f"{_LOWEST} and {_HIGHEST}: no cut-off exists"
            )
        nearest = changes[np.argmin(np.abs(grid[changes] - middle))]
        low, high = grid[nearest], grid[nearest + 1]
    return float(_scipy("optimize").brentq(lambda x: float(difference(np.asarray(x))), low, high, xtol=1e-14))


def _scipy(part: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError as error:
        raise ImportError("the skew-normal cut-off needs scipy: pip install scipy") from error
