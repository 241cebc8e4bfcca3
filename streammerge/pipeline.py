"""THE STORY: one fine-tune from announced to served. Read `journey` from top to bottom.

Every step is durable before the next begins, and every step may be killed: what is then found at start is
finished or removed by `recovery`. The order of a step's effects is never the order that is convenient.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from streammerge import files, finalize, gates, promote, reports, screen, snapshots, weights
from streammerge.aside import RETRY_SECONDS, remove_fetched, set_aside
from streammerge.card import card
from streammerge.collect import tidy
from streammerge.errors import ConfigError, Refused, Stopped, TryAgain
from streammerge.fit import Tolerance
from streammerge.furnish import furnish
from streammerge.headers import Incomplete
from streammerge.ledger import now
from streammerge.lineage import manifest_of
from streammerge.merging import reached
from streammerge.methods import Totals
from streammerge.state import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from streammerge.engine import Measured
    from streammerge.finetune import FineTune
    from streammerge.ledger import Row
    from streammerge.merging import Merge
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
    inbox = merge.store.inbox / str(row["id"])
    if not inbox.exists():
        part = merge.store.inbox / f"{row['id']}.part"
        if not source.is_remote:
            files.remove_tree(part)
        part.mkdir(exist_ok=True)  # what a cut fetch left of the same revision is gone on from
        with stage(merge, "fetch"), files.disk_errors("fetching"):
            base_bytes = int(merge.store.read_settings()["base"]["bytes"])  # a full fine-tune is as large
            files.require_space(
                merge.store.root, base_bytes, reserve_bytes=merge.config.reserve, purpose="fetching"
            )
            source.fetch(row["name"], row["revision"], part)
            reached("copied")
            files.fsync_tree(part)
            merge.metrics.fetched_bytes.labels(row["source"]).inc(files.tree_bytes(part))
            files.rename_folder(part, inbox)
        reached("fetched")
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


def identify(inbox: Path, row: Row, source: Source, merge: Merge) -> str:
    """Know a fetched fine-tune by its content; what a remote revision lacks will never be in it."""
    try:
        return weights.identity(published(inbox, row), merge.engine.beat)
    except Incomplete as exc:
        if not source.is_remote:
            raise
        raise Refused("incomplete", exc.message, hint="publish the whole model in one commit") from exc


def published(folder: Path, row: Row) -> Path:
    """Give a fetched fine-tune as it was published: a file where it was a file, else the folder."""
    file = folder / str(row["name"])
    return file if file.suffix == ".safetensors" and file.is_file() else folder


def fold(merge: Merge, row: Row) -> Snapshot | None:
    """Steps 3 to 6: screen, fold, render and seal a candidate; None where a person is asked first."""
    ledger, store, config = merge.ledger, merge.store, merge.config
    head = merge.head
    with stage(merge, "fold"), files.disk_errors("folding"):
        inbox = published(store.inbox / str(row["id"]), row)
        others = {
            r["digest"]
            for r in ledger.fine_tunes("pending", "awaiting_approval")
            if r["id"] < row["id"] and r["digest"]
        }
        screen.refuse_known(row["digest"], folded={*head.digests, *others}, denied=ledger.denied())
        refuse_changed(merge, row, head)
        tolerance = Tolerance(config.tensors.ignore_extra, config.tensors.allow_missing)
        with screen.examine(inbox, merge.base_entries, merge.recipe.plan, tolerance) as finetune:
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
            version = next_version(merge)
            require_space(merge, "folding")
            building = snapshots.begin(store, version)
            try:
                return build(merge, row, finetune, head, version, building)
            except BaseException:
                files.remove_tree(building)
                raise


def build(
    merge: Merge, row: Row, finetune: FineTune, head: Snapshot, version: int, building: Path
) -> Snapshot:
    """Steps 4 to 6 in the building folder."""
    merge.folding_from = head.path
    merge.metrics.folding.set(1)
    merge.metrics.fold_started.set_to_current_time()
    try:
        state, measured = merge.engine.fold(
            merge.recipe, finetune, row["digest"], row["factor"], merge.state_of(head), building / "state"
        )
        if finetune.finish() != row["digest"]:
            files.remove_tree(merge.store.inbox / str(row["id"]))
            merge.ledger.update_fine_tune(row["id"], step="announced")
            raise TryAgain("the fetched files changed before they were folded", hint="they are fetched again")
        screen.judge(measured, max_delta_ratio=merge.config.max_delta_ratio)
        reached("folded")
        entry = {
            "name": row["name"], "source": row["source"], "revision": row["revision"],
            "digest": row["digest"], "weight": row["factor"],
        }  # fmt: skip
        manifest, hashes = render(merge, state, [*head.fine_tunes, entry], head, version, building, measured)
        return seal(merge, building, manifest, hashes)
    finally:
        merge.folding_from = None
        merge.metrics.folding.set(0)
        merge.metrics.fold_progress.set(0)


def render(
    merge: Merge,
    state: State,
    folded: list[dict[str, Any]],
    parent: Snapshot | None,
    version: int,
    building: Path,
    measured: Measured | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Step 5: write what servers load; gives the manifest to be and the hashes known so far."""
    recipe, finish = merge.recipe, finalize.Finalize(scale=merge.config.finalize.scale)
    with stage(merge, "render"):
        rendered, norm = merge.engine.render(recipe, state, finish, building / "model")
    hashes = {f"state/{name}": found for name, found in state.hashes.items()}
    hashes |= {f"model/{name}": found for name, found in rendered.items()}
    manifest = {
        "version": version,
        "parent": parent.digest if parent else None,
        "base": {"digest": recipe.base_digest, "name": recipe.base.name},
        **manifest_of(merge.engine, recipe, finish, folded, state.totals, norm, measured),
        "added": merge.store.read_settings()["added"],
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
    with stage(merge, "seal"):
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
    added = [entry["name"] for entry in candidate.fine_tunes[-1:]]
    merge.ledger.write(
        "insert into snapshots (version, digest, parent, state, count, added, removed, sealed_at) "
        "values (?, ?, ?, 'candidate', ?, ?, '[]', ?)",
        candidate.version, candidate.digest, candidate.parent, len(candidate.fine_tunes),
        json.dumps(added), now(),
    )  # fmt: skip


def conclude(merge: Merge, candidate: Snapshot, *, seconds: float = 0.0) -> bool:
    """Steps 7 to 9: gate, accept, promote. False where the candidate was refused or discarded."""
    if not passes(merge, candidate):
        return False
    with merge.turn:
        head = None if candidate.parent is None else merge.head
        row = row_of(merge, candidate)
        if (head is not None and head.digest != candidate.parent) or (
            row is not None and row["state"] != "pending"
        ):
            discard(merge, candidate)
            return False
        if merge.held:  # it stays a candidate until the hold is lifted
            return False
        accepted = snapshots.accept(merge.store, candidate)
        reached("accepted")
        record_accepted(merge, accepted)
        promote.switch(merge)
    tidy(merge)
    refresh_merge_metrics(merge, accepted)
    merge.metrics.folds.labels("done").inc(bool(accepted.fine_tunes))
    added = accepted.fine_tunes[-1] if accepted.fine_tunes else None
    named = {key: added[key] for key in ("name", "source", "revision")} if added else {}
    log.info(
        "finetune.served" if added else "base.served",
        **named,
        version=accepted.version,
        digest=accepted.digest[:12],
        count=len(accepted.fine_tunes),
        seconds=round(seconds, 3),
        **accepted.manifest["health"],
    )
    return True


def passes(merge: Merge, candidate: Snapshot) -> bool:
    """Step 7: run the gates; a refused candidate stays aside for inspection."""
    current = snapshots.current(merge.store)
    try:
        with stage(merge, "gate"):
            verdict = gates.check(merge.config.gates, candidate.path, current, merge.engine.beat)
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
    merge.ledger.update_snapshot(candidate.version, state="refused", note="; ".join(verdict.reasons))
    merge.metrics.folds.labels("refused").inc()
    row = row_of(merge, candidate)
    if row:
        refusal = Refused(
            "quality", "; ".join(verdict.reasons), hint="`streammerge fine-tunes retry` folds it again"
        )
        set_aside(merge, row, "quarantined", refusal)
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
    """Steps 8 and 9 in the ledger, in one transaction: head, fine-tune, the intent to promote, outbox."""
    ledger = merge.ledger
    with ledger.transaction():
        record_candidate(merge, snapshot)
        ledger.update_snapshot(snapshot.version, state="accepted", accepted_at=now())
        ledger.set_fact("head", snapshot.path.name)
        if row := row_of(merge, snapshot):
            ledger.update_fine_tune(
                row["id"],
                state="folded",
                reason="",
                detail="",
                step="folded",
                version=snapshot.version,
                attempts=0,
                next_try_at=0.0,
            )
            merge.metrics.decided.labels(row["source"], "folded").inc()
        promote.intend(merge, snapshot, "fold" if snapshot.parent else "first")


def row_of(merge: Merge, snapshot: Snapshot) -> Row | None:
    """Find the row of the fine-tune that a snapshot added."""
    if not snapshot.fine_tunes:
        return None
    last = snapshot.fine_tunes[-1]
    return merge.ledger.row(
        "select * from fine_tunes where (source, name, revision) = (?, ?, ?)",
        last["source"],
        last["name"],
        last["revision"],
    )


def refuse_changed(merge: Merge, row: Row, head: Snapshot) -> None:
    """A changed revision of a folded name is decided by `on_update`."""
    folded = [
        entry for entry in head.fine_tunes if (entry["source"], entry["name"]) == (row["source"], row["name"])
    ]
    if not folded or merge.config.on_update == "add":
        return
    if merge.config.on_update == "ignore":
        raise Refused(
            "ignored", f"revision {folded[-1]['revision']} is folded and on_update is ignore", hint=""
        )
    raise Refused(
        "needs-replay",
        f"revision {folded[-1]['revision']} of {row['name']} is folded; "
        f"replacing it needs a replay of {len(head.fine_tunes)} folds",
        hint="this release cannot replay: publish it under a new name, or set on_update: add",
    )


def next_version(merge: Merge) -> int:
    """Give the next number: one more than any that was ever sealed."""
    row = merge.ledger.row("select max(version) as version from snapshots")
    known = [row["version"]] if row and row["version"] is not None else []
    for parent in (merge.store.candidates, merge.store.snapshots):
        known += [int(path.name.split("-")[0]) for path in snapshots.folders(parent)]
    return max(known, default=-1) + 1


def require_space(merge: Merge, purpose: str) -> None:
    """Raise NoSpace before work that the disk cannot hold."""
    files.require_space(
        merge.store.root,
        reports.version_bytes(merge.store.read_settings()),
        reserve_bytes=merge.config.reserve,
        purpose=purpose,
    )
    merge.full_disk = ""


def first_version(merge: Merge) -> None:
    """Seal, gate and promote the base itself as version 0."""
    require_space(merge, "writing version 0")
    with files.disk_errors("writing version 0"):
        building = snapshots.begin(merge.store, 0)
        state = State(building / "state", {}, Totals())
        manifest, hashes = render(merge, state, [], None, 0, building)
        conclude(merge, seal(merge, building, manifest, hashes))


def refresh_merge_metrics(merge: Merge, head: Snapshot) -> None:
    """Show head's figures."""
    totals, figures = head.manifest["totals"], head.manifest["health"]
    merge.metrics.merged.set(totals["count"])
    merge.metrics.scale.set(totals["lambda"])
    merge.metrics.norm_ratio.set(figures["norm_ratio"] or 0.0)
    merge.metrics.kept_energy.set(figures["kept_energy"] or 0.0)
    merge.metrics.orthogonality.set(figures["orthogonality"] or 0.0)


@contextmanager
def stage(merge: Merge, name: str) -> Iterator[None]:
    """Time one stage."""
    started = time.monotonic()
    try:
        yield
    finally:
        merge.metrics.stage_seconds.labels(name).observe(time.monotonic() - started)
