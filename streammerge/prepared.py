"""What a method derives from a sealed state, kept until the next fold: computed while nothing else is to do.

Belongs to one state, one way of computing, one machine; the key says which. It may be deleted at any time:
what is not here is computed when it is needed, to the same bits, because it is computed by the same code.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

from streammerge.errors import StreammergeError
from streammerge.headers import CODES, WeightsSet
from streammerge.weights import Weights, Writer

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.methods import Slots

HASH_CHARACTERS = 32


class Prepared:
    """Weights' derived tensors: in memory as far as that is allowed, then on disk, the rest not at all."""

    def __init__(self, folder: Path, memory_bytes: int, disk_bytes: int) -> None:
        """`folder` is made when it is needed, and goes whole when another state comes."""
        self._folder, self._memory, self._disk = folder, memory_bytes, disk_bytes
        self._key = ""
        self._held: dict[str, Slots] = {}
        self._files: dict[str, Path] = {}
        self._held_bytes = self._file_bytes = 0
        self._without_room: set[str] = set()

    def begin(self, key: str, names: list[str]) -> None:
        """Keep only what is of `key`, and find what an earlier process left; `names` have a fixed order."""
        if key == self._key:
            return
        self._key, self._held, self._files, self._without_room = key, {}, {}, set()
        self._held_bytes = self._file_bytes = 0
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path.name != key:
                shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(f"{key}/*.safetensors"):
            number = path.name.partition("-")[0]
            if number.isdecimal() and int(number) < len(names):
                self._files[names[int(number)]] = path
                self._file_bytes += path.stat().st_size

    def clear(self) -> bool:
        """Give back the disk; False where none was taken."""
        taken, self._files, self._file_bytes, self._key = bool(self._files), {}, 0, ""
        shutil.rmtree(self._folder, ignore_errors=True)
        return taken

    def missing(self, names: list[str]) -> str | None:
        """Name the first weight that is not here and has room."""
        done = self._held.keys() | self._files.keys() | self._without_room
        return next((name for name in names if name not in done), None)

    def put(self, name: str, number: int, slots: Slots) -> None:
        """Keep what was derived for a weight, if there is room; `number` is its place among the names."""
        size = sum(values.numel() * values.element_size() for values in slots.values())
        if self._held_bytes + size <= self._memory:
            self._held[name] = slots
            self._held_bytes += size
        elif self._file_bytes + size <= self._disk:
            self._files[name] = self._write(number, slots)
            self._file_bytes += size
        else:
            self._without_room.add(name)

    def _write(self, number: int, slots: Slots) -> Path:
        folder = self._folder / self._key
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{number}.part"
        part.unlink(missing_ok=True)
        declared = [(slot, CODES[values.dtype], tuple(values.shape)) for slot, values in slots.items()]
        try:
            with Writer(part, declared) as writer:
                for slot, values in slots.items():
                    writer.write(slot, values)
            return part.rename(folder / f"{number:05d}-{writer.sha256[:HASH_CHARACTERS]}.safetensors")
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def get(self, name: str) -> Slots | None:
        """Give what was derived for a weight; None where it is not here, or is not what was written."""
        if name in self._held:
            return self._held[name]
        if (path := self._files.get(name)) is None:
            return None
        with suppress(OSError, StreammergeError), Weights(WeightsSet((path,)), whole=True) as found:
            slots = {slot: found.read(slot) for slot in found.entries}
            if path.name.endswith(f"-{found.file_digest()[:HASH_CHARACTERS]}.safetensors"):
                return slots
        del self._files[name]
        path.unlink(missing_ok=True)
        return None
