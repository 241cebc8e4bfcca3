"""SIGKILL after each numbered step: after a restart, bytes and ledger are those of an undisturbed run."""

from __future__ import annotations

import hashlib
import random
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from daemons import STREAMMERGE, Daemon, Site, command, environment, until, without_times

from streammerge.steps import STEPS

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("a", "b", "c")
KILLED = -9
RANDOM_KILLS = 5
MANY_RANDOM_KILLS = 50
LIFE_SECONDS = 3.0


@dataclass(frozen=True)
class Ended:
    """What a run leaves behind that must not depend on how often it was killed.

    bytes       path below snapshots/ -> sha256
    served      where `current` leads
    history     every version's row, times aside
    fine_tunes  every fine-tune's row, times and attempts aside
    leftovers   what lies in inbox/ and candidates/
    confirmed   the version that the target confirmed last
    """

    bytes: dict[str, str]
    served: str
    history: list[dict[str, Any]]
    fine_tunes: list[dict[str, Any]]
    leftovers: list[str]
    confirmed: int


def ended(site: Site) -> Ended:
    """Read a site's end state."""
    snapshots = site.store / "snapshots"
    return Ended(
        bytes={
            str(path.relative_to(snapshots)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(snapshots.rglob("*"))
            if path.is_file()
        },
        served=str((site.store / "current").readlink()),
        history=without_times(site.ask("history")),
        fine_tunes=without_times(site.ask("fine-tunes")),
        leftovers=[path.name for part in ("inbox", "candidates") for path in (site.store / part).iterdir()],
        confirmed=site.ask("status")["targets"][0]["snapshot"],
    )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Three good fine-tunes, one with NaN and a target; nothing was run yet."""
    site = Site(tmp_path_factory.mktemp("fresh") / "site")
    site.configure(targets=[{"name": "hook", "type": "exec", "argv": [site.program("hook", "exit 0")]}])
    for number, name in enumerate(NAMES, 1):
        site.publish(name, number)
    site.publish("z-broken", 9, size=float("nan"))
    return site


@pytest.fixture(scope="module")
def finished(fresh: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A copy after one run that nobody killed."""
    site = fresh.copy(tmp_path_factory.mktemp("finished") / "site")
    site.once()
    assert site.served == list(NAMES)
    assert site.states() == {**dict.fromkeys(NAMES, "folded"), "z-broken": "refused"}
    return site


@pytest.fixture(scope="module")
def undisturbed(finished: Site) -> Ended:
    """What such a run leaves behind."""
    return ended(finished)


@pytest.fixture
def site(fresh: Site, tmp_path: Path) -> Site:
    """A copy, for one test."""
    return fresh.copy(tmp_path / "site")


def verify(site: Site) -> None:
    """What a kill left unfinished is no damage; before the first version there is nothing to verify."""
    if (site.store / "current").is_symlink():
        site.run("verify", code=0)


def live_until_killed(site: Site, step: str) -> None:
    """Run the daemon until it kills itself at a step."""
    daemon = Daemon(site, env={"STREAMMERGE_KILL_AT": step})
    try:
        assert daemon.until_ended() == KILLED, daemon.tail()
    finally:
        daemon.kill()


def live_to_the_end(site: Site) -> None:
    """Run the daemon until everything is decided and told."""
    with site.daemon() as daemon:
        until(lambda: daemon.states().get("z-broken") == "refused", "the last is decided")
        daemon.until_state(dict.fromkeys(NAMES, "folded"))
        until(lambda: daemon.ask("status")["targets"][0]["snapshot"] == len(NAMES), "the target is told")


def test_killed_at_every_step_in_turn(site: Site, undisturbed: Ended) -> None:
    """`run --once`, started again and killed one step further each time, ends where one run ends."""
    for step in STEPS:
        site.once(code=KILLED, STREAMMERGE_KILL_AT=step)
        verify(site)
    site.once()
    assert ended(site) == undisturbed


@pytest.mark.slow
def test_the_daemon_killed_at_every_step_in_turn(site: Site, undisturbed: Ended) -> None:
    """The daemon, started again and killed one step further each time, ends where one run ends."""
    for step in STEPS:
        live_until_killed(site, step)
    live_to_the_end(site)
    assert ended(site) == undisturbed
    verify(site)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_one_step(site: Site, undisturbed: Ended, step: str, nth: int) -> None:
    """Killed at the first, second or third passing of a step, `run --once` ends where one run ends."""
    site.once(code=None, STREAMMERGE_KILL_AT=f"{step}:{nth}")
    verify(site)
    site.once()
    assert ended(site) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_the_daemon_killed_at_one_step(site: Site, undisturbed: Ended, step: str) -> None:
    """Killed once at one step, the daemon ends where an undisturbed run ends."""
    live_until_killed(site, f"{step}:2" if step not in ("announced", "copied") else step)
    verify(site)
    live_to_the_end(site)
    assert ended(site) == undisturbed


def killed_at_random(site: Site, kills: int, seed: int) -> None:
    """Run the daemon and kill it at random moments of its life, most of them while it works."""
    moments = random.Random(seed)
    for _ in range(kills):
        daemon = Daemon(site)
        time.sleep(moments.uniform(0.5 * LIFE_SECONDS, LIFE_SECONDS))
        daemon.kill()
        verify(site)
    live_to_the_end(site)


def test_killed_at_random(site: Site, undisturbed: Ended) -> None:
    """Killed five times at moments nobody chose, the daemon ends where an undisturbed run ends."""
    killed_at_random(site, RANDOM_KILLS, seed=int(time.time()))
    assert ended(site) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_many_times(fresh: Site, undisturbed: Ended, tmp_path: Path) -> None:
    """The same for fifty kills, with a new store for every five."""
    for number in range(MANY_RANDOM_KILLS // RANDOM_KILLS):
        site = fresh.copy(tmp_path / f"site-{number}")
        killed_at_random(site, RANDOM_KILLS, seed=number)
        assert ended(site) == undisturbed, f"seed {number}"


@pytest.mark.parametrize(
    ("by", "step"), [("itself", "intended"), ("itself", "switched"), ("the daemon", "intended")]
)
def test_a_rollback_killed_half_way_is_done_once(finished: Site, tmp_path: Path, by: str, step: str) -> None:
    """Killed before or after the switch, a rollback is completed at the next start and not done twice."""
    site = finished.copy(tmp_path / "site")
    kill = {"STREAMMERGE_KILL_AT": step}
    if by == "itself":
        command("rollback", "--yes", "-c", site.config, code=KILLED, env=kill)
    else:
        daemon = Daemon(site, env=kill)
        daemon.until_ready()
        site.run("rollback", "--yes", "--no-wait")
        assert daemon.until_ended() == KILLED
    verify(site)
    site.once()
    assert site.served == ["a", "b"], step
    status = site.ask("status")
    assert (status["current"]["version"], status["head"]["version"]) == (2, 2)
    assert status["held"]
    assert site.states() == {"a": "folded", "b": "folded", "c": "denied", "z-broken": "refused"}
    assert status["targets"][0]["snapshot"] == 2
    verify(site)


@pytest.mark.parametrize("log_bytes", [pytest.param(0, marks=pytest.mark.slow), 30_000])
def test_killed_while_the_ledger_is_made(site: Site, undisturbed: Ended, log_bytes: int) -> None:
    """Killed before or between the ledger's first tables, the next start makes them; nothing is damaged."""
    log = site.store / "ledger.db-wal"
    running = subprocess.Popen(
        [*STREAMMERGE, "run", "--once", "-c", str(site.config)],
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    while running.poll() is None and not (log.exists() and log.stat().st_size > log_bytes):
        pass
    running.kill()
    assert running.wait() == KILLED
    assert site.run("status", code=None).returncode in (0, 2)
    site.once()
    assert ended(site) == undisturbed
