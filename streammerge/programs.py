"""Runs the operator's own programs: never a shell, a small environment, limits, nothing left behind.

What a program takes is bounded in time and, where asked for, in memory. A bound on memory counts what only
the program's end gives back: anonymous and shared memory of all processes of its session, swapped out or not,
and no page of a file. It is looked at a few times a second; no limit of the kernel's counts the same, for
RLIMIT_AS and RLIMIT_DATA count what is reserved, one process at a time. As to what grows faster than we look:
such a program is the first that the kernel ends when the machine runs out.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MAX_OUTPUT_BYTES = 1 << 20
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "TZ", "VIRTUAL_ENV")
NOT_STARTED = 127
LOOK_SECONDS = 0.2
FIRST_TO_GO = "1000"  # what /proc/PID/oom_score_adj takes for: this one before all others
RESIDENT = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB", re.MULTILINE)
OWN_SHARE = re.compile(rb"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB", re.MULTILINE)


class OverMemory(Exception):
    """A program took more memory than it was given, and was ended; `used` is in bytes."""

    def __init__(self, used: int) -> None:
        super().__init__(f"used {used} bytes of memory")
        self.used = used


def run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    timeout: float,
    beat: Callable[[], None] = lambda: None,
    given: bytes = b"",
    *,
    memory: int | None = None,
    is_expendable: bool = False,
) -> tuple[int | None, str, str]:
    """Run a program: (exit code, tail of its output, tail of its errors); the code is None after the timeout.

    Its whole process group is killed at the end, at the timeout, and when `beat` raises. A program that
    cannot be started counts as exit 127. `given` is its standard input, held in memory: it may be a secret.
    With more than `memory` bytes it is killed too: OverMemory. One that `is_expendable` is what the kernel
    ends first when memory runs out.
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
        code: int | None = None
        try:
            if is_expendable:
                with suppress(OSError):  # it has ended already, or the kernel does not let us
                    Path(f"/proc/{process.pid}/oom_score_adj").write_text(FIRST_TO_GO)
            deadline = time.monotonic() + timeout
            while code is None and time.monotonic() < deadline:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
                if code is None and memory is not None:
                    _check_memory(process.pid, memory)
                beat()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code, _tail(output), _tail(errors)


def ending(code: int, said: str) -> str:
    """Say in words how a program failed; `said` is what it wrote last."""
    last = said[-300:].strip() or "no output"
    if code >= 0:
        return f"failed with exit {code}: {last}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    reason = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{reason}: {last}"


def _check_memory(session: int, memory: int) -> None:
    """Raise OverMemory where a session has more than `memory` bytes."""
    if (used := memory_used(session, memory)) > memory:
        raise OverMemory(used)


def memory_used(session: int, enough: int = 0) -> int:
    """Count the memory of every process of a session, in bytes; exactly only where it is more than `enough`.

    The figure that costs next to nothing to read counts what processes share after a fork for each of them.
    """
    members = list(_members(session))
    most = sum(_bytes(pid, "status", RESIDENT) for pid in members)
    if most <= enough:
        return most
    return sum(_bytes(pid, "smaps_rollup", OWN_SHARE) for pid in members) or most


def _bytes(pid: str, part: str, lines: re.Pattern[bytes]) -> int:
    """Add up some lines of what the kernel tells of a process; 0 where it has ended."""
    try:
        return 1024 * sum(map(int, lines.findall(Path(f"/proc/{pid}/{part}").read_bytes())))
    except OSError:
        return 0


def _members(session: int) -> Iterator[str]:
    """List the processes of a session."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # no process, or one that has ended meanwhile
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            if entry.name.isdecimal() and int(fields[3]) == session:
                yield entry.name


def _tail(file: IO[bytes]) -> str:
    """Read the last MAX_OUTPUT_BYTES of a file."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_OUTPUT_BYTES))
    return file.read().decode(errors="replace")
