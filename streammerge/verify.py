"""Is a store what it says of itself? Every byte, the chain of versions, every row; all of it in one run.

Reads only, and a daemon may be at work meanwhile: what is not as it should be is looked at again a moment
later, and only what is still so is said. What a kill leaves and the next start finishes is unfinished; what
no start can have left is damage.
"""

from __future__ import annotations

import json
import math
import stat
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge import files, methods, reports, snapshots
from streammerge.collect import is_archived
from streammerge.errors import Damaged, Refused, StreammergeError
from streammerge.fetching import published
from streammerge.headers import Incomplete, WeightsSet
from streammerge.plan import ADDED, PROJECTED
from streammerge.snapshots import RESTORE
from streammerge.state import STATISTICS, delta_norms
from streammerge.weights import Weights, element_panels, identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.ledger import Ledger, Row
    from streammerge.snapshots import Snapshot, Store

LOOKS, PAUSE_SECONDS = 4, 0.25
TOLERANCE = 1e-4  # of norms that were summed in another order, on a GPU maybe
FIXED = ("method", "knobs", "added", "routes")
LATER = "nothing is to be done: the next start does it"
ONE_MOMENT = "restore ledger.db and snapshots/ together, from one backup"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: what, what to do, and whether it is damage."""

    what: str
    hint: str
    is_damage: bool = True


def verify(config: Config, beat: Callable[[str, int], None] = lambda _what, _bytes: None) -> list[Finding]:
    """Check a whole store. `beat` is told what is read, and how many bytes that were.

    Raises ConfigError where there is no store, or it is somebody else's.
    """
    store, ledger = snapshots.Store(config.store), None
    found = []
    try:
        store, ledger = reports.open_for_reading(config)
        ledger.close()
    except Damaged as exc:
        found.append(Finding(exc.message, exc.hint))
    try:
        settings = store.read_settings()
    except Damaged as exc:
        settings = {}
        found.append(Finding(exc.message, exc.hint))
    for parent in (store.snapshots, store.candidates):
        for path in snapshots.folders(parent):
            harm = list(contents(path, settings, beat))
            found += harm if path.is_dir() else []  # a version that goes loses its name first
    if ledger is not None:
        found += inbox(config, store, settings, beat)
        found += lasting(config, store, settings)
    return list(dict.fromkeys(found))


def total_bytes(store: Store) -> int:
    """Sum the sizes of what is read."""
    return sum(files.tree_bytes(folder) for folder in (store.snapshots, store.candidates))


# One version


def contents(path: Path, settings: Mapping[str, Any], beat: Callable[[str, int], None]) -> Iterator[Finding]:
    """Name every file of one version that is not as it was sealed, and figures that do not fit its state."""
    try:
        snapshot = snapshots.read(path)
    except Damaged as exc:
        yield Finding(exc.message, exc.hint)
        return
    is_sound = True
    for what in snapshots.differences(snapshot, beat=beat):
        is_sound = False
        yield Finding(what, RESTORE)
    if is_sound and settings:
        beat(f"{path.name}: the state", 0)
        for what in state_differences(snapshot, settings):
            yield Finding(f"{path}: {what}", RESTORE)


def state_differences(snapshot: Snapshot, settings: Mapping[str, Any]) -> Iterator[str]:
    """Compare the totals of a manifest with the fine-tunes it lists and with the state beside it."""
    totals, listed = snapshot.manifest["totals"], snapshot.fine_tunes
    yield from disagreements("count", totals["count"], len(listed))
    yield from disagreements("factors", totals["factors"], sum(entry["weight"] for entry in listed))
    twice = [digest for digest, times in Counter(snapshot.digests).items() if times > 1]
    for digest in twice:
        yield f"fine-tune {digest[:12]} is in it more than once"
    if not listed:
        return
    try:
        with Weights(WeightsSet((snapshot.state / STATISTICS,))) as found:
            figures = {name: found.read(name) for name in found.entries}
        merged = {name for name, kind in settings["kinds"].items() if kind in (PROJECTED, ADDED)}
        odd = [name for name, rows in figures.items() if tuple(rows.shape) != (len(listed), 3)]
        if odd or set(figures) != merged:
            name = min([*odd, *(merged ^ set(figures))])
            yield f"state/{STATISTICS} has not {len(listed)} rows for each folded weight, first is {name}"
            return
        norms = delta_norms(figures)
        yield from disagreements("mean_delta_norm", totals["mean_delta_norm"], math.fsum(norms) / len(norms))
        yield from disagreements("max_delta_norm", totals["max_delta_norm"], max(norms))
        yield from disagreements("state_norm", totals["state_norm"], state_norm(snapshot, settings))
    except (OSError, Refused, Incomplete, KeyError) as exc:
        yield f"its state cannot be read: {exc}"


def disagreements(what: str, sealed: float, found: float) -> Iterator[str]:
    """Say so where a total is not what was found."""
    if not math.isclose(sealed, found, rel_tol=TOLERANCE, abs_tol=1e-12):
        yield f"totals.{what} is {sealed:g}, and its state says {found:g}"


def state_norm(snapshot: Snapshot, settings: Mapping[str, Any]) -> float:
    """Length of the first slot over all weights, from the files."""
    method, count = methods.load(settings["method"]), len(snapshot.fine_tunes)
    firsts = {
        kind: next(iter(methods.layout(method, methods.Weight("", kind, (1, 1)), count, settings["knobs"])))
        for kind in ("projected", "added")
    }
    squares = 0.0
    for path in sorted(snapshot.state.glob("*-?????.safetensors")):
        slot = path.name.rsplit("-", 1)[0]
        with Weights(WeightsSet((path,)), once=True) as found:
            for name, entry in found.entries.items():
                if firsts[settings["kinds"][name]] == slot:
                    for start, stop in element_panels(entry.elements):
                        squares += float(found.read(name, start, stop).double().square().sum())
    return math.sqrt(squares)


# The inbox


def inbox(
    config: Config, store: Store, settings: Mapping[str, Any], beat: Callable[[str, int], None]
) -> Iterator[Finding]:
    """Name kept files of folded fine-tunes that are not what was folded."""
    _, ledger = reports.open_for_reading(config)
    rows = ledger.fine_tunes("folded")
    ledger.close()
    sidecar = methods.sidecar(settings["method"]) if settings else ""
    for row in rows:
        folder = store.inbox / str(row["id"])
        if not folder.is_dir():
            continue
        beat(f"inbox/{folder.name}", 0)
        try:
            digest = identity(published(folder, row["name"]), sidecar=sidecar)
        except (OSError, StreammergeError) as exc:
            digest = str(exc)
        if digest != row["digest"] and folder.is_dir() and is_kept(config, row, folder):
            yield Finding(
                f"{folder} is not what was folded of {row['name']}",
                hint=f"remove {folder}, so that it is fetched from its source when it is needed",
            )


def is_kept(config: Config, row: Row, folder: Path) -> bool:
    """Whether the files of a row are still to stay, now that they were read."""
    _, ledger = reports.open_for_reading(config)
    try:
        fresh = ledger.row("select * from fine_tunes where id = ?", row["id"])
        return fresh is not None and fresh["state"] == "folded" and is_archived(config, fresh, folder)
    finally:
        ledger.close()


# The account


def lasting(config: Config, store: Store, settings: Mapping[str, Any]) -> list[Finding]:
    """Compare ledger and folders; where they differ, again and again: what a daemon is doing passes."""
    found: list[Finding] = []
    for look in range(LOOKS):
        if look:
            time.sleep(PAUSE_SECONDS)
        now = books(config, store, settings)
        found = [finding for finding in found if finding in now] if look else now
        if not found:
            break
    return found


def books(config: Config, store: Store, settings: Mapping[str, Any]) -> list[Finding]:
    """Compare ledger and folders once, as of one moment of the ledger."""
    try:
        _, ledger = reports.open_for_reading(config)
    except Damaged as exc:
        return [Finding(exc.message, exc.hint)]
    try:
        if harm := ledger.harm():
            return [Finding(f"{store.ledger} is damaged: {line}", ONE_MOMENT) for line in harm]
        with ledger.one_moment():
            return list(Books(store, ledger, settings).compare())
    except Damaged as exc:
        return [Finding(exc.message, exc.hint)]
    finally:
        ledger.close()


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
        ours, theirs = set(snapshot.digests), set(parent.digests)
        added = [entry["name"] for entry in snapshot.fine_tunes if entry["digest"] not in theirs]
        removed = [entry["name"] for entry in parent.fine_tunes if entry["digest"] not in ours]
        for key, names in (("added", added), ("removed", removed)):
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
            if self.rows and not self.head:
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
        entries = {(entry["source"], entry["name"], entry["revision"]): entry for entry in head.fine_tunes}
        for key in sorted(rows.keys() - entries.keys()):
            yield Finding(
                f"{self.store.ledger} says that {key[1]}@{key[2][:12]} is folded, version {head.version}, "
                "the head, does not hold it", ONE_MOMENT,
            )  # fmt: skip
        for key, entry in entries.items():
            row = rows.get(key)
            if row is None:
                yield Finding(
                    f"version {head.version}, the head, holds {key[1]}@{key[2][:12]}, {self.store.ledger} "
                    "does not say that it is folded", ONE_MOMENT,
                )  # fmt: skip
            elif row["digest"] != entry["digest"]:
                yield Finding(
                    f"{self.store.ledger} has digest {row['digest'][:12]} for {key[1]}, version "
                    f"{head.version} has {entry['digest'][:12]}", ONE_MOMENT,
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
