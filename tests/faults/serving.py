"""Is a version ever said to be served that is not? Three serving processes of three kinds, each with every
fault in turn, told by the real daemon: unreachable, hanging, refusing, lying, restarting, gone.

What they say they serve and what they really read are two things here. A watcher lays the daemon's word
beside the bytes that each server has, all the time.
"""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from daemons import Daemon, Site, until
from places import ASKS
from servers.sglang import SglangServer
from servers.triton import MODEL, TritonServer
from servers.vllm import VllmServer

from faults import Findings
from streammerge.snapshots import version_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from servers import Fault, ModelServer

KINDS = ("sglang", "vllm", "triton")
AWAY: tuple[Fault, ...] = ("500", "nonsense", "endless", "dripping", "hangs")
WRONG: tuple[Fault, ...] = ("refuses", "other", "stale")
PASSING: tuple[Fault, ...] = ("restarts", "slow")
ALONE = ("down", "half down", "drifts")
SETTLES_SECONDS = 60.0
CHECK_SECONDS = 1.0
NOTICED_SECONDS = 10.0  # a server that restarted by itself is found out within `check`, on a busy machine
TIMEOUT = "1500ms"


def measure(work: Path, scale: str) -> Findings:
    """Put every fault to one server, or to each of the three, and see where all of them end."""
    found = Findings("Does every target end on one verified version, and is `served` ever claimed wrongly?")
    faults = [*AWAY, *WRONG, *PASSING, *ALONE]
    with Fleet(work / "fleet") as fleet:
        if scale == "full":
            turns = [(fault, which) for which in range(len(KINDS)) for fault in mixed(faults)]
        else:
            turns = [(fault, number % len(KINDS)) for number, fault in enumerate(mixed(faults))]
        for fault, which in turns:
            fleet.suffer(fault, which)
        found.differences += fleet.differences
        found.figures = [
            ("faults x servers", f"{fleet.suffered}"),
            ("versions promoted", f"{fleet.site.current['version']}"),
            ("versions taken back", f"{fleet.taken_back}"),
            ("ended otherwise than promised", f"{len(fleet.differences)}"),
            ("looks of the watcher at daemon and servers", f"{fleet.looks:,}"),
            ("times that a target was said to serve what it did not", f"{len(fleet.lies)}"),
            ("until all ended well, median", f"{statistics.median(fleet.seconds):.1f} s"),
        ]
        found.differences += fleet.lies
    found.notes = [
        (
            "The servers are the tests' own: they speak what SGLang, vLLM and Triton publish of their "
            "protocols, and really read the weights. None of the three itself was run."
        ),
        (
            "A server that restarts by itself is not found out before it is asked, which is every "
            f"{CHECK_SECONDS:g} s here; a claim counts as false when it is kept for {NOTICED_SECONDS:g} s."
        ),
    ]
    return found


def mixed(faults: Sequence[str]) -> Iterator[str]:
    """Give the faults so that no two for which a version is taken back follow one another: three hold."""
    wrong = [fault for fault in faults if fault in WRONG]
    for fault in faults:
        if fault not in WRONG:
            yield fault
            yield from wrong[:1]
            del wrong[:1]


