"""Is a sealed candidate let in? Gated, accepted and promoted, or kept aside; each way with its rows.

Steps 7 to 9 of the story, and what the ledger says of versions. Knows nothing of how a candidate was made.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import structlog

from streammerge import batches, files, gates, methods, promote, replay, snapshots
from streammerge.aside import RETRY_SECONDS
from streammerge.collect import tidy
from streammerge.errors import ConfigError, Refused, Stopped, TryAgain
from streammerge.ledger import now
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.snapshots import Snapshot

log = structlog.get_logger()


def conclude(merge: Merge, candidate: Snapshot, *, seconds: float = 0.0, asked_for: bool = False) -> bool:
    """Steps 7 to 9: gate, accept, promote. False where the candidate was refused or discarded.

    What a person asked for is served during a hold too, and may be worse than what is served.
    """
    if not passes(merge, candidate, asked_for=asked_for):
        return False
    with merge.turn:
        head = None if candidate.parent is None else merge.head
        added, removed = changes(merge, candidate)
        rows = [replay.row_of(merge, entry) for entry in added]
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
        record_accepted(merge, accepted)
        promote.switch(merge)
    refresh_merge_metrics(merge, accepted)
    merge.metrics.folds.labels("done").inc(len(added))
    for row in rows:
        observe_waiting(merge, row, seconds)
    tell(merge, accepted, added, removed, seconds)
    tidy(merge)
    return True


def observe_waiting(merge: Merge, row: Row | None, seconds: float) -> None:
    """Record how long a fine-tune was public before it was seen, and was seen before its journey began."""
    if row is not None:
        stages = merge.metrics.stage_seconds
        stages.labels("announce").observe(max(0.0, row["first_seen_at"] - row["published_at"]))
        stages.labels("queue").observe(max(0.0, now() - seconds - row["first_seen_at"]))


def tell(
    merge: Merge,
    accepted: Snapshot,
    added: Sequence[Mapping[str, Any]],
    removed: Sequence[Mapping[str, Any]],
    seconds: float,
) -> None:
    """Log the one line of each journey that ends in a version; one line for a version without any."""
    for entry in added or ({},):
        log.info(
            "finetune.served" if added else "finetune.retracted" if removed else "base.served",
            **{key: entry[key] for key in ("name", "source", "revision") if entry},
            **({"removed": [gone["name"] for gone in removed]} if removed else {}),
            version=accepted.version,
            digest=accepted.digest[:12],
            count=len(accepted.fine_tunes),
            seconds=round(seconds, 3),
            **accepted.manifest["health"],
            figures=merge.ledger.values_of(entry["digest"]) if entry else {},
        )


def passes(merge: Merge, candidate: Snapshot, *, asked_for: bool = False) -> bool:
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
    added, _ = changes(merge, candidate)
    rows = [row for entry in added if (row := replay.row_of(merge, entry))] if not asked_for else []
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


def discard(merge: Merge, candidate: Snapshot) -> None:
    """Head moved, or a hold came, while this candidate was made: it is folded anew later."""
    merge.ledger.update_snapshot(
        candidate.version, state="refused", note="discarded: head moved while it was made"
    )
    files.remove_tree(candidate.path)
    merge.metrics.folds.labels("abandoned").inc()
    log.info("candidate.discarded", version=candidate.version)


def record_accepted(merge: Merge, snapshot: Snapshot) -> None:
    """Steps 8 and 9 in the ledger, in one transaction: head, fine-tunes, the intent to promote, outbox."""
    ledger = merge.ledger
    with ledger.transaction():
        record_candidate(merge, snapshot)
        ledger.update_snapshot(snapshot.version, state="accepted", accepted_at=now())
        ledger.set_fact("head", snapshot.path.name)
        added, removed = changes(merge, snapshot)
        for entry in added:
            settle(merge, entry, "folded", snapshot.version)
        names = {(entry["source"], entry["name"]) for entry in added}
        for entry in removed:
            is_replaced = (entry["source"], entry["name"]) in names
            settle(merge, entry, "replaced" if is_replaced else "retracted", None)
            if not is_replaced:
                ledger.deny([entry["digest"]], f"taken out in version {snapshot.version}")
        cause = "fold" if added else "retract" if removed else "first"
        promote.intend(merge, snapshot, cause)


def settle(merge: Merge, entry: Mapping[str, Any], state: str, version: int | None) -> None:
    """Write down in its row what became of a fine-tune."""
    if row := replay.row_of(merge, entry):
        merge.ledger.update_fine_tune(
            row["id"],
            state=state,
            reason="",
            detail="",
            step="folded",
            version=version,
            attempts=0,
            next_try_at=0.0,
        )
        merge.metrics.decided.labels(row["source"], state).inc()


def record_candidate(merge: Merge, candidate: Snapshot) -> None:
    """Write a sealed candidate's row; there already is no error."""
    if merge.ledger.snapshot(candidate.version):
        return
    added, removed = changes(merge, candidate)
    merge.ledger.write(
        "insert into snapshots (version, digest, parent, state, count, added, removed, sealed_at) "
        "values (?, ?, ?, 'candidate', ?, ?, ?, ?)",
        candidate.version, candidate.digest, candidate.parent, len(candidate.fine_tunes),
        json.dumps([e["name"] for e in added]), json.dumps([e["name"] for e in removed]), now(),
    )  # fmt: skip


def changes(merge: Merge, snapshot: Snapshot) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a version changed, see snapshots.changes; of a parent that is gone only the last is known."""
    parent = snapshots.by_digest(merge.store, snapshot.parent) if snapshot.parent else None
    return snapshots.changes(snapshot, parent) if parent else ([*snapshot.fine_tunes[-1:]], [])


def refresh_merge_metrics(merge: Merge, head: Snapshot) -> None:
    """Show head's figures."""
    totals, figures = head.manifest["totals"], head.manifest["health"]
    merge.metrics.merged.set(totals["count"])
    keeps_sum = methods.keeps_sum(merge.recipe.method, merge.recipe.knobs)
    merge.metrics.scale.set(totals["lambda"] if keeps_sum else math.nan)
    merge.metrics.norm_ratio.set(figures["norm_ratio"] or 0.0)
    merge.metrics.kept_energy.set(figures["kept_energy"] or 0.0)
    merge.metrics.orthogonality.set(figures["orthogonality"] or 0.0)
