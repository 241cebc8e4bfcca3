"""A bench for the engine: a base opened as the daemon opens it, fine-tunes folded one after another."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import torch
from rich.console import Console

from streammerge import figures, finalize, methods, offline, screen
from streammerge.arriving import Incoming
from streammerge.config.screens import Screens
from streammerge.engine import Engine
from streammerge.fit import Tolerance
from streammerge.headers import find
from streammerge.methods import Totals
from streammerge.plan import DEFAULT_ADDED, Recipe
from streammerge.state import State
from streammerge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from streammerge.figures import Figure
    from streammerge.finetune import FineTune
    from streammerge.folding import Measured
    from streammerge.gauge import Distance

PLAIN = finalize.Finalize()


@dataclass
class Bench:
    """A base with an engine, and states folded one after another as the pipeline does."""

    root: Path
    engine: Engine
    recipe: Recipe
    state: State
    folds: int = 0
    folded: list[tuple[Path, float, str]] = field(default_factory=list)

    def fold(
        self, path: Path, factor: float = 1.0, tolerance: Tolerance | None = None, digest: str = "digest"
    ) -> Measured:
        """Fold one fine-tune and keep its state as if it had been sealed."""
        with self.opened(path, tolerance) as finetune:
            state, measured, _ = self.engine.fold(
                self.recipe, Incoming(finetune, digest, factor), self.state, self._next()
            )
            finetune.finish()
        self.folded.append((path, factor, digest))
        self._seal(state)
        return measured

    def unfold(self, path: Path, index: int, factor: float = 1.0, digest: str = "digest") -> Measured:
        """Take out the fine-tune that was folded as number `index`."""
        with self.opened(path) as finetune:
            incoming = Incoming(finetune, digest, factor)
            state, measured, _ = self.engine.unfold(self.recipe, incoming, index, self.state, self._next())
        del self.folded[index]
        self._seal(state)
        return measured

    def opened(self, path: Path, tolerance: Tolerance | None = None) -> FineTune:
        """Open a fine-tune as the screen does."""
        with Weights(find(self.recipe.base)) as base:
            entries = base.entries
        return screen.examine(path, entries, self.recipe, tolerance or Tolerance())

    def _next(self) -> Path:
        out = self.root / f"state-{self.folds + 1}"
        out.mkdir()
        return out

    def _seal(self, state: State) -> None:
        self.folds += 1
        self.state = replace(state, digest=f"sealed-{self.folds}")

    def render(
        self, name: str = "model", finish: finalize.Finalize = PLAIN, dtype: torch.dtype | None = None
    ) -> Path:
        """Write the merged model and give its folder."""
        out = self.root / name
        out.mkdir()
        with ExitStack() as stack:
            again = [
                Incoming(stack.enter_context(self.opened(path)), digest, factor)
                for path, factor, digest in self.folded
                if methods.rereads(self.recipe.method)
            ]
            hashes, _ = self.engine.render(self.recipe, self.state, finish, out, dtype, again)
        assert hashes == {p.name: sha256(p) for p in out.glob("*.safetensors")}
        return out


def bench(root: Path, base: Path, **options: Any) -> Bench:
    """Open a base for folding by opcm."""
    return bench_of(root, base, **{"method": "opcm", **options})


def bench_of(
    root: Path,
    base: Path,
    *,
    method: str,
    knobs: Mapping[str, Any] | None = None,
    added: Iterable[str] = DEFAULT_ADDED,
    **options: Any,
) -> Bench:
    """Open a base for folding."""
    root.mkdir(exist_ok=True)
    engine = Engine(**{"device": "cpu", "threads": 1, "residency": "disk", **options})
    found, _ = engine.open_base(base, tuple(added))
    recipe = replace(found, method=method, knobs=methods.resolve(method, {**needed(method), **(knobs or {})}))
    return Bench(root, engine, recipe, State(root / "state-0", {}, Totals()))


class Watch:
    """A merge whose fine-tunes are judged as they come."""

    def __init__(
        self,
        root: Path,
        base: dict[str, Any],
        config: dict[str, Any] | None = None,
        method: str = "spectral_cap",
    ) -> None:
        """Save the base and open it."""
        self.root, self.base, self.config = root, base, config or models.CONFIG
        models.save(root / "base", base, config=self.config)
        self.bench: Bench = bench_of(root / "run", root / "base", method=method)
        self.length = sum(float(v.square().sum()) for v in base.values() if v.is_floating_point()) ** 0.5
        self.samples: list[tuple[str, bytes]] = []
        self.attention: list[Distance] = []

    def take(self, tensors: Mapping[str, Tensor], limits: Screens | None = None) -> dict[str, Figure]:
        """Fold a fine-tune and judge it; it stays in the merge, whatever the verdict."""
        limits = limits or Screens()
        path = self.root / f"ft{len(self.samples)}"
        models.save(path, tensors, config=self.config)
        measured = self.bench.fold(path)
        nearest = figures.nearest(measured.sample, [self.samples])
        with self.bench.opened(path) as opened:
            recipe, raw = self.bench.recipe, limits.gauge.raw
            attention = self.bench.engine.attention(recipe, Incoming(opened), measured, raw=raw)
            self.attention = attention or []
        self.samples.append((path.name, measured.sample))
        return figures.examine(figures.Evidence(measured, self.length, attention, nearest), limits)


def needed(method: str) -> dict[str, Any]:
    """Knobs without which a method refuses a fine-tune that comes alone."""
    return {"missing": "uniform"} if methods.sidecar(method) else {}


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Give the hash of every file below a folder."""
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names and every bit agree."""
    return set(one) == set(other) and all(
        one[n].dtype == v.dtype
        and torch.equal(one[n].reshape(-1).view(torch.uint8), v.reshape(-1).view(torch.uint8))
        for n, v in other.items()
    )


def open_files() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def fine_tunes(root: Path, base: Mapping[str, Tensor], count: int = 3, **options: Any) -> list[Path]:
    """Make several fine-tunes."""
    paths = [root / f"ft{i}" for i in range(count)]
    for i, path in enumerate(paths):
        models.make_fine_tune(path, base, seed=10 + i, **options)
    return paths


def merge(out: Path, base: Path, paths: Iterable[Path], **options: Any) -> dict[str, Any]:
    """Do what `streammerge merge` does."""
    warn = options.pop("warn", lambda _: None)
    request = offline.Request(base=base, fine_tunes=tuple(paths), out=out, device="cpu", threads=1, **options)
    return offline.merge(request, warn=warn, console=Console(quiet=True))
