"""Task arithmetic: a multiple of the sum of all deltas (arXiv 2212.04089).

Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Gt

from streammerge import linalg

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Slots, Totals

SLOTS = {"sum": torch.float32}
Scale = Annotated[float, Gt(0.0)]

WEIGHTED = True
ORDER_FREE = True
PLAIN_SUM = True
PAPER = "Task arithmetic, arXiv 2212.04089"
NOTES = ""


def fold(slots: Slots, arrival: Arrival) -> Slots:
    """Add a delta, times its weight, to the running sum. sum and delta: one shape, float32."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=arrival.factor)}


def unfold(slots: Slots, arrival: Arrival) -> Slots:
    """Subtract what `fold` added, up to float32 rounding."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=-arrival.factor)}


def join(slots: Slots, others: Slots) -> Slots:
    """Add two states that were folded apart."""
    return {"sum": slots["sum"] + others["sum"]}


def render(slots: Slots, totals: Totals, *, scale: Scale = 0.3) -> Tensor:
    """Multiply the sum by `scale`; the paper's and the field's usual value is 0.3."""
    return slots["sum"] * length(totals, scale=scale)


def length(totals: Totals, *, scale: Scale = 0.3) -> float:
    """What the sum is multiplied by."""
    del totals
    return scale
