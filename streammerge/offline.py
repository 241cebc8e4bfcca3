"""Merging without a store: `streammerge merge`, and what `config check` can say before one exists.

The same engine, screens and finalize as the daemon's, so the same inputs in the same order give the same
bytes.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from rich.progress import Progress

from streammerge import files, finalize, methods, plan, screen
from streammerge.card import card
from streammerge.config import DirectorySource
from streammerge.engine import Engine, Measured
from streammerge.errors import ConfigError, Refused
from streammerge.fit import Tolerance
from streammerge.furnish import furnish
from streammerge.lineage import manifest_of
from streammerge.merging import added_globs, open_base_headers
from streammerge.methods import Totals
from streammerge.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from streammerge.config import Config
    from streammerge.headers import Entry
    from streammerge.plan import Recipe

RENDER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOWABLE = ("zero-delta", "duplicate", "implausible", "own-merge")


@dataclass(frozen=True)
class Request:
    """What `streammerge merge` was asked for."""

    base: Path
    fine_tunes: tuple[Path, ...]
    out: Path
    method: str = methods.DEFAULT
    knobs: Mapping[str, Any] | None = None
    added: tuple[str, ...] | None = None
    allow: frozenset[str] = frozenset()
    scale: float = 1.0
    dtype: str | None = None
    device: str = "auto"
    threads: int | None = None


def merge(request: Request, *, warn: Callable[[str], None], console: Console) -> dict[str, Any]:
    """Fold the fine-tunes in order and write OUT/model and OUT/manifest.json; gives the manifest.

    Raises ConfigError for a request that makes no sense, Refused for a fine-tune the screen refuses. OUT
    appears whole or not at all.
    """
    dtype, finish = check_request(request)
    request.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{request.out.name}-", dir=request.out.absolute().parent))
    try:
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
            files.disk_errors("merging"),
        ):
            manifest = _merge_in(work, request, dtype, finish, warn, progress)
        for part in work.iterdir():
            if part.name not in ("model", "manifest.json"):
                shutil.rmtree(part)
        files.fsync_tree(work)
        work.chmod(0o755)
        if request.out.exists():
            request.out.rmdir()  # empty: checked
        work.rename(request.out)
        files.fsync_folder(request.out.absolute().parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def check_request(request: Request) -> tuple[torch.dtype | None, finalize.Finalize]:
    """Refuse a request that makes no sense before anything is read."""
    if request.method not in methods.NAMES:
        raise ConfigError(
            f"--method {request.method}: no such method", hint=f"methods are {', '.join(methods.NAMES)}"
        )
    if request.dtype is not None and request.dtype not in RENDER_DTYPES:
        raise ConfigError(
            f"--dtype {request.dtype}: not one of {', '.join(RENDER_DTYPES)}",
            hint="leave it out for the base's",
        )
    if unknown := [reason for reason in request.allow if reason not in ALLOWABLE]:
        raise ConfigError(
            f"--allow {unknown[0]}: cannot be allowed", hint=f"these can: {', '.join(ALLOWABLE)}"
        )
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise ConfigError(f"--out {request.out} is there already", hint="give a new folder")
    for path in (request.base, *request.fine_tunes):
        if not path.exists():
            raise ConfigError(f"{path} is not there", hint="give model folders or .safetensors files")
    try:
        return RENDER_DTYPES.get(request.dtype or ""), finalize.Finalize(scale=request.scale)
    except ValidationError as exc:
        raise ConfigError(
            f"--scale {request.scale}: {exc.errors()[0]['msg']}", hint="1.0 is the method's own length"
        ) from exc


def _merge_in(
    work: Path,
    request: Request,
    dtype: torch.dtype | None,
    finish: finalize.Finalize,
    warn: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Do the work in a folder that is thrown away if anything fails."""
    bar = progress.add_task("reading the base", total=None)
    engine = Engine(
        device=request.device, threads=request.threads, progress=lambda count: progress.advance(bar, count)
    )
    knobs = methods.resolve(request.method, request.knobs or {})
    added = plan.DEFAULT_ADDED if request.added is None else request.added
    found, _ = engine.open_base(request.base, added)
    recipe = replace(found, method=request.method, knobs=knobs)
    entries = open_base_headers(request.base)
    if request.added is not None and (idle := plan.idle_globs(entries, request.added)):
        warn(f"--added {idle[0]} matches no weight of the base")
    size = sum(entry.stop - entry.start for entry in entries.values())
    progress.update(bar, total=size * (2 + 2 * len(request.fine_tunes)), completed=size)
    job = _Job(engine, recipe, entries, request.allow)
    folded: list[dict[str, Any]] = []
    state, measured = State(work / "state-0", {}, Totals()), None
    for number, path in enumerate(request.fine_tunes, 1):
        progress.update(bar, description=f"folding {path.name}")
        state, entry, measured = _fold_one(job, path, state, folded, work / f"state-{number}")
        folded.append(entry)
        shutil.rmtree(work / f"state-{number - 1}", ignore_errors=True)
    progress.update(bar, description="writing the model")
    (work / "model").mkdir()
    hashes, norm = engine.render(recipe, state, finish, work / "model", dtype)
    manifest = {
        "base": {"digest": recipe.base_digest, "name": request.base.name},
        **manifest_of(engine, recipe, finish, folded, state.totals, norm, measured),
        "added": list(added),
        "files": {f"model/{name}": {"sha256": digest} for name, digest in sorted(hashes.items())},
    }
    mark = {key: manifest[key] for key in ("base", "method", "knobs", "finalize", "fine_tunes")}
    text = card({**manifest, "version": "of a merge"}, base_model=request.base.name)
    furnish(request.base, work / "model", text, mark, dtype)
    files.write_file(work / "manifest.json", files.canonical_json(manifest))
    return manifest


