"""Months of arrivals in minutes: does anything grow, slow down, get lost or get in twice?

The real daemon folds thousands of tiny fine-tunes, full ones and adapters, one in twenty broken, out of a
folder and a hub of whose requests one in ten fails; it tells a target that fails one time in ten and a slow
one, and is killed again and again. What it holds is read from /proc and from its own port as it goes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from daemons import Daemon, Site, until
from hubs import BASE

from faults import Findings
from faults.arrivals import HUB, TEAM, Arrivals
from faults.reckoning import Reckoning
from faults.trends import slope, tenths
from streammerge.devhub import DevHub
from streammerge.files import tree_bytes
from streammerge.ledger import Ledger, now

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from faults.arrivals import Key

AHEAD = 12  # published and not yet decided
BEHIND = 50  # versions that a target is still to be told of: nothing is published meanwhile
DRAIN_SECONDS = 600.0
HUB_BEGAN = 90 * 86400.0  # seconds ago, by the hub's clock
HUB_PACE = 2000.0  # of its seconds to one of ours: a day and more of them to our minute
OPEN = "('waiting', 'pending', 'awaiting_approval')"
# Of all requests to the hub one in ten fails: each rule lets the rest through to the next.
HUB_FAULTS = (("429", 0.02, 1.0), ("500", 0.03, 1.0), ("cut", 0.03, 1.0), ("slow", 0.02, 0.5))
FLAKY = """
here=$(dirname "$0")
echo x >> "$here/flaky.calls"
calls=$(($(stat -c %s "$here/flaky.calls") / 2))
[ $((calls % 20)) = 7 ] && exit 75
[ $((calls % 20)) = 17 ] && exit 1
echo "$STREAMMERGE_VERSION $STREAMMERGE_DELIVERY" >> "$here/flaky.told"
"""
SLOW = """
sleep 0.2
echo "$STREAMMERGE_VERSION $STREAMMERGE_DELIVERY" >> "$(dirname "$0")/slow.told"
"""
NOTES = (
    (
        f"The hub's clock runs {HUB_PACE:,.0f} times as fast as ours: else the quarter of an hour before the "
        "last change, which every look reads again, would hold all that was ever published."
    ),
    (
        f"Who publishes waits while a target is still to be told of {BEHIND} versions: the store keeps each "
        "until then, and what a queue takes that grows without end is no leak."
    ),
    (
        "Memory is read from /proc twenty times a second, and the least between two readings is one, so what "
        "a fold takes and gives back counts for nothing. Its slope is the median over all pairs of readings "
        "within one life, with Sen's 95 % interval, so what a restart gives back counts for nothing either; "
        "in the long form it is that of a life of 3,200 after its first 1,000, since Python's table of names "
        "doubles once within these, by 1.9 MB."
    ),
    (
        "Seconds of the clock include the publishing process, the hub and whatever else ran on the machine; "
        "a journey is from the fetch to the switch of `current`; seconds of CPU are the daemon's alone."
    ),
)
TARGETS = {"flaky": FLAKY, "slow": SLOW}


@dataclass(frozen=True)
class Scale:
    """How much is published.

    lives   fine-tunes after which the process is killed, one after the other; the last life ends in order
    warm    fine-tunes of a life before what it holds is compared with other lives'
    settled fine-tunes of a life before its memory is held to the bound
    bound   bytes of memory by which a fine-tune may make the process grow
    every   fine-tunes between two readings
    seconds after which nothing more is published, however few it were
    """

    lives: tuple[int, ...]
    warm: int
    settled: int
    bound: float
    every: int
    seconds: float


# What caches take until they are full is no leak and takes longer than a life of the short form, which can
# show gross ones only. The long form has one long life: Python takes and gives memory by the MiB, so a KiB
# per fine-tune is told from chance only over thousands; and its table of names, which every new path is put
# into, doubles once, by 1.9 MB, after some hundreds of a life.
SCALES = {
    "short": Scale((50, 50, 50), warm=25, settled=25, bound=1 << 16, every=5, seconds=300),
    "full": Scale((*[100] * 4, 3200, 150, 150), 50, settled=1000, bound=1 << 10, every=10, seconds=2700),
}


@dataclass(frozen=True)
class Reading:
    """What the process holds after so many fine-tunes were decided; CPU seconds are of this life.

    rss, anonymous  bytes, the least since the reading before: without what a fold or a look takes meanwhile
    """

    at: float  # time.monotonic
    count: int
    rss: int
    anonymous: int
    descriptors: int
    threads: int
    series: int
    ledger: int
    cpu_seconds: float
    scrape_seconds: float


@dataclass
class Life:
    """One process, from its start to its end."""

    start_seconds: float
    readings: list[Reading] = field(default_factory=list)
    fold_seconds: list[float] = field(default_factory=list)


def measure(work: Path, scale: str) -> Findings:
    """Publish, fold, fail, kill, and count."""
    start = time.time()
    with DevHub(work / "hub", seed=1, clock=lambda: hub_time(start)) as hub:
        site = make_site(work, hub)
        for kind, probability, seconds in HUB_FAULTS:
            hub.fault("", kind, probability=probability, seconds=seconds)  # type: ignore[arg-type]
        arrivals = Arrivals(site, hub, random.Random(7))
        soak = Soak(site, hub, arrivals, SCALES[scale])
        soak.run()
        return soak.findings()


def hub_time(start: float) -> float:
    """Give the time by the clock of a hub that was started at `start`; it stays in our past."""
    return start - HUB_BEGAN + HUB_PACE * (time.time() - start)


def make_site(work: Path, hub: DevHub) -> Site:
    """Configure a merge that folds whatever comes and keeps what taking out an old revision needs."""
    site = Site(work / "site")
    team = {"name": TEAM, "type": "directory", "path": "./fine-tunes", "settle": "0s", "poll": "3s"}
    there = {
        "name": HUB, "type": "hub", "base_models": [BASE], "relations": ["finetune", "adapter"],
        "first_run": "fold", "timeout": "5s", "poll": "3s", "endpoint": hub.url,
    }  # fmt: skip
    site.configure(
        method="average", on_update="replace", archive="keep", keep=3, grace="0s", incomplete_after="8s",
        sources=[team, there],
        targets=[
            {"name": name, "type": "exec", "argv": [site.program(f"{name}.sh", lines)]}
            for name, lines in TARGETS.items()
        ],
    )  # fmt: skip
    return site


class Soak:
    """The daemon's lives, one after the other, and what was read of them."""

    def __init__(self, site: Site, hub: DevHub, arrivals: Arrivals, scale: Scale) -> None:
        """Nothing is started yet."""
        self.site, self.hub, self.arrivals, self.scale = site, hub, arrivals, scale
        self.lives: list[Life] = []
        self.differences: list[str] = []
        self.seconds = 0.0
        self._deadline = time.monotonic() + scale.seconds
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        """The store's ledger, read beside the daemon."""
        assert self._ledger is not None
        return self._ledger

    def run(self) -> None:
        """Live and die as often as the scale says; then drain, and stop in order."""
        started = time.monotonic()
        goal = 0
        for number, length in enumerate(self.scale.lives, 1):
            goal += length
            is_last = number == len(self.scale.lives)
            began = time.monotonic()
            daemon = Daemon(self.site)
            try:
                daemon.until_ready()
                life = Life(time.monotonic() - began)
                self.lives.append(life)
                self._ledger = Ledger(self.site.store / "ledger.db", read_only=True)
                self.live(daemon, life, goal)
                if is_last:
                    self.drain(daemon)
                    daemon.stop()
                else:
                    time.sleep(self.arrivals.chance.random())
            except BaseException as exc:
                exc.add_note(daemon.tail())
                raise
            finally:
                daemon.kill()
                if self._ledger is not None:
                    self._ledger.close()
            self.look_back(daemon, life)
        self.seconds = time.monotonic() - started

    def live(self, daemon: Daemon, life: Life, goal: int) -> None:
        """Publish, never many ahead, until so many are decided; read off what the process holds."""
        next_reading = self.decided()
        least = held(daemon)
        while (decided := self.decided()) < goal and time.monotonic() < self._deadline:
            while self.arrivals.revisions < decided + AHEAD + self.put_off() and self.untold() < BEHIND:
                self.arrivals.publish(self.is_folded)
            least = [*map(min, least, held(daemon))]
            if decided >= next_reading:
                self.read(daemon, life, *least)
                next_reading, least = decided + self.scale.every, held(daemon)
            time.sleep(0.05)
            assert daemon.process.poll() is None, f"it ended with {daemon.process.returncode}"

    def decided(self) -> int:
        """How many fine-tunes are on no way any more."""
        row = self.ledger.row(f"select count(*) as n from fine_tunes where state not in {OPEN}")
        return int(row["n"]) if row else 0

    def put_off(self) -> int:
        """How many failed and are tried again later; nobody waits for them."""
        query = "select count(*) as n from fine_tunes where state = 'pending' and next_try_at > ?"
        row = self.ledger.row(query, now() + 1.0)
        return int(row["n"]) if row else 0

    def untold(self) -> int:
        """How many versions a target is still to be told of."""
        row = self.ledger.row("select count(distinct version) as n from outbox where state = 'pending'")
        return int(row["n"]) if row else 0

    def is_folded(self, key: Key, digest: str) -> bool:
        """Whether a content is in the merge under this name."""
        query = "select 1 from fine_tunes where (source, name, digest, state) = (?, ?, ?, 'folded')"
        return self.ledger.row(query, *key, digest) is not None

    def drain(self, daemon: Daemon) -> None:
        """Wait until all that was published is decided and told; sources and targets go on failing."""
        wanted = set(self.arrivals.digests.values())

        def is_done() -> bool:
            assert daemon.process.poll() is None, f"it ended with {daemon.process.returncode}"
            rows = self.ledger.row("select count(*) as n from fine_tunes")
            open_rows = self.ledger.row(f"select 1 from fine_tunes where state in {OPEN}")
            untold = self.ledger.row("select 1 from outbox where state = 'pending'")
            is_there = rows is not None and rows["n"] >= self.arrivals.revisions
            if not is_there or open_rows or untold:
                return False
            # What changed back to earlier content has no row of its own, and a look at it may be to come.
            return {row["digest"] for row in self.ledger.fine_tunes("folded")} == wanted

        try:
            until(is_done, "everything decided and told", DRAIN_SECONDS)
        except AssertionError as exc:
            if daemon.process.poll() is not None:
                raise
            left = self.ledger.rows(f"select * from fine_tunes where state in {OPEN}")
            self.differences.append(f"{exc}: {left[:5]}")

    def read(self, daemon: Daemon, life: Life, rss: int, anonymous: int) -> None:
        """Take one reading."""
        proc = f"/proc/{daemon.process.pid}"
        started = time.monotonic()
        _, metrics = daemon.get("/metrics")
        scrape_seconds = time.monotonic() - started
        status = status_of(daemon)
        with open(f"{proc}/stat") as file:  # noqa: PTH123 -- no path of a file system
            times = file.read().rpartition(")")[2].split()[11:13]
        ledger = [self.site.store / f"ledger.db{ending}" for ending in ("", "-wal")]
        life.readings.append(
            Reading(
                at=started,
                count=self.decided(),
                rss=rss,
                anonymous=anonymous,
                descriptors=len(os.listdir(f"{proc}/fd")),  # noqa: PTH208
                threads=int(status["Threads"]),
                series=sum(not line.startswith("#") for line in metrics.splitlines()),
                ledger=sum(path.stat().st_size for path in ledger if path.exists()),
                cpu_seconds=sum(map(int, times)) / os.sysconf("SC_CLK_TCK"),
                scrape_seconds=scrape_seconds,
            )
        )

    def look_back(self, daemon: Daemon, life: Life) -> None:
        """Read a dead process's log."""
        life.fold_seconds = [event["seconds"] for event in daemon.events("finetune.served")]
        for event in daemon.events():
            if event["level"] == "critical" or event["event"] == "daemon.bug":
                self.differences.append(f"{daemon.log.name}: {json.dumps(event)[:300]}")

    # What came of it

    def findings(self) -> Findings:
        """Hold what is there against what was published."""
        with closing(Ledger(self.site.store / "ledger.db", read_only=True)) as ledger:
            reckoning = Reckoning(self.arrivals, ledger)
            figures = reckoning.check(TARGETS)
        calls = (self.site.root / "flaky.calls").stat().st_size // 2
        if (published := self.arrivals.published) < (goal := sum(self.scale.lives)):
            self.differences.append(f"only {published} of {goal} could be published in time")
        return Findings(
            "Does anything grow, slow down, get lost or get in twice over thousands of arrivals?",
            [
                *figures,
                ("calls of the flaky target that failed", f"{calls // 20 + (calls + 10) // 20:,}"),
                ("kills", f"{len(self.lives) - 1}"),
                *self.check_growth(),
            ],
            reckoning.differences + self.differences,
            list(NOTES),
        )

    def check_growth(self) -> list[tuple[str, str]]:
        """What the process holds, and what an arrival takes, at the first and at the last."""
        readings = [reading for life in self.lives for reading in life.readings]
        warm, settled = (
            [[r for r in life.readings if r.count >= life.readings[0].count + first] for life in self.lives]
            for first in (self.scale.warm, self.scale.settled)
        )
        anonymous = slope([[(r.count, r.anonymous) for r in life] for life in settled])
        resident = slope([[(r.count, r.rss) for r in life] for life in settled])
        if resident.lowest > self.scale.bound:
            self.differences.append(f"the resident set grows by {resident} bytes per fine-tune")
        levels = [(life[0].count, statistics.median(r.rss for r in life)) for life in warm if life]
        across = slope([levels])
        figures = [
            ("resident set per fine-tune, within a life", f"{resident} bytes"),
            ("anonymous part of it", f"{anonymous} bytes"),
            ("resident set per fine-tune, from life to life", f"{across} bytes"),
            ("resident set, first and last life", mib(levels[0][1], levels[-1][1])),
            ("ledger per fine-tune", f"{slope([[(r.count, r.ledger) for r in readings]])} bytes"),
            ("store at the end", f"{tree_bytes(self.site.store) / 1e6:,.1f} MB"),
        ]
        lived = [life for life in warm if life]
        for name in ("descriptors", "threads", "series"):
            first, last = (
                round(statistics.median(getattr(r, name) for r in life)) for life in (lived[0], lived[-1])
            )
            figures.append((f"{name}, first and last life", f"{first} and {last}"))
            if last > first * 1.05 + 2:
                self.differences.append(f"{name} grew from {first} to {last}")
        return [*figures, *self.times(readings)]

    def times(self, readings: Sequence[Reading]) -> list[tuple[str, str]]:
        """Seconds of the first and of the last tenth."""
        pairs = [
            p for life in self.lives for p in itertools.pairwise(life.readings) if p[1].count > p[0].count
        ]
        clock = [(two.at - one.at) / (two.count - one.count) for one, two in pairs]
        cpu = [(two.cpu_seconds - one.cpu_seconds) / (two.count - one.count) for one, two in pairs]
        folds = [seconds for life in self.lives for seconds in life.fold_seconds]
        facts: list[tuple[str, Sequence[float]]] = [
            ("clock per fine-tune", clock),
            ("journey of one fine-tune", folds),
            ("CPU per fine-tune", cpu),
            ("scrape of /metrics", [reading.scrape_seconds for reading in readings]),
            ("start after a kill", [life.start_seconds for life in self.lives]),
        ]
        shown = [(name, tenths(values)) for name, values in facts]
        return [
            *((f"{name}, first and last tenth", f"{one:.3f} and {two:.3f} s") for name, (one, two) in shown),
            ("all of it", f"{self.seconds:,.0f} s"),
        ]


def status_of(daemon: Daemon) -> dict[str, str]:
    """What the kernel says of the process, in its words."""
    with open(f"/proc/{daemon.process.pid}/status") as file:  # noqa: PTH123 -- no path of a file system
        return dict(line.split(":", 1) for line in file.read().splitlines())


def held(daemon: Daemon) -> list[int]:
    """Give the resident set, and the anonymous part of it, in bytes."""
    status = status_of(daemon)
    return [int(status[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")]


def mib(first: float, last: float) -> str:
    """Write two amounts of memory."""
    return f"{first / (1 << 20):.1f} and {last / (1 << 20):.1f} MiB"
