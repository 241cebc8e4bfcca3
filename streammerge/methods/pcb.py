"""PCB-Merging: elements compete, within a fine-tune by size and between fine-tunes by agreement (2410.02396).

The sum of all deltas is remembered; what an element scores depends on the final sum, so every fine-tune is
read again when weights are written, one weight in memory at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Gt, Le

from streammerge import linalg, sums

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from streammerge.methods import Arrival, Slots, Totals

SLOTS = sums.SLOTS
WEIGHTED = False
ORDER_FREE = True
PLAIN_SUM = True
PAPER = "PCB-Merging, arXiv 2410.02396, section 3"
NOTES = "as the authors' root script has it; one lam for all fine-tunes, not searched for"

TAIL = 1e-4  # share of magnitudes that is clamped at either end
LEAST = 1e-12

Ratio = Annotated[float, Gt(0.0), Le(1.0)]

fold, unfold, join = sums.fold, sums.unfold, sums.join


def model_ranks(elements: int) -> tuple[int, ...]:
    """Ranks of the magnitudes to which all others are clamped."""
    return _ranks(elements, TAIL, TAIL)


def score_ranks(elements: int, *, ratio: Ratio = 0.1) -> tuple[int, ...]:
    """Ranks of the score below which an element is dropped, and of the highest."""
    return _ranks(elements, 1.0 - ratio, 0.0)


def _ranks(elements: int, below: float, above: float) -> tuple[int, ...]:
    first = min(int(elements * below), elements - 1)
    return first + 1, max(int(elements * (1.0 - above) - 1), 0) + 1


def _between(values: Tensor, cuts: tuple[float, ...]) -> Tensor:
    """Clamp to the two cuts and stretch them to 0 and 1."""
    low, high = cuts
    if high <= low:
        return torch.zeros_like(values)
    return (values.clamp(low, high) - low) / (high - low)


def score(slots: Slots, totals: Totals, arrival: Arrival) -> Tensor:
    """exp(T (a^2 - 1)) tanh(delta * sum), with a the magnitude between its two cuts.

    The paper's exp(T a^2) leaves float32's range at 89 fine-tunes; the factor between the two cancels.
    """
    delta = linalg.dense(arrival.delta)
    within = _between(delta.abs(), arrival.cuts).square()
    return torch.exp(totals.count * (within - 1.0)) * torch.tanh(delta * slots["sum"])


def render(
    slots: Slots,
    totals: Totals,
    arrivals: Iterable[Arrival],
    *,
    ratio: Ratio = 0.1,
    lam: Annotated[float, Gt(0.0)] = 1.0,
    scale: Annotated[float, Gt(0.0)] = 1.0,
) -> Tensor:
    """Mean of the clamped deltas, each element weighted by its score; times `lam` and `scale`.

    ratio  share of each fine-tune's elements that has a score at all
    lam    what every delta is multiplied by before the mean, `scale` what the mean is multiplied by
    """
    del ratio
    mass, weight = torch.zeros_like(slots["sum"]), torch.zeros_like(slots["sum"])
    for arrival in arrivals:
        share = _between(score(slots, totals, arrival), arrival.score_cuts)
        delta = linalg.dense(arrival.delta)
        mass += share * delta.sign() * delta.abs().clamp(*arrival.cuts)
        weight += share
    return (lam * scale) * mass / weight.clamp(min=LEAST)
