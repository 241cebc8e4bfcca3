"""What a person may ask of a store: roll back, hold, resume, approve, reject, retry, collect.

Each is a row in the ledger first, executed by whoever holds the lock: the running daemon, or the command
itself. None waits for a running fold, nor for torch to be imported; to retract, which folds, is `retracting`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from streammerge import collect, figures, promote, reports, reversal, snapshots, unfinished
from streammerge.aside import start_again
from streammerge.errors import Damaged, DiskFails, NoSpace, Stopped, StreammergeError
from streammerge.ledger import now
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot

    M = TypeVar("M", bound=Merge)

RETRIED = ("refused", "quarantined", "gone", "ignored")
APPROVED = (*RETRIED, "awaiting_approval", "denied", "pending", "retracted")

log = structlog.get_logger()


def asked_for(merge: Merge, verbs: Collection[str]) -> list[Row]:
    """List the commands with these verbs that wait."""
    return [row for row in merge.ledger.asked() if row["verb"] in verbs]


def work_off(merge: Merge) -> int:
    """Execute every command that was asked for and folds nothing; gives how many."""
    return each(merge, VERBS, execute)


def each(merge: M, verbs: Collection[str], carry_out: Callable[[M, Row], dict[str, Any]]) -> int:
    """Carry out every command with one of these verbs that was asked for; gives how many."""
    if merge.unable:  # what could not be finished must not wait for a fold either
        unfinished.finish(merge)
    asked = asked_for(merge, verbs)
    for row in asked:
        try:
            result = carry_out(merge, row)
            log.info("command.done", verb=row["verb"], **result)
        except (Damaged, DiskFails, NoSpace, Stopped):
            raise
        except StreammergeError as exc:
            merge.ledger.answer(
                row["id"], "failed", {"error": exc.message, "hint": exc.hint, "exit": exc.exit_code}
            )
            log.warning("command.failed", verb=row["verb"], error=exc.message)
    return len(asked)


def execute(merge: Merge, row: Row) -> dict[str, Any]:
    """Carry out one command and its answer in one transaction: killed anywhere, it was done once or not yet.

    Collecting removes files as it goes and may be done twice, so it is no transaction. `current` moves after
    the intent is durable, never before.
    """
    arguments = json.loads(row["arguments"])
    with merge.turn:
        unfinished.finish(merge)  # a version that was accepted and not recorded is head, for a rollback too
        if row["verb"] == "gc":
            result = gc(merge)
            reached("obeyed")
            merge.ledger.answer(row["id"], "done", result)
        else:
            with merge.ledger.transaction():
                result = VERBS[row["verb"]](merge, **arguments)
                merge.ledger.answer(row["id"], "done", result)
                reached("obeyed")
        reached("answered")
        promote.switch(merge)
    return result


def hold(merge: Merge, *, why: str = "") -> dict[str, Any]:
    """Stop folding and promotion; polling and fetching go on."""
    reason = why or "held by a person"
    merge.ledger.set_fact("hold", {"why": reason, "since": now()})
    merge.metrics.held.set(1)
    return {"held": reason}


def resume(merge: Merge) -> dict[str, Any]:
    """Lift the hold, and only the hold: denied digests stay out."""
    was = merge.held
    merge.ledger.set_fact("hold", None)
    merge.ledger.set_fact("taken_back", 0)
    merge.metrics.held.set(0)
    return {"held": None, "was": was or None}


def rollback(merge: Merge, *, version: int | None = None) -> dict[str, Any]:
    """Make an older version head and current, deny what was folded after it, and hold.

    Rolling to a version that holds denied digests lets those in again.
    """
    old = merge.head
    chosen = choose(merge, old, version)
    removed, _ = old.fine_tunes.changes(chosen.fine_tunes)
    merge.ledger.deny(
        (member.digest for member in removed), f"rolled back from version {old.version} to {chosen.version}"
    )
    merge.ledger.set_fact("hold", {"why": f"rolled back to version {chosen.version}", "since": now()})
    for row in reversal.go_back(merge, chosen, "rollback"):
        detail = f"taken out by the rollback to version {chosen.version}"
        merge.ledger.update_fine_tune(row["id"], state="denied", reason="denied", version=None, detail=detail)
    merge.metrics.held.set(1)
    names = [member.name for member in removed]
    return {"version": chosen.version, "from": old.version, "denied": names, "held": True}


def choose(merge: Merge, head: Snapshot, version: int | None) -> Snapshot:
    """Find the version to roll to: the parent of what is served, unless named; it must be there whole."""
    if version is None:
        serving = snapshots.current(merge.store)
        parent = (snapshots.read(serving) if serving else head).parent
        found = [
            p for p in snapshots.folders(merge.store.snapshots) if parent and p.name.endswith(parent[:12])
        ]
        if not found:
            raise StreammergeError(
                f"version {head.version} has no earlier version on disk",
                hint="`streammerge history` lists the versions that are there",
            )
        path = found[0]
    else:
        by_number = snapshots.by_version(merge.store, version)
        if by_number is None:
            raise StreammergeError(
                f"version {version} is not on disk",
                hint="`streammerge history` lists the versions that are there",
            )
        path = by_number
    number = str(snapshots.number(path))
    marked = merge.ledger.fact("damaged") or {}
    if harm := marked.get(number) or next(snapshots.harm_of(path, content=False), ""):
        raise StreammergeError(f"version {number} is damaged: {harm}", hint="choose another version")
    return snapshots.read(path)


def approve(merge: Merge, *, name: str) -> dict[str, Any]:
    """Let a fine-tune in that waits for a person, or that was denied, refused or set aside.

    What a screen of figures said against it is overruled from now on, for this revision.
    """
    row = find_fine_tune(merge, name)
    refuse_settled(row, "approve", APPROVED)
    merge.ledger.allow([row["digest"]])
    if row["reason"] in figures.REASONS:
        overruled = {
            *row["overruled"].split(),
            *figures.spoken_against(merge.ledger.figures_of(row["digest"])),
        }
        merge.ledger.update_fine_tune(row["id"], overruled=" ".join(sorted(overruled)))
    if row["state"] in ("awaiting_approval", "pending"):
        merge.ledger.update_fine_tune(row["id"], state="pending", detail="", approved=1)
    else:
        start_again(merge, row, approved=1)
    return {"name": row["name"], "source": row["source"], "revision": row["revision"], "state": "pending"}


def retry(merge: Merge, *, name: str) -> dict[str, Any]:
    """Take a refused, quarantined or vanished fine-tune up again from the start."""
    row = find_fine_tune(merge, name)
    refuse_settled(row, "retry", RETRIED)
    start_again(merge, row, approved=row["approved"])
    return {"name": row["name"], "source": row["source"], "revision": row["revision"], "state": "pending"}


def reject(merge: Merge, *, name: str) -> dict[str, Any]:
    """Keep a fine-tune out: its content is denied under any name."""
    row = find_fine_tune(merge, name)
    if row["state"] == "folded":
        raise StreammergeError(
            f"{row['name']} is folded into version {row['version']}",
            hint="`streammerge retract` takes it out",
        )
    with merge.ledger.transaction():
        if row["digest"]:
            merge.ledger.deny([row["digest"]], "rejected by a person")
        merge.ledger.update_fine_tune(
            row["id"], state="denied", reason="denied", detail="rejected by a person"
        )
    return {"name": row["name"], "source": row["source"], "revision": row["revision"], "state": "denied"}


def refuse_settled(row: Row, verb: str, states: tuple[str, ...]) -> None:
    """Raise for a fine-tune that is in none of `states`: what it is, and what can be done instead."""
    if row["state"] in states and row["revision"]:
        return
    where = "" if row["version"] is None else f" into version {row['version']}"
    hints = {
        "denied": "`streammerge fine-tunes approve` lets it in again",
        "retracted": "`streammerge fine-tunes approve` lets it in again",
        "waiting": "wait until it is complete",
        "superseded": "its newer revision stands for it",
    }
    raise StreammergeError(
        f"{row['name']} is {row['state']}{where} already; nothing to {verb}", hint=hints.get(row["state"], "")
    )


def find_fine_tune(merge: Merge, name: str, prefer: str = "") -> Row:
    """Find `[SOURCE:]NAME[@REVISION]`, the newest that matches; one in state `prefer` before all others."""
    if prefer:
        with suppress(StreammergeError):
            return reports.match_fine_tune(merge.ledger.fine_tunes(prefer), name)
    return reports.match_fine_tune(merge.ledger.fine_tunes(), name)


def gc(merge: Merge) -> dict[str, Any]:
    """Remove versions beyond `keep` that nothing needs."""
    return {"removed": collect.tidy(merge)}


VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "hold": hold, "resume": resume, "rollback": rollback,
    "approve": approve, "retry": retry, "reject": reject, "gc": gc,
}  # fmt: skip
FOLDING = frozenset({"retract"})  # `retracting` executes these, where folding is done
