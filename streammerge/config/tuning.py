"""`tune:`: what is chosen for each version by measuring it, before it is sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from streammerge.config.section import Section, Word
from streammerge.quantities import Duration, Size

FEWEST_OF_PARETO = 8  # six determine two quadratic functions, two judge


class TuneSection(Section):
    """Choose how strongly a version is rendered, by log-loss on rows of yours."""

    kind: Literal["scale", "cap", "pareto"] = Field(
        description="scale: finalize.scale; cap: finalize.cap's strength, or kappa at level fixed; "
        "pareto: shares of what was merged before and of what is new"
    )
    prefer: float = Field(
        default=0.5, ge=0, le=1, description="pareto: what the old tasks count, against the new one"
    )
    data: Path = Field(description="the rows, one JSON object a line; split in two by each row's digest")
    measure: Literal["perplexity", "accuracy", "command"] = Field(
        description="who measures the log-loss of each row: transformers, or a program of yours"
    )
    argv: tuple[Word, ...] = Field(
        default=(),
        description='the program and its arguments; "{model}" and "{data}" become a folder and a file',
    )
    span: float = Field(
        default=2.0, gt=1, le=100, description="looked for from 1/span of the configured value to span times"
    )
    evaluations: int = Field(
        default=10, ge=4, le=1000, description="how often a model is measured for one version, at most"
    )
    time: Duration = Field(default=3600.0, gt=0, description="how long all of that may take")
    timeout: Duration = Field(default=600.0, gt=0, description="after which one measurement counts as failed")
    memory: Size | None = Field(default=None, gt=0, description="with more than this it counts as failed")
    device: str = Field(
        default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="where transformers measures"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of transformers")
    errors: float = Field(
        default=1.0,
        ge=0,
        le=10,
        description="by how many standard errors it must be better on the half it was not chosen on",
    )

    @model_validator(mode="after")
    def _has_a_program_or_none(self) -> Self:
        if bool(self.argv) != (self.measure == "command"):
            raise ValueError("argv goes with measure: command, and that needs it")
        if self.kind == "pareto" and self.evaluations < FEWEST_OF_PARETO:
            raise ValueError(f"kind pareto needs {FEWEST_OF_PARETO} evaluations or more")
        return self
