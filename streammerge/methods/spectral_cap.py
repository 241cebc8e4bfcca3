"""The spectral cap, our own rule: the plain sum of all deltas, its spectrum bounded by the fine-tunes' own.

What hurts a merge is the top of the summed spectrum, where deltas pile up on common directions. A matrix of
the sum, S = U s V^T, is published as U min(beta * s, c) V^T; everything else as the mean. A single fine-tune
is published as it is. Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le

from streammerge import linalg, sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Kind, Slots, Totals

SLOTS = sums.SLOTS
WEIGHTED = False
ORDER_FREE = True
LOCAL = True
PLAIN_SUM = True
PAPER = "our own; docs/methods.md has the formula"
NOTES = ""

Level = Literal["interference", "fixed"]
Factor = Annotated[float, Gt(0.0), Le(100.0)]

fold, unfold, join = sums.fold, sums.unfold, sums.join


def render(
    slots: Slots,
    totals: Totals,
    kind: Kind,
    figures: Tensor,
    *,
    level: Level = "interference",
    strength: Factor = 0.93,
    kappa: Factor = 0.6,
    beta: Annotated[float, Ge(1.0), Le(100.0)] = 2.0,
) -> Tensor:
    """Cap the spectrum of a projected weight of the sum; divide every other by the count.

    slots["sum"]  [out, in] float32, or a flat panel
    figures       [fine-tunes, 3] float64: ||delta||_F, ||delta^T delta||_F and top singular value of each
    level         what c is: "interference" falls where fine-tunes collide; "fixed" is kappa times the mean of
                  the fine-tunes' top singular values
    strength      multiplies c at level interference
    beta          how much a singular value below the cap is raised, at most to it
    """
    if kind == "added":
        return slots["sum"] / max(totals.count, 1)
    return linalg.capped(slots["sum"], figures, level=level, strength=strength, kappa=kappa, beta=beta)
