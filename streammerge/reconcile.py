"""What a source sees, laid beside what the ledger knows: which fine-tunes are new, waiting, changed or gone.

A second sighting of the same revision changes nothing. Nothing here reads a fine-tune's bytes, and nothing
that a source fails to show is ever taken out of the merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

import structlog

from streammerge.config.sources import Since
from streammerge.ledger import iso, now
from streammerge.sources import Known, Sighting
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streammerge.config.sources import SourceSection
    from streammerge.ledger import Ledger, Row
    from streammerge.merging import Merge
    from streammerge.sources import Look, Source

log = structlog.get_logger()

DAY_SECONDS = 86400.0
REMEMBERED_AT_ONCE = 64
UNDECIDED = ("waiting", "pending", "awaiting_approval")


def observe(merge: Merge, source: Source, config: SourceSection) -> float:
    """Look at a source once and record the difference.

    Gives when to look again at the latest, 0.0 for the poll. Raises errors.TryAgain if the source cannot be
    seen.
    """
    ledger = merge.ledger
    looked_at = now()
    before = ledger.row("select * from sources where name = ?", source.name) or {"primed": 0, "mark": ""}
    look = source.look(Remembered(ledger, source.name), before["mark"])
    with ledger.transaction():
        for sighting in unsettled(ledger, source.name, look):
            record(merge, config, sighting, looked_at, is_first=not before["primed"])
        present = chain(look.unchanged, (sighting.name for sighting in look.sightings))
        mark_gone(merge, source.name, present, only=look.gone)
        ledger.write(
            "insert into sources (name, state, last_success_at, primed, mark) values (?, 'ok', ?, 1, ?) "
            "on conflict (name) do update set state = 'ok', error = '', primed = 1, "
            "last_success_at = excluded.last_success_at, mark = excluded.mark",
            source.name, now(), look.mark,
        )  # fmt: skip
    return look.again_at


def failed(ledger: Ledger, source: str, error: str) -> None:
    """Record that a source could not be seen; nothing else changes."""
    ledger.write(
        "insert into sources (name, state, error) values (?, 'error', ?) on conflict (name) "
        "do update set state = 'error', error = excluded.error",
        source,
        error,
    )


def forget(ledger: Ledger, source: str, name: str) -> None:
    """Have what a source sees of a fine-tune next count as new to it."""
    ledger.write("update sightings set revision = '' where (source, name) = (?, ?)", source, name)


def drop_sources(merge: Merge, names: Iterable[str]) -> None:
    """What a source that is no longer configured had announced will not be folded, unless it was fetched."""
    kept = set(names)
    for source in {row["source"] for row in merge.ledger.fine_tunes(*UNDECIDED)} - kept:
        mark_gone(merge, source, (), "its source is no longer configured")


class Remembered(Mapping[str, Known]):
    """What a source recognised at earlier looks, by name: thousands, perhaps, so a part of them at a time.

    It is to be asked in the order of names.
    """

    def __init__(self, ledger: Ledger, source: str, only: str = "true") -> None:
        """`only` is SQL's: those of the rows `seen` that count."""
        self._ledger, self._source = ledger, source
        self._query = (
            "select name, fingerprint, revision, first_seen_at from sightings as seen "  # noqa: S608 -- our own
            f"where source = ? and name >= ? and {only} order by name limit ?"
        )
        self._part: dict[str, Known] = {}
        self._first: str | None = None
        self._last: str | None = ""  # None: there is nothing behind

    def __getitem__(self, name: str) -> Known:
        if self._first is None or name < self._first or (self._last is not None and name > self._last):
            self._read(name)
        return self._part[name]

    def __iter__(self) -> Iterator[str]:
        start: str | None = ""
        while start is not None:
            self._read(start)
            part, last = self._part, self._last
            yield from part
            start = last and f"{last}\0"  # no name is between the two

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _read(self, start: str) -> None:
        found = self._ledger.tuples(self._query, self._source, start, REMEMBERED_AT_ONCE)
        self._part = {name: Known(*facts) for name, *facts in found}
        self._first, self._last = start, found[-1][0] if len(found) == REMEMBERED_AT_ONCE else None


