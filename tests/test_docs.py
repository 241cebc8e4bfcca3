"""What docs/ says exists and is as it says, and what exists is said there."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
import typer
import yaml
from documents import DOCS, PACKAGE, ROOT, by_word, first_words, section, table, words
from pydantic import BaseModel
from safetensors.torch import save_file

from streammerge import config as configuration
from streammerge import errors, ledger, methods, operations, screen
from streammerge.cli import app
from streammerge.metrics import DECISIONS, STAGES, Metrics
from streammerge.offline import ALLOWABLE
from streammerge.server import Views, make_app
from streammerge.targets import exec as exec_target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOG_LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}

# Configuration


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List a section's keys with their fields; keys of a section inside it have a dotted name."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
            continue
        yield prefix + name, field
        if kind == dict[str, configuration.Limit]:
            yield from keys(configuration.Limit, f"{prefix}{name}.NAME.")
        elif configuration.Since in get_args(kind):
            yield from keys(configuration.Since, f"{prefix}{name}.")


def value_of(field: Any, text: str) -> Any:
    """Read a default as the configuration would."""
    value = yaml.safe_load(text)
    readers = [part.func for part in field.metadata if hasattr(part, "func")]
    if readers:
        return readers[0](value)
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("title", "model"),
    [
        ("Keys", configuration.Config),
        ("One of `sources`", configuration.DirectorySource),
        ("One of `gates`", configuration.CommandGate),
        ("One of `targets`", configuration.ExecTarget),
    ],
)
def test_every_configuration_key_is_documented_with_its_default(title: str, model: type[BaseModel]) -> None:
    """docs/configure.md has exactly the keys that the code reads, each with the default it has there."""
    documented = by_word(section("configure.md", title).split("\n### ")[0], "key")
    expected = dict(keys(model))
    assert set(documented) == set(expected)
    for key, field in expected.items():
        default = documented[key][1]
        if field.is_required():
            assert default == "required", key
        else:
            found = value_of(field, words(default)[0])
            assert found == field.get_default(call_default_factory=True), key


def test_keys_are_marked_by_when_they_can_change() -> None:
    """A key that docs/configure.md marks as `reload` can change while the daemon runs, and no other can."""
    rows = by_word(section("configure.md", "Keys").split("\n### ")[0], "key")
    assert {row[2] for row in rows.values()} == {"store", "restart", "reload"}
    fixed = {key.split(".")[0] for key, row in rows.items() if row[2] != "reload"}
    fixed.remove("allow_network_store")  # may change, and is looked at when a store is opened
    assert fixed == set(configuration.FIXED)


# Methods, sources, targets, gates


def test_every_method_and_knob_is_documented() -> None:
    """docs/methods.md has a section for each method, and in it a row for each knob with its default."""
    assert first_words(section("methods.md", "Methods"), "method") == list(methods.NAMES)
    for name in methods.NAMES:
        text = section("methods.md", name)
        if fields := methods.knob_fields(name):
            rows = by_word(text, "knob")
            documented = {knob: yaml.safe_load(words(row[1])[0]) for knob, row in rows.items()}
            assert documented == {knob: default for knob, (_, default) in fields.items()}, name
        else:
            assert "No knobs." in text, name


def test_every_tail_of_opcm_is_documented() -> None:
    """docs/methods.md has a row for each value of opcm's knob `tail`."""
    kind, _ = methods.knob_fields("opcm")["tail"]
    assert set(first_words(section("methods.md", "opcm"), "tail")) == set(get_args(kind))


@pytest.mark.parametrize(
    ("page", "model", "folder"),
    [
        ("sources.md", configuration.DirectorySource, "sources"),
        ("targets.md", configuration.ExecTarget, "targets"),
        ("gates.md", configuration.CommandGate, ""),
    ],
)
def test_every_type_of_source_target_and_gate_is_documented(
    page: str, model: type[BaseModel], folder: str
) -> None:
    """Each page has one section a type, and the types are the modules of the folder where there is one."""
    titles = re.findall(r"^## (\w+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == list(get_args(model.model_fields["type"].annotation))
    if folder:
        modules = {path.stem for path in (PACKAGE / folder).glob("*.py")}
        assert set(titles) == modules - {"__init__"}


def test_every_variable_of_an_exec_target_is_documented() -> None:
    """docs/targets.md has a row for each variable that the command gets."""
    given = set(re.findall(r'"(STREAMMERGE_[A-Z]+)"', inspect.getsource(exec_target)))
    assert set(first_words(section("targets.md", "exec"), "variable")) == given


# Metrics


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    """docs/metrics.md has exactly the metrics that are declared, each with its type and its labels."""
    rows = by_word(section("metrics.md", "Metrics").split("\n## ")[0], "metric")
    documented = {name: (row[1], tuple(words(row[2]))) for name, row in rows.items()}
    assert documented == Metrics().declared() if hasattr(Metrics, "declared") else declared()


def declared() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Give our metrics as they are scraped: name, type, labels."""
    suffixes = {"counter": "_total", "info": "_info"}
    ours = [metric for metric in vars(Metrics()).values() if hasattr(metric, "_labelnames")]
    return {m._name + suffixes.get(m._type, ""): (m._type, m._labelnames) for m in ours}


def test_every_decision_and_stage_is_documented() -> None:
    """docs/metrics.md names each value that the labels `decision` and `stage` can take."""
    rows = by_word(section("metrics.md", "Metrics"), "metric")
    assert set(words(rows["streammerge_finetunes_total"][3])) == set(DECISIONS)
    assert set(words(rows["streammerge_stage_duration_seconds"][3])) == set(STAGES)


# Commands
