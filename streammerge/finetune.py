"""Fetched files opened as deltas of the base, one weight at a time: full weights, or an adapter.

What fits the base and how is `fit`'s; how an adapter's factors become a delta is `adapters`'.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol, Self

import torch

from streammerge.adapters import Adapter
from streammerge.fit import fit, refuse_untied
from streammerge.headers import find, read_json
from streammerge.sidecar import Sidecar
from streammerge.weights import Weights, digest_with

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from streammerge.fit import Tolerance
    from streammerge.headers import Entry, WeightsSet
    from streammerge.linalg import Delta, Read
    from streammerge.plan import Plan


class Deltas(Protocol):
    """Fetched weights, read as what they change of the base."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""

    weights: Weights
    in_panels: bool  # whether a projected weight too may be asked for in parts

    def read(self, name: str, start: int, stop: int) -> Read:
        """Read what is needed for elements [start, stop) of the base's weight `name`.

        What it gives computes fine-tune minus base, float32, of the base's values as float32: in the weight's
        shape where it is processed whole, else flat. Reading and computing may be done on two threads.
        """

    def rereading(self) -> AbstractContextManager[None]:
        """Inside, deltas may be asked for again and in any order; none of it counts as read."""

    def finish(self) -> str:
        """Read what no delta needed, make the last checks, and give the digest of all that was read."""


class FineTune:
    """An open fine-tune of the base, and what came beside its weights."""

    def __init__(self, deltas: Deltas, sidecar: Sidecar | None) -> None:
        """Both are open; `close` closes them."""
        self._deltas, self.sidecar = deltas, sidecar
        self.read, self.in_panels = deltas.read, deltas.in_panels

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deltas.__exit__(kind, error, trace)
        if self.sidecar is not None:
            self.sidecar.weights.__exit__(kind, error, trace)

    def bring(self, lane: Callable[[Tensor], Tensor]) -> None:
        """Have all that is read from now on brought somewhere."""
        self._deltas.weights.bring = lane

    @contextmanager
    def rereading(self) -> Iterator[None]:
        """See Deltas.rereading; the sidecar too."""
        with ExitStack() as stack:
            stack.enter_context(self._deltas.rereading())
            if self.sidecar is not None:
                stack.enter_context(self.sidecar.weights.unhashed())
            yield

    def finish(self) -> str:
        """See Deltas.finish; the sidecar counts too."""
        digest = self._deltas.finish()
        if self.sidecar is None:
            return digest
        self.sidecar.weights.read_rest()
        return digest_with(digest, self.sidecar.weights.content_digest())


def open_fine_tune(
    path: Path, base: Mapping[str, Entry], plan: Plan, tolerance: Tolerance, sidecar: str = ""
) -> FineTune:
    """Open fetched files and fit them to the base; raises Refused or headers.Incomplete.

    `sidecar` names the file beside the weights that is opened too where it is there.
    """
    found = find(path)
    deltas: Deltas
    if found.adapter is not None:
        deltas = Adapter(found, base, plan, tolerance)
    else:
        config = read_json(path / "config.json") if path.is_dir() else {}
        deltas = FullWeights(found, config, base, plan, tolerance)
    if not sidecar or not (path / sidecar).is_file():
        return FineTune(deltas, None)
    try:
        return FineTune(deltas, Sidecar(path / sidecar, base, plan))
    except BaseException:
        deltas.__exit__(None, None, None)
        raise


class FullWeights:
    """A fine-tune published with all its weights."""

    in_panels = True

    def __init__(
        self,
        found: WeightsSet,
        config: Mapping[str, object],
        base: Mapping[str, Entry],
        plan: Plan,
        tolerance: Tolerance,
    ) -> None:
        """Open the files and fit them to the base; `config` is the fine-tune's config.json."""
        self.weights = Weights(found, hashing=True)
        try:
            self.fit = fit(base, self.weights.entries, config, plan, tolerance)
        except BaseException:
            self.weights.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.weights.__exit__(kind, error, trace)

    def rereading(self) -> AbstractContextManager[None]:
        """See Deltas.rereading."""
        return self.weights.unhashed()

    def read(self, name: str, start: int, stop: int) -> Read:
        """See Deltas.read."""
        if name in self.fit.absent:
            return torch.zeros_like
        tuned = self.weights.read(self.fit.sources[name], start, stop)

        def minus(original: Tensor) -> Delta:
            values = tuned.to(original.device, torch.float32).reshape(original.shape)
            is_copy = values.data_ptr() != tuned.data_ptr()  # what was read may still be hashed
            return values.sub_(original) if is_copy else values - original

        return minus

    def finish(self) -> str:
        """See Deltas.finish; a tied head that was saved twice must repeat its embedding."""
        self.weights.read_rest()
        for head, embedding in self.fit.heads.items():
            if self.weights.tensor_digest(head) != self.weights.tensor_digest(embedding):
                raise refuse_untied(head, embedding)
        return self.weights.content_digest()
