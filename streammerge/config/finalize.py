"""`finalize:`: what is applied when weights are written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streammerge.config.section import Section


class Cap(Section):
    """Bounds the spectrum of every projected weight's merged delta by the fine-tunes' own."""

    level: Literal["interference", "fixed"] = Field(
        default="interference", description="how the bound is found"
    )
    strength: float = Field(
        default=0.93, gt=0, le=100, description="multiplies the bound at level interference"
    )
    kappa: float = Field(
        default=0.6, gt=0, le=100, description="the bound in units of a fine-tune's own, at level fixed"
    )
    beta: float = Field(
        default=2.0,
        ge=1,
        le=100,
        description="how much a singular value below the bound is raised, to it at most",
    )


class Lines(Section):
    """Gives deeper blocks more of the merged delta: alpha + beta * block / (blocks - 1), LiNeS."""

    alpha: float | Literal["auto"] = Field(
        default="auto",
        description="share of the first block and of what is in none; auto: from the deltas' norms",
    )
    beta: float = Field(default=0.0, ge=-10, le=10, description="how much more the last block gets")
    block: str = Field(
        default=r"(?:^|\.)(\d+)\.",
        description="pattern whose first group is the block's number in a weight's name",
    )


class FinalizeSection(Section):
    """Applied when weights are written; may change at any time."""

    scale: float = Field(default=1.0, gt=0, le=100, description="multiplies the merged delta")
    cap: Cap | None = Field(default=None, description="takes the place of the method's own length")
    lines: Lines | None = Field(default=None, description="multiplies the merged delta block by block")
