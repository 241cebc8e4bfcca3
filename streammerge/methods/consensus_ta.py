"""Consensus task arithmetic: add only the elements that matter to several fine-tunes (arXiv 2405.07813).

A fine-tune claims an element where |delta| > mask_lambda |sum - delta|. For one sum that is a bound on
either side of zero, so the k largest and the k smallest deltas of every element decide whether k claim it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt, Le

from streammerge import linalg

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Layout, Slots, Totals, Weight

WEIGHTED = False
ORDER_FREE = True
ELEMENTWISE = True
LOCAL = True
PLAIN_SUM = True
PAPER = "Consensus TA, arXiv 2405.07813, section 4"
NOTES = "one mask_lambda for all fine-tunes; the authors tune one for each on labelled data"

K = Annotated[int, Ge(1), Le(8)]
Lambda = Annotated[float, Gt(0.0), Le(1.0)]


def layout(weight: Weight, count: int, *, k: K = 2) -> Layout:
    """List the sum and every element's k largest and k smallest deltas, 0 where there are fewer."""
    del count
    names = ["sum", *(f"high{i}" for i in range(1, k + 1)), *(f"low{i}" for i in range(1, k + 1))]
    return dict.fromkeys(names, (torch.float32, weight.shape))


def fold(slots: Slots, arrival: Arrival, *, k: K = 2) -> Slots:
    """Add a delta to the sum and let it sink to its place among the largest and the smallest."""
    high = low = linalg.dense(arrival.delta)
    new = {"sum": linalg.plus(slots["sum"], high)}
    for i in range(1, k + 1):
        above, below = slots[f"high{i}"], slots[f"low{i}"]
        new[f"high{i}"], high = torch.maximum(above, high), torch.minimum(above, high)
        new[f"low{i}"], low = torch.minimum(below, low), torch.maximum(below, low)
    return new


def render(
    slots: Slots,
    totals: Totals,
    *,
    mask_lambda: Lambda = 0.4,
    k: K = 2,
    scale: Annotated[float, Gt(0.0)] = 0.3,
) -> Tensor:
    """Multiply the sum by `scale` where at least `k` fine-tunes claim the element; elsewhere zero.

    mask_lambda  how much a delta must stand out against all others together
    """
    del totals
    total = slots["sum"]
    claims = torch.zeros(total.shape, dtype=torch.uint8, device=total.device)
    for name, delta in slots.items():
        if name != "sum":
            claims += delta.abs() > mask_lambda * (total - delta).abs()
    return scale * total.where(claims >= k, torch.zeros_like(total))
