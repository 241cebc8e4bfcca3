"""Runs the operator's own programs: never a shell, a small environment, a time limit, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_OUTPUT_BYTES = 1 << 20
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "TZ", "VIRTUAL_ENV")
NOT_STARTED = 127


def run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    timeout: float,
    beat: Callable[[], None] = lambda: None,
    given: bytes = b"",
) -> tuple[int | None, str, str]:
    """Run a program: (exit code, tail of its output, tail of its errors); the code is None after the timeout.

    Its whole process group is killed at the end, at the timeout, and when `beat` raises. A program that
    cannot be started counts as exit 127. `given` is its standard input, held in memory: it may be a secret.
    """
    kept = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        os.fdopen(os.memfd_create("given"), "w+b") as stdin,
    ):
        stdin.write(given)
        stdin.seek(0)
        try:
            process = subprocess.Popen(  # noqa: S603 -- the operator's own command; never a shell
                argv,
                env={**kept, **environment},
                stdin=stdin,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as exc:
            return NOT_STARTED, "", f"{argv[0]}: {exc.strerror}"
        deadline = time.monotonic() + timeout
        code: int | None = None
        try:
            while code is None and time.monotonic() < deadline:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(0.2, max(0.0, deadline - time.monotonic())))
                beat()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code, _tail(output), _tail(errors)


def _tail(file: IO[bytes]) -> str:
    """Read the last MAX_OUTPUT_BYTES of a file."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_OUTPUT_BYTES))
    return file.read().decode(errors="replace")
