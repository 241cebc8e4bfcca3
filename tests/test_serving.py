"""The real daemon and serving processes of three kinds: what is current is served, or taken back."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from daemons import Daemon, Site, until
from faults import serving
from places import ASKS
from servers.inbox import Inbox
from servers.sglang import SglangServer
from servers.triton import MODEL, TritonServer
from servers.vllm import VllmServer
from standardwebhooks.webhooks import Webhook

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from servers import ModelServer

SECRET = "whsec_c2VjcmV0IG9mIGEgdGVzdA=="


class Fleet:
    """A site whose targets are a server of each kind, each with a probe, and a receiver of events."""

    def __init__(self, root: Path, processes: ExitStack) -> None:
        """Start the servers with the base."""
        self.site = Site(root / "site")
        base = self.site.root / "base"
        self.servers: dict[str, ModelServer] = {
            "sglang": SglangServer(base),
            "vllm": VllmServer(base),
            "triton": TritonServer(base, self.site.root / "repository"),
        }
        for server in self.servers.values():
            processes.enter_context(server)
        self.inbox = processes.enter_context(Inbox())
        (self.site.root / "secret").write_text(SECRET)
        hook = {"name": "events", "type": "webhook", "url": self.inbox.url, "secret_file": "./secret"}
        self.site.configure(targets=[*map(self.target, self.servers), hook])

    def target(self, kind: str) -> dict[str, Any]:
        """Configure the target of a server."""
        url = self.servers[kind].url
        more = {"model": MODEL, "repository": "./repository"} if kind == "triton" else {}
        probe = {**ASKS[kind], "url": url + ASKS[kind]["url"]}
        return {"name": kind, "type": kind, "url": url, "probe": probe, "check": "500ms", **more}

    def until_served(self, daemon: Daemon, name: str) -> None:
        """Wait until every server has the bytes of a version that ends so, and is said to serve it."""

        def is_served() -> bool:
            label = (self.site.store / "current").resolve().name
            states = {target["state"] for target in daemon.ask("status")["targets"]}
            return (
                self.site.served[-1:] == [name]
                and {server.serves for server in self.servers.values()} == {label}
                and states == {"confirmed"}
            )

        until(is_served, f"{name} is served")

    @property
    def events(self) -> list[tuple[int, str]]:
        """Version and cause of every event that was received, each of which must be signed."""
        found = [Webhook(SECRET).verify(sent.body, sent.headers)["data"] for sent in self.inbox.got]
        return [(event["version"], event["cause"]) for event in found]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Servers that run."""
    with ExitStack() as processes:
        yield Fleet(tmp_path, processes)


def test_every_server_ends_on_what_is_current_and_right(fleet: Fleet) -> None:
    """A version is served by all; one that restarts is put right; a version that one of them cannot serve is
    taken back on all, its fine-tune set aside, and the next one goes on from there.
    """
    site = fleet.site
    with site.daemon() as daemon:
        site.publish("good", 1)
        fleet.until_served(daemon, "good")
        fleet.servers["sglang"].restart()
        fleet.until_served(daemon, "good")
        fleet.servers["vllm"].faults["000002-"] = "stale"  # says that it took it, and did not
        site.publish("bad", 2)
        daemon.until_state(bad="quarantined")
        fleet.until_served(daemon, "good")
        site.publish("better", 3)
        fleet.until_served(daemon, "better")
        assert site.served == ["good", "better"]
        assert daemon.rows()["bad"]["reason"] == "answered-wrong"
        until(lambda: len(fleet.events) == 5, "all events")
    assert fleet.events == [(0, "first"), (1, "fold"), (2, "fold"), (1, "answered-wrong"), (3, "fold")]
    assert json.loads(fleet.inbox.got[0].body)["source"] == site.store.as_uri()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_fault_of_a_server_ends_well(tmp_path: Path) -> None:
    """Each fault at one server or another: all end on one verified version, and nothing false is claimed."""
    assert serving.measure(tmp_path, "short").differences == []
