"""Attacks by a model folder: indexes, pickles, links, pipes. Refused or waited for, never followed."""

from __future__ import annotations

import json
import os
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attacks import INDEXES, SHARD, WEIGHT_MAPS
from safetensors.torch import save_file

from streammerge.errors import Refused
from streammerge.headers import MAX_JSON_BYTES, Incomplete, find, read_json
from streammerge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INDEX = "model.safetensors.index.json"
MAX_MESSAGE_CHARACTERS = 2000
MAX_BLOCKED_SECONDS = 10.0


def refused(path: Path) -> Refused:
    """Give what the folder is refused with."""
    with pytest.raises(Refused) as caught, Weights(find(path)):
        pass
    assert caught.value.hint
    assert len(str(caught.value)) < MAX_MESSAGE_CHARACTERS
    return caught.value


def within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """Do work that might block for ever on a thread of its own; give what it raised."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            ended.append(None)
        except Exception as exc:  # noqa: BLE001 -- handed to the test
            ended.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert ended, f"still blocked after {seconds:g} s"
    return ended[0]


@pytest.mark.parametrize("attack", WEIGHT_MAPS)
def test_an_index_names_only_safetensors_of_its_own_folder(attack: str, tmp_path: Path) -> None:
    """An index that names anything but .safetensors files beside it is refused, and none is opened."""
    folder = tmp_path / "fine-tune"
    folder.mkdir()
    save_file({"w": torch.ones(1)}, folder / SHARD)
    save_file({"w": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": WEIGHT_MAPS[attack]}))
    assert refused(folder).reason == "malformed"


@pytest.mark.parametrize("attack", INDEXES)
def test_an_index_that_is_no_index_is_refused(attack: str, tmp_path: Path) -> None:
    """An index that is no JSON object with a map is refused, also where model.safetensors lies beside it."""
    (tmp_path / INDEX).write_bytes(INDEXES[attack])
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert refused(tmp_path).reason == "malformed"


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    """An index beyond the limit is refused by its size, before anything is allocated for it."""
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert "larger than" in refused(tmp_path).message


def test_a_missing_shard_is_waited_for(tmp_path: Path) -> None:
    """A shard that is not there yet makes the folder incomplete, not refused."""
    save_file({"a": torch.ones(1)}, tmp_path / SHARD)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD, "b": "model-2.safetensors"}}))
    with pytest.raises(Incomplete, match=r"model-2\.safetensors"):
        find(tmp_path)


def test_one_weight_in_two_shards_is_refused(tmp_path: Path) -> None:
    """A weight that stands in two shards has no one value: refused."""
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    weight_map = {"w": "a.safetensors", "v": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refused(tmp_path).reason == "malformed"


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    """Which of two files is meant is not guessed."""
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    assert "no index" in refused(tmp_path).message


class Trap:
    """Something whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.pt", "weights.ckpt", "w.pkl"]
)
def test_a_pickle_is_never_opened(name: str, tmp_path: Path) -> None:
    """A pickle is refused under whatever name it comes, and its code does not run."""
    folder = tmp_path / "fine-tune"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    assert refused(folder).reason == ("malformed" if name == "model.safetensors" else "pickle-only")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    """Other weight formats beside safetensors are neither opened nor a reason to refuse."""
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with Weights(find(tmp_path)) as weights:
        assert list(weights.entries) == ["w"]
    assert not (tmp_path / "ran").exists()


def test_an_empty_folder_is_waited_for(tmp_path: Path) -> None:
    """A folder in which nothing lies yet may still be filled."""
    with pytest.raises(Incomplete):
        find(tmp_path)


def test_sidecars_are_no_weights(tmp_path: Path) -> None:
    """Gram matrices and Fisher information alone are no model, and beside one no second model."""
    for name in ("gram.safetensors", "fisher.safetensors"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(Incomplete):
        find(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "any.safetensors")
    assert [path.name for path in find(tmp_path).files] == ["any.safetensors"]


@pytest.mark.parametrize("trick", ["pipe", "folder", "dangling", "loop", "link-to-folder", "link-to-device"])
def test_weights_that_are_no_file_are_not_opened(trick: str, tmp_path: Path) -> None:
    """A pipe, folder, device or link to nothing in place of weights neither blocks nor counts as weights."""
    place = tmp_path / "model.safetensors"
    if trick == "pipe":
        os.mkfifo(place)
    elif trick == "folder":
        place.mkdir()
    else:
        place.symlink_to(
            {"dangling": "gone", "loop": place.name, "link-to-folder": "."}.get(trick, "/dev/zero")
        )
    assert isinstance(within(MAX_BLOCKED_SECONDS, lambda: find(tmp_path)), Incomplete)


def test_a_pipe_in_place_of_a_configuration_does_not_block(tmp_path: Path) -> None:
    """config.json as a pipe nobody writes to is refused or read as absent; it must not block for ever."""
    os.mkfifo(tmp_path / "config.json")
    try:
        error = within(MAX_BLOCKED_SECONDS, lambda: read_json(tmp_path / "config.json"))
    finally:
        os.close(os.open(tmp_path / "config.json", os.O_RDWR | os.O_NONBLOCK))  # lets a blocked reader go
    assert error is None or isinstance(error, Refused)


@pytest.mark.parametrize("trick", ["folder", "loop"])
def test_a_configuration_that_is_no_file_is_refused(trick: str, tmp_path: Path) -> None:
    """config.json as a folder or a link to itself is refused or read as absent, in our own words."""
    place = tmp_path / "config.json"
    place.mkdir() if trick == "folder" else place.symlink_to(place.name)
    error = within(MAX_BLOCKED_SECONDS, lambda: read_json(place))
    assert error is None or isinstance(error, Refused)
