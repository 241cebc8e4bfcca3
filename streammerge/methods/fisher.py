"""Fisher merging: every element's mean, weighted by how much each fine-tune's likelihood depends on it.

After arXiv 2111.09832. Who trained a fine-tune publishes the diagonal of its Fisher information beside it,
fisher.safetensors, under the names of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Gt, Le

from streammerge import linalg, sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Slots, Totals

SLOTS = {"product": torch.float64, "information": torch.float64}
WEIGHTED = True
ORDER_FREE = True
ELEMENTWISE = True
LOCAL = True
SIDECAR = "fisher.safetensors"
PAPER = "Fisher merging, arXiv 2111.09832, eq. 4"
NOTES = "deltas are averaged, not weights, which is the same"

Minimal = Annotated[float, Gt(0.0), Le(1.0)]
Missing = Literal["refuse", "uniform"]

join = sums.join


def fold(
    slots: Slots,
    arrival: Arrival,
    *,
    minimal: Minimal = 1e-6,
    normalize: bool = True,
    missing: Missing = "refuse",
) -> Slots:
    """Add a delta times its Fisher information.

    minimal    the least information of any element
    normalize  whether each fine-tune's information is divided by its length
    missing    what becomes of a fine-tune without fisher.safetensors: it is refused, or all of its elements
               count alike
    """
    del missing
    return _add(slots, arrival, minimal, 1.0, normalize=normalize)


def unfold(slots: Slots, arrival: Arrival, *, minimal: Minimal = 1e-6, normalize: bool = True) -> Slots:
    """Subtract what `fold` added, up to float64 rounding."""
    return _add(slots, arrival, minimal, -1.0, normalize=normalize)


def _add(slots: Slots, arrival: Arrival, minimal: float, sign: float, *, normalize: bool) -> Slots:
    delta = linalg.dense(arrival.delta).double()
    given = (
        torch.ones_like(delta) if arrival.sidecar is None else arrival.sidecar.double().reshape(delta.shape)
    )
    scale = arrival.factor / (arrival.sidecar_norm + minimal) if normalize else arrival.factor
    information = (given + minimal) * scale
    return {
        "product": torch.addcmul(slots["product"], information, delta, value=sign),
        "information": torch.add(slots["information"], information, alpha=sign),
    }


def render(slots: Slots, totals: Totals) -> Tensor:
    """Divide by the summed information."""
    if not totals.count:
        return slots["product"].float()
    return (slots["product"] / slots["information"]).float()
