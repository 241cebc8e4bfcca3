"""What is applied at render to any method's result. Stateless: it may change at any time.

A cap bounds the spectrum of each projected weight, in the place of the method's own length; lines gives
deeper blocks more; scale multiplies everything.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from streammerge import linalg
from streammerge.config.finalize import FinalizeSection as Finalize
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from streammerge.config.finalize import Cap

__all__ = ["Finalize", "apply", "blocks", "share"]


def apply(delta: Tensor, cap: Cap | None, figures: Tensor, factor: float) -> Tensor:
    """Finish one weight's rendered delta, any shape, float32.

    cap      for a projected weight [m, n] without the method's length; else None
    figures  [fine-tunes, 3] float64, see linalg.capped
    factor   what it is multiplied by
    """
    if cap is not None:
        delta = linalg.capped(
            delta, figures, level=cap.level, strength=cap.strength, kappa=cap.kappa, beta=cap.beta
        )
    return delta if factor == 1.0 else delta * factor


def blocks(finalize: Finalize, names: Iterable[str]) -> dict[str, int]:
    """Find the number of the block that each weight is in; weights in none are left out."""
    if finalize.lines is None:
        return {}
    try:
        pattern = re.compile(finalize.lines.block)
        found = {name: match for name in names if (match := pattern.search(name))}
        return {name: int(match.group(1)) for name, match in found.items()}
    except (re.error, IndexError, OverflowError, RecursionError, TypeError, ValueError) as exc:
        raise ConfigError(
            f"finalize.lines.block: {finalize.lines.block!r} is no pattern with a number in its first group",
            hint=r"leave it out, or write for example layers\.(\d+)\.",
        ) from exc


def share(finalize: Finalize, alpha: float, block: int | None, last: int) -> float:
    """What a weight's merged delta is multiplied by: alpha + beta * block / last, times scale.

    After LiNeS, arXiv 2410.17146 eq. 2; weights in no block get alpha.
    """
    if finalize.lines is None:
        return finalize.scale
    depth = block / last if block is not None and last else 0.0
    return finalize.scale * (alpha + finalize.lines.beta * depth)
