"""Whole fine-tunes that mean harm, laid into a source folder, each with the word for where it must end."""

from __future__ import annotations

import json
import os
import socket
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import models
import torch
from attacks import (
    ADAPTERS,
    CONFIGS,
    DEEP,
    HEADERS,
    INDEXES,
    WEIGHT_MAPS,
    adapter_config,
    file,
    weight,
)
from models import NORM, SQUARE
from safetensors.torch import save

from streammerge.headers import MAX_FILES, MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_SHARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor


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
