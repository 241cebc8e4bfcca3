"""Merging without a store: `streammerge merge`, and what `config check` can say before one exists.

The same engine, screens and finalize as the daemon's, so the same inputs in the same order give the same
bytes.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress

from streammerge import figures, files, gates, machine, methods, plan, screen, weights
from streammerge.arriving import Incoming
from streammerge.card import card
from streammerge.config.screens import Screens
from streammerge.config.sources import DirectorySource
from streammerge.engine import Engine, Serve
from streammerge.errors import ConfigError, NoDeviceMemory, Refused
from streammerge.finalize import Finalize
from streammerge.fit import Tolerance
from streammerge.furnish import furnish
from streammerge.lineage import manifest_of
from streammerge.members import Member, Members
from streammerge.methods import Totals
from streammerge.recipes import added_globs, check_lines, check_method, open_base_headers
from streammerge.reports import full_store
from streammerge.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from streammerge.config import Config, Route
    from streammerge.finetune import FineTune
    from streammerge.folding import Measured
    from streammerge.headers import Entry
    from streammerge.plan import Recipe
    from streammerge.rendering import Rendered

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
    weights: tuple[float, ...] = ()
    routes: tuple[Route, ...] = ()
    finalize: Finalize = field(default_factory=Finalize)
    dtype: str | None = None
    device: str = "auto"
    threads: int | None = None

    @property
    def factors(self) -> tuple[float, ...]:
        """The weight of each fine-tune: one given stands for all."""
        given = self.weights or (1.0,)
        return given * len(self.fine_tunes) if len(given) == 1 else given


def merge(request: Request, *, warn: Callable[[str], None], console: Console) -> dict[str, Any]:
    """Fold the fine-tunes in order and write OUT/model and OUT/manifest.json; gives the manifest.

    Raises ConfigError for a request that makes no sense, Refused for a fine-tune the screen refuses. OUT
    appears whole or not at all.
    """
    dtype = check_request(request)
    request.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{request.out.name}-", dir=request.out.absolute().parent))
    try:
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
            machine.errors("merging"),
        ):
            manifest = _merge_in(work, request, dtype, warn, progress)
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


def check_request(request: Request) -> torch.dtype | None:
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
    check_lines(request.finalize, request.method)
    if len(request.factors) != len(request.fine_tunes):
        raise ConfigError(
            f"--weight is given {len(request.weights)} times for {len(request.fine_tunes)} fine-tunes",
            hint="give it once for all, or once for each in their order",
        )
    if not all(math.isfinite(factor) and factor for factor in request.factors):
        raise ConfigError("--weight must be a number other than 0", hint="leave a fine-tune out instead")
    return RENDER_DTYPES.get(request.dtype or "")


def _merge_in(
    work: Path,
    request: Request,
    dtype: torch.dtype | None,
    warn: Callable[[str], None],
    progress: Progress,
) -> dict[str, Any]:
    """Do the work in a folder that is thrown away if anything fails."""
    bar = progress.add_task("reading the base", total=None)
    engine = Engine(
        device=request.device, threads=request.threads, progress=lambda count: progress.advance(bar, count)
    )
    job = Job.begin(request, engine, work)
    for text in job.idle():
        warn(text)
    size = sum(entry.stop - entry.start for entry in job.entries.values())
    progress.update(bar, total=size * (2 + 2 * len(request.fine_tunes)), completed=size)
    (work / "model").mkdir()
    rendered: Rendered | None = None
    for number, (path, factor) in enumerate(zip(request.fine_tunes, request.factors, strict=True), 1):
        progress.update(bar, description=f"folding {path.name}")
        is_last = number == len(request.fine_tunes) and dtype is None
        model = work / "model" if is_last else None
        try:
            rendered = job.fold(path, factor, model)
        except NoDeviceMemory as exc:
            warn(f"{exc.message}; {exc.hint}")
            rendered = job.fold(path, factor, model)
        finally:
            for text in job.flags:
                warn(text)
            job.flags.clear()
    if rendered is None:
        progress.update(bar, description="writing the model")
        rendered = job.render(work / "model", dtype)
    hashes, norm = rendered
    recipe, finish = job.recipe, request.finalize
    manifest = {
        "base": {"digest": recipe.base_digest, "name": request.base.name},
        **manifest_of(engine, recipe, finish, job.folded, job.state.totals, norm, job.measured),
        "added": list(job.added),
        "files": {f"model/{name}": {"sha256": digest} for name, digest in sorted(hashes.items())},
    }
    mark = {key: manifest[key] for key in ("base", "method", "knobs", "finalize", "fine_tunes")}
    lines = card({**manifest, "version": "of a merge"}, base_model=request.base.name)
    furnish(request.base, work / "model", lines, mark, dtype)
    files.write_json(work / "manifest.json", manifest)
    return {**manifest, "fine_tunes": [member._asdict() for member in job.folded]}


@dataclass
class Job:
    """A merge without a store: fine-tunes folded one after another, rendered at any time."""

    request: Request
    engine: Engine
    work: Path
    recipe: Recipe
    base_norm: float
    entries: Mapping[str, Entry]
    state: State
    measured: Measured | None = None
    folded: Members = field(default_factory=Members)
    flags: list[str] = field(default_factory=list)  # what the screens of figures say against fine-tunes
    _samples: list[tuple[str, bytes]] = field(default_factory=list)
    _paths: list[Path] = field(default_factory=list)

    @classmethod
    def begin(cls, request: Request, engine: Engine, work: Path) -> Job:
        """Read the base."""
        knobs = methods.resolve(request.method, request.knobs or {})
        added = plan.DEFAULT_ADDED if request.added is None else request.added
        found, norm = engine.open_base(request.base, added)
        is_capped = request.finalize.cap is not None
        recipe = replace(
            found, method=request.method, knobs=knobs, routes=request.routes, is_capped=is_capped
        )
        return cls(
            request,
            engine,
            work,
            recipe,
            norm,
            open_base_headers(request.base),
            State(work / "state-0", {}, Totals()),
        )

    @property
    def added(self) -> tuple[str, ...]:
        """The globs of weights that are added whole."""
        return plan.DEFAULT_ADDED if self.request.added is None else self.request.added

    def idle(self) -> list[str]:
        """Say what was asked for and changes nothing."""
        found = [
            f"--added {glob} matches no weight of the base"
            for glob in plan.idle_globs(self.entries, self.request.added or ())
        ]
        globs = [route.weights for route in self.request.routes]
        found += [
            f"--route {glob} matches no weight of the base" for glob in plan.idle_globs(self.entries, globs)
        ]
        method = self.recipe.method
        if not methods.load(method).WEIGHTED and any(factor != 1.0 for factor in self.request.factors):
            found.append(f"--weight is ignored by {method}")
        return found

    def fold(self, path: Path, factor: float = 1.0, model: Path | None = None) -> Rendered | None:
        """Fold one fine-tune; its name is put before what the screen says of it.

        With `model`, an empty folder, the merged model is written there in the same pass where the method
        can; else None is given, and `render` does it.
        """
        out = self.work / f"state-{len(self.folded) + 1}"
        for folder in (out, *([model] if model is not None else [])):
            shutil.rmtree(folder, ignore_errors=True)  # what an earlier try left
            folder.mkdir()
        try:
            digest = self._digest(path)
            with self.opened(path) as finetune:
                incoming = Incoming(finetune, digest, factor, path.name)
                serve = Serve(model, self.request.finalize) if model is not None else None
                new, measured, rendered = self.engine.fold(self.recipe, incoming, self.state, out, serve)
                digest = finetune.finish()
                self._look(path, incoming, measured)
            if "duplicate" not in self.request.allow:
                known = {member.digest for member in self.folded}
                screen.refuse_known(digest, folded=known, denied=())
            screen.judge(measured, self.base_norm, max_delta_ratio=1.0, allow=self.request.allow)
        except Refused as exc:
            raise Refused(exc.reason, f"{path}: {exc.message} ({exc.reason})", hint=_hint(exc)) from exc
        shutil.rmtree(self.state.folder, ignore_errors=True)
        self.state, self.measured = new, measured
        self._samples.append((path.name, measured.sample))
        self._paths.append(path)
        self.folded += [Member("", path.name, digest[:16], digest, factor)]
        return rendered

    def _look(self, path: Path, incoming: Incoming, measured: Measured) -> None:
        """Judge by figures as the daemon does by default; here it only warns."""
        limits = Screens()
        attention = self.engine.attention(self.recipe, incoming, measured, raw=limits.gauge.raw)
        nearest = figures.nearest(measured.sample, [self._samples])
        found = figures.examine(figures.Evidence(measured, self.base_norm, attention, nearest), limits)
        self.flags += [f"{path}: {f.note} ({f.reason})" for f in found.values() if f.is_beyond]

    def _digest(self, path: Path) -> str:
        """Know a fine-tune before it is folded, where what the method draws depends on it."""
        if not getattr(methods.load(self.recipe.method), "SEEDED", False):
            return ""
        return weights.identity(path, self.engine.beat, methods.sidecar(self.recipe.method))

    def opened(self, path: Path) -> FineTune:
        """Open a fine-tune as the screen does."""
        return screen.examine(path, self.entries, self.recipe, Tolerance(), allow=self.request.allow)

    def render(self, out: Path, dtype: torch.dtype | None = None) -> Rendered:
        """Write the merged model to an empty folder; see Engine.render."""
        with ExitStack() as stack:
            again = [
                Incoming(stack.enter_context(self.opened(path)), member.digest, member.weight, path.name)
                for path, member in zip(self._paths, self.folded, strict=True)
                if methods.rereads(self.recipe.method)
            ]
            return self.engine.render(self.recipe, self.state, self.request.finalize, out, dtype, again)


def _hint(refused: Refused) -> str:
    return f"{refused.hint}; or --allow {refused.reason}" if refused.reason in ALLOWABLE else refused.hint


def check(config: Config) -> dict[str, Any]:
    """Check what a daemon would need: base, knobs, sources; and what the store will take.

    Of a base that is still on a Hub nothing is known: its figures are 0, with a warning.
    """
    knobs = methods.resolve(config.method, config.knobs)
    check_method(config)
    gates.require(config.gates)
    is_there = not config.hub_base or config.base_path.exists()
    entries = open_base_headers(config.base_path) if is_there else {}
    kinds = {e.name: plan.kind_of(e, added_globs(config)) for e in entries.values() if e.is_floating}
    recipe = plan.Recipe(config.base_path, "", plan.Plan(kinds), config.method, knobs)
    projected = sum(kind == plan.PROJECTED for kind in kinds.values())
    base_bytes = sum(e.stop - e.start for e in entries.values())
    version_bytes = base_bytes + recipe.state_bytes(entries)
    warnings = warnings_of(config, entries, is_there=is_there)
    free = shutil.disk_usage(next(p for p in (config.store, *config.store.parents) if p.exists())).free
    if free < 2 * version_bytes + config.reserve:
        warnings.append(f"only {free:,} bytes are free for the store")
    return {
        "weights": len(entries), "projected": projected, "added": len(kinds) - projected,
        "base_bytes": base_bytes, "version_bytes": version_bytes,
        "full_store_bytes": version_bytes * full_store(config, methods.removal(config.method, knobs)),
        "free_bytes": free,
        "method": config.method, "knobs": knobs, "warnings": warnings,
    }  # fmt: skip


def warnings_of(config: Config, entries: Mapping[str, Entry], *, is_there: bool) -> list[str]:
    """Say what is allowed and probably not meant."""
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
    warnings += [
        f"routes: {glob} matches no weight of the base"
        for glob in plan.idle_globs(entries, [route.weights for route in config.routes])
        if is_there
    ]
    names = {part.name for part in config.sources}
    warnings += [
        f"routes: there is no source {route.source}"
        for route in config.routes
        if route.source is not None and route.source not in names
    ]
    if not config.sources:
        warnings.append("no sources: nothing will ever be folded")
    if not methods.load(config.method).WEIGHTED:
        warnings += [
            f"source {p.name}: weight is ignored by {config.method}"
            for p in config.sources
            if not math.isclose(p.weight, 1.0)
        ]
    return warnings
