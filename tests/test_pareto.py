"""Surrogates are exact where a loss is quadratic; of the points on a grid just those stay that none beats."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import pareto
from streammerge.pareto import Point, Quadratic

NUMBERS = st.floats(-10, 10)


@given(st.tuples(*[NUMBERS] * 6), st.integers(6, 9), st.floats(1.2, 4.0))
def test_a_quadratic_function_is_found_again(coefficients: tuple[float, ...], most: int, span: float) -> None:
    """Six to nine points of the design determine it, wherever it is asked then."""
    wanted = Quadratic(coefficients)
    points = pareto.design(1 / span, span, most)
    assert len(points) == len(set(points)) == most
    found = pareto.fit(points, [wanted.at(*point) for point in points])
    for a, b in itertools.product((0.2, 1.0, 3.1), repeat=2):
        assert found.at(a, b) == pytest.approx(wanted.at(a, b), abs=1e-6)


@settings(deadline=None, max_examples=10)
@given(st.tuples(*[NUMBERS] * 6), st.tuples(*[NUMBERS] * 6))
def test_the_front_is_what_none_beats(old: tuple[float, ...], new: tuple[float, ...]) -> None:
    """No point of the grid is as good in both losses and better in one than a point of the front, and each
    point of the grid is met or beaten by one of the front.
    """
    one, other = Quadratic(old), Quadratic(new)
    front = pareto.front(one, other, 0.5, 2.0)
    values = [0.5 + 1.5 * place / (pareto.GRID - 1) for place in range(pareto.GRID)]
    grid = [Point(a, b, one.at(a, b), other.at(a, b)) for a in values for b in values]
    assert set(front) <= set(grid)
    for point in front[:: max(1, len(front) // 5)]:
        assert not any(
            g.old <= point.old and g.new <= point.new and (g.old, g.new) != (point.old, point.new)
            for g in grid
        )
    for g in grid:
        assert any(point.old <= g.old and point.new <= g.new for point in front)


def test_two_valleys_have_the_line_between_them_as_their_front() -> None:
    """Of two round valleys the front lies between their bottoms, and the preference moves along it."""
    old = Quadratic((0.75**2 + 1.0, -2 * 0.75, -2.0, 1.0, 0.0, 1.0))  # bottom at (0.75, 1)
    new = Quadratic((1.5**2 + 1.0, -2 * 1.5, -2.0, 1.0, 0.0, 1.0))  # bottom at (1.5, 1)
    front = pareto.front(old, new, 0.5, 2.0)
    assert all(0.7 <= point.a <= 1.55 and abs(point.b - 1) <= 0.04 for point in front)
    assert [point.a for point in front] == sorted(point.a for point in front)
    for weight, a in ((1.0, 0.75), (0.5, 1.125), (0.0, 1.5)):
        assert pareto.prefer(front, (weight, 1 - weight)).a == pytest.approx(a, abs=0.04)
