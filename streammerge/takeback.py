"""A target answered wrong: is the version to blame, or the target? If it is the version, it is taken back.

The target is asked to serve the newest version that all had served. Only if it does that is the new one to
blame: then the older is put back on all targets and is head, and the fine-tune that came with the new one is
set aside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from streammerge import batches, promote, reversal, snapshots, telling
from streammerge.aside import take_up_again
from streammerge.errors import Refused, Stopped, TryAgain
from streammerge.ledger import now
from streammerge.targets import Told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot
    from streammerge.targets import Target

WRONG_ANSWERS = 2  # a server that restarts in the middle answers wrong once
IN_A_ROW = 3  # fine-tunes set aside without one that was served in between: a person is to look
GUARDED = ("fold", "retract")  # what is taken back: never what a person, or this, went back to

log = structlog.get_logger()


def doubt(merge: Merge, target: Target, row: Row, why: TryAgain, beat: Callable[[], None]) -> bool:
    """Find out who is to blame for wrong answers, and take the version back if it is; whether that was done.

    It is the target where it does not serve the version before either, or all have served this one already.
    """
    served = promote.verified(merge)
    if row["wrong"] + 1 < WRONG_ANSWERS or row["cause"] not in GUARDED or row["version"] in served:
        return False
    good = version_before(merge, row["version"], served)
    if good is None:
        return False
    delivery = f"{row['promotion']}-{good.digest[:12]}"
    try:
        told = Told(good.version, good.digest, good.path, delivery, "answered-wrong")
        telling.tell(merge, target, told, beat)
    except Stopped:
        raise
    except TryAgain as exc:
        log.warning(
            "target.unwell", target=target.name, version=good.version, error=exc.message, hint=exc.hint
        )
        return False
    merge.ledger.saw_served(target.name, told.label)
    return take_back(merge, target, row, good, why)


def undecided_until(merge: Merge) -> float:
    """When a target is asked again whose wrong answers do not say yet who is to blame; 0.0 for none."""
    row = merge.ledger.row(
        "select min(next_try_at) as at from outbox where state = 'pending' and wrong between 1 and ?",
        WRONG_ANSWERS,
    )
    return float(row["at"] or 0.0) if row else 0.0


def version_before(merge: Merge, version: int, served: Iterable[int]) -> Snapshot | None:
    """Find the newest of the versions that all served which is older, accepted and on disk whole."""
    marked = merge.ledger.fact("damaged") or {}
    for number in served:
        row, path = merge.ledger.snapshot(number), snapshots.by_version(merge.store, number)
        if number < version and path and row and row["state"] == "accepted" and str(number) not in marked:
            return snapshots.read(path)
    return None


def take_back(merge: Merge, target: Target, row: Row, good: Snapshot, why: TryAgain) -> bool:
    """Put the version that all served back on all of them, and make it head.

    The one fine-tune that came since is set aside. Of several, half are folded again and served, and so on:
    the one to blame stands alone at last. Three that are set aside in a row are for a person, and so is a
    version that was asked for by one.
    """
    with merge.turn:
        last, path = merge.ledger.last_promotion(), snapshots.by_version(merge.store, row["version"])
        if last is None or last["cause"] not in GUARDED or path is None:
            return False  # a person went back meanwhile
        added, _ = snapshots.read(path).fine_tunes.changes(good.fine_tunes)
        suspects = [member.digest for member in added]
        blame = Refused(
            "answered-wrong",
            f"target {target.name} served version {good.version} right, and version {row['version']} wrong: "
            f"{why.message}",
            hint="`streammerge fine-tunes retry` folds it again",
        )
        with merge.ledger.transaction():
            count = (merge.ledger.fact("taken_back") or 0) + (len(suspects) < 2)
            merge.ledger.set_fact("taken_back", count)
            merge.ledger.set_fact("unproven", suspects if len(suspects) > 1 else [])
            merge.ledger.update_snapshot(row["version"], note=blame.message)
            removed = reversal.go_back(merge, good, "answered-wrong")
            for found in removed:
                take_up_again(merge, found)
            if suspected := [found for found in removed if found["digest"] in suspects]:
                batches.blame(merge, suspected, "quarantined", blame)
            if hold := reason_to_hold(count, suspects, blame):
                merge.ledger.set_fact("hold", {"why": hold, "since": now()})
                merge.metrics.held.set(1)
        promote.switch(merge)
    log.error(
        "snapshot.taken_back",
        version=row["version"],
        to=good.version,
        target=target.name,
        error=why.message,
    )
    return True


def reason_to_hold(count: int, suspects: Sequence[str], blame: Refused) -> str:
    """Say why a person is to look now, "" if none is needed."""
    if count >= IN_A_ROW:
        return f"{count} fine-tunes in a row were not served right; the last: {blame.message}"
    return "" if suspects else f"nothing was folded, and yet {blame.message}"


def acquit(merge: Merge, row: Row) -> None:
    """After a telling: where all within reach serve the version, nothing in it is suspect any more.

    A target that could not be reached is not waited for, so this is asked after failures too.
    """
    if row["cause"] not in GUARDED or row["version"] not in promote.verified(merge)[:1]:
        return
    if unproven := merge.ledger.fact("unproven"):
        path = snapshots.by_version(merge.store, row["version"])
        proven = set(snapshots.read(path).digests) if path else set()
        merge.ledger.set_fact("unproven", [digest for digest in unproven if digest not in proven])
    if merge.ledger.fact("taken_back"):
        merge.ledger.set_fact("taken_back", 0)
