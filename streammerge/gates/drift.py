"""How far did the weights move? From the base as the engine says, from the version being served as read.

Both models stream, weight by weight in panels, past the page cache; every weight of floats must be finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge import snapshots
from streammerge.config.gates import Limit
from streammerge.errors import Refused
from streammerge.headers import find
from streammerge.linalg import dot32
from streammerge.measuring import Measurement
from streammerge.weights import Weights, element_panels

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config.gates import DriftGate
    from streammerge.gates import Bench

ALWAYS = {"finite": Limit(min=1)}
COMPARES = True


@dataclass
class Moved:
    """Squared lengths of one weight, or of all: of the change and of what was there; values not finite."""

    change: float = 0.0
    before: float = 0.0
    not_finite: int = 0

    def add(self, other: Moved) -> None:
        """Count another part."""
        self.change += other.change
        self.before += other.before
        self.not_finite += other.not_finite

    @property
    def ratio(self) -> float:
        """Length of the change in lengths of what was there; what was zero has none."""
        return math.sqrt(self.change / self.before) if self.before else 0.0


def measure(gate: DriftGate, snapshot: Path, bench: Bench) -> Measurement | str:
    """Read the snapshot's model and, where there is one, the served one's beside it."""
    manifest = snapshots.read(snapshot).manifest
    norm = manifest["health"]["merged_norm"]
    figures = {"delta_norm": norm, "delta_ratio": norm / bench.base_norm if bench.base_norm else math.nan}
    beside = bench.current or snapshot
    try:
        with (
            Weights(find(snapshot / "model"), once=True) as ours,
            Weights(find(beside / "model"), once=True) as theirs,
        ):
            moved = {name: _moved(name, ours, theirs, bench.beat) for name in _floating(ours)}
    except Refused as exc:
        return exc.message
    whole = Moved()
    for part in moved.values():
        whole.add(part)
    largest = max(moved, key=lambda name: moved[name].ratio, default="")
    figures |= {
        "change": whole.ratio,
        "largest_change": moved[largest].ratio if largest else 0.0,
        "finite": float(not whole.not_finite),
    }
    notes = {"largest_change": largest} if largest else {}
    if sick := next((name for name, part in moved.items() if part.not_finite), None):
        notes["finite"] = f"{whole.not_finite} values are NaN or infinite, the first in {sick}"
    return Measurement(figures, notes)


def _floating(weights: Weights) -> list[str]:
    return [name for name, entry in weights.entries.items() if entry.is_floating]


def _moved(name: str, ours: Weights, theirs: Weights, beat: Callable[[], None]) -> Moved:
    """Read one weight of both models, panel by panel."""
    found = Moved()
    for start, stop in element_panels(ours.entries[name].elements):
        new, old = ours.read(name, start, stop).float(), theirs.read(name, start, stop).float()
        step = new - old
        change = dot32(step, step)
        sick = 0 if math.isfinite(change) else int((~new.isfinite()).sum())
        found.add(Moved(change, dot32(old, old), sick))
        beat()
    return found
