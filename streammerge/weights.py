"""Model files: safetensors read and written one weight at a time, in bounded memory.

Knows names, shapes, dtypes and bytes; nothing of bases, deltas or merging. Headers are bounded and proven
consistent with the file's size before anything is allocated; one file handle is used throughout, so a file that is
renamed over cannot mix two versions.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from streammerge.errors import Refused, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from torch import Tensor

MAX_HEADER_BYTES = 32 << 20
MAX_JSON_BYTES = 64 << 20
MAX_NAME_CHARACTERS = 1024
MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
SIDECARS = frozenset({"gram.safetensors", "fisher.safetensors"})
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|ot|onnx|gguf)(\.index\.json)?$")


class Incomplete(TryAgain):
    """Files are still missing or growing."""


@dataclass(frozen=True)
class Entry:
    """One weight as a file's header declares it; `start` and `stop` are byte offsets in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether it takes part in merging."""
        return self.dtype in FLOATING


@dataclass(frozen=True)
class WeightsSet:
    """The files that hold a model's weights, and which sort they are."""

    files: tuple[Path, ...]
    is_adapter: bool = False


def find(path: Path) -> WeightsSet:
    """Choose the weights set of a model folder or take a single .safetensors file.

    An index and its shards, else model.safetensors, else adapter_model.safetensors, else the one other
    .safetensors file. Raises Incomplete where a shard is missing, Refused where there is nothing to read.
    """
    if path.is_file():
        return WeightsSet((path,))
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    found = [name for name in names if name.endswith(".safetensors") and name not in SIDECARS]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if indexes:
        return _from_index(
            path, "model.safetensors.index.json" if "model.safetensors.index.json" in indexes else indexes[0]
        )
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if name in found:
            return WeightsSet((path / name,), is_adapter=name.startswith("adapter"))
    if len(found) == 1:
        return WeightsSet((path / found[0],))
    if found:
        raise Refused(
            "malformed",
            f"{path.name} holds {len(found)} .safetensors files and no index: {', '.join(found[:4])}",
            hint="save it with an index (model.safetensors.index.json) or as one model.safetensors",
        )
    if pickles := [name for name in names if PICKLES.match(name)]:
        raise Refused(
            "pickle-only",
            f"{path.name} has no safetensors, only {', '.join(pickles[:4])}; pickled weights are never opened",
            hint="save it again with safe_serialization=True (safetensors)",
        )
    raise Incomplete(
        f"{path.name} holds no .safetensors file yet", hint="copy the weights in, or remove the folder"
    )


