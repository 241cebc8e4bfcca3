"""The ledger: the durable account of what happened, in SQLite (WAL, synchronous=FULL).

Knows rows; nothing of folders, models or what a state means for the next step. Every change is one
transaction. The manifests are the truth of what is folded; this is the account of how it came about.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from streammerge.errors import ConfigError, Damaged, NoSpace

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FINE_TUNE_STATES = (
    "waiting", "pending", "awaiting_approval", "folded", "refused", "quarantined", "denied", "retracted",
    "replaced", "superseded", "ignored", "gone",
)  # fmt: skip
SNAPSHOT_STATES = ("candidate", "accepted", "refused", "rolled_back", "collected")
BUSY_SECONDS = 30.0

Row = dict[str, Any]


# One string a migration; each runs in a transaction together with the number that records it.
M001_FIRST = """
create table fine_tunes (
    id integer primary key,
    source text not null, name text not null, revision text not null,
    state text not null, reason text not null default '', detail text not null default '',
    digest text not null default '', version integer, factor real not null default 1.0,
    published_at real not null, first_seen_at real not null, updated_at real not null,
    approved integer not null default 0, attempts integer not null default 0,
    next_try_at real not null default 0,
    step text not null default 'announced',
    unique (source, name, revision)
) strict;
create index fine_tunes_by_state on fine_tunes (state);
create table snapshots (
    version integer primary key, digest text not null, parent text,
    state text not null, count integer not null, added text not null, removed text not null,
    sealed_at real not null, accepted_at real, promoted_at real, note text not null default ''
) strict;
create table promotions (
    id integer primary key, version integer not null, digest text not null, cause text not null,
    intended_at real not null, switched_at real
) strict;
create table outbox (
    id integer primary key, promotion integer not null references promotions (id),
    target text not null, version integer not null,
    state text not null default 'pending', attempts integer not null default 0,
    next_try_at real not null default 0, error text not null default '', done_at real,
    unique (promotion, target)
) strict;
create table denied (digest text primary key, at real not null, why text not null) strict;
create table commands (
    id integer primary key, verb text not null, arguments text not null, asked_at real not null,
    state text not null default 'pending', result text not null default '', finished_at real
) strict;
create table sightings (
    source text not null, name text not null, fingerprint text not null, revision text not null,
    first_seen_at real not null, primary key (source, name)
) strict, without rowid;
create table sources (name text primary key, state text not null, error text not null default '',
    last_success_at real, primed integer not null default 0) strict;
create table facts (name text primary key, value text not null) strict;
"""


M002_MARKS = """
alter table sources add column mark text not null default '';
"""

# What every arrival asks must not read the rows of all arrivals before it.
M003_INDEXES = """
drop index fine_tunes_by_state;
create index fine_tunes_by_state on fine_tunes (state, version);
create index snapshots_by_state on snapshots (state);
create index outbox_by_target on outbox (target, state, id);
create index outbox_pending on outbox (id) where state = 'pending';
"""

MIGRATIONS = (M001_FIRST, M002_MARKS, M003_INDEXES)


def now() -> float:
    """Seconds since 1970, UTC."""
    return datetime.now(UTC).timestamp()


def iso(seconds: float | None) -> str | None:
    """Write a time for people and JSON: 2026-01-31T12:00:00Z."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@contextmanager
def _full_disk_is_no_space() -> Iterator[None]:
    """Turn SQLite's word for a full disk into ours."""
    try:
        yield
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise NoSpace(
            "the ledger cannot be written: no space left on its disk",
            hint="free some disk space; streammerge goes on by itself when there is room",
        ) from exc


