"""Task arithmetic: a multiple of the sum of all deltas (arXiv 2212.04089).

Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from streammerge import sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Slots, Totals

SLOTS = sums.SLOTS
Scale = Annotated[float, Gt(0.0)]

WEIGHTED = True
ORDER_FREE = True
ELEMENTWISE = True
LOCAL = True
PLAIN_SUM = True
PAPER = "Task arithmetic, arXiv 2212.04089"
NOTES = ""

fold, unfold, join = sums.fold_weighted, sums.unfold_weighted, sums.join


def render(slots: Slots, totals: Totals, *, scale: Scale = 0.3) -> Tensor:
    """Multiply the sum by `scale`; the paper's and the field's usual value is 0.3."""
    return slots["sum"] * length(totals, scale=scale)


def length(totals: Totals, *, scale: Scale = 0.3) -> float:
    """What the sum is multiplied by."""
    del totals
    return scale
