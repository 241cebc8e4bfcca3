"""Opening a store: made new, or found as a kill or a power cut left it and brought to a consistent state.

What is unfinished is finished or removed; what is damaged is left alone and said (errors.Damaged). Only the
holder of the store's lock comes here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog

from streammerge import (
    acceptance,
    files,
    machine,
    methods,
    pipeline,
    reports,
    snapshots,
    standing,
    unfinished,
)
from streammerge.collect import tidy_inbox
from streammerge.engine import Engine
from streammerge.errors import ConfigError, Damaged
from streammerge.headers import find
from streammerge.merging import open_ledger
from streammerge.plan import Recipe, idle_globs
from streammerge.prepared import Prepared
from streammerge.recipes import FoldingMerge, added_globs, check_cap, check_method, recipe_of, settings_of
from streammerge.steps import reached
from streammerge.weights import Weights, identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config import Config
    from streammerge.metrics import Metrics
    from streammerge.snapshots import Store

log = structlog.get_logger()


def engine_of(
    config: Config, beat: Callable[[], None], progress: Callable[[int], None] = lambda _bytes: None
) -> Engine:
    """Give the engine that folds for a store."""
    folder = snapshots.Store(config.store).prepared
    return Engine(
        device=config.device,
        threads=config.threads,
        residency=config.residency,
        prepared=Prepared(folder, config.prepare.memory, config.prepare.disk),
        beat=beat,
        progress=progress,
    )


def open_merge(config: Config, engine: Engine, metrics: Metrics) -> FoldingMerge:
    """Open the store for work, making it first if need be. The caller holds the lock."""
    check_method(config)
    store = snapshots.Store(config.store)
    if config.hub_base:
        from streammerge.origin import bring_base  # huggingface_hub takes half a second to import

        bring_base(config, engine.beat)
    if not store.exists:
        make_store(config, store, engine)
    settings = store.read_settings()
    recipe, entries = recipe_of(config, settings)
    check_ledger_is_there(store)
    if not store.ledger.exists():
        os.close(
            os.open(store.ledger, os.O_CREAT | os.O_WRONLY, 0o600)
        )  # fine-tunes' names are nobody else's business
    ledger = open_ledger(store)
    merge = FoldingMerge(
        config, store, ledger, metrics, settings, engine=engine, recipe=recipe, base_entries=entries
    )
    check_base(merge)
    recover(merge)
    check_cap(config, merge.head)
    if not methods.load(recipe.method).WEIGHTED and any(part.weight != 1.0 for part in config.sources):
        log.warning("config.weight_ignored", method=recipe.method)
    return merge


def check_base(merge: FoldingMerge) -> None:
    """Read the base again where its files are not those of the last start; another base is a ConfigError."""
    with Weights(find(merge.recipe.base)) as base:
        seen = base.stamp
    if merge.ledger.fact("base") == seen:
        return
    if identity(merge.recipe.base, merge.engine.beat) != merge.recipe.base_digest:
        raise ConfigError(
            f"base {merge.recipe.base} is not the one the store {merge.store.root} was made with",
            hint="put the original base back, or start a new store for the new base",
        )
    merge.ledger.set_fact("base", seen)


def refuse_network(config: Config) -> None:
    """Raise ConfigError for a store on a network file system, unless that is allowed."""
    kind = machine.file_system(config.store if config.store.exists() else config.store.parent)
    if kind in machine.NETWORK_FILE_SYSTEMS and not config.allow_network_store:
        raise ConfigError(
            f"store {config.store} lies on a network file system ({kind}), "
            "where locks and renames are not safe",
            hint="put the store on a local disk, or set allow_network_store: true "
            "and make sure only one host uses it",
        )


def prepare_folder(config: Config) -> Store:
    """Make the store's folders so that the lock can be taken, or say why this place will not do."""
    store = snapshots.Store(config.store)
    refuse_network(config)
    if store.ledger.exists():
        reports.refuse_stranger(store, writing=True)
    if not store.exists and (store.root / snapshots.RESTORING).exists():
        raise ConfigError(
            f"the store {config.store} is being restored, or that was cut short",
            hint="run `streammerge restore` again; it goes on where it was",
        )
    if not store.exists and store.root.is_dir():
        strange = {p.name for p in store.root.iterdir()} - snapshots.BEGUN
        if strange:
            raise ConfigError(
                f"store {config.store} is no store and holds {min(strange)}",
                hint="give the store an empty or new folder",
            )
    try:
        with machine.errors("making the store", config.store):
            store.create()
    except OSError as exc:
        raise ConfigError(
            f"store {config.store} cannot be made: {exc.strerror}", hint="check the path and its owner"
        ) from exc
    return store


