"""What may go, and what is offered no more: fetched files, refused candidates, old and damaged versions.

Never head, current, what a target confirmed last or is still to be told, what was current lately, nor the
states that keep a replay short.
"""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from streammerge import files, promote, snapshots
from streammerge.headers import ADAPTER_WEIGHTS
from streammerge.ledger import now
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.merging import Merge

LOOKED_AT_ONCE = 64  # folders of the inbox, which holds thousands where they are kept

log = structlog.get_logger()


def tidy(merge: Merge) -> list[str]:
    """Remove what is no longer needed: decided inbox folders, old refused candidates, old versions."""
    with merge.turn:
        tidy_inbox(merge)
        snapshots.remove_hidden(merge.store)
        old = collectable(merge)
        removed = [path.name for path in old]
        for path in old:
            merge.ledger.update_snapshot(snapshots.number(path), state="collected")
            reached("collected")
            files.remove_tree(path)
        refused = [
            row["version"]
            for row in merge.ledger.rows(
                "select version from snapshots where state = 'refused' order by version"
            )
        ]
        shown = set(refused[-merge.config.keep_refused :] if merge.config.keep_refused else [])
        for path in snapshots.folders(merge.store.candidates):
            version = snapshots.number(path)
            if version in refused and version not in shown:
                files.remove_tree(path)
                removed.append(path.name)
    merge.metrics.retained.set(len(snapshots.names(merge.store.snapshots)))
    return removed


def mark_damaged(merge: Merge, damaged: dict[str, str]) -> None:
    """Remember which older versions no longer verify: they are not offered for a rollback."""
    known = merge.ledger.fact("damaged") or {}
    if damaged != known:
        merge.ledger.set_fact("damaged", damaged)
    merge.metrics.damaged.set(len(damaged))
    for version, why in damaged.items():
        if version not in known:
            log.error("snapshot.damaged", version=int(version), detail=why)


def tidy_inbox(merge: Merge) -> None:
    """Remove fetched files that no journey needs any more."""
    inbox = merge.store.inbox
    with merge.turn:
        with os.scandir(inbox) as there:
            names = (entry.name for entry in there if not entry.name.endswith(".part"))
            unneeded: list[str] = []
            while part := list(islice(names, LOOKED_AT_ONCE)):
                unneeded += unneeded_of(merge, part)
        for path in [inbox / name for name in unneeded]:
            if path.is_dir():
                files.remove_tree(path)


def unneeded_of(merge: Merge, names: Sequence[str]) -> set[str]:
    """Choose those of some folders of the inbox that no journey needs and that are not kept."""
    states, inbox = merge.ledger.states(names), str(merge.store.inbox)
    return {
        name
        for name in names
        if name not in merge.needed
        and not (name in states and is_archived(merge.config, states[name], f"{inbox}/{name}"))
    }


def is_archived(config: Config, state: str, folder: Path | str) -> bool:
    """Whether the fetched files of a fine-tune, which are in `folder`, stay in the inbox."""
    return state in ("pending", "awaiting_approval") or (state == "folded" and is_kept(config, folder))


def is_kept(config: Config, folder: Path | str) -> bool:
    """Whether the fetched files of what is folded stay, by `archive`."""
    return config.archive == "keep" or (
        config.archive == "adapters" and os.path.exists(f"{folder}/{ADAPTER_WEIGHTS}")  # noqa: PTH110 -- paths cost ten times as much
    )


def collectable(merge: Merge) -> list[Path]:
    """List versions that gc may remove.

    Never head, current, what a target still needs, what was current lately, or what shortens a replay.
    """
    lately = merge.ledger.rows(  # from the one on that was current when `grace` began
        "select version from promotions where id >= coalesce("
        "(select max(id) from promotions where switched_at < ?), 0)",
        now() - merge.config.grace,
    )
    versions = {row["version"] for row in lately} | promote.awaited(merge) | {merge.head.version}
    serving = snapshots.current(merge.store)
    stay = [*merge.folding_from, *([serving] if serving else []), *stepping_stones(merge)]
    return snapshots.collectable(merge.store, keep=merge.config.keep, keep_always=stay, versions=versions)


def stepping_stones(merge: Merge) -> list[Path]:
    """List the versions from which replays begin; none where a fine-tune is subtracted instead."""
    config = merge.config
    if not config.keep_spaced or merge.settings.get("removal") == "subtract":
        return []
    digests, marked = merge.head.digests, merge.ledger.fact("damaged") or {}
    line = {
        count: path
        for path, count in snapshots.line_of(merge.store, digests)
        if str(snapshots.number(path)) not in marked
    }
    wanted = spaced(line, len(digests), first=config.keep, levels=config.keep_spaced)
    return [line[count] for count in wanted]


def spaced(counts: Iterable[int], newest: int, *, first: int, levels: int) -> set[int]:
    """Choose among versions, told by how many fine-tunes they hold, those from which replays begin.

    On level k stands a mark at each multiple of first * 2**k. For the last two marks of every level the
    oldest version from there on stays: at most `levels` + 1 in all. So the d-th fine-tune from the end, d up
    to first * 2**(levels - 1), is taken out by folding fewer than 4 * max(d, first) again; where some were
    missing already, fewer than four times what it took with those that were there. A mark is among the last
    two ever since it is reached, so that what is wanted later was wanted before and is still there.
    """
    older = sorted(count for count in counts if count <= newest)
    chosen = set()
    for level in range(levels):
        period = first * 2**level
        latest = newest // period * period
        for mark in (latest, latest - period):
            chosen |= set([count for count in older if count >= mark][:1] if mark > 0 else [])
    return chosen
