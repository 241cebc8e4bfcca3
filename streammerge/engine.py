"""Streams weights through a method, on CPU or GPU: folds a fine-tune into a state, renders it as a model.

Two passes, because OPCM's scale is known only when every weight was folded: the first reads base, fine-tune
and state and writes the next state; the second reads base and state and writes what servers load. A projected
weight is held whole; everything else streams in panels. Totals are summed in float64. Knows nothing of
versions, sources or verdicts: what it measures it returns.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from streammerge import linalg, methods, plan
from streammerge.arriving import Arriving
from streammerge.errors import ConfigError, Damaged, Refused, TryAgain
from streammerge.furnish import read_config
from streammerge.headers import CODES, DTYPES, Incomplete, find
from streammerge.methods import Totals
from streammerge.plan import Recipe
from streammerge.rendering import Rendering
from streammerge.state import (
    ROLL_BACK,
    STATISTICS,
    Resident,
    State,
    StateShard,
    appended,
    combine,
    delta_norms,
    read_statistics,
    statistics_of,
    without,
    write_statistics,
)
from streammerge.weights import Weights, Writer, element_panels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from streammerge import finalize
    from streammerge.arriving import Incoming
    from streammerge.methods import Arrival, Slots


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


class Engine:
    """Holds the device, and between folds the state where it fits there (`residency`)."""

    def __init__(
        self,
        *,
        device: str = "auto",
        threads: int | None = None,
        residency: str = "auto",
        beat: Callable[[], None] = lambda: None,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """`beat` is called between weights and panels and may raise errors.Stopped.

        `progress` is told how many bytes were read.
        """
        return_freed_memory()
        self.device = choose_device(device)
        if threads:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.residency = residency
        self._memory = torch.device("cpu") if residency == "host" else self.device
        self.beat = beat
        self.progress = progress
        self._resident = Resident()
        self._proven_base = ""  # stamp of the base as it was last read whole and found to be the store's

    def open_base(self, path: Path, added: tuple[str, ...]) -> tuple[Recipe, float]:
        """Read a base once: its digest, the kind of every weight, its norm.

        Method and knobs are the caller's. Raises ConfigError for a base that cannot be merged into.
        """
        try:
            with Weights(find(path), hashing=True) as base:
                squares = 0.0
                for name, entry in base.entries.items():
                    if not entry.is_floating and entry.dtype.startswith("F8"):
                        raise ConfigError(f"base {path}: {name} is quantised ({entry.dtype})", hint=FULL_BASE)
                    for start, stop in element_panels(entry.elements):
                        values = base.read(name, start, stop)
                        squares += linalg.dot(*[values.float()] * 2) if entry.is_floating else 0.0
                        self._pass(values)
                    if not math.isfinite(squares):
                        raise ConfigError(
                            f"base {path}: {name} holds NaN or infinite values", hint="repair the base"
                        )
                config = read_config(path)
                if config.get("quantization_config"):
                    raise ConfigError(f"base {path} is quantised by its config.json", hint=FULL_BASE)
                return Recipe(path, base.content_digest(), plan.make(base, config, added), "", {}), math.sqrt(
                    squares
                )
        except (OSError, Refused, Incomplete) as exc:
            raise ConfigError(
                f"base {path} cannot be read: {exc}", hint="`base` is a model folder or one .safetensors file"
            ) from exc

    def fold(self, recipe: Recipe, incoming: Incoming, old: State, out: Path) -> tuple[State, Measured]:
        """Fold one fine-tune into `old` and write the next state to the empty folder `out`.

        Raises Refused for values that are not finite, Damaged where base or state differ from what they were.
        """
        state, measured = self._pass_through(recipe, incoming, old, out, old.totals.count + 1)
        totals = old.totals.after(measured.delta_norm, measured.state_norm, incoming.factor, measured.tally)
        statistics = appended(read_statistics(old, recipe.plan), measured.statistics)
        return self._finished(recipe, state, statistics, totals), measured

    def unfold(
        self, recipe: Recipe, incoming: Incoming, index: int, old: State, out: Path
    ) -> tuple[State, Measured]:
        """Take out the fine-tune that was folded as number `index`, from 0; the method must be able to.

        The totals are those that the others have. Raises as `fold` does.
        """
        statistics = without(read_statistics(old, recipe.plan), index)
        if old.totals.count == 1:
            return State(out, {}, Totals()), Measured()
        state, measured = self._pass_through(recipe, incoming, old, out, old.totals.count - 1)
        norms = delta_norms(statistics)
        totals = Totals(
            count=len(norms),
            factors=old.totals.factors - incoming.factor,
            mean_delta_norm=math.fsum(norms) / len(norms),
            max_delta_norm=max(norms),
            state_norm=measured.state_norm,
            tally=measured.tally,
        )
        return self._finished(recipe, state, statistics, totals), measured

    def _finished(
        self, recipe: Recipe, state: State, statistics: Mapping[str, Tensor], totals: Totals
    ) -> State:
        """Write the statistics of all that is folded now."""
        digest = write_statistics(state.folder, statistics, recipe.plan)
        return State(state.folder, {**state.hashes, STATISTICS: digest}, totals)

    def _pass_through(
        self, recipe: Recipe, incoming: Incoming, old: State, out: Path, count: int
    ) -> tuple[State, Measured]:
        """Run every weight through the method, into a state of `count` fine-tunes: one more, or one less."""
        self._settle_threads()
        measured = Measured()
        resident = self._resident if self._resident.holds(old) else None
        hashes: dict[str, str] = {}
        before = old.totals.count
        arriving = Arriving(
            recipe, incoming, min(count, before), self.device, self.beat, is_leaving=count < before
        )
        with self._open_base(recipe, hashing=True) as base, self._open_base(recipe) as again:
            arriving.survey(again)
            keep = self._keeps_state(recipe, base, count)
            self._resident.disown(forget=not keep and resident is None)
            for number, names in enumerate(plan.shards(base)):
                merged = [n for n in names if recipe.plan.kinds[n] in (plan.PROJECTED, plan.ADDED)]
                layouts = [
                    {name: recipe.layout(base.entries[name], folds) for name in merged}
                    for folds in (before, count)
                ]
                with StateShard(old, out, number, layouts, resident) as shard:
                    for name in names:
                        if name in merged:
                            self._fold_weight(arriving, (base, again), name, shard, measured, keep=keep)
                        else:
                            for start, stop in element_panels(base.entries[name].elements):
                                self._pass(base.read(name, start, stop))
                hashes |= shard.hashes
            self._prove_base(recipe, base)
        if keep:
            self._resident.own(out)
        return State(out, hashes, old.totals), measured

    def keep(self, digest: str) -> None:
        """The state just folded was sealed under `digest`: what lies on the device belongs to it."""
        self._resident.name(digest)

    def _open_base(self, recipe: Recipe, *, hashing: bool = False) -> Weights:
        """Open the base of the store: not there now is TryAgain, another one is Damaged."""
        try:
            base = Weights(find(recipe.base), hashing=hashing)
        except (OSError, Incomplete) as exc:
            raise TryAgain(f"base {recipe.base} cannot be read: {exc}", hint="is it mounted?") from exc
        except Refused as exc:
            raise Damaged(f"base {recipe.base} cannot be read: {exc}", hint=RESTORE_BASE) from exc
        if set(base.entries) != set(recipe.plan.kinds):
            base.__exit__(None, None, None)
            raise Damaged(
                f"base {recipe.base} has other weights than the store was made with", hint=RESTORE_BASE
            )
        return base

    def _prove_base(self, recipe: Recipe, base: Weights) -> None:
        """Having read it whole: this is the base that the store was made with, or Damaged."""
        if base.content_digest() != recipe.base_digest:
            raise Damaged(f"base {recipe.base} is not the one this store was made with", hint=RESTORE_BASE)
        self._proven_base = base.stamp

    def _keeps_state(self, recipe: Recipe, base: Weights, count: int) -> bool:
        """Decide whether the state stays in memory until the next fold."""
        if self.residency != "auto":
            return self.residency in ("device", "host")
        return self.device.type == "cuda" and recipe.state_bytes(base.entries, count) < (
            SHARE_OF_DEVICE * torch.cuda.mem_get_info(self.device)[0]
        )

    def _fold_weight(
        self,
        arriving: Arriving,
        bases: tuple[Weights, Weights],
        name: str,
        shard: StateShard,
        measured: Measured,
        *,
        keep: bool,
    ) -> None:
        """Fold one weight, whole where it is projected, else panel by panel."""
        recipe, (base, again) = arriving.recipe, bases
        entry, kind = base.entries[name], recipe.plan.kinds[name]
        cuts = arriving.cuts_of(again, name)
        figures = []
        for start, stop in plan.parts(entry, kind):
            shape = entry.shape if kind == plan.PROJECTED else (stop - start,)
            original = self._pass(base.read(name, start, stop)).to(self.device, torch.float32).reshape(shape)
            measured.base_squares += linalg.dot(original, original)
            delta = arriving.delta(name, start, stop, original)
            del original
            self.progress((stop - start) * DTYPES[entry.dtype].itemsize)
            squares = linalg.squares(delta)
            if not math.isfinite(squares):
                raise Refused(
                    "non-finite",
                    f"{name} holds NaN or infinite values",
                    hint="the training run diverged; publish a good checkpoint",
                )
            figures.append(statistics_of(delta, kind, entry.shape, squares))
            whole = kind == plan.PROJECTED
            found = shard.read(name, start, stop, whole=whole)
            slots = {slot: values.to(self.device) for slot, values in found.items()}
            arrival = arriving.arrival(base, name, start, stop, delta, cuts)
            new = self._step(arriving, slots, shard.source, arrival, squares, measured)
            del delta, arrival
            shard.write(name, new)
            if keep:
                for slot, values in new.items():
                    elements = shard.elements(slot, name)
                    self._resident.put(slot, name, start, elements, values, self._memory)
        measured.statistics[name] = combine(figures)

    def _step(
        self,
        arriving: Arriving,
        slots: Slots,
        source: str,
        arrival: Arrival,
        squares: float,
        measured: Measured,
    ) -> Slots:
        """Run the method on one weight or panel and take the health figures; `source` is where slots lay."""
        recipe = arriving.recipe
        method = methods.load(recipe.method)
        first = next(iter(slots))
        old = slots[first]
        old_squares = linalg.dot(old, old)
        if not math.isfinite(old_squares):
            raise Damaged(f"{arrival.name} in {source} is NaN or infinite", hint=ROLL_BACK)
        prepare = getattr(method, "prepare", None)
        if prepare and arrival.kind == plan.PROJECTED and squares and bool(old.any()):
            slots = prepare(slots, **methods.accepted(prepare, recipe.knobs))
        step = cast("Any", method).unfold if arriving.is_leaving else method.fold
        new: Slots = step(slots, arrival, **methods.accepted(step, recipe.knobs))
        self.beat()
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

    def render(
        self,
        recipe: Recipe,
        state: State,
        finish: finalize.Finalize,
        out: Path,
        dtype: torch.dtype | None = None,
        folded: Sequence[Incoming] = (),
    ) -> tuple[dict[str, str], float]:
        """Write base + finalize(render(state)) to the empty folder `out` under the base's file names.

        `folded` are all fine-tunes in their order, open, for methods that read them again. Returns the sha256
        of every file by name and the norm of the merged delta. Raises Refused where a weight does not fit
        into the base's dtype, Damaged where the base changed since it was folded.
        """
        self._settle_threads()
        hashes: dict[str, str] = {}
        squares = 0.0
        with ExitStack() as stack:
            base = stack.enter_context(self._open_base(recipe))
            again = stack.enter_context(self._open_base(recipe))
            is_proven = base.stamp == self._proven_base
            if not is_proven:
                base = stack.enter_context(self._open_base(recipe, hashing=True))
            resident = self._resident if self._resident.holds(state) else None
            rendering = Rendering(recipe, state, finish, again, resident, self.device)
            rendering.open(stack, folded, self.beat)
            for number, names in enumerate(plan.shards(base, dtype)):
                declared = [(n, self._served_dtype(base, n, dtype), base.entries[n].shape) for n in names]
                with Writer(out / base.set.files[number].name, declared) as writer:
                    for name, code, _ in declared:
                        for values, part in self._rendered(rendering, base, name):
                            squares += part
                            served = values.to(dtype=torch_dtype(code))
                            if served.is_floating_point() and not bool(torch.isfinite(served).all()):
                                raise Refused(
                                    "overflow", f"merged {name} does not fit into {code}", hint=LOWER_SCALE
                                )
                            writer.write(name, served)
                            self.beat()
                hashes[base.set.files[number].name] = writer.sha256
            if not is_proven:
                self._prove_base(recipe, base)
        return hashes, math.sqrt(squares)

    def _served_dtype(self, base: Weights, name: str, dtype: torch.dtype | None) -> str:
        entry = base.entries[name]
        return CODES[dtype] if dtype is not None and entry.is_floating else entry.dtype

    def _rendered(self, rendering: Rendering, base: Weights, name: str) -> Iterator[tuple[Tensor, float]]:
        """Yield a weight's served values, whole or in panels.

        Each comes with the squared norm of what was added to the base.
        """
        entry = base.entries[name]
        folded = rendering.recipe.plan.tied.get(name, name)
        kind = rendering.recipe.plan.kinds[folded]
        for start, stop in plan.parts(entry, kind):
            original = self._pass(base.read(name, start, stop))
            if kind == plan.COPIED or not rendering.state.has_slots():
                yield original, 0.0
                continue
            delta = rendering.delta(folded, start, stop).reshape(-1)
            squares = linalg.dot(delta, delta)
            if squares:
                exact = torch.promote_types(original.dtype, torch.float32)
                original = original.to(self.device, exact) + delta
            yield original, squares if name == folded else 0.0

    def _settle_threads(self) -> None:
        """Use the agreed number of threads in this thread too.

        OpenMP keeps the number for each calling thread, and LAPACK's results depend on it: without this a
        fold in a worker thread would give other bits than one in the main thread.
        """
        torch.set_num_threads(self.threads)

    def _pass(self, values: Tensor) -> Tensor:
        """Count what was read and give the caller's stop a chance."""
        self.progress(values.numel() * values.element_size())
        self.beat()
        return values


