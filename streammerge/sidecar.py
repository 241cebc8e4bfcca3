"""What a fine-tune brings beside its weights for methods that ask: Fisher information, Gram matrices.

Strangers' files like the weights themselves: names, shapes and values are checked before a method sees them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from streammerge import linalg
from streammerge.errors import Refused
from streammerge.fit import common_prefix, listed
from streammerge.headers import WeightsSet
from streammerge.plan import PROJECTED
from streammerge.weights import Weights, element_panels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from streammerge.headers import Entry
    from streammerge.plan import Plan

ASYMMETRY = 1e-3  # of a Gram matrix's length: more is no rounding


class Sidecar:
    """An open gram.safetensors, a matrix [n, n] for projected weights [m, n], or fisher.safetensors.

    Fisher information has a value for each of a weight's, under the same names and shapes.
    """

    def __init__(self, path: Path, base: Mapping[str, Entry], plan: Plan) -> None:
        """Open the file and fit it to the base; raises Refused."""
        self.path, self._base, self._plan = path, base, plan
        self.is_gram = path.name.startswith("gram")
        self.weights = Weights(WeightsSet((path,)), hashing=True)
        try:
            self._sources = self._fit()
        except BaseException:
            self.weights.__exit__(None, None, None)
            raise

    def _fit(self) -> dict[str, str]:
        """Find the name in the file for each weight of the base that it covers."""
        rename = common_prefix(self._base, self.weights.entries)
        sources = {rename(name): name for name in self.weights.entries}
        if strange := [name for name in sources if name not in self._base]:
            raise self._bad(f"the base does not have {listed(strange)}")
        for name, source in sources.items():
            entry, ours = self.weights.entries[source], self._base[name]
            if not entry.is_floating:
                raise self._bad(f"{source} is stored as {entry.dtype}")
            wanted = (ours.shape[-1], ours.shape[-1]) if self.is_gram and len(ours.shape) == 2 else ours.shape
            if entry.shape != wanted:
                raise self._bad(f"{source} is {list(entry.shape)}, not {list(wanted)}")
        missing = [] if self.is_gram else [name for name in self._plan.merged if name not in sources]
        if missing:
            raise self._bad(f"it lacks {listed(missing)}")
        return sources

    def read(self, name: str, start: int, stop: int) -> Tensor | None:
        """Give the values for elements [start, stop) of a weight as float32; a Gram matrix as a whole.

        None where a Gram matrix is missing, or where the weight is not projected.
        """
        if name not in self._sources or (self.is_gram and self._plan.kinds[name] != PROJECTED):
            return None
        source = self._sources[name]
        if self.is_gram:
            return self._checked_gram(source, self.weights.read(source).float())
        values = self.weights.read(source, start, stop).float()
        if not bool(torch.isfinite(values).all()):
            raise self._bad(f"{source} holds NaN or infinite values")
        if bool((values < 0).any()):
            raise self._bad(f"{source} holds negative values")
        return values

    def _checked_gram(self, source: str, gram: Tensor) -> Tensor:
        if not bool(torch.isfinite(gram).all()):
            raise self._bad(f"{source} holds NaN or infinite values")
        apart = gram - gram.T
        if linalg.dot(apart, apart) > ASYMMETRY**2 * linalg.dot(gram, gram):
            raise self._bad(f"{source} is not symmetric")
        if bool((gram.diagonal() < 0).any()):
            raise self._bad(f"{source} has negative values on its diagonal")
        return gram

    def norm(self, beat: Callable[[], None]) -> float:
        """Length of all values together, in float64; for Fisher information only."""
        squares = 0.0
        for name in self._plan.merged:
            for start, stop in element_panels(self._base[name].elements):
                values = self.read(name, start, stop)
                squares += linalg.dot32(values, values) if values is not None else 0.0
                beat()
        return math.sqrt(squares)

    def _bad(self, what: str) -> Refused:
        return Refused(
            "bad-sidecar",
            f"{self.path.name}: {what}",
            hint="write it again for this base: docs/methods.md says what it must hold",
        )


def missing(name: str) -> Refused:
    """Word the refusal of a fine-tune without the file that the method asks for."""
    return Refused(
        "missing-sidecar",
        f"it has no {name}, which the method needs",
        hint="publish it beside the weights, or set the knob missing: uniform",
    )
