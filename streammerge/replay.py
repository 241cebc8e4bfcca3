"""Taking fine-tunes out of a state: by subtraction where that is exact, else by folding the later ones again.

What is missing for either is found before anything is computed. Nothing here is official: a state grows in a
building folder, and what becomes of it is the pipeline's.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import structlog

from streammerge import files, methods, screen, snapshots
from streammerge.arriving import Incoming
from streammerge.collect import is_archived, mark_damaged
from streammerge.errors import Damaged, Refused, TryAgain
from streammerge.fetching import bring_in, published
from streammerge.fit import Tolerance
from streammerge.headers import Incomplete
from streammerge.members import Member, Members
from streammerge.methods import Totals
from streammerge.sources import open_source
from streammerge.state import ROLL_BACK, State
from streammerge.steps import reached
from streammerge.weights import identity

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from streammerge.engine import Folded, Serve
    from streammerge.folding import Measured
    from streammerge.recipes import FoldingMerge
    from streammerge.snapshots import Snapshot
    from streammerge.sources import Source

log = structlog.get_logger()


@dataclass(frozen=True)
class Way:
    """How a state is reached: from that of `start`, or from nothing, by taking out and folding in.

    out  (place in start's order, member), the last one first
    """

    start: Snapshot | None
    out: tuple[tuple[int, Member], ...]
    folded: Members

    def __len__(self) -> int:
        """How many fine-tunes are read."""
        return len(self.out) + len(self.folded)


def way_without(merge: FoldingMerge, head: Snapshot, places: Collection[int]) -> Way:
    """Choose how head's fine-tunes are reached without those at `places`.

    Raises Refused as needs-replay where bytes are missing or too many folds are needed, saying which.
    """
    out = tuple((place, member) for place, member in enumerate(head.fine_tunes) if place in places)
    subtracted = Way(head, out[::-1], Members())
    start, count = newest_before(merge, head, min(places))
    again = Way(start, (), head.fine_tunes.without({*range(count), *places}))
    ways = [subtracted, again] if methods.can_unfold(merge.recipe.method, merge.recipe.knobs) else [again]
    if not again.folded:  # what is left is a state that is there
        ways = [again]
    problems = [problem_of(merge, way) for way in ways]
    for way, problem in zip(ways, problems, strict=True):
        if not problem:
            return way
    raise Refused(
        "needs-replay",
        f"taking out {', '.join(member.name for _, member in out)} needs {problems[0]}",
        hint="publish again what is missing, raise replay_limit, or set archive: keep for the next time",
    )


def newest_before(merge: FoldingMerge, head: Snapshot, place: int) -> tuple[Snapshot | None, int]:
    """Find the version on disk that holds most of head's first `place` fine-tunes and no other."""
    marked = merge.ledger.fact("damaged") or {}
    names = {snapshots.numbered(name): name for name in snapshots.names(merge.store.snapshots)}
    for version, count in merge.ledger.counts(names, most=place):
        if count and str(version) not in marked:
            with suppress(Damaged):
                found = snapshots.read(merge.store.snapshots / names[version])
                if found.digests == head.digests[:count]:
                    return found, count
    return None, 0


def problem_of(merge: FoldingMerge, way: Way) -> str:
    """Say what a way lacks, "" for nothing."""
    limit = merge.config.replay_limit
    if len(way.folded) > limit:
        return f"{len(way.folded)} fine-tunes folded again, and replay_limit is {limit}"
    wanted = [member for _, member in way.out] + list(way.folded)
    missing = [f"{member.name} ({why})" for member in wanted if (why := absence_of(merge, member))]
    return f"the files of {', '.join(missing)}" if missing else ""


def absence_of(merge: FoldingMerge, member: Member) -> str:
    """Say why a folded fine-tune's files cannot be had any more; "" where they can.

    What the store kept of it is read, or what its source has; a kept copy that is not what was folded gives
    way to the source's. Raises TryAgain where the source cannot be seen now.
    """
    row = merge.ledger.fine_tune(*member.announced)
    if row is None:
        return "the ledger does not know it"
    inbox = merge.store.inbox / str(row["id"])
    if inbox.exists() and is_right(merge, inbox, member):
        return ""
    rotten = "what the store kept of it is damaged, and " if inbox.exists() else ""
    source = source_of(merge, member)
    if source is None:
        return f"{rotten}source {member.source} is no longer configured"
    if why := source.absence(member.name, member.revision, member.digest):
        return rotten + why
    if rotten:
        log.warning("replay.kept_files_damaged", folder=str(inbox), fine_tune=member.name)
        files.remove_tree(inbox)
    return ""


def is_right(merge: FoldingMerge, inbox: Path, member: Member) -> bool:
    """Whether a folder of the inbox holds what was folded."""
    sidecar = methods.sidecar(merge.recipe.method)
    try:
        found = identity(published(inbox, member.name), merge.engine.beat, sidecar)
        return found == str(member.digest)
    except (OSError, Refused, Incomplete):
        return False


def source_of(merge: FoldingMerge, member: Member) -> Source | None:
    """Open the source that a fine-tune came from, if it is still configured."""
    part = next((part for part in merge.config.sources if part.name == member.source), None)
    return open_source(part, merge.config, merge.engine.beat) if part else None


def require_kept(merge: FoldingMerge, members: Members) -> None:
    """Before a fold by a method that reads all fine-tunes again: raise TryAgain where some cannot be had."""
    if not methods.rereads(merge.recipe.method):
        return
    kept = set(os.listdir(merge.store.inbox))  # noqa: PTH208 -- paths cost ten times as much
    gone = [
        member
        for member in members
        if str((merge.ledger.fine_tune(*member.announced) or {}).get("id")) not in kept
    ]
    if missing := [f"{member.name} ({why})" for member in gone if (why := absence_of(merge, member))]:
        raise TryAgain(
            f"{merge.recipe.method} reads every fine-tune again, and cannot have {', '.join(missing)}",
            hint="publish them again, or retract them",
        )


@contextmanager
def opened(merge: FoldingMerge, member: Member) -> Iterator[Incoming]:
    """Open a folded fine-tune again, from the inbox or from its source at its revision."""
    row = merge.ledger.fine_tune(*member.announced)
    if row is None:
        raise TryAgain(f"the ledger does not know {member.name}", hint="publish it again")
    inbox = merge.store.inbox / str(row["id"])
    merge.needed.add(str(row["id"]))
    try:
        if not inbox.exists():
            source = source_of(merge, member)
            if source is None:
                raise TryAgain(f"source {member.source} is no longer configured", hint="configure it again")
            bring_in(merge, row, source)
        tolerance = Tolerance(merge.config.tensors.ignore_extra, merge.config.tensors.allow_missing)
        path = published(inbox, member.name)
        with screen.examine(path, merge.base_entries, merge.recipe, tolerance) as finetune:
            yield Incoming(finetune, member.digest, member.weight, member.source)
    finally:
        merge.needed.discard(str(row["id"]))
        if not is_archived(merge.config, row["state"], inbox):
            files.remove_tree(inbox)


def walk(merge: FoldingMerge, way: Way, building: Path, name: str) -> tuple[State, Measured | None]:
    """Go a way: the state it leads to lies in building/`name` then.

    Raises TryAgain where a fine-tune's content is not what was folded, or an older version from which the
    way begins is not what was sealed: that is marked, and the next way begins elsewhere.
    """
    try:
        return go(merge, way, building, name)
    except Damaged as exc:
        start = way.start
        if start is None or start.digest == merge.head.digest or not any(snapshots.harm_of(start.path)):
            raise
        marked = merge.ledger.fact("damaged") or {}
        mark_damaged(merge, {**marked, str(start.version): exc.message})
        raise TryAgain(
            f"version {start.version}, to begin from, is damaged: {exc.message}",
            hint="ask again: another version is begun from then",
        ) from exc


def go(merge: FoldingMerge, way: Way, building: Path, name: str) -> tuple[State, Measured | None]:
    """Take out and fold in, one after the other."""
    state = merge.state_of(way.start) if way.start else State(building, {}, Totals())
    measured: Measured | None = None
    if not len(way):
        return (copied(state, building / name) if way.start else state), None
    steps = chain(way.out, ((None, member) for member in way.folded))
    for number, (place, member) in enumerate(steps, 1):
        log.info("replay.step", step=number, of=len(way), fine_tune=member.name, out=place is not None)
        state, measured, _ = step(merge, member, state, building, partial(prove, member), place=place)
        reached("replayed")
    return moved(state, building / name), measured


def step(
    merge: FoldingMerge,
    member: Member,
    state: State,
    building: Path,
    check: Callable[[Incoming, Folded], None],
    *,
    place: int | None = None,
    serve: Serve | None = None,
) -> Folded:
    """Fold one fine-tune into a state, or take out the one at `place`; the older state goes from `building`.

    check  raises where it is not to count, the fine-tune still open; the older state stays as it was then
    """
    folder = building / f"step-{state.totals.count}-{member.digest[:12]}"
    folder.mkdir()
    try:
        with opened(merge, member) as incoming:
            if place is None:
                found = merge.engine.fold(merge.recipe, incoming, state, folder, serve)
            else:
                found = merge.engine.unfold(merge.recipe, incoming, place, state, folder)
            check(incoming, found)
    except (Refused, TryAgain):
        files.remove_tree(folder)
        raise
    if state.folder.parent == building:
        files.remove_tree(state.folder)
    return found


def prove(member: Member, incoming: Incoming, found: Folded) -> None:
    """Raise TryAgain where what was read is not what was folded once; what was not read proves nothing."""
    is_read = found.state.has_slots()
    if is_read and incoming.finetune.finish() != member.digest:
        raise TryAgain(
            f"{member.name} is not what was folded once: its content has changed",
            hint="publish the content of that revision again",
        )


def moved(state: State, folder: Path) -> State:
    """Give a state that was built step by step its place."""
    state.folder.rename(folder)  # an empty one there makes way
    return replace(state, folder=folder)


def copied(state: State, folder: Path) -> State:
    """Copy a sealed state."""
    folder.mkdir(exist_ok=True)
    for file, digest in sorted(state.hashes.items()):
        files.copy_file(state.folder / file, folder / file, follow_symlinks=False)
        if files.sha256_file(folder / file) != digest:
            raise Damaged(
                f"{state.folder / file} does not have the content it was sealed with", hint=ROLL_BACK
            )
    return State(folder, state.hashes, state.totals)
