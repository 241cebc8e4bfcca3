"""`gates:`: what a candidate must pass. One class a kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from streammerge.config.section import Name, Section, Word
from streammerge.quantities import Duration, Size


class Limit(Section):
    """Bounds for one number that a gate measures; without any, it must only be a number."""

    min: float | None = None
    max: float | None = None
    max_drop: float | None = Field(
        default=None, ge=0, description="absolute, against the version being served"
    )
    max_rise: float | None = Field(
        default=None, ge=0, description="absolute, against the version being served"
    )

    @property
    def compares(self) -> bool:
        """Whether it asks what the version being served has."""
        return self.max_drop is not None or self.max_rise is not None


class Judging(Section):
    """What every kind has."""

    name: Name = Field(description="how the gate is called in history and metrics")
    limits: dict[str, Limit] = Field(
        default_factory=dict, description="what the numbers must satisfy, by their names or globs of these"
    )


class Outside(Judging):
    """What every kind has that runs in a process of its own."""

    timeout: Duration = Field(default=600.0, gt=0, description="after which it counts as failed")
    memory: Size | None = Field(default=None, gt=0, description="with more than this it counts as failed")


class Evaluating(Outside):
    """What every kind has that builds the model with transformers."""

    device: str = Field(
        default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads")


class CommandGate(Outside):
    """A command that measures a candidate: it prints one JSON object of numbers."""

    type: Literal["command"]
    argv: tuple[Word, ...] = Field(
        min_length=1, description='program and arguments; "{snapshot}" becomes the candidate\'s folder'
    )
    data: tuple[Path, ...] | None = Field(
        default=None,
        description="files its numbers depend on; then what it measured of a version counts while they last",
    )


class DriftGate(Judging):
    """How far the candidate's weights are from the base and from the version being served; all finite."""

    type: Literal["drift"]


class LoadsGate(Evaluating):
    """Whether transformers builds the model and one forward pass gives finite numbers."""

    type: Literal["loads"]


class PerplexityGate(Evaluating):
    """How well a causal model foretells texts, beside the base and the version being served."""

    type: Literal["perplexity"]
    data: Path = Field(description='texts, JSON lines with "text"')
    max_tokens: int = Field(default=100_000, ge=1, description="how many tokens are measured")


class AccuracyGate(Evaluating):
    """Which share of the rows of each task the model gets right."""

    type: Literal["accuracy"]
    data: Path = Field(
        description='rows, JSON lines with "text" and "label", or "prompt", "choices" and "answer"; "task"'
    )
    max_rows: int | None = Field(default=None, ge=1, description="how many rows are measured")


GateSection = Annotated[
    CommandGate | DriftGate | LoadsGate | PerplexityGate | AccuracyGate, Field(discriminator="type")
]
