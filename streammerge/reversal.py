"""Make an older version head and current again, and let the ledger say so. Who asks for it, and what becomes
of what was folded since, is the caller's.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from streammerge import promote, snapshots
from streammerge.errors import Damaged

if TYPE_CHECKING:
    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot


def go_back(merge: Merge, chosen: Snapshot, cause: str) -> list[Row]:
    """Make a version head, intend to serve it, and let in what it holds; in the caller's transaction.

    Gives the rows of the fine-tunes that are no longer in, which still say `folded`.
    """
    removed = set(merge.head.digests) - set(chosen.digests)
    merge.ledger.allow(chosen.digests)
    merge.ledger.set_fact("head", chosen.path.name)
    relabel_snapshots(merge, chosen)
    relabel_fine_tunes(merge, chosen)
    leave_untold(merge)
    promote.intend(merge, chosen, cause)
    return [row for row in merge.ledger.fine_tunes("folded") if row["digest"] in removed]


def relabel_snapshots(merge: Merge, chosen: Snapshot) -> None:
    """Every version that is no ancestor of the chosen one was rolled back; the chosen line is accepted."""
    parents = {
        row["digest"]: row["parent"] for row in merge.ledger.rows("select digest, parent from snapshots")
    }
    line, digest = set(), chosen.digest
    while digest:
        line.add(digest)
        digest = parents.get(digest)  # type: ignore[assignment]
    for row in merge.ledger.rows("select * from snapshots where state in ('accepted', 'rolled_back')"):
        state = "accepted" if row["digest"] in line else "rolled_back"
        if state != row["state"]:
            merge.ledger.update_snapshot(row["version"], state=state)


def relabel_fine_tunes(merge: Merge, chosen: Snapshot) -> None:
    """What the chosen version holds is folded, whatever came since."""
    folded = {member.announced for member in chosen.fine_tunes}
    for row in merge.ledger.fine_tunes():
        if (row["source"], row["name"], row["revision"]) in folded and row["state"] != "folded":
            merge.ledger.update_fine_tune(
                row["id"], state="folded", reason="", detail="", version=first_with(merge, row["digest"])
            )


def leave_untold(merge: Merge) -> None:
    """A version that was gone back from is not told any more to those that would serve it."""
    names = {part.name for part in promote.serving(merge)}
    for row in merge.ledger.rows(
        "select outbox.id, target, version from outbox join snapshots using (version) "
        "where outbox.state = 'pending' and snapshots.state = 'rolled_back'"
    ):
        if row["target"] in names:
            why = f"version {row['version']} was gone back from before the target served it"
            merge.ledger.close_telling(row["id"], "skipped", why)


def first_with(merge: Merge, digest: str) -> int | None:
    """Find the oldest version on disk that holds a fine-tune."""
    for path in snapshots.folders(merge.store.snapshots):
        with suppress(Damaged):
            found = snapshots.read(path)
            if digest in found.digests:
                return found.version
    return None
