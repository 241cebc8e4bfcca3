"""THE STORY: one fine-tune from announced to served. Read `journey` from top to bottom.

Every step is durable before the next begins, and every step may be killed: what is then found at start is
finished or removed by `recovery`. The order of a step's effects is never the order that is convenient.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from streammerge import files, machine, methods, replay, reports, screen, snapshots
from streammerge.acceptance import conclude, record_candidate
from streammerge.arriving import Incoming
from streammerge.aside import remove_fetched, set_aside
from streammerge.card import card
from streammerge.collect import tidy
from streammerge.engine import Serve
from streammerge.errors import NoSpace, Refused, TryAgain
from streammerge.fetching import bring_in, identify, published
from streammerge.fit import Tolerance
from streammerge.furnish import furnish
from streammerge.judging import judge
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


def next_version(merge: Merge) -> int:
    """Give the next number: one more than any that was ever sealed."""
    row = merge.ledger.row("select max(version) as version from snapshots")
    known = [row["version"]] if row and row["version"] is not None else []
    for parent in (merge.store.candidates, merge.store.snapshots):
        known += map(snapshots.numbered, snapshots.names(parent))
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
