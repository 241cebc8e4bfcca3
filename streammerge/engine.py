"""Streams weights through a method, on CPU or GPU: fold one fine-tune into a state, render a state as a model.

Two passes, because OPCM's scale is known only when every weight was folded: the first reads base, fine-tune and
state and writes the next state; the second reads base and state and writes what servers load. A projected weight is
held whole; everything else streams in panels. Totals are summed in float64. Knows nothing of versions, sources or
verdicts: what it measures it returns.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streammerge import files, finalize, linalg, methods, plan
from streammerge.errors import ConfigError, Damaged, Refused
from streammerge.methods import Arrival, Slots, Totals
from streammerge.weights import CODES, PICKLES, Weights, WeightsSet, Writer, element_panels, find

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from streammerge.finetune import FineTune

STATISTICS = "statistics.safetensors"
MARK = "streammerge.json"
DTYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(frozen=True)
class Recipe:
    """What does not change from fold to fold: the base, the kind of each weight, the method and its knobs."""

    base: Path
    base_digest: str
    plan: plan.Plan
    method: str
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """A method's state on disk. `hashes` are the sha256 of its files, by name; none of them before the first fold."""

    folder: Path
    hashes: Mapping[str, str]
    totals: Totals
    digest: str = ""

    def has_slots(self) -> bool:
        """Whether anything was folded yet; otherwise every slot is zero."""
        return self.totals.count > 0


@dataclass
class Measured:
    """What one fold saw, summed over weights in float64.

    delta_norm, base_norm, state_norm  Frobenius norms over floating-point weights, tied ones once
    kept_energy     share of ||delta||^2 of projected weights that entered the state
    orthogonality   largest |<P, D>| / (||P|| ||D||) over projected weights; P what was added to the sum D
    statistics      weight -> (||delta||_F, ||delta^T delta||_F, largest singular value); NaN for added matrices
    """

    delta_squares: float = 0.0
    base_squares: float = 0.0
    state_squares: float = 0.0
    projected_squares: float = 0.0
    step_squares: float = 0.0
    orthogonality: float = 0.0
    statistics: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def delta_norm(self) -> float:
        """Length of the fine-tune's delta."""
        return math.sqrt(self.delta_squares)

    @property
    def base_norm(self) -> float:
        """Length of the base."""
        return math.sqrt(self.base_squares)

    @property
    def state_norm(self) -> float:
        """Length of the method's first slot."""
        return math.sqrt(self.state_squares)

    @property
    def kept_energy(self) -> float:
        """1.0 where nothing was projected away."""
        return self.step_squares / self.projected_squares if self.projected_squares else 1.0


