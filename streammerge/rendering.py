"""What is added to the base now: a state rendered by its method and finished, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from streammerge import finalize, linalg, methods, plan
from streammerge.arriving import Arriving
from streammerge.state import SlotFiles, read_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import ExitStack

    from torch import Tensor

    from streammerge.arriving import Incoming
    from streammerge.methods import Arrival, Slots
    from streammerge.plan import Recipe
    from streammerge.state import Resident, State
    from streammerge.weights import Weights


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
    _slots: SlotFiles | None = None
    _figures: dict[str, Tensor] = field(default_factory=dict)
    _again: list[Arriving] = field(default_factory=list)
    _blocks: dict[str, int] = field(default_factory=dict)
    _alpha: float = 1.0

    def open(self, stack: ExitStack, folded: Sequence[Incoming], beat: Callable[[], None]) -> None:
        """Open the state's files until `stack` ends; read through what must be known of the whole model."""
        if not self.state.has_slots():
            return
        self._figures = read_statistics(self.state, self.recipe.plan)
        self._slots = stack.enter_context(SlotFiles(self.state, self.resident))
        if methods.rereads(self.recipe.method):
            assert len(folded) == self.state.totals.count
            self._reread(stack, folded, beat)
        self._blocks = finalize.blocks(self.finish, self.recipe.plan.merged)
        if self.finish.lines is not None:
            given = self.finish.lines.alpha
            self._alpha = self._balance(beat) if given == "auto" else given

    def _reread(self, stack: ExitStack, folded: Sequence[Incoming], beat: Callable[[], None]) -> None:
        """Keep every fine-tune at hand, with its order statistics."""
        for number, incoming in enumerate(folded):
            stack.enter_context(incoming.finetune.rereading())
            arriving = Arriving(self.recipe, incoming, number, self.device, beat)
            arriving.survey(self.base)
            self._again.append(arriving)
        for arriving in self._again:
            arriving.score_all(self.base, self.state.totals, self.slots)

    def _balance(self, beat: Callable[[], None]) -> float:
        """LiNeS' own alpha: ||sum of deltas||_1 / (||merged delta||_1 * fine-tunes)."""
        total = merged = 0.0
        for name in self.recipe.plan.merged:
            entry, kind = self.base.entries[name], self.recipe.plan.kinds[name]
            for start, stop in plan.parts(entry, kind):
                total += float(self.slots(name, start, stop)["sum"].abs().sum(dtype=torch.float64))
                finished = self.finished(name, start, stop, 1.0)
                merged += float(finished.abs().sum(dtype=torch.float64))
                beat()
        return total / (merged * self.state.totals.count) if merged else 1.0

    def slots(self, name: str, start: int, stop: int) -> Slots:
        """Read what is remembered of a weight, or of one panel of it."""
        assert self._slots is not None
        entry = self.base.entries[name]
        layout = self.recipe.layout(entry, self.state.totals.count)
        found = self._slots.read(name, start, stop, layout, whole=self.is_whole(name))
        return {slot: values.to(self.device) for slot, values in found.items()}

    def is_whole(self, name: str) -> bool:
        """Whether a weight is processed as one."""
        return self.recipe.plan.kinds[name] == plan.PROJECTED

    def rendered(self, name: str, start: int, stop: int) -> Tensor:
        """What the method gives for a weight or panel; with a cap, a projected one is without its length."""
        method = methods.load(self.recipe.method)
        given: dict[str, Any] = {
            **self.recipe.knobs,
            "figures": self._figures[name],
            "kind": self.recipe.plan.kinds[name],
            "arrivals": self._arrivals(name, start, stop),
        }
        slots = self.slots(name, start, stop)
        delta = method.render(slots, self.state.totals, **methods.accepted(method.render, given))
        if self._is_capped(name) and (length := getattr(method, "length", None)) is not None:
            delta = delta / cast(
                "float", length(self.state.totals, **methods.accepted(length, self.recipe.knobs))
            )
        return delta

    def _is_capped(self, name: str) -> bool:
        return self.finish.cap is not None and self.is_whole(name)

    def delta(self, name: str, start: int, stop: int) -> Tensor:
        """What is added to the base."""
        last = max(self._blocks.values(), default=0)
        factor = finalize.share(self.finish, self._alpha, self._blocks.get(name), last)
        return self.finished(name, start, stop, factor)

    def finished(self, name: str, start: int, stop: int, factor: float) -> Tensor:
        """What the method gives, capped, times a factor."""
        cap = self.finish.cap if self._is_capped(name) else None
        return finalize.apply(self.rendered(name, start, stop), cap, self._figures[name], factor)

    def _arrivals(self, name: str, start: int, stop: int) -> Iterator[Arrival]:
        """All fine-tunes' deltas of a weight or panel, one at a time in memory."""
        shape = self.base.entries[name].shape if self.is_whole(name) else (stop - start,)
        for arriving in self._again:
            original = self.base.read(name, start, stop).to(self.device, torch.float32).reshape(shape)
            delta = arriving.delta(name, start, stop, original)
            yield arriving.arrival(self.base, name, start, stop, linalg.dense(delta))
