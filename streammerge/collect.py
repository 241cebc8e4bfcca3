"""What may go: fetched files that no journey needs, old refused candidates, versions beyond `keep`.

Never head, current, what a target confirmed last or is still to be told, nor what was current lately.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge import files, promote, snapshots
from streammerge.headers import ADAPTER_WEIGHTS
from streammerge.ledger import now
from streammerge.steps import reached

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.ledger import Row
    from streammerge.merging import Merge


def tidy(merge: Merge) -> list[str]:
    """Remove what is no longer needed: decided inbox folders, old refused candidates, old versions."""
    with merge.turn:
        tidy_inbox(merge)
        removed = [path.name for path in collectable(merge)]
        for path in collectable(merge):
            merge.ledger.update_snapshot(int(path.name.split("-")[0]), state="collected")
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
            version = int(path.name.split("-")[0])
            if version in refused and version not in shown:
                files.remove_tree(path)
                removed.append(path.name)
    merge.metrics.retained.set(len(snapshots.folders(merge.store.snapshots)))
    return removed


def tidy_inbox(merge: Merge) -> None:
    """Remove fetched files that no journey needs any more."""
    with merge.turn:
        rows = merge.ledger.fine_tunes("pending", "awaiting_approval", "folded")
        keep = {str(row["id"]) for row in rows if is_archived(merge, row)} | merge.needed
        for folder in merge.store.inbox.iterdir():
            if folder.is_dir() and folder.name not in keep and not folder.name.endswith(".part"):
                files.remove_tree(folder)


def is_archived(merge: Merge, row: Row) -> bool:
    """Whether the fetched files of a row stay in the inbox."""
    if row["state"] in ("pending", "awaiting_approval"):
        return True
    is_kept = merge.config.archive == "keep" or (
        merge.config.archive == "adapters" and (merge.store.inbox / str(row["id"]) / ADAPTER_WEIGHTS).exists()
    )
    return is_kept and row["state"] == "folded"


def collectable(merge: Merge) -> list[Path]:
    """List versions that gc may remove.

    Never head, current, what a target still needs, or what was current lately.
    """
    lately = merge.ledger.rows(  # current until the next promotion, which was within `grace` or is to come
        "select version from promotions where coalesce("
        "(select min(later.switched_at) from promotions as later where later.id > promotions.id), ?) >= ?",
        now(), now() - merge.config.grace,
    )  # fmt: skip
    versions = {row["version"] for row in lately} | promote.awaited(merge) | {merge.head.version}
    stay = [path for version in versions if (path := snapshots.by_version(merge.store, version))]
    serving = snapshots.current(merge.store)
    stay += [*merge.folding_from, *([serving] if serving else [])]
    return snapshots.collectable(merge.store, keep=merge.config.keep, keep_always=stay)
