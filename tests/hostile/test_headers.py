"""Attacks by one file's header, each made here as bytes: refused by reason, quickly, in little memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.errors import Refused
from streammerge.headers import MAX_HEADER_BYTES, Incomplete, find
from streammerge.screen import REASONS
from streammerge.weights import Weights

if TYPE_CHECKING:
    from pathlib import Path

MAX_SECONDS = 2.0
MAX_PEAK_BYTES = 16 << 20
MAX_MESSAGE_CHARACTERS = 2000


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


def open_bounded(path: Path) -> Exception:
    """Open a hostile file and give the error, having checked time, memory and the length of what is said."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises((Refused, Incomplete)) as caught, Weights(find(path)):
            pass
        seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < MAX_SECONDS
    assert peak < MAX_PEAK_BYTES
    assert len(str(caught.value)) < MAX_MESSAGE_CHARACTERS
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("attack", LIES)
def test_a_header_that_cannot_be_true_is_refused(attack: str, tmp_path: Path) -> None:
    """A file that cannot be what it claims is refused as malformed at once, whatever it claims."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[attack])
    error = open_bounded(tmp_path)
    assert isinstance(error, Refused)
    assert error.reason == "malformed"
    assert error.reason in REASONS
    assert path.name in error.message


@pytest.mark.parametrize("attack", UNFINISHED)
def test_a_file_that_ends_early_is_waited_for(attack: str, tmp_path: Path) -> None:
    """A file that ends before what its header declares may still be growing: incomplete, not refused."""
    (tmp_path / "model.safetensors").write_bytes(UNFINISHED[attack])
    assert isinstance(open_bounded(tmp_path), Incomplete)


@pytest.mark.parametrize("attack", EMPTY)
def test_a_file_without_weights_is_refused(attack: str, tmp_path: Path) -> None:
    """A header that lists no weight is refused as empty."""
    (tmp_path / "model.safetensors").write_bytes(EMPTY[attack])
    error = open_bounded(tmp_path)
    assert isinstance(error, Refused)
    assert error.reason == "empty"


@pytest.mark.parametrize("length", range(0, 120, 3))
def test_no_prefix_of_a_good_file_is_taken_for_whole(length: int, tmp_path: Path) -> None:
    """However early a copy is looked at, it is incomplete: never refused for good, never read."""
    whole = file({"a": weight([3], [0, 12]), "b": weight([2], [12, 20])}, b"\0" * 20)
    assert length < len(whole)
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    assert isinstance(open_bounded(tmp_path), Incomplete)


@pytest.mark.parametrize("filler", [b"{},", b"[],", b"0,", b'"",', b'{"":0},', b"1.5,"])
def test_a_header_of_small_things_takes_little_memory(filler: bytes, tmp_path: Path) -> None:
    """A header of a megabyte, made to blow up when parsed, is refused within a few dozen megabytes."""
    count = (1 << 20) // len(filler)
    (tmp_path / "model.safetensors").write_bytes(file(b"[" + filler * count + b"0]"))
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="no JSON object"), Weights(find(tmp_path)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
