"""The turns of work that the daemon takes for ever and `run --once` takes until nothing is left.

With the gauges that mirror the store, which a scrape brings up to date.
"""

from __future__ import annotations

import math
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from streammerge import (
    acceptance,
    allocator,
    aside,
    batches,
    collect,
    machine,
    methods,
    pipeline,
    promote,
    reconcile,
    recovery,
    reports,
    retracting,
    snapshots,
    unfinished,
)
from streammerge.errors import Damaged, DiskFails, NoMemory, NoSpace, Stopped, TryAgain, Unable
from streammerge.ledger import now

if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from pathlib import Path

    from streammerge.ledger import Row
    from streammerge.recipes import FoldingMerge
    from streammerge.snapshots import Snapshot
    from streammerge.sources import Source

FETCHED_AHEAD = 2  # times as many as are folded together: they wait while others are folded

log = structlog.get_logger()


def look_at(merge: FoldingMerge, source: Source, look_later: Callable[[str, float], None]) -> None:
    """Look at a source once, with its metrics and one log line when its state changes; raises TryAgain."""
    part = next(p for p in merge.config.sources if p.name == source.name)
    started = time.monotonic()
    before = reports.source_status(merge.ledger, source.name)["state"]
    try:
        with machine.errors(f"looking at {source.name}", merge.store.root):
            until = reconcile.observe(merge, source, part)
    except Stopped:
        raise
    except TryAgain as exc:
        reconcile.failed(merge.ledger, source.name, exc.message)
        merge.metrics.polls.labels(source.name, "error").inc()
        merge.metrics.source_up.labels(source.name).set(0)
        if before != "error":
            log.warning("source.unreachable", source=source.name, error=exc.message, hint=exc.hint)
        raise
    finally:
        merge.metrics.poll_seconds.labels(source.name).observe(time.monotonic() - started)
    merge.metrics.polls.labels(source.name, "ok").inc()
    merge.metrics.source_up.labels(source.name).set(1)
    if before == "error":
        log.info("source.reachable", source=source.name)
    if until:
        look_later(source.name, until - now())


def check_served(merge: FoldingMerge) -> list[Path]:
    """Before the first fold after a start: head and current must be, byte for byte, what was sealed.

    Only then goes what a kill left that was to go. Gives the other versions, which are checked while there is
    nothing else to do.
    """
    started = time.monotonic()
    recovery.drop_damaged(merge, content=True)
    wanted = {merge.head.path, snapshots.current(merge.store) or merge.head.path}
    for path in sorted(wanted):
        snapshots.check_hashes(snapshots.read(path), merge.engine.beat)
    log.info(
        "store.verified",
        versions=[path.name for path in sorted(wanted)],
        seconds=round(time.monotonic() - started, 3),
    )
    collect.tidy(merge)
    return [path for path in snapshots.folders(merge.store.snapshots) if path not in wanted]


def check_another(merge: FoldingMerge, unchecked: list[Path]) -> bool:
    """Check one older version byte for byte; False if none is left. A damaged one is marked, not offered."""
    if not unchecked:
        return False
    path = unchecked.pop()
    version = str(snapshots.number(path))
    marked = {v: why for v, why in (merge.ledger.fact("damaged") or {}).items() if v != version}
    try:
        with machine.errors("reading a version", path):
            snapshots.check_hashes(snapshots.read(path), merge.engine.beat)
    except (Damaged, DiskFails) as exc:
        if path.is_dir():  # else it was collected meanwhile
            marked[version] = exc.message
    collect.mark_damaged(merge, marked)
    return True


def prepare_another(merge: FoldingMerge) -> bool:
    """Derive from head's state what the next fold will need of one weight; False if nothing is left to do."""
    if merge.held or merge.unable:
        return False
    with suppress(TryAgain, OSError):  # a full disk, a base that is away: the next fold will say so
        needed = reports.version_bytes(merge.settings)
        purpose = "preparing"
        machine.require_space(merge.store.root, needed, reserve_bytes=merge.config.reserve, purpose=purpose)
        return merge.engine.prepare_next(merge.recipe, merge.state_of(merge.head))
    return False


def fetch_once(merge: FoldingMerge, source: Source) -> bool:
    """Bring the next fine-tune that a source announced; False if there is none to bring now.

    Never many more than are folded: what lies in the inbox takes the room that a fold needs.
    """
    pending = [row for row in merge.ledger.fine_tunes("pending") if row["source"] == source.name]
    announced = [row for row in pending if row["step"] == "announced"]
    row = next((row for row in announced if row["next_try_at"] <= now()), None)
    if row is None or len(pending) - len(announced) >= FETCHED_AHEAD * merge.config.batch:
        return False
    try:
        with machine.errors("fetching", merge.store.root):
            pipeline.bring(merge, row, source)
    except Stopped:
        raise
    except TryAgain as exc:
        aside.put_back(merge, row, exc)
    return True


