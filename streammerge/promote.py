"""Switch `current`, and tell the targets until each confirms.

The intent and the outbox rows are written in the caller's transaction before the link moves; the link moves
by one rename; targets get every promotion in order, at least once, with the same delivery id at each attempt.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import structlog

from streammerge import machine, snapshots
from streammerge.errors import Stopped, TryAgain
from streammerge.ledger import now
from streammerge.steps import reached
from streammerge.targets import Told

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot
    from streammerge.targets import Target

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 300.0

log = structlog.get_logger()


def intend(merge: Merge, snapshot: Snapshot, cause: str) -> int:
    """Write the intent to serve `snapshot` and what each target must be told, in the caller's transaction."""
    ledger = merge.ledger
    promotion = ledger.write(
        "insert into promotions (version, digest, cause, intended_at) values (?, ?, ?, ?)",
        snapshot.version, snapshot.digest, cause, now(),
    )  # fmt: skip
    for target in merge.config.targets:
        ledger.write(
            "insert into outbox (promotion, target, version) values (?, ?, ?)",
            promotion,
            target.name,
            snapshot.version,
        )
    return promotion


def switch(merge: Merge) -> None:
    """Carry out the newest intent; done already is no error."""
    promotion = merge.ledger.last_promotion()
    if promotion is None or promotion["switched_at"] is not None:
        return
    path = snapshots.by_version(merge.store, promotion["version"])
    assert path is not None, f"version {promotion['version']} was promoted but is not in snapshots/"
    reached("intended")
    with machine.errors("switching current", merge.store.root):
        snapshots.switch(merge.store, snapshots.read(path))
    reached("switched")
    at = now()
    with merge.ledger.transaction():
        merge.ledger.write("update promotions set switched_at = ? where id = ?", at, promotion["id"])
        merge.ledger.update_snapshot(promotion["version"], promoted_at=at)
    merge.metrics.promotions.labels(promotion["cause"]).inc()
    log.info(
        "snapshot.promoted",
        version=promotion["version"],
        digest=promotion["digest"][:12],
        cause=promotion["cause"],
    )


def deliver(merge: Merge, targets: Sequence[Target]) -> float:
    """Tell each target what is due for it, in order, one at a time.

    Gives when the next attempt is due, 0.0 for none.
    """
    drop_unknown(merge, {target.name for target in targets})
    welcome(merge)
    is_told = True
    while is_told:
        is_told = False
        for target in targets:  # each in turn: one that lags behind holds up no other
            is_told |= tell_next(merge, target)
    left = [row for target in targets if (row := next_row(merge, target.name))]
    return min((row["next_try_at"] for row in left), default=0.0)


def tell_next(merge: Merge, target: Target) -> bool:
    """Tell a target of the oldest promotion that is due for it; whether that worked."""
    row = next_row(merge, target.name)
    return row is not None and row["next_try_at"] <= now() and attempt(merge, target, row)


def next_row(merge: Merge, target: str) -> Row | None:
    """Read the oldest promotion that a target was not told of."""
    return merge.ledger.row(
        "select outbox.*, promotions.digest, promotions.switched_at from outbox "
        "join promotions on promotions.id = outbox.promotion "
        "where target = ? and state = 'pending' and switched_at is not null order by outbox.id limit 1",
        target,
    )


def attempt(merge: Merge, target: Target, row: Row) -> bool:
    """Tell one target of one promotion; record how it went."""
    path = merge.store.snapshots / snapshots.folder_name(row["version"], row["digest"])
    if not path.is_dir():
        finish(merge, row, "skipped", "the version was collected before the target could be told")
        return True
    started = time.monotonic()
    try:
        target.tell(Told(row["version"], row["digest"], path, f"{row['promotion']}-{row['digest'][:12]}"))
    except Stopped:
        raise
    except TryAgain as exc:
        wait = min(FIRST_RETRY_SECONDS * 2 ** min(row["attempts"], 16), LONGEST_RETRY_SECONDS)
        merge.ledger.write(
            "update outbox set attempts = attempts + 1, next_try_at = ?, error = ? where id = ?",
            now() + wait,
            str(exc.message),
            row["id"],
        )
        merge.metrics.told.labels(target.name, "failed").inc()
        log.warning(
            "target.failed",
            target=target.name,
            version=row["version"],
            error=exc.message,
            hint=exc.hint,
            retry_seconds=wait,
        )
        return False
    finally:
        merge.metrics.told_seconds.labels(target.name).observe(time.monotonic() - started)
    reached("told")
    finish(merge, row, "done", "")
    merge.metrics.told.labels(target.name, "ok").inc()
    observe_latency(merge, target.name)
    log.info(
        "target.confirmed",
        target=target.name,
        version=row["version"],
        seconds=round(time.monotonic() - started, 3),
    )
    return True


def observe_latency(merge: Merge, target: str) -> None:
    """Record the time from a fine-tune's publication to its being served."""
    told = merge.ledger.last_told(target)
    row = merge.ledger.row(
        "select max(published_at) as at from fine_tunes where (state, version) = ('folded', ?)",
        told["version"] if told else None,
    )
    if row and row["at"]:
        merge.metrics.served_seconds.labels(target).observe(max(0.0, now() - row["at"]))


def finish(merge: Merge, row: Row, state: str, error: str) -> None:
    """Close an outbox row."""
    merge.ledger.write(
        "update outbox set state = ?, error = ?, done_at = ? where id = ?", state, error, now(), row["id"]
    )


def welcome(merge: Merge) -> None:
    """A target that was never told anything is told of what is served now."""
    last = merge.ledger.last_promotion()
    for target in merge.config.targets if last else ():
        if not merge.ledger.row("select 1 from outbox where target = ?", target.name):
            merge.ledger.write(
                "insert into outbox (promotion, target, version) values (?, ?, ?)",
                last["id"], target.name, last["version"],  # type: ignore[index]
            )  # fmt: skip


def drop_unknown(merge: Merge, names: Iterable[str]) -> None:
    """Close the rows of targets that the configuration no longer has."""
    query = "select * from outbox where state = 'pending' and target not in (select value from json_each(?))"
    for row in merge.ledger.rows(query, json.dumps([*names])):
        finish(merge, row, "dropped", "the target is no longer configured")


def awaited(merge: Merge) -> set[int]:
    """List versions that some target is still to be told of, and the last one each confirmed."""
    pending = merge.ledger.tuples("select distinct version from outbox where state = 'pending'")
    confirmed = [merge.ledger.last_told(part.name) for part in merge.config.targets]
    return {version for (version,) in pending} | {row["version"] for row in confirmed if row}
