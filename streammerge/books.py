"""The ledger's account of a store laid beside its folders: what does not fit, in words.

Reads one moment of the ledger and what lies in the folders right after; whoever calls looks again, because a
daemon may be at work. Hashes nothing but manifests.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge import snapshots
from streammerge.errors import Damaged
from streammerge.snapshots import RESTORE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from streammerge.ledger import Ledger, Row
    from streammerge.snapshots import Snapshot, Store

FIXED = ("method", "knobs", "added", "routes")
LATER = "nothing is to be done: the next start does it"
ONE_MOMENT = "restore ledger.db and snapshots/ together, from one backup"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: what, what to do, and whether it is damage."""

    what: str
    hint: str
    is_damage: bool = True


class Books:
    """The ledger's account laid beside the folders."""

    def __init__(self, store: Store, ledger: Ledger, settings: Mapping[str, Any]) -> None:
        """Read all rows first, then the manifests: what was accepted in between is newer than the rows."""
        self.store, self.ledger, self.settings = store, ledger, settings
        self.rows = {row["version"]: row for row in ledger.rows("select * from snapshots order by version")}
        self.head = str(ledger.fact("head") or "")
        self.folders = {path.name: path for path in snapshots.folders(store.snapshots)}
        self.candidates = {path.name: path for path in snapshots.folders(store.candidates)}
        self.found: dict[str, Snapshot] = {}
        for path in self.folders.values():
            try:
                self.found[path.name] = snapshots.read(path)
            except Damaged:
                continue  # its contents were looked at before
        self.by_digest = {snapshot.digest: snapshot for snapshot in self.found.values()}

    def compare(self) -> Iterator[Finding]:
        """Everything that does not fit."""
        for snapshot in self.found.values():
            yield from self.version(snapshot)
        yield from self.gaps()
        for row in self.rows.values():
            yield from self.place(row)
        yield from self.folded()
        yield from self.promoted()
        yield from self.modes()

    def version(self, snapshot: Snapshot) -> Iterator[Finding]:
        """One version against its row, its parent and store.json."""
        row = self.rows.get(snapshot.version)
        if row is None or (row["state"] == "candidate" and row["digest"] == snapshot.digest):
            yield self.trailing(snapshot)
        elif row["digest"] != snapshot.digest:
            yield Finding(
                f"{snapshot.path} has digest {snapshot.digest[:12]}, {self.store.ledger} says "
                f"{row['digest'][:12]}", ONE_MOMENT,
            )  # fmt: skip
        else:
            yield from self.row_of(snapshot, row)
        yield from self.parent(snapshot)
        for key in FIXED if self.settings else ():
            if snapshot.manifest[key] != self.settings[key]:
                yield Finding(
                    f"{snapshot.path} was made with {key} {snapshot.manifest[key]!r}, {self.store.settings} "
                    f"says {self.settings[key]!r}", "restore store.json from a backup of this store",
                )  # fmt: skip
        base = self.settings["base"]["digest"] if self.settings else snapshot.manifest["base"]["digest"]
        if snapshot.manifest["base"]["digest"] != base:
            yield Finding(
                f"{snapshot.path} has base {snapshot.manifest['base']['digest'][:12]}, {self.store.settings} "
                f"says {base[:12]}", "restore store.json from a backup of this store",
            )  # fmt: skip

    def trailing(self, snapshot: Snapshot) -> Finding:
        """A version without a row: unfinished where it follows head and nothing follows it."""
        head = self.found.get(self.head)
        last = max(found.version for found in self.found.values())
        follows = snapshot.parent == (head.digest if head else None)
        if follows and snapshot.version == last:
            return Finding(f"{snapshot.path} is accepted and not yet recorded", LATER, is_damage=False)
        return Finding(f"{snapshot.path} has no row in {self.store.ledger}", ONE_MOMENT)

    def row_of(self, snapshot: Snapshot, row: Row) -> Iterator[Finding]:
        """The row of a version says what its manifest says."""
        if row["parent"] != snapshot.parent:
            yield self.disagreement(snapshot, "parent", str(row["parent"])[:12], str(snapshot.parent)[:12])
        if row["count"] != len(snapshot.fine_tunes):
            yield self.disagreement(snapshot, "count", row["count"], len(snapshot.fine_tunes))
        parent = self.by_digest.get(snapshot.parent or "")
        if parent is None:
            return
        changes = snapshot.fine_tunes.changes(parent.fine_tunes)
        for key, members in zip(("added", "removed"), changes, strict=True):
            names = [member.name for member in members]
            if json.loads(row[key]) != names:
                yield self.disagreement(snapshot, key, row[key], json.dumps(names))

    def disagreement(self, snapshot: Snapshot, key: str, ledger: object, manifest: object) -> Finding:
        """A row that says something else than the manifest."""
        return Finding(
            f"{self.store.ledger} says {key} {ledger} of version {snapshot.version}, its manifest says "
            f"{manifest}",
            ONE_MOMENT,
        )

    def parent(self, snapshot: Snapshot) -> Iterator[Finding]:
        """The chain of digests: each version names one that came before it; the first names none."""
        if snapshot.parent is None:
            if snapshot.version != 0:
                yield Finding(f"{snapshot.path} follows no version, and only version 0 does so", ONE_MOMENT)
            return
        parents = [row["version"] for row in self.rows.values() if row["digest"] == snapshot.parent]
        if not parents:
            yield Finding(
                f"{snapshot.path} follows {snapshot.parent[:12]}, which {self.store.ledger} does not know",
                ONE_MOMENT,
            )
        elif parents[0] >= snapshot.version:
            yield Finding(f"{snapshot.path} follows version {parents[0]}, which came later", ONE_MOMENT)

    def gaps(self) -> Iterator[Finding]:
        """Numbers are given without a gap: every one that is missing was in the ledger once."""
        there = {snapshot.version for snapshot in self.found.values()}  # those are named by their folder
        for version in sorted(set(range(max(self.rows, default=-1) + 1)) - set(self.rows) - there):
            yield Finding(f"{self.store.ledger} has no row for version {version}", ONE_MOMENT)

    def place(self, row: Row) -> Iterator[Finding]:
        """Each version lies where its state says."""
        name = snapshots.folder_name(row["version"], row["digest"])
        state, path = row["state"], self.store.snapshots / name
        is_accepted, is_candidate = name in self.folders, name in self.candidates
        if state in ("accepted", "rolled_back") and not is_accepted:
            role = ", the head," if name == self.head else ""
            yield Finding(f"{path}{role} is missing", RESTORE)
        elif state == "collected" and is_accepted:
            yield Finding(f"{path} is collected and not yet removed", LATER, is_damage=False)
        elif state == "refused" and is_accepted:
            yield Finding(f"{path} was refused and lies among the accepted versions", ONE_MOMENT)
        elif state == "candidate" and not is_accepted and not is_candidate:
            yield Finding(
                f"candidate {self.store.candidates / name} is not there; its fine-tune is folded again",
                LATER, is_damage=False,
            )  # fmt: skip

    def folded(self) -> Iterator[Finding]:
        """The fine-tunes that the ledger calls folded are those in head's manifest."""
        head = self.found.get(self.head)
        if head is None:
            was_accepted = any(row["state"] not in ("candidate", "refused") for row in self.rows.values())
            if was_accepted and not self.head:
                yield Finding(f"{self.store.ledger} names no head", ONE_MOMENT)
            elif (
                self.head
                and self.head not in self.folders
                and all(
                    snapshots.folder_name(row["version"], row["digest"]) != self.head
                    for row in self.rows.values()
                )
            ):
                yield Finding(f"{self.store.snapshots / self.head}, the head, is missing", RESTORE)
            return
        rows = {
            (row["source"], row["name"], row["revision"]): row for row in self.ledger.fine_tunes("folded")
        }
        members = {member.announced: member for member in head.fine_tunes}
        for key in sorted(rows.keys() - members.keys()):
            yield Finding(
                f"{self.store.ledger} says that {key[1]}@{key[2][:12]} is folded, version {head.version}, "
                "the head, does not hold it", ONE_MOMENT,
            )  # fmt: skip
        for key, member in members.items():
            row = rows.get(key)
            if row is None:
                yield Finding(
                    f"version {head.version}, the head, holds {key[1]}@{key[2][:12]}, {self.store.ledger} "
                    "does not say that it is folded", ONE_MOMENT,
                )  # fmt: skip
            elif row["digest"] != member.digest:
                yield Finding(
                    f"{self.store.ledger} has digest {row['digest'][:12]} for {key[1]}, version "
                    f"{head.version} has {member.digest[:12]}", ONE_MOMENT,
                )  # fmt: skip

    def promoted(self) -> Iterator[Finding]:
        """`current` leads where the last promotion says."""
        for row in self.ledger.rows("select version, digest, min(id) as id from promotions group by 1, 2"):
            known = self.rows.get(row["version"])
            is_beyond = row["version"] > max(self.rows, default=-1)  # a missing row is named elsewhere
            if is_beyond or (known is not None and known["digest"] != row["digest"]):
                yield Finding(
                    f"promotion {row['id']} in {self.store.ledger} is of version {row['version']} "
                    f"{row['digest'][:12]}, which is in no row", ONE_MOMENT,
                )  # fmt: skip
        link, serving = self.store.current, snapshots.current(self.store)
        last = self.ledger.last_promotion()
        if last is None:
            if serving is not None:
                yield Finding(f"{link} leads to {serving}, and nothing was promoted", ONE_MOMENT)
            return
        expected = snapshots.folder_name(last["version"], last["digest"])
        if last["cause"] != "adopted" and self.head and expected != self.head:
            yield Finding(
                f"{self.store.ledger} promoted {expected} last, and its head is {self.head}", ONE_MOMENT
            )
        if last["switched_at"] is None:
            yield Finding(f"{link} is still to be switched to {expected}", LATER, is_damage=False)
        elif serving is None:
            yield Finding(f"{link} is missing", "restart the daemon, which puts it back")
        elif serving.parent != self.store.snapshots or serving.name not in self.folders:
            yield Finding(
                f"{link} leads to {serving}, which is no accepted version",
                "restart the daemon, which puts it back",
            )
        elif serving.name != expected:
            yield Finding(
                f"{link} was moved by hand to {serving.name}; {expected} was promoted last",
                "the next start adopts it, with a hold", is_damage=False,
            )  # fmt: skip

    def modes(self) -> Iterator[Finding]:
        """Sealed versions are read-only, and what is nobody else's business is readable by nobody else."""
        for path in (*self.folders.values(), *self.candidates.values()):
            open_to = next((p for p in (path, *path.rglob("*")) if mode_of(p) & 0o222), None)
            if open_to is not None:
                yield Finding(f"{open_to} is sealed and may be written to", LATER, is_damage=False)
        for path in (self.store.ledger, self.store.inbox, self.store.candidates):
            if mode_of(path) & 0o077:
                yield Finding(
                    f"{path} may be read by others than its owner", f"chmod go= {path}", is_damage=False
                )


def mode_of(path: Path) -> int:
    """Give a file's permissions; none where it has gone."""
    try:
        return stat.S_IMODE(path.lstat().st_mode)
    except FileNotFoundError:
        return 0
