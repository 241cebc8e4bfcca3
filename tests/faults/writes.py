"""What if a write fails? One journey is taken once for each call that changes the disk, and that call fails.

The journey has full weights, an adapter, a gate, a target, a rollback, a retract and collecting. After each
fault nothing half may lie under an official name; and the same commands, typed again on a disk that works,
must end in the bytes and the ledger of a journey that nothing disturbed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import models

from faults import Findings
from faults.disk import COMPILER, Disk
from faults.forks import ForkedSite, Forks
from faults.order import breaches

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from faults.disk import Call

STEPS = (
    ("run", "--once"),
    ("run", "--once"),
    ("rollback", "2", "--yes"),
    ("resume",),
    ("retract", "full"),
    ("gc",),
)
ARRIVES = {"later": 1}  # before which step; all others are there from the beginning
ERRORS = (errno.ENOSPC, errno.EIO)
SAID_EVERY = 50  # calls
AGAIN = 3  # how often the same command may have to be typed
ALLOWED = (0, 75)  # it worked all the same; try again
TABLES = ("fine_tunes", "snapshots", "promotions", "outbox", "denied", "facts", "sightings")
COMMIT = ("fdatasync", "store/ledger.db-wal")
OWN = re.compile(r"_at$|^at$|^attempts$|^wrong$|^id$|^promotion$|^error$")  # of the way, not of the end
SINCE = re.compile(r', "since": [0-9.]+')


@dataclass
class Journey:
    """One site, the journey's steps, and what an undisturbed one left after each.

    before  what the store was before each step, kept beside it
    after   what it was afterwards
    calls   what each step did to the disk
    """

    work: Path
    site: ForkedSite
    disk: Disk
    after: list[Left] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    def undisturbed(self, steps: int = len(STEPS)) -> None:
        """Take the first steps, or all, once, and keep what each began and ended with."""
        for number in range(steps):
            self.disk.heal()
            self.disk.forget()
            self.step(number, 0)
            self.calls.append(list(self.disk.log()))
            self.keep(number + 1)
            self.after.append(self.end())
            self.restore(number + 1)

    def end(self) -> Left:
        """What is left once telling and collecting, which a fault may have put off, have been done."""
        for _ in range(2):  # what only a target needed that was still to be told goes the second time
            self.site.run("gc")
        return left(self.site.store)

    def step(self, number: int, code: int | None = None) -> tuple[int, str]:
        """Type one command; gives its exit code and what it said."""
        for name, since in ARRIVES.items():
            aside, place = self.site.root / "staging" / name, self.site.inflow / name
            if number >= since and aside.exists():
                aside.rename(place)
            elif number < since and place.exists():
                place.rename(aside)
        done = self.site.run(*STEPS[number], code=code)
        return done.returncode, done.stderr

    def keep(self, number: int) -> None:
        """Keep the store as it is before a step."""
        if self.site.store.exists():
            shutil.copytree(self.site.store, self.work / f"before-{number}", symlinks=True)

    def restore(self, number: int) -> None:
        """Have the store as it was before a step."""
        shutil.rmtree(self.site.store, ignore_errors=True)
        if (kept := self.work / f"before-{number}").exists():
            shutil.copytree(kept, self.site.store, symlinks=True)

    def disturbed(self, number: int, call: int, error: int, *, stays: bool) -> tuple[bool, list[str]]:
        """Take one step with one call failing, or all from that one on; then again without.

        Gives whether it came to that, and everything that was not as promised.
        """
        self.restore(number)
        self.disk.heal()
        self.disk.forget()
        self.disk.set(fail_at=call, error=error, stays=stays)
        code, said = self.step(number)
        failed = any(found.error == error for found in self.disk.log())
        self.disk.heal()
        wrong = [*self.judged(code, said), *half(self.site.store)]
        for _ in range(AGAIN):
            if (self.site.store / "current").is_symlink():
                found, told = self.verify()
                wrong += [f"verify ends with {found}: {told[-300:]}"] if found else []
            if code == 0:
                break
            code, said = self.step(number)
            wrong += self.judged(code, said)
        wrong += [] if code == 0 else [f"it ends with {code} on a disk that works: {said[-300:]}"]
        wrong += breaches(self.disk.log(), self.site.store, is_faulted=True)
        if code == 0:
            wrong += differences(self.after[number], self.end())
        return failed, wrong

    def judged(self, code: int, said: str) -> list[str]:
        """A command may fail, in words."""
        wrong = [f"exit {code}: {said[-400:]}"] if code not in ALLOWED else []
        return wrong + (
            [f"a traceback: {said[-600:]}"] if "Traceback" in said or "daemon.bug" in said else []
        )

    def verify(self) -> tuple[int, str]:
        """Have the store verified by the product."""
        done = self.site.run("verify", code=None)
        return done.returncode, done.stdout + done.stderr


def half(store: Path) -> Iterator[str]:
    """Name what stands under an official name and is not whole, found without the product's own code."""
    for folder in sorted(store.glob("snapshots/[0-9]*")):
        manifest = (folder / "manifest.json").read_bytes()
        if hashlib.sha256(manifest).hexdigest()[:12] != folder.name.partition("-")[2]:
            yield f"{folder.name} has another manifest than its name says"
        for name, facts in json.loads(manifest)["files"].items():
            path = folder / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
                yield f"{folder.name}/{name} is not whole"
    current = store / "current"
    if current.is_symlink() and not (current / "manifest.json").is_file():
        yield f"current leads to {current.readlink()}, which is not there"


