"""What is added to the base, and the served model that comes of it, weight by weight.

`Finishing` is arithmetic: what a method renders of its slots, finished. `Rendering` gives it the slots of a
state on disk, read at random. `Model` writes what is served, whoever computed it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch

from streammerge import finalize, linalg, methods, plan
from streammerge.arriving import Arriving
from streammerge.errors import ConfigError, Refused
from streammerge.state import SlotFiles, read_statistics
from streammerge.weights import CODES, DTYPES, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import ExitStack
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from streammerge.arriving import Incoming
    from streammerge.methods import Arrival, Slots, Totals
    from streammerge.plan import Recipe
    from streammerge.state import Resident, State
    from streammerge.weights import Weights

REBUILD = "leave the cap out, or `streammerge rebuild` with it makes a new store from the same fine-tunes"
LOWER_SCALE = "lower finalize.scale, or use a base in bf16 or f32"


@dataclass
class Finishing:
    """What is added to the base for given slots: rendered by the method, capped, scaled."""

    recipe: Recipe
    finish: finalize.Finalize
    totals: Totals
    blocks: dict[str, int] = field(init=False)
    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Find the number of each weight's block, where depth matters."""
        self.blocks = finalize.blocks(self.finish, self.recipe.plan.merged)
        if self.finish.lines is not None and self.finish.lines.alpha != "auto":
            self.alpha = self.finish.lines.alpha

    def delta(self, name: str, slots: Slots, figures: Tensor, arrivals: Iterable[Arrival] = ()) -> Tensor:
        """What is added to a weight, or a panel of it.

        figures   [fine-tunes, 3] float64, recorded of each delta of this weight
        arrivals  all fine-tunes once more, for methods that ask
        """
        last = max(self.blocks.values(), default=0)
        factor = finalize.share(self.finish, self.alpha, self.blocks.get(name), last)
        return self.shaped(name, slots, figures, arrivals, factor)

    def shaped(
        self, name: str, slots: Slots, figures: Tensor, arrivals: Iterable[Arrival], factor: float
    ) -> Tensor:
        """What the method gives, capped, times a factor."""
        cap = self.finish.cap if self._is_capped(name) else None
        if cap is not None and bool(figures[:, 1].isnan().any()):
            raise ConfigError("finalize.cap: fine-tunes were folded without their spectra", hint=REBUILD)
        return finalize.apply(self._rendered(name, slots, figures, arrivals), cap, figures, factor)

    def _is_capped(self, name: str) -> bool:
        return self.finish.cap is not None and self.recipe.plan.kinds[name] == plan.PROJECTED

    def _rendered(self, name: str, slots: Slots, figures: Tensor, arrivals: Iterable[Arrival]) -> Tensor:
        """What the method gives; with a cap, a projected weight is without its length."""
        method, knobs = methods.load(self.recipe.method), self.recipe.knobs
        kind = self.recipe.plan.kinds[name]
        given: dict[str, Any] = {**knobs, "figures": figures, "kind": kind, "arrivals": arrivals}
        delta = method.render(slots, self.totals, **methods.accepted(method.render, given))
        if self._is_capped(name) and (length := getattr(method, "length", None)) is not None:
            delta = delta / cast("float", length(self.totals, **methods.accepted(length, knobs)))
        return delta


