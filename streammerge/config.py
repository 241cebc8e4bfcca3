"""The configuration: every key, its type, its default and what it means; checked whole.

It holds no secrets, only where they lie. How the file is found and read is `configfile`'s.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from streammerge.quantities import Duration, Size


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Since(Section):
    """`first_run: {since: DATE}`: fold what was published on that day or later."""

    since: date

    @property
    def timestamp(self) -> float:
        """Midnight UTC of that day, in seconds since 1970."""
        return datetime(self.since.year, self.since.month, self.since.day, tzinfo=UTC).timestamp()


Word = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # what a program can be given
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


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


RepoId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$", max_length=200)]


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
HUB_ADDRESS = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+)(?:@(?P<revision>[A-Za-z0-9_./-]+))?"
)


def parse_base(value: object) -> object:
    """Take hf://ORG/NAME[@REVISION] as it is and anything else as a path."""
    text = str(value)
    if not text.startswith("hf:"):
        return Path(value) if isinstance(value, str) else value
    if not HUB_ADDRESS.fullmatch(text):
        raise ValueError(f"{text!r} is no address on the Hub; write hf://ORG/NAME@REVISION")
    return text


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


class CommandGate(Section):
    """A command that measures a candidate: it prints one JSON object of numbers."""

    type: Literal["command"]
    name: Name = Field(description="how the gate is called in history and metrics")
    argv: tuple[Word, ...] = Field(
        min_length=1, description='program and arguments; "{snapshot}" becomes the candidate\'s folder'
    )
    limits: dict[str, Limit] = Field(default_factory=dict, description="what the numbers must satisfy")
    timeout: Duration = Field(default=600.0, gt=0, description="after which it counts as failed")


class Limit(Section):
    """Bounds for one number that a gate measures."""

    min: float | None = None
    max: float | None = None
    max_drop: float | None = Field(
        default=None, ge=0, description="absolute, against the version being served"
    )


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


class Http(Section):
    """The one port: status, JSON, metrics, health."""

    listen: str = Field(default="127.0.0.1:9478", pattern=r"^.+:\d{1,5}$", description="address:port")
    hub_secret_file: Path | None = Field(
        default=None, description="file with the secret of a Hub's webhook to /hooks/hub, which needs one"
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


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


class PrepareSection(Section):
    """What may be kept of what opcm derives from the state while there is nothing else to do."""

    memory: Size = Field(default=0, description="memory that it may take")
    disk: Size = Field(default=20 * 10**9, description="disk that it may take, in the store")


class FinalizeSection(Section):
    """Applied when weights are written; may change at any time."""

    scale: float = Field(default=1.0, gt=0, le=100, description="multiplies the merged delta")
    cap: Cap | None = Field(default=None, description="takes the place of the method's own length")
    lines: Lines | None = Field(default=None, description="multiplies the merged delta block by block")


class Route(Section):
    """What becomes of the deltas of some weights, of all sources or of one."""

    weights: str = Field(description="the weights, as a glob")
    share: float = Field(ge=0, le=100, description="what their deltas are multiplied by; 0 leaves them out")
    source: str | None = Field(default=None, description="whose deltas; null is all sources'")


class Config(Section):
    """Everything a daemon is told."""

    base: Annotated[Path | str, BeforeValidator(parse_base, json_schema_input_type=str)] = Field(
        description="a model folder, one .safetensors file, or hf://ORG/NAME@REVISION",
    )
    store: Path = Field(description="the folder for snapshots, state and the ledger")
    method: Literal[
        "spectral_cap", "opcm", "tsvm", "iso_c", "wudi", "regmean", "fisher", "ties", "dare", "breadcrumbs",
        "consensus_ta", "magmax", "average", "task_arithmetic", "pcb", "iso_cts",
    ] = Field(default="spectral_cap", description="how deltas combine")  # fmt: skip
    knobs: dict[str, Any] = Field(default_factory=dict, description="the method's own settings")
    finalize: FinalizeSection = Field(default=FinalizeSection())
    added: tuple[str, ...] | None = Field(
        default=None, description="weights that are added whole, as globs; replaces the default list"
    )
    routes: tuple[Route, ...] = Field(
        default=(),
        description="weights whose deltas are left out or count more or less; the first match holds",
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1"
    )
    residency: Literal["auto", "device", "host", "disk"] = Field(
        default="auto", description="where the state lies between folds"
    )
    prepare: PrepareSection = Field(default=PrepareSection())
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; results are bit-identical for one number"
    )
    sources: tuple[SourceSection, ...] = Field(default=(), description="where fine-tunes are published")
    on_update: Literal["replace", "add", "ignore"] = Field(
        default="replace", description="what a changed revision of a folded name does"
    )
    tensors: Tensors = Field(default=Tensors())
    max_delta_ratio: float = Field(
        default=1.0, gt=0, description="a longer delta, in lengths of the base, is refused"
    )
    screens: Screens = Field(default=Screens())
    incomplete_after: Duration = Field(
        default=86400.0, description="a fine-tune whose files still miss then is refused"
    )
    approve: Literal["auto", "manual"] = Field(
        default="auto", description="whether a person approves each fine-tune"
    )
    gates: tuple[CommandGate, ...] = Field(default=(), description="checks of a candidate, in order")
    targets: tuple[TargetSection, ...] = Field(default=(), description="who is told of a promotion, in order")
    keep: int = Field(default=5, ge=1, description="how many accepted versions stay on disk")
    keep_spaced: int = Field(
        default=4,
        ge=0,
        le=16,
        description="how many older versions stay, at doubling distances, where taking out replays",
    )
    keep_refused: int = Field(default=1, ge=0, description="how many refused candidates stay for inspection")
    grace: Duration = Field(default=86400.0, description="what was current within this time stays on disk")
    reserve: Size = Field(default=2**30, description="disk space that is always left free")
    replay_limit: int = Field(
        default=50, ge=0, description="how many fine-tunes may be folded again to take one out"
    )
    archive: Literal["drop", "adapters", "keep"] = Field(
        default="drop", description="whether fetched files stay after the fold"
    )
    allow_network_store: bool = Field(default=False, description="accept a store on a network file system")
    http: Http = Field(default=Http())
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info")

    @property
    def hub_base(self) -> tuple[str, str] | None:
        """Repository and revision of a base on the Hub."""
        found = HUB_ADDRESS.fullmatch(str(self.base)) if isinstance(self.base, str) else None
        return (found["repo"], found["revision"] or "main") if found else None

    @property
    def base_models(self) -> tuple[str, ...]:
        """The names by which a Hub knows the base."""
        return (self.hub_base[0],) if self.hub_base else ()

    @property
    def base_path(self) -> Path:
        """Where the base lies; one on the Hub is brought into the store first."""
        return self.base if isinstance(self.base, Path) else self.store / "base"

    @model_validator(mode="after")
    def _hub_sources_look_for_something(self) -> Config:
        for part in self.sources:
            if isinstance(part, HubSource) and not (
                part.base_models or part.repos or part.authors or self.hub_base
            ):
                raise ValueError(f"source {part.name}: say what to look for: base_models, authors or repos")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        for kind in ("sources", "targets", "gates"):
            names = [part.name for part in getattr(self, kind)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{kind}: the name {min(twice)} is given twice")
        return self


CommandGate.model_rebuild()
Config.model_rebuild()

# Keys that belong to the store; a running daemon cannot change them, nor what it has opened for its lifetime.
FIXED = (
    "base",
    "store",
    "method",
    "knobs",
    "added",
    "routes",
    "device",
    "residency",
    "prepare",
    "threads",
    "http",
    "log_level",
)
