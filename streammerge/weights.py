"""Model files: safetensors read and written one weight at a time, in bounded memory.

Knows names, shapes, dtypes and bytes; nothing of bases, deltas or merging. What a file says of itself is
bounded and proven by `headers` before anything is allocated; one file handle is used throughout, so a file
that is renamed over cannot mix two versions.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

from streammerge.errors import Refused, TryAgain
from streammerge.headers import DTYPES, Entry, WeightsSet, find, parse_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor


class Weights:
    """An open weights set: `entries` by name, and bounded reads of any part of a weight.

    With `hashing`, every weight is read front to back and hashed on the way; `content_digest` gives the
    identity. With `whole`, the one file is read front to back, weight by weight as stored, and hashed as a
    file. `stamp` recognises the very files, unchanged since they were opened, by inode, size and times.
    """

    def __init__(self, found: WeightsSet, *, hashing: bool = False, whole: bool = False) -> None:
        """Open every file and read every header."""
        self.set = found
        self._stack = ExitStack()
        self._descriptors: list[int] = []
        self._hashes: dict[str, _Running] | None = {} if hashing else None
        self.entries: dict[str, Entry] = {}
        self._file: _Running | None = None
        try:
            for number, path in enumerate(found.files):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._stack.callback(os.close, descriptor)
                self._descriptors.append(descriptor)
                for entry in parse_header(descriptor, path.name, number):
                    self._list(entry)
            self.stamp = self._stamp()
            if whole:
                self._read_head()
            if not self.entries:
                self._refuse_empty()
        except BaseException:
            self._stack.close()
            raise

    def _stamp(self) -> str:
        found = map(os.fstat, self._descriptors)
        facts = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]
        return hashlib.sha256(repr((*map(str, self.set.files), facts)).encode()).hexdigest()

    def _read_head(self) -> None:
        """Hash what stands before the first weight."""
        head = bytearray(min((e.start for e in self.entries.values()), default=self.bytes))
        pread_exactly(self._descriptors[0], head, 0, self.set.files[0])
        self._file = _Running()
        self._file.feed(0, len(head), head)

    def _refuse_empty(self) -> None:
        raise Refused("empty", f"{self.set.files[0].name} holds no weights", hint="save the model again")

    def _list(self, entry: Entry) -> None:
        if entry.name in self.entries:
            raise Refused("malformed", f"{entry.name} stands in two files", hint="remove the stale shard")
        self.entries[entry.name] = entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(os.fstat(descriptor).st_size for descriptor in self._descriptors)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements [start, stop) of a weight, flat; the whole weight in its shape without them."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        last = entry.elements if stop is None else stop
        if last == start:
            if self._hashes is not None:
                self._hashes.setdefault(name, _Running())
            return torch.empty(entry.shape if stop is None else (0,), dtype=dtype)
        buffer = bytearray((last - start) * dtype.itemsize)
        offset = entry.start + start * dtype.itemsize
        pread_exactly(self._descriptors[entry.file], buffer, offset, self.set.files[entry.file])
        if self._hashes is not None:
            self._hashes.setdefault(name, _Running()).feed(start, last, buffer)
        if self._file is not None:
            self._file.feed(offset, offset + len(buffer), buffer)
        flat = torch.frombuffer(buffer, dtype=dtype)
        return flat.reshape(entry.shape) if stop is None else flat

    @contextmanager
    def unhashed(self) -> Iterator[None]:
        """Inside, weights may be read any number of times in any order: nothing of it counts as read."""
        hashes, self._hashes = self._hashes, None
        try:
            yield
        finally:
            self._hashes = hashes

    def read_rest(self, beat: Callable[[], None] = lambda: None) -> None:
        """Hash every weight that was not read yet."""
        assert self._hashes is not None
        for name, entry in self.entries.items():
            if name not in self._hashes:
                for start, stop in element_panels(entry.elements):
                    self.read(name, start, stop)
                    beat()

    def content_digest(self) -> str:
        """Identify the model by the name, dtype, shape and bytes of every weight, and an adapter's settings.

        All weights must have been read.
        """
        assert self._hashes is not None
        lines = []
        for name, entry in sorted(self.entries.items()):
            running = self._hashes.get(name, _Running())
            assert running.position == entry.elements, f"{name} was not read to its end"
            lines.append(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0{running.sha256.hexdigest()}\n")
        if self.set.adapter is not None:
            lines.append(json.dumps(self.set.adapter, sort_keys=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def file_digest(self) -> str:
        """Give the sha256 of the one file, all of which must have been read."""
        assert self._file is not None
        assert self._file.position == self.bytes
        return str(self._file.sha256.hexdigest())

    def tensor_digest(self, name: str) -> str:
        """Hash of one weight's bytes, after it was read."""
        assert self._hashes is not None
        return str(self._hashes[name].sha256.hexdigest())


