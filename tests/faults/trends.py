"""Does a figure grow with the number of fine-tunes? Slopes that restarts and odd readings do not bend.

The slope is the median of those of all pairs of readings of one life of the process (Theil and Sen; pooled
over lives as Hirsch, Slack and Smith pool seasons, 1982), with Sen's interval: what a restart changes falls
out, and what grows from arrival to arrival stays.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Z95 = 1.96
MAX_READINGS = 150  # of a life: more are thinned out, for the pairs are counted in squares


@dataclass(frozen=True)
class Slope:
    """What is added per fine-tune, and between which bounds that is with 95 % confidence."""

    value: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.value:+,.0f} ({self.lowest:+,.0f} to {self.highest:+,.0f})"


def slope(lives: Sequence[Sequence[tuple[float, float]]]) -> Slope:
    """Give the slope within lives: each has its readings (fine-tunes so far, figure)."""
    slopes: list[float] = []
    variance = 0.0
    for life in lives:
        kept = life[:: math.ceil(len(life) / MAX_READINGS)] if life else []
        slopes += [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(kept, 2) if x2 > x1]
        n = len(kept)
        variance += n * (n - 1) * (2 * n + 5) / 18
    if not slopes:
        return Slope(math.nan, math.nan, math.nan)
    slopes.sort()
    reach = Z95 * math.sqrt(variance)
    first = max(0, math.floor((len(slopes) - reach) / 2))
    last = min(len(slopes) - 1, math.ceil((len(slopes) + reach) / 2))
    return Slope(statistics.median(slopes), slopes[first], slopes[last])


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """Give the medians of the first and of the last tenth."""
    size = max(1, len(values) // 10)
    if not values:
        return math.nan, math.nan
    return statistics.median(values[:size]), statistics.median(values[-size:])
