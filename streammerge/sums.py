"""The sum of all deltas, which many methods remember: what comes in is added, what goes out is subtracted.

Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from streammerge import linalg

if TYPE_CHECKING:
    from streammerge.linalg import Delta

SLOTS = {"sum": torch.float32}

Sums = dict[str, torch.Tensor]


class Addend(Protocol):
    """What is needed of an arrival: its delta, and the weight a person gave the fine-tune."""

    @property
    def delta(self) -> Delta:
        """One shape with the sum, float32, or two factors."""

    @property
    def factor(self) -> float:
        """1.0 unless configured."""


def fold(slots: Sums, arrival: Addend) -> Sums:
    """Add a delta."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta)}


def unfold(slots: Sums, arrival: Addend) -> Sums:
    """Subtract what `fold` added, up to float32 rounding."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=-1.0)}


def fold_weighted(slots: Sums, arrival: Addend) -> Sums:
    """Add a delta, times the fine-tune's weight."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=arrival.factor)}


def unfold_weighted(slots: Sums, arrival: Addend) -> Sums:
    """Subtract what `fold_weighted` added, up to float32 rounding."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=-arrival.factor)}


def join(slots: Sums, others: Sums) -> Sums:
    """Add two states that were folded apart, slot by slot."""
    return {slot: values + others[slot] for slot, values in slots.items()}