class Ledger:
    """One open database; its methods may be called from any thread."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the ledger; the writer creates it and brings its tables up to date."""
        self._lock = threading.RLock()
        self._depth = 0
        try:
            if read_only:
                # A database that was closed cleanly has no -wal file; SQLite would create one without
                # `immutable`.
                quiet = "" if path.with_name(path.name + "-wal").exists() else "&immutable=1"
                self._db = sqlite3.connect(
                    f"{path.absolute().as_uri()}?mode=ro{quiet}",
                    uri=True,
                    timeout=BUSY_SECONDS,
                    check_same_thread=False,
                )
            else:
                self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
            self._db.isolation_level = None
            self._db.row_factory = sqlite3.Row
            if not read_only:
                self._db.execute("pragma journal_mode = wal")
                self._db.execute("pragma synchronous = full")
                self._db.execute("pragma foreign_keys = on")
                self._migrate()
            elif self._version() == 0:
                raise ConfigError(
                    f"the store at {path.parent} is still being made", hint="try again in a moment"
                )
            self._db.execute("select count(*) from facts").fetchone()
        except sqlite3.DatabaseError as exc:
            raise Damaged(
                f"{path} cannot be read: {exc}", hint="restore it from a backup of the store"
            ) from exc

    def _migrate(self) -> None:
        for number, migration in enumerate(MIGRATIONS[self._version() :], self._version() + 1):
            self._db.executescript(f"begin immediate; {migration} pragma user_version = {number}; commit;")

    def _version(self) -> int:
        return int(self._db.execute("pragma user_version").fetchone()[0])

    def close(self) -> None:
        """Close the database; the last writer's leaves no -wal file behind."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside become durable together, or none does. May be nested. A full disk is NoSpace."""
        with self._lock, _full_disk_is_no_space():
            if self._depth:
                yield
                return
            self._db.execute("begin immediate")
            self._depth = 1
            try:
                yield
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:  # SQLite may have rolled back by itself
                    self._db.execute("rollback")
                raise
            finally:
                self._depth = 0

    def rows(self, query: str, *values: object) -> list[Row]:
        """Read rows as dicts."""
        with self._lock:
            return [dict(row) for row in self._db.execute(query, values)]

    def tuples(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Read rows of which there may be many, in half the memory."""
        with self._lock:
            return [tuple(row) for row in self._db.execute(query, values)]

    def row(self, query: str, *values: object) -> Row | None:
        """Read the first row, if any, and no other."""
        with self._lock, closing(self._db.execute(query, values)) as found:
            row = found.fetchone()
        return dict(row) if row else None

    def write(self, query: str, *values: object) -> int:
        """Change something; gives the id of a new row."""
        with self.transaction():
            return self._db.execute(query, values).lastrowid or 0

    def insert(self, table: str, rows: Iterable[Row]) -> None:
        """Add whole rows as they are read from another ledger; those that are there stay."""
        for row in rows:
            names, marks = ", ".join(row), ", ".join("?" for _ in row)
            self.write(f"insert or ignore into {table} ({names}) values ({marks})", *row.values())  # noqa: S608 -- our own names

    def fact(self, name: str) -> Any:  # noqa: ANN401 -- whatever JSON was written
        """Read one named fact (head, hold, current); None where it was never set."""
        found = self.row("select value from facts where name = ?", name)
        return json.loads(found["value"]) if found else None

    def set_fact(self, name: str, value: object) -> None:
        """Write one named fact."""
        self.write("insert or replace into facts values (?, ?)", name, json.dumps(value))

    # Fine-tunes

    def announce(self, source: str, name: str, revision: str, **columns: object) -> int | None:
        """Add a fine-tune's revision; None if it stands here already."""
        if self.row(
            "select 1 from fine_tunes where (source, name, revision) = (?, ?, ?)", source, name, revision
        ):
            return None
        columns = {"published_at": now(), "first_seen_at": now(), **columns, "updated_at": now()}
        names = ", ".join(columns)
        marks = ", ".join("?" for _ in columns)
        return self.write(
            f"insert into fine_tunes (source, name, revision, {names}) values (?, ?, ?, {marks})",  # noqa: S608 -- the column names are our own
            source, name, revision, *columns.values(),
        )  # fmt: skip

    def update_fine_tune(self, number: int, **columns: object) -> None:
        """Change some columns of a fine-tune's row."""
        columns["updated_at"] = now()
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self.write(f"update fine_tunes set {assignments} where id = ?", *columns.values(), number)  # noqa: S608 -- the column names are our own

    def fine_tunes(self, *states: str) -> list[Row]:
        """List fine-tunes in folding order: published_at, then name; all of them without `states`."""
        marks = ", ".join("?" for _ in states)
        where = f"where state in ({marks})" if states else ""
        return self.rows(f"select * from fine_tunes {where} order by published_at, name, source, id", *states)  # noqa: S608 -- only question marks are put in

    def numbers(self, *states: str) -> set[str]:
        """Give the ids of fine-tunes in these states, as the inbox names their folders."""
        marks = ", ".join("?" for _ in states)
        found = self.rows(f"select id from fine_tunes where state in ({marks})", *states)  # noqa: S608 -- only question marks are put in
        return {str(row["id"]) for row in found}

    # Snapshots

    def update_snapshot(self, version: int, **columns: object) -> None:
        """Change some columns of a snapshot's row."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self.write(f"update snapshots set {assignments} where version = ?", *columns.values(), version)  # noqa: S608 -- the column names are our own

    def snapshot(self, version: int) -> Row | None:
        """Read one snapshot's row."""
        return self.row("select * from snapshots where version = ?", version)

    def last_promotion(self) -> Row | None:
        """Read the newest intent to switch `current`."""
        return self.row("select * from promotions order by id desc limit 1")

    def last_told(self, target: str) -> Row | None:
        """Read what a target confirmed last."""
        query = "select * from outbox where (state, target) = ('done', ?) order by id desc limit 1"
        return self.row(query, target)

    # Commands

    def ask(self, verb: str, arguments: dict[str, Any]) -> int:
        """Leave a command for whoever holds the lock."""
        return self.write(
            "insert into commands (verb, arguments, asked_at) values (?, ?, ?)",
            verb,
            json.dumps(arguments),
            now(),
        )

    def asked(self) -> list[Row]:
        """List commands not yet executed, oldest first."""
        return self.rows("select * from commands where state = 'pending' order by id")

    def answer(self, number: int, state: str, result: dict[str, Any]) -> None:
        """Record a command's result."""
        self.write(
            "update commands set state = ?, result = ?, finished_at = ? where id = ?",
            state,
            json.dumps(result),
            now(),
            number,
        )

    def denied(self) -> set[str]:
        """Digests that are never folded until a person approves them."""
        return {row["digest"] for row in self.rows("select digest from denied")}

    def deny(self, digests: Iterable[str], why: str) -> None:
        """Keep these digests out."""
        for digest in digests:
            self.write("insert or ignore into denied values (?, ?, ?)", digest, now(), why)

    def allow(self, digests: Iterable[str]) -> None:
        """Let these digests in again."""
        for digest in digests:
            self.write("delete from denied where digest = ?", digest)
