"""A folder as a source: every folder or .safetensors file in it is a fine-tune.

A fine-tune is complete when its weights set is whole (header arithmetic, every shard of the index) and
nothing of it changed for the settle time, counted from the last change seen here. Its revision is its
content: editing a README or touching a file is no news. File events are hints; the scan is the truth. They
tell of what comes and goes in the folder itself: to hear of every file below it would take memory, here and
in the kernel, for each fine-tune that was ever published.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import math
import operator
import os
import stat
import threading
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import watchdog.events
import watchdog.observers

from streammerge import files, headers, methods, weights
from streammerge.errors import Refused, TryAgain, shown
from streammerge.sources import Look, Sighting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streammerge.config import Config
    from streammerge.config.sources import DirectorySource
    from streammerge.sources import Known

REVISION_CHARACTERS = 16
GROWING_SECONDS = 1.0  # between looks while something is being copied in

log = structlog.get_logger()


class Directory:
    """One watched folder."""

    is_remote = False

    def __init__(
        self,
        config: DirectorySource,
        beat: Callable[[], None],
        clock: Callable[[], float] = time.time,
        sidecar: str = "",
        most_bytes: float = math.inf,
    ) -> None:
        """`clock` gives seconds since 1970; `sidecar` is a file that counts besides the weights.

        A fine-tune with more than `most_bytes` is refused by its size, unread.
        """
        self._sidecar = sidecar
        self._most_bytes = most_bytes
        self.name = config.name
        self.config = config
        self._beat = beat
        self._clock = clock
        self._changed_at: dict[str, tuple[str, float]] = {}
        self._hint: Callable[[], None] | None = None
        self._soon: threading.Timer | None = None

    def look(self, known: Mapping[str, Known], mark: str = "") -> Look:
        """Scan the folder once: all that is there."""
        del mark
        try:
            names = sorted(os.listdir(self.config.path))  # noqa: PTH208 -- thousands, perhaps, at every look
        except OSError as exc:
            raise TryAgain(
                f"source {self.name}: {self.config.path}: {exc.strerror}",
                hint="check that the folder exists, is mounted and can be read",
            ) from exc
        seen, unchanged = [], []
        for name in names:
            if any(fnmatch.fnmatchcase(name, glob) for glob in self.config.ignore):
                continue
            if not name.isprintable():  # nor one to ask anybody for
                why = "its name is no printable UTF-8; rename it"
                seen.append(
                    Sighting(shown(name), "name", self._clock(), refused="malformed", waiting_for=why)
                )
                continue
            before = known.get(name)
            sighting = self._see(name, before)
            if before and before.revision and sighting and not sighting.refused and before.is_same(sighting):
                unchanged.append(name)
            elif sighting:
                seen.append(sighting)
        unsettled = {sighting.name for sighting in seen if not sighting.revision}
        self._changed_at = {name: facts for name, facts in self._changed_at.items() if name in unsettled}
        self._follow_growing()
        return Look(seen, unchanged, again_at=min((s.until for s in seen if s.until), default=0.0))

    def _follow_growing(self) -> None:
        """Hint once more in a moment while what is not complete goes on changing: no event will."""
        self._stop_following()
        latest = max((at for _, at in self._changed_at.values()), default=0.0)
        if self._hint and self._clock() - latest < self.config.poll:
            self._soon = threading.Timer(GROWING_SECONDS, self._hint)
            self._soon.daemon = True
            with contextlib.suppress(RuntimeError):  # no room for a thread: the poll comes too
                self._soon.start()

    def _stop_following(self) -> None:
        if self._soon is not None:
            self._soon.cancel()

    def preview(self) -> Sequence[Sighting]:
        """Scan the folder once, knowing nothing."""
        return self.look({}).sightings

    def mention(self, name: str) -> bool:
        """A folder is looked through whole, and tells of its changes itself."""
        del name
        return False

    def _see(self, name: str, known: Known | None) -> Sighting | None:
        """Judge one entry; None for what is no fine-tune, or vanished while we looked."""
        path = f"{self.config.path}/{name}"  # no Path: it costs as much as all the rest of a look at a folder
        try:
            return self._judge(name, path, known)
        except FileNotFoundError:
            return None
        except Refused as exc:
            why = f"{exc.message}; {exc.hint}"
            return Sighting(name, "listing", self._clock(), refused=exc.reason, waiting_for=why)
        except OSError as exc:
            why = shown(f"{exc.filename or path} cannot be read: {exc.strerror}")
            return Sighting(name, "", self._clock(), waiting_for=why)

    def _judge(self, name: str, path: str, known: Known | None) -> Sighting | None:
        """Judge what can be listed; None for what is no fine-tune."""
        itself = os.lstat(path)
        links = [name] if stat.S_ISLNK(itself.st_mode) else []
        modified = itself.st_mtime
        if links and self.config.follow_symlinks:
            itself = os.stat(path)  # noqa: PTH116 -- no Path
        is_folder = stat.S_ISDIR(itself.st_mode)
        inside = _inside(path) if is_folder else []
        links += [shown(entry.name) for entry in inside if entry.is_symlink()]
        if links and not self.config.follow_symlinks:
            return Sighting(
                name,
                f"link-{links[0]}"[:80],
                modified,
                refused="symlink",
                waiting_for=f"{links[0]} is a symbolic link; follow_symlinks: true allows it",
            )
        if not is_folder and not (stat.S_ISREG(itself.st_mode) and name.endswith(".safetensors")):
            return None
        fingerprint, modified = _fingerprint(name, itself, inside)
        if known and known.revision and known.fingerprint == fingerprint:
            return Sighting(name, known.revision, modified, fingerprint=fingerprint)
        return self._ready_or_waiting(name, Path(path), fingerprint, modified)

    def _ready_or_waiting(self, name: str, path: Path, fingerprint: str, modified: float) -> Sighting:
        def waiting(why: str, until: float = 0.0) -> Sighting:
            return Sighting(name, "", modified, waiting_for=why, until=until, fingerprint=fingerprint)

        now = self._clock()
        before = self._changed_at.get(name)
        if before is None or before[0] != fingerprint:
            before = self._changed_at[name] = (fingerprint, now)
        try:
            self._refuse_large(path)
            weights.Weights(headers.find(path)).__exit__(None, None, None)
        except headers.Incomplete as exc:
            return waiting(exc.message)
        except Refused as exc:
            if exc.reason != "pickle-only":  # a header that cannot be true needs no settling, and no copy
                return Sighting(
                    name, _raw_revision(path), modified,
                    refused=exc.reason, waiting_for=f"{exc.message}; {exc.hint}", fingerprint=fingerprint,
                )  # fmt: skip
        settled_at = before[1] + self.config.settle
        if now < settled_at:
            return waiting("it changed a moment ago; waiting until it settles", settled_at)
        digest = self._digest(path)
        inside = _inside(path) if path.is_dir() else []
        if _fingerprint(name, path.stat(), inside)[0] != fingerprint:
            return waiting("it changed while it was read", now + self.config.settle)
        revision = digest[:REVISION_CHARACTERS] or _raw_revision(path)
        return Sighting(name, revision, modified, fingerprint=fingerprint, digest=digest)

    def _refuse_large(self, path: Path) -> None:
        """Refuse by its size what is many times the base: reading it would hold all else up."""
        found = _files_of(path) if path.is_dir() else [path]
        needed = [file for file in found if headers.is_needed(file.name, self._sidecar) and file.is_file()]
        if (size := sum(file.stat().st_size for file in needed)) > self._most_bytes:
            raise Refused(
                "oversized",
                f"it has {size:,} bytes, a fine-tune of this base {self._most_bytes:,} at most",
                hint="publish the weights alone",
            )

    def _digest(self, path: Path) -> str:
        """Identify the content; "" for what cannot be parsed, which is named by its raw bytes then."""
        try:
            return weights.identity(path, self._beat, self._sidecar)
        except (Refused, headers.Incomplete):
            return ""

    def fetch(self, name: str, revision: str, into: Path, room: Callable[[int], None]) -> None:
        """Copy what the fold needs; the caller checks the content's digest."""
        del revision  # the folder only ever has its newest
        path = self.config.path / name
        try:
            found = _files_of(path) if path.is_dir() else [path]
            needed = [file for file in found if headers.is_needed(file.name, self._sidecar)]
            room(sum(file.stat().st_size for file in needed if file.is_file()))
            for file in found:
                self._beat()
                if headers.PICKLES.match(file.name):
                    (into / file.name).touch()  # its name is enough to refuse it
                elif headers.is_needed(file.name, self._sidecar):
                    if not file.is_file():
                        file.lstat()  # what was moved away meanwhile is no fault of its author
                        raise Refused(
                            "malformed", f"{file.name} is no regular file", hint="publish plain files"
                        )
                    files.copy_file(file, into / file.name, follow_symlinks=self.config.follow_symlinks)
        except OSError as exc:
            if exc.filename and Path(exc.filename).is_relative_to(into):  # ours, and no fault of the source
                raise
            raise TryAgain(
                f"{name}: {exc.filename} cannot be fetched: {exc.strerror}",
                hint="check that it is there and readable, or publish it again",
            ) from exc

    def absence(self, name: str, revision: str, digest: str) -> str:
        """See whether the folder still has this content; it only ever has its newest."""
        del revision
        path = self.config.path / name
        if not self.config.path.is_dir():
            raise TryAgain(
                f"source {self.name}: {self.config.path} is not there",
                hint="check that the folder exists, is mounted and can be read",
            )
        if not path.exists():
            return f"it is no longer in source {self.name}"
        try:
            found = weights.identity(path, self._beat, self._sidecar)
        except (OSError, Refused, headers.Incomplete) as exc:
            return f"source {self.name} has it damaged: {exc}"
        return "" if found == digest else f"source {self.name} has another revision of it now"

    def watch(self, hint: Callable[[], None]) -> Callable[[], None]:
        """Have the kernel say what comes and goes in the folder; falls back to the poll alone."""
        self._hint = hint
        self._follow_growing()
        observer = watchdog.observers.Observer()

        class Hint(watchdog.events.FileSystemEventHandler):
            def on_any_event(self, event: watchdog.events.FileSystemEvent) -> None:
                if event.event_type not in ("opened", "closed_no_write"):
                    hint()

        def unhinted() -> None:
            self._hint = None
            self._stop_following()

        try:
            observer.schedule(Hint(), str(self.config.path), recursive=False)
            observer.start()
        except OSError as exc:  # no folder yet, or no inotify watches left
            log.warning(
                "source.events_unavailable", source=self.name, error=str(exc), poll_seconds=self.config.poll
            )
            return unhinted

        def stop() -> None:
            unhinted()
            # watchdog 7.1 raises KeyError for a folder that was replaced while it was watched
            with contextlib.suppress(KeyError, OSError, RuntimeError):
                observer.stop()
                observer.join(timeout=5.0)

        return stop