class Engine:
    """Holds the device, and between folds the state where it fits there (`residency`)."""

    def __init__(
        self,
        *,
        device: str = "auto",
        threads: int | None = None,
        residency: str = "auto",
        beat: Callable[[], None] = lambda: None,
        progress: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """`beat` is called between weights and panels: it may raise errors.Stopped; `progress` is told bytes read."""
        self.device = choose_device(device)
        if threads:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self.residency = residency
        self.beat = beat
        self.progress = progress
        self._resident: dict[tuple[str, str], Tensor] = {}
        self._resident_digest: str | None = None

    def open_base(self, path: Path, added: tuple[str, ...]) -> tuple[Recipe, float]:
        """Read a base once: its digest, the kind of every weight, its norm. Method and knobs are the caller's.

        Raises ConfigError for a base that cannot be merged into.
        """
        try:
            with Weights(find(path), hashing=True) as base:
                squares = 0.0
                for name, entry in base.entries.items():
                    if not entry.is_floating and entry.dtype.startswith("F8"):
                        raise ConfigError(f"base {path}: {name} is quantised ({entry.dtype})", hint=FULL_BASE)
                    for start, stop in element_panels(entry.elements):
                        values = base.read(name, start, stop)
                        squares += linalg.dot(*[values.float()] * 2) if entry.is_floating else 0.0
                        self._pass(values)
                    if not math.isfinite(squares):
                        raise ConfigError(
                            f"base {path}: {name} holds NaN or infinite values", hint="repair the base"
                        )
                config = read_config(path)
                if config.get("quantization_config"):
                    raise ConfigError(f"base {path} is quantised by its config.json", hint=FULL_BASE)
                return Recipe(path, base.content_digest(), plan.make(base, config, added), "", {}), math.sqrt(
                    squares
                )
        except (OSError, Refused) as exc:
            raise ConfigError(
                f"base {path} cannot be read: {exc}", hint="`base` is a model folder or one .safetensors file"
            ) from exc

    def fold(
        self, recipe: Recipe, finetune: FineTune, digest: str, factor: float, old: State, out: Path
    ) -> tuple[State, Measured]:
        """Fold one fine-tune into `old` and write the next state to the empty folder `out`.

        Raises Refused for values that are not finite, Damaged where base or state differ from what they were.
        """
        measured = Measured()
        resident, self._resident_digest = old.digest and self._resident_digest == old.digest, None
        keep = self._keeps_state(recipe)
        hashes: dict[str, str] = {}
        with Weights(find(recipe.base), hashing=True) as base:
            for number, names in enumerate(plan.shards(base)):
                merged = [n for n in names if recipe.plan.kinds[n] in (plan.PROJECTED, plan.ADDED)]
                with _StateShard(recipe, old, out, number, merged, base, resident=bool(resident)) as shard:
                    for name in names:
                        if name in merged:
                            arrival = (finetune, digest, factor)
                            self._fold_weight(recipe, base, arrival, name, shard, measured, keep=keep)
                        else:
                            for start, stop in element_panels(base.entries[name].elements):
                                self._pass(base.read(name, start, stop))
                hashes |= shard.hashes
            if base.content_digest() != recipe.base_digest:
                raise Damaged(
                    f"base {recipe.base} is not the one this store was made with", hint=RESTORE_BASE
                )
        totals = old.totals.after(measured.delta_norm, measured.state_norm, factor)
        hashes[STATISTICS] = write_statistics(old, out, measured.statistics, recipe.plan)
        return State(out, hashes, totals), measured

    def keep(self, digest: str) -> None:
        """The state just folded was sealed under `digest`: what lies on the device belongs to it."""
        self._resident_digest = digest if self._resident else None

    def _keeps_state(self, recipe: Recipe) -> bool:
        """Decide whether the state stays in memory until the next fold; forget it otherwise."""
        if self.residency == "auto":
            with Weights(find(recipe.base)) as base:
                needed = (
                    4
                    * sum(base.entries[n].elements for n in recipe.plan.merged)
                    * len(methods.load(recipe.method).SLOTS)
                )
            keep = self.device.type == "cuda" and needed < 0.6 * torch.cuda.mem_get_info(self.device)[0]
        else:
            keep = self.residency in ("device", "host")
        if not keep:
            self._resident.clear()
        return keep

    def _fold_weight(
        self,
        recipe: Recipe,
        base: Weights,
        arrival: tuple[FineTune, str, float],
        name: str,
        shard: _StateShard,
        measured: Measured,
        *,
        keep: bool,
    ) -> None:
        """Fold one weight, whole where it is projected, else panel by panel."""
        finetune, digest, factor = arrival
        method, entry, kind = methods.load(recipe.method), base.entries[name], recipe.plan.kinds[name]
        whole = kind == plan.PROJECTED
        figures = []
        for start, stop in [(0, entry.elements)] if whole else element_panels(entry.elements):
            shape = entry.shape if whole else (stop - start,)
            original = self._pass(base.read(name, start, stop)).to(self.device, torch.float32)
            tuned = finetune.read(name, start, stop, self.device)
            measured.base_squares += linalg.dot(original, original)
            delta = torch.zeros_like(original) if tuned is None else self._pass(tuned).sub_(original)
            del original, tuned
            squares = linalg.dot(delta, delta)
            if not math.isfinite(squares):
                raise Refused(
                    "non-finite",
                    f"{name} holds NaN or infinite values",
                    hint="the training run diverged; publish a good checkpoint",
                )
            figures.append(statistics_of(delta.reshape(shape), kind, entry.shape, squares))
            slots = {
                slot: shard.read(slot, name, start, stop, self._resident).to(self.device).reshape(shape)
                for slot in method.SLOTS
            }
            new = self._step(
                recipe, slots, Arrival(name, kind, delta.reshape(shape), digest, factor), squares, measured
            )  # type: ignore[arg-type]
            del delta
            for slot, values in new.items():
                shard.write(slot, name, values)
                if keep:
                    self._remember(slot, name, start, entry.elements, values)
        measured.statistics[name] = combine(figures)

    def _step(
        self, recipe: Recipe, slots: Slots, arrival: Arrival, squares: float, measured: Measured
    ) -> Slots:
        """Run the method on one weight or panel and take the health figures."""
        method = methods.load(recipe.method)
        first = next(iter(method.SLOTS))
        old = slots[first]
        prepare = getattr(method, "prepare", None)
        if prepare and arrival.kind == plan.PROJECTED and squares and bool(old.any()):
            slots = prepare(slots, **methods.accepted(prepare, recipe.knobs))
        new = method.fold(slots, arrival, **methods.accepted(method.fold, recipe.knobs))
        self.beat()
        measured.delta_squares += squares
        measured.state_squares += linalg.dot(new[first], new[first])
        if arrival.kind == plan.PROJECTED:
            step = new[first] - old
            step_squares, old_squares = linalg.dot(step, step), linalg.dot(old, old)
            measured.projected_squares += squares
            measured.step_squares += step_squares
            if step_squares > 0 and old_squares > 0:
                share = abs(linalg.dot(step, old)) / math.sqrt(step_squares * old_squares)
                measured.orthogonality = max(measured.orthogonality, share)
        return new

    def _remember(self, slot: str, name: str, start: int, elements: int, values: Tensor) -> None:
        """Keep a folded weight or panel in memory for the next fold, in place of the old one."""
        where = torch.device("cpu") if self.residency == "host" else self.device
        if start == 0 and values.numel() == elements:
            self._resident[slot, name] = values.reshape(-1).to(where)
            return
        if (slot, name) not in self._resident:
            self._resident[slot, name] = torch.empty(elements, device=where)
        self._resident[slot, name][start : start + values.numel()] = values.reshape(-1).to(where)

    def render(
        self,
        recipe: Recipe,
        state: State,
        finish: finalize.Finalize,
        out: Path,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, str], float]:
        """Write base + finalize(render(state)) to the empty folder `out` under the base's file names.

        Returns the sha256 of every file by name and the norm of the merged delta. Raises Refused where a weight
        does not fit into the base's dtype.
        """
        hashes: dict[str, str] = {}
        squares = 0.0
        with ExitStack() as stack:
            base = stack.enter_context(Weights(find(recipe.base)))
            slots = self._open_slots(recipe, state, stack)
            for number, names in enumerate(plan.shards(base)):
                declared = [(n, self._served_dtype(base, n, dtype), base.entries[n].shape) for n in names]
                with Writer(out / base.set.files[number].name, declared) as writer:
                    for name, code, _ in declared:
                        for values, part in self._rendered(recipe, base, slots, state.totals, finish, name):
                            squares += part
                            served = values.to(dtype=torch_dtype(code))
                            if part and not bool(torch.isfinite(served).all()):
                                raise Refused(
                                    "overflow", f"merged {name} does not fit into {code}", hint=LOWER_SCALE
                                )
                            writer.write(name, served)
                            self.beat()
                hashes[base.set.files[number].name] = writer.sha256
        return hashes, math.sqrt(squares)

    def _open_slots(self, recipe: Recipe, state: State, stack: ExitStack) -> dict[str, Weights]:
        """Open the state for reading at random; empty before the first fold."""
        if not state.has_slots():
            return {}
        found = {}
        for slot in methods.load(recipe.method).SLOTS:
            shards = sorted(state.folder.glob(f"{slot}-*.safetensors"))
            found[slot] = stack.enter_context(Weights(WeightsSet(tuple(shards))))
        return found

    def _served_dtype(self, base: Weights, name: str, dtype: torch.dtype | None) -> str:
        entry = base.entries[name]
        return CODES[dtype] if dtype is not None and entry.is_floating else entry.dtype

    def _rendered(
        self,
        recipe: Recipe,
        base: Weights,
        slots: dict[str, Weights],
        totals: Totals,
        finish: finalize.Finalize,
        name: str,
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield a weight's served values, whole or in panels, each with the squared norm of what was added to the base."""
        entry = base.entries[name]
        folded = recipe.plan.tied.get(name, name)
        kind = recipe.plan.kinds[folded]
        whole = kind == plan.PROJECTED
        method = methods.load(recipe.method)
        for start, stop in [(0, entry.elements)] if whole else element_panels(entry.elements):
            original = self._pass(base.read(name, start, stop))
            if kind == plan.COPIED or not slots:
                yield original, 0.0
                continue
            shape = entry.shape if whole else (stop - start,)
            found = {
                slot: self._slot(weights, slot, folded, start, stop).reshape(shape)
                for slot, weights in slots.items()
            }
            delta = finalize.apply(
                method.render(found, totals, **methods.accepted(method.render, recipe.knobs)), finish
            ).reshape(-1)
            squares = linalg.dot(delta, delta)
            if squares:
                exact = torch.promote_types(original.dtype, torch.float32)
                original = original.to(self.device, exact) + delta
            yield original, squares if name == folded else 0.0

    def _slot(self, weights: Weights, slot: str, name: str, start: int, stop: int) -> Tensor:
        """Read one slot of a weight from memory where the fold left it there, else from its file."""
        kept = self._resident.get((slot, name))
        if kept is not None:
            return kept[start:stop].to(self.device)
        return weights.read(name, start, stop).to(self.device)

    def _pass(self, values: Tensor) -> Tensor:
        """Count what was read and give the caller's stop a chance."""
        self.progress(values.numel() * values.element_size())
        self.beat()
        return values


FULL_BASE = "use the full-precision model that the fine-tunes were made from"
RESTORE_BASE = "put the original base back, or start a new store for the new base"
LOWER_SCALE = "lower finalize.scale, or use a base in bf16 or f32"


def choose_device(name: str) -> torch.device:
    """Resolve `auto` to the first GPU or the CPU; raise ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name} is not there: torch sees {torch.cuda.device_count()} GPUs",
            hint="use device: auto",
        )
    return device


def torch_dtype(code: str) -> torch.dtype:
    """Give torch's dtype for a safetensors code."""
    return next(dtype for dtype, found in CODES.items() if found == code)


def read_config(base: Path) -> dict[str, Any]:
    """Read config.json beside the weights; {} for a single file."""
    path = base / "config.json"
    return dict(json.loads(path.read_bytes())) if base.is_dir() and path.is_file() else {}


class _StateShard:
    """The state of one of the base's files: read from the old state, written to the new one, a file for each slot."""

    def __init__(
        self,
        recipe: Recipe,
        old: State,
        out: Path,
        number: int,
        names: list[str],
        base: Weights,
        *,
        resident: bool,
    ) -> None:
        self.hashes: dict[str, str] = {}
        self._old, self._stack, self._resident = old, ExitStack(), resident
        self._names = (
            {slot: f"{slot}-{number + 1:05d}.safetensors" for slot in methods.load(recipe.method).SLOTS}
            if names
            else {}
        )
        self._readers: dict[str, Weights] = {}
        self._writers: dict[str, Writer] = {}
        try:
            for slot, file_name in self._names.items():
                if old.has_slots() and not resident:
                    self._readers[slot] = self._open(file_name)
                declared = [(name, "F32", base.entries[name].shape) for name in names]
                self._writers[slot] = self._stack.enter_context(Writer(out / file_name, declared))
        except BaseException:
            self._stack.close()
            raise

    def _open(self, file_name: str) -> Weights:
        path = self._old.folder / file_name
        try:
            return self._stack.enter_context(Weights(WeightsSet((path,)), whole=True))
        except (OSError, Refused) as exc:
            raise Damaged(
                f"{path} cannot be read: {exc}", hint="roll back to a version that verifies"
            ) from exc

    def __enter__(self) -> _StateShard:
        return self

    def read(
        self, slot: str, name: str, start: int, stop: int, resident: Mapping[tuple[str, str], Tensor]
    ) -> Tensor:
        """Give the old values: from memory, from the old file, or zeros before the first fold."""
        if self._resident:
            return resident[slot, name][start:stop]
        if slot in self._readers:
            return self._readers[slot].read(name, start, stop)
        return torch.zeros(stop - start)

    def write(self, slot: str, name: str, values: Tensor) -> None:
        """Append to the new file."""
        self._writers[slot].write(name, values)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:  # noqa: ANN401 -- passed on as they come
        if kind is None:
            for slot, reader in self._readers.items():
                file_name = self._names[slot]
                if reader.file_digest() != self._old.hashes[file_name]:
                    kind = Damaged  # the writers must not finish
                    self._stack.__exit__(kind, None, None)
                    raise Damaged(
                        f"{self._old.folder / file_name} does not have the content it was sealed with",
                        hint="roll back to a version that verifies",
                    )
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self.hashes = {self._names[slot]: writer.sha256 for slot, writer in self._writers.items()}


def statistics_of(
    delta: Tensor, kind: str, shape: tuple[int, ...], squares: float
) -> tuple[float, float, float]:
    """Figures of one weight's delta that `finalize` and the screens need and that cannot be had later."""
    if kind == plan.PROJECTED:
        return linalg.statistics(delta)
    if len(shape) <= 1:
        return math.sqrt(squares), squares, math.sqrt(squares)
    return math.sqrt(squares), math.nan, math.nan


def combine(parts: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Put the panels of one weight together; exact for norms, and for vectors' other figures."""
    if len(parts) == 1:
        return parts[0]
    squares = sum(norm**2 for norm, _, _ in parts)
    is_vector = not math.isnan(parts[0][1])
    return (
        math.sqrt(squares),
        squares if is_vector else math.nan,
        math.sqrt(squares) if is_vector else math.nan,
    )


def write_statistics(
    old: State, out: Path, latest: Mapping[str, tuple[float, float, float]], kinds: plan.Plan
) -> str:
    """Append the latest fine-tune's figures: weight -> [fine-tunes, 3] float64. Gives the file's sha256."""
    earlier: dict[str, Tensor] = {}
    path = old.folder / STATISTICS
    if old.has_slots():
        with Weights(WeightsSet((path,)), whole=True) as found:
            earlier = {name: found.read(name) for name in found.entries}
            if found.file_digest() != old.hashes[STATISTICS]:
                raise Damaged(
                    f"{path} does not have the content it was sealed with",
                    hint="roll back to a version that verifies",
                )
    rows = {
        name: torch.cat(
            [
                earlier.get(name, torch.empty(0, 3, dtype=torch.float64)),
                torch.tensor([latest[name]], dtype=torch.float64),
            ]
        )
        for name in kinds.merged
    }
    with Writer(
        out / STATISTICS, [(name, "F64", tuple(values.shape)) for name, values in rows.items()]
    ) as writer:
        for name, values in rows.items():
            writer.write(name, values)
    return writer.sha256


def furnish(
    base: Path, out: Path, card: str, mark: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Put beside the rendered weights what servers need: config, tokenizer and the rest of the base's folder.

    Other weight formats, hidden files and the base's own card stay behind. `card` becomes README.md; `mark` says in
    a file of its own that this is a merge, so that it is never folded back in.
    """
    if base.is_dir():
        weights = {path.name for path in find(base).files}
        for directory, folders, names in os.walk(base, followlinks=True):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            target = out / Path(directory).relative_to(base)
            target.mkdir(exist_ok=True)
            for name in sorted(names):
                unwanted = (
                    name.startswith(".")
                    or PICKLES.match(name)
                    or name.endswith((".safetensors", ".safetensors.index.json"))
                )
                if not unwanted and name not in weights and name not in ("README.md", MARK):
                    shutil.copyfile(Path(directory, name), target / name)
        _write_index(base, out)
    if dtype is not None:
        _declare_dtype(out / "config.json", dtype)
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / MARK).write_bytes(files.canonical_json(dict(mark)))
    for path in out.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _write_index(base: Path, out: Path) -> None:
    """Write the shard index anew: the base's map, the size as rendered."""
    indexes = sorted(base.glob("*.safetensors.index.json"))
    shards = find(base).files
    if not indexes or len(shards) == 0:
        return
    with Weights(WeightsSet(tuple(out / path.name for path in shards))) as rendered:
        weight_map = {name: rendered.set.files[entry.file].name for name, entry in rendered.entries.items()}
        total = sum(entry.stop - entry.start for entry in rendered.entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / indexes[0].name).write_bytes(files.canonical_json(index))


def _declare_dtype(path: Path, dtype: torch.dtype) -> None:
    """Correct config.json where it names the dtype of the weights."""
    if not path.is_file():
        return
    config = json.loads(path.read_bytes())
    for key in DTYPE_KEYS:
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    path.write_bytes(files.canonical_json(config))
