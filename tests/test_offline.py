"""`streammerge merge` in process: whole or not there, the same every time, refusals by reason."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import models
import pytest
from benches import contents, fine_tunes, merge, sha256
from models import TALL

from streammerge.errors import ConfigError, Refused, StreammergeError

if TYPE_CHECKING:
    from pathlib import Path


def test_an_offline_merge_is_whole_or_not_there(tmp_path: Path) -> None:
    """A refused fine-tune leaves neither OUT nor any temporary folder; it is named with the reason."""
    base = models.make_base(tmp_path / "base")
    good, bad, _ = fine_tunes(tmp_path, base)
    tensors = models.load(bad)
    tensors[TALL][0, 0] = float("inf")
    models.save(bad, tensors)
    before = set(tmp_path.iterdir())
    with pytest.raises(Refused, match="non-finite") as caught:
        merge(tmp_path / "out", tmp_path / "base", [good, bad])
    assert str(bad) in caught.value.message
    assert set(tmp_path.iterdir()) == before


def test_an_offline_merge_says_what_it_did(tmp_path: Path) -> None:
    """The manifest lists fine-tunes in order with digests, the totals and the hash of every weights file."""
    base = models.make_base(tmp_path / "base", shards=2)
    paths = fine_tunes(tmp_path, base)
    manifest = merge(tmp_path / "out", tmp_path / "base", paths)
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes()) == manifest
    assert [entry["name"] for entry in manifest["fine_tunes"]] == [path.name for path in paths]
    assert len({entry["digest"] for entry in manifest["fine_tunes"]}) == 3
    assert manifest["totals"]["count"] == 3
    for name, entry in manifest["files"].items():
        assert sha256(tmp_path / "out" / name) == entry["sha256"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "model"]
    again = merge(tmp_path / "again", tmp_path / "base", paths)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert again == manifest


def test_what_the_screen_refuses_may_be_allowed_by_reason(tmp_path: Path) -> None:
    """Duplicates and the base itself are refused, but folded with --allow; no other reason can be allowed."""
    base = models.make_base(tmp_path / "base")
    (path,) = fine_tunes(tmp_path, base, 1)
    for paths, reason in (([path, path], "duplicate"), ([tmp_path / "base"], "zero-delta")):
        with pytest.raises(Refused) as caught:
            merge(tmp_path / "out", tmp_path / "base", paths)
        assert caught.value.reason == reason
        assert f"--allow {reason}" in caught.value.hint
        merge(tmp_path / reason, tmp_path / "base", paths, allow=frozenset({reason}))
    with pytest.raises(ConfigError):
        merge(tmp_path / "out", tmp_path / "base", [path], allow=frozenset({"non-finite"}))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magic"},
        {"dtype": "float8"},
        {"method": "opcm", "knobs": {"alpha": 1}},
    ],
    ids=["method", "dtype", "alpha"],
)
def test_a_request_that_makes_no_sense_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """A wrong method, dtype or knob is a configuration error, and nothing is left."""
    base = models.make_base(tmp_path / "base")
    paths = fine_tunes(tmp_path, base, 1)
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError):
        merge(tmp_path / "out", tmp_path / "base", paths, **options)
    assert set(tmp_path.iterdir()) == before


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """OUT that exists with something in it is refused; an empty folder is taken."""
    base = models.make_base(tmp_path / "base")
    paths = fine_tunes(tmp_path, base, 1)
    (tmp_path / "out").mkdir()
    merge(tmp_path / "out", tmp_path / "base", paths)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="there already"):
        merge(tmp_path / "out", tmp_path / "base", paths)
    assert contents(tmp_path / "out") == before


def test_a_pipe_given_as_a_model_is_an_error_in_words(tmp_path: Path) -> None:
    """What is neither folder nor file ends in an error of ours, not in a traceback."""
    models.make_base(tmp_path / "base")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StreammergeError):
        merge(tmp_path / "out", tmp_path / "base", [tmp_path / "pipe"])
