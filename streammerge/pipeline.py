"""THE STORY: one fine-tune from announced to served. Read `journey` from top to bottom.

Every step is durable before the next begins, and every step may be killed: what is then found at start is
finished or removed by `recovery`. The order of a step's effects is never the order that is convenient.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from streammerge import files, gates, machine, methods, promote, replay, reports, screen, snapshots
from streammerge.arriving import Incoming
from streammerge.aside import RETRY_SECONDS, remove_fetched, set_aside
from streammerge.card import card
from streammerge.collect import tidy
from streammerge.engine import Serve
from streammerge.errors import ConfigError, NoSpace, Refused, Stopped, TryAgain
from streammerge.fetching import bring_in, identify, published
from streammerge.fit import Tolerance
from streammerge.furnish import furnish
from streammerge.judging import judge
from streammerge.ledger import now
from streammerge.lineage import manifest_of
from streammerge.methods import Totals
from streammerge.state import State
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from streammerge.finetune import FineTune
    from streammerge.folding import Measured
    from streammerge.ledger import Row
    from streammerge.merging import Merge
    from streammerge.rendering import Rendered
    from streammerge.replay import Way
    from streammerge.snapshots import Snapshot
    from streammerge.sources import Source

log = structlog.get_logger()


def journey(merge: Merge, row: Row, source: Source) -> None:
    """Take one pending fine-tune as far as it goes: into the served model, aside, or back for later.

    What is put aside has its reason recorded. Raises TryAgain where the same step is to be repeated later;
    nothing is left behind then.
    """
    started = time.monotonic()
    bound = {"source": row["source"], "name": row["name"], "revision": row["revision"]}
    with structlog.contextvars.bound_contextvars(**bound):
        try:
            row = fetch(merge, row, source)
            if merge.held:
                return
            candidate = fold(merge, row)
            if candidate is not None:
                conclude(merge, candidate, seconds=time.monotonic() - started)
        except Refused as exc:
            set_aside(merge, row, "refused", exc)


def bring(merge: Merge, row: Row, source: Source) -> None:
    """Fetch one pending fine-tune and leave the rest of its journey for later.

    It may be decided otherwise meanwhile, by a newer revision or a person: its files go then.
    """
    bound = {"source": row["source"], "name": row["name"], "revision": row["revision"]}
    with structlog.contextvars.bound_contextvars(**bound):
        try:
            fetch(merge, row, source)
        except Refused as exc:
            set_aside(merge, row, "refused", exc)
        except FileNotFoundError:
            if not is_overtaken(merge, row):
                raise
        if is_overtaken(merge, row):
            remove_fetched(merge, row)


def is_overtaken(merge: Merge, row: Row) -> bool:
    """Whether a fine-tune was decided on while it was fetched."""
    fresh = merge.ledger.row("select state from fine_tunes where id = ?", row["id"])
    return fresh is None or fresh["state"] in ("superseded", "gone", "denied")


def fetch(merge: Merge, row: Row, source: Source) -> Row:
    """Step 2: bring the files here, whole, and know them by their content."""
    inbox = bring_in(merge, row, source)
    if row["step"] == "announced":
        digest = identify(inbox, row, source, merge)
        if row["digest"] and digest != row["digest"]:
            files.remove_tree(inbox)
            raise TryAgain(
                f"{row['name']}: its content changed between the announcement and the fetch",
                hint="it is announced again once it has settled",
            )
        merge.ledger.update_fine_tune(row["id"], digest=digest, step="fetched")
        row = {**row, "digest": digest, "step": "fetched"}
    return row


def fold(merge: Merge, row: Row) -> Snapshot | None:
    """Steps 3 to 6: screen, fold, render and seal a candidate; None where a person is asked first."""
    ledger, store, config = merge.ledger, merge.store, merge.config
    head = merge.head
    with merge.metrics.stage("fold"), machine.errors("folding", merge.store.root):
        inbox = published(store.inbox / str(row["id"]), row["name"])
        others = {
            r["digest"]
            for r in ledger.fine_tunes("pending", "awaiting_approval")
            if r["id"] < row["id"] and r["digest"]
        }
        screen.refuse_known(row["digest"], folded={*head.digests, *others}, denied=ledger.denied())
        way = replacement(merge, row, head)
        replay.require_kept(merge, head.fine_tunes)
        tolerance = Tolerance(config.tensors.ignore_extra, config.tensors.allow_missing)
        with screen.examine(inbox, merge.base_entries, merge.recipe, tolerance) as finetune:
            ledger.update_fine_tune(row["id"], step="screened")
            reached("screened")
            if config.approve == "manual" and not row["approved"]:
                ledger.update_fine_tune(
                    row["id"],
                    state="awaiting_approval",
                    detail="approve it with `streammerge fine-tunes approve`",
                )
                log.info("finetune.awaits_approval")
                return None
            with under_construction(merge, head, way, "folding") as (version, building):
                return build(merge, row, finetune, head, way, version, building)


@contextmanager
def under_construction(
    merge: Merge, head: Snapshot, way: Way | None, purpose: str
) -> Iterator[tuple[int, Path]]:
    """Give a number and an empty building folder, which goes if anything fails; what is read stays."""
    merge.folding_from = (head.path, *([way.start.path] if way and way.start else []))
    try:
        version = next_version(merge)
        require_space(merge, purpose)
        building = snapshots.begin(merge.store, version)
        merge.metrics.folding.set(1)
        merge.metrics.fold_started.set_to_current_time()
        try:
            yield version, building
        except BaseException:
            files.remove_tree(building)
            raise
    finally:
        merge.folding_from = ()
        merge.metrics.folding.set(0)
        merge.metrics.fold_progress.set(0)


def build(
    merge: Merge, row: Row, finetune: FineTune, head: Snapshot, way: Way | None, version: int, building: Path
) -> Snapshot:
    """Steps 4 to 6 in the building folder; with a way, the fine-tune takes the place of an older revision."""
    incoming = Incoming(finetune, row["digest"], row["factor"], row["source"])
    old, kept = merge.state_of(head), head.fine_tunes
    if way is not None:
        old, _ = replay.walk(merge, way, building, "before")
        kept = [e for e in kept if (e["source"], e["name"]) != (row["source"], row["name"])]
    serve = Serve(building / "model", merge.config.finalize)
    state, measured, model = merge.engine.fold(merge.recipe, incoming, old, building / "state", serve)
    files.remove_tree(building / "before")
    if finetune.finish() != row["digest"]:
        files.remove_tree(merge.store.inbox / str(row["id"]))
        merge.ledger.update_fine_tune(row["id"], step="announced")
        raise TryAgain("the fetched files changed before they were folded", hint="they are fetched again")
    judge(merge, row, incoming, measured, kept)
    reached("folded")
    entry = {  # what every version lists and this process remembers
        "name": row["name"], "source": sys.intern(row["source"]), "revision": row["revision"],
        "digest": row["digest"], "weight": row["factor"],
    }  # fmt: skip
    manifest, hashes = render(merge, state, [*kept, entry], head, version, building, measured, model)
    return seal(merge, building, manifest, hashes)


def replacement(merge: Merge, row: Row, head: Snapshot) -> Way | None:
    """Decide by `on_update` about a changed revision of a folded name: how the old one is taken out first."""
    places = [
        place
        for place, entry in enumerate(head.fine_tunes)
        if (entry["source"], entry["name"]) == (row["source"], row["name"])
    ]
    if not places or merge.config.on_update == "add":
        return None
    if merge.config.on_update == "ignore":
        revision = head.fine_tunes[places[-1]]["revision"]
        raise Refused("ignored", f"revision {revision} is folded and on_update is ignore", hint="")
    return replay.way_without(merge, head, places)


def without(merge: Merge, head: Snapshot, places: Collection[int]) -> Snapshot:
    """Seal a candidate that holds head's fine-tunes but those at `places`; one left by a kill will do."""
    kept = [entry for place, entry in enumerate(head.fine_tunes) if place not in places]
    if left := left_sealed(merge, head, kept):
        return left
    way = replay.way_without(merge, head, places)
    replay.require_kept(merge, kept)
    return along(merge, head, way, kept)


