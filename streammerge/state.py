"""A method's state on disk: one safetensors file for each slot and file of the base, and the statistics.

Slots are float32, in the order in which the base is processed, so that both reading and writing run front to
back and every byte is hashed on the way. Knows nothing of methods beyond their slots' names.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from streammerge import linalg, plan
from streammerge.errors import Damaged, Refused
from streammerge.headers import WeightsSet
from streammerge.weights import Weights, Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from streammerge.methods import Totals

STATISTICS = "statistics.safetensors"


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


class StateShard:
    """The state of one of the base's files: read from the old state, written to the new one.

    Each slot has a file of its own.
    """

    def __init__(
        self,
        slots: Iterable[str],
        old: State,
        out: Path,
        number: int,
        names: list[str],
        base: Weights,
        *,
        resident: bool,
    ) -> None:
        self.hashes: dict[str, str] = {}
        self._old, self._stack, self._resident = old, ExitStack(), resident
        self._names = {slot: f"{slot}-{number + 1:05d}.safetensors" for slot in slots} if names else {}
        self._readers: dict[str, Weights] = {}
        self._writers: dict[str, Writer] = {}
        try:
            for slot, file_name in self._names.items():
                if old.has_slots() and not resident:
                    self._readers[slot] = self._open(file_name)
                declared = [(name, "F32", base.entries[name].shape) for name in names]
                self._writers[slot] = self._stack.enter_context(Writer(out / file_name, declared))
        except BaseException:
            self._stack.close()
            raise

    def _open(self, file_name: str) -> Weights:
        path = self._old.folder / file_name
        try:
            return self._stack.enter_context(Weights(WeightsSet((path,)), whole=True))
        except (OSError, Refused) as exc:
            raise Damaged(
                f"{path} cannot be read: {exc}", hint="roll back to a version that verifies"
            ) from exc

    def __enter__(self) -> Self:
        return self

    def read(
        self, slot: str, name: str, start: int, stop: int, resident: Mapping[tuple[str, str], Tensor]
    ) -> Tensor:
        """Give the old values: from memory, from the old file, or zeros before the first fold."""
        if self._resident:
            return resident[slot, name][start:stop]
        if slot in self._readers:
            return self._readers[slot].read(name, start, stop)
        return torch.zeros(stop - start)

    def write(self, slot: str, name: str, values: Tensor) -> None:
        """Append to the new file."""
        self._writers[slot].write(name, values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and (damage := self._damage()):
            self._stack.__exit__(Damaged, damage, None)  # so that the writers do not finish
            raise damage
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self.hashes = {self._names[slot]: writer.sha256 for slot, writer in self._writers.items()}

    def _damage(self) -> Damaged | None:
        """Compare what was read with what was sealed."""
        for slot, reader in self._readers.items():
            file_name = self._names[slot]
            if reader.file_digest() != self._old.hashes[file_name]:
                return Damaged(
                    f"{self._old.folder / file_name} does not have the content it was sealed with",
                    hint="roll back to a version that verifies",
                )
        return None


def statistics_of(
    delta: Tensor, kind: str, shape: tuple[int, ...], squares: float
) -> tuple[float, float, float]:
    """Figures of one weight's delta that `finalize` and the screens need and that cannot be had later."""
    if kind == plan.PROJECTED:
        return linalg.statistics(delta)
    if len(shape) <= 1:
        return math.sqrt(squares), squares, math.sqrt(squares)
    return math.sqrt(squares), math.nan, math.nan


def combine(parts: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Put the panels of one weight together; exact for norms, and for vectors' other figures."""
    if len(parts) == 1:
        return parts[0]
    squares = sum(norm**2 for norm, _, _ in parts)
    is_vector = not math.isnan(parts[0][1])
    return (
        math.sqrt(squares),
        squares if is_vector else math.nan,
        math.sqrt(squares) if is_vector else math.nan,
    )


def write_statistics(
    old: State, out: Path, latest: Mapping[str, tuple[float, float, float]], kinds: plan.Plan
) -> str:
    """Append the latest fine-tune's figures: weight -> [fine-tunes, 3] float64. Gives the file's sha256."""
    earlier: dict[str, Tensor] = {}
    path = old.folder / STATISTICS
    if old.has_slots():
        with Weights(WeightsSet((path,)), whole=True) as found:
            earlier = {name: found.read(name) for name in found.entries}
            if found.file_digest() != old.hashes[STATISTICS]:
                raise Damaged(
                    f"{path} does not have the content it was sealed with",
                    hint="roll back to a version that verifies",
                )
    rows = {
        name: torch.cat(
            [
                earlier.get(name, torch.empty(0, 3, dtype=torch.float64)),
                torch.tensor([latest[name]], dtype=torch.float64),
            ]
        )
        for name in kinds.merged
    }
    with Writer(
        out / STATISTICS, [(name, "F64", tuple(values.shape)) for name, values in rows.items()]
    ) as writer:
        for name, values in rows.items():
            writer.write(name, values)
    return writer.sha256
