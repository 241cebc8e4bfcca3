"""One fine-tune going through the method, weight by weight: into a state, or out of it, and what was seen."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from streammerge import linalg, methods, plan, samples
from streammerge.errors import Damaged, Refused
from streammerge.headers import ITEM_BYTES
from streammerge.state import NOTHING, ROLL_BACK, combine, statistics_of
from streammerge.streams import ahead
from streammerge.weights import element_panels

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from torch import Tensor

    from streammerge.arriving import Arriving, Cuts
    from streammerge.linalg import Delta, Read
    from streammerge.methods import Arrival, Slots
    from streammerge.state import Figures, StateShard
    from streammerge.weights import Weights

SMALLEST_SIDE = 16  # of a matrix of which one direction can be too much
RETRAIN = "a fine-tune moves its base by a few percent; check that it was trained from this base"


@dataclass
class Measured:
    """What one fold saw, summed over weights in float64.

    delta_norm, state_norm  Frobenius norms over floating-point weights, tied ones once
    kept_energy     share of ||delta||^2 of projected weights that entered the state
    orthogonality   largest |<P, D>| / (||P|| ||D||) over projected weights; P what was added to the sum D
    tally           sum of the method's `tally`
    statistics      weight -> (||delta||_F, ||delta^T delta||_F, largest singular value); the latter NaN for
                    matrices that are not seen as such
    earlier         lengths of the deltas that were folded before
    cosine          of the angle between the delta and the sum of those; None where no sum is kept
    top_share       largest share of a matrix's ||delta||^2 in one singular direction, and that matrix;
                    adapters, of low rank as they are, and matrices not seen as such are left out
    base_squares    ||base||^2 of the weights that are watched
    sample          a few elements, see `samples`
    """

    delta_squares: float = 0.0
    state_squares: float = 0.0
    projected_squares: float = 0.0
    step_squares: float = 0.0
    tally: float = 0.0
    orthogonality: float = 0.0
    statistics: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    earlier: list[float] = field(default_factory=list)
    along_sum: float = 0.0
    sum_squares: float = 0.0
    top_share: tuple[float, str] | None = None
    base_squares: dict[str, float] = field(default_factory=dict)
    sampled: list[Tensor] = field(default_factory=list)

    @property
    def delta_norm(self) -> float:
        """Length of the fine-tune's delta."""
        return math.sqrt(self.delta_squares)

    @property
    def state_norm(self) -> float:
        """Length of the method's first slot."""
        return math.sqrt(self.state_squares)

    @property
    def kept_energy(self) -> float:
        """1.0 where nothing was projected away."""
        return self.step_squares / self.projected_squares if self.projected_squares else 1.0

    @property
    def moved(self) -> dict[str, float]:
        """How far each watched weight moved, in its own lengths; not of weights that are zero in the base."""
        squares = {name: found for name, found in self.base_squares.items() if found}
        return {name: self.statistics[name][0] / math.sqrt(found) for name, found in squares.items()}

    @property
    def cosine(self) -> float | None:
        """Angle to what was merged before."""
        lengths = self.delta_norm * math.sqrt(self.sum_squares)
        return self.along_sum / lengths if lengths else None

    @property
    def sample(self) -> bytes:
        """What other deltas are compared with."""
        return samples.packed(self.sampled)


@dataclass(frozen=True)
class Piece:
    """A weight, or a panel of one, read and not yet folded.

    original  as the base has it, flat
    delta     computes the fine-tune's delta of the base's values as float32; None where nothing is folded
    slots     the old state's
    source    where those lay
    prepared  what was derived from them before, where it was
    """

    name: str
    start: int
    stop: int
    original: Tensor
    delta: Read | None = None
    slots: Slots = field(default_factory=dict)
    source: str = ""
    prepared: Slots | None = None
    sidecar: Tensor | None = None
    cuts: Cuts = ((), ())


