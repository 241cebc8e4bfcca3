"""TIES-merging: trim every delta to its largest elements, elect a sign, merge what agrees (arXiv 2306.01708).

Exact after every fine-tune: the mass of either sign decides the election and holds the sum. For `sum` and
`mean` any fine-tune can be taken out again up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Gt, Le

from streammerge import linalg, signs

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Layout, Slots, Totals, Weight

WEIGHTED = True
ORDER_FREE = True
ELEMENTWISE = True
PAPER = "TIES-merging, arXiv 2306.01708, section 3"
NOTES = "exact at every step; the paper's own continual baseline trims and elects again at each merge"

Density = Annotated[float, Gt(0.0), Le(1.0)]
Scope = Literal["model", "tensor"]
Agg = Literal["mean", "sum", "max"]
SLOTS = {
    "sum": signs.SLOTS,
    "mean": signs.COUNTED,
    "max": {"sum": torch.float32, "highest": torch.float32, "lowest": torch.float32},
}


def layout(weight: Weight, count: int, *, agg: Agg = "mean") -> Layout:
    """List what is remembered, each of the weight's shape."""
    del count
    return {slot: (dtype, weight.shape) for slot, dtype in SLOTS[agg].items()}


def model_ranks(elements: int, *, density: Density = 0.2, scope: Scope = "model") -> tuple[int, ...]:
    """Rank of the smallest magnitude that is kept, where one threshold holds for the whole model."""
    return (_rank(elements, density),) if scope == "model" else ()


def weight_ranks(elements: int, *, density: Density = 0.2, scope: Scope = "model") -> tuple[int, ...]:
    """Rank of the smallest magnitude that is kept, where each weight has a threshold of its own."""
    return (_rank(elements, density),) if scope == "tensor" else ()


def _rank(elements: int, density: float) -> int:
    return max(elements - int(elements * density), 1)


def fold(
    slots: Slots, arrival: Arrival, *, density: Density = 0.2, scope: Scope = "model", agg: Agg = "mean"
) -> Slots:
    """Add the elements of a delta that are at least as large as its threshold.

    density  share of elements that are kept
    scope    whether `density` holds for the whole model or for each weight
    """
    del density, scope
    kept = _trimmed(arrival)
    if agg == "max":
        kept = kept * arrival.factor
        return {
            "sum": slots["sum"] + kept,
            "highest": torch.maximum(slots["highest"], kept),
            "lowest": torch.minimum(slots["lowest"], kept),
        }
    return signs.add(slots, kept, arrival.factor)


def unfold(slots: Slots, arrival: Arrival) -> Slots:
    """Subtract what `fold` added, up to float32 rounding; not for `agg: max`, see `removable`."""
    return signs.add(slots, _trimmed(arrival), arrival.factor, sign=-1)


def removable(*, agg: Agg = "mean") -> bool:
    """A maximum forgets what it was before."""
    return agg != "max"


def join(slots: Slots, others: Slots) -> Slots:
    """Put two states together that were folded apart."""
    combine = {"highest": torch.maximum, "lowest": torch.minimum}
    return {slot: combine.get(slot, torch.add)(values, others[slot]) for slot, values in slots.items()}


def _trimmed(arrival: Arrival) -> Tensor:
    delta = linalg.dense(arrival.delta)
    if not arrival.cuts:  # a weight without elements has no threshold of its own
        return delta
    kept = (delta.abs() >= arrival.cuts[0]).float().mul_(delta)
    return kept.add_(0.0)  # no -0.0, which a maximum may take or leave


def tally(slots: Slots) -> float:
    """Sum of the elected signs."""
    if "highest" in slots:
        return float(torch.sign(slots["sum"]).sum(dtype=torch.float64))
    return signs.tally(slots)


def render(
    slots: Slots, totals: Totals, *, agg: Agg = "mean", scale: Annotated[float, Gt(0.0)] = 1.0
) -> Tensor:
    """Give the mean, sum or largest of the elements that have the elected sign, times `scale`."""
    if agg == "max":
        up = slots["sum"] > 0 if totals.tally < 0 else slots["sum"] >= 0
        return scale * torch.where(up, slots["highest"], slots["lowest"])
    mass, weight = signs.elect(slots, totals.tally)
    return scale * mass / weight
