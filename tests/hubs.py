"""A hub and a merge beside it, for tests: made-up fine-tunes as repositories, and a `Desk` at which a test
looks, fetches and folds by hand, in this process, with the daemon's own functions.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

import models
import torch
from daemons import newest
from safetensors.torch import save

from streammerge import recovery, reports, screen, snapshots, turns
from streammerge.config import Config
from streammerge.config.sources import HubSource
from streammerge.engine import Engine
from streammerge.errors import TryAgain
from streammerge.metrics import Metrics
from streammerge.sources.hub import HubRepositories

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from streammerge.devhub import DevHub

Facts = dict[str, Any]
Files = dict[str, "bytes | str | Path | None"]
BASE = "org/base"
CARD = f"---\nbase_model: {BASE}\n---\n# A fine-tune\n"
LISTING = "GET /api/models$"
SOURCE: Facts = {
    "name": "hub", "type": "hub", "base_models": [BASE], "relations": ["finetune"], "first_run": "fold",
    "timeout": "1s", "poll": "1s",
}  # fmt: skip


def delta(base: Mapping[str, Tensor], seed: int, size: float = 0.02) -> dict[str, Tensor]:
    """The base with a random delta on every floating-point weight."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: values + (torch.randn(values.shape, generator=random) * size).to(values.dtype)
        if values.is_floating_point()
        else values
        for name, values in base.items()
    }


def files_of(tensors: Mapping[str, Tensor], card: str = CARD) -> Files:
    """What is uploaded of a fine-tune: card, configuration, weights."""
    return {
        "README.md": card,
        "config.json": json.dumps(models.CONFIG),
        "model.safetensors": save(dict(tensors), metadata={"format": "pt"}),
    }


def card(**facts: Any) -> str:
    """A model card of the base's with other facts too."""
    return f"---\n{json.dumps({'base_model': BASE, **facts})}\n---\n"


class Desk:
    """One merge with a hub as its source; nothing happens but what the test does."""

    def __init__(
        self,
        root: Path,
        hub: DevHub,
        *,
        source: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
        base: Mapping[str, Tensor] | None = None,
        **keys: Any,
    ) -> None:
        """Open the store, making it first if need be; `source` changes SOURCE, `keys` the configuration."""
        self.root, self.hub, self._clock = root, hub, clock
        root.mkdir()
        if base is None:
            self.base: Mapping[str, Tensor] = models.make_base(root / "base")
        else:
            models.save(root / "base", base)
            self.base = base
        part = {**SOURCE, "endpoint": hub.url, **(source or {})}
        kept = {"base": root / "base", "store": root / "store", "reserve": "1MB", "threads": 1, "keep": 1}
        self.config = Config.model_validate({**kept, "sources": [part], **keys})
        recovery.prepare_folder(self.config)
        self._open()

    def _open(self) -> None:
        metrics = Metrics(screen.REASONS)
        metrics.introduce(["hub"], [])
        self.merge = recovery.open_merge(self.config, Engine(device="cpu", threads=1), metrics)
        [part] = self.config.sources
        assert isinstance(part, HubSource)
        self.source = HubRepositories(part, (), lambda: None, self._clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.merge.ledger.close()

    def restart(self) -> None:
        """Close it and open it anew, as a restarted daemon finds it."""
        self.merge.ledger.close()
        self._open()

    # What the daemon's threads do

    def look(self) -> list[float]:
        """Look once; gives after how many seconds it wants to look again."""
        soon: list[float] = []
        turns.look_at(self.merge, self.source, lambda _name, seconds: soon.append(seconds))
        return soon

    def try_to_look(self) -> str:
        """Look once; gives the error, "" for none."""
        try:
            self.look()
        except TryAgain as exc:
            return exc.message
        return ""

    def fetch(self) -> bool:
        """Fetch the next one that is due."""
        return turns.fetch_once(self.merge, self.source)

    def fold(self) -> bool:
        """Fold the next one that was fetched."""
        return turns.work_once(self.merge, {"hub": self.source}, fetched_elsewhere={"hub"})

    def work(self) -> None:
        """Fetch and fold until nothing more is due."""
        while self.fetch() or self.fold():
            pass

    def settle(self) -> dict[str, Facts]:
        """Look, fetch and fold; gives the rows."""
        self.look()
        self.work()
        return self.rows()

    def wait_over(self) -> None:
        """Let the time pass that put-back fine-tunes wait."""
        self.merge.ledger.write("update fine_tunes set next_try_at = 0 where state = 'pending'")

    # What comes of it

    def publish(self, repo: str, seed: int, text: str = CARD, **more: bytes | str | None) -> str:
        """Publish a fine-tune of the base; gives the commit."""
        return self.hub.publish(repo, {**files_of(delta(self.base, seed), text), **more})

    def rows(self) -> dict[str, Facts]:
        """The newest row of every name, as `fine-tunes --json` prints it."""
        return newest(reports.fine_tunes(self.merge.ledger))

    def states(self) -> dict[str, str]:
        """State of every fine-tune by name, with the reason where there is one."""
        return {
            name: f"{row['state']} {row['reason']}" if row["reason"] else row["state"]
            for name, row in self.rows().items()
        }

    @property
    def folded(self) -> list[str]:
        """Names in the merge, in folding order."""
        return [member.name for member in self.merge.head.fine_tunes]

    @property
    def served(self) -> Path:
        """The folder being served."""
        path = snapshots.current(self.merge.store)
        assert path is not None
        return path

    def state_of_source(self) -> str:
        """How the source is, as `status` says it."""
        return str(reports.source_status(self.merge.ledger, "hub")["state"])


class Strange:
    """A server that answers every request with the same bytes, whatever they are."""

    def __init__(self, answer: bytes, *, pause: float = 0.0) -> None:
        """`pause` seconds lie between the bytes of the last line."""
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.headers.get("authorization") or "")
                if not pause:
                    self.wfile.write(answer)
                    return
                head, _, body = answer.rpartition(b"\n")
                self.wfile.write(head + b"\n")
                for number in range(len(body)):
                    if outer.closing.wait(pause):
                        return
                    try:
                        self.wfile.write(body[number : number + 1])
                    except OSError:
                        return

            do_HEAD = do_POST = do_GET  # noqa: N815 -- as the base class wants them

            def log_message(self, *_: object) -> None:
                pass

        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
