"""The real daemon as a process of its own, and the questions that a user would ask it.

Nothing here reaches into the daemon: it is started, asked over HTTP, commanded and stopped from outside, as
anybody would. Whatever happens, the process does not outlive the `with` block.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.errors import StreammergeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")
HOST = "127.0.0.1"
PATIENCE_SECONDS = 90.0  # for one answer; generous, for machines that are busy with other things
GLANCE_SECONDS = 0.05
DRAIN_SECONDS = 20.0
LAST_LINES = 15


@dataclass(frozen=True)
class Daemon:
    """A running `streammerge run -c CONFIG`."""

    process: subprocess.Popen[bytes]
    config: Path
    log: Path
    port: int

    def wait_until_ready(self) -> None:
        """Until it says that it serves."""
        self.wait_for("to be ready", lambda: ask(self.port, "GET", "/readyz")[0] == 200 or None)

    def status(self) -> dict[str, Any]:
        """What `streammerge status --json` says, asked over HTTP."""
        code, body = ask(self.port, "GET", "/api/v1/status")
        if code != 200:
            message = f"the daemon answered {code} to /api/v1/status: {body[:200]!r}"
            raise StreammergeError(message, hint=self._hint)
        status: dict[str, Any] = json.loads(body)
        return status

    def command(self, *words: str) -> str:
        """Run `streammerge WORDS -c CONFIG` as a user would, and return what it printed."""
        done = subprocess.run(
            _streammerge(*words, "-c", str(self.config)),
            capture_output=True,
            text=True,
            env=_environment(),
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip()
            message = f"streammerge {' '.join(words)} ended with exit code {done.returncode}: {said}"
            raise StreammergeError(message, hint=self._hint)
        return done.stdout

    def wait_for(self, what: str, look: Callable[[], T | None]) -> T:
        """Look until there is something to see; the daemon must stay alive meanwhile."""
        until = time.monotonic() + PATIENCE_SECONDS
        while (seen := look()) is None:
            if self.process.poll() is not None:
                raise StreammergeError(f"the daemon ended; its log says:\n{self._tail()}", hint=self._hint)
            if time.monotonic() > until:
                waited = f"waited {PATIENCE_SECONDS:.0f} s for the daemon {what}"
                raise StreammergeError(f"{waited}; its log says:\n{self._tail()}", hint=self._hint)
            time.sleep(GLANCE_SECONDS)
        return seen

    @property
    def _hint(self) -> str:
        return f"the whole log is in {self.log}"

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])


@dataclass(frozen=True)
class Server:
    """A running `python -m streammerge.demo.serve`, asked as anybody would ask it."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def label(self) -> str | None:
        """What it says that it serves; None while nobody listens."""
        code, body = ask(self.port, "GET", "/model_info")
        return str(json.loads(body)["weight_version"]) if code == 200 else None

    def predict(self, images: list[int], task: str) -> tuple[str, list[int]]:
        """What it answers to a question about images, and by which version."""
        code, body = ask(self.port, "POST", "/predict", {"images": images, "task": task})
        if code != 200:
            raise StreammergeError(
                f"the server answered {code}: {body[:200]!r}", hint=f"the whole log is in {self.log}"
            )
        said = json.loads(body)
        return said["label"], said["answers"]


@contextmanager
def running(config: Path, *, log: Path, port: int) -> Iterator[Daemon]:
    """Start the daemon, hand it over, stop it by SIGTERM and wait until it has drained."""
    with _process(_streammerge("run", "-c", str(config)), log) as process:
        yield Daemon(process, config, log, port)


@contextmanager
def serving(exam: Path, model: Path, *, log: Path, port: int) -> Iterator[Server]:
    """Start the server with a model folder, hand it over once it listens, stop it."""
    words = [sys.executable, "-m", "streammerge.demo.serve", str(port), str(exam), str(model)]
    with _process(words, log) as process:
        server = Server(process, port, log)
        until = time.monotonic() + PATIENCE_SECONDS
        while server.label() is None:
            if process.poll() is not None or time.monotonic() > until:
                said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise StreammergeError(f"the server does not listen; its log says:\n{said}")
            time.sleep(GLANCE_SECONDS)
        yield server


@contextmanager
def _process(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends; then it is told to stop, and killed where it does not."""
    with log.open("wb") as written:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, env=_environment()
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Status and body; 0 where nobody listens yet."""
    connection = HTTPConnection(HOST, port, timeout=PATIENCE_SECONDS)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, HTTPException):
        return 0, b""
    finally:
        connection.close()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port: int = taken.getsockname()[1]
        return port


def _streammerge(*words: str) -> list[str]:
    return [sys.executable, "-m", "streammerge", *words]


def _environment() -> dict[str, str]:
    """Ours, less what would configure the daemon from outside its file."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STREAMMERGE")}
