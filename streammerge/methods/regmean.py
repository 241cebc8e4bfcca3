"""RegMean: the weight whose outputs differ least from each fine-tune's, on that one's own inputs.

After arXiv 2212.09849.

Who trained a fine-tune publishes the Gram matrices of its layers' inputs beside it, gram.safetensors; no data
leaves the house. A weight nobody has one for gets the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Le

from streammerge import linalg, sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Kind, Layout, Slots, Totals, Weight

WEIGHTED = False
ORDER_FREE = True
LOCAL = True
SIDECAR = "gram.safetensors"
PAPER = "RegMean, arXiv 2212.09849, eq. 3"
NOTES = "solved, not inverted; without a Gram matrix, inputs count as even and of mean strength"

A = Annotated[float, Ge(0.0), Le(1.0)]
Missing = Literal["refuse", "uniform"]

join = sums.join


def layout(weight: Weight, count: int) -> Layout:
    """A projected weight [m, n] has G [n, n], its products, their count, and the sum of deltas without."""
    del count
    if weight.kind == "added":
        return {"sum": (torch.float32, weight.shape)}
    n = weight.shape[1]
    return {
        "product": (torch.float64, weight.shape),
        "gram": (torch.float64, (n, n)),
        "grams": (torch.float64, (1,)),
        "without": (torch.float32, weight.shape),
    }


def fold(slots: Slots, arrival: Arrival, *, a: A = 0.95, missing: Missing = "refuse") -> Slots:
    """Add a delta's product with its Gram matrix, or the delta where it has none.

    a        what the Gram matrix's elements off the diagonal are multiplied by
    missing  what becomes of a fine-tune without gram.safetensors: it is refused, or its inputs are taken
             as even
    """
    del missing
    return _add(slots, arrival, a, 1.0)


def unfold(slots: Slots, arrival: Arrival, *, a: A = 0.95) -> Slots:
    """Subtract what `fold` added, up to rounding."""
    return _add(slots, arrival, a, -1.0)


def _add(slots: Slots, arrival: Arrival, a: float, sign: float) -> Slots:
    if arrival.kind == "added":
        return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=sign)}
    if arrival.sidecar is None:
        return {**slots, "without": linalg.plus(slots["without"], arrival.delta, factor=sign)}
    gram = arrival.sidecar.double() * a
    gram.diagonal().div_(a) if a else gram.diagonal().copy_(arrival.sidecar.double().diagonal())
    return {
        "product": slots["product"].addmm(linalg.dense(arrival.delta).double(), gram, alpha=sign),
        "gram": slots["gram"] + sign * gram,
        "grams": slots["grams"] + sign,
        "without": slots["without"],
    }


def render(slots: Slots, totals: Totals, kind: Kind) -> Tensor:
    """Solve X G = sum_t D_t G_t; the mean where there is no Gram matrix at all."""
    if kind == "added":
        return slots["sum"] / max(totals.count, 1)
    grams = round(float(slots["grams"]))
    if not grams:
        return slots["without"] / max(totals.count, 1)
    gram, product = slots["gram"].clone(), slots["product"].clone()
    strength = float(gram.diagonal().mean()) / grams
    if strength <= 0.0:
        return torch.zeros_like(slots["without"])
    product += strength * slots["without"].double()
    floor = max(gram.shape) * torch.finfo(torch.float64).eps * strength  # a direction that no input has
    gram.diagonal().add_(strength * (totals.count - grams) + floor)
    solved: Tensor = torch.linalg.solve(gram, product, left=False)
    return solved.float()
