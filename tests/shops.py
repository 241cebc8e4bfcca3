"""A store in this process, for tests that need many turns: worked off by `run --once`, told by commands."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import models

from streammerge import files, methods, obeying, once, snapshots
from streammerge.config import Config
from streammerge.config.sources import DirectorySource
from streammerge.errors import StreammergeError
from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

NAMES = ("ant", "bee", "cat", "dog")


def knobs_of(method: str) -> dict[str, Any]:
    """Knobs without which fine-tunes without sidecars are refused."""
    return {"missing": "uniform"} if methods.sidecar(method) else {}


class Shop:
    """A store in this process, worked off by `run --once`."""

    def __init__(self, root: Path, method: str, **keys: Any) -> None:
        """Publish nothing yet."""
        self.root = root
        root.mkdir()
        self.base = models.make_base(root / "base")
        (root / "fine-tunes").mkdir()
        source = {"name": "team", "type": "directory", "path": root / "fine-tunes", "settle": 0}
        given = {"archive": "keep", "keep": 2, "grace": 0, **keys}
        told = {"base": root / "base", "store": root / "store", "device": "cpu", "threads": 1, **given}
        self.config = Config.model_validate(
            {**told, "method": method, "knobs": knobs_of(method), "sources": [source]}
        )

    def publish(self, names: Sequence[str]) -> None:
        """Fold these, one after another."""
        for name in names:
            models.make_fine_tune(self.root / "fine-tunes" / name, self.base, seed=10 + NAMES.index(name[:3]))
            once.run_once(self.config)

    def do(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Execute one command as the command line would without a daemon."""
        return obey(self.config, verb, arguments)

    def work(self) -> None:
        """Work off what is there."""
        once.run_once(self.config)

    def at(self, store: Path) -> Shop:
        """The same, with a store elsewhere."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"store": store})
        return other

    def moved(self, root: Path, **keys: Any) -> Shop:
        """The same at another place, where it was copied to, with other keys."""
        other = copy.copy(self)
        other.root = root
        [source] = self.config.sources
        assert isinstance(source, DirectorySource)
        at = {"base": root / "base", "store": root / "store"}
        sources = (source.model_copy(update={"path": root / "fine-tunes"}),)
        other.config = self.config.model_copy(update={**at, "sources": sources, **keys})
        return other

    def configure(self, **keys: Any) -> None:
        """Change keys of the configuration."""
        self.config = self.config.model_copy(update=keys)

    def soon(self) -> None:
        """Work off what is there, and what was put back for later."""
        ledger = Ledger(self.config.store / "ledger.db")
        ledger.write("update fine_tunes set next_try_at = 0 where state = 'pending'")
        ledger.close()
        self.work()

    @property
    def model(self) -> dict[str, Tensor]:
        """What is served."""
        return models.load(self.config.store / "current" / "model" / "model.safetensors")

    @property
    def manifest(self) -> dict[str, Any]:
        """How it came about."""
        return dict(json.loads((self.config.store / "current" / "manifest.json").read_bytes()))


def obey(config: Config, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave a command in the ledger, have it executed, give its answer."""
    store = snapshots.Store(config.store)
    ledger = Ledger(store.ledger)
    number = ledger.ask(verb, arguments)
    with files.locked(store.lock):
        obeying.obey(config, verb)
    row = ledger.row("select * from commands where id = ?", number)
    ledger.close()
    assert row is not None
    result = json.loads(row["result"])
    if row["state"] == "failed":
        error = StreammergeError(result["error"], hint=result["hint"])
        error.exit_code = result["exit"]
        raise error
    return dict(result)
