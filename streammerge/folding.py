"""One fine-tune going through the method, weight by weight: into a state, or out of it, and what was seen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from streammerge import linalg, methods, plan
from streammerge.errors import Damaged, Refused
from streammerge.headers import DTYPES
from streammerge.state import ROLL_BACK, combine, statistics_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from streammerge.arriving import Arriving
    from streammerge.methods import Arrival, Slots
    from streammerge.state import StateShard
    from streammerge.weights import Weights

RETRAIN = "a fine-tune moves its base by a few percent; check that it was trained from this base"


@dataclass
class Measured:
    """What one fold saw, summed over weights in float64.

    delta_norm, base_norm, state_norm  Frobenius norms over floating-point weights, tied ones once
    kept_energy     share of ||delta||^2 of projected weights that entered the state
    orthogonality   largest |<P, D>| / (||P|| ||D||) over projected weights; P what was added to the sum D
    tally           sum of the method's `tally`
    statistics      weight -> (||delta||_F, ||delta^T delta||_F, largest singular value);
                    NaN for added matrices
    """

    delta_squares: float = 0.0
    base_squares: float = 0.0
    state_squares: float = 0.0
    projected_squares: float = 0.0
    step_squares: float = 0.0
    tally: float = 0.0
    orthogonality: float = 0.0
    statistics: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def delta_norm(self) -> float:
        """Length of the fine-tune's delta."""
        return math.sqrt(self.delta_squares)

    @property
    def base_norm(self) -> float:
        """Length of the base."""
        return math.sqrt(self.base_squares)

    @property
    def state_norm(self) -> float:
        """Length of the method's first slot."""
        return math.sqrt(self.state_squares)

    @property
    def kept_energy(self) -> float:
        """1.0 where nothing was projected away."""
        return self.step_squares / self.projected_squares if self.projected_squares else 1.0


@dataclass
class Folding:
    """The weights of one fine-tune on their way, in the order in which the base is read.

    base    read front to back, and hashed
    again   the base once more, read at random
    passed  is given every value that was read of the base, and gives it back
    read    is told how many bytes were read of the fine-tune
    put     keeps a part of the new state: slot, weight, first element, elements in all, values; or None
    """

    arriving: Arriving
    base: Weights
    again: Weights
    passed: Callable[[Tensor], Tensor]
    read: Callable[[int], None]
    put: Callable[[str, str, int, int, Tensor], None] | None
    measured: Measured = field(default_factory=Measured)

    def weight(self, name: str, shard: StateShard) -> None:
        """Fold one weight, whole where it is projected, else panel by panel."""
        entry, kind = self.base.entries[name], self.arriving.recipe.plan.kinds[name]
        cuts = self.arriving.cuts_of(self.again, name)
        figures = []
        for start, stop in plan.parts(entry, kind):
            whole = kind == plan.PROJECTED
            original = self.passed(self.base.read(name, start, stop)).to(self.arriving.device, torch.float32)
            original = original.reshape(entry.shape if whole else (stop - start,))
            self.measured.base_squares += linalg.dot(original, original)
            delta = self.arriving.delta(name, start, stop, original)
            del original
            self.read((stop - start) * DTYPES[entry.dtype].itemsize)
            squares = linalg.squares(delta)
            if not math.isfinite(squares):
                raise Refused(
                    "non-finite",
                    f"{name} holds NaN or infinite values",
                    hint="the training run diverged; publish a good checkpoint",
                )
            figures.append(statistics_of(delta, kind, entry.shape, squares))
            found = shard.read(name, start, stop, whole=whole)
            slots = {slot: values.to(self.arriving.device) for slot, values in found.items()}
            arrival = self.arriving.arrival(self.base, name, start, stop, delta, cuts)
            new = self._step(slots, shard.source, arrival, squares)
            del delta, arrival
            shard.write(name, new)
            for slot, values in new.items() if self.put is not None else ():
                cast("Any", self.put)(slot, name, start, shard.elements(slot, name), values)
        self.measured.statistics[name] = combine(figures)

    def _step(self, slots: Slots, source: str, arrival: Arrival, squares: float) -> Slots:
        """Run the method on one weight or panel and take the health figures; `source` is where slots lay."""
        recipe, measured = self.arriving.recipe, self.measured
        method = methods.load(recipe.method)
        first = next(iter(slots))
        old = slots[first]
        old_squares = linalg.dot(old, old)
        if not math.isfinite(old_squares):
            raise Damaged(f"{arrival.name} in {source} is NaN or infinite", hint=ROLL_BACK)
        prepare = getattr(method, "prepare", None)
        if prepare and arrival.kind == plan.PROJECTED and squares and bool(old.any()):
            slots = prepare(slots, **methods.accepted(prepare, recipe.knobs))
        step = cast("Any", method).unfold if self.arriving.is_leaving else method.fold
        new: Slots = step(slots, arrival, **methods.accepted(step, recipe.knobs))
        self.arriving.beat()
        new_squares = linalg.dot(new[first], new[first])
        if not math.isfinite(new_squares):
            raise Refused("implausible", f"the sum of {arrival.name} leaves float32's range", hint=RETRAIN)
        measured.delta_squares += squares
        measured.state_squares += new_squares
        if (tally := getattr(method, "tally", None)) is not None:
            measured.tally += tally(new)
        if arrival.kind == plan.PROJECTED and first == "sum":
            step_squares, share = progress_of(old, new[first], old_squares)
            measured.projected_squares += squares
            measured.step_squares += step_squares
            measured.orthogonality = max(measured.orthogonality, share)
        return new


def progress_of(old: Tensor, new: Tensor, old_squares: float) -> tuple[float, float]:
    """Squared length of what a sum grew by, and |cos| of the angle between that and the sum before."""
    step = new - old
    squares = linalg.dot(step, step)
    if squares == 0.0 or old_squares == 0.0:
        return squares, 0.0
    return squares, abs(linalg.dot(step, old)) / math.sqrt(squares * old_squares)
