"""What a step had still to do when its process was killed or the machine could not: found, and done now.

The order of a step's effects makes each of these harmless in itself. Nothing here is undone: what was sealed
is recorded, what was accepted becomes head, what was intended is served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from streammerge import files, promote, recording, snapshots
from streammerge.errors import Damaged

if TYPE_CHECKING:
    from streammerge.merging import Merge

log = structlog.get_logger()


def finish(merge: Merge) -> None:
    """Make head what was accepted, serve what was intended; for any thread, whatever the worker does."""
    with merge.turn:
        accept_trailing(merge)
        promote.switch(merge)


def record_candidates(merge: Merge) -> None:
    """A candidate that was sealed but not yet recorded: its row is added. Only who seals may ask for it."""
    for path in snapshots.folders(merge.store.candidates):
        if merge.ledger.snapshot(snapshots.number(path)) is None:
            files.fsync_folder(merge.store.candidates)  # it may have been cut off before that
            recording.record_candidate(merge, snapshots.read(path))


def accept_trailing(merge: Merge) -> None:
    """A version that was moved into snapshots/ but not yet recorded: its row is added."""
    names = snapshots.names(merge.store.snapshots)
    recorded = merge.ledger.decided(map(snapshots.numbered, names))
    for name in names:
        version = snapshots.numbered(name)
        if version in recorded:
            continue
        path = merge.store.snapshots / name
        snapshot = snapshots.read(path)
        head = merge.head.digest if merge.ledger.fact("head") else None
        if snapshot.parent != head:
            raise Damaged(
                f"{path} follows {str(snapshot.parent)[:12]}, but head is {str(head)[:12]}",
                hint="a folder was copied in, or ledger.db is an older copy; restore both from one backup",
            )
        files.fsync_folder(merge.store.snapshots)  # it may have been cut off before that
        files.fsync_folder(merge.store.candidates)
        recording.record_accepted(merge, snapshot)
        log.info("recovery.accepted", version=version)
