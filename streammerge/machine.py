"""What the machine may withhold from work: room on the disk, a disk that works, memory.

Tells these from bugs, and says which it is with the place: the work is abandoned, nothing half is left, and
it is done again when the machine can. Knows nothing of what the work was.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.errors import DiskFails, NoMemory, NoSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FAILING = frozenset(
    {errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EUCLEAN, errno.ESTALE}
)
NO_MEMORY = (
    "can't allocate memory",
    "std::bad_alloc",
    "can't start new thread",
)  # torch's, Python's
GOES_ON = "streammerge goes on by itself"
NETWORK_FILE_SYSTEMS = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
    ]
)


@contextmanager
def errors(purpose: str, place: Path | None = None) -> Iterator[None]:
    """Turn what the machine withholds into NoSpace, DiskFails or NoMemory; every other error passes.

    `place` stands for the path where an error names none.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as exc:
        if (found := recognised(exc, purpose, place)) is None:
            raise
        raise found from exc


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError that names no file, because it came from an open one, names this one."""
    try:
        yield
    except OSError as exc:
        exc.filename = exc.filename or str(path)
        raise


def recognised(exc: Exception, purpose: str, place: Path | None) -> NoSpace | DiskFails | NoMemory | None:
    """Say what an error means for work with that purpose; None where the machine is not to blame."""
    number = exc.errno if isinstance(exc, OSError) else None
    if isinstance(exc, MemoryError) or number == errno.ENOMEM or any(w in str(exc) for w in NO_MEMORY):
        first = next(iter(str(exc).splitlines()), "none is left")
        return NoMemory(
            f"{purpose}: the memory for it is not to be had: {first}",
            hint=f"raise the limit, free some memory, or set `threads` lower; {GOES_ON} when there is enough",
        )
    if number not in FULL | FAILING:
        return None
    assert isinstance(exc, OSError)
    path = exc.filename or place
    where = f"{path} ({device(Path(os.fsdecode(path)))})" if path else "a file"
    if number in FULL:
        return NoSpace(
            f"{purpose}: {exc.strerror} while writing {where}",
            hint=f"free some disk space, or raise the quota; {GOES_ON} when there is room",
        )
    return DiskFails(
        f"{purpose}: {exc.strerror} at {where}",
        hint="look at the kernel's log and at the disk, or mount it writable again; "
        f"{GOES_ON} when the disk works",
    )


def require_space(folder: Path, needed_bytes: int, *, reserve_bytes: int, purpose: str) -> None:
    """Raise NoSpace unless `needed_bytes` fit beside the reserve on the file system of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + reserve_bytes:
        raise NoSpace(
            f"{purpose} needs {needed_bytes:,} bytes and {reserve_bytes:,} in reserve, "
            f"{folder} has {free:,} free",
            hint=f"free some disk space, lower `keep`, or move the store; {GOES_ON} when there is room",
        )


def probe(folder: Path, purpose: str) -> None:
    """Write a few bytes to a file without a name, durably; raises NoSpace or DiskFails where that fails."""
    with errors(purpose, folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())


def mount_of(path: Path) -> tuple[str, str]:
    """Name the device and the file system type that hold `path`, "unknown" where the kernel does not tell."""
    path = path.absolute()
    best, found = "", ("unknown", "unknown")
    try:
        path = path.resolve()
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        source, mount_point, kind, *_ = line.split(" ")
        mount_point = mount_point.replace("\\040", " ")
        if path.is_relative_to(mount_point) and len(mount_point) >= len(best):
            best, found = mount_point, (source, kind)
    return found


def device(path: Path) -> str:
    """Say on what a path lies, for a message."""
    source, kind = mount_of(path)
    return f"on {source}, {kind}"


def file_system(path: Path) -> str:
    """Name the file system type that holds `path`."""
    return mount_of(path)[1]
