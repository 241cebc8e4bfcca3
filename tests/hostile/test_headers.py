"""Attacks by one file's header, each made here as bytes: refused by reason, quickly, in little memory."""

from __future__ import annotations

import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from attacks import HEADERS, file, weight

from streammerge.errors import Refused
from streammerge.headers import Incomplete, find
from streammerge.screen import REASONS
from streammerge.weights import Weights

if TYPE_CHECKING:
    from pathlib import Path

MAX_SECONDS = 2.0
MAX_PEAK_BYTES = 16 << 20
MAX_MESSAGE_CHARACTERS = 2000


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


@pytest.mark.parametrize("attack", HEADERS)
def test_a_header_that_cannot_be_true_is_refused(attack: str, tmp_path: Path) -> None:
    """A file that cannot be what it claims is refused at once; one that may still grow is waited for."""
    path = tmp_path / "model.safetensors"
    ends, content = HEADERS[attack]
    path.write_bytes(content)
    error = open_bounded(tmp_path)
    if ends == "waiting":
        assert isinstance(error, Incomplete)
    else:
        assert isinstance(error, Refused)
        assert error.reason == ends
        assert error.reason in REASONS
        assert path.name in error.message or ends == "unsupported-dtype"


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
    (tmp_path / "model.safetensors").write_bytes(file(b'{"w":[' + filler * count + b"0]}"))
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="not described"), Weights(find(tmp_path)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