def unsettled(ledger: Ledger, source: str, look: Look) -> Iterator[Sighting]:
    """Give what a look found but for what needs no second thought: most of it, of thousands."""
    settled = Remembered(ledger, source, SETTLED)
    for sighting in look.sightings:
        before = settled.get(sighting.name)
        if before is None or not before.is_same(sighting):
            yield sighting
    known = Remembered(ledger, source)
    for name in look.unchanged:
        if name not in settled:
            before = known.get(name)
            if before is not None and before.revision:  # else the next look sees that it changed
                yield Sighting(name, before.revision, before.first_seen_at, fingerprint=before.fingerprint)


# Names that need no second thought where they are seen unchanged: those have a row which the same sighting
# would leave as it is, and no other row that may be folded.
SETTLED = (
    "seen.revision != '' and exists (select 1 from fine_tunes as own "
    "where (own.source, own.name, own.revision) = (seen.source, seen.name, seen.revision) "
    "and (own.state not in ('waiting', 'superseded', 'gone', 'replaced', 'ignored') "
    "or (own.state, own.reason) = ('ignored', 'first_run')) "
    "and not exists (select 1 from fine_tunes as other "
    "where (other.source, other.name) = (seen.source, seen.name) and other.id != own.id "
    "and (other.revision = '' or other.state in ('waiting', 'pending', 'awaiting_approval'))))"
)


def record(
    merge: Merge, config: SourceSection, sighting: Sighting, looked_at: float, *, is_first: bool
) -> None:
    """Lay one sighting beside its row."""
    ledger = merge.ledger
    seen = ledger.row("select * from sightings where (source, name) = (?, ?)", config.name, sighting.name)
    first_seen = seen["first_seen_at"] if seen and seen["fingerprint"] == sighting.fingerprint else looked_at
    published = sighting.published_at if is_first or sighting.is_dated else first_seen
    is_unwanted = is_ignored(config, sighting, published, is_first=is_first)
    ledger.write(
        "insert or replace into sightings values (?, ?, ?, ?, ?)",
        config.name, sighting.name, sighting.fingerprint, sighting.revision, first_seen,
    )  # fmt: skip
    waiting = ledger.fine_tune(config.name, sighting.name, "")
    if not sighting.revision:
        if waiting is None and sighting.is_withheld and is_missed(ledger, config.name, sighting.name):
            return
        if waiting is None:
            note_waiting(merge, config, sighting, published, state="ignored" if is_unwanted else "waiting")
        else:
            still_waiting(merge, waiting, sighting, looked_at)
        return
    was_ignored = waiting is not None and waiting["state"] == "ignored"
    if waiting is not None:
        published = waiting["published_at"]
        ledger.write("delete from fine_tunes where id = ?", waiting["id"])
    if row := ledger.fine_tune(config.name, sighting.name, sighting.revision):
        supersede(merge, config.name, sighting.name, but=row["id"])
        if row["state"] in ("superseded", "gone", "waiting", "replaced"):  # it came back
            ledger.update_fine_tune(
                row["id"], state="pending", reason="", detail="", step="announced", published_at=published
            )
        if row["state"] == "ignored" and row["reason"] != "first_run" and not sighting.excluded:
            ledger.write("delete from fine_tunes where id = ?", row["id"])  # the rule no longer holds
        else:
            return
    rule = sighting.excluded or ("first_run" if was_ignored or is_unwanted else "")
    announce(merge, config, sighting, published, rule=rule)


def is_ignored(config: SourceSection, sighting: Sighting, published_at: float, *, is_first: bool) -> bool:
    """Whether `first_run` leaves out what was there at the first look, or is as old."""
    if isinstance(config.first_run, Since):
        return (is_first or sighting.is_dated) and published_at < config.first_run.timestamp
    return is_first and not sighting.is_dated and config.first_run == "ignore"


def turn_of(ledger: Ledger, config: SourceSection, sighting: Sighting) -> float:
    """When a fine-tune may be fetched: after `min_age`, and after those `max_per_day` lets by first."""
    most = getattr(config, "max_per_day", None)
    if most is None:
        return sighting.not_before
    turns = ledger.rows(
        "select max(first_seen_at, next_try_at) as at from fine_tunes where source = ? and revision != '' "
        "and state not in ('ignored', 'gone', 'superseded') order by at desc limit 1 offset ?",
        config.name, most - 1,
    )  # fmt: skip
    soonest = turns[0]["at"] + DAY_SECONDS if turns else 0.0
    return max(sighting.not_before, soonest if soonest > now() else 0.0)


