"""Files that are not any more what they were a moment ago: swapped for a pipe, cut, grown, too many."""

from __future__ import annotations

import errno
import math
import os
from typing import TYPE_CHECKING, Any

import attacks
import pytest
import torch
from safetensors.torch import save_file

from streammerge import files, headers
from streammerge.config.sources import DirectorySource
from streammerge.errors import Refused
from streammerge.headers import Incomplete, WeightsSet, find, most_bytes
from streammerge.sources.directory import Directory
from streammerge.weights import Weights

if TYPE_CHECKING:
    from pathlib import Path


def test_weights_swapped_for_a_pipe_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    """A pipe that took the file's place after the folder was listed does not block the one who folds."""
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(Refused, match="no regular file"):
        Weights(WeightsSet((pipe,)))
    with pytest.raises(Refused, match="no regular file"):
        find(pipe)


def test_a_header_cut_while_it_is_read_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that loses its end between two reads is incomplete: not refused for good."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(attacks.file({"w": attacks.weight()}, attacks.FOUR))
    read = os.pread

    def cut(descriptor: int, length: int, offset: int) -> bytes:
        found = read(descriptor, length, offset)
        os.truncate(path, 20)
        return found

    monkeypatch.setattr("streammerge.headers.os.pread", cut)
    with pytest.raises(Incomplete, match="became shorter"), Weights(find(path)):
        pass


def test_a_file_that_grows_while_it_is_copied_is_copied_as_long_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that grows for ever would fill the disk; what was added shows in the digest."""
    path = tmp_path / "growing"
    path.write_bytes(b"a" * 1000)

    def grow(*_: Any) -> None:
        with path.open("ab") as more:
            more.write(b"b" * 1000)
        raise OSError(errno.EOPNOTSUPP, "no shared blocks here")

    monkeypatch.setattr("streammerge.files.fcntl.ioctl", grow)
    files.copy_file(path, tmp_path / "copy", follow_symlinks=False)
    assert (tmp_path / "copy").read_bytes() == b"a" * 1000


def test_more_weights_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of weights is bounded over all shards together, not for each file alone."""
    for shard in ("a", "b"):
        tensors = {f"{shard}{number}": torch.ones(1) for number in range(3)}
        save_file(tensors, tmp_path / f"{shard}.safetensors")
    monkeypatch.setattr("streammerge.weights.MAX_WEIGHTS", 5)
    found = WeightsSet((tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    with pytest.raises(Refused, match="more than 5 weights"):
        Weights(found)


def test_there_is_no_bound_where_the_base_is_not_there_yet(tmp_path: Path) -> None:
    """A base that is still to be fetched says nothing of how large its fine-tunes are."""
    assert most_bytes(tmp_path / "base") == math.inf
    save_file({"w": torch.ones(1)}, tmp_path / "base.safetensors")
    assert headers.SMALL_BYTES < most_bytes(tmp_path / "base.safetensors") < 2 * headers.SMALL_BYTES


def test_a_file_swapped_while_a_folder_is_looked_at_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes its kind between listing and reading never ends a look at the other fine-tunes."""
    place = tmp_path / "inflow" / "ft"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"x" * 99)
    source = Directory(
        DirectorySource(type="directory", name="team", path=tmp_path / "inflow", settle=0), lambda: None
    )
    opened = headers.open_file

    def late(path: Path) -> int:
        path.unlink()
        os.mkfifo(path)
        return opened(path)

    monkeypatch.setattr("streammerge.weights.open_file", late)
    (seen,) = source.look({}).sightings
    assert seen.refused == "malformed"
    assert "no regular file" in seen.waiting_for