def left_sealed(merge: Merge, head: Snapshot, entries: list[dict[str, Any]]) -> Snapshot | None:
    """Find the undecided candidate that follows head and holds `entries`."""
    for row in merge.ledger.rows("select * from snapshots where state = 'candidate'"):
        path = merge.store.candidates / snapshots.folder_name(row["version"], row["digest"])
        candidate = snapshots.read(path)
        if (candidate.parent, candidate.fine_tunes) == (head.digest, entries):
            return candidate
    return None


def along(merge: Merge, head: Snapshot, way: Way, entries: list[dict[str, Any]]) -> Snapshot:
    """Seal a candidate that follows head and holds `entries`, to whose state `way` leads."""
    with (
        merge.metrics.stage("fold"),
        machine.errors("folding", merge.store.root),
        under_construction(merge, head, way, "replaying") as (version, building),
    ):
        state, measured = replay.walk(merge, way, building, "state")
        reached("folded")
        manifest, hashes = render(merge, state, entries, head, version, building, measured)
        return seal(merge, building, manifest, hashes)


def render(
    merge: Merge,
    state: State,
    folded: list[dict[str, Any]],
    parent: Snapshot | None,
    version: int,
    building: Path,
    measured: Measured | None = None,
    model: Rendered | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Step 5: write what servers load; gives the manifest to be and the hashes known so far.

    `model` is given where its weights are written already.
    """
    recipe, finish = merge.recipe, merge.config.finalize
    with merge.metrics.stage("render"), ExitStack() as stack:
        rereads = methods.rereads(recipe.method)
        again = [stack.enter_context(replay.opened(merge, e)) for e in folded if rereads]
        if model is None:
            model = merge.engine.render(recipe, state, finish, building / "model", folded=again)
        for incoming, entry in zip(again, folded, strict=False):  # none but for methods that read them again
            if incoming.finetune.finish() != entry["digest"]:
                files.remove_tree(merge.store.inbox / str((replay.row_of(merge, entry) or {}).get("id")))
                raise TryAgain(
                    f"what the store kept of {entry['name']} is not what was folded",
                    hint="it is fetched from its source again",
                )
    rendered, norm = model
    hashes = {f"state/{name}": found for name, found in state.hashes.items()}
    hashes |= {f"model/{name}": found for name, found in rendered.items()}
    manifest = {
        "version": version,
        "parent": parent.digest if parent else None,
        "base": {"digest": recipe.base_digest, "name": recipe.base.name},
        **manifest_of(merge.engine, recipe, finish, folded, state.totals, norm, measured),
        "added": merge.store.read_settings()["added"],
        "routes": [route.model_dump() for route in recipe.routes],
    }
    mark = {
        key: manifest[key]
        for key in ("version", "parent", "base", "method", "knobs", "finalize", "fine_tunes")
    }
    base_model = next(iter(merge.config.base_models), recipe.base.name)
    furnish(recipe.base, building / "model", card(manifest, base_model=base_model), mark)
    reached("rendered")
    return manifest, hashes


def seal(merge: Merge, building: Path, manifest: Mapping[str, Any], hashes: Mapping[str, str]) -> Snapshot:
    """Step 6: an immutable candidate, then its row."""
    with merge.metrics.stage("seal"):
        candidate = snapshots.seal(merge.store, building, manifest, hashes)
    reached("sealed")
    merge.engine.keep(candidate.digest)
    record_candidate(merge, candidate)
    reached("recorded")
    return candidate


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
    """Which fine-tunes a version has that its parent has not, and the other way round."""
    parent = snapshots.by_digest(merge.store, snapshot.parent) if snapshot.parent else None
    if parent is None:
        return snapshot.fine_tunes[-1:], []
    ours, theirs = set(snapshot.digests), set(parent.digests)
    added = [entry for entry in snapshot.fine_tunes if entry["digest"] not in theirs]
    return added, [entry for entry in parent.fine_tunes if entry["digest"] not in ours]


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
    merge.metrics.folds.labels("done").inc(bool(added))
    named = {key: added[-1][key] for key in ("name", "source", "revision")} if added else {}
    log.info(
        "finetune.served" if added else "finetune.retracted" if removed else "base.served",
        **named,
        **({"removed": [entry["name"] for entry in removed]} if removed else {}),
        version=accepted.version,
        digest=accepted.digest[:12],
        count=len(accepted.fine_tunes),
        seconds=round(seconds, 3),
        **accepted.manifest["health"],
        figures=merge.ledger.values_of(added[-1]["digest"]) if added else {},
    )
    tidy(merge)
    return True


def passes(merge: Merge, candidate: Snapshot, *, asked_for: bool = False) -> bool:
    """Step 7: run the gates; a refused candidate stays aside for inspection.

    What a person asked for may drop: that is only said.
    """
    current = snapshots.current(merge.store)
    try:
        with merge.metrics.stage("gate"):
            verdict = gates.check(
                merge.config.gates, candidate.path, current, merge.engine.beat, drops_refuse=not asked_for
            )
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
    row = replay.row_of(merge, added[-1]) if added and not asked_for else None
    with merge.ledger.transaction():  # else a kill in between has it folded once more, to be refused again
        merge.ledger.update_snapshot(candidate.version, state="refused", note=why)
        if row:
            hint = "`streammerge fine-tunes retry` folds it again"
            set_aside(merge, row, "quarantined", Refused("quality", why, hint=hint))
    merge.metrics.folds.labels("refused").inc()
    tidy(merge)
    return False


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


def next_version(merge: Merge) -> int:
    """Give the next number: one more than any that was ever sealed."""
    row = merge.ledger.row("select max(version) as version from snapshots")
    known = [row["version"]] if row and row["version"] is not None else []
    for parent in (merge.store.candidates, merge.store.snapshots):
        known += [snapshots.number(path) for path in snapshots.folders(parent)]
    return max(known, default=-1) + 1


def require_space(merge: Merge, purpose: str) -> None:
    """Raise NoSpace before work that the disk cannot hold; what was only prepared, or may go, goes first."""
    needed = reports.version_bytes(merge.store.read_settings())
    try:
        machine.require_space(merge.store.root, needed, reserve_bytes=merge.config.reserve, purpose=purpose)
    except NoSpace:
        if not merge.engine.give_back_disk() and not (merge.ledger.fact("head") and tidy(merge)):
            raise
        machine.require_space(merge.store.root, needed, reserve_bytes=merge.config.reserve, purpose=purpose)
    if isinstance(merge.unable, NoSpace):
        merge.unable = None


def first_version(merge: Merge) -> None:
    """Seal, gate and promote the base itself as version 0."""
    require_space(merge, "writing version 0")
    with machine.errors("writing version 0", merge.store.root):
        building = snapshots.begin(merge.store, 0)
        state = State(building / "state", {}, Totals())
        manifest, hashes = render(merge, state, [], None, 0, building)
        conclude(merge, seal(merge, building, manifest, hashes))


def refresh_merge_metrics(merge: Merge, head: Snapshot) -> None:
    """Show head's figures."""
    totals, figures = head.manifest["totals"], head.manifest["health"]
    merge.metrics.merged.set(totals["count"])
    keeps_sum = methods.keeps_sum(merge.recipe.method, merge.recipe.knobs)
    merge.metrics.scale.set(totals["lambda"] if keeps_sum else math.nan)
    merge.metrics.norm_ratio.set(figures["norm_ratio"] or 0.0)
    merge.metrics.kept_energy.set(figures["kept_energy"] or 0.0)
    merge.metrics.orthogonality.set(figures["orthogonality"] or 0.0)
