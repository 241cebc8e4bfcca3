"""Was everything durable before it was built upon? Reads the account of every call that changed a store.

Plays the calls of faults.disk back and remembers what a power cut could still take: bytes that were written
and not fsynced, names that a folder got and that were not fsynced with it. The rules are those of
docs/store-format.md; they are checked at each step's effect: a name that counts, a row of the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
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
LEDGER, LOG = "ledger.db", "ledger.db-wal"
NEVER_COUNT = ("lock", "ledger.db-shm", "prepared", LOG, "ledger.db-journal")  # names that may be lost


@dataclass
class Store:
    """What of one store is not durable yet.

    root     the store's folder
    is_faulted  whether calls failed: what was given up then is owed no fsync before the ledger goes on
    bytes    files written since their last fsync
    names    entries made since their folder's last fsync
    owed     folders whose fsync must come before anything is built on the name they got
    """

    root: Path
    is_faulted: bool = False
    bytes: set[Path] = field(default_factory=set)
    names: set[Path] = field(default_factory=set)
    owed: dict[Path, str] = field(default_factory=dict)

    def play(self, call: Call) -> Iterator[str]:
        """Take one call into account; gives what was not durable and had to be."""
        name = call.name.removesuffix("64")
        if call.error:
            return
        if name in WRITING:
            if call.path.name == LOG and not self.is_faulted:
                yield from self.owing(f"a row was written to the ledger ({call.number})")
            self.bytes.add(call.path)
        elif name in SYNCING:
            self.bytes.discard(call.path)
            self.names = {path for path in self.names if path.parent != call.path}
            self.owed.pop(call.path, None)
        elif name in ("open", "openat", "mkdir", "mkdirat", "symlink", "symlinkat"):
            self.names.add(call.path)
        elif name in ("unlink", "unlinkat", "rmdir"):
            if call.path.name == LOG and self.root / LEDGER in self.bytes:
                yield f"{LOG} went before {LEDGER} was fsynced ({call.number})"
            self.forget(call.path)
        elif call.other == self.root:  # the store itself, made under another name
            self.names.add(self.root)
        elif name in ("rename", "renameat", "renameat2"):
            yield from self.rename(call)

    def rename(self, call: Call) -> Iterator[str]:
        """A name appears: if it counts, what is below must be durable, and the name itself must be soon."""
        old, new = call.path, call.other
        what = f"{old.relative_to(self.root)} became {new.relative_to(self.root)} ({call.number})"
        if self.counts(new):
            yield from self.owing(what)
            for path in sorted(self.bytes):
                if path == old or path.is_relative_to(old) or path.name == LOG:
                    yield f"{path.relative_to(self.root)} was not fsynced when {what}"
            for path in sorted(self.names):
                if path.is_relative_to(old) and path != old:
                    yield f"the name {path.relative_to(self.root)} was not fsynced when {what}"
        self.forget(new)
        self.bytes = {_moved(path, old, new) for path in self.bytes}
        self.names = {_moved(path, old, new) for path in self.names} | {new}
        if self.counts(new):
            self.owed |= {old.parent: what, new.parent: what}

    def owing(self, what: str) -> Iterator[str]:
        """Name the folders that should have been fsynced before `what`."""
        for folder, why in self.owed.items():
            yield f"{folder} was not fsynced after {why} and before {what}"

    def forget(self, gone: Path) -> None:
        """What lay there is gone."""
        self.bytes = {path for path in self.bytes if not path.is_relative_to(gone)}
        self.names = {path for path in self.names if not path.is_relative_to(gone)}

    def counts(self, path: Path) -> bool:
        """Whether a name is one of those that mean something: not hidden, not partial."""
        parts = path.relative_to(self.root).parts
        return not any(p.startswith(".") or p.endswith(".part") or p in NEVER_COUNT for p in parts)

    def end(self) -> Iterator[str]:
        """Name what is still owed when all is done."""
        yield from self.owing("the end")
        for path in sorted(self.bytes):
            is_in_log = self.is_faulted and path.name == LEDGER  # until the log goes, which is looked at
            if (self.counts(path) and not is_in_log) or path.name == LOG:
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
