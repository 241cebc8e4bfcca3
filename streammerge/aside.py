"""Where a fine-tune goes that does not go in: refused, set aside, back for later, or left to its source.

Each way is one row, one log line and the metrics; why it goes there was decided elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import structlog

from streammerge import files
from streammerge.errors import (
    DiskFails,
    NoDeviceMemory,
    NoMemory,
    NoSpace,
    Quarantined,
    RateLimited,
    Unable,
    Withheld,
)
from streammerge.ledger import now
from streammerge.steps import reached

if TYPE_CHECKING:
    from streammerge.errors import Refused, TryAgain
    from streammerge.ledger import Row
    from streammerge.merging import Merge

RETRY_SECONDS = (2.0, 5.0, 15.0, 60.0, 300.0)
UNABLE_SECONDS = 15.0  # how soon a machine that could not is asked again, at the latest
QUARANTINED = frozenset({"answered-wrong", "needs-replay", "quality"})
OTHER_STATES = {"denied": "denied", "ignored": "ignored"}

log = structlog.get_logger()


def remove_fetched(merge: Merge, row: Row) -> None:
    """Remove what was fetched of a fine-tune, or begun to be."""
    for name in (f"{row['id']}", f"{row['id']}.part"):
        files.remove_tree(merge.store.inbox / name)


def set_aside(merge: Merge, row: Row, state: str, why: Refused) -> None:
    """Record why a fine-tune does not go in; the queue goes on."""
    if isinstance(why, Quarantined) or why.reason in QUARANTINED:
        state = "quarantined"
    state = OTHER_STATES.get(why.reason, state)
    detail = f"{why.message}; {why.hint}" if why.hint else why.message
    merge.ledger.update_fine_tune(row["id"], state=state, reason=why.reason, detail=detail, version=None)
    reached("refused")
    if state in ("refused", "quarantined"):
        merge.metrics.refused.labels(why.reason).inc()
    if state != "denied":
        merge.metrics.decided.labels(row["source"], state).inc()
    log.warning(
        "finetune.refused",
        **{key: row[key] for key in ("source", "name", "revision")},
        state=state,
        reason=why.reason,
        detail=why.message,
        hint=why.hint,
        figures=merge.ledger.values_of(row["digest"]),
    )
    merge.ledger.afterwards(partial(remove_fetched, merge, row))


def start_again(merge: Merge, row: Row, *, approved: int) -> None:
    """Put a row back at the start of its journey."""
    remove_fetched(merge, row)
    take_up_again(merge, {**row, "approved": approved})


def take_up_again(merge: Merge, row: Row) -> None:
    """Have a fine-tune folded anew, out of what was fetched of it if that is still here."""
    is_here = (merge.store.inbox / str(row["id"])).is_dir()
    merge.ledger.update_fine_tune(
        row["id"],
        state="pending",
        reason="",
        detail="",
        step="fetched" if is_here else "announced",
        approved=row["approved"],
        attempts=0,
        next_try_at=0.0,
        version=None,
    )


def put_back(merge: Merge, row: Row, why: TryAgain) -> float:
    """Leave a fine-tune pending for a later try; gives when. What is withheld waits for its source."""
    if isinstance(why, Withheld):
        withhold(merge, row, why)
        return 0.0
    if isinstance(why, RateLimited):
        leave_alone(merge, row["source"], why)
        return now() + why.seconds
    wait = RETRY_SECONDS[min(row["attempts"], len(RETRY_SECONDS) - 1)]
    wait = min(wait, UNABLE_SECONDS) if isinstance(why, Unable) else wait
    merge.ledger.write(  # what was decided before it failed stays decided
        "update fine_tunes set attempts = attempts + 1, next_try_at = ?, detail = ?, updated_at = ? "
        "where id = ? and state = 'pending'",
        now() + wait, why.message, now(), row["id"],
    )  # fmt: skip
    if isinstance(why, Unable):
        note_unable(merge, why)
    merge.metrics.folds.labels("abandoned").inc()
    merge.metrics.device_full.inc(isinstance(why, NoDeviceMemory))
    log.warning(
        "finetune.put_back",
        source=row["source"],
        name=row["name"],
        detail=why.message,
        hint=why.hint,
        retry_seconds=wait,
    )
    return now() + wait


def note_unable(merge: Merge, why: Unable) -> None:
    """Remember what the machine withholds, and say so when it begins."""
    if type(merge.unable) is not type(why):
        log.warning(
            {NoSpace: "disk.full", DiskFails: "disk.failing", NoMemory: "memory.short"}[type(why)],
            detail=why.message,
            hint=why.hint,
        )
    merge.unable = why
    merge.metrics.disk_errors.inc(isinstance(why, DiskFails))


def leave_alone(merge: Merge, source: str, why: RateLimited) -> None:
    """Ask a source for nothing until it may be asked; no fine-tune is to blame."""
    merge.ledger.write(
        "update fine_tunes set next_try_at = max(next_try_at, ?), detail = ? "
        "where source = ? and state = 'pending' and step = 'announced'",
        now() + why.seconds, why.message, source,
    )  # fmt: skip
    log.info("source.rate_limited", source=source, retry_seconds=round(why.seconds, 1))


def withhold(merge: Merge, row: Row, why: Withheld) -> None:
    """Its place does not give it out now; the source looks whether that has changed."""
    state = "waiting" if why.reason in ("gated", "disabled") else "gone"
    detail = f"{why.message}; {why.hint}"
    with merge.ledger.transaction():
        merge.ledger.update_fine_tune(row["id"], state=state, reason=why.reason, detail=detail)
        merge.ledger.write(
            "update sightings set revision = '' where (source, name) = (?, ?)", row["source"], row["name"]
        )
    if state == "gone":
        merge.metrics.decided.labels(row["source"], state).inc()
    log.info("finetune.withheld", source=row["source"], name=row["name"], reason=why.reason)