def make_store(config: Config, store: Store, engine: Engine) -> None:
    """Read the base once and write down what is fixed for the store's life."""
    knobs = methods.resolve(config.method, config.knobs)
    added = added_globs(config)
    log.info("base.reading", base=str(config.base))
    found, norm = engine.open_base(config.base_path, added)
    with Weights(find(config.base_path)) as base:
        size = base.bytes
        recipe = Recipe(config.base_path, found.base_digest, found.plan, config.method, knobs, config.routes)
        state_size = recipe.state_bytes(base.entries)
        if config.added is not None and (idle := idle_globs(base.entries, added)):
            log.warning("config.added_matches_nothing", globs=idle)
    with machine.errors("making the store", store.root):
        files.replace_file(
            store.settings, files.canonical_json(settings_of(config, recipe, norm, size, state_size))
        )
    reached("made")
    log.info("store.made", store=str(store.root), base_digest=recipe.base_digest[:12], method=recipe.method)


def check_ledger_is_there(store: Store) -> None:
    """A store with snapshots and no ledger has lost its account."""
    if not store.ledger.exists() and snapshots.folders(store.snapshots):
        raise Damaged(
            f"{store.ledger} is missing, the snapshots are there",
            hint="restore the ledger from a backup of the store",
        )


def recover(merge: FoldingMerge) -> None:
    """Finish or remove what was under way when the last process ended."""
    store, ledger = merge.store, merge.ledger
    for name in snapshots.remove_unfinished(store):
        log.info("recovery.removed", folder=name)
    wanted = {f"{row['id']}.part" for row in ledger.fine_tunes("pending")}  # gone on from, if it can be
    for path in store.inbox.glob("*.part"):
        if path.name not in wanted:
            files.remove_tree(path)
    for parent in (store.candidates, store.snapshots):
        for path in snapshots.folders(parent):
            files.protect(path)
    drop_damaged(merge)
    if not snapshots.folders(store.snapshots) and ledger.fact("head") is None:
        start_with_base(merge)
    else:
        standing.settle(merge)
    unfinished.record_candidates(merge)
    ledger.write(  # whoever starts it may have mended what failed
        "update fine_tunes set next_try_at = 0 where state = 'pending' and attempts > 0"
    )
    tidy_inbox(merge)


def drop_damaged(merge: FoldingMerge, *, content: bool = False) -> None:
    """A candidate that is not what was sealed was never official: it goes, and is made again."""
    sound = set()
    for path in snapshots.folders(merge.store.candidates):
        row = merge.ledger.snapshot(snapshots.number(path))
        if row is not None and row["state"] == "refused":  # it stays for inspection, as it is
            continue
        found = list(snapshots.harm_of(path, content=content, beat=merge.engine.beat))
        if found:
            log.warning("recovery.candidate_damaged", folder=path.name, detail=found[0])
            files.remove_tree(path)
        else:
            sound.add(path.name)
    for row in merge.ledger.rows("select * from snapshots where state = 'candidate'"):
        name = snapshots.folder_name(row["version"], row["digest"])
        if name in sound or (merge.store.snapshots / name).is_dir():
            continue
        if row["version"] == 0:  # it is sealed under this number again
            merge.ledger.write("delete from snapshots where version = 0")
        else:
            note = "discarded: it was not what was sealed"
            merge.ledger.update_snapshot(row["version"], state="refused", note=note)


def start_with_base(merge: FoldingMerge) -> None:
    """Go on with version 0: from its sealed candidate where there is one."""
    sealed = snapshots.folders(merge.store.candidates)
    if sealed:
        unfinished.record_candidates(merge)
        acceptance.conclude(merge, snapshots.read(sealed[0]))
    else:
        pipeline.first_version(merge)
