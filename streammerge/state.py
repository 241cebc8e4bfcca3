"""A method's state on disk: one safetensors file for each slot and file of the base, and the statistics.

Slots lie in the order in which the base is processed, so that both reading and writing run front to back and
every byte is hashed on the way. Knows nothing of methods beyond the layout of what they remember.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from streammerge import linalg, machine, plan
from streammerge.errors import Damaged, Refused
from streammerge.headers import Incomplete, WeightsSet
from streammerge.weights import CODES, Weights, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from streammerge.linalg import Delta
    from streammerge.methods import Layout, Slots, Totals

Figures = tuple[float, float, float]  # of a delta: ||.||_F, ||.^T .||_F, largest singular value
NOTHING: Figures = (0.0, 0.0, 0.0)

STATISTICS = "statistics.safetensors"
ROLL_BACK = "roll back to a version that verifies"


@dataclass(frozen=True)
class State:
    """A method's state on disk.

    `hashes` are the sha256 of its files, by name; there are none before the first fold.
    """

    folder: Path
    hashes: Mapping[str, str]
    totals: Totals
    digest: str = ""

    def has_slots(self) -> bool:
        """Whether anything was folded yet; otherwise every slot is zero."""
        return self.totals.count > 0


class Resident:
    """A state kept in memory from one fold to the next, weight by weight in place of the older one."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._slots: dict[tuple[str, str], Tensor] = {}
        self._hashes: Mapping[str, str] = {}

    def holds(self, state: State) -> bool:
        """Whether what is kept is this state and no other, whole: by its content, wherever it lies."""
        return bool(self._slots) and self._hashes == _of_slots(state.hashes)

    def disown(self, *, forget: bool = False) -> None:
        """From now on what is kept is a mixture, until `own`; or nothing at all."""
        self._hashes = {}
        if forget:
            self._slots.clear()

    def own(self, hashes: Mapping[str, str]) -> None:
        """Everything kept is what was written to files of these hashes."""
        self._hashes = _of_slots(hashes)

    def read(self, slot: str, name: str, start: int, stop: int, *, whole: bool) -> Tensor:
        """Give elements [start, stop) of one weight's slot, or all of it, flat."""
        values = self._slots[slot, name]
        return values if whole else values[start:stop]

    def put(
        self, slot: str, name: str, start: int, elements: int, values: Tensor, where: torch.device
    ) -> None:
        """Keep a weight, or a panel of one, on a device."""
        if start == 0 and values.numel() == elements:
            self._slots[slot, name] = values.reshape(-1).to(where)
            return
        if (slot, name) not in self._slots:
            self._slots[slot, name] = torch.empty(elements, dtype=values.dtype, device=where)
        self._slots[slot, name][start : start + values.numel()] = values.reshape(-1).to(where)


def _of_slots(hashes: Mapping[str, str]) -> dict[str, str]:
    """Leave out the statistics, which are not kept in memory."""
    return {name: digest for name, digest in hashes.items() if name != STATISTICS}


