"""What happens to each weight of the base: projected, added, copied, or tied to another.

Fixed for a store's life. Driven by names, shapes and dtypes, and by what config.json declares about tying;
there is no table of architectures.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from streammerge import methods
from streammerge.headers import ITEM_BYTES, Entry
from streammerge.weights import PANEL_ELEMENTS, element_panels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import torch

    from streammerge.config import Route
    from streammerge.weights import Weights

# Embeddings and heads: their rows belong to single tokens or classes, so OPCM adds them whole.
DEFAULT_ADDED = (
    "*embed*", "*wte*", "*wpe*", "lm_head*", "*.lm_head*", "*shared.weight", "*class_token*", "*cls_token*",
    "classifier*", "*.classifier*", "score.weight", "*.score.weight", "cls.*", "*predictions.decoder*",
)  # fmt: skip
PANELS_AHEAD, WEIGHTS_AHEAD = 3, 1
PROJECTED, ADDED, COPIED, TIED = "projected", "added", "copied", "tied:"


@dataclass(frozen=True)
class Plan:
    """The kind of every weight of the base, in the base's own order of names.

    kinds      name -> "projected", "added", "copied" (integers) or "tied:NAME" (a second name for the same
               bytes)
    embedding  the embedding that the base declares its head to be tied to, "" where it declares none
    """

    kinds: Mapping[str, str]
    embedding: str = ""

    @cached_property
    def tied(self) -> dict[str, str]:
        """Second name -> the name under which the weight is folded."""
        return {name: kind.removeprefix(TIED) for name, kind in self.kinds.items() if kind.startswith(TIED)}

    @cached_property
    def merged(self) -> list[str]:
        """Names that are folded, tied ones once."""
        return [name for name in self.kinds if self.is_merged(name)]

    def is_merged(self, name: str) -> bool:
        """Whether a weight is folded under this name."""
        return self.kinds[name] in (PROJECTED, ADDED)


@dataclass(frozen=True)
class Recipe:
    """What does not change from fold to fold: the base, each weight's kind, the method, knobs, routes."""

    base: Path
    base_digest: str
    plan: Plan
    method: str
    knobs: Mapping[str, Any]
    routes: tuple[Route, ...] = ()
    is_capped: bool = False  # finalize.cap is on, which needs whole matrices and their spectra

    def needs_spectra(self, name: str) -> bool:
        """Whether a weight is seen as a matrix: held whole, the spectrum of its delta recorded."""
        is_matrix = self.plan.kinds[name] == PROJECTED
        return is_matrix and (self.is_capped or not methods.is_elementwise(self.method))

    def share(self, name: str, source: str) -> float:
        """What a source's deltas of one weight are multiplied by: the first route that matches says."""
        for route in self.routes:
            if matches(name, [route.weights]) and route.source in (None, source):
                return route.share
        return 1.0

    @property
    def depth(self) -> int:
        """How many pieces are read ahead: panels are small, whole matrices are not."""
        is_small = not self.is_capped and methods.is_elementwise(self.method)
        return PANELS_AHEAD if is_small else WEIGHTS_AHEAD

    def layout(self, entry: Entry, count: int) -> methods.Layout:
        """What the method remembers of a weight once `count` fine-tunes are folded."""
        kind = cast("methods.Kind", self.plan.kinds[entry.name])
        weight = methods.Weight(entry.name, kind, entry.shape)
        return methods.layout(methods.load(self.method), weight, count, self.knobs)

    def state_bytes(self, base: Mapping[str, Entry], count: int = 1) -> int:
        """Size of the state once `count` fine-tunes are folded."""
        layouts = (self.layout(base[name], count) for name in self.plan.merged)
        return sum(d.itemsize * math.prod(shape) for found in layouts for d, shape in found.values())


def parts(entry: Entry, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Cut a weight's elements as they are processed: whole, or in panels of whole rows.

    A row is the last dimension; a vector is one row.
    """
    if whole:
        return iter([(0, entry.elements)])
    row = max(row_of(entry.shape), 1)
    return element_panels(entry.elements, max(PANEL_ELEMENTS // row, 1) * row)


def row_of(shape: tuple[int, ...]) -> int:
    """Length of a row."""
    return shape[-1] if shape else 1


def make(base: Weights, config: Mapping[str, Any], added: Iterable[str]) -> Plan:
    """Decide the kind of every weight. `base` must have been read with hashing: equal bytes prove a tie."""
    added = tuple(added)
    ties, embedding = _ties(base, config)
    kinds = {}
    for name, entry in base.entries.items():
        if not entry.is_floating:
            kinds[name] = COPIED
        elif name in ties:
            kinds[name] = TIED + ties[name]
        else:
            kinds[name] = kind_of(entry, added)
    return Plan(kinds, embedding)


def kind_of(entry: Entry, added: Iterable[str]) -> str:
    """Say what happens to a floating-point weight that is tied to no other."""
    is_matrix = len(entry.shape) == 2 and min(entry.shape) > 0
    return PROJECTED if is_matrix and not matches(entry.name, added) else ADDED


def _ties(base: Weights, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Find weights declared tied and equal in bytes, and the embedding that the declaration is about."""
    nested = [config, *(part for part in config.values() if isinstance(part, dict))]
    if not any(part.get("tie_word_embeddings") is True for part in nested):
        return {}, ""
    tables = [
        e
        for e in base.entries.values()
        if e.is_floating and len(e.shape) == 2 and matches(e.name, DEFAULT_ADDED)
    ]
    first: dict[tuple[str, tuple[int, ...], str], str] = {}
    ties = {}
    for entry in tables:
        key = (entry.dtype, entry.shape, base.tensor_digest(entry.name))
        if key in first:
            ties[entry.name] = first[key]
        first.setdefault(key, entry.name)
    tables = [entry for entry in tables if entry.name not in ties]
    embedding = max(tables, key=lambda e: e.shape[0]).name if tables else ""
    return ties, embedding


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether any glob matches the whole name; case counts."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def idle_globs(base: Mapping[str, Entry], globs: Iterable[str]) -> list[str]:
    """List globs that match no weight: probably a typing error."""
    return [glob for glob in globs if not any(matches(name, [glob]) for name in base)]


def shards(base: Weights, dtype: torch.dtype | None = None) -> list[list[str]]:
    """Give the names in each of the base's files, in the order in which they are processed and written.

    With `dtype`, the order for floating-point weights that are written in it instead of their own.
    Larger items first, then as stored: so every weight stays aligned to its dtype in every file written.
    """

    def itemsize(entry: Entry) -> int:
        return dtype.itemsize if dtype is not None and entry.is_floating else ITEM_BYTES[entry.dtype]

    order = sorted(base.entries.values(), key=lambda e: (e.file, -itemsize(e), e.start))
    return [[e.name for e in order if e.file == number] for number in range(len(base.set.files))]
