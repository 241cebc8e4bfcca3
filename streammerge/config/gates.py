"""`gates:`: what a candidate must pass. One class a kind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streammerge.config.section import Name, Section, Word
from streammerge.quantities import Duration


class Limit(Section):
    """Bounds for one number that a gate measures."""

    min: float | None = None
    max: float | None = None
    max_drop: float | None = Field(
        default=None, ge=0, description="absolute, against the version being served"
    )


class CommandGate(Section):
    """A command that measures a candidate: it prints one JSON object of numbers."""

    type: Literal["command"]
    name: Name = Field(description="how the gate is called in history and metrics")
    argv: tuple[Word, ...] = Field(
        min_length=1, description='program and arguments; "{snapshot}" becomes the candidate\'s folder'
    )
    limits: dict[str, Limit] = Field(default_factory=dict, description="what the numbers must satisfy")
    timeout: Duration = Field(default=600.0, gt=0, description="after which it counts as failed")
