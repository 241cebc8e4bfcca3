"""Real daemons and commands for tests: a folder with all they need, `python -m streammerge` in processes of
its own, and waiting with a deadline. What a daemon logged is checked when it ends: JSON lines, and no bug.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import models
import yaml
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

T = TypeVar("T")
Facts = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parent.parent
STREAMMERGE = (sys.executable, "-m", "streammerge")
DEADLINE_SECONDS = 30.0
SOURCE: Facts = {"name": "team", "type": "directory", "path": "./fine-tunes", "settle": "0s", "poll": "1s"}
# Root reads what nobody may read; without these capabilities it is held to a file's mode like everybody else.
HUMBLE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--") if os.geteuid() == 0 else ()
CAN_BE_HUMBLE = not HUMBLE or shutil.which("setpriv") is not None
TIMES = re.compile(r"_at$|^attempts$|^until$")


def until(condition: Callable[[], T], what: str, seconds: float = DEADLINE_SECONDS) -> T:
    """Wait until a condition is true and give its value; fail with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return found


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would reach streammerge by accident."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("STREAMMERGE") and key not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")
    }
    return {**kept, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1", "COLUMNS": "200", **(extra or {})}


def command(
    *arguments: str | Path,
    code: int | None = 0,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    cwd: Path | None = None,
    timeout: float = 60.0,
) -> subprocess.CompletedProcess[str]:
    """Run `streammerge ARGUMENTS` to its end; its exit code must be `code` unless that is None."""
    done = subprocess.run(
        [*prefix, *STREAMMERGE, *map(str, arguments)],
        env=environment(env), cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    said = f"{arguments}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert code is None or done.returncode == code, said
    assert "Traceback" not in done.stderr, said
    return done


class Site:
    """A folder with a base, a source folder, a store and a configuration: what one streammerge works on."""

    def __init__(self, root: Path, base: Mapping[str, Tensor] | None = None, **keys: Any) -> None:
        """Make a toy base, or save the tensors of the one given; `keys` are the configuration's."""
        self._take_place(root)
        self.keys: Facts = {}
        root.mkdir(parents=True, exist_ok=True)
        self.inflow.mkdir()
        if base is None:
            self.base: Mapping[str, Tensor] = models.make_base(root / "base")
        else:
            models.save(root / "base", base)
            self.base = base
        self.configure(**keys)

    def copy(self, root: Path) -> Site:
        """Copy everything, the store included, to a new folder."""
        shutil.copytree(self.root, root, symlinks=True, ignore=shutil.ignore_patterns("*.log"))
        other = copy.copy(self)
        other._take_place(root)
        other.configure(http={"listen": f"127.0.0.1:{other.port}"})
        return other

    def _take_place(self, root: Path) -> None:
        self.root = root
        self.config = root / "streammerge.yaml"
        self.store = root / "store"
        self.inflow = root / "fine-tunes"
        self.port = free_port()

    def configure(self, *, source: Mapping[str, Any] | None = None, **keys: Any) -> None:
        """Write the configuration; keys given earlier stay. `source` changes the one source `team`."""
        defaults: Facts = {
            "base": "./base",
            "store": "./store",
            "reserve": "1MB",
            "threads": 1,
            "http": {"listen": f"127.0.0.1:{self.port}"},
            "sources": [SOURCE],
        }
        self.keys = {**defaults, **self.keys, **keys}
        if source is not None:
            self.keys["sources"] = [{**SOURCE, **source}]
        self.config.write_text(yaml.safe_dump(self.keys))

    # What is published

    def publish(self, name: str, seed: int, **how: Any) -> dict[str, Tensor]:
        """Make a fine-tune and move it into the source folder, whole; one of that name is replaced."""
        tensors = self.prepare(name, seed, **how)
        self.move_in(name)
        return tensors

    def prepare(self, name: str, seed: int, **how: Any) -> dict[str, Tensor]:
        """Make a fine-tune beside the source folder."""
        (self.root / "staging").mkdir(exist_ok=True)
        return models.make_fine_tune(self.root / "staging" / name, self.base, seed=seed, **how)

    def move_in(self, name: str) -> None:
        """Rename what was prepared into the source folder."""
        self.withdraw(name)
        (self.root / "staging" / name).rename(self.inflow / name)

    def withdraw(self, name: str) -> None:
        """Move a fine-tune out of the source folder, if it is there; it lies in `withdrawn` then."""
        if (self.inflow / name).exists():
            aside = self.root / "withdrawn"
            aside.mkdir(exist_ok=True)
            if (aside / name).is_dir():
                shutil.rmtree(aside / name)
            (self.inflow / name).rename(aside / name)

    def bring_back(self, name: str) -> None:
        """Put back what was withdrawn, in place of what has that name now."""
        back = self.root / "withdrawn" / name
        kept = back.rename(self.root / "withdrawn" / f"{name}.back")
        self.withdraw(name)
        kept.rename(self.inflow / name)

    def program(self, name: str, lines: str) -> str:
        """Write a shell script beside the configuration; gives what to write in `argv`."""
        path = self.root / name
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return f"./{name}"

    # Commands

    def run(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on this store to its end."""
        return command(*arguments, "-c", self.config, **how)

    def ask(self, *arguments: str, **how: Any) -> Any:
        """Run a command with --json and give what it printed."""
        return json.loads(self.run(*arguments, "--json", **how).stdout)

    def once(self, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Work off what is there: `run --once`."""
        return self.run("run", "--once", code=code, env=env)

    # What stands on disk

    @property
    def current(self) -> Facts:
        """The manifest of the version being served, read as a server would find it."""
        manifest: Facts = json.loads((self.store / "current" / "manifest.json").read_bytes())
        return manifest

    @property
    def served(self) -> list[str]:
        """Names of the fine-tunes in the version being served, in folding order."""
        return [entry["name"] for entry in self.current["fine_tunes"]]

    def rows(self) -> dict[str, Facts]:
        """The newest row of every fine-tune's name, as `fine-tunes --json` prints it."""
        return newest(self.ask("fine-tunes"))

    def states(self) -> dict[str, str]:
        """State of every fine-tune by name."""
        return {name: row["state"] for name, row in self.rows().items()}

    def versions(self) -> list[int]:
        """Numbers of the accepted versions on disk."""
        return sorted(int(path.name[:6]) for path in (self.store / "snapshots").iterdir())

    # The daemon

    @contextlib.contextmanager
    def daemon(self, *, code: int | None = 0, prefix: Sequence[str] = (), **env: str) -> Iterator[Daemon]:
        """Run the daemon until the block ends: ready at first, and with exit `code` once told to stop."""
        running = Daemon(self, prefix, env)
        try:
            running.until_ready()
            yield running
            running.stop(code)
        except BaseException as exc:
            exc.add_note(running.tail())
            raise
        finally:
            running.kill()


def newest(rows: list[Facts]) -> dict[str, Facts]:
    """Choose the row of each name that was seen last."""
    return {row["name"]: row for row in sorted(rows, key=lambda row: row["first_seen_at"])}


def without_times(rows: list[Facts]) -> list[Facts]:
    """Leave out what no two runs have in common."""
    return [{key: value for key, value in row.items() if not TIMES.search(key)} for row in rows]


class Daemon:
    """One `streammerge run`; asked over HTTP, so that waiting costs next to nothing."""

    def __init__(self, site: Site, prefix: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        """Start it; `until_ready` waits until it is."""
        self.site = site
        number = len(list(site.root.glob("daemon-*.log")))
        self.log = site.root / f"daemon-{number}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, *STREAMMERGE, "run", "-c", str(site.config)],
                env=environment(env), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip

    def until_ready(self) -> None:
        """Wait until it serves; what was there before is looked at but not folded yet."""
        until(lambda: self.process.poll() is not None or "daemon.ready" in self.log.read_text(), "ready")
        assert self.process.poll() is None, f"it ended with {self.process.returncode} instead"

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def reload(self, event: str = "config.reloaded") -> None:
        """Have it read its configuration again; `event` is what it must log of that."""
        before = len(self.events(event))
        self.signal(signal.SIGHUP)
        until(lambda: len(self.events(event)) > before, event)

    def stop(self, code: int | None = 0) -> None:
        """Tell it to stop, unless it has ended; check how it ended and what it logged."""
        if self.process.poll() is None:
            self.process.terminate()
        assert code is None or self.process.wait(DEADLINE_SECONDS) == code, self.process.returncode
        self.process.wait(DEADLINE_SECONDS)
        lines = self.log.read_text().splitlines()
        logged = [json.loads(line) for line in lines if not re.match(r"(error|hint): ", line)]
        assert all("event" in line and "level" in line and "timestamp" in line for line in logged)
        assert not [line for line in logged if line["event"] == "daemon.bug"]

    def kill(self) -> None:
        """End it at once, if it runs; nothing is checked."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def until_ended(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Wait until it ends by itself; gives its exit code."""
        return self.process.wait(seconds)

    def tail(self) -> str:
        """The end of its log, for a failed test's message."""
        lines = [line[:600] for line in self.log.read_text().splitlines()[-15:]]
        return f"{self.log.name}, exit {self.process.poll()}:\n" + "\n".join(lines)

    def events(self, event: str = "") -> list[Facts]:
        """What it logged so far, one event or all of them."""
        lines = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        return [found for found in map(json.loads, lines) if event in ("", found["event"])]

    # Over HTTP

    def get(self, path: str) -> tuple[int, str]:
        """Ask its port: status code and body."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.site.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()

    def ask(self, what: str) -> Any:
        """Read one of status, history, fine-tunes."""
        code, body = self.get(f"/api/v1/{what}")
        assert code == 200, body
        return json.loads(body)

    def rows(self) -> dict[str, Facts]:
        """The newest row of every fine-tune's name."""
        return newest(self.ask("fine-tunes"))

    def states(self) -> dict[str, str]:
        """State of every fine-tune by name."""
        return {name: row["state"] for name, row in self.rows().items()}

    def until_state(self, wanted: Mapping[str, str] | None = None, **more: str) -> dict[str, Facts]:
        """Wait until the named fine-tunes are in the given states, what is folded served; gives all rows."""
        states = {**(wanted or {}), **more}

        def reached() -> bool:
            rows = self.rows()
            if not {name: row["state"] for name, row in rows.items()}.items() >= states.items():
                return False
            folded = [rows[name]["version"] for name, state in states.items() if state == "folded"]
            return not folded or self.ask("status")["current"]["version"] >= max(folded)

        try:
            until(reached, f"{states}")
        except AssertionError as exc:
            exc.add_note(f"but {self.states()}")
            raise
        return self.rows()

    def metric(self, name: str, **labels: str) -> float:
        """Read one sample of /metrics."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, f"{name} {labels}: {found}"
        return float(found[0])

    def looks(self, source: str = "team") -> float:
        """How many looks at a source have worked."""
        return self.metric("streammerge_source_polls_total", source=source, result="ok")

    def look_again(self, times: int = 2, source: str = "team") -> None:
        """Let it look at a source so many times more."""
        enough = self.looks(source) + times
        until(lambda: self.looks(source) >= enough, "looks at the source")
