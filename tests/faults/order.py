"""Was everything durable before it was built upon? Reads the account of every call that changed a store.

Plays the calls of faults.disk back and remembers what a power cut could still take: bytes that were written
and not fsynced, names that a folder got and that were not fsynced with it. The rules are DESIGN.md's; they
are checked at each step's effect: a name that counts and comes or goes, a row of the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from faults.disk import Call

WRITING = (
    "write",
    "pwrite",
    "writev",
    "sendfile",
    "copy_file_range",
    "ftruncate",
    "truncate",
    "posix_fallocate",
)
SYNCING = ("fsync", "fdatasync")
MAKING = ("open", "openat", "mkdir", "mkdirat", "symlink", "symlinkat")
REMOVING = ("unlink", "unlinkat", "rmdir")
RENAMING = ("rename", "renameat", "renameat2")
GIVEN_UP, READ_AGAIN = "given up", "read again"
LEDGER, LOG = "ledger.db", "ledger.db-wal"
NEVER_COUNT = ("lock", "ledger.db-shm", "prepared", "ledger.db-journal")  # names that may be lost


@dataclass
class Store:
    """What of one store is not durable yet.

    root     the store's folder
    is_faulted  whether calls failed: what was given up then is owed no fsync before the ledger goes on
    bytes    files written since their last fsync
    names    entries made since their folder's last fsync
    owed     (folder, name): its fsync must come before anything is built on the name that it got or lost;
             forgotten when the name goes, or is made again, which owes the same anew
    tail     what the log ends in after a transaction that failed: it is GIVEN_UP, SQLite writes the next one
             over it and owes it nothing; but whoever opens the log next has it READ_AGAIN, may find it whole
             and take it for ended
    """

    root: Path
    is_faulted: bool = False
    bytes: set[Path] = field(default_factory=set)
    names: set[Path] = field(default_factory=set)
    owed: dict[tuple[Path, Path], str] = field(default_factory=dict)
    tail: str = ""

    def play(self, call: Call) -> Iterator[str]:
        """Take one call into account; gives what was not durable and had to be."""
        name = call.name.removesuffix("64")
        if call.error:
            self.fail(call.path)
        elif name in WRITING:
            if call.path.name == LOG and not self.is_faulted:
                yield from self.owing(f"a row was written to the ledger ({call.number})")
            self.bytes.add(call.path)
        elif name in SYNCING:
            self.sync(call.path)
        elif name in MAKING:
            self.make(call.path, was_there=call.other == call.path)
        elif name in REMOVING:
            if call.path.name == LOG and self.root / LEDGER in self.bytes:
                yield f"{LOG} went before {LEDGER} was fsynced ({call.number})"
            self.forget(call.path)
        elif call.other == self.root:  # the store itself, made under another name
            self.names.add(self.root)
        elif name in RENAMING:
            yield from self.rename(call)

    def fail(self, path: Path) -> None:
        """A call failed; on the log that ends a transaction."""
        if path.name == LOG and path in self.bytes:
            self.tail = self.tail or GIVEN_UP
            self.bytes.discard(path)

    def sync(self, path: Path) -> None:
        """A file's bytes, or a folder's names, are durable."""
        self.tail = "" if path.name == LOG else self.tail
        self.bytes.discard(path)
        self.names = {name for name in self.names if name.parent != path}
        self.owed = {owed: why for owed, why in self.owed.items() if owed[0] != path}

    def make(self, path: Path, *, was_there: bool) -> None:
        """A name was made, or opened where it might have been."""
        if not was_there:
            self.names.add(path)
        elif path.name == LOG and self.tail:
            self.tail = READ_AGAIN

    def rename(self, call: Call) -> Iterator[str]:
        """A name appears: if it counts, what is below must be durable, and the name itself must be soon.

        One goes: if it counted, the rows that say so must be durable.
        """
        old, new = call.path, call.other
        what = f"{old.relative_to(self.root)} became {new.relative_to(self.root)} ({call.number})"
        self.forget(new)
        self.names.discard(old)  # it is the new name that must be durable
        if self.counts(new):
            yield from self.owing(what)
            yield from self.unsynced(what, lambda path: path.is_relative_to(old))
        if self.counts(new) or self.counts(old):
            yield from self.unsynced(what, lambda path: path.name == LOG)
            if self.tail == READ_AGAIN:
                yield f"{LOG} ended in what was given up and not fsynced when {what}"
        self.forget_debts(old)
        self.bytes = {_moved(path, old, new) for path in self.bytes}
        self.names = {_moved(path, old, new) for path in self.names} | {new}
        if self.counts(new):
            self.owed |= {(old.parent, new): what, (new.parent, new): what}

    def unsynced(self, what: str, is_needed: Callable[[Path], bool]) -> Iterator[str]:
        """Name the files and names that should have been fsynced before `what`."""
        for path in sorted(filter(is_needed, self.bytes)):
            yield f"{path.relative_to(self.root)} was not fsynced when {what}"
        for path in sorted(filter(is_needed, self.names)):
            yield f"the name {path.relative_to(self.root)} was not fsynced when {what}"

    def owing(self, what: str) -> Iterator[str]:
        """Name the folders that should have been fsynced before `what`."""
        for (folder, _), why in self.owed.items():
            yield f"{folder} was not fsynced after {why} and before {what}"

    def forget(self, gone: Path) -> None:
        """What lay there is gone."""
        self.bytes = {path for path in self.bytes if not path.is_relative_to(gone)}
        self.names = {path for path in self.names if not path.is_relative_to(gone)}
        self.tail = "" if gone.name == LOG else self.tail
        self.forget_debts(gone)

    def forget_debts(self, gone: Path) -> None:
        """Nothing can be built on a name that is not there."""
        self.owed = {owed: why for owed, why in self.owed.items() if not owed[1].is_relative_to(gone)}

    def counts(self, path: Path) -> bool:
        """Whether a name is one of those that mean something: not hidden, not partial."""
        parts = path.relative_to(self.root).parts
        return not any(p.startswith(".") or p.endswith(".part") or p in NEVER_COUNT for p in parts)

    def end(self) -> Iterator[str]:
        """Name what is still owed when all is done."""
        yield from self.owing("the end")
        for path in sorted(self.bytes):
            is_in_log = self.is_faulted and path.name == LEDGER  # until the log goes, which is looked at
            if self.counts(path) and not is_in_log:
                yield f"{path.relative_to(self.root)} was not fsynced at the end"
        for path in sorted(self.names):
            if path == self.root or self.counts(path):
                yield f"the name {path.name} in {path.parent} was not fsynced at the end"


def breaches(calls: Iterable[Call], root: Path, *, is_faulted: bool = False) -> list[str]:
    """Everything in the account of one store that a power cut could have turned into a loss."""
    store = Store(root, is_faulted)
    below = (
        call
        for call in calls
        if call.path.is_relative_to(root) or call.path == root.parent or call.other == root
    )
    found = [breach for call in below for breach in store.play(call)]
    return [*found, *store.end()]


def _moved(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path
