"""`sources:`: where fine-tunes are published. One class a kind."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from streammerge.config.section import Name, RepoId, Section
from streammerge.quantities import Duration, Size


class Since(Section):
    """`first_run: {since: DATE}`: fold what was published on that day or later."""

    since: date

    @property
    def timestamp(self) -> float:
        """Midnight UTC of that day, in seconds since 1970."""
        return datetime(self.since.year, self.since.month, self.since.day, tzinfo=UTC).timestamp()


class DirectorySource(Section):
    """A watched folder; every folder or .safetensors file in it is a fine-tune."""

    type: Literal["directory"]
    name: Name = Field(description="how the source is called in status, logs and metrics")
    path: Path = Field(description="the folder")
    settle: Duration = Field(
        default=30.0, description="how long a fine-tune must not change before it is read"
    )
    poll: Duration = Field(
        default=60.0, gt=0, description="how often the folder is looked through; file events come sooner"
    )
    first_run: Literal["fold", "ignore"] | Since = Field(
        default="fold", description="what to do with those there at the first look"
    )
    weight: float = Field(
        default=1.0, gt=0, description="weight of its fine-tunes, where the method has weights"
    )
    ignore: tuple[str, ...] = Field(
        default=(".*", "checkpoint-*", "*.tmp", "*.part"),
        description="names that are no fine-tunes, as globs",
    )
    follow_symlinks: bool = Field(default=False, description="whether links in the folder are followed")


class HubSource(Section):
    """Repositories of a Hugging Face Hub: by the base they descend from, by owner, or one by one."""

    type: Literal["hub"]
    name: Name = Field(description="how the source is called in status, logs and metrics")
    base_models: tuple[RepoId, ...] = Field(
        default=(), description="ORG/NAME whose descendants are looked for; `base` itself where that is hf://"
    )
    relations: tuple[Literal["finetune", "adapter"], ...] = Field(
        default=("finetune", "adapter"), min_length=1, description="which descendants"
    )
    authors: tuple[str, ...] = Field(default=(), description="users and organisations, all of their models")
    repos: tuple[RepoId, ...] = Field(default=(), description="single repositories")
    names: tuple[str, ...] = Field(default=("*",), description="globs of ORG/NAME, one of which must match")
    ignore: tuple[str, ...] = Field(default=(), description="globs of ORG/NAME that are left out")
    tags: tuple[str, ...] = Field(default=(), description="tags a repository must all have")
    without_tags: tuple[str, ...] = Field(default=(), description="tags it must not have")
    min_age: Duration = Field(
        default=0.0, description="how long a revision must be public before it is taken"
    )
    max_per_day: int | None = Field(
        default=None, ge=1, description="how many are taken in any 24 hours; the others wait their turn"
    )
    max_bytes: Size | None = Field(default=None, description="larger ones are left out")
    gated: Literal["try", "ignore"] = Field(default="try", description="repositories that ask for consent")
    private: Literal["try", "ignore"] = Field(default="try", description="repositories only a token sees")
    token_file: Path | None = Field(
        default=None, description="file with the token; else the systemd credential hf-token, else HF_TOKEN"
    )
    endpoint: str | None = Field(
        default=None, pattern=r"^https?://", description="another Hub than HF_ENDPOINT or huggingface.co"
    )
    timeout: Duration = Field(default=10.0, gt=0, description="for a connection, and for the next bytes")
    poll: Duration = Field(default=300.0, gt=0, description="how often it is asked for what is new")
    first_run: Literal["fold", "ignore"] | Since = Field(
        description="what to do with those there at the first look; must be said"
    )
    weight: float = Field(
        default=1.0, gt=0, description="weight of its fine-tunes, where the method has weights"
    )


SourceSection = Annotated[DirectorySource | HubSource, Field(discriminator="type")]