def _from_index(folder: Path, index_name: str) -> WeightsSet:
    weight_map = read_json(folder / index_name).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise Refused("malformed", f"{index_name} has no usable weight_map", hint="save the model again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard != Path(shard).name or shard in {"", ".", ".."} or not shard.endswith(".safetensors"):
            raise Refused(
                "malformed",
                f"{index_name} names {shard!r}, which is not a .safetensors file beside it",
                hint="an index may name only files of its own folder",
            )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise Incomplete(
            f"{len(missing)} of {len(shards)} shards are missing, first {missing[0]}", hint="copy the rest"
        )
    return WeightsSet(tuple(folder / shard for shard in shards))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size, as data. An absent file reads as {}."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise Refused(
                "malformed",
                f"{path.name} is larger than {MAX_JSON_BYTES:,} bytes",
                hint="it is no model file",
            )
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as exc:
        raise Refused(
            "malformed", f"{path.name} is not readable JSON: {exc}", hint="save the model again"
        ) from exc
    if not isinstance(content, dict):
        raise Refused("malformed", f"{path.name} holds no JSON object", hint="save the model again")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def parse_header(descriptor: int, label: str, file: int = 0) -> list[Entry]:
    """Read a safetensors header and prove it consistent with the file's size.

    Weights must tile the data exactly: sorted by offset, no gap, no overlap, each as long as its dtype and shape
    say. Raises Refused("malformed"), or Incomplete where the file ends before what the header declares.
    """

    def lie(what: str) -> Refused:
        return Refused(
            "malformed", f"{label}: {what}", hint="the file is damaged or no safetensors file; save it again"
        )

    size = os.fstat(descriptor).st_size
    if size < 8:
        raise Incomplete(f"{label} has only {size} bytes", hint="copy the whole file")
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise lie(f"the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that are read")
    if 8 + length > size:
        raise Incomplete(
            f"{label} has {size:,} bytes and its header alone needs {8 + length:,}",
            hint="copy the whole file",
        )
    try:
        header = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise lie(f"the header is not readable JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise lie("the header is no JSON object")
    header.pop("__metadata__", None)
    try:
        entries = sorted(
            (_entry(name, raw, file, 8 + length) for name, raw in header.items()),
            key=lambda e: (e.start, e.stop),
        )
    except ValueError as exc:
        raise lie(str(exc)) from exc
    position = 8 + length
    for entry in entries:
        if entry.start != position:
            raise lie(
                f"{entry.name} starts at byte {entry.start:,} where {position:,} is next: a gap or an overlap"
            )
        position = entry.stop
    if position > size:
        raise Incomplete(f"{label} has {size:,} of {position:,} bytes", hint="copy the whole file")
    if position < size:
        raise lie(f"{size - position:,} bytes follow the last weight")
    return entries


def _entry(name: str, raw: object, file: int, data_start: int) -> Entry:
    """Check one weight of a header; every message goes to the caller as ValueError."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} is not described by dtype, shape and data_offsets")
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no usable name")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype!r}, which streammerge does not read")
    whole = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in whole):
        raise ValueError(f"{name} has an impossible shape or offset")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{name} claims {stop - start:,} bytes, its shape {shape} of {dtype} needs another number"
        )
    return Entry(name, dtype, tuple(shape), file, data_start + start, data_start + stop)


class Weights:
    """An open weights set: `entries` by name, and bounded reads of any part of a weight.

    With `hashing`, every weight is read front to back and hashed on the way; `content_digest` gives the identity.
    With `whole`, the one file is read front to back, weight by weight as stored, and hashed as a file.
    """

    def __init__(self, found: WeightsSet, *, hashing: bool = False, whole: bool = False) -> None:
        """Open every file and read every header."""
        self.set = found
        self._stack = ExitStack()
        self._descriptors: list[int] = []
        self._hashes: dict[str, _Running] | None = {} if hashing else None
        self.entries: dict[str, Entry] = {}
        try:
            for number, path in enumerate(found.files):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._stack.callback(os.close, descriptor)
                self._descriptors.append(descriptor)
                for entry in parse_header(descriptor, path.name, number):
                    if entry.name in self.entries:
                        raise Refused(
                            "malformed", f"{entry.name} stands in two files", hint="remove the stale shard"
                        )
                    self.entries[entry.name] = entry
        except BaseException:
            self._stack.close()
            raise
        self._file: _Running | None = None
        if whole:
            head = bytearray(min(e.start for e in self.entries.values()) if self.entries else self.bytes)
            pread_exactly(self._descriptors[0], head, 0, found.files[0])
            self._file = _Running()
            self._file.feed(0, len(head), head)
        if not self.entries:
            self._stack.close()
            raise Refused("empty", f"{found.files[0].name} holds no weights", hint="save the model again")

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

    def read_rest(self, beat: Callable[[], None] = lambda: None) -> None:
        """Hash every weight that was not read yet."""
        assert self._hashes is not None
        for name, entry in self.entries.items():
            if name not in self._hashes:
                for start, stop in element_panels(entry.elements):
                    self.read(name, start, stop)
                    beat()

    def content_digest(self) -> str:
        """Identify the model by the name, dtype, shape and bytes of every weight, all of which must have been read."""
        assert self._hashes is not None
        lines = []
        for name, entry in sorted(self.entries.items()):
            running = self._hashes.get(name, _Running())
            assert running.position == entry.elements, f"{name} was not read to its end"
            lines.append(f"{name}\0{entry.dtype}\0{list(entry.shape)}\0{running.sha256.hexdigest()}\n")
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


def identity(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """Read a fine-tune's weights once and give the digest it is known by: names, dtypes, shapes, bytes."""
    with Weights(find(path), hashing=True) as found:
        found.read_rest(beat)
        return found.content_digest()


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


def element_panels(elements: int, panel: int = 4 << 20) -> Iterator[tuple[int, int]]:
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
    """View a contiguous CPU tensor's memory as bytes, without numpy and without a copy; keep the tensor alive."""
    return memoryview((ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()))
