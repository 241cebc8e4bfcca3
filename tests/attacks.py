"""Attacks, one small one each: what a file, an index, an adapter or a folder may say that is not so.

`HEADERS`, `WEIGHT_MAPS`, `INDEXES`, `ADAPTERS` and `CONFIGS` are documents; `FOLDERS` are whole fine-tunes
laid into a folder, each with the word for where it must end. The same ones are given to the parsers, to a
running daemon, and to the fuzzer as seeds.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import models
import torch
from models import NORM, SQUARE
from safetensors.torch import save

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

from streammerge.headers import MAX_FILES, MAX_HEADER_BYTES, MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_SHARDS

SHARD = "model-00001-of-00002.safetensors"


def file(header: Any, data: bytes = b"") -> bytes:
    """Put a safetensors file together from a header, as JSON or as it stands, and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def weight(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    """Describe one weight."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def without(key: str) -> dict[str, Any]:
    """Describe one weight, leaving something out."""
    return {name: value for name, value in weight().items() if name != key}


FOUR = b"\0\0\x80\x3f"
DIGITS = b"9" * 4300  # the most that Python converts


def digits(shape: bytes, offsets: bytes) -> bytes:
    """Describe one weight by numbers as they are written."""
    return file(b'{"w":{"dtype":"F32","shape":[%b],"data_offsets":[%b]}}' % (shape, offsets), FOUR)


def zipped(content: bytes) -> bytes:
    """Put a file into an archive, as numpy and PyTorch do."""
    where = io.BytesIO()
    with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/model", content)
    return where.getvalue()


LIES = {
    "header-2-to-63": (1 << 63).to_bytes(8, "little") + b"{}",
    "header-all-ones": b"\xff" * 8 + b"{}",
    "header-over-limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "header-empty": file(b""),
    "header-not-json": file(b"MZ\x90\0 this is no header"),
    "header-invalid-utf8": file(b'{"\xff\xfe": 1}'),
    "header-cut-json": file(b'{"w": {"dtype": "F32"'),
    "header-list": file([weight()], FOUR),
    "header-number": file(7),
    "header-null": file(b"null"),
    "header-string": file('"w"'),
    "header-deep-list": file(b"[" * 100_000),
    "header-deep-object": file(b'{"w":' * 100_000),
    "header-deep-shape": file(b'{"w":{"dtype":"F32","data_offsets":[0,4],"shape":' + b"[" * 90_000 + b"}}"),
    "name-twice": file(b'{"w":%b,"w":%b}' % ((json.dumps(weight()).encode(),) * 2), FOUR),
    "key-twice": file(b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "overlapping": file({"a": weight([2], [0, 8]), "b": weight([2], [4, 12])}, b"\0" * 12),
    "same-bytes-twice": file({"a": weight(), "b": weight()}, FOUR),
    "gap-before": file({"w": weight([1], [4, 8])}, b"\0" * 8),
    "gap-between": file({"a": weight([1], [0, 4]), "b": weight([1], [8, 12])}, b"\0" * 12),
    "offset-negative": file({"w": weight([1], [-4, 0])}, FOUR),
    "offsets-reversed": file({"w": weight([1], [4, 0])}, FOUR),
    "shape-negative": file({"w": weight([-1, -1], [0, 4])}, FOUR),
    "shape-overflows-to-0": file({"w": weight([1 << 32, 1 << 32], [0, 0])}),
    "shape-overflows-to-4": file({"w": weight([(1 << 64) + 1], [0, 4])}, FOUR),
    "shape-17-dimensions": file({"w": weight([1] * 17)}, FOUR),
    "shape-bool": file({"w": weight([True])}, FOUR),
    "shape-float": file({"w": weight([1.0])}, FOUR),
    "shape-nan": file(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR),
    "shape-string": file({"w": weight("1")}, FOUR),
    "shape-null": file({"w": weight(None)}, FOUR),
    "shape-number": file({"w": weight(1)}, FOUR),
    "shape-object": file({"w": weight({"0": 1})}, FOUR),
    "offset-bool": file({"w": weight([1], [False, 4])}, FOUR),
    "offset-float": file({"w": weight([1], [0.0, 4.0])}, FOUR),
    "offset-infinite": file(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}', FOUR),
    "offset-string": file({"w": weight([1], ["0", "4"])}, FOUR),
    "offsets-string": file({"w": weight([1], "04")}, FOUR),
    "offsets-number": file({"w": weight([1], 4)}, FOUR),
    "offsets-null": file({"w": weight([1], None)}, FOUR),
    "offsets-object": file({"w": weight([1], {"0": 0, "1": 4})}, FOUR),
    "offsets-one": file({"w": weight([1], [0])}, FOUR),
    "offsets-three": file({"w": weight([1], [0, 4, 8])}, FOUR),
    "offset-too-many-digits": digits(b"0", b"9%b,9%b" % (DIGITS, DIGITS)),
    "offset-most-digits": digits(b"0", b"%b,%b" % (DIGITS, DIGITS)),
    "shape-most-digits": digits(b"%b,%b" % (DIGITS, DIGITS), b"0,4"),
    "dtype-unknown": file({"w": weight(dtype="F33")}, FOUR),
    "dtype-lower-case": file({"w": weight(dtype="f32")}, FOUR),
    "dtype-null": file({"w": weight(dtype=None)}, FOUR),
    "dtype-number": file({"w": weight(dtype=4)}, FOUR),
    "dtype-list": file({"w": weight(dtype=["F32"])}, FOUR),
    "dtype-object": file({"w": weight(dtype={"F32": 1})}, FOUR),
    "dtype-huge": file({"w": weight(dtype="F" * 1_000_000)}, FOUR),
    "dtype-size-lie": file({"w": weight(dtype="F64")}, FOUR),
    "entry-list": file({"w": ["F32", [1], [0, 4]]}, FOUR),
    "entry-null": file({"w": None}, FOUR),
    "entry-without-dtype": file({"w": without("dtype")}, FOUR),
    "entry-without-shape": file({"w": without("shape")}, FOUR),
    "entry-without-offsets": file({"w": without("data_offsets")}, FOUR),
    "entry-with-more": file({"w": weight(device="cuda")}, FOUR),
    "bytes-at-the-end": file({"w": weight()}, FOUR + b"\0"),
    "bytes-after-nothing": file({}, FOUR),
    "name-empty": file({"": weight()}, FOUR),
    "name-newline": file({"w\n": weight()}, FOUR),
    "name-nul": file({"w\0": weight()}, FOUR),
    "name-terminal-escape": file({"\x1b[31mw": weight()}, FOUR),
    "name-right-to-left": file({"w\u202egnp": weight()}, FOUR),
    "name-lone-surrogate": file(b'{"\\ud800":%b}' % json.dumps(weight()).encode(), FOUR),
    "name-10-kB": file({"w" * 10_000: weight()}, FOUR),
    "header-100-MB": (100 << 20).to_bytes(8, "little") + b"{}",
    "header-of-values": file(b'{"w":[' + b"0," * MAX_JSON_VALUES + b"0]}"),
    "header-utf-16": file(json.dumps({"w": weight()}).encode("utf-16"), FOUR),
    "header-utf-8-mark": file(b"\xef\xbb\xbf" + json.dumps({"w": weight()}).encode(), FOUR),
    "header-space-first": file(b" " + json.dumps({"w": weight()}).encode(), FOUR),
    "header-nul-padded": file(json.dumps({"w": weight()}).encode() + b"\0", FOUR),
    "metadata-number": file({"__metadata__": {"a": 1}, "w": weight()}, FOUR),
    "metadata-nan": file(b'{"__metadata__":{"a":NaN},"w":%b}' % json.dumps(weight()).encode(), FOUR),
    "metadata-list": file({"__metadata__": ["a"], "w": weight()}, FOUR),
    "metadata-half-character": file(
        b'{"__metadata__":{"a":"\\ud800"},"w":%b}' % json.dumps(weight()).encode(), FOUR
    ),
    "offset-minus-zero": digits(b"1", b"-0,4"),
    "gzip": gzip.compress(file({"w": weight()}, FOUR), mtime=0),
    "gzip-bomb": gzip.compress(bytes(1 << 20), mtime=0),
    "zip": zipped(file({"w": weight()}, FOUR)),
    "pickle": b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R." + b"\0" * 64,
    "pickle-in-zip": b"PK\x03\x04\0\0\x08\x08\0\0" + b"archive/data.pkl" + b"\0" * 64,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 64,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n",
    "html": b"<!doctype html><title>404</title><p>Not found</p>",
}  # fmt: skip

UNFINISHED = {
    "no-bytes": b"",
    "seven-bytes": b"\x10\0\0\0\0\0\0",
    "header-longer-than-file": (1000).to_bytes(8, "little") + b'{"w":',
    "data-cut": file({"w": weight([2], [0, 8])}, b"\0" * 7),
    "data-absent": file({"w": weight()}),
    "data-of-an-exabyte": file({"w": weight([1 << 60], [0, 1 << 62])}, FOUR),
}

EMPTY = {
    "no-weights": file({}),
    "metadata-only": file({"__metadata__": {"format": "pt"}}),
}

UNREAD = {
    f"dtype-{code.lower()}": file({"w": weight(dtype=code)}, FOUR)
    for code in ("F4", "F6_E2M3", "F8_E8M0", "F8_E4M3FNUZ", "C64")
}

# What a header's file must end as: a reason, or "waiting".
HEADERS: dict[str, tuple[str, bytes]] = {
    **{name: ("malformed", content) for name, content in LIES.items()},
    **{name: ("waiting", content) for name, content in UNFINISHED.items()},
    **{name: ("empty", content) for name, content in EMPTY.items()},
    **{name: ("unsupported-dtype", content) for name, content in UNREAD.items()},
}

WEIGHT_MAPS: dict[str, Any] = {
    "parent": {"w": "../../etc/passwd"},
    "parent-safetensors": {"w": "../model.safetensors"},
    "absolute": {"w": "/etc/passwd"},
    "absolute-safetensors": {"w": "/tmp/model.safetensors"},
    "subfolder": {"w": "sub/model.safetensors"},
    "this-folder": {"w": "./model.safetensors"},
    "trailing-slash": {"w": "model.safetensors/"},
    "backslash-parent": {"w": "..\\..\\model.bin"},
    "nul": {"w": "model\0.safetensors"},
    "newline": {"w": "model\n.safetensors"},
    "dots": {"w": ".."},
    "nothing": {"w": ""},
    "pickle": {"w": "pytorch_model.bin"},
    "number": {"w": 7},
    "null": {"w": None},
    "list": {"w": ["model.safetensors"]},
    "one-good-one-bad": {"a": SHARD, "w": "../secret.safetensors"},
    "name-too-long": {"w": "x" * 5000 + ".safetensors"},
    "name-of-a-megabyte": {"w": "x" * (1 << 20)},
    "map-list": [SHARD],
    "map-string": SHARD,
    "map-null": None,
    "map-empty": {},
}

INDEXES = {
    "not-json": b"<!doctype html>",
    "no-bytes": b"",
    "list": b"[]",
    "no-map": b'{"metadata": {"total_size": 4}}',
    "deep": b'{"weight_map":' * 50_000,
    "invalid-utf8": b'{"weight_map": {"\xff": "m.safetensors"}}',
    "map-twice": b'{"weight_map": {"w": "a.safetensors"}, "weight_map": {"w": "b.safetensors"}}',
    "name-twice": b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}',
}

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
DEEP = b"[" * 100_000
SLOW = "could take for ever"


def adapter_config(**settings: Any) -> bytes:
    """Write the configuration of a plain LoRA adapter, with some settings changed."""
    return json.dumps({**LORA, **settings}).encode()


def pattern(key: str) -> bytes:
    """Write a configuration whose rank_pattern has this regular expression."""
    return adapter_config(rank_pattern={key: 4})


# adapter_config.json beside good factors of rank 4 -> the reason, or "folded"
ADAPTERS: dict[str, tuple[str, bytes]] = {
    "rank-2-to-31": ("malformed", adapter_config(r=1 << 31)),
    "rank-2-to-31-by-pattern": ("malformed", adapter_config(rank_pattern={"q_proj": 1 << 31})),
    "rank-4000-digits": ("malformed", adapter_config(r=10**4000)),
    "rank-5000-digits": ("malformed", b'{"peft_type":"LORA","r":' + b"9" * 5000 + b"}"),
    "rank-zero": ("malformed", adapter_config(r=-1)),
    "rank-fraction": ("malformed", adapter_config(r=4.5)),
    "rank-list": ("malformed", adapter_config(r=[4])),
    "rank-other": ("malformed", adapter_config(r=5)),
    "alpha-1e308": ("non-finite", adapter_config(lora_alpha=1e308)),
    "alpha-1e400": ("malformed", b'{"peft_type":"LORA","r":4,"lora_alpha":1e400}'),
    "alpha-nan": ("malformed", b'{"peft_type":"LORA","r":4,"lora_alpha":NaN}'),
    "alpha-word": ("malformed", adapter_config(lora_alpha="high")),
    "alpha-400-digits": ("malformed", adapter_config(lora_alpha=10**400)),
    "alpha-pattern-infinite": (
        "malformed",
        b'{"peft_type":"LORA","r":4,"alpha_pattern":{"q_proj":Infinity}}',
    ),
    "kind-half-character": ("unsupported-adapter", b'{"peft_type":"\\ud800"}'),
    "kind-escape": ("unsupported-adapter", adapter_config(peft_type="\x1b[31mLORA\n")),
    "kind-list": ("unsupported-adapter", adapter_config(peft_type=["LORA"])),
    "kind-absent": ("unsupported-adapter", b"{}"),
    "init-changes-base": ("unsupported-adapter", b'{"peft_type":"LORA","init_lora_weights":"pissa\\ud800"}'),
    "setting-deep": ("malformed", b'{"peft_type":"LORA","loftq_config":' + b"[" * 900 + b"]" * 900 + b"}"),
    "setting-unsupported": ("unsupported-adapter", adapter_config(layer_replication=[[0, 1]])),
    "patterns-list": ("malformed", adapter_config(rank_pattern=[1])),
    "patterns-5000": ("malformed", adapter_config(rank_pattern={f"m{n}": 4 for n in range(5000)})),
    "pattern-name-1-MB": ("malformed", adapter_config(rank_pattern={"x" * (1 << 20): -1})),
    "pattern-of-a-megabyte": ("unsupported-adapter", pattern("x" * (1 << 20))),
    "pattern-no-pattern": ("malformed", pattern("q_proj(")),
    "pattern-flags-inside": ("unsupported-adapter", pattern("(?i)q_proj")),
    "pattern-look-behind": ("unsupported-adapter", pattern("(?<=a)q_proj")),
    "pattern-comment": ("unsupported-adapter", pattern("(?x:(.+)#\n+)z")),
    "pattern-nested-quantifiers": ("unsupported-adapter", pattern("(a+)+z")),
    "pattern-50000-groups": ("unsupported-adapter", pattern("(" * 50_000)),
    "pattern-huge-repeat": ("malformed", pattern("a{99999999999999}")),
    "pattern-optional-bomb": ("unsupported-adapter", pattern(".?" * 60 + "z")),
    "pattern-choice-bomb": ("unsupported-adapter", pattern("(.|.)" * 38)),
    "pattern-counted-bomb": ("unsupported-adapter", pattern(".{0,9}" * 30 + "z")),
    "pattern-star-bomb": ("unsupported-adapter", pattern(".*" * 9 + "z")),
    "target-modules-bomb": ("folded", adapter_config(target_modules="(a+)+" * 1000)),
    "config-deep": ("malformed", b'{"peft_type":' + DEEP),
    "config-utf-16": ("malformed", json.dumps(LORA).encode("utf-16")),
    "config-twice": ("malformed", b'{"peft_type":"LORA","r":4,"r":8}'),
    "config-of-values": ("malformed", b'{"a":[' + b"0," * MAX_JSON_VALUES + b"0]}"),
}

# config.json beside good weights -> the reason
CONFIGS: dict[str, bytes] = {
    "deep": b'{"a":' + DEEP,
    "deep-object": b'{"a":' * 100_000,
    "not-json": b"<!doctype html>",
    "list": b"[]",
    "digits": b'{"hidden_size":' + b"9" * 5000 + b"}",
    "twice": b'{"hidden_size":1,"hidden_size":2}',
    "utf-16": b'{"hidden_size":1}'.decode().encode("utf-16"),
    "mark": b"\xef\xbb\xbf{}",
    "latin-1": b'{"a":"\xe9"}',
    "values": b'{"a":[' + b"[]," * (MAX_JSON_VALUES // 2) + b"[]]}",
}


@dataclass(frozen=True)
class Attack:
    """A hostile fine-tune.

    lay   writes it at a path that is not there yet, given the base's tensors
    ends  where it must end: a reason, "waiting", "folded", or "" for what is not even seen
    """

    ends: str
    lay: Callable[[Path, Mapping[str, Tensor]], None]


def tuned(base: Mapping[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Give a good fine-tune's tensors, to be spoiled."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: values + 0.02 * torch.randn(values.shape, generator=random).to(values.dtype)
        if values.is_floating_point()
        else values
        for name, values in base.items()
    }


def seed_of(place: Path) -> int:
    """Give each fine-tune other values: what is the same twice is refused as a duplicate."""
    return zlib.crc32(os.fsencode(place.name))


def factors(base: Mapping[str, Tensor], seed: int = 1, rank: int = 4) -> dict[str, Tensor]:
    """Give a good adapter's tensors for one weight."""
    random = torch.Generator().manual_seed(seed)
    out, inner = base[SQUARE].shape
    stem = "base_model.model." + SQUARE.removesuffix(".weight")
    return {
        f"{stem}.lora_A.weight": torch.randn(rank, inner, generator=random) * 0.1,
        f"{stem}.lora_B.weight": torch.randn(out, rank, generator=random) * 0.1,
    }


def _file(content: bytes) -> Callable[[Path, Mapping[str, Tensor]], None]:
    """A folder with this as model.safetensors."""

    def lay(place: Path, _base: Mapping[str, Tensor]) -> None:
        place.mkdir()
        (place / "model.safetensors").write_bytes(content)

    return lay


def _tensors(spoil: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Callable[..., None]:
    """A whole fine-tune, spoiled."""

    def lay(place: Path, base: Mapping[str, Tensor]) -> None:
        models.save(place, spoil(tuned(base, seed_of(place))))

    return lay


def _beside(name: str, content: bytes) -> Callable[..., None]:
    """A good fine-tune with one more file, or one replaced."""

    def lay(place: Path, base: Mapping[str, Tensor]) -> None:
        models.save(place, tuned(base, seed_of(place)))
        (place / name).write_bytes(content)

    return lay


def _changed(change: Callable[[Path], None]) -> Callable[..., None]:
    """A good fine-tune to which something is done."""

    def lay(place: Path, base: Mapping[str, Tensor]) -> None:
        models.save(place, tuned(base, seed_of(place)))
        change(place)

    return lay


def _adapter(
    config: bytes, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict
) -> Callable[..., None]:
    """An adapter with this configuration."""

    def lay(place: Path, base: Mapping[str, Tensor]) -> None:
        place.mkdir()
        if config:
            (place / "adapter_config.json").write_bytes(config)
        (place / "adapter_model.safetensors").write_bytes(save(dict(change(factors(base, seed_of(place))))))

    return lay


STEM = SQUARE.removesuffix(".weight")


def _alone(name: str, *shape: int) -> Callable[..., None]:
    """An adapter that holds one tensor."""
    return _adapter(adapter_config(), lambda _good: {f"base_model.model.{name}": torch.ones(*shape)})


def _pair(module: str, inner: int, out: int, **more: int) -> Callable[..., None]:
    """An adapter of one module, with vectors besides."""
    shapes = {
        ".lora_A.weight": (4, inner),
        ".lora_B.weight": (out, 4),
        **{n: (size,) for n, size in more.items()},
    }
    made = {f"base_model.model.{module}{end}": torch.ones(*shape) for end, shape in shapes.items()}
    return _adapter(adapter_config(), lambda _good: made)


def _index(content: bytes) -> Callable[..., None]:
    def lay(place: Path, base: Mapping[str, Tensor]) -> None:
        models.save(place, tuned(base, seed_of(place)), shards=2)
        (place / models.INDEX).write_bytes(content)

    return lay


def last(
    value: float, dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Spoil the last element of the file's last weight; all of them are of this dtype."""

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        found[NORM] = found[NORM].clone()
        found[NORM].view(-1)[-1] = value
        return found

    return spoil


def sparse(size: int) -> Callable[..., None]:
    """A file whose header is true and whose zeros take no disk."""

    def lay(place: Path, _base: Mapping[str, Tensor]) -> None:
        place.mkdir()
        with (place / "model.safetensors").open("wb") as written:
            written.write(file({"w": weight([size // 4], [0, size])}))
            written.truncate(written.tell() + size)

    return lay


def replace_by(make: Callable[[Path], None], name: str = "model.safetensors") -> Callable[[Path], None]:
    """Put something else where a file was."""

    def change(place: Path) -> None:
        (place / name).unlink()
        make(place / name)

    return change


def _socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:  # its path is too long for a socket's address
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def _many(place: Path) -> None:
    for number in range(MAX_FILES + 1):
        (place / f"{number}.txt").touch()


def _deep(place: Path) -> None:
    here = os.open(place, os.O_RDONLY)
    try:
        for _ in range(600):  # deeper than any path is long
            os.mkdir("a" * 10, dir_fd=here)
            inner = os.open("a" * 10, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
    finally:
        os.close(here)


def _moved(place: Path) -> None:
    (place / "weights").write_bytes((place / "model.safetensors").read_bytes())


def _linked(target: str) -> Callable[[Path], None]:
    return replace_by(lambda path: path.symlink_to(target))


def _named(name: bytes) -> Callable[[Path], None]:
    """Put a file of this name into it."""
    return lambda place: (place / os.fsdecode(name)).touch()


def _weights_named(name: bytes) -> Callable[[Path], None]:

    def change(place: Path) -> None:
        (place / "model.safetensors").rename(place / os.fsdecode(name))

    return change


def _both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        for one in changes:
            one(place)

    return change


def _wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Factors of a rank that would take more memory than any weight."""
    (a, first), (b, second) = tensors.items()
    return {a: torch.zeros(2000, first.shape[1]), b: torch.zeros(second.shape[0], 2000)}


NAN, INFINITE = float("nan"), float("inf")
FOLDERS: dict[str, Attack] = {
    **{f"header-{name}": Attack(ends, _file(content)) for name, (ends, content) in HEADERS.items()},
    **{
        f"map-{name}": Attack("malformed", _index(json.dumps({"weight_map": found}).encode()))
        for name, found in WEIGHT_MAPS.items()
    },
    **{f"index-{name}": Attack("malformed", _index(content)) for name, content in INDEXES.items()},
    **{f"adapter-{name}": Attack(ends, _adapter(content)) for name, (ends, content) in ADAPTERS.items()},
    **{
        f"config-{name}": Attack("malformed", _beside("config.json", content))
        for name, content in CONFIGS.items()
    },
    "map-500-shards": Attack(
        "waiting",
        _index(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(500)}}).encode()),
    ),
    "map-2000-shards": Attack(
        "malformed",
        _index(
            json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(4 * MAX_SHARDS)}}).encode()
        ),
    ),
    "index-of-values": Attack(
        "malformed",
        _index(b'{"weight_map":{' + b",".join(b'"%d":"a"' % n for n in range(MAX_JSON_VALUES)) + b"}}"),
    ),
    "index-too-long": Attack(
        "malformed", _changed(lambda place: os.truncate(_touch(place / models.INDEX), MAX_JSON_BYTES + 1))
    ),
    "config-too-long": Attack(
        "malformed", _changed(lambda place: os.truncate(place / "config.json", MAX_JSON_BYTES + 1))
    ),
    "nan-last-float32": Attack("non-finite", _tensors(last(NAN))),
    "nan-last-bfloat16": Attack("non-finite", _tensors(last(NAN, torch.bfloat16))),
    "nan-last-float16": Attack("non-finite", _tensors(last(NAN, torch.float16))),
    "nan-last-float64": Attack("non-finite", _tensors(last(NAN, torch.float64))),
    "nan-last-float8": Attack("quantised", _tensors(last(NAN, torch.float8_e4m3fn))),
    "infinite-last": Attack("non-finite", _tensors(last(INFINITE))),
    "minus-infinite-last": Attack("non-finite", _tensors(last(-INFINITE, torch.bfloat16))),
    "float64-beyond-float32": Attack("non-finite", _tensors(last(1e300, torch.float64))),
    "float32-largest": Attack("implausible", _tensors(last(3.4e38))),
    "denormal-last": Attack("folded", _tensors(last(1e-40))),
    "denormal-last-float16": Attack("folded", _tensors(last(6e-8, torch.float16))),
    "minus-zero-last": Attack("folded", _tensors(last(-0.0))),
    "base-itself": Attack("zero-delta", models.save),
    "size-1-TB": Attack("oversized", sparse(1 << 40)),
    "size-8-EB": Attack("waiting", _file(file({"w": weight([1 << 61], [0, 1 << 63])}))),
    "no-file-pipe": Attack("waiting", _changed(replace_by(os.mkfifo))),
    "no-file-socket": Attack("waiting", _changed(replace_by(_socket))),
    "no-file-folder": Attack("waiting", _changed(replace_by(os.mkdir))),
    "config-pipe": Attack("malformed", _changed(replace_by(os.mkfifo, "config.json"))),
    "config-folder": Attack("folded", _changed(replace_by(os.mkdir, "config.json"))),
    "link-outside": Attack("symlink", _changed(_linked("/etc/passwd"))),
    "link-inside": Attack("symlink", _changed(_both(_moved, _linked("weights")))),
    "link-loop": Attack("symlink", _changed(_linked("model.safetensors"))),
    "link-device": Attack("symlink", _changed(_linked("/dev/zero"))),
    "link-config": Attack(
        "symlink", _changed(replace_by(lambda path: path.symlink_to("/etc/passwd"), "config.json"))
    ),
    "link-index": Attack("symlink", _changed(lambda place: (place / models.INDEX).symlink_to("/dev/zero"))),
    "link-folder": Attack("symlink", lambda place, _base: place.symlink_to("/etc")),
    "link-itself": Attack("symlink", lambda place, _base: place.symlink_to(place.name)),
    "link-named-half-character": Attack(
        "symlink", _changed(lambda place: (place / os.fsdecode(b"\xff\n")).symlink_to("x"))
    ),
    "files-too-many": Attack("malformed", _changed(_many)),
    "folders-deep": Attack("folded", _changed(_deep)),
    "file-named-bytes": Attack("folded", _changed(_named(b"\xff\x1b[31m\n.txt"))),
    "file-named-bytes-of-a-lie": Attack(
        "malformed", _changed(_both(_named(b"\xff.txt"), replace_by(lambda p: _spit(p, b"MZ" * 99))))
    ),
    "weights-named-bytes": Attack("malformed", _changed(_weights_named(b"\xff.safetensors"))),
    "weights-named-newline": Attack("malformed", _changed(_weights_named(b"a\n.safetensors"))),
    "index-named-bytes": Attack("malformed", _changed(_named(b"\xff.safetensors.index.json"))),
    "pickle-named-bytes": Attack("pickle-only", _changed(_weights_named(b"\xff.bin"))),
    "two-without-index": Attack(
        "malformed", _changed(_both(_weights_named(b"a.safetensors"), _named(b"b.safetensors")))
    ),
    "own-merge": Attack("own-merge", _beside("streammerge.json", b"{}")),
    "own-merge-nonsense": Attack("own-merge", _beside("streammerge.json", DEEP)),
    "own-merge-pipe": Attack("malformed", _changed(lambda place: os.mkfifo(place / "streammerge.json"))),
    "code-beside": Attack("folded", _beside("modeling_evil.py", b"raise SystemExit")),
    "tokenizer-beside": Attack("folded", _beside("tokenizer.json", b'{"evil": true}')),
    "adapter-rank-2000": Attack("unsupported-adapter", _adapter(adapter_config(r=2000), _wide)),
    "adapter-nan": Attack(
        "non-finite", _adapter(adapter_config(), lambda t: {n: torch.full_like(v, NAN) for n, v in t.items()})
    ),
    "adapter-product-overflows": Attack(
        "implausible",
        _adapter(adapter_config(), lambda t: {n: torch.full_like(v, 1e30) for n, v in t.items()}),
    ),
    "adapter-zero": Attack(
        "zero-delta", _adapter(adapter_config(), lambda t: {n: torch.zeros_like(v) for n, v in t.items()})
    ),
    "adapter-of-integers": Attack("unsupported-dtype", _alone(models.BUFFER, 1, 12)),
    "adapter-of-a-vector": Attack("unsupported-adapter", _pair("model.norm", 16, 1)),
    "adapter-bias-of-nothing": Attack("malformed", _alone("model.layers.0.up_proj.lora_B.bias", 48)),
    "adapter-magnitude-of-nothing": Attack("malformed", _alone(STEM + ".lora_magnitude_vector", 16)),
    "adapter-magnitude-too-short": Attack(
        "wrong-shape", _pair(STEM, 16, 16, **{".lora_magnitude_vector": 5})
    ),
    "adapter-magnitude-of-embedding": Attack(
        "unsupported-adapter", _pair("model.embed_tokens", 16, 40, **{".lora_magnitude_vector": 40})
    ),
    "adapter-twice": Attack(
        "malformed",
        _adapter(
            adapter_config(),
            lambda t: {**t, **{n.removeprefix("base_model.model."): v.clone() for n, v in t.items()}},
        ),
    ),
    "adapter-one-factor": Attack(
        "malformed", _adapter(adapter_config(), lambda t: dict(list(t.items())[:1]))
    ),
    "adapter-three-dimensions": Attack(
        "malformed", _adapter(adapter_config(), lambda t: {n: v[None] for n, v in t.items()})
    ),
    "adapter-integers": Attack(
        "quantised", _adapter(adapter_config(), lambda t: {n: v.to(torch.int8) for n, v in t.items()})
    ),
    "adapter-of-nothing": Attack(
        "wrong-base",
        _adapter(adapter_config(), lambda t: {n.replace("layers", "blocks"): v for n, v in t.items()}),
    ),
    "adapter-without-config": Attack("waiting", _adapter(b"")),
}


def _spit(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _touch(path: Path) -> Path:
    path.touch()
    return path


# Names under which a good fine-tune may not come, as bytes.
NAMES = {
    "newline": b"a\nb",
    "no-utf-8": b"\xff\xfe",
    "terminal-escape": b"\x1b[31mred",
    "right-to-left": "a\u202ednp".encode(),
    "zero-width": "a\u200bb".encode(),
}
# And those under which it may.
PLAIN_NAMES = {
    "dash": b"-rf",
    "longest": b"n" * 255,
    "dots": b"a..",
    "markup": b"<b>&[red]",
    "quotes": b"'\";--",
}
