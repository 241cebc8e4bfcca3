"""Is a store what it says of itself? Every byte, the chain of versions, every row; all of it in one run.

Reads only, and a daemon may be at work meanwhile: what is not as it should be is looked at again a moment
later, and only what is still so is said. What a kill leaves and the next start finishes is unfinished; what
no start can have left is damage.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from streammerge import files, methods, reports, snapshots
from streammerge.books import ONE_MOMENT, Books, Finding
from streammerge.collect import is_archived
from streammerge.errors import Damaged, Refused, StreammergeError
from streammerge.fetching import published
from streammerge.headers import Incomplete, WeightsSet
from streammerge.plan import ADDED, PROJECTED
from streammerge.snapshots import RESTORE
from streammerge.state import STATISTICS, delta_norms
from streammerge.weights import Weights, element_panels, identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.ledger import Row
    from streammerge.snapshots import Snapshot, Store

LOOKS, PAUSE_SECONDS = 4, 0.25
TOLERANCE = 1e-4  # of norms that were summed in another order, on a GPU maybe


def verify(config: Config, beat: Callable[[str, int], None] = lambda _what, _bytes: None) -> list[Finding]:
    """Check a whole store. `beat` is told what is read, and how many bytes that were.

    Raises ConfigError where there is no store, or it is somebody else's.
    """
    store, ledger = snapshots.Store(config.store), None
    found = []
    try:
        store, ledger = reports.open_for_reading(config)
        ledger.close()
    except Damaged as exc:
        found.append(Finding(exc.message, exc.hint))
    try:
        settings = store.read_settings()
    except Damaged as exc:
        settings = {}
        found.append(Finding(exc.message, exc.hint))
    for parent in (store.snapshots, store.candidates):
        for path in snapshots.folders(parent):
            harm = list(contents(path, settings, beat))
            found += harm if path.is_dir() else []  # a version that goes loses its name first
    if ledger is not None:
        found += inbox(config, store, settings, beat)
        found += lasting(config, store, settings)
    return list(dict.fromkeys(found))


def total_bytes(store: Store) -> int:
    """Sum the sizes of what is read."""
    return sum(files.tree_bytes(folder) for folder in (store.snapshots, store.candidates))


# One version


def contents(path: Path, settings: Mapping[str, Any], beat: Callable[[str, int], None]) -> Iterator[Finding]:
    """Name every file of one version that is not as it was sealed, and figures that do not fit its state."""
    try:
        snapshot = snapshots.read(path)
    except Damaged as exc:
        yield Finding(exc.message, exc.hint)
        return
    is_sound = True
    for what in snapshots.differences(snapshot, beat=beat):
        is_sound = False
        yield Finding(what, RESTORE)
    if is_sound and settings:
        beat(f"{path.name}: the state", 0)
        for what in state_differences(snapshot, settings):
            yield Finding(f"{path}: {what}", RESTORE)


def state_differences(snapshot: Snapshot, settings: Mapping[str, Any]) -> Iterator[str]:
    """Compare the totals of a manifest with the fine-tunes it lists and with the state beside it."""
    totals, listed = snapshot.manifest["totals"], snapshot.fine_tunes
    yield from disagreements("count", totals["count"], len(listed))
    yield from disagreements("factors", totals["factors"], sum(member.weight for member in listed))
    twice = [digest for digest, times in Counter(snapshot.digests).items() if times > 1]
    for digest in twice:
        yield f"fine-tune {digest[:12]} is in it more than once"
    if not listed:
        return
    try:
        with Weights(WeightsSet((snapshot.state / STATISTICS,))) as found:
            figures = {name: found.read(name) for name in found.entries}
        merged = {name for name, kind in settings["kinds"].items() if kind in (PROJECTED, ADDED)}
        odd = [name for name, rows in figures.items() if tuple(rows.shape) != (len(listed), 3)]
        if odd or set(figures) != merged:
            name = min([*odd, *(merged ^ set(figures))])
            yield f"state/{STATISTICS} has not {len(listed)} rows for each folded weight, first is {name}"
            return
        norms = delta_norms(figures)
        yield from disagreements("mean_delta_norm", totals["mean_delta_norm"], math.fsum(norms) / len(norms))
        yield from disagreements("max_delta_norm", totals["max_delta_norm"], max(norms))
        yield from disagreements("state_norm", totals["state_norm"], state_norm(snapshot, settings))
    except (OSError, Refused, Incomplete, KeyError) as exc:
        yield f"its state cannot be read: {exc}"


def disagreements(what: str, sealed: float, found: float) -> Iterator[str]:
    """Say so where a total is not what was found."""
    if not math.isclose(sealed, found, rel_tol=TOLERANCE, abs_tol=1e-12):
        yield f"totals.{what} is {sealed:g}, and its state says {found:g}"


def state_norm(snapshot: Snapshot, settings: Mapping[str, Any]) -> float:
    """Length of the first slot over all weights, from the files."""
    method, count = methods.load(settings["method"]), len(snapshot.fine_tunes)
    firsts = {
        kind: next(iter(methods.layout(method, methods.Weight("", kind, (1, 1)), count, settings["knobs"])))
        for kind in ("projected", "added")
    }
    squares = 0.0
    for path in sorted(snapshot.state.glob("*-?????.safetensors")):
        slot = path.name.rsplit("-", 1)[0]
        with Weights(WeightsSet((path,)), once=True) as found:
            for name, entry in found.entries.items():
                if firsts[settings["kinds"][name]] == slot:
                    for start, stop in element_panels(entry.elements):
                        squares += float(found.read(name, start, stop).double().square().sum())
    return math.sqrt(squares)


# The inbox


def inbox(
    config: Config, store: Store, settings: Mapping[str, Any], beat: Callable[[str, int], None]
) -> Iterator[Finding]:
    """Name kept files of folded fine-tunes that are not what was folded."""
    _, ledger = reports.open_for_reading(config)
    rows = ledger.fine_tunes("folded")
    ledger.close()
    sidecar = methods.sidecar(settings["method"]) if settings else ""
    for row in rows:
        folder = store.inbox / str(row["id"])
        if not folder.is_dir():
            continue
        beat(f"inbox/{folder.name}", 0)
        try:
            digest = identity(published(folder, row["name"]), sidecar=sidecar)
        except (OSError, StreammergeError) as exc:
            digest = str(exc)
        if digest != row["digest"] and folder.is_dir() and is_kept(config, row, folder):
            yield Finding(
                f"{folder} is not what was folded of {row['name']}",
                hint=f"remove {folder}, so that it is fetched from its source when it is needed",
            )


def is_kept(config: Config, row: Row, folder: Path) -> bool:
    """Whether the files of a row are still to stay, now that they were read."""
    _, ledger = reports.open_for_reading(config)
    try:
        fresh = ledger.row("select * from fine_tunes where id = ?", row["id"])
        return (
            fresh is not None and fresh["state"] == "folded" and is_archived(config, fresh["state"], folder)
        )
    finally:
        ledger.close()


# The account


def lasting(config: Config, store: Store, settings: Mapping[str, Any]) -> list[Finding]:
    """Compare ledger and folders; where they differ, again and again: what a daemon is doing passes."""
    found: list[Finding] = []
    for look in range(LOOKS):
        if look:
            time.sleep(PAUSE_SECONDS)
        now = books(config, store, settings)
        found = [finding for finding in found if finding in now] if look else now
        if not found:
            break
    return found


def books(config: Config, store: Store, settings: Mapping[str, Any]) -> list[Finding]:
    """Compare ledger and folders once, as of one moment of the ledger."""
    try:
        _, ledger = reports.open_for_reading(config)
    except Damaged as exc:
        return [Finding(exc.message, exc.hint)]
    try:
        if harm := ledger.harm():
            return [Finding(f"{store.ledger} is damaged: {line}", ONE_MOMENT) for line in harm]
        with ledger.one_moment():
            return list(Books(store, ledger, settings).compare())
    except Damaged as exc:
        return [Finding(exc.message, exc.hint)]
    finally:
        ledger.close()
