"""Commands in forked processes: everything is imported once, so that a thousand runs take minutes, not hours.

`python -m faults.forks` reads requests from standard input, a line of JSON each, runs the command line in a
process of its own, forked, and answers with its exit code. `Forks` is the other end.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from daemons import Site, environment

if TYPE_CHECKING:
    from collections.abc import Mapping

MODULES = ("streammerge.cli", "streammerge.once", "streammerge.recovery", "streammerge.sources.directory")


class Forks:
    """A process that has everything imported, from which each command is forked."""

    def __init__(self, work: Path, env: Mapping[str, str]) -> None:
        """`env` are its variables, which every command inherits; `work` is for what commands print."""
        self._said = (work / "stdout", work / "stderr")
        tests = str(Path(__file__).resolve().parent.parent)
        at_start = environment({"OPENBLAS_NUM_THREADS": "1", **env})
        at_start["PYTHONPATH"] += os.pathsep + tests
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.forks"],
            env=at_start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, arguments: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run `streammerge ARGUMENTS` to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "env": dict(env), "said": [str(path) for path in self._said]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        out, err = (path.read_text() for path in self._said)
        return subprocess.CompletedProcess(arguments, code, out, err)


class ForkedSite(Site):
    """A site whose commands are forked."""

    forks: Forks

    def run(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on this store to its end; its exit code must be `code` unless that is None."""
        done = self.forks.run([*arguments, "-c", str(self.config)], how.get("env") or {})
        code = how.get("code", 0)
        assert code is None or done.returncode == code, f"{arguments}: {done}"
        return done


def serve() -> None:
    """Fork a process for each request, until nobody asks any more."""
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            become(**request)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def become(arguments: list[str], env: dict[str, str], said: list[str]) -> None:
    """Be the command, to its end."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(said, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(env)
        sys.argv = ["streammerge", *arguments]
        importlib.import_module("streammerge.cli").main()
        code = 0
    except SystemExit as exc:
        code = int(exc.code or 0)
    except BaseException:  # noqa: BLE001 -- what a process dies of is what is looked for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
