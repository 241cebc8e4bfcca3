"""What is known of a model before any weight is read: which files hold it, and their headers, proven.

Strangers' files come in here. Everything is bounded before it is read, and a header must be consistent with
its file's size to the byte before anything is allocated for what it describes.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import Refused, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_HEADER_BYTES = 16 << 20
MAX_JSON_BYTES = 32 << 20
MAX_JSON_VALUES = 1 << 20  # a header of MAX_HEADER_BYTES with ordinary names has fewer; more is a bomb
MAX_SETTING_DEPTH = 20
MAX_NAME_CHARACTERS = 1024
MAX_DIMENSIONS = 16
MAX_FILES = 10_000  # of one fine-tune
MAX_FILE_NAME = 255
MOST_BASES = 16  # so many times the base's bytes has a float64 copy with Gram matrices beside it, at most
SMALL_BYTES = 64 << 20  # which no base is too small for
MAX_SHARDS = 512  # each is held open
LARGEST_SIZE = 1 << 64

ITEM_BYTES = {  # of the dtypes that are read, by their codes; weights.DTYPES says what torch calls them
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
UNREAD_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"})
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Keys of adapter_config.json that change what an adapter's weights mean; all others say how it came about.
ADAPTER_SETTINGS = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "fan_in_fan_out", "init_lora_weights", "use_qalora", "use_bdlora", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config", "loftq_config",
)  # fmt: skip
MARK = "streammerge.json"  # says that a model is one of our merges
READ_NAMES = frozenset({"config.json", ADAPTER_CONFIG, MARK})
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
    """The files that hold a model's weights, and which sort they are.

    `adapter` holds, for an adapter's weights, those keys of its configuration that change what they mean;
    None for a model's.
    """

    files: tuple[Path, ...]
    adapter: Mapping[str, Any] | None = None
    index: str = ""


def find(path: Path) -> WeightsSet:
    """Choose the weights set of a model folder or take a single .safetensors file.

    An index and its shards, else model.safetensors, else adapter_model.safetensors, else the one other
    .safetensors file. Raises Incomplete where a shard is missing, Refused where there is nothing to read.
    """
    if path.is_file():
        return WeightsSet((path,))
    if path.exists() and not path.is_dir():
        raise Refused("malformed", "it is no folder and no regular file", hint="give a model folder")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    if strange := [name for name in names if is_needed(name) and not is_file_name(name)]:
        raise Refused("malformed", f"{strange[0]} is no name for a file", hint="rename it")
    found = [name for name in names if name.endswith(".safetensors") and name not in SIDECARS]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if indexes:
        return _from_index(
            path, "model.safetensors.index.json" if "model.safetensors.index.json" in indexes else indexes[0]
        )
    if "model.safetensors" in found:
        return WeightsSet((path / "model.safetensors",))
    if ADAPTER_WEIGHTS in found:
        return WeightsSet((path / ADAPTER_WEIGHTS,), adapter=_adapter_settings(path / ADAPTER_CONFIG))
    if len(found) == 1:
        return WeightsSet((path / found[0],))
    if found:
        raise Refused(
            "malformed",
            f"it holds {len(found)} .safetensors files and no index: {', '.join(found[:4])}",
            hint="save it with an index (model.safetensors.index.json) or as one model.safetensors",
        )
    if pickles := [name for name in names if PICKLES.match(name)]:
        raise Refused(
            "pickle-only",
            f"it has no safetensors, only {', '.join(pickles[:4])}; pickled weights are never opened",
            hint="save it again with safe_serialization=True (safetensors)",
        )
    raise Incomplete("it holds no .safetensors file yet", hint="copy the weights in, or remove the folder")


def _adapter_settings(path: Path) -> dict[str, Any]:
    """Read what an adapter's weights mean; Incomplete while its configuration is not there yet."""
    if not path.exists():
        raise Incomplete(
            f"{ADAPTER_WEIGHTS} is there, {path.name} is not", hint=f"copy {path.name} in beside the weights"
        )
    config = read_json(path)
    settings = {key: config[key] for key in ADAPTER_SETTINGS if config.get(key)}
    if not _is_flat(settings, MAX_SETTING_DEPTH):
        raise Refused("malformed", f"{path.name} is nested too deep", hint="save the adapter again")
    return settings


def _is_flat(value: object, depth: int) -> bool:
    """Whether lists and objects in each other go no deeper than `depth`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_flat(part, depth - 1) for part in inner)


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
        if shard != Path(shard).name or not shard.endswith(".safetensors") or not is_file_name(shard):
            raise Refused(
                "malformed",
                f"{index_name} names {shard[:80]!r}, which is not a .safetensors file beside it",
                hint="an index may name only files of its own folder",
            )
    if len(shards) > MAX_SHARDS:
        raise Refused(
            "malformed", f"{index_name} names {len(shards):,} shards", hint=f"use at most {MAX_SHARDS}"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise Incomplete(
            f"{len(missing)} of {len(shards)} shards are missing, first {missing[0]}", hint="copy the rest"
        )
    return WeightsSet(tuple(folder / shard for shard in shards), index=index_name)


def most_bytes(base: Path) -> float:
    """How large the files of a fine-tune of this base can be; no bound while the base is not there."""
    try:
        return SMALL_BYTES + MOST_BASES * sum(file.stat().st_size for file in find(base).files)
    except (Incomplete, Refused, OSError):
        return math.inf


def is_needed(name: str, sidecar: str = "") -> bool:
    """Whether a fold reads the file of this name; all others stay where they were published."""
    if name in SIDECARS:
        return name == sidecar
    return name in READ_NAMES or name.endswith((".safetensors", ".safetensors.index.json"))


def is_file_name(name: str) -> bool:
    """Whether a stranger's word may stand for a file: printable, and no longer than file systems take."""
    return name.isprintable() and len(name.encode()) <= MAX_FILE_NAME


