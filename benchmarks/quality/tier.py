"""What every tier of the benchmark is: a base, its experts, and an exam; and where what was made is kept.

A tier says nothing of merging. Data and trained experts are made once, in a cache folder named by a hash of
the settings that they follow from, and used again by the next run. Delete the folder to make them anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

KEY_CHARACTERS = 12


@dataclass(frozen=True)
class Tier:
    """A base, one expert a task, and an exam that any model of the base's shapes can sit.

    name      as in reports, "glyph-8"
    base      model folder with model.safetensors and config.json
    experts   one model folder a task, in the order of tasks
    accuracy  a model's weights by name -> percent right, one number a task
    """

    name: str
    base: Path
    experts: tuple[Path, ...]
    tasks: tuple[str, ...]
    accuracy: Callable[[Mapping[str, Tensor]], list[float]]


def cache() -> Path:
    """The folder in which made things lie between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "streammerge-quality"


def kept(name: str, settings: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, made at most once for these settings and this torch; whole or not there.

    settings  everything that the content follows from, as JSON can write it
    make      is given a new empty folder
    """
    text = json.dumps({**settings, "torch": torch.__version__}, sort_keys=True)
    folder = cache() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:KEY_CHARACTERS]}"
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        (part / "settings.json").write_text(text + "\n", encoding="utf-8")
        part.rename(folder)
    return folder


def downloaded(pattern: str, *command: str) -> Path:
    """The one file in the download folder whose name matches; `command`, run in that folder, brings it."""
    folder = cache() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(pattern)):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob(pattern))


def debian_package(name: str) -> Path:
    """The root of an unpacked Debian package; nothing is installed and no root is needed."""
    archive = downloaded(f"{name}_*.deb", "apt-get", "download", name)

    def unpack(folder: Path) -> None:
        subprocess.run(["dpkg", "-x", archive, folder], check=True)  # noqa: S607 -- found as the system has it

    return kept(f"debian-{name}", {"archive": archive.name}, unpack)


def npm_package(name: str, version: str) -> Path:
    """The `package` folder of an npm package; nothing is installed and no script of it runs."""
    archive = downloaded(f"{name}-{version}.tgz", "npm", "pack", "--silent", f"{name}@{version}")
    return (
        kept(f"npm-{name}", {"archive": archive.name}, lambda to: shutil.unpack_archive(archive, to))
        / "package"
    )


def save_model(weights: Mapping[str, Tensor], folder: Path, config: Mapping[str, object]) -> None:
    """Write a model folder."""
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a model folder."""
    return load_file(folder / "model.safetensors")


def batches(chance: torch.Generator, rows: int, size: int, steps: int) -> Iterator[Tensor]:
    """Row numbers drawn with replacement, `steps` times [size] int64."""
    for _ in range(steps):
        yield torch.randint(rows, (size,), generator=chance)


def folders(root: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """One folder a name."""
    return tuple(root / name for name in names)
