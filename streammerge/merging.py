"""One merge that is open for work: its configuration, store and ledger, and who may change them when.

Holds resources and answers "what is head, what is current"; decides nothing, and imports no torch: what a
person asks for at a shell is to be done before torch would be there. What folding needs besides is in
`recipes`. The store's flock is held by whoever made this object; `turn` serialises the few moments at which
head or current move inside this process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge import files, snapshots
from streammerge.errors import ConfigError, Damaged
from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.errors import Unable
    from streammerge.metrics import Metrics
    from streammerge.snapshots import Snapshot, Store


@dataclass
class Merge:
    """What every step works with; `settings` is what store.json says."""

    config: Config
    store: Store
    ledger: Ledger
    metrics: Metrics
    settings: Mapping[str, Any]
    turn: threading.RLock = field(default_factory=threading.RLock)
    unable: Unable | None = None  # what the machine withheld from the last work, until work succeeds
    folding_from: tuple[Path, ...] = ()
    needed: set[str] = field(default_factory=set)  # folders of the inbox that are being read

    @property
    def head(self) -> Snapshot:
        """The snapshot from which the next fold starts."""
        return self._named("head")

    @property
    def held(self) -> str:
        """Why folding and promotion are stopped, "" if they are not."""
        hold = self.ledger.fact("hold")
        return str(hold["why"]) if hold else ""

    def _named(self, fact: str) -> Snapshot:
        name = self.ledger.fact(fact)
        if name is None:
            raise Damaged(
                f"{self.store.ledger} names no {fact}", hint="restore the ledger from a backup of the store"
            )
        return snapshots.read(self.store.snapshots / name)


def open_ledger(store: Store) -> Ledger:
    """Open the ledger for work; what an earlier process wrote and did not fsync is made durable first."""
    ledger = Ledger(store.ledger)
    ledger.make_durable()
    files.fsync_folder(store.root)  # the log's name too: where that fails SQLite goes on
    return ledger


def check_store(config: Config, settings: Mapping[str, Any], knobs: Mapping[str, Any]) -> None:
    """Raise ConfigError where the configuration, whose knobs come to `knobs`, means another store."""
    for key, ours, theirs in (
        ("method", settings["method"], config.method),
        ("knobs", settings["knobs"], knobs),
        ("added", settings["added"], settings["added"] if config.added is None else list(config.added)),
        ("routes", settings["routes"], [route.model_dump() for route in config.routes]),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{key} is {theirs!r}, but the store {config.store} was made with {ours!r}",
                hint=f"put {key} back, or `streammerge rebuild` makes a new store with the new {key} "
                "from the same fine-tunes",
            )


def check_archive(config: Config, *, rereads: bool) -> None:
    """Raise ConfigError where files would go that a method needs, which reads every fine-tune again."""
    if rereads and config.archive != "keep":
        raise ConfigError(
            f"method {config.method} reads every fine-tune again each time, and archive is {config.archive}",
            hint="set archive: keep, which keeps all their files in the store",
        )


def given_knobs(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where the configuration leaves a knob open, the store's value stays, whatever the default is now."""
    kept = settings["knobs"] if config.method == settings["method"] else {}
    return {**kept, **config.knobs}
