"""The versioned store: build, seal, accept, list, verify, collect.

Knows folders, manifests and digests; nothing of sources, the ledger or merging. The invariants: a sealed
folder never changes; a folder appears under its final name whole or not at all; `current` points only into
snapshots/.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import files, machine, members
from streammerge.errors import ConfigError, Damaged

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    from streammerge.members import Members

FORMAT = 1
DIGEST_CHARACTERS = 12
FOLDERS = ("inbox", "candidates", "snapshots")
BEGUN = frozenset(  # what a store that is still being made may hold
    {"lock", "base", "base.part", *FOLDERS, *(f".{name}.tmp" for name in (*FOLDERS, "store.json"))}
)
RESTORING = ".restoring"  # in a store that `streammerge restore` has begun
Stamp = tuple[int, int, int, int, int]  # of a file: it changes with the content
FOLDER = re.compile(r"^(\d{6,})-([0-9a-f]{12})$")


@dataclass(frozen=True)
class Store:
    """Where everything of one store lies."""

    root: Path

    @property
    def settings(self) -> Path:
        """store.json: what is fixed for the life of the store."""
        return self.root / "store.json"

    @property
    def lock(self) -> Path:
        """The file whose flock makes one process the writer."""
        return self.root / "lock"

    @property
    def ledger(self) -> Path:
        """The SQLite database."""
        return self.root / "ledger.db"

    @property
    def inbox(self) -> Path:
        """Fetched fine-tunes."""
        return self.root / "inbox"

    @property
    def candidates(self) -> Path:
        """Sealed, not accepted."""
        return self.root / "candidates"

    @property
    def snapshots(self) -> Path:
        """Accepted."""
        return self.root / "snapshots"

    @property
    def prepared(self) -> Path:
        """Derived from head's state while idle; may be deleted at any time."""
        return self.root / "prepared"

    @property
    def current(self) -> Path:
        """The symlink to the snapshot being served."""
        return self.root / "current"

    @property
    def exists(self) -> bool:
        """Whether a daemon has ever made it."""
        return self.settings.is_file()

    def create(self) -> None:
        """Make the folders of a new store."""
        private, shared = (
            0o700,
            0o755,
        )  # whatever the umask: servers follow `current`, the rest is nobody's business
        for folder, mode in (
            (self.root, shared), (self.snapshots, shared), (self.inbox, private), (self.candidates, private),
        ):  # fmt: skip
            is_there = folder.is_dir()
            if not is_there:
                files.make_folder(folder, mode)
            if not (is_there and self.exists):  # a first start may have been cut off in between
                files.fsync_folder(folder.parent)

    def read_settings(self) -> dict[str, Any]:
        """Read store.json."""
        try:
            with machine.errors("reading the store", self.settings):
                settings: dict[str, Any] = json.loads(self.settings.read_bytes())
        except (OSError, ValueError) as exc:
            raise Damaged(
                f"{self.settings} cannot be read: {exc}", hint="restore it from a backup of the store"
            ) from exc
        if settings.get("format") != FORMAT:
            raise ConfigError(
                f"{self.root} has store format {settings.get('format')}, this release reads {FORMAT}",
                hint="use the release that made the store, or start a new store",
            )
        return settings


@dataclass(frozen=True)
class Snapshot:
    """One sealed version; `digest` is the sha256 of its manifest.json, whose fine_tunes are Members here."""

    path: Path
    digest: str
    manifest: Mapping[str, Any]

    @property
    def version(self) -> int:
        """Its number, never given twice."""
        return int(self.manifest["version"])

    @property
    def parent(self) -> str | None:
        """Digest of the snapshot it was folded from; None for version 0."""
        return self.manifest["parent"]  # type: ignore[no-any-return]

    @property
    def fine_tunes(self) -> Members:
        """What is folded, in order."""
        return self.manifest["fine_tunes"]  # type: ignore[no-any-return]

    @property
    def digests(self) -> list[str]:
        """Digests of what is folded, in order."""
        return [fine_tune.digest for fine_tune in self.fine_tunes]

    @property
    def model(self) -> Path:
        """What servers load."""
        return self.path / "model"

    @property
    def state(self) -> Path:
        """What the next fold starts from."""
        return self.path / "state"