class StateShard:
    """The state of one of the base's files: read from the old state, written to the new one.

    Each slot has a file of its own, which holds the weights that have this slot.
    """

    def __init__(
        self,
        old: State,
        out: Path,
        number: int,
        layouts: Sequence[Mapping[str, Layout]],
        resident: Resident | None,
        lane: Callable[[Tensor], Tensor],
    ) -> None:
        """`layouts` say, before and after, what is remembered of each weight, in the order of processing.

        With `resident` the old values come from memory, else they are brought along `lane`.
        """
        self.hashes: dict[str, str] = {}
        self._before, self._after = layouts
        self._old, self._number, self._stack, self._resident = old, number, ExitStack(), resident
        self._readers: dict[str, Weights] = {}
        self._writers: dict[str, Writer] = {}
        try:
            for slot, declared in _declared(self._before).items():
                if old.has_slots() and resident is None:
                    reader = open_sealed(old, self._file(slot), declared)
                    reader.bring = lane
                    self._readers[slot] = self._stack.enter_context(reader)
            for slot, declared in _declared(self._after).items():
                self._writers[slot] = self._stack.enter_context(Writer(out / self._file(slot), declared))
        except BaseException:
            self._stack.close()
            raise

    def _file(self, slot: str) -> str:
        return f"{slot}-{self._number + 1:05d}.safetensors"

    def __enter__(self) -> Self:
        return self

    @property
    def source(self) -> str:
        """Say where the old values come from."""
        return ", ".join(str(self._old.folder / self._file(slot)) for slot in self._writers)

    def elements(self, slot: str, name: str) -> int:
        """How many numbers the new slot of a weight holds."""
        return math.prod(self._after[name][slot][1])

    def read(self, name: str, start: int, stop: int, *, whole: bool) -> Slots:
        """Give the old values: from memory, from the old file, or zeros before the first fold.

        In the slots' shapes for a weight that is processed whole, else the panel's, flat.
        """
        found = {}
        for slot, (dtype, shape) in self._before[name].items():
            if self._resident is not None:
                values = self._resident.read(slot, name, start, stop, whole=whole)
            elif slot in self._readers:
                values = self._readers[slot].read(name, *(() if whole else (start, stop)))
            else:
                values = torch.zeros(math.prod(shape) if whole else stop - start, dtype=dtype)
            found[slot] = values.reshape(shape) if whole else values
        return found

    def write(self, name: str, slots: Slots) -> None:
        """Append to the new files."""
        for slot, values in slots.items():
            dtype, _ = self._after[name][slot]
            assert values.dtype == dtype, (name, slot, values.dtype)
            self._writers[slot].write(name, values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        damage = (
            next((d for slot in self._readers if (d := self._damage(slot))), None) if kind is None else None
        )
        if damage:
            self._stack.__exit__(Damaged, damage, None)  # so that the writers do not finish
            raise damage
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self.hashes = {self._file(slot): writer.sha256 for slot, writer in self._writers.items()}

    def _damage(self, slot: str) -> Damaged | None:
        return damage_of(self._readers[slot], self._old, self._file(slot))


def _declared(layouts: Mapping[str, Layout]) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """What each slot's file holds: (name, dtype, shape), in the order of the weights."""
    files: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for name, layout in layouts.items():
        for slot, (dtype, shape) in layout.items():
            files.setdefault(slot, []).append((name, CODES[dtype], shape))
    return files


class SlotFiles:
    """A state open for reading in any order: from memory if it lies there, else from its files."""

    def __init__(self, state: State, resident: Resident | None) -> None:
        """Open every file of every slot."""
        self._stack, self._resident = ExitStack(), resident
        self._files: dict[str, Weights] = {}
        shards: dict[str, list[Path]] = {}
        for path in sorted(state.folder.glob("*-?????.safetensors")):
            shards.setdefault(path.name.rsplit("-", 1)[0], []).append(path)
        try:
            for slot, paths in shards.items() if resident is None else ():
                self._files[slot] = self._stack.enter_context(Weights(WeightsSet(tuple(paths))))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def read(self, name: str, start: int, stop: int, layout: Layout, *, whole: bool) -> Slots:
        """Give a weight's slots in their shapes, or one panel of them, flat."""
        found = {}
        for slot, (_, shape) in layout.items():
            if self._resident is not None:
                values = self._resident.read(slot, name, start, stop, whole=whole)
            else:
                values = self._files[slot].read(name, *(() if whole else (start, stop)))
            found[slot] = values.reshape(shape) if whole else values
        return found


def open_sealed(
    state: State, file_name: str, declared: Sequence[tuple[str, str, tuple[int, ...]]]
) -> Weights:
    """Open a file of a sealed state, to be read front to back; Damaged for another than was written."""
    path = state.folder / file_name
    try:
        with machine.errors("reading a state", path):
            found = Weights(WeightsSet((path,)), whole=True)
    except (OSError, Refused, Incomplete) as exc:
        raise Damaged(f"{path} cannot be read: {exc}", hint=ROLL_BACK) from exc
    if [(e.name, e.dtype, e.shape) for e in found.entries.values()] != list(declared):
        found.__exit__(None, None, None)
        raise Damaged(f"{path} does not hold the weights it was sealed with", hint=ROLL_BACK)
    return found


def damage_of(found: Weights, state: State, file_name: str) -> Damaged | None:
    """Compare what was read with what was sealed."""
    if found.file_digest() == state.hashes.get(file_name):
        return None
    return Damaged(f"{state.folder / file_name} does not have the content it was sealed with", hint=ROLL_BACK)


def statistics_of(delta: Delta, shape: tuple[int, ...], squares: float, *, is_spectral: bool) -> Figures:
    """Figures of one weight's delta, or of a panel's, that cannot be had later; `squares` is its ||.||^2."""
    if is_spectral:
        return linalg.statistics(delta)
    if len(shape) <= 1:
        return math.sqrt(squares), squares, math.sqrt(squares)
    return math.sqrt(squares), math.nan, math.nan


def combine(one: Figures, other: Figures) -> Figures:
    """Put two parts of one weight together; exact for norms, and for vectors' other figures."""
    squares = one[0] ** 2 + other[0] ** 2
    if math.isnan(one[1]):
        return math.sqrt(squares), math.nan, math.nan
    return math.sqrt(squares), squares, math.sqrt(squares)


def read_statistics(state: State, kinds: plan.Plan) -> dict[str, Tensor]:
    """Read the figures of all that was folded: weight -> [fine-tunes, 3] float64; Damaged if changed."""
    if not state.has_slots():
        return dict.fromkeys(kinds.merged, torch.empty(0, 3, dtype=torch.float64))
    declared = [(name, "F64", (state.totals.count, 3)) for name in kinds.merged]
    with open_sealed(state, STATISTICS, declared) as found:
        figures = {name: found.read(name) for name in found.entries}
        if damage := damage_of(found, state, STATISTICS):
            raise damage
    return figures


def without(figures: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Leave out the figures of one fine-tune."""
    return {name: torch.cat([rows[:index], rows[index + 1 :]]) for name, rows in figures.items()}


def delta_norms(figures: Mapping[str, Tensor]) -> list[float]:
    """Length of every fine-tune's whole delta."""
    if not figures:
        return []
    return sum(rows[:, 0].square() for rows in figures.values()).sqrt().tolist()  # type: ignore[union-attr]


def write_statistics(
    out: Path, figures: Mapping[str, Tensor], kinds: plan.Plan, latest: Mapping[str, Figures] | None = None
) -> str:
    """Write the figures of all fine-tunes: weight -> [fine-tunes, 3] float64. Gives the file's sha256.

    latest  weight -> those of one more, which `figures` does not hold
    """
    more = 0 if latest is None else 1
    declared = [(name, "F64", (len(figures[name]) + more, 3)) for name in kinds.merged]
    with Writer(out / STATISTICS, declared) as writer:
        for name in kinds.merged:
            writer.write(name, figures[name])
            if latest is not None:
                writer.write(name, torch.tensor(latest[name], dtype=torch.float64))
    return writer.sha256