def open_file(path: Path) -> int:
    """Open a regular file, gives its descriptor; a pipe or device in its place is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused("malformed", f"{path.name} is no regular file", hint="publish plain files")
    return descriptor


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size, as data. An absent file reads as {}."""
    try:
        with open(open_file(path), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_JSON_BYTES:
                raise ValueError(f"it is larger than {MAX_JSON_BYTES:,} bytes")  # noqa: TRY301 -- worded below
            return _parse(file.read(size))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise Refused(
            "malformed", f"{path.name} is not readable JSON: {exc}", hint="save the model again"
        ) from exc


def _parse(
    text: bytes,
    *,
    integer: Callable[[str], object] | None = None,
    constant: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Read a JSON object in UTF-8; ValueError for anything else, and for what would fill the memory.

    integer, constant  read a whole number, and NaN or Infinity, in place of json's own
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ValueError(f"it holds more than {MAX_JSON_VALUES:,} values")
    try:
        content = json.loads(
            text.decode(),
            object_pairs_hook=_without_duplicates,
            parse_int=integer,
            parse_constant=constant,
        )
    except RecursionError as exc:
        raise ValueError("it is nested too deep") from exc
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")  # noqa: TRY004 -- one kind of error for its callers
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def parse_header(descriptor: int, label: str, file: int = 0) -> list[Entry]:
    """Read a safetensors header and prove it consistent with the file's size.

    Weights must tile the data exactly: sorted by offset, no gap, no overlap, each as long as its dtype and
    shape say. Raises Refused("malformed"), or Incomplete where the file ends before what the header declares.
    """
    size = os.fstat(descriptor).st_size
    header, data_start = _read_header(descriptor, label, size)
    try:
        entries = sorted(
            (_entry(name, raw, file, data_start) for name, raw in header.items()),
            key=lambda e: (e.start, e.stop),
        )
    except ValueError as exc:
        raise _lie(label, str(exc)) from exc
    position = data_start
    for entry in entries:
        if entry.start != position:
            found = f"{entry.name} starts at byte {entry.start:,} where {position:,} is next"
            raise _lie(label, f"{found}: a gap or an overlap")
        position = entry.stop
    if position > size:
        raise Incomplete(f"{label} has {size:,} of {position:,} bytes", hint="copy the whole file")
    if position < size:
        raise _lie(label, f"{size - position:,} bytes follow the last weight")
    return entries


def _lie(label: str, what: str) -> Refused:
    return Refused(
        "malformed", f"{label}: {what}", hint="the file is damaged or no safetensors file; save it again"
    )


def _read_header(descriptor: int, label: str, size: int) -> tuple[dict[str, Any], int]:
    """Read the header's JSON, bounded; gives its weights, unchecked, and the byte where the data begins."""
    if size < 8:
        raise Incomplete(f"{label} has only {size} bytes", hint="copy the whole file")
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        raise _lie(
            label, f"the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that are read"
        )
    if os.pread(descriptor, 1, 8) not in (b"{", b""):
        raise _lie(label, "no header begins at byte 8")
    if 8 + length > size:
        raise Incomplete(
            f"{label} has {size:,} bytes and its header alone needs {8 + length:,}",
            hint="copy the whole file",
        )
    text = os.pread(descriptor, length, 8)
    if len(text) < length:
        raise Incomplete(f"{label} became shorter while it was read", hint="copy the whole file")
    try:
        header = _parse(text, integer=_plain_integer, constant=_no_constant)
        _check_metadata(header.pop("__metadata__", None))
    except ValueError as exc:
        raise _lie(label, f"the header is not readable JSON: {exc}") from exc
    return header, 8 + length


def _plain_integer(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"{text[:20]} is negative")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _check_metadata(metadata: object) -> None:
    """A file's words about itself are words; nothing is done with them."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds something else than text")
    "".join((*metadata, *metadata.values())).encode()  # half a character of a pair is a ValueError


def _entry(name: str, raw: object, file: int, data_start: int) -> Entry:
    """Check one weight of a header; every message goes to the caller as ValueError."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} is not described by dtype, shape and data_offsets")
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no usable name")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if isinstance(dtype, str) and dtype in UNREAD_DTYPES:
        raise Refused("unsupported-dtype", f"{name} is stored as {dtype}", hint="publish it in bf16 or f32")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name[:80]} has dtype {str(dtype)[:20]!r}, which streammerge does not read")
    if not _are_sizes(shape, range(MAX_DIMENSIONS + 1)) or not _are_sizes(offsets, range(2, 3)):
        raise ValueError(f"{name[:80]} has an impossible shape or offset")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(
            f"{name} claims {stop - start:,} bytes, its shape {shape} of {dtype} needs another number"
        )
    return Entry(name, dtype, tuple(shape), file, data_start + start, data_start + stop)


def _are_sizes(numbers: object, lengths: range) -> bool:
    """Whether this is a list of plain sizes, not negative and not absurd, of one of these lengths."""
    return (
        isinstance(numbers, list)
        and len(numbers) in lengths
        and all(type(number) is int and 0 <= number < LARGEST_SIZE for number in numbers)
    )
