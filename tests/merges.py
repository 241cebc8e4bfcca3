"""Merges at work in the test's own process: opened, looked for, folded turn by turn; and what came of it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streammerge import recovery, screen, turns
from streammerge.config import Config
from streammerge.engine import Engine
from streammerge.metrics import Metrics
from streammerge.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streammerge.recipes import FoldingMerge


@contextmanager
def opened(root: Path, store: str, *, residency: str = "disk", **keys: Any) -> Iterator[FoldingMerge]:
    """A merge at work on one of several stores of the same base and source."""
    source = {"name": "team", "type": "directory", "path": root / "fine-tunes", "settle": "0s"}
    config = Config.model_validate(
        {
            "base": root / "base", "store": root / store, "reserve": "1MB", "threads": 1,
            "sources": [source], "keep": 50, **keys,
        }
    )  # fmt: skip
    recovery.prepare_folder(config)
    engine = Engine(device="cpu", threads=1, residency=residency)
    merge = recovery.open_merge(config, engine, Metrics(screen.REASONS))
    try:
        yield merge
    finally:
        merge.ledger.close()


def look(merge: FoldingMerge) -> None:
    """Look at the folder."""
    [part] = merge.config.sources
    turns.look_at(merge, open_source(part, merge.config), lambda _name, _seconds: None)


def turn(merge: FoldingMerge) -> bool:
    """Take up the next thing that can be done."""
    [part] = merge.config.sources
    return turns.work_once(merge, {"team": open_source(part, merge.config)})


def work_off(merge: FoldingMerge) -> None:
    """Look, and fold until nothing is left."""
    look(merge)
    while turn(merge):
        pass


def weights_of(merge: FoldingMerge) -> dict[str, str]:
    """Give the hash of every file of head's state and model that holds numbers."""
    listed = merge.head.manifest["files"]
    return {name: facts["sha256"] for name, facts in listed.items() if name.endswith(".safetensors")}


def states(merge: FoldingMerge) -> dict[str, str]:
    """Give the state of every fine-tune."""
    return {row["name"]: row["state"] for row in merge.ledger.fine_tunes()}


def versions(merge: FoldingMerge) -> list[tuple[str, list[str]]]:
    """Give what became of each version after the first, and what was new in it."""
    rows = merge.ledger.rows("select state, added from snapshots where version > 0 order by version")
    return [(row["state"], json.loads(row["added"])) for row in rows]