def progress_of(old: Tensor, new: Tensor, old_squares: float) -> tuple[float, float]:
    """Squared length of what a sum grew by, and |cos| of the angle between that and the sum before."""
    step = new - old
    squares = linalg.dot(step, step)
    if squares == 0.0 or old_squares == 0.0:
        return squares, 0.0
    return squares, abs(linalg.dot(step, old)) / math.sqrt(squares * old_squares)


MALLOC_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
SHARE_OF_DEVICE = 0.6  # of its free memory, which a resident state may take
FULL_BASE = "use the full-precision model that the fine-tunes were made from"
RESTORE_BASE = "put the original base back, or start a new store for the new base"
RETRAIN = "a fine-tune moves its base by a few percent; check that it was trained from this base"
LOWER_SCALE = "lower finalize.scale, or use a base in bf16 or f32"


def return_freed_memory() -> None:
    """Have glibc hand large buffers back at once; kept and fragmented, they would add up."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MALLOC_MMAP_THRESHOLD, 1 << 20)


def choose_device(name: str) -> torch.device:
    """Resolve `auto` to the first GPU or the CPU; raise ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"device {name} is none", hint="use auto, cpu, cuda or cuda:1") from exc
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name} is not there: torch sees {torch.cuda.device_count()} GPUs",
            hint="use device: auto",
        )
    return device


def torch_dtype(code: str) -> torch.dtype:
    """Give torch's dtype for a safetensors code."""
    return next(dtype for dtype, found in CODES.items() if found == code)