@dataclass(frozen=True)
class _Job:
    """What stays the same for every fine-tune of one merge."""

    engine: Engine
    recipe: Recipe
    entries: Mapping[str, Entry]
    allow: frozenset[str]


def _fold_one(
    job: _Job, path: Path, state: State, folded: list[dict[str, Any]], out: Path
) -> tuple[State, dict[str, Any], Measured]:
    """Fold one fine-tune; its name is put before what the screen says of it."""
    out.mkdir()
    try:
        with screen.examine(path, job.entries, job.recipe.plan, Tolerance(), allow=job.allow) as finetune:
            new, measured = job.engine.fold(job.recipe, finetune, "", 1.0, state, out)
            digest = finetune.finish()
        if "duplicate" not in job.allow:
            screen.refuse_known(digest, folded={entry["digest"] for entry in folded}, denied=())
        screen.judge(measured, max_delta_ratio=1.0, allow=job.allow)
    except Refused as exc:
        raise Refused(exc.reason, f"{path}: {exc.message} ({exc.reason})", hint=_hint(exc)) from exc
    return (
        new,
        {"name": path.name, "source": "", "revision": digest[:16], "digest": digest, "weight": 1.0},
        measured,
    )


def _hint(refused: Refused) -> str:
    return f"{refused.hint}; or --allow {refused.reason}" if refused.reason in ALLOWABLE else refused.hint


def check(config: Config) -> dict[str, Any]:
    """Check what a daemon would need: base, knobs, sources; and what the store will take.

    Of a base that is still on a Hub nothing is known: its figures are 0, with a warning.
    """
    knobs = methods.resolve(config.method, config.knobs)
    is_there = not config.hub_base or config.base_path.exists()
    entries = open_base_headers(config.base_path) if is_there else {}
    globs = added_globs(config)
    floats = [entry for entry in entries.values() if entry.is_floating]
    matrices = [e for e in floats if len(e.shape) == 2 and not plan.matches(e.name, globs)]
    base_bytes = sum(entry.stop - entry.start for entry in entries.values())
    state_bytes = 4 * sum(e.elements for e in floats) * len(methods.load(config.method).SLOTS)
    warnings = [
        f"added: {glob} matches no weight of the base"
        for glob in plan.idle_globs(entries, config.added or ())
        if is_there
    ]
    if not is_there:
        warnings.append(
            f"base {config.base} is not here yet: the first run fetches it, and then sizes are known"
        )
    warnings += [
        f"source {part.name}: {part.path} is not there yet"
        for part in config.sources
        if isinstance(part, DirectorySource) and not part.path.is_dir()
    ]
    if not config.sources:
        warnings.append("no sources: nothing will ever be folded")
    if not methods.load(config.method).WEIGHTED:
        warnings += [
            f"source {p.name}: weight is ignored by {config.method}"
            for p in config.sources
            if not math.isclose(p.weight, 1.0)
        ]
    free = shutil.disk_usage(next(p for p in (config.store, *config.store.parents) if p.exists())).free
    version_bytes = base_bytes + state_bytes
    if free < 2 * version_bytes + config.reserve:
        warnings.append(f"only {free:,} bytes are free for the store")
    return {
        "weights": len(entries), "projected": len(matrices), "added": len(floats) - len(matrices),
        "base_bytes": base_bytes, "version_bytes": version_bytes,
        "full_store_bytes": version_bytes * (config.keep + 1), "free_bytes": free,
        "method": config.method, "knobs": knobs, "warnings": warnings,
    }  # fmt: skip
