"""Switch `current`, and write down who is to be told of it.

The intent and the outbox rows are written in the caller's transaction before the link moves; the link moves
by one rename. Telling is `rollout`'s.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import structlog

from streammerge import machine, snapshots
from streammerge.config.targets import Serving
from streammerge.ledger import now
from streammerge.steps import reached

if TYPE_CHECKING:
    from streammerge.config.targets import ServingSection
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot

LOOKED_BACK = 16  # versions: what is older is seldom on disk, and nothing to go back to by itself

log = structlog.get_logger()


def intend(merge: Merge, snapshot: Snapshot, cause: str) -> int:
    """Write the intent to serve `snapshot` and what each target must be told, in the caller's transaction."""
    ledger = merge.ledger
    promotion = ledger.write(
        "insert into promotions (version, digest, cause, intended_at) values (?, ?, ?, ?)",
        snapshot.version, snapshot.digest, cause, now(),
    )  # fmt: skip
    for target in merge.config.targets:
        ledger.open_telling(promotion, target.name, snapshot.version)
    return promotion


def switch(merge: Merge) -> None:
    """Carry out the newest intent; done already is no error."""
    promotion = merge.ledger.last_promotion()
    if promotion is None or promotion["switched_at"] is not None:
        return
    path = snapshots.by_version(merge.store, promotion["version"])
    assert path is not None, f"version {promotion['version']} was promoted but is not in snapshots/"
    reached("intended")
    with merge.metrics.stage("promote"), machine.errors("switching current", merge.store.root):
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


def serving(merge: Merge) -> list[ServingSection]:
    """List the targets that serve versions, in their order; the others are only told of them."""
    return [part for part in merge.config.targets if isinstance(part, Serving)]


def within_reach(merge: Merge) -> list[str]:
    """Name the serving targets but those that were not reached when they were told last."""
    away = merge.ledger.rows(
        "select target from outbox where state = 'pending' and attempts > 0 and wrong = 0"
    )
    names = {row["target"] for row in away}
    return [part.name for part in serving(merge) if part.name not in names]


def verified(merge: Merge) -> list[int]:
    """List the versions that every serving target within reach has served, newest first: the newest few."""
    names = within_reach(merge)
    found = merge.ledger.tuples(
        "select version from outbox indexed by outbox_confirmed "
        "where confirmed_at is not null and target in (select value from json_each(?)) "
        "group by version having count(distinct target) = ? order by version desc limit ?",
        json.dumps(names), len(names), LOOKED_BACK,
    )  # fmt: skip
    return [version for (version,) in found]


def is_unproven(merge: Merge) -> bool:
    """Whether head holds what was in a version that was taken back, and the targets do not serve it yet.

    Nothing is folded upon it meanwhile: the next wrong answer names who is to blame.
    """
    unproven = set(merge.ledger.fact("unproven") or ())
    holds_one = bool(unproven) and any(member.digest in unproven for member in merge.head.fine_tunes)
    return holds_one and merge.head.version not in verified(merge)


def awaited(merge: Merge) -> set[int]:
    """List the versions that targets need: to be told of, confirmed last, served now, or served by all."""
    pending = merge.ledger.tuples("select version from outbox where state = 'pending'")
    confirmed = [merge.ledger.last_told(part.name) for part in merge.config.targets]
    reported = [
        snapshots.version_of(row["snapshot"]) for row in merge.ledger.rows("select snapshot from served")
    ]
    return {
        *(version for (version,) in pending),
        *(row["version"] for row in confirmed if row),
        *(version for version in reported if version is not None),
        *verified(merge)[:1],
    }
