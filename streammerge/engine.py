"""Streams weights through a method, on CPU or GPU: folds a fine-tune into a state, renders it as a model.

A fold reads base, fine-tune and state and writes the next state. Where a method can render a weight as soon
as it is folded, the served model is written in the same pass; OPCM's scale is known only when every weight
was folded, so it takes a second one over base and state. Weights that a method sees as matrices are held
whole, everything else streams in panels. What comes next is read, and what is done is written, beside the
computing. Knows nothing of versions, sources or verdicts: what it measures it returns.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from streammerge import allocator, gauge, linalg, methods, plan
from streammerge.arriving import Arriving
from streammerge.errors import ConfigError, Damaged, NoDeviceMemory, Refused, TryAgain
from streammerge.folding import Folding, Measured
from streammerge.furnish import read_config
from streammerge.headers import Incomplete, find
from streammerge.lanes import Lane
from streammerge.methods import Totals
from streammerge.plan import Recipe
from streammerge.rendering import Finishing, Mixture, Model, Rendered, Rendering
from streammerge.state import (
    STATISTICS,
    Resident,
    State,
    StateShard,
    delta_norms,
    read_statistics,
    without,
    write_statistics,
)
from streammerge.streams import ahead
from streammerge.weights import Weights, element_panels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from streammerge import finalize
    from streammerge.arriving import Incoming
    from streammerge.folding import Piece
    from streammerge.methods import Slots
    from streammerge.prepared import Prepared
    from streammerge.rendering import Mix
    from streammerge.state import Figures


@dataclass(frozen=True)
class Serve:
    """Where the served model goes, an empty folder, and how it is finished."""

    out: Path
    finish: finalize.Finalize


class Folded(NamedTuple):
    """What a fold gives; `model` where it was rendered in the same pass."""

    state: State
    measured: Measured
    model: Rendered | None = None


class Engine:
    """Holds the device, and between folds the state where it fits there (`residency`)."""

    def __init__(
        self,
        *,
        device: str = "auto",
        threads: int | None = None,
        residency: str = "auto",
        prepared: Prepared | None = None,
        beat: Callable[[], None] = lambda: None,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """`beat` is called between weights and panels and may raise errors.Stopped.

        `prepared` keeps what `prepare_next` computes; `progress` is told how many bytes were read.
        """
        allocator.keep_small_buffers()
        self.device = choose_device(device)
        if threads:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.residency = residency
        self._memory = torch.device("cpu") if residency == "host" else self.device
        self.beat = beat
        self.progress = progress
        self._resident = Resident()
        self._prepared = prepared
        self._passed = 0
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
        self, recipe: Recipe, incoming: Incoming, old: State, out: Path, serve: Serve | None = None
    ) -> Folded:
        """Fold one fine-tune into `old` and write the next state to the empty folder `out`.

        With `serve` the model is written in the same pass where `renders_at_once`. Raises Refused for values
        that are not finite, Damaged where base or state differ from what they were.
        """
        figures = read_statistics(old, recipe.plan)
        at_once = serve if serve is not None and renders_at_once(recipe, serve) else None
        state, measured, model = self._pass_through(
            recipe, incoming, old, out, old.totals.count + 1, figures, at_once
        )
        measured.earlier = delta_norms(figures)
        totals = old.totals.after(measured.delta_norm, measured.state_norm, incoming.factor, measured.tally)
        finished = self._finished(recipe, state, figures, totals, measured.statistics)
        return Folded(finished, measured, model)

    def unfold(self, recipe: Recipe, incoming: Incoming, index: int, old: State, out: Path) -> Folded:
        """Take out the fine-tune that was folded as number `index`, from 0; the method must be able to.

        The totals are those that the others have. Raises as `fold` does.
        """
        figures = read_statistics(old, recipe.plan)
        statistics = without(figures, index)
        if old.totals.count == 1:
            return Folded(State(out, {}, Totals()), Measured())
        state, measured, _ = self._pass_through(recipe, incoming, old, out, old.totals.count - 1, figures)
        norms = delta_norms(statistics)
        totals = Totals(
            count=len(norms),
            factors=old.totals.factors - incoming.factor,
            mean_delta_norm=math.fsum(norms) / len(norms),
            max_delta_norm=max(norms),
            state_norm=measured.state_norm,
            tally=measured.tally,
        )
        return Folded(self._finished(recipe, state, statistics, totals), measured)

    def attention(
        self, recipe: Recipe, incoming: Incoming, measured: Measured, *, raw: float
    ) -> list[gauge.Distance] | None:
        """Look closer at attention that moved far: see gauge.measure. None where none is recognised.

        The fine-tune is still open, and `measured` is what its fold gave.
        """
        with self._open_base(recipe) as base, self._device_memory():
            found = self._watched(recipe, base)
            if not found:
                return None
            self._settle_threads()
            base.bring = Lane(self.device)
            return gauge.measure(found, incoming, base, measured.moved, raw=raw, beat=self.beat)

    def _watched(self, recipe: Recipe, base: Weights) -> list[gauge.Product]:
        """Find the attention weights that are folded."""
        try:
            config = read_config(recipe.base)
        except Refused as exc:
            raise Damaged(f"base {recipe.base}: {exc.message}", hint=RESTORE_BASE) from exc
        found = gauge.products(base.entries, config)
        return [p for p in found if all(recipe.plan.is_merged(part.name) for part in (p.left, p.right))]

    def _finished(
        self,
        recipe: Recipe,
        state: State,
        statistics: Mapping[str, Tensor],
        totals: Totals,
        latest: Mapping[str, Figures] | None = None,
    ) -> State:
        """Write the statistics of all that is folded now, the latest beside those of all before it."""
        digest = write_statistics(state.folder, statistics, recipe.plan, latest)
        return State(state.folder, {**state.hashes, STATISTICS: digest}, totals)

    def _pass_through(
        self,
        recipe: Recipe,
        incoming: Incoming,
        old: State,
        out: Path,
        count: int,
        figures: Mapping[str, Tensor],
        serve: Serve | None = None,
    ) -> Folded:
        """Run every weight through the method, into a state of `count` fine-tunes: one more, or one less."""
        self._settle_threads()
        lane = Lane(self.device)
        incoming.finetune.bring(lane)
        resident = self._resident if self._resident.holds(old) else None
        hashes: dict[str, str] = {}
        before = old.totals.count
        arriving = Arriving(
            recipe,
            incoming,
            min(count, before),
            self.device,
            self.beat,
            self._settle_threads,
            is_leaving=count < before,
        )
        with (
            self._device_memory(),
            self._open_base(recipe, hashing=True) as base,
            self._open_base(recipe) as again,
        ):
            base.bring = again.bring = lane
            arriving.survey(again)
            keep = self._keeps_state(recipe, base, count)
            self._resident.disown(forget=not keep and resident is None)
            put = self._put if keep else None
            folding = Folding(
                arriving,
                base,
                again,
                self._pass,
                self.progress,
                put,
                prepared=self._prepared_for(recipe, old),
                watched={part.name for p in self._watched(recipe, base) for part in (p.left, p.right)},
            )
            model = Model(base, recipe, serve.out) if serve is not None else None
            if serve is not None and model is not None:
                finishing = Finishing(recipe, serve.finish, old.totals.ahead(incoming.factor))
                folding.serve = _into(model, finishing, figures)
            for number, names in enumerate(plan.shards(base)):
                merged = [name for name in names if recipe.plan.is_merged(name)]
                layouts = [
                    {name: recipe.layout(base.entries[name], folds) for name in merged}
                    for folds in (before, count)
                ]
                with ExitStack() as stack:
                    shard = stack.enter_context(StateShard(old, out, number, layouts, resident, lane))
                    if model is not None:
                        stack.enter_context(model.shard(number))
                    folding.shard(names, shard)
                hashes |= shard.hashes
            self._prove_base(recipe, base)
        if keep:
            self._resident.own(hashes)
        rendered = model.finished() if model is not None else None
        return Folded(State(out, hashes, old.totals), folding.measured, rendered)

    def _prepared_for(self, recipe: Recipe, state: State) -> Callable[[str], Slots | None]:
        """Give what was derived from this state, where it was."""
        if self._prepared is None or not self._prepared.begin(recipe, state, self._how):
            return lambda _name: None
        return self._prepared.get

    def prepare_next(self, recipe: Recipe, state: State) -> bool:
        """Derive what the next fold will need of one weight; False where nothing is left to do or to keep."""
        if self._prepared is None or not self._prepared.begin(recipe, state, self._how):
            return False
        if (name := self._prepared.missing()) is None:
            return False
        self._settle_threads()
        resident = self._resident if self._resident.holds(state) else None
        with self._open_base(recipe) as base:
            self._prepared.derive(recipe, state, base.entries[name], resident, self.device)
        return True

    @property
    def _how(self) -> tuple[object, ...]:
        """All that bits depend on beside state and recipe."""
        return self.threads, str(self.device), torch.__version__

    def give_back_disk(self) -> bool:
        """Remove what `prepare_next` keeps on disk; False where there was nothing."""
        return self._prepared is not None and self._prepared.clear()

    def _put(self, slot: str, name: str, start: int, elements: int, values: Tensor) -> None:
        """Keep a part of the new state in memory."""
        self._resident.put(slot, name, start, elements, values, self._memory)

    def _open_base(self, recipe: Recipe, *, hashing: bool = False, once: bool = False) -> Weights:
        """Open the base of the store: not there now is TryAgain, another one is Damaged."""
        try:
            base = Weights(find(recipe.base), hashing=hashing, once=once)
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
        mix: Mix | None = None,
    ) -> Rendered:
        """Write base + finalize(render(state)) to the empty folder `out` under the base's file names.

        `folded` are all fine-tunes in their order, open, for methods that read them again; `mix` is served in
        the place of the state alone, with an earlier state that is not empty. Raises Refused
        where a weight does not fit into the base's dtype, Damaged where the base changed since it was folded.
        """
        self._settle_threads()
        with ExitStack() as stack:
            base = stack.enter_context(self._open_base(recipe, once=True))
            again = stack.enter_context(self._open_base(recipe))
            is_proven = base.stamp == self._proven_base
            if not is_proven:
                base = stack.enter_context(self._open_base(recipe, hashing=True))
            resident = self._resident if self._resident.holds(state) else None
            stack.enter_context(self._device_memory())
            base.bring, again.bring = Lane(self.device), Lane(self.device)  # each read on a thread of its own
            settle = self._settle_threads
            rendering: Rendering | Mixture
            rendering = Rendering(recipe, state, finish, again, resident, self.device, settle)
            if mix is not None:
                before = Rendering(recipe, mix.before, finish, again, None, self.device, settle)
                rendering = Mixture(rendering, before, mix)
            rendering.open(stack, folded, self.beat)
            model = Model(base, recipe, out, dtype)
            for number, names in enumerate(model.shards()):
                reading = ahead(self._read(rendering, base, names), recipe.depth)
                with model.shard(number), closing(reading) as pieces:
                    for name, start, stop, original, slots in pieces:
                        of = recipe.plan.tied.get(name, name)
                        self._settle_threads(is_whole=recipe.needs_spectra(of))
                        delta = rendering.delta(of, slots, start, stop) if slots else None
                        model.add(name, original, delta)
                        self.beat()
            if not is_proven:
                self._prove_base(recipe, base)
        return model.finished()

    def _read(
        self, rendering: Rendering | Mixture, base: Weights, names: Sequence[str]
    ) -> Iterator[tuple[str, int, int, Tensor, Slots]]:
        """Read what is rendered, whole or in panels; no slots where nothing is added."""
        kinds = rendering.recipe.plan
        for name in names:
            of = kinds.tied.get(name, name)
            if not kinds.is_merged(of) or not rendering.state.has_slots():
                for start, stop in element_panels(base.entries[name].elements):
                    yield name, start, stop, self._pass(base.read(name, start, stop)), {}
                continue
            for start, stop in rendering.parts(of):
                original = self._pass(base.read(name, start, stop))
                yield name, start, stop, original, rendering.slots(of, start, stop)

    @contextmanager
    def _device_memory(self) -> Iterator[None]:
        """Where the GPU's memory does not suffice, keep no state there any more and have it tried again."""
        try:
            yield
        except torch.OutOfMemoryError as exc:
            self._resident.disown(forget=True)
            was, self.residency = self.residency, "disk"
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise NoDeviceMemory(
                f"{self.device} is out of memory: {str(exc).partition('.')[0]}",
                hint="use device: cpu, or a GPU that holds the largest weights"
                if was == "disk"
                else "from now on the state is read from disk at every fold",
            ) from exc

    def _settle_threads(self, is_whole: bool = True) -> None:  # noqa: FBT001, FBT002 -- a callback's one fact
        """Use the agreed number of threads for matrices, in this thread too; one for panels.

        OpenMP keeps the number for each calling thread, and LAPACK's results depend on it: without this a
        fold in a worker thread would give other bits than one in the main thread. Elementwise results do
        not, and the other cores are busy reading, hashing and writing.
        """
        wanted = self.threads if is_whole else 1
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def _pass(self, values: Tensor) -> Tensor:
        """Count what was read and give the caller's stop a chance."""
        self.progress(values.numel() * values.element_size())
        self._passed += values.numel()
        if self._passed >= ELEMENTS_BETWEEN_TRIMS:
            self._passed = 0
            allocator.give_back()
        self.beat()
        return values


ELEMENTS_BETWEEN_TRIMS = 1 << 23
SHARE_OF_DEVICE = 0.6  # of its free memory, which a resident state may take
FULL_BASE = "use the full-precision model that the fine-tunes were made from"
RESTORE_BASE = "put the original base back, or start a new store for the new base"


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


def renders_at_once(recipe: Recipe, serve: Serve) -> bool:
    """Whether a weight can be rendered as soon as it is folded, before the others are."""
    lines = serve.finish.lines
    needs_all = lines is not None and lines.alpha == "auto"
    return methods.is_local(recipe.method) and not needs_all and not recipe.plan.tied


def _into(
    model: Model, finishing: Finishing, figures: Mapping[str, Tensor]
) -> Callable[[Piece, Slots, Figures], None]:
    """Render what was just folded into a model."""

    def serve(piece: Piece, slots: Slots, latest: Figures) -> None:
        if not slots:
            model.add(piece.name, piece.original, None)
            return
        rows = figures[piece.name]
        if finishing.recipe.needs_spectra(piece.name):
            rows = torch.cat([rows, torch.tensor([latest], dtype=torch.float64)])
        model.add(piece.name, piece.original, finishing.delta(piece.name, slots, rows))

    return serve
