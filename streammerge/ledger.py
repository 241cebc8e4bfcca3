"""The ledger: the durable account of what happened, in SQLite (WAL, synchronous=FULL).

Knows rows; nothing of folders, models or what a state means for the next step. Every change is one
transaction. The manifests are the truth of what is folded; this is the account of how it came about.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge import machine
from streammerge.errors import ConfigError, Damaged, DiskFails, NoSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

FINE_TUNE_STATES = (
    "waiting", "pending", "awaiting_approval", "folded", "refused", "quarantined", "denied", "retracted",
    "replaced", "superseded", "ignored", "gone",
)  # fmt: skip
SNAPSHOT_STATES = ("candidate", "accepted", "refused", "rolled_back", "collected")
BUSY_SECONDS = 30.0
CACHE_KIB = 256  # of pages that SQLite keeps to itself; it would take 2,000, and the system keeps them too

Row = dict[str, Any]
T = TypeVar("T")


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

M003_FIGURES = """
create table figures (
    digest text primary key, found text not null, sample blob not null, at real not null
) strict;
alter table fine_tunes add column overruled text not null default '';
"""

# What every arrival asks must not read the rows of all arrivals before it.
M004_INDEXES = """
drop index fine_tunes_by_state;
create index fine_tunes_by_state on fine_tunes (state, version);
create index snapshots_by_state on snapshots (state);
create index outbox_by_target on outbox (target, state, id);
create index outbox_pending on outbox (id) where state = 'pending';
"""

# What each gate found of a version, see gates.Bench.keep; when a target confirmed a version, how often in a
# row it answered wrong, and what it served when it was asked last.
M005_SERVED = """
alter table snapshots add column measured text not null default '{}';
alter table outbox add column confirmed_at real;
alter table outbox add column wrong integer not null default 0;
update outbox set confirmed_at = done_at where state = 'done';
create index outbox_confirmed on outbox (version, target) where confirmed_at is not null;
create table served (
    target text primary key, snapshot text not null, asked_at real not null, error text not null default ''
) strict, without rowid;
"""

MIGRATIONS = (M001_FIRST, M002_MARKS, M003_FIGURES, M004_INDEXES, M005_SERVED)


def now() -> float:
    """Seconds since 1970, UTC."""
    return datetime.now(UTC).timestamp()


def iso(seconds: float | None) -> str | None:
    """Write a time for people and JSON: 2026-01-31T12:00:00Z."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


FAILING = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


@contextmanager
def _in_our_words(path: Path) -> Iterator[None]:
    """Turn SQLite's words for a full disk, a failing one and a damaged file into ours."""
    try:
        yield
    except sqlite3.DatabaseError as exc:
        # What Python itself raises has no code; what is above the lowest byte says in which call it was.
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise NoSpace(
                f"the ledger {path} cannot be written: no space left ({machine.device(path)})",
                hint="free some disk space; streammerge goes on by itself when there is room",
            ) from exc
        if code in FAILING:
            with suppress(OSError):  # SQLite does not tell why: the disk may
                machine.probe(path.parent, f"reading or writing the ledger {path.name}")
            raise DiskFails(
                f"the ledger {path} cannot be read or written: {exc} ({machine.device(path)})",
                hint="look at the kernel's log, at the disk, and whose the file is; "
                "streammerge goes on by itself when the disk works",
            ) from exc
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise Damaged(f"the ledger {path} is damaged: {exc}", hint=RESTORE) from exc
        raise


RESTORE = "restore ledger.db and snapshots/ together, from one backup of the store"


