"""`tensors:` and `screens:`: how far a fine-tune may be from what the base lets expect."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streammerge.config.section import Section


class Tensors(Section):
    """How far a fine-tune's set of weights may differ from the base's."""

    ignore_extra: tuple[str, ...] = Field(
        default=(), description="weights the base lacks that may be left out, as globs"
    )
    allow_missing: tuple[str, ...] = Field(
        default=(), description="weights a fine-tune may lack and leave unchanged, as globs"
    )


Action = Literal["refuse", "quarantine", "warn", "off"]


class IdentityScreen(Section):
    """Far from the base, and nothing left of it: made from another model."""

    action: Action = Field(default="warn", description="what becomes of it")
    max_ratio: float = Field(default=0.6, gt=0, description="a delta longer than so many lengths of the base")
    min_equal: float = Field(
        default=0.05, ge=0, le=1, description="with less than this share of its weights exactly the base's"
    )


class NormScreen(Section):
    """A delta much longer than those that were folded."""

    action: Action = Field(default="quarantine", description="what becomes of it")
    mads: float = Field(
        default=10.0, gt=0, description="how far above the mean length, in median absolute deviations"
    )
    min_folds: int = Field(default=8, ge=1, description="how many fine-tunes must be folded before")


class CosineScreen(Section):
    """A delta that repeats what is folded, or undoes it."""

    action: Action = Field(default="quarantine", description="what becomes of it")
    duplicate: float = Field(default=0.99, gt=0, le=1, description="a cosine above which it repeats")
    opposite: float = Field(default=-0.5, ge=-1, lt=0, description="a cosine below which it undoes")
    min_folds: int = Field(default=8, ge=1, description="how many fine-tunes must be folded before")


class SpectrumScreen(Section):
    """A full weight whose delta is one direction and nothing else."""

    action: Action = Field(default="warn", description="what becomes of it")
    max_share: float = Field(
        default=0.98,
        gt=0,
        le=1,
        description="of one weight's delta in one singular direction, squared lengths",
    )


class GaugeScreen(Section):
    """Attention weights far from the base's whose products are not: locked against merging, or permuted."""

    action: Action = Field(default="quarantine", description="what becomes of it")
    raw: float = Field(default=0.3, gt=0, description="distance of the weights from which it is looked at")
    invariant: float = Field(
        default=0.15, gt=0, description="distance of the products below which it is the same attention"
    )


class Screens(Section):
    """What is judged by figures, once a fine-tune was read: see docs/refusals.md."""

    identity: IdentityScreen = Field(default=IdentityScreen())
    norm: NormScreen = Field(default=NormScreen())
    cosine: CosineScreen = Field(default=CosineScreen())
    spectrum: SpectrumScreen = Field(default=SpectrumScreen())
    gauge: GaugeScreen = Field(default=GaugeScreen())
