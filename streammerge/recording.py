"""What the ledger says of versions: a candidate's row, and all that changes with an accepted one.

Rows only: imports no torch, so that whoever finds a version without its rows can add them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from streammerge import promote, snapshots
from streammerge.ledger import now

if TYPE_CHECKING:
    from streammerge.members import Member
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot


def record_accepted(merge: Merge, snapshot: Snapshot) -> None:
    """Steps 8 and 9 in the ledger, in one transaction: head, fine-tunes, the intent to promote, outbox."""
    ledger = merge.ledger
    with ledger.transaction():
        record_candidate(merge, snapshot)
        ledger.update_snapshot(snapshot.version, state="accepted", accepted_at=now())
        ledger.set_fact("head", snapshot.path.name)
        added, removed = changes(merge, snapshot)
        for member in added:
            settle(merge, member, "folded", snapshot.version)
        names = {member.series for member in added}
        for member in removed:
            is_replaced = member.series in names
            settle(merge, member, "replaced" if is_replaced else "retracted", None)
            if not is_replaced:
                ledger.deny([member.digest], f"taken out in version {snapshot.version}")
        cause = "fold" if added else "retract" if removed else "first"
        promote.intend(merge, snapshot, cause)


def settle(merge: Merge, member: Member, state: str, version: int | None) -> None:
    """Write down in its row what became of a fine-tune."""
    if row := merge.ledger.fine_tune(*member.announced):
        merge.ledger.update_fine_tune(
            row["id"],
            state=state,
            reason="",
            detail="",
            step="folded",
            version=version,
            attempts=0,
            next_try_at=0.0,
        )
        merge.metrics.decided.labels(row["source"], state).inc()


def record_candidate(merge: Merge, candidate: Snapshot) -> None:
    """Write a sealed candidate's row; there already is no error."""
    if merge.ledger.snapshot(candidate.version):
        return
    added, removed = changes(merge, candidate)
    merge.ledger.write(
        "insert into snapshots (version, digest, parent, state, count, added, removed, sealed_at) "
        "values (?, ?, ?, 'candidate', ?, ?, ?, ?)",
        candidate.version, candidate.digest, candidate.parent, len(candidate.fine_tunes),
        json.dumps([member.name for member in added]), json.dumps([member.name for member in removed]), now(),
    )  # fmt: skip


def changes(merge: Merge, snapshot: Snapshot) -> tuple[list[Member], list[Member]]:
    """What a version changed, see Members.changes; of a parent that is gone only the last is known."""
    parent = snapshots.by_digest(merge.store, snapshot.parent) if snapshot.parent else None
    if parent is None:
        return [*snapshot.fine_tunes][-1:], []
    return snapshot.fine_tunes.changes(parent.fine_tunes)