@dataclass
class Rendering:
    """A state open for rendering.

    base  read at random, as often as needed
    """

    recipe: Recipe
    state: State
    finish: finalize.Finalize
    base: Weights
    resident: Resident | None
    device: torch.device
    settle: Callable[[bool], None]
    _finishing: Finishing = field(init=False)
    _slots: SlotFiles | None = None
    _figures: dict[str, Tensor] = field(default_factory=dict)
    _again: list[Arriving] = field(default_factory=list)

    def open(self, stack: ExitStack, folded: Sequence[Incoming], beat: Callable[[], None]) -> None:
        """Open the state's files until `stack` ends; read through what must be known of the whole model."""
        self._finishing = Finishing(self.recipe, self.finish, self.state.totals)
        if not self.state.has_slots():
            return
        self._figures = read_statistics(self.state, self.recipe.plan)
        self._slots = stack.enter_context(SlotFiles(self.state, self.resident))
        if methods.rereads(self.recipe.method):
            assert len(folded) == self.state.totals.count
            self._reread(stack, folded, beat)
        if self.finish.lines is not None and self.finish.lines.alpha == "auto":
            self._finishing.alpha = self._balance(beat)

    def _reread(self, stack: ExitStack, folded: Sequence[Incoming], beat: Callable[[], None]) -> None:
        """Keep every fine-tune at hand, with its order statistics."""
        for number, incoming in enumerate(folded):
            stack.enter_context(incoming.finetune.rereading())
            arriving = Arriving(self.recipe, incoming, number, self.device, beat, self.settle)
            arriving.survey(self.base)
            self._again.append(arriving)
        for arriving in self._again:
            arriving.score_all(self.base, self.state.totals, self.slots)

    def _balance(self, beat: Callable[[], None]) -> float:
        """LiNeS' own alpha: ||sum of deltas||_1 / (||merged delta||_1 * fine-tunes)."""
        total = merged = 0.0
        for name in self.recipe.plan.merged:
            for start, stop in self.parts(name):
                slots = self.slots(name, start, stop)
                finished = self._finishing.shaped(name, slots, self._figures[name], (), 1.0)
                total += float(slots["sum"].abs().sum(dtype=torch.float64))
                merged += float(finished.abs().sum(dtype=torch.float64))
                beat()
        return total / (merged * self.state.totals.count) if merged else 1.0

    def parts(self, name: str) -> Iterator[tuple[int, int]]:
        """Cut a weight that is merged as it is rendered."""
        return plan.parts(self.base.entries[name], whole=self.recipe.needs_spectra(name))

    def slots(self, name: str, start: int, stop: int) -> Slots:
        """Read what is remembered of a weight, or of one panel of it."""
        assert self._slots is not None
        entry = self.base.entries[name]
        layout = self.recipe.layout(entry, self.state.totals.count)
        found = self._slots.read(name, start, stop, layout, whole=self.recipe.needs_spectra(name))
        return {slot: values.to(self.device) for slot, values in found.items()}

    def delta(self, name: str, slots: Slots, start: int, stop: int) -> Tensor:
        """What is added to the base, for slots that were read."""
        return self._finishing.delta(name, slots, self._figures[name], self._arrivals(name, start, stop))

    def _arrivals(self, name: str, start: int, stop: int) -> Iterator[Arrival]:
        """All fine-tunes' deltas of a weight or panel, one at a time in memory."""
        entry = self.base.entries[name]
        shape = entry.shape if self.recipe.needs_spectra(name) else (stop - start,)
        for arriving in self._again:
            original = self.base.read(name, start, stop).to(self.device, torch.float32).reshape(shape)
            delta = linalg.dense(arriving.read(name, start, stop)(original))
            yield arriving.arrival(entry, start, delta, arriving.sidecar(name, start, stop))


@dataclass(frozen=True)
class Mix:
    """What was merged before, times `old`, and what has changed since then, times `new`."""

    before: State
    old: float
    new: float


