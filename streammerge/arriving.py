"""A fine-tune at the engine's door: its deltas as the method is to see them, and what it must know before.

Routes are applied here. Where a method needs order statistics of the whole delta, or the length of a sidecar,
the files are read through first.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from streammerge import linalg, methods, plan
from streammerge.methods import Arrival
from streammerge.selection import select
from streammerge.streams import ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from streammerge.finetune import FineTune
    from streammerge.headers import Entry
    from streammerge.linalg import Delta, Read
    from streammerge.methods import Kind, Slots, Totals
    from streammerge.plan import Recipe
    from streammerge.weights import Weights


Cuts = tuple[tuple[float, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Incoming:
    """An open fine-tune, and what is known of it: its digest, the weight a person gave it, its source."""

    finetune: FineTune
    digest: str = ""
    factor: float = 1.0
    source: str = ""


@dataclass
class Arriving:
    """One fine-tune on its way through a method."""

    recipe: Recipe
    incoming: Incoming
    earlier: int  # fine-tunes folded before it
    device: torch.device
    beat: Callable[[], None]
    settle: Callable[[bool], None]  # is told whether what is computed next is a whole matrix
    is_leaving: bool = False
    cuts: tuple[float, ...] = ()
    score_cuts: tuple[float, ...] = ()
    sidecar_norm: float = field(default=0.0)

    def is_whole(self, name: str) -> bool:
        """Whether a weight is processed as one."""
        in_panels = self.incoming.finetune.in_panels
        return self.recipe.needs_spectra(name) or (
            self.recipe.plan.kinds[name] == plan.PROJECTED and not in_panels
        )

    def read(self, name: str, start: int, stop: int) -> Read:
        """Read what computes fine-tune minus base, times its route's share; see finetune.Deltas.read."""
        read = self.incoming.finetune.read(name, start, stop)
        share = self.recipe.share(name, self.incoming.source)
        return read if share == 1.0 else lambda original: linalg.scaled(read(original), share)

    def sidecar(self, name: str, start: int, stop: int) -> Tensor | None:
        """Read what came beside elements [start, stop) of a weight."""
        sidecar = self.incoming.finetune.sidecar
        return sidecar.read(name, start, stop) if sidecar is not None else None

    def arrival(
        self, entry: Entry, start: int, delta: Delta, sidecar: Tensor | None, cuts: Cuts = ((), ())
    ) -> Arrival:
        """Put a part of a weight before the method, with all that belongs to it."""
        return Arrival(
            name=entry.name,
            kind=cast("Kind", self.recipe.plan.kinds[entry.name]),
            delta=delta,
            digest=self.incoming.digest,
            factor=self.incoming.factor,
            earlier=self.earlier,
            start=start,
            width=plan.row_of(entry.shape),
            cuts=self.cuts or cuts[0],
            cut_places=cuts[1],
            score_cuts=self.score_cuts,
            sidecar=None if sidecar is None else sidecar.to(self.device),
            sidecar_norm=self.sidecar_norm,
        )

    # ------------------------------------------------------------------------------------- reading it before

    def survey(self, base: Weights) -> None:
        """Read everything through for what the method asks of the whole fine-tune. `base` is not hashed."""
        method, knobs = methods.load(self.recipe.method), self.recipe.knobs
        self.settle(False)  # noqa: FBT003 -- a callback's one fact
        with self.incoming.finetune.rereading():
            if (ranks := getattr(method, "model_ranks", None)) is not None:
                wanted = ranks(self.elements(base), **methods.accepted(ranks, knobs))
                found = select(lambda: self._magnitudes(base, self.recipe.plan.merged), wanted)
                self.cuts = tuple(cut.value for cut in found)
            if getattr(method, "SIDECAR", "").startswith("fisher"):
                sidecar = self.incoming.finetune.sidecar
                self.sidecar_norm = (
                    sidecar.norm(self.beat) if sidecar is not None else math.sqrt(self.elements(base))
                )

    def cuts_of(self, base: Weights, name: str) -> Cuts:
        """Give the magnitudes at the ranks that the method asks for within one weight, and their places."""
        ranks = getattr(methods.load(self.recipe.method), "weight_ranks", None)
        if ranks is None or self.cuts:
            return (), ()
        wanted = ranks(base.entries[name].elements, **methods.accepted(ranks, self.recipe.knobs))
        if not wanted or not base.entries[name].elements:
            return (), ()
        with self.incoming.finetune.rereading():
            found = select(lambda: self._magnitudes(base, [name]), wanted, placed=True)
        return tuple(cut.value for cut in found), tuple(cut.place for cut in found)

    def score_all(self, base: Weights, totals: Totals, slots_of: Callable[[str, int, int], Slots]) -> None:
        """Read everything through for the scores at the ranks that the method asks for."""
        method, knobs = methods.load(self.recipe.method), self.recipe.knobs
        if (ranks := getattr(method, "score_ranks", None)) is None:
            return
        score = cast("Callable[..., Tensor]", method.score)  # type: ignore[attr-defined]

        def scores() -> Iterator[Tensor]:
            for name, start, stop, delta in self.deltas(base, self.recipe.plan.merged):
                sidecar = self.sidecar(name, start, stop)
                arrival = self.arrival(base.entries[name], start, delta, sidecar)
                yield score(slots_of(name, start, stop), totals, arrival, **methods.accepted(score, knobs))

        found = select(scores, ranks(self.elements(base), **methods.accepted(ranks, knobs)))
        self.score_cuts = tuple(cut.value for cut in found)

    def elements(self, base: Weights) -> int:
        """How many numbers are merged."""
        return sum(base.entries[name].elements for name in self.recipe.plan.merged)

    def _magnitudes(self, base: Weights, names: list[str]) -> Iterator[Tensor]:
        return (linalg.dense(delta).abs_() for _, _, _, delta in self.deltas(base, names))

    def deltas(self, base: Weights, names: list[str]) -> Iterator[tuple[str, int, int, Delta]]:
        """Read these weights' deltas part by part, what comes next while one is used."""
        with closing(ahead(self._reads(base, names), self.recipe.depth)) as reads:
            for name, start, stop, original, read in reads:
                whole = self.is_whole(name)
                self.settle(whole)
                self.beat()
                values = original.to(self.device, torch.float32)
                yield name, start, stop, read(values.reshape(base.entries[name].shape) if whole else values)

    def _reads(self, base: Weights, names: list[str]) -> Iterator[tuple[str, int, int, Tensor, Read]]:
        for name in names:
            for start, stop in plan.parts(base.entries[name], whole=self.is_whole(name)):
                yield name, start, stop, base.read(name, start, stop), self.read(name, start, stop)
