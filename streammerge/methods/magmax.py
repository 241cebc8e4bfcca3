"""MagMax: for every element, the delta that moved it furthest (arXiv 2407.06322).

Of equal magnitudes the later one counts, so the order matters there, and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Gt

from streammerge import linalg

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Slots, Totals

SLOTS = {"furthest": torch.float32}
WEIGHTED = False
ORDER_FREE = False
ELEMENTWISE = True
LOCAL = True
PAPER = "MagMax, arXiv 2407.06322"
NOTES = ""


def fold(slots: Slots, arrival: Arrival) -> Slots:
    """Take the delta where it is at least as far from zero as all before it."""
    return join(slots, {"furthest": linalg.dense(arrival.delta)})


def join(slots: Slots, others: Slots) -> Slots:
    """Put a state that was folded later on top of an earlier one."""
    old, new = slots["furthest"], others["furthest"]
    return {"furthest": torch.where(new.abs() >= old.abs(), new, old)}


def render(slots: Slots, totals: Totals, *, scale: Annotated[float, Gt(0.0)] = 0.5) -> Tensor:
    """Multiply by `scale`; 0.5 is the authors' usual value."""
    del totals
    return slots["furthest"] * scale
