"""Order statistics of more numbers than fit into memory: exact, by counting, in two readings of a stream.

Floats are ordered like the integers that their bits spell, once the negative ones are turned round. The first
reading counts by the upper half of the bits, the second by the lower half inside the few bins that matter:
half a megabyte a bin, and no sorting. A third finds which one of equal elements is meant, where that counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

HALF = 16
BINS = 1 << HALF
LOW = BINS - 1
MAGNITUDE = 0x7FFFFFFF


class Cut(NamedTuple):
    """An element of a stream: its value, and its place among all, counted from 0."""

    value: float
    place: int


def select(
    stream: Callable[[], Iterable[Tensor]], ranks: Sequence[int], *, placed: bool = False
) -> tuple[Cut, ...]:
    """Give the elements of these ranks, 1 the smallest, among all that a stream holds.

    stream  begins the same stream anew at each call: float32 tensors of any shape, no NaN among them
    placed  whether places are wanted: of equal elements the earlier is the larger; else they are -1
    """
    if not ranks:
        return ()
    coarse = _count(stream(), lambda keys: (keys >> HALF) + BINS // 2)
    before = coarse.cumsum(0)
    bins = [int(torch.searchsorted(before, rank)) for rank in ranks]
    fine = {number: torch.zeros(BINS, dtype=torch.int64) for number in set(bins)}
    for values in stream():
        keys = _keys(values)
        high = (keys >> HALF) + BINS // 2
        for number in fine:
            fine[number] += torch.bincount(keys[high == number] & LOW, minlength=BINS).cpu()
    found, among = [], []
    for rank, number in zip(ranks, bins, strict=True):
        inside = rank - (int(before[number - 1]) if number else 0)
        smaller = fine[number].cumsum(0)
        low = int(torch.searchsorted(smaller, inside))
        found.append(((number - BINS // 2) << HALF) | low)
        among.append(int(smaller[low]) - inside + 1)
    wanted = torch.tensor(found, dtype=torch.int64).to(torch.int32)
    places = _places(stream(), wanted, among) if placed else [-1] * len(found)
    numbers = _turned(wanted).view(torch.float32).tolist()
    return tuple(Cut(*pair) for pair in zip(numbers, places, strict=True))


def _places(stream: Iterable[Tensor], wanted: Tensor, among: list[int]) -> list[int]:
    """Find where in the stream each wanted key stands for the `among`-th time."""
    places, left, start = [-1] * len(among), list(among), 0
    for values in stream:
        keys = _keys(values)
        for i, key in enumerate(wanted.tolist()):
            if left[i] > 0:
                equal = (keys == key).nonzero().squeeze(1)
                if len(equal) >= left[i]:
                    places[i] = start + int(equal[left[i] - 1])
                left[i] -= len(equal)
        start += keys.numel()
    return places


def _count(stream: Iterable[Tensor], bin_of: Callable[[Tensor], Tensor]) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for values in stream:
        counts += torch.bincount(bin_of(_keys(values)), minlength=BINS).cpu()
    return counts


def _keys(values: Tensor) -> Tensor:
    """Integers [elements] int32 in the order of the floats."""
    return _turned(values.float().contiguous().reshape(-1).view(torch.int32))


def _turned(bits: Tensor) -> Tensor:
    """Turn the negative ones round; applied twice it is the identity."""
    return torch.where(bits < 0, bits ^ MAGNITUDE, bits)