class Manifests:
    """The manifests used last: one that lists thousands of fine-tunes is not to be parsed at every question.

    A file that was changed or replaced is not the one that is known, and is read again.
    """

    def __init__(self, most: int) -> None:
        """Keep `most` of them."""
        self._most = most
        self._known: OrderedDict[str, tuple[Stamp, Snapshot]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> Snapshot | None:
        """Give the snapshot in this folder if its manifest is known. Raises OSError where there is none."""
        stamp = _stamp(path)
        with self._lock:
            known = self._known.get(path.name)
            if known is None or known[0] != stamp:
                return None
            self._known.move_to_end(path.name)
        return Snapshot(path, known[1].digest, known[1].manifest)

    def put(self, snapshot: Snapshot) -> Snapshot:
        """Remember a manifest that was proven, or just written; gives it back."""
        with self._lock:
            known = [other.fine_tunes for _, other in self._known.values()]
            snapshot.fine_tunes.hold_once(known)
            self._known[snapshot.path.name] = (_stamp(snapshot.path), snapshot)
            self._known.move_to_end(snapshot.path.name)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return snapshot


def _stamp(path: Path) -> Stamp:
    found = (path / "manifest.json").stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


MANIFESTS = Manifests(most=2)  # head and what it was folded from, or what follows it


def folder_name(version: int, digest: str) -> str:
    """Name a sealed folder so that its number and content can be read off it."""
    return f"{version:06d}-{digest[:DIGEST_CHARACTERS]}"


def begin(store: Store, version: int) -> Path:
    """Make an empty building folder; one that a kill left behind is removed first."""
    building = store.candidates / f".building-{version:06d}"
    files.remove_tree(building)
    for part in ("model", "state"):
        (building / part).mkdir(parents=True)
    return building


def seal(store: Store, building: Path, manifest: Mapping[str, Any], hashes: Mapping[str, str]) -> Snapshot:
    """Write the manifest, make everything durable and read-only, and give the folder its name in candidates/.

    hashes  path below the building folder -> sha256, for files whose writer already knows it
    """
    listed = {}
    for path in sorted(p for p in building.rglob("*") if p.is_file()):
        name = path.relative_to(building).as_posix()
        listed[name] = {"sha256": hashes.get(name) or files.sha256_file(path), "bytes": path.stat().st_size}
    whole = {**manifest, "format": FORMAT, "files": listed}
    digest = files.write_json(building / "manifest.json", whole)
    files.fsync_tree(building)
    files.protect(building)
    sealed = store.candidates / folder_name(int(manifest["version"]), digest)
    files.rename_folder(building, sealed)
    return MANIFESTS.put(Snapshot(sealed, digest, whole))


def accept(store: Store, candidate: Snapshot) -> Snapshot:
    """Move a candidate into snapshots/."""
    target = store.snapshots / candidate.path.name
    files.rename_folder(candidate.path, target)
    return Snapshot(target, candidate.digest, candidate.manifest)


def by_digest(store: Store, digest: str) -> Snapshot | None:
    """Open the accepted version with this digest, if it is still on disk."""
    ending = f"-{digest[:DIGEST_CHARACTERS]}"
    name = next((name for name in names(store.snapshots) if name.endswith(ending)), None)
    return read(store.snapshots / name) if name else None


def read(path: Path) -> Snapshot:
    """Open a sealed folder: its manifest must hash to what the folder's name says."""
    match = FOLDER.match(path.name)
    try:
        with machine.errors("reading a version", path):  # what cannot be read may be whole
            if found := MANIFESTS.get(path):
                return found
            content = (path / "manifest.json").read_bytes()
        manifest = members.parse(content)
    except (OSError, ValueError) as exc:
        raise Damaged(f"{path}/manifest.json cannot be read: {exc}", hint=RESTORE) from exc
    digest = hashlib.sha256(content).hexdigest()
    if not match or match[2] != digest[:DIGEST_CHARACTERS] or int(match[1]) != manifest.get("version"):
        raise Damaged(
            f"{path}/manifest.json is not the one that was sealed: its hash is {digest[:12]}", hint=RESTORE
        )
    snapshot = Snapshot(path, digest, manifest)
    with suppress(FileNotFoundError):  # what was removed since it was read is not remembered
        MANIFESTS.put(snapshot)
    return snapshot


RESTORE = "restore the folder from a backup of the store"


def line_of(store: Store, digests: Sequence[str]) -> Iterator[tuple[Path, int]]:
    """Give the accepted versions that hold a beginning of these fine-tunes, oldest first, and of how many.

    What cannot be read is passed over: that is for whoever verifies.
    """
    chain = _chain(digests)
    for path in folders(store.snapshots):
        with suppress(Damaged, OSError), machine.errors("reading a version", path):
            count, last = _beginning(path, _stamp(path))
            if count < len(chain) and chain[count] == last:
                yield path, count


@lru_cache(maxsize=4096)  # many lie on disk where targets lag behind, and each lists thousands
def _beginning(path: Path, stamp: Stamp) -> tuple[int, int]:
    """How many fine-tunes a version holds, and the last link of their chain; `stamp` is its manifest's."""
    del stamp
    found = read(path).digests
    return len(found), _chain(found)[-1]


def _chain(digests: Sequence[str]) -> list[int]:
    """Sum up every beginning of a list, the empty one first; the same lists have the same sums."""
    return list(accumulate(digests, lambda so_far, digest: hash((so_far, digest)), initial=0))


def folders(parent: Path) -> list[Path]:
    """List the sealed folders of candidates/ or snapshots/ by number, without reading them."""
    return [parent / name for name in names(parent)]


def names(parent: Path) -> list[str]:
    """List their names alone: where a target lags behind they are thousands, and each fold asks for them."""
    try:
        there = os.listdir(parent)  # noqa: PTH208 -- paths cost ten times as much
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(sorted(filter(FOLDER.match, there)), key=len)  # the longer number is the greater


def number(path: Path) -> int:
    """Read a version's number off its folder."""
    return numbered(path.name)


def numbered(name: str) -> int:
    """Read a version's number off the name of its folder."""
    return int(name.partition("-")[0])


def version_of(label: str) -> int | None:
    """Read the number off the name of a version's folder, as targets report it; None for another name."""
    found = re.fullmatch(r"(\d{6,})-[0-9a-f]{12}", label)
    return int(found[1]) if found else None


def by_version(store: Store, version: int) -> Path | None:
    """Find the accepted folder of a version."""
    name = next((name for name in names(store.snapshots) if numbered(name) == version), None)
    return store.snapshots / name if name else None


def current(store: Store) -> Path | None:
    """Resolve `current`; None where nothing was promoted yet."""
    try:
        return store.root / store.current.readlink()
    except OSError:
        return None


def switch(store: Store, snapshot: Snapshot) -> None:
    """Point `current` at an accepted snapshot, in one step."""
    assert snapshot.path.parent == store.snapshots
    files.replace_link(store.current, f"snapshots/{snapshot.path.name}")


def check_sizes(snapshot: Snapshot) -> None:
    """Raise Damaged unless every file of the manifest is there with its size and nothing else is."""
    for what in differences(snapshot, content=False):
        raise Damaged(what, hint=RESTORE)


def check_hashes(snapshot: Snapshot, beat: Callable[[], None] = lambda: None) -> None:
    """Raise Damaged unless every file's content is what was sealed. Reads everything."""
    check_sizes(snapshot)
    for what in differences(snapshot, beat=lambda _name, _bytes: beat()):
        raise Damaged(what, hint=RESTORE)


def harm_of(path: Path, *, content: bool = True, beat: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Name everything in a sealed folder that is not as it was sealed, an unreadable manifest too."""
    try:
        snapshot = read(path)
    except Damaged as exc:
        yield exc.message
        return
    yield from differences(snapshot, lambda _name, _bytes: beat(), content=content)


def differences(
    snapshot: Snapshot, beat: Callable[[str, int], None] = lambda _name, _bytes: None, *, content: bool = True
) -> Iterator[str]:
    """Name every file that is not as it was sealed: gone, of another size, not sealed at all, changed.

    Reads every byte unless `content` is off; `beat` is told of each file that is read, with its size.
    """
    listed = snapshot.manifest["files"]
    for name, facts in listed.items():
        path = snapshot.path / name
        if not path.is_file():
            yield f"{path} is missing"
        elif (size := path.stat().st_size) != facts["bytes"]:
            yield f"{path} has {size:,} bytes, sealed with {facts['bytes']:,}"
        elif content:
            beat(f"{snapshot.path.name}/{name}", size)
            try:
                is_same = files.sha256_file(path) == facts["sha256"]
            except OSError as exc:
                yield f"{path} cannot be read: {exc.strerror}"
                continue
            if not is_same:
                yield f"{path} does not have the content it was sealed with"
    for directory, _, names in os.walk(snapshot.path):
        for name in names:
            below = Path(directory, name).relative_to(snapshot.path).as_posix()
            if below not in listed and below != "manifest.json":
                yield f"{snapshot.path / below} was not there when the version was sealed"


def remove_unfinished(store: Store) -> list[str]:
    """Remove what a kill left half made; give the names."""
    removed = remove_hidden(store, ".building-")
    (store.root / ".current.tmp").unlink(missing_ok=True)
    return removed


def remove_hidden(store: Store, beginning: str = files.DOOMED) -> list[str]:
    """Remove what is hidden under such names: by itself, what a failing disk left of a removal."""
    removed = []
    for parent in (store.candidates, store.snapshots):
        for path in parent.glob(f"{beginning}*"):
            files.remove_tree(path)
            removed.append(path.name)
    return removed


def collectable(
    store: Store, *, keep: int, keep_always: Iterable[Path], versions: Container[int] = ()
) -> list[Path]:
    """List accepted folders that may go: all but the newest `keep`, `keep_always` and `versions`."""
    stay = {path.name for path in keep_always}
    older = names(store.snapshots)[:-keep] if keep else names(store.snapshots)
    left = [name for name in older if name not in stay and numbered(name) not in versions]
    return [store.snapshots / name for name in left]