def announce(
    merge: Merge, config: SourceSection, sighting: Sighting, published_at: float, *, rule: str
) -> None:
    """Step 1: a new revision becomes a row; `rule` of the configuration leaves it out, "" for none."""
    state = "ignored" if rule else "refused" if sighting.refused else "pending"
    turn_at = 0.0
    if state == "pending":
        supersede(merge, config.name, sighting.name)
        turn_at = turn_of(merge.ledger, config, sighting)
    detail = f"its turn comes at {iso(turn_at)} (min_age, max_per_day)" if turn_at else sighting.waiting_for
    merge.ledger.announce(
        config.name, sighting.name, sighting.revision,
        state=state, reason=rule or sighting.refused, detail=detail, next_try_at=turn_at,
        digest=sighting.digest, factor=config.weight, published_at=published_at, first_seen_at=now(),
    )  # fmt: skip
    merge.metrics.discovered.labels(config.name).inc()
    if state != "pending":
        merge.metrics.decided.labels(config.name, state).inc()
    if state == "refused":
        merge.metrics.refused.labels(sighting.refused).inc()
    log.info(
        "finetune.announced", source=config.name, name=sighting.name, revision=sighting.revision, state=state,
        reason=rule or sighting.refused or None,
    )  # fmt: skip
    reached("announced")


def supersede(merge: Merge, source: str, name: str, *, but: int = 0) -> None:
    """A newer revision takes the place of those still undecided."""
    for row in undecided(merge.ledger, source, name):
        if row["id"] != but:
            merge.ledger.update_fine_tune(
                row["id"], state="superseded", detail="a newer revision was published first"
            )
            merge.metrics.decided.labels(source, "superseded").inc()


def is_missed(ledger: Ledger, source: str, name: str) -> bool:
    """Whether a revision that was announced could not be had: its own row says so."""
    query = "select 1 from fine_tunes where (source, name) = (?, ?) and state in ('waiting', 'gone')"
    return ledger.row(query, source, name) is not None


def undecided(ledger: Ledger, source: str, name: str) -> list[Row]:
    """List the rows of one fine-tune that may still be folded."""
    return [row for row in ledger.fine_tunes(*UNDECIDED) if (row["source"], row["name"]) == (source, name)]


def note_waiting(
    merge: Merge, config: SourceSection, sighting: Sighting, published_at: float, *, state: str
) -> None:
    """Show a fine-tune that is not complete yet."""
    merge.ledger.announce(
        config.name, sighting.name, "", state=state, detail=sighting.waiting_for,
        next_try_at=sighting.until, factor=config.weight, published_at=published_at,
    )  # fmt: skip


def still_waiting(merge: Merge, row: Row, sighting: Sighting, looked_at: float) -> None:
    """Keep a waiting row up to date; refuse it when its files stay incomplete for too long."""
    if row["state"] not in ("waiting", "refused", "gone"):
        return
    seen = merge.ledger.row(
        "select first_seen_at from sightings where (source, name) = (?, ?)", row["source"], row["name"]
    )
    unchanged_seconds = looked_at - (seen["first_seen_at"] if seen else looked_at)
    late = unchanged_seconds > merge.config.incomplete_after and not sighting.is_withheld
    state, reason = ("refused", "incomplete") if late else ("waiting", "")
    if (state, sighting.waiting_for) != (row["state"], row["detail"]):
        merge.ledger.update_fine_tune(
            row["id"], state=state, reason=reason, detail=sighting.waiting_for, next_try_at=sighting.until
        )
    if late and row["state"] != "refused":
        merge.metrics.decided.labels(row["source"], "refused").inc()
        merge.metrics.refused.labels("incomplete").inc()
        log.warning(
            "finetune.refused",
            source=row["source"],
            name=row["name"],
            reason="incomplete",
            detail=sighting.waiting_for,
        )


def mark_gone(
    merge: Merge,
    source: str,
    present: Iterable[str],
    why: str = "it vanished before it was fetched",
    only: frozenset[str] | None = None,
) -> None:
    """What vanished before it was fetched will not be folded: all that is not `present`, or `only` some."""
    rows = [row for row in merge.ledger.fine_tunes(*UNDECIDED) if row["source"] == source]
    missing = {row["name"] for row in rows}.difference(present) if only is None else only
    for row in rows:
        if row["name"] in missing and row["step"] == "announced":
            merge.ledger.update_fine_tune(row["id"], state="gone", detail=why)
            if only is not None:  # such a source tells of changes alone: its coming back is to be one
                forget(merge.ledger, source, row["name"])
            merge.metrics.decided.labels(source, "gone").inc()
            log.info("finetune.gone", source=source, name=row["name"])
