"""The weighted mean of all fine-tunes ("model soups", arXiv 2203.05482).

Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge import sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Slots, Totals

SLOTS = sums.SLOTS
WEIGHTED = True
ORDER_FREE = True
ELEMENTWISE = True
LOCAL = True
PLAIN_SUM = True
PAPER = "Model soups, arXiv 2203.05482"
NOTES = ""

fold, unfold, join = sums.fold_weighted, sums.unfold_weighted, sums.join


def render(slots: Slots, totals: Totals) -> Tensor:
    """Divide the sum by the summed weights of the fine-tunes."""
    return slots["sum"] * length(totals)


def length(totals: Totals) -> float:
    """What the sum is multiplied by."""
    return 1.0 / totals.factors if totals.factors else 1.0
