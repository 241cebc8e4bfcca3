"""One merge, run by the product's own engine and looked at from outside. All contact with the engine is here.

Fine-tunes are folded as `streammerge merge` folds them: from files, with its screens, one thread, the state
on disk between folds. Models are rendered as float32 files and read back.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from tier import load_model

from streammerge.engine import Engine
from streammerge.finalize import Finalize
from streammerge.offline import Job, Request

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch import Tensor


class Running:
    """A merge under way; as a context manager it removes its files.

    fold_seconds    wall time of each fold, its state written and hashed
    render_seconds  wall time of each render, the model written and hashed
    """

    def __init__(self, base: Path, method: str, knobs: Mapping[str, Any], finish: Mapping[str, Any]) -> None:
        """Open the base; nothing is folded yet."""
        self._root = Path(tempfile.mkdtemp(prefix="streammerge-quality-"))
        request = Request(base, (), self._root / "out", method, knobs, finalize=Finalize(**finish))
        self._job = Job.begin(request, Engine(device="cpu", threads=1, residency="disk"), self._root)
        self.fold_seconds: list[float] = []
        self.render_seconds: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._root)

    def fold(self, path: Path) -> None:
        """Fold one fine-tune in; the state before is dropped."""
        began = time.perf_counter()
        self._job.fold(path)
        self.fold_seconds.append(time.perf_counter() - began)

    def render(self) -> dict[str, Tensor]:
        """The merged model as it would be served, float32."""
        out = self._root / "model"
        out.mkdir()
        began = time.perf_counter()
        self._job.render(out, torch.float32)
        self.render_seconds.append(time.perf_counter() - began)
        weights = {name: weight.clone() for name, weight in load_model(out).items()}
        shutil.rmtree(out)
        return weights

    @property
    def state_bytes(self) -> int:
        """Size of what the method remembers between folds."""
        return sum(file.stat().st_size for file in self._job.state.folder.rglob("*") if file.is_file())
