"""Two losses as quadratic functions of two coefficients, and the coefficients between which to choose.

After MAP, Model Merging with Amortized Pareto Front (arXiv 2406.07529): a few merged models are measured, a
quadratic surrogate of each loss is fitted to them, and the front is computed on the surrogates, which cost
nothing. Pure arithmetic in float64; knows no models.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

FEWEST_POINTS = 6  # as many as a quadratic function of two numbers has coefficients
GRID = 41  # values of either coefficient


class Quadratic(NamedTuple):
    """c0 + c1 a + c2 b + c3 a² + c4 ab + c5 b²."""

    coefficients: tuple[float, ...]

    def at(self, a: float, b: float) -> float:
        """Its value."""
        return math.fsum(c * x for c, x in zip(self.coefficients, monomials(a, b), strict=True))


class Point(NamedTuple):
    """Coefficients of the old and the new, and both losses as the surrogates have them."""

    a: float
    b: float
    old: float
    new: float


def monomials(a: float, b: float) -> tuple[float, ...]:
    """What a quadratic function is a sum of."""
    return 1.0, a, b, a * a, a * b, b * b


def design(low: float, high: float, most: int) -> list[tuple[float, float]]:
    """Choose where to measure, (1, 1) first: every six or more of them determine a quadratic function."""
    around = [
        (high, 1.0), (1.0, high), (low, 1.0), (1.0, low), (high, high), (low, low), (high, low), (low, high),
    ]  # fmt: skip
    return [(1.0, 1.0), *around][:most]


def fit(points: Sequence[tuple[float, float]], values: Sequence[float]) -> Quadratic:
    """Fit a quadratic function by least squares; exactly, where there is one through all points."""
    assert len(points) >= FEWEST_POINTS
    rows = torch.tensor([monomials(a, b) for a, b in points], dtype=torch.float64)
    wanted = torch.tensor(list(values), dtype=torch.float64)[:, None]
    found = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    return Quadratic(tuple(found[:, 0].tolist()))


def front(old: Quadratic, new: Quadratic, low: float, high: float) -> list[Point]:
    """Give the points of a grid from which neither loss can fall but by the other rising, old before new."""
    values = [low + (high - low) * place / (GRID - 1) for place in range(GRID)]
    points = [Point(a, b, old.at(a, b), new.at(a, b)) for a in values for b in values]
    chosen: list[Point] = []
    for point in sorted(points, key=lambda point: (point.old, point.new)):
        if not chosen or point.new < chosen[-1].new:
            chosen.append(point)
    return chosen


def prefer(points: Sequence[Point], weights: tuple[float, float]) -> Point:
    """Choose where the weighted sum of both losses is least; the first of several."""
    return min(points, key=lambda point: weights[0] * point.old + weights[1] * point.new)
