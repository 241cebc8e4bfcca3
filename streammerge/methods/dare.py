"""DARE: drop a random share of every delta and rescale the rest, then sum or elect (arXiv 2311.03099).

What is dropped follows from the fine-tune's digest and the weight's name by a counting generator: the same on
every device, in every panel and years later, so that a fine-tune can be taken out again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt

from streammerge import linalg, signs, sums

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Layout, Slots, Totals, Weight

WEIGHTED = True
ORDER_FREE = True
ELEMENTWISE = True
SEEDED = True
PAPER = "DARE, arXiv 2311.03099, section 3.2"
NOTES = "masks follow from content, so that a fold can be repeated and undone"

P = Annotated[float, Ge(0.0), Lt(1.0)]
Agg = Literal["sum", "ties"]
SLOTS = {"sum": {"sum": torch.float32}, "ties": signs.COUNTED}

MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # SplitMix64's finalizer
STEP = 0x9E3779B97F4A7C15
DRAW_BITS = 32

join = sums.join


def layout(weight: Weight, count: int, *, agg: Agg = "sum") -> Layout:
    """List what is remembered, each of the weight's shape."""
    del count
    return {slot: (dtype, weight.shape) for slot, dtype in SLOTS[agg].items()}


def kept(arrival: Arrival, p: float) -> Tensor:
    """Draw which elements stay, each with probability 1 - p: bool, in the delta's shape."""
    text = f"{arrival.digest}\0{arrival.name}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    delta = linalg.dense(arrival.delta)
    index = torch.arange(arrival.start, arrival.start + delta.numel(), device=delta.device)
    bits = (index + 1).mul_(_signed(STEP)).add_(_signed(seed))
    for shift, factor in MIXERS:
        bits = (bits ^ _shifted(bits, shift)).mul_(_signed(factor))
    draws = _shifted(bits ^ _shifted(bits, 31), 64 - DRAW_BITS)
    found: Tensor = (draws >= round(p * 2**DRAW_BITS)).reshape(delta.shape)
    return found


def _signed(number: int) -> int:
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift right without carrying the sign along."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _thinned(arrival: Arrival, p: float) -> Tensor:
    delta = linalg.dense(arrival.delta)
    return torch.where(kept(arrival, p), delta, torch.zeros_like(delta))


def fold(slots: Slots, arrival: Arrival, *, p: P = 0.5, agg: Agg = "sum") -> Slots:
    """Add what is kept of a delta; it is divided by 1 - p when weights are written.

    p    share of elements that is dropped
    agg  "sum" adds all; "ties" elects a sign for each element and takes the mean of what agrees
    """
    if agg == "ties":
        return signs.add(slots, _thinned(arrival, p), arrival.factor)
    return {"sum": torch.add(slots["sum"], _thinned(arrival, p), alpha=arrival.factor)}


def unfold(slots: Slots, arrival: Arrival, *, p: P = 0.5, agg: Agg = "sum") -> Slots:
    """Subtract what `fold` added, up to float32 rounding."""
    if agg == "ties":
        return signs.add(slots, _thinned(arrival, p), arrival.factor, sign=-1)
    return {"sum": torch.add(slots["sum"], _thinned(arrival, p), alpha=-arrival.factor)}


def tally(slots: Slots) -> float:
    """Sum of the elected signs; none where all is added."""
    return signs.tally(slots) if "positive" in slots else 0.0


def render(
    slots: Slots,
    totals: Totals,
    *,
    p: P = 0.5,
    agg: Agg = "sum",
    scale: Annotated[float, Gt(0.0)] = 0.3,
) -> Tensor:
    """Divide by 1 - p and multiply by `scale` what was summed or elected."""
    scale /= 1.0 - p
    if agg == "ties":
        mass, weight = signs.elect(slots, totals.tally)
        return scale * mass / weight
    return scale * slots["sum"]