@dataclass
class Folding:
    """The weights of one fine-tune on their way, in the order in which the base is read.

    base    read front to back, and hashed
    again   the base once more, read at random
    passed  is given every value that was read of the base, and gives it back
    read    is told how many bytes were read of the fine-tune
    put     keeps a part of the new state: slot, weight, first element, elements in all, values; or None
    serve   renders what is folded into the model to be: a piece, its new slots, its figures; or None where
            rendering must wait until all is folded
    prepared  gives what was derived from a weight's old slots before, if it was
    watched   weights whose own length in the base is wanted too
    """

    arriving: Arriving
    base: Weights
    again: Weights
    passed: Callable[[Tensor], Tensor]
    read: Callable[[int], None]
    put: Callable[[str, str, int, int, Tensor], None] | None = None
    serve: Callable[[Piece, Slots, Figures], None] | None = None
    prepared: Callable[[str], Slots | None] = lambda _name: None
    watched: Container[str] = ()
    measured: Measured = field(default_factory=Measured)

    def shard(self, names: Iterable[str], shard: StateShard) -> None:
        """Fold the weights of one of the base's files: what comes next is read while one is computed."""
        with closing(ahead(self._pieces(names, shard), self.arriving.recipe.depth)) as pieces:
            for piece in pieces:
                if piece.delta is not None:
                    self._fold(piece, shard)
                elif self.serve is not None:
                    self.serve(piece, {}, NOTHING)

    def _pieces(self, names: Iterable[str], shard: StateShard) -> Iterator[Piece]:
        """Read weight by weight, whole or panel by panel. On the reading thread: computes thresholds only."""
        for name in names:
            entry = self.base.entries[name]
            if not self.arriving.recipe.plan.is_merged(name):
                for start, stop in element_panels(entry.elements):
                    yield Piece(name, start, stop, self.passed(self.base.read(name, start, stop)))
                continue
            whole, cuts = self.arriving.is_whole(name), self.arriving.cuts_of(self.again, name)
            for start, stop in plan.parts(entry, whole=whole):
                original = self.passed(self.base.read(name, start, stop))
                delta = self.arriving.read(name, start, stop)
                self.read((stop - start) * ITEM_BYTES[entry.dtype])
                slots = shard.read(name, start, stop, whole=whole)
                prepared = self.prepared(name) if whole else None
                sidecar = self.arriving.sidecar(name, start, stop)
                yield Piece(name, start, stop, original, delta, slots, shard.source, prepared, sidecar, cuts)

    def _fold(self, piece: Piece, shard: StateShard) -> None:
        """Fold one piece, and hand on what came of it."""
        name, arriving = piece.name, self.arriving
        entry, whole = self.base.entries[name], arriving.is_whole(name)
        assert piece.delta is not None
        arriving.settle(whole)
        original = piece.original.to(arriving.device, torch.float32)
        delta = piece.delta(original.reshape(entry.shape) if whole else original)
        if name in self.watched:
            length = linalg.dot32(original, original)
            self.measured.base_squares[name] = self.measured.base_squares.get(name, 0.0) + length
        del original
        is_spectral = arriving.recipe.needs_spectra(name)
        squares = linalg.squares(delta) if isinstance(delta, linalg.LowRank) else linalg.dot32(delta, delta)
        if not math.isfinite(squares):
            raise Refused(
                "non-finite",
                f"{name} holds NaN or infinite values",
                hint="the training run diverged; publish a good checkpoint",
            )
        figures = statistics_of(delta, entry.shape, squares, is_spectral=is_spectral)
        self._sample(piece, delta, figures)
        slots = {slot: values.to(arriving.device) for slot, values in piece.slots.items()}
        arrival = arriving.arrival(entry, piece.start, delta, piece.sidecar, piece.cuts)
        new = self._step(slots, piece, arrival, squares, whole=whole)
        del delta, arrival, slots
        shard.write(name, new)
        for slot, values in new.items() if self.put is not None else ():
            cast("Any", self.put)(slot, name, piece.start, shard.elements(slot, name), values)
        if self.serve is not None:
            self.serve(piece, new, figures)
        so_far = self.measured.statistics.get(name)
        self.measured.statistics[name] = figures if so_far is None else combine(so_far, figures)

    def _sample(self, piece: Piece, delta: Delta, figures: Figures) -> None:
        """Take what the screens judge by and cannot be had later."""
        name, entry = piece.name, self.base.entries[piece.name]
        chosen = samples.places(entry.elements, len(self.arriving.recipe.plan.merged))
        self.measured.sampled.append(samples.taken(delta, piece.start, piece.stop, chosen, entry.elements))
        is_matrix = self.arriving.recipe.needs_spectra(name) and not isinstance(delta, linalg.LowRank)
        if is_matrix and figures[0] and min(entry.shape) >= SMALLEST_SIDE:
            share = (figures[2] / figures[0]) ** 2
            self.measured.top_share = max(self.measured.top_share or (0.0, ""), (share, name))

    def _step(self, slots: Slots, piece: Piece, arrival: Arrival, squares: float, *, whole: bool) -> Slots:
        """Run the method on one weight or panel and take the health figures."""
        recipe, measured = self.arriving.recipe, self.measured
        method = methods.load(recipe.method)
        first = next(iter(slots))
        old = slots[first]
        old_squares = linalg.dot32(old, old)
        if first == "sum" and squares and old_squares:
            measured.along_sum += along(arrival.delta, old)
        if not math.isfinite(old_squares):
            raise Damaged(f"{arrival.name} in {piece.source} is NaN or infinite", hint=ROLL_BACK)
        prepare = getattr(method, "prepare", None)
        if prepare and whole and squares and old_squares:
            if piece.prepared is None:
                slots = prepare(slots, **methods.accepted(prepare, recipe.knobs))
            else:
                slots |= {key: values.to(old.device) for key, values in piece.prepared.items()}
        step = cast("Any", method).unfold if self.arriving.is_leaving else method.fold
        new: Slots = step(slots, arrival, **methods.accepted(step, recipe.knobs))
        self.arriving.beat()
        new_squares = linalg.dot32(new[first], new[first])
        if not math.isfinite(new_squares):
            raise Refused("implausible", f"the sum of {arrival.name} leaves float32's range", hint=RETRAIN)
        measured.delta_squares += squares
        measured.sum_squares += old_squares if first == "sum" else 0.0
        measured.state_squares += new_squares
        if (tally := getattr(method, "tally", None)) is not None:
            measured.tally += tally(new)
        if arrival.kind == plan.PROJECTED and first == "sum":
            step_squares, share = progress_of(old, new[first], old_squares)
            measured.projected_squares += squares
            measured.step_squares += step_squares
            measured.orthogonality = max(measured.orthogonality, share)
        return new


def along(delta: Delta, matrix: Tensor) -> float:
    """<delta, matrix>, as exact as a length needs."""
    if isinstance(delta, linalg.LowRank):
        return linalg.inner(delta, matrix)
    return linalg.dot32(delta, matrix)


def progress_of(old: Tensor, new: Tensor, old_squares: float) -> tuple[float, float]:
    """Squared length of what a sum grew by, and |cos| of the angle between that and the sum before."""
    step = new - old
    squares = linalg.dot32(step, step)
    if squares == 0.0 or old_squares == 0.0:
        return squares, 0.0
    return squares, abs(linalg.dot32(step, old)) / math.sqrt(squares * old_squares)