@dataclass
class _Running:
    """A hash over one weight that must be read front to back, once."""

    position: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def feed(self, start: int, stop: int, buffer: bytearray) -> None:
        assert start == self.position
        self.sha256.update(buffer)
        self.position = stop


def identity(path: Path, beat: Callable[[], None] = lambda: None, sidecar: str = "") -> str:
    """Read a fine-tune's weights once and give the digest it is known by: names, dtypes, shapes, bytes.

    `sidecar` names the file beside them, if any, that counts too.
    """
    with Weights(find(path), hashing=True) as found:
        found.read_rest(beat)
        digest = found.content_digest()
    if not sidecar or not (path / sidecar).is_file():
        return digest
    return digest_with(digest, identity(path / sidecar, beat))


def digest_with(digest: str, sidecar: str) -> str:
    """Know a fine-tune by its weights and by what came beside them."""
    return hashlib.sha256(f"{digest}\0{sidecar}".encode()).hexdigest()


def pread_exactly(descriptor: int, buffer: bytearray, offset: int, path: Path) -> None:
    """Fill `buffer` from `offset` on, or raise TryAgain where the file has become shorter."""
    view = memoryview(buffer)
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        if not got:
            raise TryAgain(
                f"{path} became shorter while it was read",
                hint="do not change a model in place; write it anew",
            )
        done += got


def element_panels(elements: int, panel: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Cut [0, elements) into runs of at most `panel`; an empty weight gives one empty run."""
    return ((start, min(start + panel, elements)) for start in range(0, max(elements, 1), panel))


class Writer:
    """Writes one safetensors file front to back, in the order declared, never holding more than a panel.

    Used as a context manager: leaving it without an error fsyncs the file; `sha256` is then its hash.
    """

    def __init__(self, path: Path, weights: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        """`weights`: (name, dtype code, shape) in the order in which they will be written."""
        self.path = path
        self._declared = list(weights)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, dtype, shape in self._declared:
            stop = position + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
            position = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._size = len(self._head) + position
        self._remaining = [(name, dtype, math.prod(shape)) for name, dtype, shape in reversed(self._declared)]
        self._hash = hashlib.sha256()
        self.sha256 = ""

    def __enter__(self) -> Self:
        self._file = self.path.open("xb", buffering=0)
        try:
            if self._size:
                os.posix_fallocate(self._file.fileno(), 0, self._size)
        except BaseException as exc:
            self._file.close()
            if isinstance(exc, OSError):
                exc.filename = exc.filename or str(self.path)
            raise
        self._put(self._head)
        return self

    def write(self, name: str, values: Tensor) -> None:
        """Write the next run of elements of `name`, which must be the next weight not yet complete."""
        while self._remaining and self._remaining[-1][2] == 0 and self._remaining[-1][0] != name:
            self._remaining.pop()
        expected, dtype, elements = self._remaining.pop()
        flat = values.reshape(-1).to(device="cpu", dtype=DTYPES[dtype]).contiguous()
        assert expected == name, f"{name} written where {expected} is next"
        assert flat.numel() <= elements
        if flat.numel():
            self._put(_bytes_of(flat))
        if flat.numel() < elements:
            self._remaining.append((name, dtype, elements - flat.numel()))

    def _put(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) or 0 :]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                left = [name for name, _, elements in self._remaining if elements]
                assert not left, f"{left} never written"
                os.fsync(self._file.fileno())
                self.sha256 = self._hash.hexdigest()


def _bytes_of(flat: Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory as bytes, without numpy and without a copy.

    The caller keeps the tensor alive.
    """
    return memoryview((ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()))
