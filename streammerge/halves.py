"""A file of rows that models are measured on, in two halves: one to choose by, one to judge the choice by.

Which half a row is in follows from its own bytes and nothing else, so it stays there whatever comes to the
file, and two equal rows never lie on both sides. Knows nothing of what the rows mean but their `task`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import StreammergeError

if TYPE_CHECKING:
    from pathlib import Path

MOST_BYTES = 64 << 20
MOST_ROWS = 20_000  # what is printed for each must fit into a program's output
FEWEST_ROWS = 8  # of a half


class BadRows(StreammergeError):
    """A file that nothing can be chosen by."""


@dataclass(frozen=True)
class Half:
    """Some rows in the file's order, and the task of each, "" for none."""

    lines: tuple[bytes, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Halves:
    """Both halves, and the sha256 of the file."""

    digest: str
    choosing: Half
    judging: Half


def read(path: Path) -> Halves:
    """Read a file of JSON objects, one a line, and split it; raises BadRows."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as exc:
        raise BadRows(
            f"{path} cannot be read: {exc.strerror}", hint="check `tune.data` and its owner"
        ) from exc
    if len(content) > MOST_BYTES:
        raise BadRows(f"{path} has more than {MOST_BYTES >> 20} MiB", hint="give fewer rows")
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if len(lines) > MOST_ROWS:
        raise BadRows(f"{path} has {len(lines):,} rows, more than {MOST_ROWS:,}", hint="give fewer rows")
    halves = tuple(_half(path, [line for line in lines if side_of(line) == side]) for side in (0, 1))
    if any(len(half.lines) < FEWEST_ROWS for half in halves):
        raise BadRows(
            f"{path} has {len(lines)} rows, and {FEWEST_ROWS} are needed in either half",
            hint="give more rows; some hundred tell small differences",
        )
    return Halves(hashlib.sha256(content).hexdigest(), *halves)


def side_of(line: bytes) -> int:
    """Give the half of a row: 0 to choose by, 1 to judge by."""
    return hashlib.sha256(line).digest()[0] & 1


def _half(path: Path, lines: list[bytes]) -> Half:
    return Half(tuple(lines), tuple(_task(path, line) for line in lines))


def _task(path: Path, line: bytes) -> str:
    try:
        row = json.loads(line)
    except ValueError as exc:
        raise BadRows(f"{path}: {line[:60]!r} is no JSON", hint="one JSON object a line") from exc
    if not isinstance(row, dict):
        raise BadRows(f"{path}: {line[:60]!r} is no JSON object", hint="one JSON object a line")
    return str(row.get("task", ""))
