"""THE STORY: one fine-tune from announced to served. Read `journey` from top to bottom.

Every step is durable before the next begins, and every step may be killed: what is then found at start is
finished or removed by `recovery`. The order of a step's effects is never the order that is convenient.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import structlog

from streammerge import batches, files, machine, promote, replay, reports, screen, snapshots
from streammerge.acceptance import conclude
from streammerge.aside import put_back, remove_fetched, set_aside
from streammerge.collect import tidy
from streammerge.engine import Serve
from streammerge.errors import NoSpace, Refused, Stopped, TryAgain, Unable
from streammerge.fetching import bring_in, identify, published
from streammerge.figures import RELATIVE
from streammerge.fit import Tolerance
from streammerge.judging import Changed, judge
from streammerge.members import Member, Members
from streammerge.methods import Totals
from streammerge.sealing import render, seal
from streammerge.state import State
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from streammerge.engine import Folded
    from streammerge.ledger import Row
    from streammerge.recipes import FoldingMerge
    from streammerge.replay import Way
    from streammerge.snapshots import Snapshot
    from streammerge.sources import Source

log = structlog.get_logger()


def journey(merge: FoldingMerge, rows: Sequence[Row], sources: Mapping[str, Source]) -> None:
    """Take pending fine-tunes as far as they go: into one served version, aside, or back for later.

    What is put aside has its reason recorded, and does not keep the others. Raises TryAgain where the same
    step is to be repeated later with all of them; nothing is left behind then.
    """
    started = time.monotonic()
    fetched = [found for row in rows if (found := brought(merge, row, sources[row["source"]]))]
    if merge.held or promote.is_unproven(merge):
        return
    candidate = fold(merge, fetched)
    if candidate is not None:
        conclude(merge, candidate, seconds=time.monotonic() - started)


def brought(merge: FoldingMerge, row: Row, source: Source) -> Row | None:
    """Fetch one of several; None where it cannot go on with the others, which is written down."""
    with setting_aside(merge, row):
        try:
            return fetch(merge, row, source)
        except (Unable, Stopped):
            raise
        except TryAgain as exc:
            put_back(merge, row, exc)
    return None


@contextmanager
def setting_aside(merge: FoldingMerge, row: Row) -> Iterator[None]:
    """What is refused inside is recorded with its reason; all that is logged names the fine-tune."""
    bound = {key: row[key] for key in ("source", "name", "revision")}
    with structlog.contextvars.bound_contextvars(**bound):
        try:
            yield
        except Refused as exc:
            set_aside(merge, row, "refused", exc)


def bring(merge: FoldingMerge, row: Row, source: Source) -> None:
    """Fetch one pending fine-tune and leave the rest of its journey for later.

    It may be decided otherwise meanwhile, by a newer revision or a person: its files go then.
    """
    with setting_aside(merge, row):
        try:
            fetch(merge, row, source)
        except FileNotFoundError:
            if not is_overtaken(merge, row):
                raise
        if is_overtaken(merge, row):
            remove_fetched(merge, row)


def is_overtaken(merge: FoldingMerge, row: Row) -> bool:
    """Whether a fine-tune was decided on while it was fetched."""
    fresh = merge.ledger.row("select state from fine_tunes where id = ?", row["id"])
    return fresh is None or fresh["state"] in ("superseded", "gone", "denied")


def fetch(merge: FoldingMerge, row: Row, source: Source) -> Row:
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


def fold(merge: FoldingMerge, rows: Sequence[Row]) -> Snapshot | None:
    """Steps 3 to 6: screen each, fold, render and seal one candidate; None where none is to be folded now."""
    head = merge.head
    with merge.metrics.stage("fold"), machine.errors("folding", merge.store.root):
        screened: list[Row] = []
        way = None  # for a fine-tune that goes alone
        for row in batches.side_by_side(rows, head, on_update=merge.config.on_update):
            with setting_aside(merge, row):
                refuse_known(merge, row, head, screened)
                way = replacement(merge, row, head)
                if is_screened(merge, row):
                    screened.append(row)
        if not screened:
            return None
        replay.require_kept(merge, head.fine_tunes)
        steps = len(screened) + bool(way)
        try:
            with under_construction(merge, head, way, "folding", steps=steps) as (version, building):
                return build(merge, screened, head, way, version, building)
        except Refused as exc:  # the model that comes of it, which is nobody's fault yet
            batches.blame(merge, screened, "refused", exc)
            return None


def refuse_known(merge: FoldingMerge, row: Row, head: Snapshot, screened: Sequence[Row]) -> None:
    """Raise Refused for content that is in the merge, or about to be, or was taken out."""
    before = [r for r in merge.ledger.fine_tunes("pending", "awaiting_approval") if r["id"] < row["id"]]
    digest, waiting = row["digest"], {other["digest"] for other in (*before, *screened)}
    is_there = digest in waiting or any(digest == member.digest for member in head.fine_tunes)
    screen.refuse_known(digest, folded={digest} if is_there else (), denied=merge.ledger.denied())


def is_screened(merge: FoldingMerge, row: Row) -> bool:
    """Step 3: raise Refused for what headers and settings show; False where a person is asked first."""
    ledger, config = merge.ledger, merge.config
    inbox = published(merge.store.inbox / str(row["id"]), row["name"])
    tolerance = Tolerance(config.tensors.ignore_extra, config.tensors.allow_missing)
    with screen.examine(inbox, merge.base_entries, merge.recipe, tolerance):
        ledger.update_fine_tune(row["id"], step="screened")
    reached("screened")
    if config.approve == "auto" or row["approved"]:
        return True
    ledger.update_fine_tune(
        row["id"], state="awaiting_approval", detail="approve it with `streammerge fine-tunes approve`"
    )
    log.info("finetune.awaits_approval")
    return False


@contextmanager
def under_construction(
    merge: FoldingMerge, head: Snapshot, way: Way | None, purpose: str, *, steps: int
) -> Iterator[tuple[int, Path]]:
    """Give a number and an empty building folder, which goes unless it is sealed; what is read stays.

    steps  how many fine-tunes are read: with several, two states lie there at a time
    """
    merge.folding_from = (head.path, *([way.start.path] if way and way.start else []))
    try:
        version = next_version(merge)
        require_space(merge, purpose, states=min(steps, 2))
        building = snapshots.begin(merge.store, version)
        merge.metrics.folding.set(1)
        merge.metrics.fold_started.set_to_current_time()
        try:
            yield version, building
        finally:
            files.remove_tree(building)
    finally:
        merge.folding_from = ()
        merge.metrics.folding.set(0)
        merge.metrics.fold_progress.set(0)


def build(
    merge: FoldingMerge,
    rows: Sequence[Row],
    head: Snapshot,
    way: Way | None,
    version: int,
    building: Path,
) -> Snapshot | None:
    """Steps 4 to 6 in the building folder; with a way, the fine-tune takes the place of an older revision.

    None where nothing is left of the fine-tunes.
    """
    state, kept = merge.state_of(head), head.fine_tunes
    if way is not None:
        state, _ = replay.walk(merge, way, building, "before")
        replaced = {(row["source"], row["name"]) for row in rows}
        kept = kept.without({n for n, member in enumerate(kept) if member.series in replaced})
    last, members = fold_in(merge, rows, state, kept, building)
    if last is None:
        return None
    state = replay.moved(last.state, building / "state")
    manifest, hashes = render(merge, state, members, head, version, building, last.measured, last.model)
    return seal(merge, building, manifest, hashes)


def fold_in(
    merge: FoldingMerge, rows: Sequence[Row], state: State, members: Members, building: Path
) -> tuple[Folded | None, Members]:
    """Step 4: one after the other, each judged before the next; gives the last, and what is in it now.

    What is refused is set aside, and the rest goes on. Only where what stands before it in this version may
    be the reason does it end there: whether that will be accepted is not known, and it is judged anew then.
    """
    last: Folded | None = None
    for row in rows:
        if is_overtaken(merge, row):
            continue
        member = Member(row["source"], row["name"], row["revision"], row["digest"], row["factor"])
        serve = Serve(building / "model", merge.config.finalize) if row is rows[-1] else None
        with setting_aside(merge, row):
            try:
                check = partial(judge, merge, row, members)
                last = replay.step(merge, member, last.state if last else state, building, check, serve=serve)
            except Changed as exc:
                put_back(merge, row, exc)
                continue
            except Refused as exc:
                files.empty_folder(building / "model")
                if last is not None and exc.reason in RELATIVE:
                    break
                raise
            members += [member]
            reached("folded")
    return last, members


def replacement(merge: FoldingMerge, row: Row, head: Snapshot) -> Way | None:
    """Decide by `on_update` about a changed revision of a folded name: how the old one is taken out first."""
    if merge.config.on_update == "add":
        return None
    series = row["source"], row["name"]
    earlier = {n: member for n, member in enumerate(head.fine_tunes) if member.series == series}
    if not earlier:
        return None
    if merge.config.on_update == "ignore":
        revision = earlier[max(earlier)].revision
        raise Refused("ignored", f"revision {revision} is folded and on_update is ignore", hint="")
    return replay.way_without(merge, head, earlier)


def without(merge: FoldingMerge, head: Snapshot, places: Collection[int]) -> Snapshot:
    """Seal a candidate that holds head's fine-tunes but those at `places`; one left by a kill will do."""
    kept = head.fine_tunes.without(places)
    if left := left_sealed(merge, head, kept):
        return left
    way = replay.way_without(merge, head, places)
    replay.require_kept(merge, kept)
    return along(merge, head, way, kept)


