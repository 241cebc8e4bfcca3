"""Work without a daemon: `run --once`, and a person's command when no daemon runs.

The store's lock is held throughout.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import structlog

from streammerge import (
    aside,
    files,
    gates,
    machine,
    operations,
    reconcile,
    recovery,
    rollout,
    screen,
    takeback,
    turns,
)
from streammerge.engine import Engine
from streammerge.errors import Stopped, TryAgain, Unable
from streammerge.ledger import now
from streammerge.metrics import Metrics
from streammerge.sources import open_source
from streammerge.targets import open_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streammerge.config import Config
    from streammerge.merging import Merge
    from streammerge.sources import Source
    from streammerge.targets import Target

EVERY_VERB = (*operations.VERBS, *operations.HEAVY)
ROUNDS = 5  # how often a remote source is asked again for what it did not tell

log = structlog.get_logger()


def raise_if_set(stopping: threading.Event) -> None:
    """Raise Stopped once a stop was asked for; long work calls this between its parts."""
    if stopping.is_set():
        raise Stopped("a stop was asked for", hint="the work is done again at the next start")


def run_once(config: Config) -> None:
    """Look at every source, wait out settling, fold what is ready, tell the targets, and end. Opens no port.

    Raises TryAgain where something was left for later: a source that failed, a full disk, a target not
    confirmed.
    """
    gates.require(config.gates)
    store = recovery.prepare_folder(config)
    with machine.errors("working", store.root), files.locked(store.lock):
        asked_to_stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
        beat = partial(raise_if_set, asked_to_stop)
        engine = recovery.engine_of(config, beat)
        metrics = Metrics(screen.REASONS)
        lists = (config.sources, config.targets, config.gates)
        metrics.introduce(*([part.name for part in parts] for parts in lists))
        merge = recovery.open_merge(config, engine, metrics)
        try:
            turns.check_served(merge)
            operations.work_off(merge, EVERY_VERB)
            sources = {part.name: open_source(part, config, beat) for part in config.sources}
            reconcile.drop_sources(merge, sources)
            failures = look_until_settled(merge, sources, beat)
            fold_and_tell(merge, sources, [open_target(part, config, beat) for part in config.targets], beat)
            left = merge.ledger.fine_tunes("pending") if not merge.held else []
            failures += [f"{row['name']}: {row['detail']}" for row in left]
            failures += [
                f"target {row['target']}: {row['error']}"
                for row in merge.ledger.rows("select * from outbox where state = 'pending'")
            ]
        finally:
            merge.ledger.close()
    if failures:
        raise TryAgain("; ".join(failures), hint="run it again later")


def obey_once(config: Config, *, forgiving: bool = False) -> None:
    """Execute the commands in the ledger without a daemon, and tell the targets once.

    Whom it cannot tell, the next command or the daemon tells. The caller holds the lock.
    """
    metrics = Metrics(screen.REASONS)
    metrics.introduce([part.name for part in config.sources], [part.name for part in config.targets])
    engine = Engine(device="cpu", threads=config.threads)
    merge = recovery.open_merge(config, engine, metrics, forgiving=forgiving)
    try:
        operations.work_off(merge, EVERY_VERB)
        try:
            rollout.deliver(merge, [open_target(part, config) for part in config.targets])
        except Unable as exc:  # what was asked is done, and typed again it might be done twice
            aside.note_unable(merge, exc)
    finally:
        merge.ledger.close()


def fold_and_tell(
    merge: Merge, sources: dict[str, Source], targets: Sequence[Target], beat: Callable[[], None]
) -> None:
    """Fold what is ready and tell the targets; and again what a version that was taken back left over."""
    before = None
    while True:
        while turns.work_once(merge, sources) and not merge.unable:
            beat()
        if merge.unable:  # the next one would be folded before the one that failed
            raise merge.unable
        rollout.deliver(merge, targets, beat)
        for _ in range(takeback.WRONG_ANSWERS):  # a wrong answer is asked for again soon
            if until := takeback.undecided_until(merge):
                wait_until(time.monotonic() + until - now(), beat)
                rollout.deliver(merge, targets, beat)
        last = merge.ledger.last_promotion()
        if last == before:
            return
        before = last


def wait_until(deadline: float, beat: Callable[[], None]) -> None:
    """Wait until a moment of the monotonic clock, or a stop."""
    while time.monotonic() < deadline:
        beat()
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))


def look_until_settled(merge: Merge, sources: dict[str, Source], beat: Callable[[], None]) -> list[str]:
    """Look at every source until none says that it will know more soon; gives what failed."""
    failures = []
    for name, source in sources.items():
        again, rounds = [0.0], 0
        while again and rounds < (ROUNDS if source.is_remote else math.inf):
            again.clear()
            rounds += 1
            try:
                turns.look_at(merge, source, lambda _name, seconds, again=again: again.append(seconds))  # type: ignore[misc]
            except Stopped:
                raise
            except TryAgain as exc:
                failures.append(exc.message)
            wait_until(time.monotonic() + max(again, default=0.0), beat)
        if again:
            failures.append(f"source {name}: not all of it could be read")
        log.info("source.looked_at", source=name)
    return failures
