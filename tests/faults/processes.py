"""streammerge in processes that need not import it: forked from one that has, and killed where a test says.

Everything after the imports is as in `python -m streammerge`, which the start of Python and torch would make
ten times slower: the command line's `main` in a process of its own, with its own environment and standard
error. A process can be told to end itself by SIGKILL right before its nth effect: a change of the file system
or the start of a program, as the interpreter's own audit events tell them, or a commit of the ledger.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from daemons import environment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Site

KILLED = -signal.SIGKILL
SECONDS = 60.0
IMPORTED = (
    "__main__", "faults.processes", "streammerge.cli", "streammerge.daemon", "streammerge.obeying",
    "streammerge.sources.directory", "streammerge.targets.exec", "streammerge.methods.average",
    "streammerge.methods.fisher", "streammerge.methods.opcm", "streammerge.methods.spectral_cap",
)  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.symlink", "os.truncate")
FOR_WRITING = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(list(IMPORTED))


@dataclass(frozen=True)
class Blow:
    """Where a process ends itself: at the nth passing of a step, or before its nth effect."""

    step: str = ""
    nth: int = 1
    effect: int = 0

    def __str__(self) -> str:
        """As a report names it."""
        return f"{self.step}:{self.nth}" if self.step else f"effect {self.effect}"


@dataclass(frozen=True)
class Done:
    """How a process ended: its exit code, and unless it was killed how often it passed each step and how
    many effects it had.
    """

    code: int
    said: str
    passed: dict[str, int] = field(default_factory=dict)
    effects: int = 0


class Process:
    """`streammerge ARGUMENTS -c SITE`, running."""

    def __init__(self, site: Site, *arguments: str, blow: Blow | None = None) -> None:
        """Start it; what it says goes to a log beside the configuration."""
        number = len(list(site.root.glob("process-*.log")))
        self.log = site.root / f"process-{number:04d}.log"
        self.log.touch()
        given = ([*arguments, "-c", str(site.config)], self.log, site.root, blow or Blow())
        self._process = forkserver.Process(target=_live, args=given, daemon=True)
        self._process.start()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether it is a daemon that serves."""
        return "daemon.ready" in self.log.read_text()

    def wait(self, seconds: float = SECONDS) -> Done:
        """Wait until it ends by itself."""
        self._process.join(seconds)
        if self._process.is_alive():
            self.kill()
            raise TimeoutError(f"{self.log} did not end within {seconds:g} s: {self.tail()}")
        code = self._process.exitcode
        assert code is not None
        counts = self.log.with_suffix(".json")
        return Done(code, self.tail(), **(json.loads(counts.read_bytes()) if counts.exists() else {}))

    def stop(self) -> Done:
        """Tell it to stop, and wait until it has."""
        self._process.terminate()
        return self.wait()

    def kill(self) -> bool:
        """End it at once; False if it had ended by itself."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode == KILLED

    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-1500:]


def run(site: Site, *arguments: str, blow: Blow | None = None) -> Done:
    """Run a command to its end."""
    return Process(site, *arguments, blow=blow).wait()


def _live(arguments: list[str], log: Path, root: Path, blow: Blow) -> None:
    """Be that process."""
    from streammerge import steps
    from streammerge.cli import main

    with log.open("ab") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
    kill_at = {steps.KILL_VARIABLE: f"{blow.step}:{blow.nth}"} if blow.step else {}
    wanted = environment(kill_at)
    os.environ.clear()
    os.environ.update(wanted)
    os.chdir(root)
    sys.argv = ["streammerge", *arguments]
    effects = Effects(root, blow.effect)
    effects.watch()
    try:
        main()
    finally:
        counts = {"passed": dict(steps.passed), "effects": effects.count}
        log.with_suffix(".json").write_text(json.dumps(counts))


class Effects:
    """Counts a process's effects, those on files below a folder alone, and ends it before one of them."""

    def __init__(self, root: Path, last: int) -> None:
        """`last` is 0 for a process that may live."""
        self.count = 0
        self._root, self._last, self._before = str(root), last, ""

    def watch(self) -> None:
        """Begin."""
        sys.addaudithook(self._heard)
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect

        def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
            found = connect(*arguments, **options)
            found.set_trace_callback(lambda said: self._one() if said.lower().startswith("commit") else None)
            return found

        sqlite3.connect = traced  # type: ignore[assignment]

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Every other chmod of a row of them is passed over: a sealed folder has one for each file."""
        if event == "subprocess.Popen":
            self._one()
            return
        if event == "open":
            is_one = bool(isinstance(arguments[2], int) and arguments[2] & FOR_WRITING)
        else:
            is_one = event in CHANGES and not event == self._before == "os.chmod"
        if event in CHANGES or is_one:
            self._before = event if is_one else ""
        if is_one and self._is_ours(arguments[0]):
            self._one()

    def _is_ours(self, path: object) -> bool:
        """Whether a path lies in the site; one without a folder is beside an open one."""
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        is_log = name.endswith((".log", ".json"))
        return bool(name) and (name.startswith(self._root) or not os.path.isabs(name)) and not is_log  # noqa: PTH117 -- called for every file that is opened

    def _one(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
