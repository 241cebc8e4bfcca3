"""Iso-C: give all directions of the summed delta the same strength (arXiv 2502.04959).

A matrix of the sum, S = U s V^T, is published as scale * mean(s) * U V^T; everything else as scale times the
mean. Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from streammerge import linalg, sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Kind, Slots, Totals

SLOTS = sums.SLOTS
WEIGHTED = False
ORDER_FREE = True
LOCAL = True
PLAIN_SUM = True
PAPER = "Iso-C, arXiv 2502.04959, section 4"
NOTES = "directions that the sum does not have stay out, so adapters do not fill them with noise"

fold, unfold, join = sums.fold, sums.unfold, sums.join


def render(slots: Slots, totals: Totals, kind: Kind, *, scale: Annotated[float, Gt(0.0)] = 1.0) -> Tensor:
    """Flatten the spectrum of a projected weight; divide every other by the count. Times `scale`."""
    total = slots["sum"]
    if kind == "added":
        return total * (scale / max(totals.count, 1))
    vectors, s = linalg.spectrum(linalg.lying(total))
    if not s.numel():
        return total
    flat = linalg.applied(vectors * (scale * s.mean() / s) @ vectors.T, linalg.lying(total))
    return (flat if flat.shape == total.shape else flat.T).contiguous()
