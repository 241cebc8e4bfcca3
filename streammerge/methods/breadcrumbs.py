"""Model breadcrumbs: drop the largest elements of every delta and the small ones, add the rest (2312.06795).

The counts are exact: of elements with equal magnitude at a cut, of which bf16 has many, the earlier ones
count as the larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt

from streammerge import linalg, sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Slots, Totals

SLOTS = sums.SLOTS
WEIGHTED = True
ORDER_FREE = True
ELEMENTWISE = True
LOCAL = True
PAPER = "Model breadcrumbs, arXiv 2312.06795, section 3"
NOTES = "of equal magnitudes at a cut the earlier counts as the larger"

Axis = Literal["row", "tensor"]
Keep = Annotated[float, Gt(0.0), Le(1.0)]
DropTop = Annotated[float, Ge(0.0), Lt(1.0)]

join = sums.join


def weight_ranks(
    elements: int, *, axis: Axis = "row", keep: Keep = 0.2, drop_top: DropTop = 0.1
) -> tuple[int, ...]:
    """Ranks of the smallest and the largest magnitude that is kept of a whole weight."""
    dropped, kept = _counts(elements, keep, drop_top)
    return (elements - dropped - kept + 1, elements - dropped) if kept and axis == "tensor" else ()


def _counts(elements: int, keep: float, drop_top: float) -> tuple[int, int]:
    """How many of the largest are dropped, and how many are kept after them."""
    kept = int(elements * keep)
    return min(int(elements * drop_top), elements - kept), kept


def fold(
    slots: Slots, arrival: Arrival, *, axis: Axis = "row", keep: Keep = 0.2, drop_top: DropTop = 0.1
) -> Slots:
    """Add the elements in the middle of a delta's range of magnitudes.

    axis      whether the counts are of each row (the last dimension; a vector is one row) or of each weight
    keep      share of elements that is kept
    drop_top  share of elements, the largest, that is dropped
    """
    return {"sum": torch.add(slots["sum"], _middle(arrival, axis, keep, drop_top), alpha=arrival.factor)}


def unfold(
    slots: Slots, arrival: Arrival, *, axis: Axis = "row", keep: Keep = 0.2, drop_top: DropTop = 0.1
) -> Slots:
    """Subtract what `fold` added, up to float32 rounding."""
    return {"sum": torch.add(slots["sum"], _middle(arrival, axis, keep, drop_top), alpha=-arrival.factor)}


def _middle(arrival: Arrival, axis: Axis, keep: float, drop_top: float) -> Tensor:
    delta = linalg.dense(arrival.delta)
    magnitudes = delta.abs()
    if axis == "row":
        rows = magnitudes.reshape(-1, max(arrival.width, 1))
        dropped, kept = _counts(rows.shape[1], keep, drop_top)
        middle = (_largest(rows, dropped + kept) & ~_largest(rows, dropped)).reshape(delta.shape)
    elif arrival.cuts:
        place = torch.arange(arrival.start, arrival.start + delta.numel(), device=delta.device)
        place = place.reshape(delta.shape)
        (low, high), (first, last) = arrival.cuts, arrival.cut_places
        middle = (magnitudes > low) | ((magnitudes == low) & (place <= first))
        middle &= (magnitudes < high) | ((magnitudes == high) & (place >= last))
    else:
        middle = torch.zeros_like(delta, dtype=torch.bool)
    return delta.where(middle, torch.zeros_like(delta))


def _largest(rows: Tensor, count: int) -> Tensor:
    """Mark the `count` largest of each row, of equal ones the first: bool, like `rows`."""
    if not count or not rows.numel():
        return torch.zeros_like(rows, dtype=torch.bool)
    bound = rows.kthvalue(rows.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = rows > bound, rows == bound
    room = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def render(slots: Slots, totals: Totals, *, scale: Annotated[float, Gt(0.0)] = 0.4) -> Tensor:
    """Multiply the sum by `scale`."""
    return slots["sum"] * length(totals, scale=scale)


def length(totals: Totals, *, scale: Annotated[float, Gt(0.0)] = 0.4) -> float:
    """What the sum is multiplied by."""
    del totals
    return scale
