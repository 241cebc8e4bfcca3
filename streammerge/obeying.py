"""A person's commands when no daemon runs: executed by the command itself, and the targets told.

What folds nothing is done without torch, whose import takes longer than all of it. The caller holds the
store's lock.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from streammerge import aside, collect, methods, operations, snapshots, standing
from streammerge.errors import Unable
from streammerge.merging import Merge, check_archive, check_store, given_knobs, open_ledger
from streammerge.metrics import Metrics

if TYPE_CHECKING:
    from streammerge.config import Config


def obey(config: Config, verb: str) -> None:
    """Execute the commands in the ledger without a daemon. `verb` is that of the one which was asked for now.

    What folds is left to who comes to fold, so that nobody's rollback takes as long as somebody's retract.
    """
    merge = open_merge(config)
    with closing(merge.ledger):
        is_made = bool(merge.ledger.fact("head") or snapshots.names(merge.store.snapshots))
        if is_made and verb in operations.VERBS:
            standing.settle(merge, forgiving=verb == "rollback")
            collect.tidy_inbox(merge)  # of what an earlier command took out
            operations.work_off(merge)
            tell(merge)
            return
    fold(config)


def open_merge(config: Config) -> Merge:
    """Open a store for what folds nothing; a configuration that means another store is refused.

    What else a kill left may wait for whoever folds next (`recovery`): half-made folders lie where nobody
    reads, candidates are not touched here, and of the base not a byte is read.
    """
    store = snapshots.Store(config.store)
    settings = store.read_settings()
    knobs = given_knobs(config, settings)
    if knobs != settings["knobs"]:  # written in another way, perhaps: the method's signature says
        knobs = methods.resolve(config.method, knobs)
    check_store(config, settings, knobs)
    merge = Merge(config, store, open_ledger(store), Metrics(), settings)
    if operations.asked_for(merge, {"gc"}):
        check_archive(config, rereads=rereads_in(merge))
    return merge


def rereads_in(merge: Merge) -> bool:
    """Whether the store's method reads every fine-tune again; a store of an older release does not say."""
    known = merge.settings.get("rereads")
    return methods.rereads(merge.config.method) if known is None else bool(known)


def tell(merge: Merge) -> None:
    """Tell the targets, once; what speaks to them is imported when `current` has moved, and not before.

    Whom it cannot tell, the next command or the daemon tells.
    """
    from streammerge import rollout
    from streammerge.targets import open_target

    try:
        rollout.deliver(merge, [open_target(part, merge.config) for part in merge.config.targets])
    except Unable as exc:  # what was asked is done, and typed again it might be done twice
        aside.note_unable(merge, exc)


def fold(config: Config) -> None:
    """The same with an engine: for a retract, and for anything in a store that has no version yet."""
    from streammerge import recovery, retracting
    from streammerge.engine import Engine

    merge = recovery.open_merge(config, Engine(device="cpu", threads=config.threads), Metrics())
    with closing(merge.ledger):
        operations.work_off(merge)
        retracting.work_off(merge)
        tell(merge)
