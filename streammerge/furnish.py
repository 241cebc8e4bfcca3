"""What servers need beside the weights: config, tokenizer, shard index, the card, and the mark of a merge."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import files
from streammerge.headers import MARK, PICKLES, WeightsSet, find, read_json
from streammerge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

DTYPE_KEYS = ("torch_dtype", "dtype")


def read_config(base: Path) -> dict[str, Any]:
    """Read config.json beside the weights, as data; {} for a single file. Raises Refused for all else."""
    return read_json(base / "config.json") if base.is_dir() else {}


def furnish(
    base: Path, out: Path, card: Iterable[str], mark: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Put beside the rendered weights what servers need: config, tokenizer and the rest of the base's folder.

    Other weight formats, hidden files and the base's own card stay behind. The lines of `card` become
    README.md; `mark` says in a file of its own that this is a merge, so that it is never folded back in.
    """
    if base.is_dir():
        weights = {path.name for path in find(base).files}
        for directory, folders, names in os.walk(base):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            target = out / Path(directory).relative_to(base)
            target.mkdir(exist_ok=True)
            for name in sorted(names):
                unwanted = (
                    name.startswith(".")
                    or PICKLES.match(name)
                    or name.endswith((".safetensors", ".safetensors.index.json"))
                )
                path = Path(directory, name)  # a link is followed, a pipe or a dead link left out
                if (
                    not unwanted
                    and name not in weights
                    and name not in ("README.md", MARK)
                    and path.is_file()
                ):
                    shutil.copyfile(path, target / name)
        _write_index(base, out)
    if dtype is not None:
        _declare_dtype(out / "config.json", dtype)
    with (out / "README.md").open("w", encoding="utf-8") as readme:
        readme.writelines(card)
    files.write_json(out / MARK, dict(mark))
    for path in out.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _write_index(base: Path, out: Path) -> None:
    """Write the shard index anew: the base's map, the size as rendered."""
    found = find(base)
    if not found.index:
        return
    with Weights(WeightsSet(tuple(out / path.name for path in found.files))) as rendered:
        weight_map = {name: rendered.set.files[entry.file].name for name, entry in rendered.entries.items()}
        total = sum(entry.stop - entry.start for entry in rendered.entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / found.index).write_bytes(files.canonical_json(index))


def _declare_dtype(path: Path, dtype: torch.dtype) -> None:
    """Correct config.json where it names the dtype of the weights."""
    if not path.is_file():
        return
    config = read_json(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in DTYPE_KEYS:
            if key in part:
                part[key] = str(dtype).removeprefix("torch.")
    path.write_bytes(files.canonical_json(config))
