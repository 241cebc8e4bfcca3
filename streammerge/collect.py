"""What may go: fetched files that no journey needs, old refused candidates, versions beyond `keep`.

Never head, current, what a target confirmed last or is still to be told, nor what was current lately.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge import files, promote, snapshots
from streammerge.ledger import now

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.merging import Merge


def tidy(merge: Merge) -> list[str]:
    """Remove what is no longer needed: decided inbox folders, old refused candidates, old versions."""
    with merge.turn:
        tidy_inbox(merge)
        removed = [path.name for path in collectable(merge)]
        for path in collectable(merge):
            merge.ledger.update_snapshot(int(path.name.split("-")[0]), state="collected")
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
    keep = {str(row["id"]) for row in merge.ledger.fine_tunes("pending", "awaiting_approval")}
    if merge.config.archive == "keep":
        keep |= {str(row["id"]) for row in merge.ledger.fine_tunes("folded")}
    for folder in merge.store.inbox.iterdir():
        if folder.name not in keep and not folder.name.endswith(".part"):
            files.remove_tree(folder)


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
    stay += [path for path in (snapshots.current(merge.store), merge.folding_from) if path]
    return snapshots.collectable(merge.store, keep=merge.config.keep, keep_always=stay)
