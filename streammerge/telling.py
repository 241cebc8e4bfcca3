"""One target and one version: tell it, see that it serves it, ask it later whether it still does.

How it went is written in the ledger's outbox. In which order targets are told, and what follows from a wrong
answer, is decided above.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from streammerge import probe, promote, snapshots
from streammerge.errors import AnsweredWrong, Stopped, TryAgain
from streammerge.ledger import now
from streammerge.steps import reached
from streammerge.targets import Told

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config.targets import ServingSection
    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.targets import Target

FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 300.0

log = structlog.get_logger()


def attempt(merge: Merge, target: Target, row: Row, beat: Callable[[], None]) -> bool:
    """Tell one target of one promotion; False where it is to be told again, raises AnsweredWrong."""
    path = merge.store.snapshots / snapshots.folder_name(row["version"], row["digest"])
    if not path.is_dir():
        merge.ledger.close_telling(
            row["id"], "skipped", "the version was collected before the target could be told"
        )
        return True
    started = time.monotonic()
    try:
        tell(merge, target, told_of(row, path), beat)
    except Stopped:
        raise
    except TryAgain as exc:
        put_off(merge, target, row, exc)
        if isinstance(exc, AnsweredWrong):
            raise
        return False
    finally:
        merge.metrics.told_seconds.labels(target.name).observe(time.monotonic() - started)
    reached("told")
    confirm(merge, target, row, path.name)
    log.info(
        "target.confirmed",
        target=target.name,
        version=row["version"],
        seconds=round(time.monotonic() - started, 3),
    )
    return True


def told_of(row: Row, path: Path) -> Told:
    """Say what a target is told by a row of the outbox."""
    delivery = f"{row['promotion']}-{row['digest'][:12]}"
    return Told(row["version"], row["digest"], path, delivery, row["cause"])


def tell(merge: Merge, target: Target, told: Told, beat: Callable[[], None]) -> None:
    """Have a target serve a version, and see that it does."""
    target.tell(told)
    if section := section_of(merge, target.name):
        probe.ask(section, told, beat)


def section_of(merge: Merge, name: str) -> ServingSection | None:
    """Give the configuration of a target that serves."""
    return next((part for part in promote.serving(merge) if part.name == name), None)


def put_off(merge: Merge, target: Target, row: Row, why: TryAgain) -> None:
    """Leave a telling for later: after 1, 2, 4 … seconds."""
    wait = min(FIRST_RETRY_SECONDS * 2 ** min(row["attempts"], 16), LONGEST_RETRY_SECONDS)
    is_wrong = isinstance(why, AnsweredWrong)
    merge.ledger.write(
        "update outbox set attempts = attempts + 1, wrong = (wrong + 1) * ?, next_try_at = ?, error = ? "
        "where id = ?",
        is_wrong, now() + wait, why.message, row["id"],
    )  # fmt: skip
    merge.metrics.told.labels(target.name, "wrong" if is_wrong else "failed").inc()
    log.warning(
        "target.answered_wrong" if is_wrong else "target.failed",
        target=target.name,
        version=row["version"],
        error=why.message,
        hint=why.hint,
        retry_seconds=wait,
    )


def confirm(merge: Merge, target: Target, row: Row, label: str) -> None:
    """Write down that a target serves a version, and how long its fine-tunes took to get there.

    Where the ledger fails that is no failure of the target: it is told again as soon as the ledger works.
    """
    before = merge.ledger.last_told(target.name)
    with merge.ledger.transaction():
        merge.ledger.close_telling(row["id"], "done", "")
        merge.ledger.write("update outbox set confirmed_at = ?, wrong = 0 where id = ?", now(), row["id"])
        if section_of(merge, target.name):
            merge.ledger.saw_served(target.name, label)
    merge.metrics.told.labels(target.name, "ok").inc()
    for found in merge.ledger.rows(  # of each that is served here first now
        "select published_at from fine_tunes where state = 'folded' and version > ? and version <= ?",
        before["version"] if before else -1, row["version"],
    ):  # fmt: skip
        merge.metrics.served_seconds.labels(target.name).observe(max(0.0, now() - found["published_at"]))


def look_at(merge: Merge, target: Target, row: Row, beat: Callable[[], None]) -> bool:
    """Ask a target whether it serves a version that it confirmed; if not, have it told again."""
    section, path = section_of(merge, target.name), snapshots.by_version(merge.store, row["version"])
    if section is None or path is None:
        return False
    told, label = told_of(row, path), ""
    try:
        label = target.serves() or told.label
        require_same(target.name, label, told.label)
        probe.ask(section, told, beat)
    except Stopped:
        raise
    except TryAgain as exc:
        merge.ledger.saw_served(target.name, label, exc.message)
        if not isinstance(exc, AnsweredWrong):
            log.warning("target.unreachable", target=target.name, error=exc.message, hint=exc.hint)
            return False
        merge.ledger.open_telling(row["promotion"], target.name, row["version"])
        merge.metrics.drifts.labels(target.name).inc()
        log.warning("target.adrift", target=target.name, version=row["version"], error=exc.message)
        return False
    merge.ledger.saw_served(target.name, told.label)
    return True


def require_same(name: str, serves: str, wanted: str) -> None:
    """Raise AnsweredWrong where a target serves something else."""
    if serves != wanted:
        raise AnsweredWrong(
            f"target {name} serves {serves}, not {wanted}", hint="it is told of the current version again"
        )
