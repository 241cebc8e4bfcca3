"""What may go: fetched files that no journey needs, old refused candidates, versions beyond `keep`.

Never head, current, what a target confirmed last or is still to be told, nor what was current lately.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from streammerge import files, promote, snapshots
from streammerge.headers import ADAPTER_WEIGHTS
from streammerge.ledger import now

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.ledger import Row
    from streammerge.merging import Merge


def tidy(merge: Merge) -> list[str]:
    """Remove what is no longer needed: decided inbox folders, old refused candidates, old versions."""
    with merge.turn:
        tidy_inbox(merge)
        old = collectable(merge)
        removed = [path.name for path in old]
        for path in old:
            merge.ledger.update_snapshot(snapshots.number(path), state="collected")
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
    merge.metrics.retained.set(len(snapshots.folders(merge.store.snapshots)))
    return removed


def tidy_inbox(merge: Merge) -> None:
    """Remove fetched files that no journey needs any more."""
    with os.scandir(merge.store.inbox) as found:
        there = {entry.name for entry in found if not entry.name.endswith(".part")}
    decided = there - merge.needed - merge.ledger.numbers("pending", "awaiting_approval")
    folded = merge.ledger.numbers("folded") if decided and merge.config.archive != "drop" else set()
    for name in decided:
        if name not in folded or not is_kept(merge, name):
            files.remove_tree(merge.store.inbox / name)


def is_archived(merge: Merge, row: Row) -> bool:
    """Whether the fetched files of a row stay in the inbox."""
    if row["state"] in ("pending", "awaiting_approval"):
        return True
    return row["state"] == "folded" and is_kept(merge, str(row["id"]))


def is_kept(merge: Merge, folder: str) -> bool:
    """Whether the fetched files of what is folded stay, by `archive`."""
    return merge.config.archive == "keep" or (
        merge.config.archive == "adapters" and (merge.store.inbox / folder / ADAPTER_WEIGHTS).exists()
    )


def collectable(merge: Merge) -> list[Path]:
    """List versions that gc may remove.

    Never head, current, what a target still needs, or what was current lately.
    """
    lately = merge.ledger.rows(  # from the one on that was current when `grace` began
        "select version from promotions where id >= coalesce("
        "(select max(id) from promotions where switched_at < ?), 0)",
        now() - merge.config.grace,
    )
    versions = {row["version"] for row in lately} | promote.awaited(merge) | {merge.head.version}
    stay = [path for path in snapshots.folders(merge.store.snapshots) if snapshots.number(path) in versions]
    serving = snapshots.current(merge.store)
    stay += [*merge.folding_from, *([serving] if serving else [])]
    return snapshots.collectable(merge.store, keep=merge.config.keep, keep_always=stay)
