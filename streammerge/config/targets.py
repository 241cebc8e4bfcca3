"""`targets:`: who is told of a promotion. One class a kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from streammerge.config.section import Name, RepoId, Section, Word
from streammerge.quantities import Duration

Server = Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$", max_length=2000)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+([/?][^\s#]*)?$", max_length=2000)]
Header = Annotated[str, Field(pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$")]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")]


class Matching(Section):
    """What one value of an answer must be like."""

    matches: str | None = Field(default=None, description="a regular expression, found anywhere in the text")
    min: float | None = None
    max: float | None = None

    @field_validator("matches")
    @classmethod
    def _is_an_expression(cls, text: str | None) -> str | None:
        try:
            re.compile(text or "")
        except re.error as exc:
            raise ValueError(f"{text!r} is no regular expression: {exc}") from exc
        return text

    @model_validator(mode="after")
    def _asks_something(self) -> Matching:
        if self.matches is None and self.min is None and self.max is None:
            raise ValueError("needs matches, min or max")
        return self


class Probe(Section):
    """One request after every telling, and what must be answered for the version to count as served."""

    url: Url | None = Field(default=None, description="what is asked")
    method: Literal["GET", "POST", "PUT"] | None = Field(
        default=None, description="null is POST where something is sent, else GET"
    )
    headers: dict[HeaderName, Header] = Field(default_factory=dict, description="sent along; no secrets")
    token_file: Path | None = Field(default=None, description="file with the token that is sent as Bearer")
    send: Any = Field(default=None, description="sent as JSON; a text is sent as it is")
    status: int = Field(default=200, ge=100, le=599, description="what must be answered")
    contains: str | None = Field(default=None, description="what must stand in the answer")
    values: dict[str, Annotated[Matching | Any, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict, description="JSON pointer -> what must be there: a value, or matches, min, max"
    )
    argv: tuple[Word, ...] = Field(
        default=(), description="a program that judges: it reads the answer, exit 0 says right"
    )
    timeout: Duration = Field(default=30.0, gt=0, description="for the request, and for the program")

    @field_validator("values", mode="before")
    @classmethod
    def _are_pointers(cls, values: object) -> object:
        for pointer in values if isinstance(values, dict) else ():
            if pointer and not str(pointer).startswith("/"):
                raise ValueError(f"{pointer!r} is no JSON pointer: it begins with /, as in /choices/0/text")
        return values

    @model_validator(mode="after")
    def _asks_something(self) -> Probe:
        if not self.url and not self.argv:
            raise ValueError("needs a url to ask, or a program in argv")
        if not self.url and (self.send is not None or self.values or self.contains):
            raise ValueError("needs a url for what is sent or expected")
        return self


class Serving(Section):
    """What every serving target has: how it sees the store, and how its word is checked."""

    path_map: dict[Path, str] = Field(
        default_factory=dict, description="folder here -> the same folder as the target sees it"
    )
    probe: Probe | None = Field(default=None, description="what is asked after every telling")
    check: Duration = Field(default=60.0, gt=0, description="how often it is asked what it serves")

    def sees(self, path: Path) -> str:
        """Give a path as the target sees it; the longest folder that is mapped counts."""
        for folder in sorted(self.path_map, key=lambda folder: len(folder.parts), reverse=True):
            if path.is_relative_to(folder):
                below = path.relative_to(folder).as_posix()
                there = self.path_map[folder].rstrip("/")
                return f"{there}/{below}" if below != "." else there or "/"
        return str(path)


class Rollout(Section):
    """How a version reaches the targets that serve, one after the other, the first one as canary."""

    soak: Duration = Field(
        default=0.0, description="how long the first target serves a version before the others are told of it"
    )
    max_unavailable: int | None = Field(
        default=None, ge=0, description="how many may be failing while the next is told; null is any number"
    )


class ExecTarget(Serving):
    """A command that makes a serving process take the promoted version; exit 0 says that it serves it."""

    type: Literal["exec"]
    name: Name = Field(description="how the target is called in status, logs and metrics")
    argv: tuple[Word, ...] = Field(min_length=1, description="program and arguments, no shell")
    timeout: Duration = Field(default=60.0, gt=0, description="after which it is killed and tried again")


class SglangTarget(Serving):
    """An SGLang server that loads the promoted version's weights in place."""

    type: Literal["sglang"]
    name: Name = Field(description="how the target is called in status, logs and metrics")
    url: Server = Field(description="where it listens")
    api_key_file: Path | None = Field(default=None, description="file with its --api-key")
    admin_key_file: Path | None = Field(
        default=None, description="file with its --admin-api-key, for updates; else api_key_file's"
    )
    abort: bool = Field(
        default=False, description="whether requests in flight are aborted; else they are answered first"
    )
    timeout: Duration = Field(default=600.0, gt=0, description="for an update; it is told again then")


class VllmTarget(Serving):
    """A vLLM server, in its development mode, that loads the promoted version's weights in place."""

    type: Literal["vllm"]
    name: Name = Field(description="how the target is called in status, logs and metrics")
    url: Server = Field(description="where it listens")
    api_key_file: Path | None = Field(default=None, description="file with its --api-key")
    pause: Literal["wait", "keep", "abort"] = Field(
        default="wait", description="what becomes of requests in flight, as vLLM calls it"
    )
    timeout: Duration = Field(default=600.0, gt=0, description="for each request; it is told again then")


class TritonTarget(Serving):
    """A model of a Triton server in explicit mode, and its folder of a model repository."""

    type: Literal["triton"]
    name: Name = Field(description="how the target is called in status, logs and metrics")
    url: Server = Field(description="where it listens")
    model: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200, description="its name in the repository"
    )
    repository: Path = Field(description="the model repository, as it is seen here; config.pbtxt is yours")
    template: Path | None = Field(
        default=None, description="a folder whose files each version gets: model.py, model.json"
    )
    api_key_file: Path | None = Field(default=None, description="file with a token sent as Bearer")
    timeout: Duration = Field(default=600.0, gt=0, description="for a load; it is told again then")


class WebhookTarget(Section):
    """An address that is told of every promotion by a signed CloudEvent."""

    type: Literal["webhook"]
    name: Name = Field(description="how the target is called in status, logs and metrics")
    url: Url = Field(description="where the event is posted")
    secret_file: Path = Field(description="file with the secret that signs it, whsec_…")
    timeout: Duration = Field(default=15.0, gt=0, description="for the answer; it is told again then")


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


ServingSection = ExecTarget | SglangTarget | VllmTarget | TritonTarget
TargetSection = Annotated[ServingSection | WebhookTarget | HubTarget, Field(discriminator="type")]
