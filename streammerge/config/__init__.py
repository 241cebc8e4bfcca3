"""The configuration: every key, its type, its default and what it means; checked whole.

It holds no secrets, only where they lie. How the file is found and read is `configfile`'s. What comes in
kinds has a file of its own here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from streammerge.config.finalize import FinalizeSection
from streammerge.config.gates import GateSection
from streammerge.config.screens import Screens, Tensors
from streammerge.config.section import Section
from streammerge.config.sources import HubSource, SourceSection
from streammerge.config.targets import Rollout, TargetSection
from streammerge.config.tuning import TuneSection
from streammerge.quantities import Duration, Size

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


class PrepareSection(Section):
    """What may be kept of what opcm derives from the state while there is nothing else to do."""

    memory: Size = Field(default=0, description="memory that it may take")
    disk: Size = Field(default=20 * 10**9, description="disk that it may take, in the store")


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
    tune: TuneSection | None = Field(
        default=None, description="chooses for each version how strongly it is rendered, by measuring it"
    )
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
    batch: int = Field(
        default=1, ge=1, le=256, description="how many waiting fine-tunes are folded into one version at most"
    )
    approve: Literal["auto", "manual"] = Field(
        default="auto", description="whether a person approves each fine-tune"
    )
    gates: tuple[GateSection, ...] = Field(default=(), description="checks of a candidate, in order")
    targets: tuple[TargetSection, ...] = Field(default=(), description="who is told of a promotion, in order")
    rollout: Rollout = Field(default=Rollout())
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
    def _what_is_tuned_is_there(self) -> Config:
        if self.tune and self.tune.kind == "cap" and self.finalize.cap is None:
            raise ValueError("tune.kind cap needs finalize.cap")
        if self.tune and self.tune.kind == "pareto" and self.method in ("pcb", "iso_cts"):
            raise ValueError(f"tune.kind pareto: {self.method} cannot render what was merged before")
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        for kind in ("sources", "targets", "gates"):
            names = [part.name for part in getattr(self, kind)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{kind}: the name {min(twice)} is given twice")
        return self


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