class Ledger:
    """One open database; its methods may be called from any thread."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the ledger; the writer creates it and brings its tables up to date."""
        self._lock = threading.RLock()
        self._path, self._depth, self._is_quiet = path, 0, False
        self._left: list[Callable[[], None]] = []
        try:
            with _in_our_words(path):
                self._open(read_only=read_only)
        except sqlite3.DatabaseError as exc:
            raise Damaged(
                f"{path} cannot be read: {exc}", hint="restore it from a backup of the store"
            ) from exc

    def _open(self, *, read_only: bool) -> None:
        if read_only:
            self._connect_for_reading()
            if self._version() == 0:
                raise ConfigError(
                    f"the store at {self._path.parent} is still being made", hint="try again in a moment"
                )
        else:
            self._connect(str(self._path))
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = full")
            self._db.execute("pragma foreign_keys = on")
            self._migrate()
        self._db.execute("select count(*) from facts").fetchone()

    def _connect(self, address: str) -> None:
        is_uri = address.startswith("file:")
        self._db = sqlite3.connect(address, uri=is_uri, timeout=BUSY_SECONDS, check_same_thread=False)
        self._db.isolation_level = None
        self._db.execute(f"pragma cache_size = -{CACHE_KIB}")
        self._db.row_factory = sqlite3.Row

    def _connect_for_reading(self) -> None:
        """A database that was closed cleanly has no -wal file; SQLite would make one without `immutable`.

        One that lacks tables of this release, older or killed while it was made, is read from a copy in
        memory that has them.
        """
        self._is_quiet = not self._wal.exists()
        quiet = "&immutable=1" if self._is_quiet else ""
        self._connect(f"{self._path.absolute().as_uri()}?mode=ro{quiet}")
        if 0 < self._version() < len(MIGRATIONS):
            with closing(self._db) as older:
                self._connect(":memory:")
                older.backup(self._db)
            self._migrate()

    @property
    def _wal(self) -> Path:
        return self._path.with_name(f"{self._path.name}-wal")

    def _migrate(self) -> None:
        for number, migration in enumerate(MIGRATIONS[self._version() :], self._version() + 1):
            self._db.executescript(f"begin immediate; {migration} pragma user_version = {number}; commit;")

    def _version(self) -> int:
        return int(self._db.execute("pragma user_version").fetchone()[0])

    def make_durable(self) -> None:
        """Have durably in the file itself what an earlier process left in the log.

        One whose fsync of the log failed gave that transaction up, but the next process finds it whole and
        takes it for ended. After a failure a second fsync of the same pages proves nothing, so they are
        copied, which a checkpoint does.
        """
        with self._lock, _in_our_words(self._path):
            self._db.execute("pragma wal_checkpoint(passive)").fetchall()

    def close(self) -> None:
        """Close the database; the last writer's leaves no -wal file behind."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes inside become durable together, or none does. May be nested.

        A full disk is NoSpace, a failing one DiskFails. What was left for `afterwards` is done then.
        """
        with self._lock, _in_our_words(self._path):
            if self._depth:
                yield
                return
            if self._db.in_transaction:  # one whose rollback failed too
                self._db.execute("rollback")
            self._db.execute("begin immediate")
            self._depth = 1
            try:
                yield
                self._db.execute("commit")
                left = [*self._left]
            except BaseException:
                if self._db.in_transaction:  # SQLite may have rolled back by itself
                    self._db.execute("rollback")
                raise
            finally:
                self._depth = 0
                self._left.clear()
        for work in left:
            work()

    def afterwards(self, work: Callable[[], None]) -> None:
        """Do something once all that was written is durable: after this transaction, else at once."""
        with self._lock:  # no other thread is in a transaction now
            if self._depth:
                self._left.append(work)
                return
        work()

    def rows(self, query: str, *values: object) -> list[Row]:
        """Read rows as dicts."""
        return self._read(lambda found: [dict(row) for row in found], query, values)

    def tuples(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Read rows of which there may be many, in half the memory."""
        return self._read(lambda found: [tuple(row) for row in found], query, values)

    def row(self, query: str, *values: object) -> Row | None:
        """Read the first row, if any, and no other."""
        found = self._read(sqlite3.Cursor.fetchone, query, values)
        return dict(found) if found else None

    def _read(self, take: Callable[[sqlite3.Cursor], T], query: str, values: tuple[object, ...]) -> T:
        with self._lock, _in_our_words(self._path):
            try:
                return self._taken(take, query, values)
            except sqlite3.DatabaseError:
                if not self._is_quiet or not self._wal.exists():
                    raise
                self._db.close()  # a writer came after it was opened as one that nobody writes
                self._connect_for_reading()
                return self._taken(take, query, values)

    def _taken(self, take: Callable[[sqlite3.Cursor], T], query: str, values: tuple[object, ...]) -> T:
        with closing(self._db.execute(query, values)) as found:
            return take(found)

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """Inside, everything that is read is as of one moment, whatever others write."""
        with self._lock:
            self._db.execute("begin")
            try:
                yield
            finally:
                if self._db.in_transaction:
                    self._db.execute("rollback")

    def harm(self) -> list[str]:
        """Say what SQLite finds wrong with its own file; empty where it is sound."""
        found = [str(row["integrity_check"]) for row in self.rows("pragma integrity_check")]
        return [] if found == ["ok"] else found

    def copy_to(self, path: Path) -> None:
        """Write a copy as of one moment, whoever writes meanwhile, to a file that is not there yet."""
        with self._lock, _in_our_words(self._path), closing(sqlite3.connect(path)) as target:
            self._db.backup(target)

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
        if self.fine_tune(source, name, revision):
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

    def fine_tune(self, source: str, name: str, revision: str) -> Row | None:
        """Read the row of a fine-tune by what it was announced as."""
        return self.row(
            "select * from fine_tunes where (source, name, revision) = (?, ?, ?)", source, name, revision
        )

    def numbers(self, *states: str) -> set[str]:
        """Give the ids of fine-tunes in these states, as the inbox names their folders."""
        marks = ", ".join("?" for _ in states)
        query = f"select group_concat(id, ' ') as ids from fine_tunes where state in ({marks})"  # noqa: S608 -- only question marks are put in
        found = self.row(query, *states)
        return set(str(found["ids"] or "").split()) if found else set()

    def states(self, numbers: Iterable[str]) -> dict[str, str]:
        """Give the states of some fine-tunes by their ids, as the inbox names their folders."""
        query = "select id, state from fine_tunes where id in (select value from json_each(?))"
        wanted = json.dumps([int(number) for number in numbers if number.isdecimal()])
        return {str(number): state for number, state in self.tuples(query, wanted)}

    # What the screens saw

    def keep_figures(self, digest: str, found: dict[str, dict[str, Any]], sample: bytes) -> None:
        """Write down the figures of a fine-tune's content, in the place of earlier ones."""
        self.write(
            "insert or replace into figures values (?, ?, ?, ?)", digest, json.dumps(found), sample, now()
        )

    def figures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Give all figures by the digest of the content."""
        return {
            row["digest"]: json.loads(row["found"]) for row in self.rows("select digest, found from figures")
        }

    def figures_of(self, digest: str) -> dict[str, dict[str, Any]]:
        """Give one fine-tune's figures; {} where it was never read to its end."""
        row = self.row("select found from figures where digest = ?", digest)
        return dict(json.loads(row["found"])) if row else {}

    def values_of(self, digest: str) -> dict[str, float | None]:
        """Give the bare numbers, for the log."""
        return {name: part["value"] for name, part in self.figures_of(digest).items()}

    def samples(self, digests: Iterable[str]) -> list[tuple[str, bytes]]:
        """Give the samples of these fine-tunes with their digests, in this order; of those that have one."""
        query = "select digest, sample from json_each(?) as asked cross join figures on digest = asked.value"
        return self.tuples(query, json.dumps([*digests]))

    # Snapshots

    def update_snapshot(self, version: int, **columns: object) -> None:
        """Change some columns of a snapshot's row."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self.write(f"update snapshots set {assignments} where version = ?", *columns.values(), version)  # noqa: S608 -- the column names are our own

    def snapshot(self, version: int) -> Row | None:
        """Read one snapshot's row."""
        return self.row("select * from snapshots where version = ?", version)

    def decided(self, versions: Iterable[int]) -> set[int]:
        """Give those of these snapshots that have a row and are candidates no more."""
        query = (
            "select version from snapshots where state != 'candidate' "
            "and version in (select value from json_each(?))"
        )
        return {version for (version,) in self.tuples(query, json.dumps([*versions]))}

    def counts(self, versions: Iterable[int], *, most: int) -> list[tuple[int, int]]:
        """Give those of these snapshots that hold `most` fine-tunes or fewer, and how many; most first."""
        query = (
            "select version, count from snapshots where count <= ? "
            "and version in (select value from json_each(?)) order by count desc, version"
        )
        return [(version, count) for version, count in self.tuples(query, most, json.dumps([*versions]))]

    def measured(self, version: int) -> dict[str, Any]:
        """Give what gates found of a version, by the gate's name."""
        row = self.row("select measured from snapshots where version = ?", version)
        return dict(json.loads(row["measured"])) if row else {}

    def keep_measured(self, version: int, gate: str, found: dict[str, Any]) -> None:
        """Write down what one gate found of a version, in the place of what it found before."""
        with self.transaction():
            self.update_snapshot(version, measured=json.dumps({**self.measured(version), gate: found}))

    def last_promotion(self) -> Row | None:
        """Read the newest intent to switch `current`."""
        return self.row("select * from promotions order by id desc limit 1")

    # Targets

    def open_telling(self, promotion: int, target: str, version: int) -> None:
        """Have a target told of a promotion, or told of it again."""
        self.write(
            "insert into outbox (promotion, target, version) values (?, ?, ?) "
            "on conflict (promotion, target) do update "
            "set state = 'pending', attempts = 0, wrong = 0, next_try_at = 0, error = ''",
            promotion, target, version,
        )  # fmt: skip

    def close_telling(self, number: int, state: str, why: str) -> None:
        """Write down how a telling ended: done, skipped or dropped."""
        query = "update outbox set state = ?, error = ?, done_at = ? where id = ?"
        self.write(query, state, why, now(), number)

    def telling(self, promotion: int, target: str) -> Row | None:
        """Read how far a target is with one promotion."""
        return self.row("select * from outbox where (promotion, target) = (?, ?)", promotion, target)

    def last_told(self, target: str) -> Row | None:
        """Read what a target confirmed last."""
        query = "select * from outbox where (state, target) = ('done', ?) order by id desc limit 1"
        return self.row(query, target)

    def confirmations(self, version: int) -> list[Row]:
        """List the targets that confirmed a version, with the last time that each did."""
        return self.rows(
            "select target, max(confirmed_at) as at from outbox "
            "where version = ? and confirmed_at is not null group by target order by at",
            version,
        )

    def saw_served(self, target: str, snapshot: str, error: str = "") -> None:
        """Write down what a target serves, by the name of the version's folder, or why it is not known."""
        self.write("insert or replace into served values (?, ?, ?, ?)", target, snapshot, now(), error)

    def served(self, target: str) -> Row | None:
        """Read what a target served when it was asked last."""
        return self.row("select * from served where target = ?", target)

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
        """Record a command's result; one that was answered stays answered, whatever fails afterwards."""
        self.write(
            "update commands set state = ?, result = ?, finished_at = ? where id = ? and state = 'pending'",
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
