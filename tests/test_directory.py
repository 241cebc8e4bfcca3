"""A folder as a source: what a look tells of thousands, and how what is being copied in is followed."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import models
import pytest

from streammerge.config.sources import DirectorySource
from streammerge.sources import Known, Look
from streammerge.sources.directory import GROWING_SECONDS, Directory

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    """A base, and beside it an empty source folder."""
    (tmp_path / "inflow").mkdir()
    return models.make_base(tmp_path / "base")


def opened(tmp_path: Path, **keys: object) -> Directory:
    """The source folder, where nothing needs to settle."""
    facts = {"type": "directory", "name": "team", "path": tmp_path / "inflow", "settle": 0, **keys}
    return Directory(DirectorySource.model_validate(facts), lambda: None)


def remembered(look: Look) -> dict[str, Known]:
    """What the ledger remembers of a first look."""
    return {s.name: Known(s.fingerprint, s.revision, 1.0) for s in look.sightings}


def test_what_is_as_it_was_known_is_told_by_its_name_alone(tmp_path: Path, base: dict[str, Tensor]) -> None:
    """A look at thousands gives what changed or is not complete, and the names of the rest in order."""
    inflow = tmp_path / "inflow"
    for number, name in enumerate(("ant", "bee", "cat", "dog")):
        models.make_fine_tune(inflow / name, base, seed=number + 1)
    (inflow / "eel").mkdir()
    source = opened(tmp_path)
    first = source.look({})
    assert [s.name for s in first.sightings] == ["ant", "bee", "cat", "dog", "eel"]
    assert first.unchanged == []

    (inflow / "ant").rename(tmp_path / "ant")
    os.utime(inflow / "cat" / "model.safetensors", (1.0, 1.0))
    second = source.look(remembered(first))
    assert second.unchanged == ["bee", "dog"]
    assert [(s.name, bool(s.revision)) for s in second.sightings] == [("cat", True), ("eel", False)]
    assert second.sightings[0].revision == remembered(first)["cat"].revision  # the same content


@pytest.mark.parametrize("is_followed", [False, True])
def test_a_link_to_a_fine_tune_is_judged_by_what_it_leads_to(
    tmp_path: Path, base: dict[str, Tensor], *, is_followed: bool
) -> None:
    """A linked folder, a linked file and a link to nothing: refused, or followed where that is wanted."""
    models.make_fine_tune(tmp_path / "elsewhere", base, seed=1)
    inflow = tmp_path / "inflow"
    (inflow / "folder").symlink_to(tmp_path / "elsewhere")
    (inflow / "one.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    (inflow / "nothing").symlink_to(tmp_path / "gone")
    found = {s.name: s.refused for s in opened(tmp_path, follow_symlinks=is_followed).look({}).sightings}
    if is_followed:
        assert found == {"folder": "", "one.safetensors": ""}
    else:
        assert found == {"folder": "symlink", "nothing": "symlink", "one.safetensors": "symlink"}


def test_what_is_copied_in_slowly_is_looked_at_until_it_is_complete(
    tmp_path: Path, base: dict[str, Tensor]
) -> None:
    """The kernel tells of the folder alone; a hint follows while something in it is not complete and new."""
    models.make_fine_tune(tmp_path / "whole", base, seed=1)
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    growing = tmp_path / "inflow" / "growing"
    growing.mkdir()
    source = opened(tmp_path, poll="1h")
    hints: list[float] = []
    heard = threading.Event()

    def hint() -> None:
        hints.append(time.monotonic())
        heard.set()

    [seen] = source.look({}).sightings
    assert not seen.revision
    stop = source.watch(hint)
    try:
        for part in (weights[:99], weights):
            heard.clear()
            assert heard.wait(20 * GROWING_SECONDS)
            (growing / "model.safetensors").write_bytes(part)  # inside: no event tells of it
            [seen] = source.look({}).sightings
        assert seen.revision
        heard.clear()
        assert not heard.wait(2 * GROWING_SECONDS)

        (tmp_path / "inflow" / "another").mkdir()
        assert heard.wait(20 * GROWING_SECONDS)
    finally:
        stop()
    source.look({})
    heard.clear()
    assert not heard.wait(2 * GROWING_SECONDS)


def test_what_stays_incomplete_is_left_to_the_poll(tmp_path: Path) -> None:
    """A folder that nobody writes to any more costs no look a second."""
    (tmp_path / "inflow" / "left").mkdir(parents=True)
    source = opened(tmp_path, poll=0.001)
    source.look({})
    time.sleep(0.01)
    heard = threading.Event()
    stop = source.watch(heard.set)
    try:
        source.look({})
        assert not heard.wait(2 * GROWING_SECONDS)
    finally:
        stop()
