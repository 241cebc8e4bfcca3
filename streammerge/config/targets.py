"""`targets:`: who is told of a promotion. One class a kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from streammerge.config.section import Name, RepoId, Section, Word
from streammerge.quantities import Duration


class ExecTarget(Section):
    """A command that makes a serving process take the promoted version; exit 0 says that it serves it."""

    type: Literal["exec"]
    name: Name = Field(description="how the target is called in status, logs and metrics")
    argv: tuple[Word, ...] = Field(min_length=1, description="program and arguments, no shell")
    timeout: Duration = Field(default=60.0, gt=0, description="after which it is killed and tried again")


class HubTarget(Section):
    """A repository of a Hugging Face Hub: every promoted version becomes a commit and a tag."""

    type: Literal["hub"]
    name: Name = Field(description="how the target is called in status, logs and metrics")
    repo: RepoId = Field(description="ORG/NAME, made if it is not there; nothing else may be kept in it")
    branch: str = Field(
        default="main", pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]*$", max_length=200, description="its branch"
    )
    private: bool | None = Field(
        default=None, description="whether it is made private; null is what its owner's settings say"
    )
    base_model: RepoId | None = Field(
        default=None, description="ORG/NAME of the base, for the card; else `base` itself where that is hf://"
    )
    token_file: Path | None = Field(
        default=None, description="file with the token; else the systemd credential hf-token, else HF_TOKEN"
    )
    endpoint: str | None = Field(
        default=None, pattern=r"^https?://", description="another Hub than HF_ENDPOINT or huggingface.co"
    )
    timeout: Duration = Field(default=3600.0, gt=0, description="for a whole upload; it is tried again then")


TargetSection = Annotated[ExecTarget | HubTarget, Field(discriminator="type")]
