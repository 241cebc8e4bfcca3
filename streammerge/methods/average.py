"""The weighted mean of all fine-tunes ("model soups", arXiv 2203.05482).

Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streammerge import linalg

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Slots, Totals

SLOTS = {"sum": torch.float32}
WEIGHTED = True
ORDER_FREE = True
PLAIN_SUM = True
PAPER = "Model soups, arXiv 2203.05482"
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


def render(slots: Slots, totals: Totals) -> Tensor:
    """Divide the sum by the summed weights of the fine-tunes."""
    return slots["sum"] * length(totals)


def length(totals: Totals) -> float:
    """What the sum is multiplied by."""
    return 1.0 / totals.factors if totals.factors else 1.0
