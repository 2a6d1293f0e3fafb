"""The root of a function of one number nearest to a given one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

Function = Callable[[float], float]
Point = tuple[float, float]  # an argument, and the function there

_FIRST_STEP = 0.1  # of the start
_GROWTH = 1.5  # of the steps
_STEPS = 40
_DIP_STEPS = 24  # narrow a dip to 1e-5 of its width
_GOLDEN = 0.5 * (3.0 - math.sqrt(5.0))


def nearest_root(
    function: Function, start: float, holds: Callable[[float], bool] = math.isfinite
) -> tuple[float | None, list[float]]:
    """A root of a continuous function, or None, and what the function was where it was asked.

    It goes away from ``start`` in both directions, by a tenth at first and by half as much again every time, as far as
    ``holds`` is true, and looks closer where the sign changes or where the function comes near to 0 and goes away
    again. So it is the nearest root, but for pairs of roots closer together than a step, which may go unnoticed.
    """
    first = start, function(start)
    trails = {sign: [first] for sign in (1.0, -1.0)}
    step = _FIRST_STEP * abs(start) or _FIRST_STEP
    walks = {sign: _walk(first, sign * step, function, holds) for sign in trails}
    roots = [start] if first[1] == 0.0 else []
    while walks:
        for sign, walk in list(walks.items()):
            trail = trails[sign]
            is_beyond = any(abs(trail[-1][0] - start) >= abs(root - start) for root in roots)
            point = None if is_beyond else next(walk, None)
            if point is None:
                del walks[sign]
                continue
            trail.append(point)
            around = trail[-3:] if len(trail) > 2 else [*trails[-sign][1:2], *trail]
            roots += _roots_within(function, around)
    reached = [value for trail in trails.values() for _, value in trail]
    return min(roots, key=lambda root: abs(root - start), default=None), reached


def _walk(start: Point, step: float, function: Function, holds: Callable[[float], bool]) -> Iterator[Point]:
    """Points going away from ``start``: in growing steps, halved at the end of the range."""
    here = start[0]
    for _ in range(_STEPS):
        there = here + step
        try:
            value = function(there) if holds(there) else math.nan
        except ValueError:  # not allowed together with other arguments
            value = math.nan
        if math.isfinite(value):
            yield there, value
            here, step = there, _GROWTH * step
        else:
            step *= 0.5


def _roots_within(function: Function, points: list[Point]) -> list[float]:
    """Between the last two of up to three points; or between all three, where the one amidst is nearest to 0."""
    *_, a, b = points
    if a[1] * b[1] <= 0.0:
        return [_root(function, a, b)]
    before = points[0]
    if len(points) < 3 or before[1] * a[1] <= 0.0 or not abs(a[1]) < min(abs(before[1]), abs(b[1])):
        return []
    bottom = _other_side(function, before[0], a, b[0])
    return [] if bottom is None else [_root(function, before, bottom), _root(function, bottom, b)]


def _other_side(function: Function, low: float, middle: Point, high: float) -> Point | None:
    """A point between ``low`` and ``high`` with the other sign than ``middle``, by golden sections; None: not found."""
    for _ in range(_DIP_STEPS):
        wider = high if abs(high - middle[0]) > abs(middle[0] - low) else low
        x = middle[0] + _GOLDEN * (wider - middle[0])
        point = x, function(x)
        if point[1] * middle[1] <= 0.0:
            return point
        if abs(point[1]) < abs(middle[1]):
            low, middle, high = (middle[0], point, high) if wider == high else (low, point, middle[0])
        elif wider == high:
            high = x
        else:
            low = x
    return None


def _root(function: Function, first: Point, second: Point) -> float:
    """Between two points where the function has opposite signs: regula falsi, Illinois variant."""
    (a, at_a), (b, at_b) = first, second
    for _ in range(100):
        if at_b == 0.0 or abs(b - a) <= 1e-13 * (abs(a) + abs(b)):
            break
        middle = b - at_b * (b - a) / (at_b - at_a)
        at_middle = function(middle)
        if at_middle * at_b < 0.0:
            a, at_a = b, at_b
        else:
            at_a *= 0.5  # Illinois rule: without it the same end would stay, and convergence be linear
        moved, b, at_b = abs(middle - b), middle, at_middle
        if moved <= 1e-13 * abs(b):
            break
    return b
