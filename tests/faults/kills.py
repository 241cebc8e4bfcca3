"""SIGKILL at every step, before every single effect, and at random moments, in whatever a store is asked.

Each operation of `faults.operations` is done once by a process that nobody kills. Then it is done again and
again in copies of the same site by processes that are killed: `verify` must find nothing damaged, a person
asks again where the store never heard of the command, and the next process works off what is left. What lies
on disk, what the ledger says and what the targets were told must then be what the undisturbed run left.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from daemons import Facts, Site, until

from faults import Findings, retracts, rollbacks
from faults.ends import account, ended
from faults.operations import OPERATIONS, Operation
from faults.processes import KILLED, Blow, Done, Process, run
from streammerge.errors import StreammergeError
from streammerge.steps import STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSINGS = 3
KILLS_AT_A_SITE = 5
DAEMON_SECONDS = 30.0
SHOWN = 3  # differences of one run
RANDOM = ("full weights", "adapters", "retracted by replay", "rolled back")
RANDOM_KILLS = {"short": 20, "full": 520}
SHORT = (
    "full weights",
    "retracted by replay",
    "refused by a gate",
    "collected by a command",
    "tuned",
)  # pass every step
WHERE = (
    "A step is killed at up to its third passing. Which steps and effects an operation has is what its "
    "undisturbed run had; an effect is a change of the file system or the start of a program, by the "
    "interpreter's audit events, or a commit of the ledger."
)
COMPARED = (
    "Compared: every byte and mode in the store, every row of the ledger without times, where `current` "
    "leads, and what the targets wrote down. `verify` after every kill."
)


class Unlike(AssertionError):
    """A process did not end as it must."""


class Stage:
    """One operation, how it ends undisturbed, and copies of its site in which it is disturbed."""

    def __init__(self, operation: Operation, work: Path) -> None:
        """Do it once, undisturbed; its end must be the one that the operation states."""
        self.operation = operation
        self.work = work / operation.name.replace(" ", "-")
        self.work.mkdir()
        self._fresh = operation.prepare(self.work / "fresh")
        self._known = len(commands(self._fresh))
        self._copies = 0
        with self.site() as site:
            run(site, "version")  # the first process of all waits for the imports
            started = time.monotonic()
            self.undisturbed = self.strike(site)
            self.seconds = time.monotonic() - started
            self.finish(site)
            self.end = ended(site)
            assert tuple(site.served) == operation.served, (operation.name, site.served)
            states = {row["name"]: row["state"] for row in self.end.ledger["fine_tunes"]}
            assert states == operation.states, (operation.name, states)

    @contextmanager
    def site(self) -> Iterator[Site]:
        """A copy of the site at which the operation is about to begin."""
        self._copies += 1
        site = self._fresh.copy(self.work / f"site-{self._copies}")
        try:
            yield site
        finally:
            shutil.rmtree(site.root, ignore_errors=True)

    def strike(self, site: Site, blow: Blow | None = None) -> Done:
        """Do the operation until the blow falls, or to its end: the command that it is, or working off."""
        return run(site, *(self.operation.asked or ("run", "--once")), blow=blow)

    def is_unasked(self, site: Site) -> bool:
        """Whether the operation is a command, and the store does not know of it."""
        return bool(self.operation.asked) and len(commands(site)) == self._known

    def ask(self, site: Site, *more: str) -> None:
        """What the store never heard of is asked, or asked again."""
        if self.is_unasked(site):
            must_end(run(site, *self.operation.asked, *more))

    def finish(self, site: Site) -> None:
        """Work off what is left."""
        self.ask(site)
        must_end(run(site, "run", "--once"))

    def live_to_the_end(self, site: Site) -> None:
        """Let a daemon do what is left, and tell it to stop."""
        self.ask(site, "--no-wait")
        with daemon(site) as running:
            try:
                until(lambda: running.is_ready and self.is_over(site), "the end", DAEMON_SECONDS)
            except AssertionError as exc:
                raise Unlike(f"{exc}: {'; '.join(self.differences(site))}; {running.tail()}") from exc
            must_end(running.stop())

    def is_over(self, site: Site) -> bool:
        """Whether the ledger says what it says after the undisturbed run."""
        try:
            return account(site) == self.end.ledger
        except StreammergeError:  # there is no ledger yet
            return False

    def differences(self, site: Site) -> list[str]:
        """Say in what a site is not as the undisturbed run left it."""
        return self.end.differences(ended(site))[:SHOWN]


@contextmanager
def daemon(site: Site, blow: Blow | None = None) -> Iterator[Process]:
    """Run a daemon, which does not outlive the block."""
    running = Process(site, "run", blow=blow)
    try:
        yield running
    finally:
        running.kill()


def must_end(done: Done) -> None:
    """An undisturbed process ends well."""
    if done.code != 0:
        raise Unlike(f"exit {done.code}: {done.said[-600:]}")


def commands(site: Site) -> list[Facts]:
    """Every command that a store was given."""
    try:
        return account(site)["commands"]
    except StreammergeError:  # there are no tables yet
        return []


def verify(site: Site) -> None:
    """What a kill leaves is no damage; before the first version there is no store to verify."""
    done = run(site, "verify")
    if done.code not in ((0,) if (site.store / "current").is_symlink() else (0, 2)):
        raise Unlike(f"verify: exit {done.code}: {done.said[-600:]}")


# ------------------------------------------------------------------------------ one kill at a chosen place


def killed_at(stage: Stage, blow: Blow) -> list[str] | None:
    """Kill the operation there, go on, and say what differs; None where it did not get there."""
    with stage.site() as site:
        try:
            if stage.strike(site, blow).code != KILLED:
                return None
            verify(site)
            stage.finish(site)
            return stage.differences(site)
        except (Unlike, TimeoutError) as exc:
            return [str(exc)]


def daemon_killed_at(stage: Stage, blow: Blow) -> list[str] | None:
    """The same for a daemon to which the operation is left."""
    with stage.site() as site, daemon_told(stage, site, blow) as running:
        try:
            until(
                lambda: (
                    not running.is_alive
                    or (running.is_ready and stage.is_over(site) and blow.step != "prepared")
                ),
                f"death at {blow} or the end",
                DAEMON_SECONDS,
            )
            if running.stop().code != KILLED:
                return None
            verify(site)
            stage.live_to_the_end(site)
            return stage.differences(site)
        except (Unlike, TimeoutError, AssertionError) as exc:
            return [str(exc)]


@contextmanager
def daemon_told(stage: Stage, site: Site, blow: Blow | None = None) -> Iterator[Process]:
    """A daemon to which the operation was left before it started."""
    stage.ask(site, "--no-wait")
    with daemon(site, blow) as running:
        yield running


# ------------------------------------------------------------------------------ kills at random moments


def killed_at_random(stage: Stage, seed: int) -> tuple[int, list[str]]:
    """Kill what works on the operation at random moments, then let it come to its end.

    Gives how many were killed, and what differs.
    """
    moments = random.Random(seed)
    works = (once_killed, daemon_killed, *((daemon_killed_under_a_command,) if stage.operation.asked else ()))
    work = works[seed % len(works)]
    kills = 0
    with stage.site() as site:
        try:
            while kills < KILLS_AT_A_SITE and work(stage, site, moments):
                kills += 1
                verify(site)
            if work is once_killed:
                stage.finish(site)
            else:
                stage.live_to_the_end(site)
            return kills, stage.differences(site)
        except (Unlike, TimeoutError) as exc:
            return kills, [f"by {work.__name__}: {exc}"]


def once_killed(stage: Stage, site: Site, moments: random.Random) -> bool:
    """Kill the command, or what works off what arrived and what a killed command left; False if it ended."""
    work = Process(site, *(stage.operation.asked if stage.is_unasked(site) else ("run", "--once")))
    time.sleep(moments.uniform(0.0, 1.1 * stage.seconds))
    return work.kill()


def daemon_killed(stage: Stage, site: Site, moments: random.Random) -> bool:
    """Kill a daemon to which the operation was left."""
    with daemon_told(stage, site) as running:
        time.sleep(moments.uniform(0.0, 2 * stage.seconds))
        return running.kill()


def daemon_killed_under_a_command(stage: Stage, site: Site, moments: random.Random) -> bool:
    """Kill a daemon while a person's command waits for it; the command is carried out all the same."""
    with daemon(site) as running:
        time.sleep(moments.uniform(0.0, stage.seconds))
        asked = Process(site, *stage.operation.asked) if stage.is_unasked(site) else None
        time.sleep(moments.uniform(0.0, 2 * stage.seconds))
        struck = running.kill()
    if asked is not None:
        must_end(asked.wait())
    return struck