@dataclass(frozen=True)
class Left:
    """What a journey leaves that must not depend on what failed, read without the product's own code.

    bytes      path below the store -> sha256, of all that is sealed or fetched
    served     where `current` leads
    ledger     table -> its rows; times, attempts and row numbers aside
    """

    bytes: dict[str, str]
    served: str
    ledger: dict[str, list[str]]


def left(store: Path) -> Left:
    """Read what there is; a promotion that was asked for twice counts once."""
    sealed = [path for part in ("snapshots", "candidates", "inbox") for path in (store / part).rglob("*")]
    with closing(sqlite3.connect(f"file:{store / 'ledger.db'}?mode=ro", uri=True)) as ledger:
        return Left(
            {
                str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(sealed)
                if path.is_file()
            },
            str((store / "current").readlink()),
            {table: rows_of(ledger, table) for table in TABLES},
        )


def rows_of(ledger: sqlite3.Connection, table: str) -> list[str]:
    """Write down the rows of a table, without what no two runs have in common."""
    found = ledger.execute(f"select * from {table} order by 1")
    names = [column[0] for column in found.description]
    rows = [
        json.dumps(
            {
                name: SINCE.sub("", str(value))
                for name, value in zip(names, row, strict=True)
                if not OWN.search(name)
            }
        )
        for row in found
    ]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def differences(expected: Left, found: Left) -> list[str]:
    """Say in what two ends differ."""
    return [
        f"{name}: {sorted(_parts(getattr(found, name)) ^ _parts(getattr(expected, name)))}"
        for name in expected.__dataclass_fields__
        if getattr(expected, name) != getattr(found, name)
    ]


def _parts(value: Any) -> set[str]:
    """What a value consists of, so that two can be compared part by part."""
    if isinstance(value, dict):
        return {f"{key}: {part}" for key, part in value.items()}
    return set(map(str, value)) if isinstance(value, list) else {str(value)}


def pattern(call: Call, root: Path) -> tuple[str, str]:
    """A call's kind and the kind of its path: numbers, digests and hidden prefixes aside."""
    path = call.path.relative_to(root).as_posix()
    return call.name, re.sub(r"\d{6,}(-[0-9a-f]{12})?", "V", re.sub(r"inbox/\d+", "inbox/N", path))


def begin(work: Path, forks: Forks, disk: Disk, root: Path) -> Journey:
    """Make the site that the journey is taken on."""
    site = ForkedSite(root, keep=2, grace="0s")
    site.forks = forks
    site.configure(
        targets=[{"name": "hook", "type": "exec", "argv": [site.program("hook", "exit 0")]}],
        gates=[
            {"name": "gate", "type": "command", "argv": [site.program("gate", "echo '{}'"), "{snapshot}"]}
        ],
    )
    site.publish("full", 1)
    models.make_adapter(site.inflow / "adapter", site.base, seed=2)
    site.publish("z-broken", 3, size=float("nan"))
    site.prepare("later", 4)
    return Journey(work, site, disk)


def chosen(journey: Journey, scale: str) -> Iterator[tuple[int, int, bool]]:
    """Give (step, call, whether the fault stays): every call once, and one of each kind with all after it.

    In the short form only one of each kind, once, and every commit: what follows from one is like no other.
    """
    seen: set[tuple[str, str]] = set()
    for step, calls in enumerate(journey.calls):
        for call in sorted(calls, key=lambda call: call.number):
            kind = pattern(call, journey.site.root)
            if scale == "full" or kind not in seen or kind == COMMIT:
                yield step, call.number, False
            if scale == "full" and kind not in seen:
                yield step, call.number, True
            seen.add(kind)


def measure(work: Path, scale: str) -> Findings:
    """Fail every call, in every way, and count what was lost."""
    findings = Findings("What if a write fails?")
    if COMPILER is None:
        findings.notes.append("left out: there is no C compiler, which the failing disk is built with")
        return findings
    root = work / "site"
    disk = Disk(work / "disk", root)
    with Forks(work, disk.environment) as forks:
        journey = begin(work, forks, disk, root)
        journey.undisturbed()
        findings.differences += breaches([c for calls in journey.calls for c in calls], journey.site.store)
        injected: Counter[str] = Counter()
        missed = 0
        for number, (step, call, stays) in enumerate(chosen(journey, scale)):
            if number % SAID_EVERY == 0:
                sys.stderr.write(f"  {number} calls, {len(findings.differences)} differences\n")
            for error in ERRORS:
                failed, wrong = journey.disturbed(step, call, error, stays=stays)
                name = f"{errno.errorcode[error]}{', and all after it' if stays else ''}"
                injected[name] += failed
                missed += not failed
                where = f"{' '.join(STEPS[step])}, call {call}, {name}"
                findings.differences += [f"{where}: {difference}" for difference in wrong]
    findings.figures += [
        ("calls that change the disk, in one journey", f"{sum(map(len, journey.calls)):,}"),
        (
            "kinds of them, by call and path",
            f"{len({pattern(c, root) for s in journey.calls for c in s}):,}",
        ),
        *((f"failed with {name}", f"{count:,}") for name, count in injected.items()),
        ("journeys that did not come to the call", f"{missed:,}"),
    ]
    findings.notes.append(
        (
            "Each call fails once, in a journey of its own; one of each kind also with all calls after it."
            if scale == "full"
            else "One call of each kind, and each commit, fails once, in a journey of its own."
        )
        + " Then the same command is typed again on a disk that works, and all that is left is compared:"
        " every byte of every version, the ledger's rows, `current`, what the target confirmed."
    )
    return findings
