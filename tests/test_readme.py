"""README.md, DESIGN.md and the example configuration hold; so do every page's links and commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from typing import TYPE_CHECKING

import pytest
import yaml
from documents import (
    DOCS,
    PACKAGE,
    PAGES,
    ROOT,
    code_lines,
    commands,
    first_words,
    read,
    root_command,
    sections,
    table,
    words,
)

from streammerge import config as configuration
from streammerge import configfile
from streammerge.config.finalize import FinalizeSection
from streammerge.config.gates import Limit
from streammerge.config.screens import Tensors
from streammerge.config.sources import DirectorySource
from streammerge.config.targets import Probe
from streammerge.steps import STEPS

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE = ROOT / "config" / "streammerge.yaml"
COMMENTED_OUT = re.compile(r"^#(?=\S|  )", re.MULTILINE)  # "#key:" and what is indented below; prose has "# "
LISTS = ("sources", "gates", "targets")
EXAMPLES = ("limits", "base_models", "probe")  # at their defaults these would show nothing

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# The example configuration


@pytest.fixture
def no_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment overlays the file."""
    for variable in list(os.environ):
        if variable.startswith(configfile.ENVIRONMENT_PREFIX):
            monkeypatch.delenv(variable)


@pytest.mark.usefixtures("no_overlay")
def test_the_example_loads_as_it_stands_and_sets_only_what_must_be_set() -> None:
    """config/streammerge.yaml is valid; a key that it does not comment out is required or the default."""
    found, _ = configfile.load(EXAMPLE)
    (source,) = found.sources
    assert isinstance(source, DirectorySource)
    plain = DirectorySource(type="directory", name=source.name, path=source.path)
    assert found == configuration.Config(base=found.base, store=found.store, sources=(plain,))


@pytest.mark.usefixtures("no_overlay")
def test_the_example_has_every_key_at_its_default(tmp_path: Path) -> None:
    """With the sign before each commented key taken away, the file has every key at its default."""
    text = COMMENTED_OUT.sub("", EXAMPLE.read_text(encoding="utf-8"))
    (tmp_path / "streammerge.yaml").write_text(text, encoding="utf-8")
    found, _ = configfile.load(tmp_path / "streammerge.yaml")
    raw = yaml.safe_load(text)
    lists = {kind: getattr(found, kind) for kind in LISTS}
    assert found == configuration.Config(base=found.base, store=found.store, **lists)
    assert set(raw) == set(configuration.Config.model_fields)
    for name, model in (
        ("finalize", FinalizeSection),
        ("tensors", Tensors),
        ("http", configuration.Http),
    ):
        assert set(raw[name]) == set(model.model_fields), name
    for kind, parts in lists.items():
        assert {type(part) for part in parts} == set(sections(kind)), kind
        for written, part in zip(raw[kind], parts, strict=True):
            assert set(written) == set(type(part).model_fields), f"{kind}: {part.type}"
            for key, field in type(part).model_fields.items():
                if not field.is_required() and key not in EXAMPLES:
                    default = field.get_default(call_default_factory=True)
                    assert getattr(part, key) == default, f"{kind}: {part.type}: {key}"
    assert set(raw["gates"][0]["limits"]["mean"]) == set(Limit.model_fields)
    assert set(raw["targets"][1]["probe"]) == set(Probe.model_fields)


def test_the_example_marks_the_keys_that_a_reload_cannot_change() -> None:
    """A comment that ends in "(fixed)" stands before the keys that a running daemon cannot change."""
    marked = set()
    for block in EXAMPLE.read_text(encoding="utf-8").split("\n\n"):
        *prose, key = re.split(r"^#?([a-z_]+):", block, maxsplit=1, flags=re.MULTILINE)[:2]
        if prose and prose[0].rstrip().endswith("(fixed)"):
            marked.add(key)
    assert marked == set(configuration.FIXED)


# README.md and DESIGN.md


def test_the_readme_draws_the_repository_as_it_is() -> None:
    """README.md's tree has all of the package and of the repository's top, and nothing that is not there."""
    tree = re.search(r"## What is where\n\n```\n(.*?)```", read("README.md"), re.DOTALL)
    assert tree
    first, *lines = tree[1].splitlines()
    drawn = {ROOT / name for name in first.split()}
    for line in lines:
        place = PACKAGE if line.startswith(" ") else ROOT
        drawn.add(place / line.split()[0])
    assert [str(path) for path in drawn if not path.exists()] == []
    unsaid = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    there = {path for path in PACKAGE.iterdir() if path.name not in unsaid}
    there |= {path for path in ROOT.iterdir() if is_of_the_project(path)}
    assert [str(path) for path in there - drawn] == []


def is_of_the_project(path: Path) -> bool:
    """Whether something at the top is neither a tool's settings nor left by a run."""
    if path.name.startswith(".") and path.name != ".ci":
        return False
    asked = ["git", "check-ignore", "--quiet", str(path)]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, check=False).returncode != 0


def test_make_targets_in_the_readme_exist() -> None:
    """Every `make …` in README.md is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    used = set(re.findall(r"(?:`|^    )make ([a-z-]+)", read("README.md"), re.MULTILINE))
    assert {"run", "test"} <= used <= targets


def test_the_design_draws_the_layers_that_the_linter_checks() -> None:
    """DESIGN.md has the layers of the import contract, line by line."""
    tools = tomllib.loads(read("pyproject.toml"))["tool"]
    (layers,) = [c["layers"] for c in tools["importlinter"]["contracts"] if c["type"] == "layers"]
    drawn = re.search(r"## Layers\n.*?```\n(.*?)```", read("DESIGN.md"), re.DOTALL)
    assert drawn
    assert drawn[1].splitlines() == layers


def test_the_design_gives_reasons_for_modules_that_exist() -> None:
    """Each module that DESIGN.md gives a reason for is there."""
    modules = first_words(read("DESIGN.md"), "module")
    assert [name for name in modules if not (PACKAGE / f"{name}.py").exists()] == []


def test_the_design_lists_the_steps_at_which_a_process_may_be_killed() -> None:
    """DESIGN.md's table of steps is the list of steps at which crash tests kill."""
    assert sorted(row[0] for row in table(read("DESIGN.md"), "step")) == sorted(STEPS)


# Every page


@every_page
def test_commands_in_code_blocks_parse(page: Path) -> None:
    """Every `streammerge …` line in a code block is one that the program accepts."""
    for line in code_lines(page.read_text(encoding="utf-8")):
        if line.startswith("streammerge ") and "…" not in line:
            name, command, arguments = "streammerge", root_command(), shlex.split(line)[1:]
            while arguments and arguments[0] in getattr(command, "commands", {}):
                name, command = f"{name} {arguments[0]}", command.commands[arguments.pop(0)]
            assert name in commands(), line
            command.make_context(name, arguments)  # raises what the user would read


@every_page
def test_commands_in_sentences_exist(page: Path) -> None:
    """Every `streammerge …` in backticks begins with the name of a command."""
    for word in words(page.read_text(encoding="utf-8")):
        if word.startswith("streammerge "):
            assert any(f"{word} ".startswith(f"{name} ") for name in commands()), word


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    """Every relative link leads to a file or a folder of the repository."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_can_be_reached() -> None:
    """Every page in docs/ is linked from README.md, a decision from DESIGN.md."""
    linked = re.findall(r"\]\((docs/[^)#]+\.md)", read("README.md") + read("DESIGN.md"))
    assert {str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md")} == set(linked)
