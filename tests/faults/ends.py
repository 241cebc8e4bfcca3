"""What a store was left as: everything that must not depend on how often a process was killed on the way."""

from __future__ import annotations

import hashlib
import itertools
import re
import stat
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemons import Facts, Site

VARYING = re.compile(r"_at$|^at$|^attempts$|^wrong$|^fingerprint$")


@dataclass(frozen=True)
class Ended:
    """What a run leaves behind that must not depend on how often it was killed.

    files      path in the store -> mode and sha256
    served     where `current` leads
    ledger     every row of every table, times and attempts aside
    told       what each target was told, in its own words; told again at once counts once
    """

    files: dict[str, str]
    served: str
    ledger: dict[str, list[Facts]]
    told: dict[str, list[str]]

    def differences(self, other: Ended) -> list[str]:
        """Say in what another end differs, first things first."""
        pairs: list[tuple[str, object, object]] = [("current", self.served, other.served)]
        pairs += [(name, self.told.get(name), lines) for name, lines in other.told.items()]
        names = sorted(self.files.keys() | other.files.keys())
        pairs += [(name, self.files.get(name), other.files.get(name)) for name in names]
        for table, rows in self.ledger.items():
            pairs += [(table, *both) for both in itertools.zip_longest(rows, other.ledger[table])]
        return [f"{what} is {theirs}, and was {ours}" for what, ours, theirs in pairs if ours != theirs]


def ended(site: Site) -> Ended:
    """Read a site's end state."""
    told = {path.name: path.read_text().splitlines() for path in sorted(site.root.glob("told-*.txt"))}
    return Ended(
        files=dict(contents(site.store)),
        served=str((site.store / "current").readlink()),
        ledger=account(site),
        told={name: [line for line, _ in itertools.groupby(lines)] for name, lines in told.items()},
    )


def contents(store: Path) -> Iterator[tuple[str, str]]:
    """Give every folder and file that is the store's own with its mode, and a file's sha256."""
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        if name.startswith(("prepared", "ledger.db", "lock")) or path.is_symlink():
            continue  # derived and may be absent; compared by its rows; whoever had it last
        content = path.read_bytes() if path.is_file() else b""
        if name == "store.json":  # it says where the base lay when the store was made
            content = re.sub(rb'"origin": ".*"', b"", content)
        digest = hashlib.sha256(content).hexdigest() if content else ""
        yield name, f"{stat.S_IMODE(path.stat().st_mode):o} {digest}"


def account(site: Site) -> dict[str, list[Facts]]:
    """Read every row of the ledger, without what no two runs have in common."""
    with closing(Ledger(site.store / "ledger.db", read_only=True)) as ledger:
        tables = [row["name"] for row in ledger.rows("select name from sqlite_master where type = 'table'")]
        return {
            table: [comparable(table, row) for row in ledger.rows(f"select * from {table} order by 1")]
            for table in sorted(tables)
        }


def comparable(table: str, row: Facts) -> Facts:
    """Leave out times, inodes, and which process of several removed what."""
    kept = {key: value for key, value in row.items() if not VARYING.search(key)}
    if table == "facts":
        kept["value"] = "" if row["name"] == "base" else re.sub(r'"since": [\d.]+', "", row["value"])
    if table == "commands" and row["verb"] == "gc":
        del kept["result"]
    return kept
