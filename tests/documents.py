"""Reading the documents: sections, tables, words, code; and what of the code they are compared with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from streammerge import config as configuration
from streammerge import configfile
from streammerge.cli.console import app
from streammerge.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "streammerge"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def read(name: str) -> str:
    """Give a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """Give what stands below a heading of a page in docs/, up to the next heading of its level or above."""
    text = read(f"docs/{page}")
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert found, f"docs/{page} has no heading {title!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(text: str, heading: str) -> list[list[str]]:
    """Give the cells of every table whose first column is called `heading`, row by row."""
    rows: list[list[str]] = []
    is_inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if not line.startswith("|"):
            is_inside = False
        elif cells[0] == heading:
            is_inside = True
        elif is_inside and not set(line) <= set("|- "):
            rows.append(cells)
    assert rows, f"no table with a first column {heading!r}"
    return rows


def words(text: str) -> list[str]:
    """Give what stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def first_words(text: str, heading: str) -> list[str]:
    """Give the words in backticks in the first column of a table; none may stand there twice."""
    found = [word for row in table(text, heading) for word in words(row[0])]
    twice = sorted({word for word in found if found.count(word) > 1})
    assert not twice, f"documented twice: {twice}"
    return found


def by_word(text: str, heading: str) -> dict[str, list[str]]:
    """Give a table's rows by each word in backticks in the first column."""
    first_words(text, heading)
    return {word: row for row in table(text, heading) for word in words(row[0])}


def code_lines(text: str) -> Iterator[str]:
    """Give the lines of code blocks, fenced or indented, without a prompt or a comment at the end."""
    is_fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            yield re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ "))


def code_blocks(text: str, language: str) -> str:
    """Give what stands in the fenced blocks of a language."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def declared_metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Give our metrics under the names that are scraped, each with its type and labels."""
    suffixes = {"counter": "_total", "info": "_info"}
    registered: list[Any] = list(Metrics().registry._collector_to_names)
    ours = [metric for metric in registered if getattr(metric, "_name", "").startswith("streammerge_")]
    return {m._name + suffixes.get(m._type, ""): (m._type, m._labelnames) for m in ours}


def commands() -> dict[str, Any]:
    """Give every command that does something by its full name."""

    def below(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", {})
        if name != "streammerge" and (not inner or command.invoke_without_command):
            yield name, command
        for word, sub in inner.items():
            yield from below(sub, f"{name} {word}")

    return dict(below(root_command(), "streammerge"))


def root_command() -> Any:
    """Give the command line as click sees it."""
    return typer.main.get_command(app)


def sections(kind: str) -> list[type[BaseModel]]:
    """Give every section that can stand in one of the configuration's lists, such as `sources`."""
    return configfile._sections_of(configuration.Config.model_fields[kind].annotation)


def types(section: type[BaseModel]) -> tuple[str, ...]:
    """Give the values of `type` that mean this section."""
    return tuple(map(str, configfile._types_of(section)))
