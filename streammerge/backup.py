"""A consistent copy of a store, taken while its daemon works, and a store made from such a copy.

A copy is laid out like a store. What its ledger names is there before the ledger is, which comes in one
step, and what no ledger names any more goes after that: so whatever cuts a copy short, what lies there is the
whole copy of before or the whole new one. Nothing is copied again that is there with the content it was
sealed with.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge import files, machine, methods, recovery, reports, snapshots
from streammerge.collect import is_archived
from streammerge.errors import ConfigError, Damaged, StreammergeError, TryAgain
from streammerge.fetching import published
from streammerge.ledger import Ledger, now
from streammerge.snapshots import RESTORING, Store
from streammerge.weights import identity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.ledger import Row
    from streammerge.snapshots import Snapshot

ROUNDS = 5  # how often the ledger is read again because what it named was collected meanwhile
PRESENT = ("accepted", "rolled_back")
BEGUN = snapshots.BEGUN | {".ledger.db.new"}


@dataclass
class Copied:
    """What a copy came to."""

    head: int = 0
    versions: int = 0
    held_bytes: int = 0
    copied_bytes: int = 0
    damaged: list[str] = field(default_factory=list)

    def told(self, place: Path) -> dict[str, Any]:
        """Give it as the documented JSON."""
        return {
            "place": str(place), "version": self.head, "versions": self.versions,
            "bytes": self.held_bytes, "copied_bytes": self.copied_bytes, "damaged": self.damaged,
        }  # fmt: skip


def backup(config: Config, place: Path, beat: Callable[[str, int], None]) -> dict[str, Any]:
    """Bring the copy at `place` up to date with the store, or make it.

    Raises ConfigError where something else lies there, Damaged where head or current is not sound: the copy
    of before stays then, as it does when this is cut.
    """
    store, reading = reports.open_for_reading(config)
    born = birth(reading)
    reading.close()
    reports.refuse_stranger(store, writing=True)
    target = Store(place)
    refuse_place(store, target, born)
    make_private(place)
    with files.locked(target.lock), machine.errors("backing up"):
        copied = copy(config, store, target, beat, settle=not_restored)
    return copied.told(place)


def restore(config: Config, place: Path, beat: Callable[[str, int], None]) -> dict[str, Any]:
    """Make the configured store from the copy at `place`; begun already, it is gone on with.

    Raises ConfigError where there is a store, or something else, or no copy; Damaged where what the copy has
    of head or current is not what was sealed.
    """
    source, store = Store(place), Store(config.store)
    if not source.exists or not source.ledger.exists():
        raise ConfigError(
            f"{place} is no backup of a store", hint="give the folder `streammerge backup` made"
        )
    if store.exists:
        raise ConfigError(f"there is a store at {store.root} already", hint="move it away first")
    source.read_settings()
    recovery.refuse_network(config)
    strange = [entry for entry in entries(store.root) if not is_empty(entry)]
    if strange and RESTORING not in entries_by_name(store.root):
        raise ConfigError(f"{store.root} is not empty: it holds {strange[0].name}", hint="give a new folder")
    store.create()
    (store.root / RESTORING).touch()
    with files.locked(store.lock), machine.errors("restoring"):
        copied = copy(config, source, store, beat, settle=lambda ledger: tell_again(ledger, config))
        (store.root / RESTORING).unlink()
        files.fsync_folder(store.root)
    return copied.told(store.root)


def refuse_place(store: Store, target: Store, born: float) -> None:
    """Raise ConfigError unless a backup of this store may go there."""
    root, place = store.root.resolve(), target.root.resolve()
    if place == root or place.is_relative_to(root) or root.is_relative_to(place):
        raise ConfigError(
            f"{place} and the store {root} lie within each other", hint="give a folder elsewhere"
        )
    if target.root.exists() and not target.root.is_dir():
        raise ConfigError(f"{place} is no folder", hint="give a folder")
    names = entries_by_name(target.root)
    if not target.exists and not target.ledger.exists() and (strange := names - BEGUN):
        raise ConfigError(f"{place} holds {min(strange)} and no backup", hint="give a new or empty folder")
    if target.ledger.exists():
        with closing(Ledger(target.ledger, read_only=True)) as there:
            other = birth(there)
        if other != born:
            raise ConfigError(
                f"{place} has the backup of another store", hint="give each store its own folder"
            )


def birth(ledger: Ledger) -> float:
    """When version 0 was sealed, which tells a store and its copies from all others; 0.0 before that."""
    row = ledger.row("select sealed_at from snapshots where version = 0")
    return float(row["sealed_at"]) if row else 0.0


def make_private(place: Path) -> None:
    """Make the folder of a copy: nobody's business but its owner's."""
    if not place.exists():
        place.mkdir(parents=True)
        place.chmod(0o700)
    Store(place).create()


# One copy


def copy(
    config: Config,
    source: Store,
    target: Store,
    beat: Callable[[str, int], None],
    settle: Callable[[Ledger], None],
) -> Copied:
    """Bring everything, then the ledger, then `current`; then remove what is not named any more."""
    settings = source.read_settings()
    fresh = target.root / ".ledger.db.new"
    gone = ""
    for _ in range(ROUNDS):
        copied = Copied()
        copy_ledger(source, fresh)
        with closing(Ledger(fresh)) as ledger:
            try:
                bring_versions(config, source, target, ledger, copied, beat)
            except Collected as exc:
                if str(exc) == gone:  # it is named still: nobody collected it
                    raise Damaged(f"{source.snapshots / gone} is missing", hint=snapshots.RESTORE) from exc
                gone = str(exc)
                continue
            bring_inbox(config, source, target, ledger, settings, copied, beat)
            with ledger.transaction():
                settle(ledger)
            names = {
                snapshots.folder_name(row["version"], row["digest"]) for row in present(ledger)
            }  # what the copy is made of
            last = ledger.last_promotion()
            kept = {str(row["id"]) for row in ledger.fine_tunes("folded")}
        break
    else:
        raise TryAgain(
            f"versions of {source.root} are collected faster than they are copied",
            hint="lengthen grace or raise keep, or take the backup while less comes in",
        )
    if (source.root / "base").is_dir():
        copied.copied_bytes += bring_folder(source.root / "base", target.root / "base", beat)
    commit(source, target, fresh, snapshots.folder_name(last["version"], last["digest"]) if last else "")
    for path in snapshots.folders(target.snapshots):
        if path.name not in names:
            files.remove_tree(path)
    for path in target.inbox.iterdir():
        if path.name not in kept:
            files.remove_tree(path)
    snapshots.remove_unfinished(target)
    copied.held_bytes = files.tree_bytes(target.root)
    return copied


class Collected(Exception):
    """Head or current of the ledger that was read is not there any more: it is to be read again."""


def copy_ledger(source: Store, fresh: Path) -> None:
    """Take the account as of one moment, to a file of its own that only its owner may read."""
    for ending in ("", "-wal", "-shm", "-journal"):
        fresh.with_name(fresh.name + ending).unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_CREAT | os.O_WRONLY, 0o600))
    with closing(Ledger(source.ledger, read_only=True)) as ledger:
        if ledger.fact("head") is None:
            raise StreammergeError(f"{source.root} has no version yet", hint="wait until version 0 is served")
        ledger.copy_to(fresh)
    with closing(Ledger(fresh)) as copied:
        if harm := copied.harm():
            raise Damaged(f"{source.ledger} is damaged: {harm[0]}", hint="restore it from an older backup")


def present(ledger: Ledger) -> list[Row]:
    """List the versions that are on disk where this ledger belongs."""
    return ledger.rows("select * from snapshots where state in (?, ?) order by version", *PRESENT)


def bring_versions(
    config: Config,
    source: Store,
    target: Store,
    ledger: Ledger,
    copied: Copied,
    beat: Callable[[str, int], None],
) -> None:
    """Bring every version that the ledger calls present; what cannot be had is written off in it."""
    last = ledger.last_promotion()
    vital = {ledger.fact("head"), snapshots.folder_name(last["version"], last["digest"]) if last else None}
    missing = [row for row in present(ledger) if not (target.snapshots / name_of(row)).is_dir()]
    needed = sum(files.tree_bytes(source.snapshots / name_of(row)) for row in missing)
    machine.require_space(
        target.root, needed, reserve_bytes=config.reserve, purpose=f"copying {len(missing)} versions"
    )
    for row in present(ledger):
        name = name_of(row)
        try:
            copied.copied_bytes += bring_version(source.snapshots / name, target.snapshots / name, beat)
            copied.versions += 1
        except Damaged as exc:
            is_gone = not (source.snapshots / name).is_dir()
            if name in vital:
                if is_gone:
                    raise Collected(name) from exc
                raise
            ledger.update_snapshot(
                row["version"], state="collected", note="" if is_gone else "damaged when it was backed up"
            )
            copied.damaged += [] if is_gone else [exc.message]
    copied.head = int(str(ledger.fact("head")).split("-")[0])


def name_of(row: Row) -> str:
    """Name the folder of a version's row."""
    return snapshots.folder_name(row["version"], row["digest"])


