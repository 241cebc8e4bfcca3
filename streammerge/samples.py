"""A few hundred elements of a delta, by which two fine-tunes are compared when neither is at hand.

The places depend on a weight's size alone, so every fine-tune of one base is sampled alike. Weights count by
their length: an element that stands for many is scaled, and products of samples estimate those of deltas.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from streammerge.linalg import LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streammerge.linalg import Delta

ELEMENTS = (
    512  # in all, at least one of each weight: 1 KB of each fine-tune, and each arrival reads all of them
)
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples spread evenly, whatever the length of a row
ENOUGH = 32  # places at which both must differ from the base to be compared


@lru_cache(maxsize=16)  # a weight comes panel by panel
def places(elements: int, weights: int) -> Tensor:
    """Choose places in a flat weight of a model with so many weights, in rising order."""
    count = min(elements, max(ELEMENTS // weights, 1))
    if count == elements:
        return torch.arange(elements)
    steps = torch.arange(1, count + 1, dtype=torch.float64) * GOLDEN
    found: Tensor = (steps.frac() * elements).long().unique()
    return found


def taken(delta: Delta, start: int, stop: int, chosen: Tensor, elements: int) -> Tensor:
    """Give the elements of [start, stop) that stand at the chosen places of the weight; [chosen] float32."""
    here = chosen[(chosen >= start) & (chosen < stop)] - start
    scale = math.sqrt(elements / len(chosen)) if len(chosen) else 1.0
    if isinstance(delta, LowRank):
        here = here.to(delta.left.device)
        rows, columns = here // delta.shape[1], here % delta.shape[1]
        return torch.einsum("er,re->e", delta.left[rows], delta.right[:, columns]) * scale
    return delta.reshape(-1)[here.to(delta.device)] * scale


def packed(parts: Sequence[Tensor]) -> bytes:
    """Put the samples of all weights together as bfloat16 in this machine's order of bytes."""
    if not parts:
        return b""
    rounded = torch.cat([part.cpu() for part in parts]).to(torch.bfloat16)
    return array("h", rounded.view(torch.int16).tolist()).tobytes()


def cosines(one: bytes, others: Sequence[bytes]) -> list[float]:
    """Estimate the cosine of one delta to each of several; 0.0 where too few elements are in both."""
    mine = _unpacked([one])
    theirs = _unpacked(others)
    both = ((mine != 0) & (theirs != 0)).sum(1)
    lengths = theirs.norm(dim=1) * mine.norm()
    found = (theirs @ mine[0]) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    pairs = zip(found.tolist(), both.tolist(), strict=True)
    return [value if count >= ENOUGH else 0.0 for value, count in pairs]


def _unpacked(packs: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(packs)), dtype=torch.bfloat16).reshape(len(packs), -1).double()
