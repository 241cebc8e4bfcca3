"""Where head and current stand when a process takes the lock, whatever a kill, a full disk or a hand left.

What was accepted becomes head and what was intended is served; a `current` that a person moved is adopted.
Who folds needs more (`recovery`); what a person asks for does not, and this imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from streammerge import promote, snapshots, unfinished
from streammerge.collect import mark_damaged
from streammerge.errors import Damaged
from streammerge.ledger import now

if TYPE_CHECKING:
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot

CHECKED_AT_ONCE = 16  # versions, at every start

log = structlog.get_logger()


def settle(merge: Merge, *, forgiving: bool = False) -> None:
    """Make head and current what they are to be; the store has a version.

    `forgiving` lets head or current be damaged: for a rollback off it, and nothing else.
    """
    unfinished.accept_trailing(merge)
    if not forgiving:
        check_accepted(merge)
    finish_promotion(merge)


def check_accepted(merge: Merge) -> None:
    """Head and current must be there, whole by size, as the ledger says; older damaged ones are marked.

    Of the oldest, which are thousands where a target lags behind, only that they are there: they are read
    while there is nothing else to do.
    """
    marked = merge.ledger.fact("damaged") or {}
    damaged = {v: why for v, why in marked.items() if snapshots.by_version(merge.store, int(v))}
    serving = snapshots.current(merge.store)
    needed = {merge.ledger.fact("head"), serving.name if serving else None}
    may_wait = set(snapshots.names(merge.store.snapshots)) - needed
    for place, (version, digest) in enumerate(
        merge.ledger.tuples(
            "select version, digest from snapshots where state in ('accepted', 'rolled_back') "
            "order by version desc"
        )
    ):
        name = snapshots.folder_name(version, digest)
        if place >= CHECKED_AT_ONCE and name in may_wait:
            continue
        try:
            snapshots.check_sizes(snapshots.read(merge.store.snapshots / name))
        except Damaged as exc:
            if name in needed:
                raise
            damaged[str(version)] = exc.message
    mark_damaged(merge, damaged)


def finish_promotion(merge: Merge) -> None:
    """Carry out an intent that was cut off; adopt a `current` that a person moved, with a hold."""
    last = merge.ledger.last_promotion()
    serving = snapshots.current(merge.store)
    if last is None or last["switched_at"] is None:
        promote.switch(merge)
        return
    expected = snapshots.folder_name(last["version"], last["digest"])
    if serving is not None and serving.name == expected and serving.exists():
        return
    if serving is None or not serving.exists() or serving.parent != merge.store.snapshots:
        path = snapshots.by_version(merge.store, last["version"])
        if path is None:
            raise Damaged(
                f"{merge.store.current} leads nowhere and version {last['version']} is gone",
                hint=snapshots.RESTORE,
            )
        log.warning("recovery.current_restored", version=last["version"])
        snapshots.switch(merge.store, snapshots.read(path))
        return
    adopt(merge, snapshots.read(serving))


def adopt(merge: Merge, chosen: Snapshot) -> None:
    """A person pointed `current` elsewhere: that is served now, and nothing moves until they resume."""
    ledger = merge.ledger
    with ledger.transaction():
        at = now()
        number = promote.intend(merge, chosen, "adopted")
        ledger.write("update promotions set switched_at = ? where id = ?", at, number)
        ledger.set_fact(
            "hold", {"why": f"`current` was moved by hand to version {chosen.version}", "since": at}
        )
    log.error(
        "current.adopted",
        version=chosen.version,
        detail="`current` was moved by hand; held until `streammerge resume`",
    )
