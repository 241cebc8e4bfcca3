"""Which waiting fine-tunes are folded into one version, and how the one is found for which it is refused.

A version that is refused with several new fine-tunes in it says only that one of them is at fault. They are
suspects then, which the ledger keeps: the first half of them is folded next. If that is accepted, the fault
lies in the other half, whose first half follows; if not, only the half is suspected. So what stands alone at
last is at fault, or goes in. Each one at fault costs about log2(batch) + 2 versions, and whatever happens
meanwhile, a restart, a rollback, a newer revision, can only make the suspects fewer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from streammerge.aside import set_aside
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.errors import Refused
    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot

log = structlog.get_logger()


def chosen(merge: Merge, due: Sequence[Row]) -> list[Row]:
    """Choose what is folded next of what can be, in its order: suspects first, half of them."""
    known = set(merge.ledger.fact("suspects") or ())
    suspects = [row for row in due if row["id"] in known]
    if suspects:
        return suspects[: (len(suspects) + 1) // 2]
    return list(due[: merge.config.batch])


def side_by_side(rows: Sequence[Row], head: Snapshot, *, on_update: str) -> list[Row]:
    """Give the first fine-tunes that may be folded together: one of a name that is folded goes alone."""
    if len(rows) < 2 or on_update == "add":
        return list(rows)
    names = {member.series for member in head.fine_tunes}
    together: list[Row] = []
    for row in rows:
        name = (row["source"], row["name"])
        if name in names:
            return together or [row]
        names.add(name)
        together.append(row)
    return together


def blame(merge: Merge, rows: Sequence[Row], state: str, why: Refused) -> None:
    """Record that a version is refused: its one new fine-tune is set aside, several are suspects from now on.

    What was decided on meanwhile stays as it is.
    """
    pending = merge.ledger.numbers("pending")
    left = [row for row in rows if str(row["id"]) in pending]
    with merge.ledger.transaction():
        if len(rows) == 1:
            if merge.ledger.fact("suspects"):
                merge.ledger.set_fact("suspects", [])
            for row in left:
                set_aside(merge, row, state, why)
            return
        merge.ledger.set_fact("suspects", [row["id"] for row in left])
        reached("refused")
    log.warning(
        "batch.refused",
        names=[row["name"] for row in left],
        reason=why.reason,
        detail=why.message,
        hint="fewer of them are folded together next, until the one at fault stands alone",
    )
