"""Durable files: written under a temporary name, fsynced, renamed, and the folder fsynced.

Knows nothing of models. The invariant: after `replace_*` or `rename_folder` returns, the new name survives a
power cut with its whole content, and before it returns nobody sees a part of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from streammerge.errors import Locked
from streammerge.machine import named
from streammerge.members import Members
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK_BYTES = 8 << 20
PIECES = 64  # of a long list, written at once
PLAIN = frozenset({str, int, float, bool, type(None)})
DOOMED = ".building-removed-"  # what is being removed is hidden so, and what is being built by the first word
FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file (btrfs, xfs)


def canonical_json(value: object) -> bytes:
    """Give the one byte string for `value`: sorted keys, no spaces to spare, a final newline.

    It is what the json library writes with an indent of 1; but that does so word by word in Python, and a
    manifest lists thousands of fine-tunes. Keys are strings; of Members each is an object.
    """
    return b"".join(_pieces(value))


def write_json(path: Path, value: object) -> str:
    """Write a new file of canonical JSON and fsync it, never holding all of it; gives its sha256 digest."""
    digest = hashlib.sha256()
    with _new_file(path) as file:
        for piece in _pieces(value):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _pieces(value: object) -> Iterator[bytes]:
    yield from (piece.encode() for piece in _laid_out(value, "\n"))
    yield b"\n"


def _encode(value: object, separator: str = ", ") -> str:
    """Write on one line what C can write by itself."""
    return json.dumps(
        value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(separator, ": ")
    )


def _laid_out(value: object, line: str) -> Iterator[str]:
    """Write a value piece by piece; `line` is the newline and the indent of the line that it begins on."""
    inner = f"{line} "
    if isinstance(value, dict) and value:
        for number, (key, item) in enumerate(sorted(value.items())):
            yield f"{',' if number else '{'}{inner}{_encode(key)}: "
            yield from _laid_out(item, inner)
        yield f"{line}}}"
    elif isinstance(value, Members):
        yield from _rows((member._asdict() for member in value), line)
    elif isinstance(value, list | tuple) and all(map(_is_flat, value)):
        yield from _rows(value, line)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield f"{',' if number else '['}{inner}"
            yield from _laid_out(item, inner)
        yield f"{line}]"
    else:
        yield _encode(value)


def _is_flat(value: object) -> bool:
    """Whether it is a dict, not an empty one, of plain values."""
    return isinstance(value, dict) and bool(value) and PLAIN.issuperset(map(type, value.values()))


def _rows(rows: Iterable[object], line: str) -> Iterator[str]:
    """Write a list of what is flat, many at a time."""
    inner, deep = f"{line} ", f"{line}  "
    rest, start = iter(rows), ""
    while some := list(islice(rest, PIECES)):
        text = _encode(some, f",{deep}")
        # A string never holds a newline itself, so what looks like the place between two dicts is one.
        between = text[2:-2].replace(f"}},{deep}{{", f"{inner}}},{inner}{{{deep}")
        yield f"{start or '['}{inner}{{{deep}{between}{inner}}}"
        start = ","
    yield f"{line}]" if start else "[]"


def sha256_file(path: Path) -> str:
    """Hash a file in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and fsync it; the caller makes the name durable."""
    with _new_file(path) as file:
        file.write(content)


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    with named(path), path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    write_file(temporary, content)
    temporary.replace(path)
    fsync_folder(path.parent)


def make_folder(path: Path, mode: int) -> None:
    """Make a folder that never has another mode than this, whatever the umask; its parents as usual."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.mkdir(exist_ok=True)
    temporary.chmod(mode)
    temporary.rename(path)


def replace_link(link: Path, target: str) -> None:
    """Point the symlink `link` at `target` in one step that readers cannot see half of."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    fsync_folder(link.parent)


def rename_folder(source: Path, target: Path) -> None:
    """Move a folder within its file system and make both parents durable.

    A sealed folder is read-only, and moving a folder to another parent rewrites its `..`: it is opened for
    that moment and closed again (`protect` at start repairs a kill in between).
    """
    mode = stat.S_IMODE(source.stat().st_mode)
    source.chmod(mode | stat.S_IWUSR)
    source.rename(target)
    target.chmod(mode)
    fsync_folder(target.parent)
    fsync_folder(source.parent)


def fsync_tree(folder: Path) -> None:
    """Make every name below `folder` durable; the files themselves were fsynced when written."""
    for directory, _, _ in os.walk(folder):
        fsync_folder(Path(directory))


def protect(folder: Path) -> None:
    """Make a sealed folder read-only: folders 0555, files 0444."""
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            if stat.S_IMODE(path.stat().st_mode) != 0o444:
                path.chmod(0o444)
        if stat.S_IMODE(Path(directory).stat().st_mode) != 0o555:
            Path(directory).chmod(0o555)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, sealed or not; a folder that is already gone is no error.

    It is renamed to a hidden name first, so that a kill in the middle leaves nothing that looks whole.
    """
    if not folder.exists():
        return
    doomed = folder
    if not folder.name.startswith("."):
        doomed = folder.with_name(f"{DOOMED}{folder.name}")
        remove_tree(doomed)
        folder.chmod(0o755)
        folder.rename(doomed)
        reached("hidden")
    for directory, _, _ in os.walk(doomed):
        Path(directory).chmod(0o755)
    shutil.rmtree(doomed)


def empty_folder(folder: Path) -> None:
    """Remove what lies in a folder that is still being built."""
    shutil.rmtree(folder)
    folder.mkdir()


def tree_bytes(folder: Path) -> int:
    """Sum the sizes of all files below `folder`, in which others may work meanwhile."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(directory, name).lstat().st_size
    return total


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive flock on `path`, or raise Locked naming the holder.

    The kernel drops the lock with the process, however that ends.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise Locked(
                f"the store is in use by {lock_holder(path)}",
                hint="stop that process first, or give this daemon a store of its own",
            ) from exc
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def lock_holder(path: Path) -> str:
    """Say who last took the lock."""
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"


def copy_file(source: Path, target: Path, *, follow_symlinks: bool) -> None:
    """Copy a regular file, as long as it is now, and fsync the copy; shares blocks where the system can."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_symlinks else os.O_NOFOLLOW)
    descriptor = os.open(source, flags)
    with (
        open(descriptor, "rb") as opened,  # noqa: PTH123 -- a descriptor has no path
        named(target),
        target.open("xb") as written,
    ):
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "is no regular file", str(source))
        try:
            fcntl.ioctl(written.fileno(), FICLONE, descriptor)
        except OSError:
            left = found.st_size  # one that grows for ever would fill the disk
            while chunk := _read(opened, source, min(left, CHUNK_BYTES)):
                written.write(chunk)
                left -= len(chunk)
        written.flush()
        os.fsync(written.fileno())


def _read(opened: IO[bytes], source: Path, size: int) -> bytes:
    with named(source):
        return opened.read(size)
