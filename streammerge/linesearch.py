"""The least value of a function of one number within bounds, by few evaluations: Brent's method.

Golden sections, and steps to the vertex of a parabola through the three best points where that helps. After
R. P. Brent, Algorithms for Minimization without Derivatives, 1973, chapter 5. Deterministic: the points
follow from the values. A function may be infinite where it has no value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = (3 - math.sqrt(5)) / 2


@dataclass
class Bracket:
    """Where the least value lies, and the three best points, best first."""

    low: float
    high: float
    best: float
    second: float
    third: float


def minimise(
    loss: Callable[[float], float],
    low: float,
    high: float,
    *,
    start: float,
    evaluations: int,
    tolerance: float = 0.02,
) -> list[tuple[float, float]]:
    """Evaluate `loss` at most so many times, `start` first; gives all points in their order, with values.

    tolerance  points lie no nearer to one another
    """
    assert low < start < high
    found = {start: loss(start)}
    place = Bracket(low, high, start, start, start)
    step = before = 0.0
    while len(found) < evaluations:
        middle = (place.low + place.high) / 2
        if abs(place.best - middle) <= 2 * tolerance - (place.high - place.low) / 2:
            break
        parabolic = vertex(place, found) if abs(before) > tolerance else None
        is_short = parabolic is not None and abs(parabolic - place.best) < abs(before) / 2
        if parabolic is not None and is_short and place.low < parabolic < place.high:
            before, step = step, parabolic - place.best
            if min(parabolic - place.low, place.high - parabolic) < 2 * tolerance:
                step = math.copysign(tolerance, middle - place.best)
        else:
            before = (place.low if place.best >= middle else place.high) - place.best
            step = GOLDEN * before
        point = place.best + (step if abs(step) >= tolerance else math.copysign(tolerance, step))
        found[point] = loss(point)
        narrow(place, point, found)
    return list(found.items())


def vertex(place: Bracket, found: dict[float, float]) -> float | None:
    """Give the vertex of the parabola through the three best points; None where they have none below."""
    x, w, v = place.best, place.second, place.third
    if len({x, w, v}) < 3 or not all(math.isfinite(found[point]) for point in (x, w, v)):
        return None
    r = (x - w) * (found[x] - found[v])
    q = (x - v) * (found[x] - found[w])
    if q == r:
        return None
    return x - ((x - v) * q - (x - w) * r) / (2 * (q - r))


def narrow(place: Bracket, point: float, found: dict[float, float]) -> None:
    """Take a new point in."""
    if found[point] <= found[place.best]:
        place.low, place.high = (place.best, place.high) if point >= place.best else (place.low, place.best)
        place.best, place.second, place.third = point, place.best, place.second
        return
    place.low, place.high = (point, place.high) if point < place.best else (place.low, point)
    if found[point] <= found[place.second] or place.second == place.best:
        place.second, place.third = point, place.second
    elif found[point] <= found[place.third] or place.third in (place.best, place.second):
        place.third = point
