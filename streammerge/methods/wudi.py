"""WUDI: the delta whose outputs differ least from each fine-tune's, on inputs that its own delta stands for.

After arXiv 2503.08099. The loss, sum_t ||(X - D_t) D_t^T||^2 / ||D_t||^2, is quadratic in the merged delta
X, so two sums are all that is remembered and its minimum is one linear solve: X = B A^-1 with
A = sum_t D_t^T D_t / ||D_t||^2 and B = sum_t D_t D_t^T D_t / ||D_t||^2. The authors take 300 steps of Adam
from the plain sum instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Gt, Le

from streammerge import linalg, sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Kind, Layout, Slots, Totals, Weight

WEIGHTED = False
ORDER_FREE = True
LOCAL = True
PAPER = "WUDI-Merging, arXiv 2503.08099, eq. 9"
NOTES = "closed form with a ridge instead of Adam; a fine-tune that leaves a matrix alone is left out of it"

join = sums.join


def layout(weight: Weight, count: int) -> Layout:
    """A projected weight [m, n] has A [n, n] and B [m, n] in float64, every other its sum."""
    del count
    if weight.kind == "added":
        return {"sum": (torch.float32, weight.shape)}
    n = weight.shape[1]
    return {"product": (torch.float64, weight.shape), "gram": (torch.float64, (n, n))}


def fold(slots: Slots, arrival: Arrival) -> Slots:
    """Add a delta's two products to their sums."""
    return _add(slots, arrival, 1.0)


def unfold(slots: Slots, arrival: Arrival) -> Slots:
    """Subtract what `fold` added, up to float64 rounding."""
    return _add(slots, arrival, -1.0)


def _add(slots: Slots, arrival: Arrival, sign: float) -> Slots:
    if arrival.kind == "added":
        return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=sign)}
    delta = linalg.dense(arrival.delta).double()
    norm = float(delta.norm())
    if norm == 0.0:
        return slots
    delta /= norm
    gram = delta.T @ delta
    return {
        "product": slots["product"].addmm(delta, gram, alpha=sign * norm),
        "gram": slots["gram"] + sign * gram,
    }


def render(
    slots: Slots,
    totals: Totals,
    kind: Kind,
    *,
    solver: Literal["closed"] = "closed",
    ridge: Annotated[float, Gt(0.0), Le(100.0)] = 1e-2,
) -> Tensor:
    """Solve X (A + ridge tr(A)/n I) = B for a projected weight; every other gets the mean.

    ridge  in units of A's mean eigenvalue: small ones let deltas of few directions grow far beyond the
           fine-tunes' own length
    """
    del solver
    if kind == "added":
        return slots["sum"] / max(totals.count, 1)
    gram = slots["gram"].clone()
    mean = float(gram.diagonal().mean())
    if mean <= 0.0:
        return torch.zeros(slots["product"].shape, device=gram.device)
    gram.diagonal().add_(ridge * mean)
    solved: Tensor = torch.linalg.solve(gram, slots["product"], left=False)
    return solved.float()
