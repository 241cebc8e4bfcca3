"""The configuration: YAML, environment, defaults; checked whole before anything starts.

Unknown keys are errors that name the nearest valid one. Relative paths are taken against the file. It holds
no secrets.
"""

from __future__ import annotations

import difflib
import os
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from streammerge.errors import ConfigError
from streammerge.quantities import Duration, Size

if TYPE_CHECKING:
    from collections.abc import Sequence

ENVIRONMENT_PREFIX = "STREAMMERGE__"
CONFIG_VARIABLE = "STREAMMERGE_CONFIG"
PLACES = (Path("streammerge.yaml"), Path("/etc/streammerge/streammerge.yaml"))


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Since(Section):
    """`first_run: {since: DATE}`: fold what was published on that day or later."""

    since: date

    @property
    def timestamp(self) -> float:
        """Midnight UTC of that day, in seconds since 1970."""
        return datetime(self.since.year, self.since.month, self.since.day, tzinfo=UTC).timestamp()


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
    argv: tuple[str, ...] = Field(min_length=1, description="program and arguments, no shell")
    timeout: Duration = Field(default=60.0, gt=0, description="after which it is killed and tried again")


class CommandGate(Section):
    """A command that measures a candidate: it prints one JSON object of numbers."""

    type: Literal["command"]
    name: Name = Field(description="how the gate is called in history and metrics")
    argv: tuple[str, ...] = Field(
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


class FinalizeSection(Section):
    """Applied when weights are written; may change at any time."""

    scale: float = Field(default=1.0, gt=0, le=100, description="multiplies the merged delta")


class Config(Section):
    """Everything a daemon is told."""

    base: Annotated[Path | str, BeforeValidator(parse_base, json_schema_input_type=str)] = Field(
        description="a model folder, one .safetensors file, or hf://ORG/NAME@REVISION",
    )
    store: Path = Field(description="the folder for snapshots, state and the ledger")
    method: Literal["opcm", "average", "task_arithmetic"] = Field(
        default="opcm", description="how deltas combine"
    )
    knobs: dict[str, Any] = Field(default_factory=dict, description="the method's own settings")
    finalize: FinalizeSection = Field(default=FinalizeSection())
    added: tuple[str, ...] | None = Field(
        default=None, description="weights that are added whole, as globs; replaces the default list"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1"
    )
    residency: Literal["auto", "device", "host", "disk"] = Field(
        default="auto", description="where the state lies between folds"
    )
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
    incomplete_after: Duration = Field(
        default=86400.0, description="a fine-tune whose files still miss then is refused"
    )
    approve: Literal["auto", "manual"] = Field(
        default="auto", description="whether a person approves each fine-tune"
    )
    gates: tuple[CommandGate, ...] = Field(default=(), description="checks of a candidate, in order")
    targets: tuple[ExecTarget, ...] = Field(default=(), description="who is told of a promotion, in order")
    keep: int = Field(default=5, ge=1, description="how many accepted versions stay on disk")
    keep_refused: int = Field(default=1, ge=0, description="how many refused candidates stay for inspection")
    grace: Duration = Field(default=86400.0, description="what was current within this time stays on disk")
    reserve: Size = Field(default=2**30, description="disk space that is always left free")
    archive: Literal["drop", "keep"] = Field(
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
FIXED = ("base", "store", "method", "knobs", "added", "device", "residency", "threads", "http", "log_level")


def locate(given: Path | None) -> Path:
    """Find the configuration: the given file, the environment's, then the usual places."""
    if given is not None:
        return given
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    for place in PLACES:
        if place.is_file():
            return place
    raise ConfigError(
        f"no configuration: neither {' nor '.join(map(str, PLACES))} is there",
        hint=f"give one with -c FILE or {CONFIG_VARIABLE}; `streammerge demo` makes an example",
    )


def load(path: Path) -> tuple[Config, dict[str, str]]:
    """Read and check the configuration; gives it and where each top-level value came from."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}", hint="check the path given with -c") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is no UTF-8 text", hint="check the path given with -c") from exc
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as exc:
        raise ConfigError(
            f"{path}: not readable as YAML: {exc}", hint="check indentation and quotes"
        ) from exc
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds no keys", hint="it needs at least base, store and sources")
    origins = {str(key): str(path) for key in raw}
    _overlay_environment(raw, origins)
    try:
        config = Config.model_validate(raw)
    except ValidationError as exc:
        raise explain(exc, path, origins) from exc
    return resolve_paths(config, path.resolve().parent), origins


def _overlay_environment(raw: dict[str, Any], origins: dict[str, str]) -> None:
    """Lay STREAMMERGE__SECTION__KEY=value over the file; values are read as YAML."""
    for variable, text in sorted(os.environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        *sections, key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        place = raw
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{variable}: {section} is a list or a value", hint="set the whole key, as YAML"
                )
            place = inner
        try:
            place[key] = yaml.safe_load(text)
        except yaml.YAMLError as exc:
            raise ConfigError(
                f"{variable}={text}: not readable as YAML", hint="quote it as YAML does"
            ) from exc
        origins[(sections or [key])[0]] = f"environment {variable}"


def explain(error: ValidationError, path: Path, origins: dict[str, str]) -> ConfigError:
    """Turn pydantic's findings into one line for each: the key, what is wrong, the nearest valid key."""
    lines, hints = [], []
    for found in error.errors():
        spots = [
            part for part in found["loc"] if part not in ("directory", "hub", "exec", "command", "Since")
        ]
        key = ".".join(str(part) for part in spots)
        message = str(found["msg"]).removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(
                str(spots[-1]), valid_keys(found["loc"][:-1]), n=1, cutoff=0.5
            )
            message = "is no key of this section"
            hints.append(
                f"did you mean {'.'.join([*map(str, spots[:-1]), nearest[0]])}?"
                if nearest
                else "`streammerge config schema` lists all keys"
            )
        elif found["type"] == "missing":
            message = "is missing"
        elif found["type"] == "union_tag_not_found":
            message = "needs a type, for example type: directory"
        elif found["type"] == "union_tag_invalid":
            message = f"type {found['ctx']['tag']!r} is none of {found['ctx']['expected_tags']}"
        if not key:
            lines.append(message)
        else:
            origin = origins.get(str(spots[0]), "")
            lines.append(f"{key}: {message}" + (f" ({origin})" if origin.startswith("environment") else ""))
    return ConfigError(
        f"{path}: " + "; ".join(lines), hint="; ".join(hints) or "see config/streammerge.yaml for every key"
    )


def valid_keys(spots: Sequence[Any]) -> list[str]:
    """List the keys valid at a place of the configuration, as pydantic names the place."""
    models: list[type[BaseModel]] = [Config]
    for spot in spots:
        if chosen := [model for model in models if spot in _types_of(model)]:
            models = chosen  # the place names which of several sections it is
        elif fields := [m.model_fields[str(spot)] for m in models if str(spot) in m.model_fields]:
            models = [section for field in fields for section in _sections_of(field.annotation)]
    return [key for model in models for key in model.model_fields]


def _types_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """The values of `type` that mean this section."""
    return get_args(model.model_fields["type"].annotation) if "type" in model.model_fields else ()


def _sections_of(annotation: object) -> list[type[BaseModel]]:
    """Find the sections inside tuple[Section, ...], dict[str, Section], unions and the like."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for part in get_args(annotation) for section in _sections_of(part)]


def resolve_paths(config: Config, folder: Path) -> Config:
    """Make every path absolute, against the folder of the file."""

    def against(path: Path) -> Path:
        return Path(os.path.abspath(folder / path.expanduser()))  # noqa: PTH100 -- must not resolve symbolic links

    return config.model_copy(
        update={
            "base": against(config.base) if isinstance(config.base, Path) else config.base,
            "store": against(config.store),
            "http": config.http.model_copy(
                update={
                    "hub_secret_file": config.http.hub_secret_file and against(config.http.hub_secret_file)
                }
            ),
            "sources": tuple(
                part.model_copy(
                    update={key: against(value) for key, value in part if isinstance(value, Path)}
                )
                for part in config.sources
            ),
            "targets": tuple(t.model_copy(update={"argv": _program(t.argv, folder)}) for t in config.targets),
            "gates": tuple(g.model_copy(update={"argv": _program(g.argv, folder)}) for g in config.gates),
        }
    )


def _program(argv: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Take a program given with a slash, like ./reload.sh, against the file."""
    program = argv[0]
    return (os.path.normpath(folder / program), *argv[1:]) if "/" in program else argv


def changed_fixed(old: Config, new: Config) -> list[str]:
    """List the keys that differ and that a reload cannot change."""
    return [key for key in FIXED if getattr(old, key) != getattr(new, key)]
