"""Large files read and written so that the page cache is left to others.

A daemon folds for months beside processes that serve from the same memory. What it reads once is dropped
behind it unless it was cached before, and what it writes goes past the cache where the file system allows.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

BUFFER_BYTES = 2 << 20
TRAIL_BYTES = 16 << 20
PROBES = 8


class Trail:
    """What one reader of an open file leaves in the page cache: nothing, unless it lay there before."""

    def __init__(self, descriptor: int) -> None:
        """Look at what is cached before anything is read."""
        self._descriptor = descriptor
        self._is_kept = is_cached(descriptor)
        self._low = self._high = 0

    def read(self, start: int, stop: int) -> None:
        """Bytes [start, stop) were read; what lies behind is dropped now and then, for at once is slow."""
        self._low, self._high = min(self._low, start), max(self._high, stop)
        if self._high - self._low >= TRAIL_BYTES:
            self.end()

    def end(self) -> None:
        """Drop what was read since the last time."""
        if not self._is_kept and self._high > self._low:
            start = self._low // mmap.PAGESIZE * mmap.PAGESIZE
            os.posix_fadvise(self._descriptor, start, self._high - start, os.POSIX_FADV_DONTNEED)
        self._low = self._high


def is_cached(descriptor: int) -> bool:
    """Whether at least half of an open file seems to lie in the page cache; True where it cannot be told."""
    step = max(os.fstat(descriptor).st_size // PROBES, 1)
    found, byte = 0, bytearray(1)
    for number in range(PROBES):
        try:
            found += os.preadv(descriptor, [byte], number * step, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError:
            return True
    return found * 2 >= PROBES


class NewFile:
    """A new file of known size, written front to back, past the page cache where that is possible."""

    def __init__(self, path: Path, size: int) -> None:
        """Make the file and reserve its room; raises OSError with the path where there is none."""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)  # aligned, as writing past the cache demands
        self._filled = 0
        try:
            if size:
                os.posix_fallocate(self._descriptor, 0, size)
        except OSError as exc:
            self.close()
            exc.filename = exc.filename or str(path)
            raise
        self._is_direct = size >= BUFFER_BYTES and self._try_direct()

    def _try_direct(self) -> bool:
        try:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError:
            return False
        return True

    def _leave_direct(self) -> None:
        if self._is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._is_direct = False

    def write(self, content: bytes | memoryview) -> None:
        """Append; raises OSError with the path."""
        view = memoryview(content).cast("B")
        while view:
            part = view[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        with memoryview(self._buffer)[: self._filled] as view:
            done = 0
            while done < self._filled:
                try:
                    done += os.write(self._descriptor, view[done:])
                except OSError as exc:
                    if exc.errno != errno.EINVAL or not self._is_direct:
                        exc.filename = exc.filename or str(self._path)
                        raise
                    self._leave_direct()
        self._filled = 0

    def finish(self) -> None:
        """Make the content durable."""
        self._leave_direct()  # what is left may be no whole block
        self._flush()
        os.fsync(self._descriptor)
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file; what was not finished is not durable."""
        os.close(self._descriptor)
        self._buffer.close()