@dataclass
class Mixture:
    """Two states open for rendering as one: `latest`, and the one that it came from.

    In the slots that it gives, those of the earlier state have a mark before their name.
    """

    latest: Rendering
    before: Rendering
    mix: Mix

    @property
    def recipe(self) -> Recipe:
        """The same for both."""
        return self.latest.recipe

    @property
    def state(self) -> State:
        """The later one."""
        return self.latest.state

    def open(self, stack: ExitStack, folded: Sequence[Incoming], beat: Callable[[], None]) -> None:
        """See Rendering.open, for both."""
        assert not folded, "a method that reads fine-tunes again has no earlier merge in its state"
        self.latest.open(stack, folded, beat)
        self.before.open(stack, folded, beat)

    def parts(self, name: str) -> Iterator[tuple[int, int]]:
        """See Rendering.parts."""
        return self.latest.parts(name)

    def slots(self, name: str, start: int, stop: int) -> Slots:
        """See Rendering.slots."""
        earlier = self.before.slots(name, start, stop)
        return {
            **self.latest.slots(name, start, stop),
            **{MARK + slot: part for slot, part in earlier.items()},
        }

    def delta(self, name: str, slots: Slots, start: int, stop: int) -> Tensor:
        """What is added to the base: old * before + new * (latest - before)."""
        earlier = {slot.removeprefix(MARK): part for slot, part in slots.items() if slot.startswith(MARK)}
        now = {slot: part for slot, part in slots.items() if not slot.startswith(MARK)}
        before = self.before.delta(name, earlier, start, stop)
        return self.mix.old * before + self.mix.new * (self.latest.delta(name, now, start, stop) - before)


MARK = "before "


class Rendered(NamedTuple):
    """A model that was written: sha256 of each file by its name, and the norm of what was added."""

    hashes: dict[str, str]
    norm: float


class Model:
    """The served model, written front to back under the base's names of files, in its dtypes or another.

    Raises Refused where a weight does not fit into its dtype.
    """

    def __init__(self, base: Weights, recipe: Recipe, out: Path, dtype: torch.dtype | None = None) -> None:
        """`out` is an empty folder."""
        self._base, self._recipe, self._out, self._dtype = base, recipe, out, dtype
        self._writer: Writer | None = None
        self._hashes: dict[str, str] = {}
        self._squares = 0.0

    def shards(self) -> list[list[str]]:
        """Give the names in each file, in the order in which they must be added."""
        return plan.shards(self._base, self._dtype)

    def shard(self, number: int) -> Self:
        """Begin one of the files; to be entered and left."""
        names = self.shards()[number]
        declared = [(name, self._code(name), self._base.entries[name].shape) for name in names]
        self._writer = Writer(self._out / self._base.set.files[number].name, declared)
        return self

    def _code(self, name: str) -> str:
        entry = self._base.entries[name]
        return CODES[self._dtype] if self._dtype is not None and entry.is_floating else entry.dtype

    def __enter__(self) -> Self:
        assert self._writer is not None
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._writer is not None
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            self._hashes[self._writer.path.name] = self._writer.sha256

    def add(self, name: str, original: Tensor, delta: Tensor | None) -> None:
        """Write base + delta for the next weight, or panel of it; where nothing changes, the base's bytes."""
        assert self._writer is not None
        dtype, values = DTYPES[self._code(name)], original
        squares = linalg.dot32(delta, delta) if delta is not None else 0.0
        if delta is not None and squares:
            exact = original.to(delta.device, torch.promote_types(original.dtype, torch.float32)).reshape(-1)
            taken = 0.0 - delta.reshape(-1)  # -0.0 - 0.0 stays what it is, -0.0 + 0.0 would not
            is_copy = exact.data_ptr() != original.data_ptr()  # what was read may still be hashed
            values = exact.sub_(taken) if is_copy else exact - taken
        if name not in self._recipe.plan.tied:
            self._squares += squares
        if dtype.is_floating_point and (dtype != original.dtype or squares) and not _fits(values, dtype):
            raise Refused("overflow", f"merged {name} does not fit into {CODES[dtype]}", hint=LOWER_SCALE)
        self._writer.write(name, values.to(dtype))

    def finished(self) -> Rendered:
        """Say what was written."""
        return Rendered(self._hashes, math.sqrt(self._squares))


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all are finite in a dtype."""
    if not values.numel():
        return True
    low, high = values.aminmax()
    limit = torch.finfo(dtype).max
    return bool(-limit <= low) and bool(high <= limit)