def open_source(part: DirectorySource, config: Config, beat: Callable[[], None]) -> Directory:
    """Make the source."""
    sidecar = methods.sidecar(config.method)
    return Directory(part, beat, sidecar=sidecar, most_bytes=headers.most_bytes(config.base_path))


def _inside(path: Path | str) -> list[os.DirEntry[str]]:
    """List the files directly in a folder; folders inside a fine-tune are not entered."""
    with os.scandir(path) as entries:
        first = list(islice(entries, headers.MAX_FILES + 1))
    if len(first) > headers.MAX_FILES:
        many = f"it holds more than {headers.MAX_FILES:,} files"
        raise Refused("malformed", many, hint="publish the model alone, without what its training left")
    found = [entry for entry in first if not entry.is_dir(follow_symlinks=False)]
    return sorted(found, key=operator.attrgetter("name"))


def _files_of(path: Path) -> list[Path]:
    """List the files directly in a folder; none of a file."""
    return [path / entry.name for entry in _inside(path)] if path.is_dir() else []


def _fingerprint(name: str, itself: os.stat_result, inside: Sequence[os.DirEntry[str]]) -> tuple[str, float]:
    """Sum up inode, size and times of every file that matters, and give the latest modification.

    inside  the files of a folder
    """
    relevant = [(name, itself)]
    if stat.S_ISDIR(itself.st_mode):
        relevant = [(entry.name, entry.stat()) for entry in inside if not entry.name.startswith(".")]
    facts, modified = [], itself.st_mtime
    for file, found in relevant:
        if stat.S_ISREG(found.st_mode):
            facts.append((file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
            modified = max(modified, found.st_mtime)
    return hashlib.sha256(repr(facts).encode()).hexdigest(), modified


def _raw_revision(path: Path) -> str:
    """Name unreadable content by the names, sizes and first bytes of its files."""
    found = hashlib.sha256()
    for file in _files_of(path) or [path]:
        if not file.is_file():
            continue
        with open(headers.open_file(file), "rb") as opened:  # noqa: PTH123 -- a descriptor has no path
            size = os.fstat(opened.fileno()).st_size
            found.update(os.fsencode(file.name) + f"\0{size}\0".encode() + opened.read(1 << 16))
    return found.hexdigest()[:REVISION_CHARACTERS]
