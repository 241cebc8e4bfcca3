"""The configuration's file: found, read as YAML, overlaid by the environment, explained where it is wrong.

Unknown keys are errors that name the nearest valid one. Relative paths are taken against the file.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from streammerge.config import FIXED, Config
from streammerge.config.gates import CommandGate
from streammerge.config.targets import ExecTarget, Serving
from streammerge.errors import ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.config.section import Section
    from streammerge.config.targets import TargetSection

ENVIRONMENT_PREFIX = "STREAMMERGE__"
CONFIG_VARIABLE = "STREAMMERGE_CONFIG"
LISTS = ("sources", "gates", "targets")  # of sections of several kinds
UNITED = ("Since", "Matching", "Any")  # sections that stand where a plain value may
PLACES = (Path("streammerge.yaml"), Path("/etc/streammerge/streammerge.yaml"))


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
        raw = read_yaml(text)
    except ValueError as exc:
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


def read_yaml(text: str) -> Any:  # noqa: ANN401 -- whatever YAML can say
    """Read YAML as data; ValueError for what is none.

    PyYAML lets through what int(), float() and datetime() raise, and what its own patterns do not match.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError as exc:
        raise ValueError("it is nested too deep") from exc
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as exc:
        raise ValueError(str(exc)) from exc


def _overlay_environment(raw: dict[str, Any], origins: dict[str, str]) -> None:
    """Lay STREAMMERGE__SECTION__KEY=value over the file; values are read as YAML."""
    for name, text in sorted(os.environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        *sections, key = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        variable = shown(name)
        place = raw
        for section in sections:
            inner = place.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{variable}: {shown(section)} is a list or a value", hint="set the whole key, as YAML"
                )
            place = inner
        try:
            place[key] = read_yaml(text)
        except ValueError as exc:
            raise ConfigError(
                f"{variable}={shown(text[:80])}: not readable as YAML", hint="quote it as YAML does"
            ) from exc
        origins[(sections or [key])[0]] = f"environment {variable}"


def explain(error: ValidationError, path: Path, origins: dict[str, str]) -> ConfigError:
    """Turn pydantic's findings into one line for each: the key, what is wrong, the nearest valid key."""
    lines, hints = [], []
    for found in error.errors():
        spots = [part for place, part in enumerate(found["loc"]) if not _is_kind(found["loc"], place)]
        key = shown(".".join(str(part) for part in spots))
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
        elif found["type"] == "literal_error":
            hints += _nearest(found["input"], found["ctx"]["expected"])
        elif found["type"] == "missing":
            message = "is missing"
        elif found["type"] == "union_tag_not_found":
            message = "needs a type, for example type: directory"
        elif found["type"] == "union_tag_invalid":
            tag, expected = str(found["ctx"]["tag"])[:80], found["ctx"]["expected_tags"]
            message = f"type {tag!r} is none of {expected}"
            hints += _nearest(tag, expected)
        if not key:
            lines.append(message)
        else:
            origin = origins.get(str(spots[0]), "")
            lines.append(f"{key}: {message}" + (f" ({origin})" if origin.startswith("environment") else ""))
    return ConfigError(
        f"{path}: " + "; ".join(lines), hint="; ".join(hints) or "see config/streammerge.yaml for every key"
    )


def _nearest(given: object, expected: str) -> list[str]:
    """Ask whether the most alike of the quoted words in `expected` was meant; nothing where none is."""
    known = re.findall(r"'([^']*)'", expected)
    return [f"did you mean {word}?" for word in difflib.get_close_matches(str(given), known, n=1)]


def _is_kind(spots: Sequence[Any], place: int) -> bool:
    """Whether a part of a place is pydantic's word for one of several sections, and no key."""
    return spots[place] in UNITED or (place == 2 and spots[0] in LISTS)


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
        try:
            found = os.path.abspath(folder / path.expanduser())  # noqa: PTH100 -- must not resolve symbolic links
            os.fsencode(found)
        except (RuntimeError, ValueError) as exc:  # an unknown user's home; half a character of a pair
            raise ConfigError(f"{path!s:.80}: {exc}", hint="give the path in full") from exc
        if "\0" in found:
            raise ConfigError(f"{found[:80]!r} is no path", hint="remove the NUL from it")
        return Path(found)

    def absolute(part: Section) -> dict[str, Any]:
        single = {key: against(value) for key, value in part if isinstance(value, Path)}
        lists = {key: value for key, value in part if isinstance(value, tuple)}
        several = {
            key: tuple(map(against, value))
            for key, value in lists.items()
            if value and all(isinstance(path, Path) for path in value)
        }
        return {**single, **several}

    def target(part: TargetSection) -> dict[str, Any]:
        changed = absolute(part)
        if isinstance(part, ExecTarget):
            changed["argv"] = _program(part.argv, folder)
        if isinstance(part, Serving):
            changed["path_map"] = {against(here): there for here, there in part.path_map.items()}
            if part.probe:
                argv = {"argv": _program(part.probe.argv, folder)}
                changed["probe"] = part.probe.model_copy(update={**absolute(part.probe), **argv})
        return changed

    return config.model_copy(
        update={
            "base": against(config.base) if isinstance(config.base, Path) else config.base,
            "store": against(config.store),
            "http": config.http.model_copy(update=absolute(config.http)),
            "sources": tuple(part.model_copy(update=absolute(part)) for part in config.sources),
            "targets": tuple(part.model_copy(update=target(part)) for part in config.targets),
            "tune": config.tune
            and config.tune.model_copy(
                update={
                    **absolute(config.tune),
                    "argv": _program(config.tune.argv, folder) if config.tune.argv else (),
                }
            ),
            "gates": tuple(
                part.model_copy(
                    update=absolute(part)
                    | ({"argv": _program(part.argv, folder)} if isinstance(part, CommandGate) else {})
                )
                for part in config.gates
            ),
        }
    )


def _program(argv: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Take a program given with a slash, like ./reload.sh, against the file."""
    program = argv[0] if argv else ""
    return (os.path.normpath(folder / program), *argv[1:]) if "/" in program else argv


def changed_fixed(old: Config, new: Config) -> list[str]:
    """List the keys that differ and that a reload cannot change."""
    return [key for key in FIXED if getattr(old, key) != getattr(new, key)]
