"""Iso-CTS: Iso-C with room for what is only one fine-tune's own (arXiv 2502.04959).

The weakest directions of the sum give way to each fine-tune's strongest ones outside the rest. Those are
known only once the sum is, so every fine-tune is read again when weights are written, one weight in memory
at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Gt, Le

from streammerge import linalg, sums

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from streammerge.methods import Arrival, Kind, Slots, Totals

SLOTS = sums.SLOTS
WEIGHTED = False
ORDER_FREE = True
PLAIN_SUM = True
PAPER = "Iso-CTS, arXiv 2502.04959, section 5"
NOTES = "directions that a delta does not have stay out"

fold, unfold, join = sums.fold, sums.unfold, sums.join


def render(
    slots: Slots,
    totals: Totals,
    kind: Kind,
    arrivals: Iterable[Arrival],
    *,
    common_space_fraction: Annotated[float, Ge(0.0), Le(1.0)] = 0.8,
    scale: Annotated[float, Gt(0.0)] = 1.0,
) -> Tensor:
    """Give the common and the fine-tunes' own directions of a projected weight one strength.

    common_space_fraction  share of the directions that is the sum's own
    scale                  what everything is multiplied by; a weight that is not projected gets the mean
    """
    total = slots["sum"]
    if kind == "added":
        return total * (scale / max(totals.count, 1))
    wide = linalg.lying(total)
    rank = wide.shape[0]
    count = max(totals.count, 1)
    own = min(round((rank - int(rank * common_space_fraction)) / count), rank // count)
    vectors, s = linalg.spectrum(wide)
    common = vectors[:, : rank - own * totals.count]
    left, values, right = [common.float()], [s[: common.shape[1]].float()], [_others(common, s, wide)]
    is_turned = wide.shape != total.shape
    for arrival in arrivals:
        delta = linalg.lying(linalg.dense(arrival.delta)) if own else None
        if delta is None:
            continue
        rest = _outside(common, right[0], delta, turned=is_turned)
        vectors, s = linalg.spectrum(rest)
        noise = max(rest.shape) * linalg.FLOAT32_EPSILON * linalg.squares(delta) ** 0.5
        vectors, s = vectors[:, s > noise], s[s > noise]
        left.append(vectors[:, :own].float())
        values.append(s[:own].float())
        right.append(_others(vectors[:, :own], s, rest))
    if not sum(part.numel() for part in values):
        return torch.zeros_like(total)
    mean = torch.cat(values).sum() / sum(part.numel() for part in values)
    flat = (scale * mean) * linalg.polar(torch.cat(left, 1)) @ linalg.polar(torch.cat(right, 1)).T
    return (flat.T if is_turned else flat).contiguous()


def _others(vectors: Tensor, s: Tensor, matrix: Tensor) -> Tensor:
    """Right singular vectors [n, k] of a matrix [m, n] for its left ones [m, k]."""
    return linalg.applied((vectors / s[: vectors.shape[1]]).T, matrix).T


def _outside(left: Tensor, right: Tensor, delta: Tensor, *, turned: bool) -> Tensor:
    """What of a delta lies outside the sum's common output directions; `turned` where outputs are columns."""
    if turned:
        return delta - (delta @ right) @ right.T
    return delta - linalg.applied(left @ left.T, delta)
