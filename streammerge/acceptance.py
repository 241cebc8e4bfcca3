"""Is a sealed candidate let in? Gated, accepted and promoted, or kept aside; each way with its rows.

Steps 7 to 9 of the story. Knows nothing of how a candidate was made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from streammerge import batches, files, gates, promote, recording, snapshots
from streammerge.aside import RETRY_SECONDS
from streammerge.collect import tidy
from streammerge.errors import ConfigError, Refused, Stopped, TryAgain
from streammerge.ledger import now
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.ledger import Row
    from streammerge.members import Member
    from streammerge.recipes import FoldingMerge
    from streammerge.snapshots import Snapshot

log = structlog.get_logger()


def conclude(
    merge: FoldingMerge, candidate: Snapshot, *, seconds: float = 0.0, asked_for: bool = False
) -> bool:
    """Steps 7 to 9: gate, accept, promote. False where the candidate was refused or discarded.

    What a person asked for is served during a hold too, and may be worse than what is served.
    """
    if not passes(merge, candidate, asked_for=asked_for):
        return False
    with merge.turn:
        head = None if candidate.parent is None else merge.head
        added, removed = recording.changes(merge, candidate)
        rows = [merge.ledger.fine_tune(*member.announced) for member in added]
        is_moot = any(row is not None and row["state"] != "pending" for row in rows) or (
            bool(removed) and not added and not asked_for
        )
        if is_moot or (head is not None and head.digest != candidate.parent):
            discard(merge, candidate)
            return False
        if merge.held and not asked_for:  # it stays a candidate until the hold is lifted
            return False
        accepted = snapshots.accept(merge.store, candidate)
        reached("accepted")
        recording.record_accepted(merge, accepted)
        promote.switch(merge)
    merge.metrics.folds.labels("done").inc(len(added))
    for row in rows:
        observe_waiting(merge, row, seconds)
    tell(merge, accepted, added, removed, seconds)
    tidy(merge)
    return True


def observe_waiting(merge: FoldingMerge, row: Row | None, seconds: float) -> None:
    """Record how long a fine-tune was public before it was seen, and was seen before its journey began."""
    if row is not None:
        stages = merge.metrics.stage_seconds
        stages.labels("announce").observe(max(0.0, row["first_seen_at"] - row["published_at"]))
        stages.labels("queue").observe(max(0.0, now() - seconds - row["first_seen_at"]))


def tell(
    merge: FoldingMerge,
    accepted: Snapshot,
    added: Sequence[Member],
    removed: Sequence[Member],
    seconds: float,
) -> None:
    """Log the one line of each journey that ends in a version; one line for a version without any."""
    for member in added or (None,):
        log.info(
            "finetune.served" if added else "finetune.retracted" if removed else "base.served",
            **({"name": member.name, "source": member.source, "revision": member.revision} if member else {}),
            **({"removed": [gone.name for gone in removed]} if removed else {}),
            version=accepted.version,
            digest=accepted.digest[:12],
            count=len(accepted.fine_tunes),
            seconds=round(seconds, 3),
            **accepted.manifest["health"],
            figures=merge.ledger.values_of(member.digest) if member else {},
        )


def passes(merge: FoldingMerge, candidate: Snapshot, *, asked_for: bool = False) -> bool:
    """Step 7: run the gates; a refused candidate stays aside for inspection.

    What a person asked for may drop: that is only said.
    """
    current = snapshots.current(merge.store)
    bench = gates.Bench(
        merge.ledger, merge.metrics, current, merge.recipe.base, merge.base_norm, merge.engine.beat
    )
    try:
        with merge.metrics.stage("gate"):
            verdict = gates.check(merge.config.gates, candidate.path, bench, drops_refuse=not asked_for)
        merge.broken_gate, merge.gate_attempts = "", 0
    except Stopped:
        raise
    except TryAgain as exc:
        merge.gates_again_at = now() + RETRY_SECONDS[min(merge.gate_attempts, len(RETRY_SECONDS) - 1)]
        merge.gate_attempts += 1
        merge.broken_gate = exc.message if isinstance(exc, gates.GateBroken) else ""
        raise
    reached("gated")
    if not verdict.reasons:
        return True
    if candidate.version == 0:
        raise ConfigError(
            f"the base itself does not pass: {verdict.reasons[0]}", hint="correct the gate or its limits"
        )
    why = "; ".join(verdict.reasons)
    added, _ = recording.changes(merge, candidate)
    rows = (
        [row for member in added if (row := merge.ledger.fine_tune(*member.announced))]
        if not asked_for
        else []
    )
    with merge.ledger.transaction():  # else a kill in between has it folded once more, to be refused again
        merge.ledger.update_snapshot(candidate.version, state="refused", note=why)
        if rows:
            batches.blame(merge, rows, "quarantined", refusal(candidate.version, why))
    merge.metrics.folds.labels("refused").inc()
    tidy(merge)
    return False


def refusal(version: int, why: str) -> Refused:
    """Why a fine-tune is set aside whose candidate was refused; reports.refused_in reads the number."""
    return Refused(
        "quality",
        f"version {version}: {why}",
        hint="`streammerge fine-tunes show` has all figures; `streammerge fine-tunes retry` folds it again, "
        "onto what is folded then",
    )


def discard(merge: FoldingMerge, candidate: Snapshot) -> None:
    """Head moved, or a hold came, while this candidate was made: it is folded anew later."""
    merge.ledger.update_snapshot(
        candidate.version, state="refused", note="discarded: head moved while it was made"
    )
    files.remove_tree(candidate.path)
    merge.metrics.folds.labels("abandoned").inc()
    log.info("candidate.discarded", version=candidate.version)
