"""A disk that fails when it is told to, and tells what was done to it: the other half of disk.c.

Works on one folder and on every process that is started with `Disk.environment`; steered from outside, while
they run. Knows nothing of streammerge.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).with_name("disk.c")
FIELDS = ("calls", "fail_at", "error", "stays", "failing", "sleep")  # struct control
COMPILER = shutil.which("cc")


@dataclass(frozen=True)
class Call:
    """One call that changes the disk, or was to: `error` is 0 where it did."""

    number: int
    name: str
    path: Path
    other: Path
    error: int
    bytes: int


class Disk:
    """What lies below one folder, as processes see it that have `environment`."""

    def __init__(self, work: Path, below: Path, *calls: str) -> None:
        """Build the library in `work`; `below` is where calls are counted and fail: those named, or all."""
        assert COMPILER is not None
        work.mkdir(parents=True, exist_ok=True)
        library, self._control, self._log = work / "disk.so", work / "control", work / "log"
        if not library.exists():
            arguments: list[str | Path] = ["-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"]
            subprocess.run([COMPILER, *arguments], check=True)
        self._control.write_bytes(bytes(8 * len(FIELDS)))
        self._log.touch()
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAULTS_BELOW": str(below),
            "FAULTS_CONTROL": str(self._control),
            "FAULTS_LOG": str(self._log),
        }
        if calls:
            self.environment["FAULTS_CALLS"] = " ".join(calls)
        with self._control.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 0)

    def set(self, **values: int) -> None:
        """Steer it: any of FIELDS."""
        for name, value in values.items():
            struct.pack_into("q", self._shared, 8 * FIELDS.index(name), value)

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return int(struct.unpack_from("q", self._shared)[0])

    @property
    def is_failing(self) -> bool:
        """Whether every call fails now."""
        return bool(struct.unpack_from("q", self._shared, 8 * FIELDS.index("failing"))[0])

    def heal(self) -> None:
        """From now on everything works, and the count begins anew."""
        self.set(**dict.fromkeys(FIELDS, 0))

    def log(self) -> Iterator[Call]:
        """Give every call so far, in the order in which they returned."""
        for line in self._log.read_text().splitlines():
            number, name, path, other, error, size = line.split("\t")
            yield Call(int(number), name, Path(path), Path(other), int(error), int(size))

    def forget(self) -> None:
        """Empty the log; nobody must be writing it."""
        self._log.write_bytes(b"")
