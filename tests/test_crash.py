"""SIGKILL at any step of anything: after a restart, bytes, ledger and what was told are as undisturbed.

The short form of `python -m faults --only kills`, on the same operations, with the same comparison.
"""

from __future__ import annotations

import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest
from daemons import STREAMMERGE, Daemon, Site, environment, until
from faults import kills, rollbacks
from faults.ends import ended
from faults.kills import Stage
from faults.operations import OPERATIONS
from faults.processes import KILLED, Blow, run

from streammerge.steps import JOURNEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from faults.operations import Operation

BY_NAME = {operation.name: operation for operation in OPERATIONS}
EVERY = tuple(BY_NAME)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stage]:
    """Give an operation's stage, made once."""
    made: dict[str, Stage] = {}

    def stage(name: str) -> Stage:
        if name not in made:
            made[name] = Stage(BY_NAME[name], tmp_path_factory.mktemp("stage"))
        return made[name]

    return stage


@pytest.fixture
def full_weights(stages: Callable[[str], Stage]) -> Stage:
    """Three good fine-tunes and a broken one arrive at a store that is not there yet."""
    return stages("full weights")


@pytest.fixture
def site(full_weights: Stage) -> Iterator[Site]:
    """A copy, at which they have just arrived."""
    with full_weights.site() as site:
        yield site


def test_killed_at_every_step_in_turn(full_weights: Stage, site: Site) -> None:
    """`run --once`, started again and killed one step further each time, ends where one run ends."""
    for step in JOURNEY:
        done = full_weights.strike(site, Blow(step))
        assert done.code == KILLED, f"{step}: {done.said}"
        kills.verify(site)
    full_weights.finish(site)
    assert full_weights.differences(site) == []


@pytest.mark.slow
def test_the_daemon_killed_at_every_step_in_turn(full_weights: Stage, site: Site) -> None:
    """The daemon as it is started by hand, killed one step further each time, ends where one run ends."""
    for step in JOURNEY:
        daemon = Daemon(site, env={"STREAMMERGE_KILL_AT": step})
        assert daemon.until_ended() == KILLED, daemon.tail()
        kills.verify(site)
    with site.daemon():
        until(lambda: full_weights.is_over(site), "the end of an undisturbed run")
    assert full_weights.differences(site) == []


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("rolled back", "intended"),
        ("rolled back", "switched"),
        ("retracted by replay", "sealed"),
        ("retracted by replay", "accepted"),
        ("collected by a command", "collected"),
        ("rejected", "answered"),
    ],
)
def test_a_command_killed_half_way_is_done_once(stages: Callable[[str], Stage], name: str, step: str) -> None:
    """What a killed command had begun is completed at the next start, and not done twice."""
    assert kills.killed_at(stages(name), Blow(step)) == []


@pytest.mark.parametrize("blow", [Blow("folded", 2), Blow("refused"), Blow("recorded", 2)], ids=str)
def test_a_search_for_the_one_at_fault_is_gone_on_with(stages: Callable[[str], Stage], blow: Blow) -> None:
    """Killed while several are folded together, or while it is looked for, it ends as undisturbed."""
    assert kills.killed_at(stages("folded together, one at fault"), blow) == []


def test_killed_before_the_first_version_counts(full_weights: Stage) -> None:
    """A store whose version 0 is sealed and not accepted has no head, which is no damage."""
    assert kills.killed_at(full_weights, Blow("recorded")) == []


def test_a_daemon_killed_at_a_rollback_goes_on_with_it(stages: Callable[[str], Stage]) -> None:
    """The next daemon switches `current`, and the command is answered."""
    assert kills.daemon_killed_at(stages("rolled back"), Blow("intended")) == []


def test_killed_at_random(full_weights: Stage) -> None:
    """Killed five times at moments that depend on the machine, the daemon ends as undisturbed."""
    assert kills.killed_at_random(full_weights, seed=1) == (kills.KILLS_AT_A_SITE, [])


@pytest.mark.parametrize("log_bytes", [pytest.param(0, marks=pytest.mark.slow), 30_000])
def test_killed_while_the_ledger_is_made(full_weights: Stage, site: Site, log_bytes: int) -> None:
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
    full_weights.finish(site)
    assert full_weights.differences(site) == []


def test_what_differs_is_found(full_weights: Stage, site: Site) -> None:
    """A byte, a mode, a row or a telling that is not as undisturbed is a difference, by its name."""
    full_weights.finish(site)
    manifest = site.store / "current" / "manifest.json"
    for spoil, named in (
        (partial(run, site, "hold"), "facts"),
        (partial(manifest.chmod, 0o644), "manifest.json"),
        (partial(manifest.write_bytes, b"{}"), "manifest.json"),
        (partial((site.store / "inbox" / "9").mkdir), "inbox/9"),
        (partial(told, site, "9-000000000000 000009"), "told-first.txt"),
    ):
        before = ended(site)
        spoil()
        assert any(named in found for found in before.differences(ended(site))), named


def told(site: Site, line: str) -> None:
    """Have the target told once more."""
    with (site.root / "told-first.txt").open("a") as log:
        log.write(f"{line}\n")


# ---------------------------------------------------------------------------------------------- slow ones


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("operation", OPERATIONS, ids=EVERY)
def test_killed_at_any_step(operation: Operation, stages: Callable[[str], Stage]) -> None:
    """Whatever is asked, killed at the first passing of any of its steps, it ends as undisturbed."""
    stage = stages(operation.name)
    found = {str(blow): kills.killed_at(stage, blow) for blow in kills.passings(stage, 1)}
    assert found
    assert {place: differences for place, differences in found.items() if differences != []} == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", kills.RANDOM)
def test_killed_at_random_many_times(name: str, stages: Callable[[str], Stage]) -> None:
    """So it does when it is killed at moments nobody chose."""
    stage = stages(name)
    assert [found for seed in range(6) for found in kills.killed_at_random(stage, seed)[1]] == []


@pytest.mark.slow
def test_a_rollback_stays_in_force(tmp_path: Path) -> None:
    """After looks at the source and restarts, what was taken out is out; and after the hold is lifted."""
    assert rollbacks.in_force(Site(tmp_path / "site")) >= rollbacks.POLLS