# ------------------------------------------------------------------------------ the matrix


@dataclass
class Tally:
    """What was run, how often, and what came out otherwise than promised."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    _said: int = 0

    def add(self, kind: str, what: str, found: list[str] | None) -> None:
        """Count one run; None is one that never came to its place."""
        self.counts[kind if found is not None else "not reached"] += 1
        if found:
            self.differences.append(f"{what}: {'; '.join(found)}")

    def say(self, done: str) -> None:
        """Tell who waits how far it is."""
        sys.stderr.write(f"  {done}: {dict(self.counts)}, {len(self.differences)} differences\n")
        for difference in self.differences[self._said :]:
            sys.stderr.write(f"    {difference}\n")
        self._said = len(self.differences)


def passings(stage: Stage, most: int = PASSINGS) -> Iterator[Blow]:
    """Every passing of every step, up to the third."""
    for step, times in stage.undisturbed.passed.items():
        for nth in range(1, 1 + min(times, most)):
            yield Blow(step, nth)


def in_a_daemon(stage: Stage) -> Iterator[Blow]:
    """Every step that a daemon passes: it asks itself nothing, and prepares when there is nothing to do."""
    yield from (blow for blow in passings(stage, 1) if blow.step != "asked")
    if "prepare" in stage.operation.keys:
        yield Blow("prepared")


def effects(stage: Stage) -> Iterator[Blow]:
    """Before every effect."""
    for number in range(1, 1 + stage.undisturbed.effects):
        yield Blow(effect=number)


def measure(work: Path, scale: str) -> Findings:
    """Kill everywhere; `short` has each step of a few that pass them all, and no single effects."""
    is_full = scale == "full"
    tally = Tally()
    wanted = {*SHORT, *RANDOM}
    stages = {o.name: Stage(o, work) for o in OPERATIONS if is_full or o.name in wanted}
    kill_at_random(stages, tally, RANDOM_KILLS[scale])
    met = kill_at_steps(stages, tally, is_full=is_full)
    for stage in stages.values() if is_full else ():
        for blow in effects(stage):
            tally.add("before an effect", f"{stage.operation.name}, at {blow}", killed_at(stage, blow))
        tally.say(stage.operation.name)
    findings = Findings("Killed anywhere, does it end as undisturbed?", differences=tally.differences)
    unpassed = sorted(set(STEPS) - met)
    pairs = sum(len(stage.undisturbed.passed) for stage in stages.values())
    findings.figures = [
        ("steps with a name", f"{len(STEPS)}, of which passed {len(STEPS) - len(unpassed)}"),
        ("operations", f"{len(stages)}"),
        ("pairs of the two that are passed without a daemon", f"{pairs} of {len(STEPS) * len(stages)}"),
        ("killed at a step, `run --once` or the command itself", f"{tally.counts['at a step']:,}"),
        ("killed at a step, the daemon", f"{tally.counts['daemon at a step']:,}"),
        ("killed before a single effect", f"{tally.counts['before an effect']:,}"),
        ("killed at a random moment", f"{tally.counts['at random']:,}"),
        ("place not reached", f"{tally.counts['not reached']:,}"),
    ]
    findings.differences += [f"no operation passes {step}" for step in unpassed]
    findings.notes = [
        f"Operations: {', '.join(stages)}.",
        WHERE,
        COMPARED,
        "Processes are forked from one that has imported streammerge, and killed by a real SIGKILL.",
    ]
    rollbacks.add_to(findings, work, scale)
    if is_full:
        retracts.add_to(findings, work)
    return findings


def kill_at_steps(stages: dict[str, Stage], tally: Tally, *, is_full: bool) -> set[str]:
    """Kill at each step of each operation, or of one that passes it; gives the steps that were passed."""
    met: set[str] = set()
    met_by_daemons: set[str] = set()
    for name, stage in stages.items():
        for blow in passings(stage, PASSINGS if is_full else 1):
            if is_full or blow.step not in met:
                tally.add("at a step", f"{name}, at {blow}", killed_at(stage, blow))
                met.add(blow.step)
        for blow in in_a_daemon(stage):
            if is_full or blow.step not in met_by_daemons:
                tally.add("daemon at a step", f"{name}, daemon at {blow}", daemon_killed_at(stage, blow))
                met_by_daemons.add(blow.step)
        tally.say(f"{name}, at steps")
    return met | met_by_daemons


def kill_at_random(stages: dict[str, Stage], tally: Tally, wanted: int) -> None:
    """Kill at random moments until enough were killed; a seed repeats what it found."""
    seed = 0
    while tally.counts["at random"] < wanted:
        stage = stages[RANDOM[seed % len(RANDOM)]]
        kills, found = killed_at_random(stage, seed // len(RANDOM))
        tally.counts["at random"] += kills
        if found:
            what = f"{stage.operation.name}, seed {seed // len(RANDOM)}, {kills} killed"
            tally.differences.append(f"{what}: {'; '.join(found)}")
        seed += 1
    tally.say("at random")