def bring_version(source: Path, target: Path, beat: Callable[[str, int], None]) -> int:
    """Bring one sealed version, unless it is there whole; gives how many bytes were copied.

    Raises Damaged where what is to be copied is not what was sealed, or is gone.
    """
    if is_whole(target, beat):
        files.protect(target)  # its name came, and a kill before its mode did
        return 0
    snapshot = snapshots.read(source)
    part = target.with_name(f".building-{target.name}")
    for folder in (part, part / "model", part / "state"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    try:
        count = copy_sealed(snapshot, part, beat)
    except FileNotFoundError as exc:
        raise Damaged(f"{exc.filename} is missing", hint=snapshots.RESTORE) from exc
    files.fsync_tree(part)
    files.protect(part)
    files.remove_tree(target)
    files.rename_folder(part, target)
    return count


def copy_sealed(snapshot: Snapshot, part: Path, beat: Callable[[str, int], None]) -> int:
    """Copy what a version's manifest lists, then the manifest; what is there already stays."""
    source, count = snapshot.path, 0
    for name, facts in snapshot.manifest["files"].items():
        file = part / name
        file.parent.mkdir(parents=True, exist_ok=True)
        beat(f"{source.name}/{name}", facts["bytes"])
        if file.is_file() and files.sha256_file(file) == facts["sha256"]:
            continue
        file.unlink(missing_ok=True)
        files.copy_file(source / name, file, follow_symlinks=False)
        count += facts["bytes"]
        if files.sha256_file(file) != facts["sha256"]:
            raise Damaged(
                f"{source / name} does not have the content it was sealed with", hint=snapshots.RESTORE
            )
    (part / "manifest.json").unlink(missing_ok=True)
    files.write_file(part / "manifest.json", (source / "manifest.json").read_bytes())
    return count


def is_whole(target: Path, beat: Callable[[str, int], None]) -> bool:
    """Whether a version lies there, byte for byte as it was sealed."""
    try:
        return target.is_dir() and not any(snapshots.differences(snapshots.read(target), beat))
    except Damaged:
        return False


def bring_inbox(
    config: Config,
    source: Store,
    target: Store,
    ledger: Ledger,
    settings: dict[str, Any],
    copied: Copied,
    beat: Callable[[str, int], None],
) -> None:
    """Bring the files of folded fine-tunes that `archive` keeps for replays."""
    sidecar = methods.sidecar(settings["method"])
    for row in ledger.fine_tunes("folded"):
        kept, there = source.inbox / str(row["id"]), target.inbox / str(row["id"])
        if not kept.is_dir() or not is_archived(config, row["state"], kept):
            continue
        try:
            copied.copied_bytes += bring_folder(kept, there, beat)
            is_right = identity(published(there, row["name"]), sidecar=sidecar) == row["digest"]
        except FileNotFoundError:
            continue  # it was taken out meanwhile
        except StreammergeError:
            is_right = False
        if not is_right:
            copied.damaged.append(f"{kept} is not what was folded of {row['name']}")
            files.remove_tree(there)


def bring_folder(source: Path, target: Path, beat: Callable[[str, int], None]) -> int:
    """Bring a folder of plain files, unless it is there with the same content; gives the bytes copied."""
    names = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    there = sorted(p.relative_to(target) for p in target.rglob("*") if p.is_file()) if target.is_dir() else []
    if names == there and all(
        files.sha256_file(source / name) == files.sha256_file(target / name) for name in names
    ):
        return 0
    part, count = target.with_name(f"{target.name}.part"), 0
    files.remove_tree(part)
    part.mkdir()
    for name in names:
        beat(f"{source.name}/{name}", 0)
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        files.copy_file(source / name, part / name, follow_symlinks=False)
        count += (part / name).stat().st_size
    files.fsync_tree(part)
    files.remove_tree(target)
    files.rename_folder(part, target)
    return count


def commit(source: Store, target: Store, fresh: Path, serving: str) -> None:
    """From here on the new ledger counts; store.json comes last, because with it the copy is one."""
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    for ending in ("-wal", "-shm"):
        target.ledger.with_name(target.ledger.name + ending).unlink(missing_ok=True)
    fresh.replace(target.ledger)
    files.fsync_folder(target.root)
    if serving:
        files.replace_link(target.current, f"snapshots/{serving}")
    if not target.exists:
        files.replace_file(target.settings, source.settings.read_bytes())


# What is written into the account of a copy


def not_restored(ledger: Ledger) -> None:
    """What was under way is not in the copy: it begins again where the copy is restored."""
    answer = {"error": "not executed: the store was restored from a backup", "hint": "ask again", "exit": 1}
    ledger.write(
        "update commands set state = 'failed', result = ?, finished_at = ? where state = 'pending'",
        json.dumps(answer), now(),
    )  # fmt: skip
    ledger.write(
        "update snapshots set state = 'refused', note = 'discarded: it was no part of the backup' "
        "where state = 'candidate'"
    )
    ledger.write("update fine_tunes set step = 'announced' where state in ('pending', 'awaiting_approval')")


def tell_again(ledger: Ledger, config: Config) -> None:
    """What is current again is promoted once more: a target may have been told of newer versions since."""
    not_restored(ledger)
    last = ledger.last_promotion()
    if last is None or last["switched_at"] is None:
        return
    cause = last["cause"] if last["cause"] == "adopted" else "restore"
    number = ledger.write(
        "insert into promotions (version, digest, cause, intended_at, switched_at) values (?, ?, ?, ?, ?)",
        last["version"], last["digest"], cause, now(), now(),
    )  # fmt: skip
    for target in config.targets:
        ledger.open_telling(number, target.name, last["version"])
    ledger.write("delete from served")


# Folders


def entries(folder: Path) -> list[Path]:
    """List what lies directly in a folder; nothing where there is none."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def entries_by_name(folder: Path) -> set[str]:
    """List the names of what lies directly in a folder."""
    return {path.name for path in entries(folder)}


def is_empty(path: Path) -> bool:
    """Whether this is an empty folder, or a file without content."""
    return not entries(path) if stat.S_ISDIR(path.lstat().st_mode) else path.lstat().st_size == 0