def left_sealed(merge: FoldingMerge, head: Snapshot, members: Members) -> Snapshot | None:
    """Find the undecided candidate that follows head and holds `members`."""
    for row in merge.ledger.rows("select * from snapshots where state = 'candidate'"):
        path = merge.store.candidates / snapshots.folder_name(row["version"], row["digest"])
        candidate = snapshots.read(path)
        if (candidate.parent, candidate.fine_tunes) == (head.digest, members):
            return candidate
    return None


def along(merge: FoldingMerge, head: Snapshot, way: Way, members: Members) -> Snapshot:
    """Seal a candidate that follows head and holds `members`, to whose state `way` leads."""
    with (
        merge.metrics.stage("fold"),
        machine.errors("folding", merge.store.root),
        under_construction(merge, head, way, "replaying", steps=len(way)) as (version, building),
    ):
        state, measured = replay.walk(merge, way, building, "state")
        reached("folded")
        manifest, hashes = render(merge, state, members, head, version, building, measured)
        return seal(merge, building, manifest, hashes)


def next_version(merge: FoldingMerge) -> int:
    """Give the next number: one more than any that was ever sealed."""
    row = merge.ledger.row("select max(version) as version from snapshots")
    known = [row["version"]] if row and row["version"] is not None else []
    for parent in (merge.store.candidates, merge.store.snapshots):
        known += map(snapshots.numbered, snapshots.names(parent))
    return max(known, default=-1) + 1


