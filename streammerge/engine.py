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
from typing import TYPE_CHECKING

import torch

from streammerge import linalg, plan
from streammerge.arriving import Arriving
from streammerge.errors import ConfigError, Damaged, Refused, TryAgain
from streammerge.folding import Folding, Measured
from streammerge.furnish import read_config
from streammerge.headers import CODES, Incomplete, find
from streammerge.methods import Totals
from streammerge.plan import Recipe
from streammerge.rendering import Rendering
from streammerge.state import (
    STATISTICS,
    Resident,
    State,
    StateShard,
    appended,
    delta_norms,
    read_statistics,
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
            folding = Folding(arriving, base, again, self._pass, self.progress, self._put if keep else None)
            for number, names in enumerate(plan.shards(base)):
                merged = [n for n in names if recipe.plan.kinds[n] in (plan.PROJECTED, plan.ADDED)]
                layouts = [
                    {name: recipe.layout(base.entries[name], folds) for name in merged}
                    for folds in (before, count)
                ]
                with StateShard(old, out, number, layouts, resident) as shard:
                    for name in names:
                        if name in merged:
                            folding.weight(name, shard)
                        else:
                            for start, stop in element_panels(base.entries[name].elements):
                                self._pass(base.read(name, start, stop))
                hashes |= shard.hashes
            self._prove_base(recipe, base)
        if keep:
            self._resident.own(out)
        return State(out, hashes, old.totals), folding.measured

    def _put(self, slot: str, name: str, start: int, elements: int, values: Tensor) -> None:
        """Keep a part of the new state in memory."""
        self._resident.put(slot, name, start, elements, values, self._memory)

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


MALLOC_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
SHARE_OF_DEVICE = 0.6  # of its free memory, which a resident state may take
FULL_BASE = "use the full-precision model that the fine-tunes were made from"
RESTORE_BASE = "put the original base back, or start a new store for the new base"
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
