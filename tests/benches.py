"""A bench for the engine: a base opened as the daemon opens it, fine-tunes folded one after another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import torch
from rich.console import Console

from streammerge import finalize, methods, offline, screen
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

    from streammerge.engine import Measured

PLAIN = finalize.Finalize()


@dataclass
class Bench:
    """A base with an engine, and states folded one after another as the pipeline does."""

    root: Path
    engine: Engine
    recipe: Recipe
    state: State
    folds: int = 0

    def fold(self, path: Path, factor: float = 1.0, tolerance: Tolerance | None = None) -> Measured:
        """Fold one fine-tune and keep its state as if it had been sealed."""
        out = self.root / f"state-{self.folds + 1}"
        out.mkdir()
        with Weights(find(self.recipe.base)) as base:
            entries = base.entries
        with screen.examine(path, entries, self.recipe.plan, tolerance or Tolerance()) as finetune:
            state, measured = self.engine.fold(self.recipe, finetune, "digest", factor, self.state, out)
            finetune.finish()
        self.folds += 1
        self.state = replace(state, digest=f"sealed-{self.folds}")
        self.engine.keep(self.state.digest)
        return measured

    def render(
        self, name: str = "model", finish: finalize.Finalize = PLAIN, dtype: torch.dtype | None = None
    ) -> Path:
        """Write the merged model and give its folder."""
        out = self.root / name
        out.mkdir()
        hashes, _ = self.engine.render(self.recipe, self.state, finish, out, dtype)
        assert hashes == {p.name: sha256(p) for p in out.glob("*.safetensors")}
        return out


def bench(
    root: Path, base: Path, *, method: str = "opcm", added: Iterable[str] = DEFAULT_ADDED, **options: Any
) -> Bench:
    """Open a base for folding."""
    root.mkdir(exist_ok=True)
    engine = Engine(**{"device": "cpu", "threads": 1, "residency": "disk", **options})
    found, _ = engine.open_base(base, tuple(added))
    recipe = replace(found, method=method, knobs=methods.resolve(method, {}))
    return Bench(root, engine, recipe, State(root / "state-0", {}, Totals()))


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
    request = offline.Request(base=base, fine_tunes=tuple(paths), out=out, device="cpu", threads=1, **options)
    return offline.merge(request, warn=lambda _: None, console=Console(quiet=True))
