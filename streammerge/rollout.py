"""Tell the targets what is current, in their order and canary first, until each serves it.

What a target is still to be told lies in the ledger's outbox, so it is told at least once, with the same
delivery id at each attempt. One that cannot be reached is told again and says nothing about a version. One
that serves something else later is told of what is current again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import structlog

from streammerge import promote, takeback, telling
from streammerge.errors import AnsweredWrong
from streammerge.ledger import now

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.targets import Target

LOOK_AGAIN_SECONDS = 1.0

log = structlog.get_logger()


def deliver(merge: Merge, targets: Sequence[Target], beat: Callable[[], None] = lambda: None) -> float:
    """Tell each target what is due for it, in its order, one at a time.

    Gives when the next attempt is due, 0.0 for none.
    """
    drop_unknown(merge, {target.name for target in targets})
    welcome(merge)
    due: list[float | None] = [None]
    while None in due:  # each in turn: one that lags behind holds up no other
        due = [tell_next(merge, targets, target, beat) for target in targets]
    return min((until for until in due if until), default=0.0)


def tell_next(
    merge: Merge, targets: Sequence[Target], target: Target, beat: Callable[[], None]
) -> float | None:
    """Tell a target of the next promotion, if that is due; gives None if more may be due at once for any.

    Else when to go on with this one, 0.0 where nothing is left for it.
    """
    if not target.takes_all:
        skip_older(merge, target.name)
    row = next_row(merge, target.name)
    if row is None:
        return 0.0
    if (until := max(row["next_try_at"], held_back(merge, targets, target, row, beat))) > now():
        return float(until)
    try:
        is_settled = telling.attempt(merge, target, row, beat)
    except AnsweredWrong as exc:
        is_settled = takeback.doubt(merge, target, row, exc, beat)
    else:
        takeback.acquit(merge, row)
    return None if is_settled else float((next_row(merge, target.name) or row)["next_try_at"])


def next_row(merge: Merge, target: str) -> Row | None:
    """Read the oldest promotion that a target was not told of."""
    return merge.ledger.row(
        "select outbox.*, digest, cause from outbox join promotions on promotions.id = outbox.promotion "
        "where target = ? and state = 'pending' and switched_at is not null order by outbox.id limit 1",
        target,
    )


def skip_older(merge: Merge, target: str) -> None:
    """Leave out what a newer promotion made obsolete: a serving process needs only the newest."""
    last = merge.ledger.last_promotion()
    if last is None or last["switched_at"] is None:
        return
    for row in merge.ledger.rows(
        "select * from outbox where target = ? and state = 'pending' and promotion < ?", target, last["id"]
    ):
        why = f"version {last['version']} came before the target was told"
        merge.ledger.close_telling(row["id"], "skipped", why)


def welcome(merge: Merge) -> None:
    """A target that was not configured when the current version was promoted is told of it."""
    last = merge.ledger.last_promotion()
    if last is None:
        return
    for target in merge.config.targets:
        known = merge.ledger.telling(last["id"], target.name)
        if known is None or known["state"] == "dropped":
            merge.ledger.open_telling(last["id"], target.name, last["version"])


def drop_unknown(merge: Merge, names: Iterable[str]) -> None:
    """Close the rows of targets that the configuration no longer has, and forget what they served."""
    query = "select id from outbox where state = 'pending' and target not in (select value from json_each(?))"
    for row in merge.ledger.rows(query, json.dumps([*names])):
        merge.ledger.close_telling(row["id"], "dropped", "the target is no longer configured")
    for row in merge.ledger.rows("select target from served"):
        if row["target"] not in names:
            merge.ledger.write("delete from served where target = ?", row["target"])


# Canary first


def held_back(
    merge: Merge, targets: Sequence[Target], target: Target, row: Row, beat: Callable[[], None]
) -> float:
    """Until when a target is not told yet: the canary goes first, and not too many may be unavailable.

    Going back is for all at once, and so is putting right what serves something else. 0.0 is now.
    """
    names = [part.name for part in promote.serving(merge)]
    if target.name not in names or row["cause"] not in takeback.GUARDED or row["confirmed_at"]:
        return 0.0
    rollout = merge.config.rollout
    if rollout.max_unavailable is not None:
        failing = set(names) - {target.name} - set(promote.within_reach(merge))
        if len(failing) > rollout.max_unavailable:
            return now() + LOOK_AGAIN_SECONDS
    if not rollout.soak or target.name == names[0]:
        return 0.0
    canary = next(part for part in targets if part.name == names[0])
    return until_soaked(merge, canary, row, beat)


def until_soaked(merge: Merge, canary: Target, row: Row, beat: Callable[[], None]) -> float:
    """Until when the canary serves a version alone; it is asked once more at the end of its time."""
    known, soak = merge.ledger.telling(row["promotion"], canary.name), merge.config.rollout.soak
    if known is None or known["state"] != "done":
        return now() + LOOK_AGAIN_SECONDS
    if (until := float(known["done_at"] + soak)) > now() or merge.ledger.fact("soaked") == row["promotion"]:
        return until
    if not telling.look_at(merge, canary, {**row, **known}, beat):
        return now() + LOOK_AGAIN_SECONDS
    merge.ledger.set_fact("soaked", row["promotion"])
    log.info("canary.passed", target=canary.name, version=row["version"], seconds=soak)
    return 0.0


# Is it still so?


def look(merge: Merge, targets: Iterable[Target], beat: Callable[[], None] = lambda: None) -> None:
    """Ask each serving target that has nothing to be told, now and then, what it serves."""
    last = merge.ledger.last_promotion()
    if last is None:
        return
    for target in targets:
        section, known = telling.section_of(merge, target.name), merge.ledger.telling(last["id"], target.name)
        if section is None or known is None or known["state"] != "done":
            continue
        asked = merge.ledger.served(target.name)
        if asked is None or asked["asked_at"] + section.check <= now():
            telling.look_at(merge, target, {**last, **known}, beat)
