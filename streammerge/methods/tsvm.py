"""TSV-M: keep each fine-tune's strongest directions and decorrelate them (arXiv 2412.00081).

With T fine-tunes, each gets floor(min(m, n) / T) singular triples of its delta. That number only falls, so
the triples a later merge needs are a prefix of those kept: the merge is exact at every step. Beyond
min(m, n) fine-tunes there is no triple left for each, and the matrix gets the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Gt

from streammerge import linalg

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Kind, Layout, Slots, Totals, Weight

WEIGHTED = False
ORDER_FREE = True
LOCAL = True
PLAIN_SUM = True
PAPER = "TSV-Merge, arXiv 2412.00081, section 4"
NOTES = "triples below the numerical rank do not exist; the mean beyond min(m, n) fine-tunes"


def layout(weight: Weight, count: int) -> Layout:
    """The sum, and for a projected weight [m, n] each fine-tune's triples side by side, padded with zeros."""
    found: Layout = {"sum": (torch.float32, weight.shape)}
    if weight.kind == "projected":
        m, n = weight.shape
        columns = count * (min(m, n) // max(count, 1))
        found["left"] = (torch.float32, (m, columns))
        found["values"] = (torch.float32, (columns,))
        found["right"] = (torch.float32, (n, columns))
    return found


def fold(slots: Slots, arrival: Arrival) -> Slots:
    """Shorten every fine-tune's list of triples and append the new one's."""
    new = {"sum": linalg.plus(slots["sum"], arrival.delta)}
    if arrival.kind == "added":
        return new
    delta = linalg.dense(arrival.delta)
    budget = min(delta.shape) // (arrival.earlier + 1)
    for slot, fresh in zip(("left", "values", "right"), triples(delta, budget), strict=True):
        old = slots[slot].unflatten(-1, (arrival.earlier, -1)) if slots[slot].numel() else None
        kept = fresh if old is None else torch.cat([old[..., :budget].flatten(-2), fresh], dim=-1)
        new[slot] = kept.contiguous()
    return new


def triples(delta: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triples: left [m, budget], values [budget], right [n, budget]; zero beyond the rank."""
    wide = linalg.lying(delta)
    vectors, s = linalg.spectrum(wide)
    vectors, s = vectors[:, :budget], s[:budget]
    others = linalg.applied((vectors / s).T, wide).T
    short, values, long = (
        torch.nn.functional.pad(part, (0, budget - s.numel()))
        for part in (vectors.float(), s.float(), others)
    )
    return (long, values, short) if delta.shape[0] > delta.shape[1] else (short, values, long)


def render(slots: Slots, totals: Totals, kind: Kind, *, scale: Annotated[float, Gt(0.0)] = 1.0) -> Tensor:
    """scale * polar(U) diag(s) polar(V)^T over all kept triples; every other weight scale times the mean.

    polar(X) = X (X^T X)^(-1/2), the nearest orthonormal columns.
    """
    if kind == "added" or not slots["values"].numel():
        return slots["sum"] * (scale / max(totals.count, 1))
    left, right = linalg.polar(slots["left"]), linalg.polar(slots["right"])
    return (left * (scale * slots["values"])) @ right.T
