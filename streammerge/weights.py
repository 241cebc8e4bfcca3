"""Model files: safetensors read and written one weight at a time, in bounded memory.

Knows names, shapes, dtypes and bytes; nothing of bases, deltas or merging. What a file says of itself is
bounded and proven by `headers` before anything is allocated; one file handle is used throughout, so a file
that is renamed over cannot mix two versions. Hashing goes on beside reading, and writing beside the caller.

The page cache is left to others: what was not in it before is dropped after it was read, and what is written
goes past it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch

from streammerge.errors import Refused, TryAgain
from streammerge.headers import ITEM_BYTES, Entry, WeightsSet, find, open_file, parse_header
from streammerge.lanes import homeward
from streammerge.machine import named
from streammerge.pagecache import NewFile, Trail
from streammerge.streams import Behind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

MAX_WEIGHTS = 1 << 18
PANEL_ELEMENTS = 1 << 18  # as float32 it stays in a core's own cache


class Weights:
    """An open weights set: `entries` by name, and bounded reads of any part of a weight.

    With `hashing`, every weight is read front to back and hashed on the way; `content_digest` gives the
    identity. With `whole`, the one file is read front to back, weight by weight as stored, and hashed as a
    file. What is read `once`, as with these two, is not kept in the page cache. `stamp` recognises the
    very files, unchanged since they were opened, by inode, size and times.
    """

    def __init__(
        self, found: WeightsSet, *, hashing: bool = False, whole: bool = False, once: bool = False
    ) -> None:
        """Open every file and read every header."""
        self.set = found
        self._stack = ExitStack()
        self._descriptors: list[int] = []
        self._trails: dict[int, Trail] = {}
        self._is_read_once = hashing or whole or once
        self._hashing = Behind()
        self._stack.callback(self._hashing.close)
        self._hashes: dict[str, _Running] | None = {} if hashing else None
        self.entries: dict[str, Entry] = {}
        self.bring: Callable[[Tensor], Tensor] | None = None  # where to, once read; a lane, mostly
        self._file: _Running | None = None
        try:
            for number, path in enumerate(found.files):
                descriptor = open_file(path)
                self._stack.callback(os.close, descriptor)
                self._descriptors.append(descriptor)
                if self._is_read_once:
                    self._trails[descriptor] = Trail(descriptor)
                    self._stack.callback(self._trails[descriptor].end)
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
        self._file.feed(0, len(head), memoryview(head), self._hashing)

    def _refuse_empty(self) -> None:
        raise Refused("empty", f"{self.set.files[0].name} holds no weights", hint="save the model again")

    def _list(self, entry: Entry) -> None:
        if entry.name in self.entries:
            raise Refused("malformed", f"{entry.name} stands in two files", hint="remove the stale shard")
        if len(self.entries) == MAX_WEIGHTS:
            raise Refused("malformed", f"it holds more than {MAX_WEIGHTS:,} weights", hint="save it again")
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
        flat = torch.empty(last - start, dtype=dtype)
        offset, buffer = entry.start + start * dtype.itemsize, bytes_of(flat)
        descriptor = self._descriptors[entry.file]
        pread_exactly(descriptor, buffer, offset, self.set.files[entry.file])
        if self._is_read_once:
            self._trails[descriptor].read(offset, offset + len(buffer))
        if self._hashes is not None:
            self._hashes.setdefault(name, _Running()).feed(start, last, buffer, self._hashing)
        if self._file is not None:
            self._file.feed(offset, offset + len(buffer), buffer, self._hashing)
        there = self.bring(flat) if self.bring is not None else flat
        return there.reshape(entry.shape) if stop is None else there

    @contextmanager
    def unhashed(self) -> Iterator[None]:
        """Inside, weights may be read any number of times in any order: nothing of it counts as read."""
        hashes, self._hashes = self._hashes, None
        once, self._is_read_once = self._is_read_once, False
        try:
            yield
        finally:
            self._hashes, self._is_read_once = hashes, once

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
        self._hashing.finish()
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
        self._hashing.finish()
        return str(self._file.sha256.hexdigest())

    def tensor_digest(self, name: str) -> str:
        """Hash of one weight's bytes, after it was read."""
        assert self._hashes is not None
        self._hashing.finish()
        return str(self._hashes[name].sha256.hexdigest())


@dataclass
class _Running:
    """A hash over one weight that must be read front to back, once."""

    position: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def feed(self, start: int, stop: int, buffer: memoryview, hashing: Behind) -> None:
        """`buffer` must not be changed any more."""
        assert start == self.position
        hashing(partial(self.sha256.update, buffer), len(buffer))
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


def pread_exactly(descriptor: int, buffer: bytearray | memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from `offset` on, or raise TryAgain where the file has become shorter."""
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        with named(path):
            got = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        if not got:
            raise TryAgain(
                f"{path} became shorter while it was read",
                hint="do not change a model in place; write it anew",
            )
        done += got


def element_panels(elements: int, panel: int = PANEL_ELEMENTS) -> Iterator[tuple[int, int]]:
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
            stop = position + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
            position = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._size = len(self._head) + position
        self._remaining = [(name, dtype, math.prod(shape)) for name, dtype, shape in reversed(self._declared)]
        self._hash = hashlib.sha256()
        self._behind = Behind()
        self.sha256 = ""

    def __enter__(self) -> Self:
        self._file = NewFile(self.path, self._size)
        try:
            self._append(self._head)
        except BaseException:
            self._file.close()
            raise
        return self

    def write(self, name: str, values: Tensor) -> None:
        """Write the next run of elements of `name`, which must be the next weight not yet complete.

        It is written beside the caller, who must not change `values` any more; what fails is raised later.
        """
        while self._remaining and self._remaining[-1][2] == 0 and self._remaining[-1][0] != name:
            self._remaining.pop()
        expected, dtype, elements = self._remaining.pop()
        assert expected == name, f"{name} written where {expected} is next"
        assert values.numel() <= elements
        if values.numel():
            flat = values.reshape(-1).to(DTYPES[dtype]).contiguous()
            size = flat.numel() * flat.element_size()
            bring = homeward(flat)
            self._behind(lambda: self._append(bytes_of(bring())), size)
        if values.numel() < elements:
            self._remaining.append((name, dtype, elements - values.numel()))

    def _append(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        self._file.write(content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._behind.finish()
                left = [name for name, _, elements in self._remaining if elements]
                assert not left, f"{left} never written"
                self._file.finish()
                self.sha256 = self._hash.hexdigest()
        finally:
            self._behind.close()
            self._file.close()


def bytes_of(flat: Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory as bytes, without numpy and without a copy; keeps it alive."""
    memory = (ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr())
    memory.tensor = flat  # type: ignore[attr-defined]  # ctypes arrays take attributes
    return memoryview(memory).cast("B")