@dataclass
class Fleet:
    """A daemon with three targets, their servers, and who watches them."""

    root: Path
    differences: list[str] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    suffered: int = 0
    taken_back: int = 0
    looks: int = 0

    def __enter__(self) -> Self:
        """Start servers with the base as their launch weights, the daemon, and the watcher."""
        self.site = Site(self.root)
        base = self.site.root / "base"
        triton = TritonServer(base, self.root / "repository")
        self.servers: dict[str, ModelServer] = {
            "sglang": SglangServer(base), "vllm": VllmServer(base), "triton": triton,
        }  # fmt: skip
        drift = {"name": "drift", "type": "drift", "limits": {"finite": {"min": 1}, "change": {"max": 2}}}
        self.site.configure(gates=[drift], targets=[self.section(kind) for kind in KINDS])
        self.stack = ExitStack()
        for server in self.servers.values():
            self.stack.enter_context(server)
        self.daemon: Daemon = self.stack.enter_context(self.site.daemon())
        self.over = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        until(lambda: self.is_settled(0), "version 0 is served")
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watcher.join()
        self.stack.close()

    def section(self, kind: str) -> dict[str, Any]:
        """Configure one target, which is asked for a text after each telling."""
        server = self.servers[kind]
        ask = {**ASKS[kind], "url": server.url + ASKS[kind]["url"], "timeout": TIMEOUT}
        more = {"model": MODEL, "repository": str(self.root / "repository")} if kind == "triton" else {}
        return {
            "name": kind, "type": kind, "url": server.url, "timeout": TIMEOUT, "probe": ask,
            "check": f"{CHECK_SECONDS:g}s", **more,
        }  # fmt: skip

    # What happens

    def suffer(self, fault: str, which: int) -> None:
        """Publish one fine-tune while a server has a fault; everything must end as promised."""
        self.suffered += 1
        name, kind = f"ft{self.suffered:03d}", KINDS[which]
        said = f"{fault} at {kind}"
        before = self.current()
        began = time.monotonic()
        try:
            if fault in WRONG:
                self.have_taken_back(fault, kind, name, before)
            elif fault == "drifts":
                self.servers[kind].restart()
                if kind != "triton":  # which takes up the newest version of its repository
                    until(lambda: self.was_adrift(kind), "the drift is noticed", SETTLES_SECONDS)
                until(lambda: self.is_settled(before), f"{kind} is brought back", SETTLES_SECONDS)
            else:
                self.have_served(fault, which, name, before)
        except AssertionError as exc:
            self.differences.append(f"{said}: {exc}; {self.account()}")
            for server in self.servers.values():
                server.fault = None
        self.seconds.append(time.monotonic() - began)

    def have_served(self, fault: str, which: int, name: str, before: int) -> None:
        """With a fault that says nothing about the version: the others take it, this one when it can."""
        faulty = [KINDS[which]]
        if fault in ("down", "half down"):
            faulty += [KINDS[(which + 1) % len(KINDS)]] if fault == "half down" else []
            for kind in faulty:
                self.servers[kind].stop()
        else:
            self.servers[faulty[0]].fault = fault  # type: ignore[assignment] # one of Fault, as PASSING and AWAY are
        self.site.publish(name, 1000 + self.suffered)
        until(lambda: self.current() > before, f"{name} is promoted", SETTLES_SECONDS)
        version = self.current()
        if fault not in PASSING:
            rest = [kind for kind in KINDS if kind not in faulty]
            until(lambda: self.serve(rest) == {version}, f"{rest} serve {version}", SETTLES_SECONDS)
            until(lambda: self.is_open(faulty), f"{faulty} are open items", SETTLES_SECONDS)
            assert self.daemon.states()[name] == "folded", "the fine-tune was set aside"
            for kind in faulty:
                self.servers[kind].fault = None
                if fault in ("down", "half down"):
                    self.servers[kind].start()
        until(lambda: self.is_settled(version), f"all serve {version}", SETTLES_SECONDS)
        self.servers[faulty[0]].fault = None

    def have_taken_back(self, fault: str, kind: str, name: str, before: int) -> None:
        """With a fault that is the version's: all serve the one before again; its fine-tune is set aside."""
        newest = max(row["version"] for row in self.daemon.ask("history"))
        self.servers[kind].faults = {f"{newest + 1:06d}-": fault}  # type: ignore[dict-item] # one of WRONG
        self.site.publish(name, 1000 + self.suffered)
        until(
            lambda: self.daemon.states().get(name) == "quarantined", f"{name} is set aside", SETTLES_SECONDS
        )
        until(lambda: self.is_settled(before), f"all serve {before} again", SETTLES_SECONDS)
        assert self.daemon.rows()[name]["reason"] == "answered-wrong"
        assert not self.daemon.ask("status")["held"], "the queue is held"
        self.taken_back += 1
        self.servers[kind].faults = {}

    # What is so

    def current(self) -> int:
        """The number of what is current."""
        return int(self.site.current["version"])

    def serve(self, kinds: Sequence[str]) -> set[int | None]:
        """What these servers serve in truth; version 0 is the base, with which they were launched."""
        labels = [self.servers[kind].serves for kind in kinds]
        return {version_of(label) for label in labels}

    def targets(self) -> dict[str, dict[str, Any]]:
        """What the daemon says of its targets."""
        return {target["name"]: target for target in self.daemon.ask("status")["targets"]}

    def is_settled(self, version: int) -> bool:
        """Whether all serve a version, are known to, and nothing is left to be told."""
        said = self.targets().values()
        return (
            self.serve(KINDS) == {version}
            and all((t["state"], t["snapshot"], t["open"]) == ("confirmed", version, 0) for t in said)
            and self.current() == version
        )

    def is_open(self, kinds: Sequence[str]) -> bool:
        """Whether it can be seen that these were not reached."""
        said = self.targets()
        return all(said[kind]["state"] == "failing" and said[kind]["open"] == 1 for kind in kinds)

    def was_adrift(self, kind: str) -> bool:
        """Whether it was noticed that a server serves something else."""
        return any(found["target"] == kind for found in self.daemon.events("target.adrift"))

    def account(self) -> str:
        """Say how things are, for a sentence about what is not as it should be."""
        truth = {kind: server.serves for kind, server in self.servers.items()}
        said = {name: (t["state"], t["snapshot"], t["error"]) for name, t in self.targets().items()}
        return f"current {self.current()}, said {said}, in truth {truth}"

    def watch(self) -> None:
        """See all the time whether a target is said to serve what it does not."""
        since: dict[str, float] = {}
        while not self.over.wait(0.05):
            truth = {kind: server.serves for kind, server in self.servers.items()}
            try:
                said = self.targets()
            except (AssertionError, OSError):
                continue
            self.looks += 1
            for kind, target in said.items():
                claims = target["state"] == "confirmed"
                holds = version_of(self.servers[kind].serves) == target["snapshot"]
                if not claims or holds or truth[kind] != self.servers[kind].serves:
                    since.pop(kind, None)
                elif time.monotonic() - since.setdefault(kind, time.monotonic()) > NOTICED_SECONDS:
                    self.lies.append(f"{kind} is said to serve {target['snapshot']} and has {truth[kind]}")
                    since.pop(kind)
