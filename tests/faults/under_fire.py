"""What if everybody commands at once? Two shells type at random while a daemon folds, fetches, promotes and
replays, or while none runs; afterwards the store is sound, and every command has had its meaning.

Each command is a process of its own, forked from one that has imported everything already.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import hubs
import torch
from daemons import SOURCE, Site, free_port

from faults import Findings
from streammerge.devhub import DevHub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

ALLOWED = {0, 1, 2, 75}
SEEDS = {"short": 2, "full": 12}
SECONDS = {"short": 30.0, "full": 90.0}
SHELLS = 2
PRESERVED = ("history", "status", "fine-tunes")
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(
    ["streammerge.cli", "streammerge.once", "streammerge.obeying", "streammerge.verify", "streammerge.backup"]
)
# A start looks whether any other process has ended; of two threads that read how, one is told 255.
LOOKING = threading.Lock()
COMMAND_SECONDS = 100.0


def measure(work: Path, scale: str) -> Findings:
    """Fire at a daemon and at a store without one, for some seeds each."""
    found = Findings("Does a store stay sound when two shells command at once, with and without a daemon?")
    codes: Counter[str] = Counter()
    arrivals = versions = 0
    for seed in range(SEEDS[scale]):
        for has_daemon in (True, False):
            field_of_fire = Field(work / f"{seed}-{has_daemon}", seed, has_daemon=has_daemon)
            field_of_fire.fire(SECONDS[scale])
            found.differences += [f"seed {seed}, daemon {has_daemon}: {d}" for d in field_of_fire.differences]
            codes.update(field_of_fire.codes)
            arrivals += field_of_fire.published
            versions += field_of_fire.versions
            shutil.rmtree(field_of_fire.site.root, ignore_errors=True)
    found.figures = [
        ("commands", f"{codes.total():,}"),
        *((f"ended with {code}", f"{count:,}") for code, count in sorted(codes.items())),
        ("fine-tunes published", f"{arrivals:,}"),
        ("versions made", f"{versions:,}"),
    ]
    found.notes = [
        f"{SHELLS} shells, {SECONDS[scale]:.0f} s a run, {SEEDS[scale]} seeds with and without a daemon",
        "ended with 1: what was asked makes no sense now; 75: the store is in use, or the daemon is busy",
    ]
    return found


@dataclass
class Field:
    """One store under fire."""

    root: Path
    seed: int
    has_daemon: bool = True
    only: Sequence[list[str]] = ()
    differences: list[str] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    published: int = 0
    versions: int = 0

    def __post_init__(self) -> None:
        """Lay out a site whose folds, gates and targets take their time, and whose versions soon go."""
        chance = torch.Generator().manual_seed(0)
        base = {f"layers.{n}.weight": torch.randn(96, 96, generator=chance) / 10 for n in range(6)}
        self.site = Site(self.root, base, method="opcm", keep=2, keep_spaced=1, grace="0s", archive="keep")
        gate = self.site.program("gate.sh", "sleep 0.1; echo '{\"good\": 1}'")
        hook = self.site.program(
            "hook.sh", "sleep 0.2; test $(($(date +%N | tail -c 3 | sed s/^0*//) % 5)) != 0"
        )
        self.hub = DevHub(self.root / "hub", listen=("127.0.0.1", free_port()), seed=self.seed)
        self.site.configure(
            sources=[SOURCE, {**hubs.SOURCE, "endpoint": self.hub.url, "poll": "2s"}],
            gates=[{"name": "slow", "type": "command", "argv": [gate], "limits": {"good": {"min": 0}}}],
            targets=[{"name": "hook", "type": "exec", "argv": [hook]}],
        )
        self.random = random.Random(self.seed)
        self.over = threading.Event()

    def fire(self, seconds: float) -> None:
        """Command for so long, then look at what is left."""
        self.publish()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.hub)
                self.hub.fault("/resolve/", "slow", probability=0.5, seconds=1.5)
                self.hub.fault("/resolve/", "cut", probability=0.1)
                self.site.once(code=None)  # 75 where the target says no
                running = stack.enter_context(self.site.daemon()) if self.has_daemon else None
                shells = [threading.Thread(target=self.shell, args=(n,)) for n in range(SHELLS)]
                for shell in shells:
                    shell.start()
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline:
                    self.publish()
                    time.sleep(0.7)
                self.over.set()
                for shell in shells:
                    shell.join()
                self.hub.faults.clear()
                if running:
                    running.stop()
                self.settle()
        except AssertionError as exc:
            self.differences.append(f"the daemon: {exc}")

    def publish(self) -> None:
        """Let one more come in, under a new name or as a new revision."""
        self.published += 1
        number = self.random.choice([self.published, self.random.randint(1, self.published)])
        if self.published % 3:
            self.site.publish(f"tune-{number}", self.published)
        else:
            self.hub.publish(f"org/tune-{number}", hubs.files_of(hubs.delta(self.site.base, self.published)))

    # The shells

    def shell(self, number: int) -> None:
        """Type one command after the other."""
        chance = random.Random(f"{self.seed} {number}")
        count = 0
        while not self.over.is_set():
            count += 1
            words = self.command(chance)
            code, said = typed(self.site, words, self.root / f"shell-{number}-{count}.txt")
            self.codes[str(code)] += 1
            shown = f"`{' '.join(words)}` ended with {code}"
            if code not in ALLOWED:
                self.differences.append(f"{shown}: {said[-600:]}")
            if "Traceback" in said:
                self.differences.append(f"{shown} with a traceback: {said[-1500:]}")
            if words[0] == "verify" and code != 0:
                self.differences.append(f"{shown}: {said[-600:]}")

    def command(self, chance: random.Random) -> list[str]:
        """Choose what to type."""
        if self.only:
            words = chance.choice(self.only)
            return [str(self.root / "backup") if word == "BACKUP" else word for word in words]
        name = f"{chance.choice(['', '', 'org/'])}tune-{chance.randint(1, self.published)}"
        version = str(chance.randint(0, max(self.numbers(), default=0)))
        choices: Sequence[tuple[int, list[str]]] = (
            (3, ["rollback", "--yes"]), (3, ["rollback", version, "--yes"]), (5, ["resume"]), (2, ["hold"]),
            (4, ["retract", name, "--yes"]), (3, ["fine-tunes", "approve", name]),
            (2, ["fine-tunes", "reject", name]), (2, ["fine-tunes", "retry", name]), (3, ["gc"]),
            (3, ["verify"]), (2, ["backup", str(self.root / "backup")]), (1, ["history"]), (1, ["status"]),
            (1, ["rollback", "--yes", "--no-wait"]), (1, ["retract", name, "--yes", "--no-wait"]),
            (1 if self.has_daemon else 4, ["run", "--once"]),
            (1, ["rebuild", "--store", str(self.root / f"new-{self.codes.total()}"), "--method", "average"]),
        )  # fmt: skip
        return chance.choices([words for _, words in choices], [weight for weight, _ in choices])[0]

    def numbers(self) -> list[int]:
        """Numbers of the versions that are there now."""
        return [int(path.name[:6]) for path in (self.site.store / "snapshots").glob("[0-9]*")]

    # Afterwards

    def settle(self) -> None:
        """Work off what is left, and look whether everything fits."""
        for words in (["resume"], ["run", "--once"], ["verify"], ["backup", str(self.root / "backup")]):
            code, said = typed(self.site, words, self.root / "settle.txt")
            if code not in ({0, 75} if words[0] == "run" else {0}):
                self.differences.append(f"afterwards `{' '.join(words)}` ended with {code}: {said[-900:]}")
        with contextlib.closing(sqlite3.connect(self.site.store / "ledger.db")) as ledger:
            ledger.row_factory = sqlite3.Row
            self.look(ledger)

    def look(self, ledger: sqlite3.Connection) -> None:
        """Nothing twice, nothing back by itself, every command answered."""
        head = json.loads(ledger.execute("select value from facts where name = 'head'").fetchone()[0])
        manifest = json.loads((self.site.store / "snapshots" / head / "manifest.json").read_bytes())
        digests = [entry["digest"] for entry in manifest["fine_tunes"]]
        denied = {row[0] for row in ledger.execute("select digest from denied")}
        if len(set(digests)) != len(digests):
            self.differences.append(f"{head} holds a fine-tune twice")
        if back := denied & set(digests):
            self.differences.append(f"{head} holds what is denied: {min(back)[:12]}")
        waiting = ledger.execute("select verb from commands where state = 'pending'").fetchall()
        if waiting:
            self.differences.append(f"{len(waiting)} commands were never answered, first {waiting[0][0]}")
        self.versions = ledger.execute("select count(*) from snapshots").fetchone()[0]
        folds = [
            row[0]
            for row in ledger.execute("select version from promotions where cause = 'fold' order by id")
        ]
        if folds != sorted(set(folds)):
            self.differences.append(f"a version was promoted twice without a person: {folds}")
        self.look_at_holds(ledger)

    def look_at_holds(self, ledger: sqlite3.Connection) -> None:
        """Between a rollback, or a hold, and the next resume nothing was folded and promoted."""
        commands = ledger.execute(
            "select verb, finished_at as at from commands where state = 'done' "
            "and verb in ('rollback', 'hold', 'resume') order by finished_at, id"
        ).fetchall()
        folds = ledger.execute(
            "select version, intended_at as at from promotions where cause = 'fold'"
        ).fetchall()
        held_since: float | None = None
        for verb, at in [*commands, ("resume", time.time())]:
            if verb != "resume":
                held_since = held_since or at
                continue
            for fold in folds:
                if held_since is not None and held_since < fold["at"] < at:
                    self.differences.append(f"version {fold['version']} was promoted during a hold")
            held_since = None


def typed(site: Site, words: Sequence[str], said: Path) -> tuple[int, str]:
    """Type a command and wait for its end; gives its exit code and what it said."""
    process = forked.Process(target=_type, args=([*words, "-c", str(site.config)], str(said)))
    deadline = time.monotonic() + COMMAND_SECONDS
    with LOOKING:
        process.start()
    while (code := exit_code(process)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if code is None:
        process.kill()
        return -1, f"did not end; {said.read_text()}"
    return code, said.read_text()


def exit_code(process: BaseProcess) -> int | None:
    """How a process ended; None while it runs."""
    with LOOKING:
        return process.exitcode


def _type(words: list[str], said: str) -> None:
    """Be the command."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ["NO_COLOR"], os.environ["COLUMNS"] = "1", "200"
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 -- descriptors
    sys.argv = ["streammerge", *words]
    torch.set_num_threads(1)
    from streammerge.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
