"""What a method derives from a sealed state, kept until the next fold: computed while nothing else is to do.

Belongs to one state, one way of computing, one machine; the key says which. It may be deleted at any time:
what is not here is computed when it is needed, to the same bits, because it is computed by the same code.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from streammerge import linalg, methods
from streammerge.errors import StreammergeError
from streammerge.headers import WeightsSet
from streammerge.state import SlotFiles
from streammerge.steps import reached
from streammerge.weights import CODES, Weights, Writer

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from streammerge.headers import Entry
    from streammerge.methods import Slots
    from streammerge.plan import Recipe
    from streammerge.state import Resident, State

HASH_CHARACTERS = 32


class Prepared:
    """Weights' derived tensors: in memory as far as that is allowed, then on disk, the rest not at all."""

    def __init__(self, folder: Path, memory_bytes: int, disk_bytes: int) -> None:
        """`folder` is made when it is needed, and goes whole when another state comes."""
        self._folder, self._memory, self._disk = folder, memory_bytes, disk_bytes
        self._key = ""
        self._names: list[str] = []
        self._held: dict[str, Slots] = {}
        self._files: dict[str, Path] = {}
        self._held_bytes = self._file_bytes = 0
        self._without_room: set[str] = set()

    def begin(self, recipe: Recipe, state: State, how: tuple[object, ...]) -> bool:
        """Keep only what belongs to this state; find what a process before left. False where nothing will be.

        how  all that bits depend on beside state and recipe
        """
        if not state.digest or not state.has_slots() or not hasattr(methods.load(recipe.method), "prepare"):
            return False
        facts = (state.digest, recipe.method, sorted(recipe.knobs.items()), how)
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:HASH_CHARACTERS]
        if key != self._key:
            self._key, self._held, self._files, self._without_room = key, {}, {}, set()
            self._names = [name for name in recipe.plan.merged if recipe.needs_spectra(name)]
            self._held_bytes = self._file_bytes = 0
            self._find()
        return True

    def _find(self) -> None:
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            if path.name != self._key:
                shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(f"{self._key}/*.safetensors"):
            number = path.name.partition("-")[0]
            if number.isdecimal() and int(number) < len(self._names):
                self._files[self._names[int(number)]] = path
                self._file_bytes += path.stat().st_size

    def clear(self) -> bool:
        """Give back the disk; False where none was taken."""
        taken, self._files, self._file_bytes, self._key = bool(self._files), {}, 0, ""
        shutil.rmtree(self._folder, ignore_errors=True)
        return taken

    def missing(self) -> str | None:
        """Name the first weight that is not here and has room."""
        done = self._held.keys() | self._files.keys() | self._without_room
        return next((name for name in self._names if name not in done), None)

    def derive(
        self, recipe: Recipe, state: State, entry: Entry, resident: Resident | None, device: torch.device
    ) -> None:
        """Compute what belongs to one weight, and keep it if there is room."""
        prepare = cast("Any", methods.load(recipe.method)).prepare
        layout = recipe.layout(entry, state.totals.count)
        with SlotFiles(state, resident) as files:
            read = files.read(entry.name, 0, entry.elements, layout, whole=True)
        slots = {slot: values.to(device) for slot, values in read.items()}
        first = next(iter(slots.values()))
        found: Slots = {}
        if bool(first.any()) and math.isfinite(linalg.dot32(first, first)):
            derived = prepare(slots, **methods.accepted(prepare, recipe.knobs))
            found = {slot: values.cpu() for slot, values in derived.items() if slot not in slots}
        self._put(entry.name, found)

    def _put(self, name: str, slots: Slots) -> None:
        size = sum(values.numel() * values.element_size() for values in slots.values())
        if self._held_bytes + size <= self._memory:
            self._held[name] = slots
            self._held_bytes += size
        elif self._file_bytes + size <= self._disk:
            self._files[name] = self._write(self._names.index(name), slots)
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
            reached("prepared")
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