def require_space(merge: FoldingMerge, purpose: str, *, states: int = 1) -> None:
    """Raise NoSpace before work that the disk cannot hold; what was only prepared, or may go, goes first.

    states  how many lie there at a time beside the model, and one on trial where that is tuned
    """
    settings, reserve = merge.settings, merge.config.reserve
    needed = reports.version_bytes(settings) + (states - 1) * int(settings["state_bytes"])
    needed += int(settings["base"]["bytes"]) if merge.config.tune else 0
    try:
        machine.require_space(merge.store.root, needed, reserve_bytes=reserve, purpose=purpose)
    except NoSpace:
        if not merge.engine.give_back_disk() and not (merge.ledger.fact("head") and tidy(merge)):
            raise
        machine.require_space(merge.store.root, needed, reserve_bytes=reserve, purpose=purpose)
    if isinstance(merge.unable, NoSpace):
        merge.unable = None


def first_version(merge: FoldingMerge) -> None:
    """Seal, gate and promote the base itself as version 0."""
    require_space(merge, "writing version 0")
    with machine.errors("writing version 0", merge.store.root):
        building = snapshots.begin(merge.store, 0)
        state = State(building / "state", {}, Totals())
        manifest, hashes = render(merge, state, Members(), None, 0, building)
        conclude(merge, seal(merge, building, manifest, hashes))
