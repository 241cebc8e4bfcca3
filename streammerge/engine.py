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
from typing import TYPE_CHECKING, cast

import torch

from streammerge import finalize, linalg, methods, plan
from streammerge.errors import ConfigError, Damaged, Refused, TryAgain
from streammerge.furnish import read_config
from streammerge.headers import CODES, DTYPES, Incomplete, WeightsSet, find
from streammerge.methods import Arrival, Slots, Totals
from streammerge.plan import Recipe
from streammerge.state import (
    ROLL_BACK,
    STATISTICS,
    Resident,
    State,
    StateShard,
    combine,
    read_statistics,
    statistics_of,
    write_statistics,
)
from streammerge.weights import Weights, Writer, element_panels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from streammerge.finetune import FineTune


@dataclass
class Measured:
    """What one fold saw, summed over weights in float64.

    delta_norm, base_norm, state_norm  Frobenius norms over floating-point weights, tied ones once
    kept_energy     share of ||delta||^2 of projected weights that entered the state
    orthogonality   largest |<P, D>| / (||P|| ||D||) over projected weights; P what was added to the sum D
    statistics      weight -> (||delta||_F, ||delta^T delta||_F, largest singular value);
                    NaN for added matrices
    """

    delta_squares: float = 0.0
    base_squares: float = 0.0
    state_squares: float = 0.0
    projected_squares: float = 0.0
    step_squares: float = 0.0
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

    def fold(
        self, recipe: Recipe, finetune: FineTune, digest: str, factor: float, old: State, out: Path
    ) -> tuple[State, Measured]:
        """Fold one fine-tune into `old` and write the next state to the empty folder `out`.

        Raises Refused for values that are not finite, Damaged where base or state differ from what they were.
        """
        self._settle_threads()
        measured = Measured()
        resident = self._resident if self._resident.holds(old) else None
        hashes: dict[str, str] = {}
        with self._open_base(recipe, hashing=True) as base:
            keep = self._keeps_state(recipe, base)
            self._resident.disown(forget=not keep and resident is None)
            for number, names in enumerate(plan.shards(base)):
                merged = [n for n in names if recipe.plan.kinds[n] in (plan.PROJECTED, plan.ADDED)]
                with StateShard(
                    methods.load(recipe.method).SLOTS, old, out, number, merged, base, resident
                ) as shard:
                    for name in names:
                        if name in merged:
                            arrival = (finetune, digest, factor)
                            self._fold_weight(recipe, base, arrival, name, shard, measured, keep=keep)
                        else:
                            for start, stop in element_panels(base.entries[name].elements):
                                self._pass(base.read(name, start, stop))
                hashes |= shard.hashes
            self._prove_base(recipe, base)
        totals = old.totals.after(measured.delta_norm, measured.state_norm, factor)
        hashes[STATISTICS] = write_statistics(old, out, measured.statistics, recipe.plan)
        if keep:
            self._resident.own(out)
        return State(out, hashes, totals), measured

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

    def _keeps_state(self, recipe: Recipe, base: Weights) -> bool:
        """Decide whether the state stays in memory until the next fold."""
        if self.residency != "auto":
            return self.residency in ("device", "host")
        needed = (
            4
            * sum(base.entries[n].elements for n in recipe.plan.merged)
            * len(methods.load(recipe.method).SLOTS)
        )
        return (
            self.device.type == "cuda" and needed < SHARE_OF_DEVICE * torch.cuda.mem_get_info(self.device)[0]
        )

    def _fold_weight(
        self,
        recipe: Recipe,
        base: Weights,
        arrival: tuple[FineTune, str, float],
        name: str,
        shard: StateShard,
        measured: Measured,
        *,
        keep: bool,
    ) -> None:
        """Fold one weight, whole where it is projected, else panel by panel."""
        finetune, digest, factor = arrival
        method, entry, kind = methods.load(recipe.method), base.entries[name], recipe.plan.kinds[name]
        whole = kind == plan.PROJECTED
        figures = []
        for start, stop in [(0, entry.elements)] if whole else element_panels(entry.elements):
            shape = entry.shape if whole else (stop - start,)
            original = self._pass(base.read(name, start, stop)).to(self.device, torch.float32).reshape(shape)
            measured.base_squares += linalg.dot(original, original)
            delta = finetune.delta(name, start, stop, original)
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
            slots = {
                slot: shard.read(slot, name, start, stop).to(self.device).reshape(shape)
                for slot in method.SLOTS
            }
            arrived = Arrival(name, cast("methods.Kind", kind), delta, digest, factor)
            new = self._step(recipe, slots, shard.source, arrived, squares, measured)
            del delta, arrived
            for slot, values in new.items():
                shard.write(slot, name, values)
                if keep:
                    self._resident.put(slot, name, start, entry.elements, values, self._memory)
        measured.statistics[name] = combine(figures)

    def _step(
        self, recipe: Recipe, slots: Slots, source: str, arrival: Arrival, squares: float, measured: Measured
    ) -> Slots:
        """Run the method on one weight or panel and take the health figures; `source` is where slots lay."""
        method = methods.load(recipe.method)
        first = next(iter(method.SLOTS))
        old = slots[first]
        old_squares = linalg.dot(old, old)
        if not math.isfinite(old_squares):
            raise Damaged(f"{arrival.name} in {source} is NaN or infinite", hint=ROLL_BACK)
        prepare = getattr(method, "prepare", None)
        if prepare and arrival.kind == plan.PROJECTED and squares and bool(old.any()):
            slots = prepare(slots, **methods.accepted(prepare, recipe.knobs))
        new = method.fold(slots, arrival, **methods.accepted(method.fold, recipe.knobs))
        self.beat()
        new_squares = linalg.dot(new[first], new[first])
        if not math.isfinite(new_squares):
            raise Refused("implausible", f"the sum of {arrival.name} leaves float32's range", hint=RETRAIN)
        measured.delta_squares += squares
        measured.state_squares += new_squares
        if arrival.kind == plan.PROJECTED:
            step = new[first] - old
            step_squares = linalg.dot(step, step)
            measured.projected_squares += squares
            measured.step_squares += step_squares
            if step_squares > 0 and old_squares > 0:
                share = abs(linalg.dot(step, old)) / math.sqrt(step_squares * old_squares)
                measured.orthogonality = max(measured.orthogonality, share)
        return new

    def render(
        self,
        recipe: Recipe,
        state: State,
        finish: finalize.Finalize,
        out: Path,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, str], float]:
        """Write base + finalize(render(state)) to the empty folder `out` under the base's file names.

        Returns the sha256 of every file by name and the norm of the merged delta. Raises Refused where a
        weight does not fit into the base's dtype, Damaged where the base changed since it was folded.
        """
        self._settle_threads()
        hashes: dict[str, str] = {}
        squares = 0.0
        with ExitStack() as stack:
            base = stack.enter_context(self._open_base(recipe))
            is_proven = base.stamp == self._proven_base
            if not is_proven:
                base = stack.enter_context(self._open_base(recipe, hashing=True))
            slots = self._open_slots(recipe, state, stack)
            figures = read_statistics(state, recipe.plan)
            for number, names in enumerate(plan.shards(base, dtype)):
                declared = [(n, self._served_dtype(base, n, dtype), base.entries[n].shape) for n in names]
                with Writer(out / base.set.files[number].name, declared) as writer:
                    for name, code, _ in declared:
                        for values, part in self._rendered(
                            recipe, base, slots, (state.totals, figures), finish, name
                        ):
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

    def _open_slots(self, recipe: Recipe, state: State, stack: ExitStack) -> dict[str, Weights | Resident]:
        """Open the state for reading at random, in memory if it lies there; nothing before the first fold."""
        if not state.has_slots():
            return {}
        found: dict[str, Weights | Resident] = {}
        for slot in methods.load(recipe.method).SLOTS:
            if self._resident.holds(state):
                found[slot] = self._resident
            else:
                shards = sorted(state.folder.glob(f"{slot}-*.safetensors"))
                found[slot] = stack.enter_context(Weights(WeightsSet(tuple(shards))))
        return found

    def _served_dtype(self, base: Weights, name: str, dtype: torch.dtype | None) -> str:
        entry = base.entries[name]
        return CODES[dtype] if dtype is not None and entry.is_floating else entry.dtype

    def _rendered(
        self,
        recipe: Recipe,
        base: Weights,
        slots: dict[str, Weights | Resident],
        known: tuple[Totals, dict[str, Tensor]],
        finish: finalize.Finalize,
        name: str,
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield a weight's served values, whole or in panels.

        Each comes with the squared norm of what was added to the base.
        """
        entry = base.entries[name]
        folded = recipe.plan.tied.get(name, name)
        kind = recipe.plan.kinds[folded]
        whole = kind == plan.PROJECTED
        method, (totals, figures) = methods.load(recipe.method), known
        for start, stop in [(0, entry.elements)] if whole else element_panels(entry.elements):
            original = self._pass(base.read(name, start, stop))
            if kind == plan.COPIED or not slots:
                yield original, 0.0
                continue
            shape = entry.shape if whole else (stop - start,)
            found = {
                slot: self._slot(weights, slot, folded, start, stop).reshape(shape)
                for slot, weights in slots.items()
            }
            given = methods.accepted(method.render, {**recipe.knobs, "figures": figures[folded]})
            delta = finalize.apply(method.render(found, totals, **given), finish).reshape(-1)
            squares = linalg.dot(delta, delta)
            if squares:
                exact = torch.promote_types(original.dtype, torch.float32)
                original = original.to(self.device, exact) + delta
            yield original, squares if name == folded else 0.0

    def _slot(self, found: Weights | Resident, slot: str, name: str, start: int, stop: int) -> Tensor:
        """Read one slot of a weight, flat."""
        if isinstance(found, Resident):
            return found.read(slot, name, start, stop).to(self.device)
        return found.read(name, start, stop).to(self.device)

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
