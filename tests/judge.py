"""What becomes of one fine-tune: looked at, fetched, screened, folded as the pipeline does it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import models

from streammerge import screen
from streammerge.arriving import Incoming
from streammerge.config.sources import DirectorySource
from streammerge.engine import Engine
from streammerge.errors import Refused
from streammerge.fit import Tolerance
from streammerge.headers import find, most_bytes
from streammerge.methods import Totals
from streammerge.plan import DEFAULT_ADDED, Recipe
from streammerge.sources.directory import Directory
from streammerge.state import State
from streammerge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streammerge.headers import Entry


class Judge:
    """A base, and where its fine-tunes end: a reason, "waiting", "folded", or "" for what is not seen."""

    def __init__(self, folder: Path) -> None:
        """Make a base in folder/base; other folders of it are taken for inbox and state."""
        self.folder = folder
        self.base = models.make_base(folder / "base")
        opened, _ = Engine(device="cpu").open_base(folder / "base", DEFAULT_ADDED)
        with Weights(find(folder / "base")) as weights:
            self.entries: Mapping[str, Entry] = weights.entries
        self.recipe = Recipe(opened.base, opened.base_digest, opened.plan, "average", {})
        self._length = sum(float(v.double().square().sum()) for v in self.base.values()) ** 0.5

    def __call__(self, inflow: Path) -> tuple[str, str]:
        """Judge the one fine-tune in a source folder; gives the word, and what is said about it."""
        part = DirectorySource(type="directory", name="team", path=inflow, settle=0)
        source = Directory(part, lambda: None, most_bytes=most_bytes(self.folder / "base"))
        seen = source.look({}).sightings
        if not seen:
            return "", ""
        for text in (seen[0].name, seen[0].revision, seen[0].waiting_for):
            assert text.isprintable(), text
        if not seen[0].revision:
            return "waiting", seen[0].waiting_for
        if seen[0].refused:
            return seen[0].refused, seen[0].waiting_for
        into = self._empty("inbox")
        try:
            source.fetch(seen[0].name, seen[0].revision, into, lambda _size: None)
            self.fold(into)
        except Refused as exc:
            return exc.reason, exc.message
        return "folded", ""

    def fold(self, path: Path) -> None:
        """Screen and fold what was fetched; raises Refused or TryAgain."""
        with screen.examine(path, self.entries, self.recipe, Tolerance()) as opened:
            out = self._empty("state")
            old = State(out / "none", {}, Totals())
            _, measured, _ = Engine(device="cpu").fold(self.recipe, Incoming(opened), old, out)
            opened.finish()
        screen.judge(measured, self._length, max_delta_ratio=1.0)

    def _empty(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name
