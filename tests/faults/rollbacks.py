"""How soon `current` is back, and for how long it stays: figures about rolling back.

With a daemon from the moment the request stands in the ledger to the moment the link has moved, as the ledger
has both. Without one from the moment the command is typed: Python starts first then.
"""

from __future__ import annotations

import resource
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from daemons import Site, until

from streammerge.ledger import Ledger, now

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon

    from faults import Findings

BOUND_SECONDS = 1.0
SIDE = 1024  # a matrix of 4 MiB
MATRICES = {"short": 4, "full": 50}
TYPED = 3  # times, there and back
POLLS, RESTARTS = 10, 3
FOLD_SECONDS = 300.0


def add_to(findings: Findings, work: Path, scale: str) -> None:
    """Measure, and add figures and what was not as promised."""
    megabytes = MATRICES[scale] * SIDE * SIDE * 4 / 1e6
    site = grown(work / "large", MATRICES[scale])
    waited, folding = under_a_fold(site)
    to_switch, to_prompt, computing = cold(site)
    findings.figures += [
        (f"rollback of {megabytes:,.0f} MB, by a daemon that folds", f"{waited:.3f} s to the switch"),
        (
            f"rollback of {megabytes:,.0f} MB, typed where no daemon runs",
            f"{to_switch:.2f} s to the switch, {to_prompt:.2f} s to the prompt; {computing:.2f} s computing",
        ),
    ]
    for seconds, how in ((waited, "by a daemon took"), (computing, "without a daemon computed for")):
        if seconds >= BOUND_SECONDS:
            findings.differences.append(f"rollback {how} {seconds:.3f} s, not under {BOUND_SECONDS:g} s")
    if not folding:
        findings.differences.append("nothing was being folded while the rollback was measured")
    if scale == "full":
        looks = in_force(Site(work / "stays"))
        findings.figures.append(
            ("rollback in force", f"after {looks} looks at its source, {RESTARTS} restarts")
        )


def grown(root: Path, matrices: int) -> Site:
    """A store with two versions, and a third fine-tune to come."""
    random = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{n}.proj.weight": torch.randn(SIDE, SIDE, generator=random) / 32
        for n in range(matrices)
    }
    site = Site(root, base)
    for number, name in enumerate("abc", 1):
        site.prepare(name, number, size=0.002, rank=8)
    for name in "ab":
        site.move_in(name)
        site.run("run", "--once", timeout=FOLD_SECONDS)
    assert site.served == ["a", "b"]
    return site


def under_a_fold(site: Site) -> tuple[float, bool]:
    """Roll back while a daemon folds; gives the seconds, and whether it was folding before and after."""
    with site.daemon() as daemon:
        site.move_in("c")
        until(lambda: daemon.metric("streammerge_fold_in_progress") == 1, "folding", FOLD_SECONDS)
        site.run("rollback", "--yes")
        folding = site.states()["c"] == "pending"
        assert site.served == ["a"]
    return seconds_to_the_switch(site), folding


def cold(site: Site) -> tuple[float, float, float]:
    """Roll forward and back at a shell; gives the seconds from typing to the switch, to the prompt, and of
    computing, which do not depend on what else the machine does. The fewest of several.
    """
    taken = []
    for version in ("2", "1") * TYPED:
        typed, before = now(), computed()
        site.run("rollback", version, "--yes")
        prompt = now()
        _, switched = last_times(site)
        taken.append((switched - typed, prompt - typed, computed() - before))
    assert site.served == ["a"]
    to_switch, to_prompt, computing = map(min, zip(*taken, strict=True))
    return to_switch, to_prompt, computing


def computed() -> float:
    """Seconds that processes which were waited for have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_to_the_switch(site: Site) -> float:
    """From the last request to the last switch."""
    asked, switched = last_times(site)
    return switched - asked


def last_times(site: Site) -> tuple[float, float]:
    """When the last rollback was asked for, and when `current` moved."""
    with closing(Ledger(site.store / "ledger.db", read_only=True)) as ledger:
        asked = ledger.row("select asked_at, verb from commands order by id desc limit 1")
        switched = ledger.last_promotion()
    assert asked is not None
    assert switched is not None
    assert (asked["verb"], switched["cause"]) == ("rollback", "rollback")
    return float(asked["asked_at"]), float(switched["switched_at"])


def in_force(site: Site) -> int:
    """Roll back and look at the source again and again, through restarts; gives the looks.

    What was taken out stays out when the hold is lifted, too.
    """
    for number, name in enumerate("abc", 1):
        site.publish(name, number)
    site.once()
    looks = 0
    with site.daemon() as daemon:
        site.run("rollback", "--yes")
        looks += looked(daemon, POLLS)
        check(site)
    for _ in range(RESTARTS):
        with site.daemon() as daemon:
            looks += looked(daemon, 2)
            check(site)
    site.run("resume")
    with site.daemon() as daemon:
        looks += looked(daemon, 2)
        assert site.served == ["a", "b"]
    return looks


def looked(daemon: Daemon, times: int) -> int:
    """Let the daemon look at its source so many times more."""
    daemon.look_again(times)
    return times


def check(site: Site) -> None:
    """The rollback is in force."""
    status = site.ask("status")
    assert (status["current"]["version"], status["head"]["version"]) == (2, 2)
    assert status["held"]
    assert site.served == ["a", "b"]
    assert site.states() == {"a": "folded", "b": "folded", "c": "denied"}
