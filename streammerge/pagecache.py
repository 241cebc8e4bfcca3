"""Large files read and written so that the page cache is left to others.

A daemon folds for months beside processes that serve from the same memory. What it reads once is dropped
behind it unless it was cached before, and what it writes goes past the cache where the file system allows.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from streammerge.machine import named

if TYPE_CHECKING:
    from pathlib import Path

BUFFER_BYTES = 2 << 20
TRAIL_BYTES = 16 << 20
LARGE_PAGE_BYTES = 2 << 20
LOWEST_BIT = bytes(number & 1 for number in range(256))
MAP_FAILED = ctypes.c_void_p(-1).value
LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


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
        if self._high - self._low >= TRAIL_BYTES and not self._is_kept:
            start = self._low // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES  # a large page goes whole or not at all
            os.posix_fadvise(self._descriptor, start, self._high - start, os.POSIX_FADV_DONTNEED)
            self._low = self._high

    def end(self) -> None:
        """Nothing more is read."""
        if not self._is_kept and self._high:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(descriptor: int) -> bool:
    """Whether at least half of an open file lies in the page cache; True where it cannot be told.

    Asked of the kernel without reading a byte, which would start reading ahead (mmap(2), mincore(2)).
    """
    size = os.fstat(descriptor).st_size
    if not size:
        return True
    address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, MAP_FAILED):
        return True
    try:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        if LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            return True
        return sum(bytes(pages).translate(LOWEST_BIT)) * 2 >= len(pages)
    finally:
        LIBC.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


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
                with named(path):
                    os.posix_fallocate(self._descriptor, 0, size)
        except OSError:
            self.close()
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
                    with named(self._path):
                        done += os.write(self._descriptor, view[done:])
                except OSError as exc:
                    if exc.errno != errno.EINVAL or not self._is_direct:
                        raise
                    self._leave_direct()
        self._filled = 0

    def finish(self) -> None:
        """Make the content durable."""
        self._leave_direct()  # what is left may be no whole block
        self._flush()
        with named(self._path):
            os.fsync(self._descriptor)
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file; what was not finished is not durable."""
        os.close(self._descriptor)
        self._buffer.close()
