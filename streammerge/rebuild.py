"""A new store from the fine-tunes of another, folded again in their order by another method or other knobs.

The old store is only read, and may have a daemon at work. The new one takes over its account: what was
refused or denied stays so, and no source announces again what is folded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from streammerge import (
    acceptance,
    files,
    machine,
    methods,
    pipeline,
    recovery,
    replay,
    reports,
    screen,
    snapshots,
)
from streammerge.engine import Engine
from streammerge.errors import ConfigError, Damaged, StreammergeError
from streammerge.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

    from streammerge.config import Config
    from streammerge.ledger import Ledger
    from streammerge.recipes import FoldingMerge
    from streammerge.snapshots import Snapshot, Store

TAKEN_OVER = ("denied", "figures", "sightings", "sources")


def rebuild(
    config: Config, method: str, knobs: Mapping[str, Any], place: Path, console: Console
) -> dict[str, Any]:
    """Make a store at `place` that holds what the configured store's head holds, merged by `method`.

    Raises ConfigError for a request that makes no sense, StreammergeError where files are missing or a gate
    refuses the result.
    """
    check(config, method, place)
    old_store, old_ledger = reports.open_for_reading(config)
    head = read_head(old_store, old_ledger)
    renewed = config.model_copy(update={"method": method, "knobs": dict(knobs), "store": place})
    store = recovery.prepare_folder(renewed)
    with files.locked(store.lock), Progress(console=console, transient=True) as progress:
        bar = progress.add_task("reading the base", total=None)
        engine = Engine(
            device=config.device,
            threads=config.threads,
            residency=config.residency,
            progress=lambda count: progress.advance(bar, count),
        )
        merge = recovery.open_merge(renewed, engine, Metrics(screen.REASONS))
        try:
            if merge.recipe.base_digest != old_store.read_settings()["base"]["digest"]:
                raise ConfigError(
                    f"base {config.base} is not the one the store {config.store} was made with",
                    hint="name the base's commit: hf://ORG/NAME@COMMIT",
                )
            if merge.head.fine_tunes:
                raise ConfigError(f"store {place} holds fine-tunes already", hint="give a new folder")
            take_over(merge, old_store, old_ledger, head)
            base_bytes = int(merge.settings["base"]["bytes"])
            progress.update(
                bar,
                description=f"folding {len(head.fine_tunes)} fine-tunes by {method}",
                total=base_bytes * (2 * len(head.fine_tunes) + 1),
                completed=0,
            )
            return fold_all(merge, head)
        finally:
            merge.ledger.close()
            old_ledger.close()


def read_head(store: Store, ledger: Ledger) -> Snapshot:
    """Read what is head now; where it moved on and was collected just then, what is head after that."""
    name = str(ledger.fact("head"))
    try:
        return snapshots.read(store.snapshots / name)
    except Damaged:
        if ledger.fact("head") == name:
            raise
        return read_head(store, ledger)


def check(config: Config, method: str, place: Path) -> None:
    """Refuse what cannot be done before anything is made."""
    if method not in methods.NAMES:
        raise ConfigError(
            f"--method {method}: no such method", hint=f"methods are {', '.join(methods.NAMES)}"
        )
    if methods.sidecar(method) not in ("", methods.sidecar(config.method)):
        raise ConfigError(
            f"{method} needs {methods.sidecar(method)} with every fine-tune, which the store does not have",
            hint="start a new store with first_run: fold, so that the sources bring them",
        )
    if place.resolve() == config.store.resolve():
        raise ConfigError(f"--store {place} is the store itself", hint="give a new folder")


def take_over(merge: FoldingMerge, store: Store, ledger: Ledger, head: Snapshot) -> None:
    """Copy the account, and the files that the old store kept."""
    folded = {member.announced for member in head.fine_tunes}
    with merge.ledger.transaction():
        for table in TAKEN_OVER:
            merge.ledger.insert(table, ledger.rows(f"select * from {table}"))  # noqa: S608 -- our own names
        for row in ledger.fine_tunes():
            is_folded = (row["source"], row["name"], row["revision"]) in folded
            state = "pending" if is_folded else row["state"]
            step = "fetched" if is_folded else "announced"
            merge.ledger.insert(
                "fine_tunes", [{**row, "id": None, "state": state, "step": step, "version": None}]
            )
    for row in ledger.fine_tunes("folded"):
        kept = store.inbox / str(row["id"])
        new = merge.ledger.fine_tune(row["source"], row["name"], row["revision"])
        if new is not None and kept.is_dir() and not (merge.store.inbox / str(new["id"])).exists():
            copy_kept(kept, merge.store.inbox / str(new["id"]))


def copy_kept(kept: Path, inbox: Path) -> None:
    """Copy what the old store kept of a fine-tune; what goes meanwhile is had from its source."""
    part = inbox.with_name(f"{inbox.name}.part")
    files.remove_tree(part)
    part.mkdir()
    try:
        with machine.errors("copying kept files"):
            for file in sorted(kept.iterdir()):
                files.copy_file(file, part / file.name, follow_symlinks=False)
    except FileNotFoundError:
        files.remove_tree(part)
        return
    files.rename_folder(part, inbox)


def fold_all(merge: FoldingMerge, head: Snapshot) -> dict[str, Any]:
    """Fold everything in its order into one version."""
    members = head.fine_tunes
    if missing := [
        f"{member.name} ({why})" for member in members if (why := replay.absence_of(merge, member))
    ]:
        raise StreammergeError(
            f"the files of {', '.join(missing)} cannot be had",
            hint="publish them again at that revision, or retract them first",
        )
    if members:
        candidate = pipeline.left_sealed(merge, merge.head, members) or pipeline.along(
            merge, merge.head, replay.Way(None, (), members), members
        )
        if not acceptance.conclude(merge, candidate, asked_for=True):
            note = (merge.ledger.snapshot(candidate.version) or {}).get("note")
            raise StreammergeError(f"the new merge is refused: {note}", hint="nothing was changed")
    return {
        "store": str(merge.store.root),
        "method": merge.recipe.method,
        "knobs": dict(merge.recipe.knobs),
        "version": merge.head.version,
        "count": len(members),
    }