def work_once(
    merge: FoldingMerge, sources: dict[str, Source], *, fetched_elsewhere: Container[str] = ()
) -> bool:
    """Take up the next thing that can be done; False if there is nothing to do now.

    What sources named in `fetched_elsewhere` announced is left until somebody else has fetched it.
    """
    if retracting.work_off(merge):
        return True
    unfinished.record_candidates(merge)
    unfinished.finish(merge)
    if not merge.held:
        conclude_open(merge)
    rows = next_rows(merge, sources, fetched_elsewhere)
    if not rows:
        collect.tidy_inbox(merge)
        if merge.unable and not merge.ledger.fine_tunes("pending"):
            see_if_able(merge)
        return False
    try:
        with machine.errors("folding", merge.store.root):
            pipeline.journey(merge, rows, sources)
        merge.unable = None
    except Stopped:
        raise
    except TryAgain as exc:
        pending = merge.ledger.numbers("pending")
        for row in rows:
            if str(row["id"]) in pending:
                aside.put_back(merge, row, exc)
    finally:
        allocator.give_back()
    return True


def see_if_able(merge: FoldingMerge) -> None:
    """Where nothing is to do that would find out: whether there is room, and a disk that works."""
    with suppress(Unable):
        pipeline.require_space(merge, "going on")
        machine.probe(merge.store.root, "going on")
        merge.unable = None


def conclude_open(merge: FoldingMerge) -> None:
    """Gate and accept candidates that a kill, a hold or a gate that could not judge left sealed."""
    if now() < merge.gates_again_at:
        return
    for row in merge.ledger.rows("select * from snapshots where state = 'candidate' order by version"):
        path = merge.store.candidates / snapshots.folder_name(row["version"], row["digest"])
        try:
            with machine.errors("accepting", merge.store.root):
                acceptance.conclude(merge, snapshots.read(path))
            merge.unable = None
        except Stopped:
            raise
        except TryAgain as exc:
            log.warning("candidate.waits", version=row["version"], detail=exc.message)
            if isinstance(exc, Unable):
                aside.note_unable(merge, exc)


def next_rows(
    merge: FoldingMerge, sources: dict[str, Source], fetched_elsewhere: Container[str] = ()
) -> list[Row]:
    """Choose the pending fine-tunes that are due and go together; during a hold, one still to be fetched."""
    is_waiting = bool(merge.held) or promote.is_unproven(merge)
    if not merge.held and merge.ledger.row("select 1 from snapshots where state = 'candidate'"):
        return []
    due = [
        row
        for row in merge.ledger.fine_tunes("pending")
        if row["next_try_at"] <= now() and row["source"] in sources
        if row["step"] != "announced" or row["source"] not in fetched_elsewhere
    ]
    if is_waiting:
        return [row for row in due if row["step"] == "announced"][:1]
    return batches.chosen(merge, due)


def refresh(merge: FoldingMerge) -> None:
    """Bring gauges that mirror the store up to date; called at each scrape, so no files are counted."""
    metrics, ledger = merge.metrics, merge.ledger
    head, current = reports.named(merge.store, ledger.fact("head")), reports.served(merge.store)
    metrics.head_version.set(head["version"] if head else 0)
    metrics.current_version.set(current["version"] if current else 0)
    with suppress(Damaged):  # what cannot be read has no figures
        show_figures(merge, merge.head)
    last = ledger.last_promotion()
    metrics.current_time.set((last or {}).get("switched_at") or 0)
    metrics.held.set(bool(merge.held))
    metrics.disk_free.set(shutil.disk_usage(merge.store.root).free)
    metrics.disk_full.set(isinstance(merge.unable, NoSpace))
    metrics.disk_failing.set(isinstance(merge.unable, DiskFails))
    metrics.memory_short.set(isinstance(merge.unable, NoMemory))
    waiting = ledger.fine_tunes("waiting", "pending", "awaiting_approval")
    metrics.oldest_pending.set(min((row["first_seen_at"] for row in waiting), default=0))
    for part in merge.config.sources:
        metrics.pending.labels(part.name).set(sum(row["source"] == part.name for row in waiting))
        row = ledger.row("select last_success_at from sources where name = ?", part.name)
        metrics.source_success.labels(part.name).set((row or {}).get("last_success_at") or 0)
    for name in [part.name for part in merge.config.targets]:
        target = reports.target_status(ledger, name)
        metrics.outbox.labels(name).set(target["open"])
        is_current = current is not None and target["snapshot"] == current["version"]
        metrics.served.labels(name).set(is_current and target["state"] == "confirmed")


def show_figures(merge: FoldingMerge, head: Snapshot) -> None:
    """Show the figures of head; those about the sum where the method keeps one."""
    metrics, totals, health = merge.metrics, head.manifest["totals"], head.manifest["health"]
    metrics.merged.set(totals["count"])
    keeps_sum = methods.keeps_sum(merge.recipe.method, merge.recipe.knobs)
    metrics.scale.set(totals["lambda"] if keeps_sum else math.nan)
    metrics.norm_ratio.set(health["norm_ratio"] or 0.0)
    metrics.kept_energy.set(health["kept_energy"] or 0.0)
    metrics.orthogonality.set(health["orthogonality"] or 0.0)
