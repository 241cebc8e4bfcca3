"""The model card of a version: what is in it, in which order, by which method.

Names and revisions come from strangers: they stand in code spans, from which nothing can break out.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
BREAKS_OUT = re.compile(r"[`|\\]")
MAX_CHARACTERS = 200


def card(
    manifest: Mapping[str, Any],
    *,
    base_model: str | None,
    library: str = "",
    hubs: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Write the card of a version from its manifest, line by line: it lists every fine-tune.

    base_model  what the merge descends from; left out where None
    library     what loads it, where that is known
    hubs        name of a source -> address of the Hub whose repositories its fine-tunes are
    """
    front = {
        "base_model": base_model and _plain(base_model),
        "base_model_relation": "merge" if base_model else None,
        "library_name": library,
        "tags": ["merge", "streammerge"],
    }
    head = [
        "---",
        *(yaml.safe_dump({key: value}, width=math.inf).rstrip() for key, value in front.items() if value),
        "---", "",
        f"# Version {manifest['version']}", "",
        "A merge made by streammerge. The fine-tunes stand in the order in which they were folded.", "",
        f"- method: {_code(manifest['method'])}",
        f"- knobs: {_settings(manifest['knobs'])}",
        f"- finalize: {_settings(manifest['finalize'])}", "",
        "| # | fine-tune | source | revision | content |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    yield from (f"{line}\n" for line in head)
    sources: dict[str, str] = {}  # a few, of thousands of fine-tunes
    for number, (source, name, revision, digest, _) in enumerate(manifest["fine_tunes"], 1):
        hub = (hubs or {}).get(source)
        shown = _code(name)
        if hub and REPOSITORY.fullmatch(name) and REVISION.fullmatch(revision):
            shown = f"[{shown}]({hub}/{name}/tree/{revision})"
        whose = sources.get(source) or sources.setdefault(source, _code(source))
        yield f"| {number} | {shown} | {whose} | {_code(revision)} | {_code(digest[:12])} |\n"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(_code(f"{key}: {value}") for key, value in values.items()) or "none"


def _code(text: object) -> str:
    """Put a stranger's words into a code span of a table."""
    return f"`{_plain(text)}`"


def _plain(text: object) -> str:
    """Give one line of text in which what could end a line, a code span or a cell is a question mark."""
    line = str(text)[:MAX_CHARACTERS]
    if not line.isprintable() or BREAKS_OUT.search(line):
        line = "".join(c if c.isprintable() and c not in "`|\\" else "?" for c in line)
    return line if line.strip() else "?"
