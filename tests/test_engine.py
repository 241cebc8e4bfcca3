"""Folding and rendering on real files: the same bits by any route, damage found, the rest left alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from models import BIAS, BUFFER, EMBEDDING, HEAD, NORM, PROJECTED, SQUARE, TALL, WIDE
from rich.console import Console

from streammerge import finalize, methods, offline, screen
from streammerge.engine import Engine
from streammerge.errors import ConfigError, Damaged, Refused, Stopped, StreammergeError
from streammerge.finetune import Tolerance
from streammerge.furnish import MARK, furnish
from streammerge.headers import DTYPES, find
from streammerge.methods import Totals
from streammerge.plan import DEFAULT_ADDED, Recipe
from streammerge.state import STATISTICS, State
from streammerge.weights import Weights, element_panels

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


# ---------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("method", methods.NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_inputs_give_the_same_bytes(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Two runs over the same files, one keeping the state in memory, write the same states and models."""
    base = models.make_base(tmp_path / "base", dtype=dtype, shards=2)
    paths = fine_tunes(tmp_path, base)
    found = []
    for name, residency in (("one", "disk"), ("two", "disk"), ("three", "host"), ("four", "device")):
        run = bench(tmp_path / name, tmp_path / "base", method=method, residency=residency)
        for path in paths:
            run.fold(path)
        run.render()
        found.append(contents(run.root))
    assert found[0] == found[1] == found[2] == found[3]
    assert len([name for name in found[0] if name.startswith("state-3/")]) == 3


@pytest.mark.parametrize("shards", [2, 3])
def test_a_sharded_base_gives_the_same_weights(shards: int, tmp_path: Path) -> None:
    """However the base is cut into files, every merged weight has the same bits, in the base's own files."""
    base = models.make_base(tmp_path / "single", dtype=torch.bfloat16)
    models.make_base(tmp_path / "cut", dtype=torch.bfloat16, shards=shards)
    paths = fine_tunes(tmp_path, base)
    merged = []
    for name in ("single", "cut"):
        run = bench(tmp_path / f"run-{name}", tmp_path / name)
        for path in paths:
            run.fold(path)
        merged.append(run.render())
    assert equal(models.load(merged[1]), models.load(merged[0]))
    for file in (tmp_path / "cut").glob("*.safetensors"):
        assert set(models.load(merged[1] / file.name)) == set(models.load(file))


def test_a_state_in_memory_belongs_to_its_snapshot_only(tmp_path: Path) -> None:
    """What is kept in memory after a fold is never taken for another state, in folding nor in rendering."""
    base = models.make_base(tmp_path / "base")
    paths = fine_tunes(tmp_path, base)
    disk = bench(tmp_path / "disk", tmp_path / "base", residency="disk")
    host = bench(tmp_path / "host", tmp_path / "base", residency="host")
    for run in (disk, host):
        run.fold(paths[0])
        first = run.state
        run.fold(paths[1])
        run.state = first  # a rollback
        run.render("rolled-back")
        run.fold(paths[2])
        run.render("after")
    assert contents(host.root / "rolled-back") == contents(disk.root / "rolled-back")
    assert contents(host.root / "after") == contents(disk.root / "after")


def test_a_fold_that_was_refused_halfway_leaves_no_trace(tmp_path: Path) -> None:
    """After a fine-tune that is bad at its last element the next fold gives the bytes it would have given."""
    base = models.make_base(tmp_path / "base")
    first, bad, second = fine_tunes(tmp_path, base)
    tensors = models.load(bad)
    tensors[WIDE].view(-1)[-1] = float("nan")
    models.save(bad, tensors)
    for residency in ("disk", "host"):
        without = bench(tmp_path / f"without-{residency}", tmp_path / "base", residency=residency)
        with_bad = bench(tmp_path / f"with-{residency}", tmp_path / "base", residency=residency)
        for run in (without, with_bad):
            run.fold(first)
        before = contents(with_bad.state.folder)
        with pytest.raises(Refused, match="NaN"):
            with_bad.fold(bad)
        assert contents(with_bad.state.folder) == before
        shutil.rmtree(with_bad.root / "state-2")
        for run in (without, with_bad):
            run.fold(second)
            run.render()
        assert contents(with_bad.root) == contents(without.root)


# ------------------------------------------------------------------------------------------ what is not meant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_version_with_nothing_folded_is_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """Version 0 holds the base's weights bit for bit, -0.0 and denormals included."""
    base = models.make_base(tmp_path / "made", dtype=dtype)
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    base[BIAS][:3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2, largest], dtype=dtype)
    models.save(tmp_path / "base", base)
    run = bench(tmp_path / "run", tmp_path / "base")
    assert equal(models.load(run.render()), base)


def test_weights_that_no_fine_tune_touched_stay_as_they_are(tmp_path: Path) -> None:
    """Untouched weights are served bit for bit as in the base; integers always are."""
    base = models.make_base(tmp_path / "base", dtype=torch.bfloat16, head="untied")
    run = bench(tmp_path / "run", tmp_path / "base")
    for path in fine_tunes(tmp_path, base, only=(SQUARE, NORM)):
        run.fold(path)
    merged = models.load(run.render())
    for name, values in base.items():
        assert torch.equal(merged[name].view(torch.uint8), values.view(torch.uint8)) == (
            name not in (SQUARE, NORM)
        )


@pytest.mark.parametrize("method", methods.NAMES)
@pytest.mark.parametrize("residency", ["disk", "host"])
def test_weights_of_odd_shapes_are_merged(method: str, residency: str, tmp_path: Path) -> None:
    """Scalars, empty weights, rows, columns, many dimensions and mixed dtypes go through every method."""
    shapes = ((), (1,), (1, 1), (0,), (0, 4), (3, 0), (1, 9), (9, 1), (2, 3, 4), (1, 1, 1, 1, 5))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    random = torch.Generator().manual_seed(0)
    base = {
        f"größe {i}.{dtype}".replace("torch.", ""): torch.randn(shape, generator=random).to(dtype)
        for i, shape in enumerate(shapes)
        for dtype in dtypes
    }
    base |= {f"i{i}": torch.zeros(shape, dtype=torch.uint8) for i, shape in enumerate(shapes)}
    base |= {"flags": torch.tensor([True, False, True]), "u16": torch.arange(3).to(torch.uint16)}
    models.save(tmp_path / "base", base, shards=2)
    run = bench(tmp_path / "run", tmp_path / "base", method=method, residency=residency)
    tuned = [models.make_fine_tune(tmp_path / f"ft{i}", base, seed=i) for i in range(2)]
    run.fold(tmp_path / "ft0")
    run.fold(tmp_path / "ft1")
    merged = models.load(run.render())
    assert set(merged) == set(base)
    for name, values in base.items():
        assert (merged[name].dtype, merged[name].shape) == (values.dtype, values.shape)
        if method == "average" and values.is_floating_point():
            mean = (tuned[0][name].double() + tuned[1][name].double()) / 2
            assert torch.allclose(merged[name].double(), mean, atol=0.02)
        elif not values.is_floating_point():
            assert torch.equal(merged[name], values)


def test_weights_that_stream_in_panels_are_merged_like_others(tmp_path: Path) -> None:
    """Weights longer than a panel are merged to the last element, in memory as on disk; NaN is seen."""
    random = torch.Generator().manual_seed(0)
    panel = next(element_panels(1 << 40))[1]
    shapes = {EMBEDDING: (panel // 1000 + 2, 1000), BIAS: (panel + 3,), SQUARE: (8, 8)}
    base = {n: torch.randn(shape, generator=random).bfloat16() for n, shape in shapes.items()}
    models.save(tmp_path / "base", base)
    tuned = [models.make_fine_tune(tmp_path / f"ft{i}", base, seed=i, dtype=torch.float32) for i in (0, 1)]
    found = []
    for residency in ("disk", "host"):
        run = bench(tmp_path / residency, tmp_path / "base", method="average", residency=residency)
        run.fold(tmp_path / "ft0")
        run.fold(tmp_path / "ft1")
        found.append(contents(run.render(dtype=torch.float32)))
        merged = models.load(run.root / "model")
        for name in shapes:
            assert torch.allclose(merged[name], (tuned[0][name] + tuned[1][name]) / 2, atol=1e-6)
        norm = float((tuned[1][BIAS].double() - base[BIAS].double()).norm())
        figures = models.load(run.state.folder / STATISTICS)[BIAS][1].tolist()
        assert figures == [pytest.approx(norm), pytest.approx(norm**2), pytest.approx(norm)]
    assert found[0] == found[1]
    tuned[0][BIAS][-1] = float("nan")
    models.save(tmp_path / "bad", tuned[0])
    with pytest.raises(Refused, match=BIAS):
        run.fold(tmp_path / "bad")


def test_integers_are_the_bases(tmp_path: Path) -> None:
    """Another integer buffer in a fine-tune does not reach what is served."""
    base = models.make_base(tmp_path / "base")
    tuned = models.make_fine_tune(tmp_path / "ft", base, seed=1)
    models.save(tmp_path / "ft", {**tuned, BUFFER: tuned[BUFFER] + 7})
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(tmp_path / "ft")
    assert torch.equal(models.load(run.render())[BUFFER], base[BUFFER])


def test_one_fine_tune_alone_is_served_as_it_is(tmp_path: Path) -> None:
    """After the first fold OPCM serves that fine-tune, up to one rounding of float32."""
    base = models.make_base(tmp_path / "base")
    tuned = models.make_fine_tune(tmp_path / "ft", base, seed=1)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(tmp_path / "ft")
    merged = models.load(run.render())
    assert all(torch.allclose(merged[n], values, rtol=0, atol=2e-7) for n, values in tuned.items())


def test_a_base_in_float64_keeps_its_precision(tmp_path: Path) -> None:
    """A float64 base is served as itself plus the float32 delta, not rounded to float32 on the way."""
    base = models.make_base(tmp_path / "base", dtype=torch.float64)
    run = bench(tmp_path / "run", tmp_path / "base", method="average")
    tuned = models.make_fine_tune(tmp_path / "ft", base, seed=1)
    run.fold(tmp_path / "ft")
    merged = models.load(run.render())
    for name in PROJECTED:
        delta = tuned[name].float() - base[name].float()
        assert merged[name].dtype == torch.float64
        assert torch.equal(merged[name], base[name] + delta)


def test_a_tied_head_is_folded_once_and_served_twice(tmp_path: Path) -> None:
    """Where the base holds both names of a tied weight, they stay equal and count once in the norms."""
    base = models.make_base(tmp_path / "base", head="tied")
    tuned = models.make_fine_tune(tmp_path / "ft", base, seed=1)
    run = bench(tmp_path / "run", tmp_path / "base")
    measured = run.fold(tmp_path / "ft")
    merged = models.load(run.render())
    once = [n for n, v in base.items() if v.is_floating_point() and n != HEAD]
    delta = sum(float((tuned[n].double() - base[n].double()).square().sum()) for n in once)
    assert torch.equal(merged[HEAD], merged[EMBEDDING])
    assert not torch.equal(merged[HEAD], base[HEAD])
    (run.root / "again").mkdir()
    assert run.engine.render(run.recipe, run.state, PLAIN, run.root / "again")[1] == pytest.approx(delta**0.5)
    assert measured.delta_norm == pytest.approx(delta**0.5, rel=1e-6)
    assert measured.base_norm == pytest.approx(
        sum(float(base[n].double().square().sum()) for n in once) ** 0.5, rel=1e-12
    )


# ------------------------------------------------------------------------------------------ what does not fit


def test_a_merge_that_does_not_fit_into_the_base_dtype_is_refused(tmp_path: Path) -> None:
    """float16 that would overflow is refused as overflow, naming the weight; nothing infinite is written."""
    base = models.make_base(tmp_path / "made", dtype=torch.float16)
    base[NORM] = torch.full((16,), 40_000.0, dtype=torch.float16)
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "ft", {**base, NORM: base[NORM] + 20_000})
    run = bench(tmp_path / "run", tmp_path / "base", method="average")
    run.fold(tmp_path / "ft")
    run.render("fits")
    with pytest.raises(Refused, match=NORM) as caught:
        run.render("too-long", finalize.Finalize(scale=2.0))
    assert caught.value.reason == "overflow"
    assert caught.value.reason in screen.REASONS
    assert caught.value.hint


@pytest.mark.parametrize("tail", ["scalar", "diagonal", "keep"])
@pytest.mark.parametrize("value", [3e38, -3e38, 1e25])
def test_a_delta_that_is_finite_but_absurd_is_refused_in_words(
    tail: str, value: float, tmp_path: Path
) -> None:
    """A weight near the end of float32's range ends in a refusal, whatever arithmetic makes of it."""
    base = models.make_base(tmp_path / "base")
    first, second, _ = fine_tunes(tmp_path, base, size=1e-4)
    tensors = models.load(second)
    tensors[TALL][3, 3] = value
    models.save(second, tensors)
    with pytest.raises(Refused) as caught:
        merge(tmp_path / "out", tmp_path / "base", [first, second], knobs={"tail": tail})
    assert caught.value.reason in {"implausible", "non-finite"}


def test_a_fine_tune_that_changes_next_to_nothing_does_not_spoil_the_next(tmp_path: Path) -> None:
    """Where a fine-tune changed a weight by one denormal, the fine-tunes after it fold all the same."""
    base = models.make_base(tmp_path / "made")
    base[TALL][0, 0] = 0.0
    models.save(tmp_path / "base", base)
    tiny = {**base, TALL: base[TALL].clone(), BIAS: base[BIAS] + 0.01}
    tiny[TALL][0, 0] = 1e-44
    models.save(tmp_path / "tiny", tiny)
    models.make_fine_tune(tmp_path / "ft", base, seed=1)
    merge(tmp_path / "out", tmp_path / "base", [tmp_path / "tiny", tmp_path / "ft"])
    assert all(v.isfinite().all() for v in models.load(tmp_path / "out" / "model").values())


@pytest.mark.parametrize("touched", [True, False])
def test_rendering_in_a_smaller_dtype_does_not_overflow_quietly(touched: bool, tmp_path: Path) -> None:
    """A weight that the asked-for dtype cannot hold is refused, whether a fine-tune changed it or not."""
    base = models.make_base(tmp_path / "made", dtype=torch.bfloat16)
    base[NORM] = torch.full((16,), 1e6, dtype=torch.bfloat16)
    models.save(tmp_path / "base", base)
    models.make_fine_tune(
        tmp_path / "ft", base, seed=1, size=1e4 if touched else 0.02, only=(NORM if touched else TALL,)
    )
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(tmp_path / "ft")
    with pytest.raises(Refused) as caught:
        run.render(dtype=torch.float16)
    assert caught.value.reason == "overflow"


@pytest.mark.parametrize("of_base", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_render_dtype_loads_in_safetensors(
    of_base: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In another dtype, with integers of every width beside, all loads and every weight is aligned."""
    base = models.make_base(tmp_path / "made", dtype=of_base)
    base |= {f"i{w}": torch.arange(3).to(getattr(torch, f"int{w}")) for w in (8, 16, 32, 64)}
    base |= {"odd.bias": torch.ones(3, dtype=of_base), "flag": torch.tensor([True])}
    models.save(tmp_path / "base", base)
    models.make_fine_tune(tmp_path / "ft", base, seed=1)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(tmp_path / "ft")
    out = run.render(dtype=dtype)
    loaded = models.load(out)
    for name, values in base.items():
        assert loaded[name].dtype == (dtype if values.is_floating_point() else values.dtype)
        assert values.is_floating_point() or torch.equal(loaded[name], values)
    with Weights(find(out)) as weights:
        for entry in weights.entries.values():
            assert entry.start % DTYPES[entry.dtype].itemsize == 0, entry


# ----------------------------------------------------------------------------------------------------- damage


def test_any_flipped_byte_of_a_state_is_found(tmp_path: Path) -> None:
    """Wherever a byte of the old state changed, the next fold is Damaged and names the file."""
    base = models.make_base(tmp_path / "base")
    first, second, _ = fine_tunes(tmp_path, base)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(first)
    good = run.state
    problems = []
    for file in sorted(good.folder.iterdir()):
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        for place in sorted({*range(0, header, 7), header, header + 5, len(whole) // 2, len(whole) - 1}):
            for bit in (0x01, 0x10):
                file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
                try:
                    run.fold(second)
                    problems.append(f"{file.name} byte {place}: not noticed")
                    run.state = good
                except Damaged as exc:
                    if file.name not in exc.message or not exc.hint:
                        problems.append(f"{file.name} byte {place}: {exc}")
                except Exception as exc:  # noqa: BLE001 -- what it is, is the finding
                    problems.append(f"{file.name} byte {place} ^ {bit:#x}: {exc!r}"[:200])
                shutil.rmtree(run.root / f"state-{run.folds + 1}", ignore_errors=True)
        file.write_bytes(whole)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", [TALL, NORM])
def test_a_state_that_became_infinite_is_damage(name: str, bad: float, tmp_path: Path) -> None:
    """A state value that is no longer finite is reported as damage, not as a fault of linear algebra."""
    base = models.make_base(tmp_path / "base")
    first, second, _ = fine_tunes(tmp_path, base)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(first)
    path = run.state.folder / "sum-00001.safetensors"
    with Weights(find(path)) as weights:
        place = weights.entries[name].start
    content = path.read_bytes()
    path.write_bytes(content[:place] + struct.pack("<f", bad) + content[place + 4 :])
    with pytest.raises(Damaged, match="sum-00001"):
        run.fold(second)


@pytest.mark.parametrize("harm", ["missing", "cut", "longer", "empty"])
@pytest.mark.parametrize("name", ["sum-00001.safetensors", STATISTICS])
def test_a_state_file_of_another_length_is_damage(harm: str, name: str, tmp_path: Path) -> None:
    """A state file that is missing, cut short or too long is damage, whatever else it looks like."""
    base = models.make_base(tmp_path / "base")
    first, second, _ = fine_tunes(tmp_path, base)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(first)
    path = run.state.folder / name
    whole = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"cut": whole[:-5], "longer": whole + b"\0", "empty": b""}[harm])
    with pytest.raises(Damaged, match=name):
        run.fold(second)


def test_a_base_that_changed_is_damage(tmp_path: Path) -> None:
    """One bit of another base is found by the next fold."""
    base = models.make_base(tmp_path / "base")
    first, second, _ = fine_tunes(tmp_path, base)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(first)
    changed = base[BIAS].clone()
    changed.view(torch.int32)[0] ^= 1
    models.save(tmp_path / "base", {**base, BIAS: changed})
    with pytest.raises(Damaged, match="base"):
        run.fold(second)


@pytest.mark.parametrize("change", ["weight-gone", "shape", "folder-gone"])
def test_a_base_of_another_shape_is_damage(change: str, tmp_path: Path) -> None:
    """A base that lost a weight, has another shape or is gone ends in words, not in a KeyError."""
    base = models.make_base(tmp_path / "base")
    first, second, _ = fine_tunes(tmp_path, base)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(first)
    out = run.root / "state-2"
    out.mkdir()
    with Weights(find(tmp_path / "base")) as weights:
        entries = weights.entries
    with screen.examine(second, entries, run.recipe.plan, Tolerance()) as finetune:
        if change == "folder-gone":
            shutil.rmtree(tmp_path / "base")
        elif change == "shape":
            models.save(tmp_path / "base", {**base, SQUARE: base[SQUARE].reshape(8, 32)})
        else:
            models.save(tmp_path / "base", {n: v for n, v in base.items() if n != WIDE})
        with pytest.raises(StreammergeError):
            run.engine.fold(run.recipe, finetune, "", 1.0, run.state, out)


# ------------------------------------------------------------------------------------------- what is measured


def test_what_is_measured_is_what_was_folded(tmp_path: Path) -> None:
    """Norms, kept energy and orthogonality are those of the tensors, and pile up into the totals."""
    base = models.make_base(tmp_path / "base")
    run = bench(tmp_path / "run", tmp_path / "base")
    norms: list[float] = []
    old: dict[str, Tensor] = {}
    for i in range(3):
        tuned = models.make_fine_tune(tmp_path / f"ft{i}", base, seed=i, size=0.01 * (i + 1))
        measured = run.fold(tmp_path / f"ft{i}")
        new = {n: v.double() for n, v in models.load(run.state.folder / "sum-00001.safetensors").items()}
        delta = {n: (tuned[n] - base[n]).double() for n in new}
        norms.append(sum(float(d.square().sum()) for d in delta.values()) ** 0.5)
        assert measured.delta_norm == pytest.approx(norms[-1], rel=1e-9)
        assert measured.state_norm == pytest.approx(
            sum(float(v.square().sum()) for v in new.values()) ** 0.5, rel=1e-9
        )
        steps = {n: new[n] - old[n] if old else new[n] for n in PROJECTED}
        kept = sum(float(p.square().sum()) for p in steps.values())
        whole = sum(float(delta[n].square().sum()) for n in PROJECTED)
        assert measured.kept_energy == pytest.approx(kept / whole, rel=1e-5)
        assert measured.orthogonality < 1e-6
        old = new
    totals = run.state.totals
    assert (totals.count, totals.factors) == (3, 3.0)
    assert totals.mean_delta_norm == pytest.approx(sum(norms) / 3)
    assert totals.max_delta_norm == pytest.approx(max(norms))
    assert totals.state_norm == measured.state_norm


def test_statistics_are_kept_for_every_fine_tune(tmp_path: Path) -> None:
    """statistics.safetensors has [T, 3] float64 per weight: ||X||, ||X^T X|| and s_1, exact for vectors."""
    base = models.make_base(tmp_path / "base", head="tied")
    run, deltas = bench(tmp_path / "run", tmp_path / "base"), []
    for i in range(3):
        tuned = models.make_fine_tune(tmp_path / f"ft{i}", base, seed=i, rank=2)
        deltas.append({n: (tuned[n] - base[n]).double() for n in base if base[n].is_floating_point()})
        run.fold(tmp_path / f"ft{i}")
    found = models.load(run.state.folder / STATISTICS)
    assert set(found) == set(run.recipe.plan.merged)
    for name, figures in found.items():
        assert figures.shape == (3, 3)
        assert figures.dtype == torch.float64
        for i, (norm, gram, largest) in enumerate(figures.tolist()):
            x = deltas[i][name]
            assert norm == pytest.approx(float(x.norm()), rel=1e-9)
            if name in PROJECTED:
                s = torch.linalg.svdvals(x)
                assert gram == pytest.approx(float(s.pow(4).sum().sqrt()), rel=1e-5)
                assert largest == pytest.approx(float(s[0]), rel=1e-3)
            elif x.ndim == 1:
                assert (gram, largest) == (pytest.approx(norm**2), pytest.approx(norm))
            else:
                assert gram != gram  # noqa: PLR0124 -- NaN: not known for a matrix that streams in panels
                assert largest != largest  # noqa: PLR0124 -- NaN


def test_a_fine_tunes_weight_counts(tmp_path: Path) -> None:
    """Averaging with weights 1 and 3 gives a quarter and three quarters."""
    base = models.make_base(tmp_path / "base")
    one, other = (models.make_fine_tune(tmp_path / f"ft{i}", base, seed=i) for i in range(2))
    run = bench(tmp_path / "run", tmp_path / "base", method="average")
    run.fold(tmp_path / "ft0", 1.0)
    run.fold(tmp_path / "ft1", 3.0)
    merged = models.load(run.render())
    for name in PROJECTED:
        assert torch.allclose(merged[name], (one[name] + 3 * other[name]) / 4, atol=1e-6)


def test_finalize_scales_what_is_added(tmp_path: Path) -> None:
    """finalize.scale multiplies the merged delta, and only that; the state stays as it is."""
    base = models.make_base(tmp_path / "base")
    run = bench(tmp_path / "run", tmp_path / "base")
    for path in fine_tunes(tmp_path, base):
        run.fold(path)
    before = contents(run.state.folder)
    plain = models.load(run.render("plain"))
    half = models.load(run.render("half", finalize.Finalize(scale=0.5)))
    for name in PROJECTED:
        assert torch.allclose(half[name] - base[name], (plain[name] - base[name]) / 2, atol=1e-7)
    assert contents(run.state.folder) == before


def test_globs_decide_what_is_projected(tmp_path: Path) -> None:
    """Matrices that no glob of `added` matches are projected; the list replaces the default."""
    models.make_base(tmp_path / "base")
    default = bench(tmp_path / "a", tmp_path / "base").recipe.plan.kinds
    assert {n for n, kind in default.items() if kind == "projected"} == set(PROJECTED)
    assert default[BUFFER] == "copied"
    other = bench(tmp_path / "b", tmp_path / "base", added=["*q_proj*"]).recipe.plan.kinds
    assert {n for n, kind in other.items() if kind == "projected"} == {TALL, WIDE, EMBEDDING}


# --------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("residency", ["disk", "host"])
def test_a_stop_leaves_nothing_behind(residency: str, tmp_path: Path) -> None:
    """Stopped at any beat, a fold leaves the old state and no open file; redone it gives the same bytes."""
    base = models.make_base(tmp_path / "base", shards=2)
    first, second, _ = fine_tunes(tmp_path, base)
    straight = bench(tmp_path / "straight", tmp_path / "base", residency=residency)
    stopped = bench(tmp_path / "stopped", tmp_path / "base", residency=residency)
    for run in (straight, stopped):
        run.fold(first)
    before, files = contents(stopped.state.folder), open_files()
    for beats in range(0, 40, 3):
        left = [beats]

        def beat(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped("asked to stop")

        stopped.engine.beat = beat
        try:
            stopped.fold(second)
        except Stopped:
            assert contents(stopped.state.folder) == before
            assert open_files() == files
            shutil.rmtree(stopped.root / "state-2")
            continue
        break
    else:
        pytest.fail("never folded in 40 beats")
    assert beats > 10
    stopped.engine.beat = lambda: None
    straight.fold(second)
    for run in (straight, stopped):
        run.render()
    assert contents(stopped.root) == contents(straight.root)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    """A fold reports base and fine-tune, a render the base: what a progress bar adds up to."""
    base = models.make_base(tmp_path / "base")
    models.make_fine_tune(tmp_path / "ft", base, seed=1)
    counted: list[int] = []
    run = bench(tmp_path / "run", tmp_path / "base", progress=counted.append)
    floats = sum(v.numel() * 4 for v in base.values() if v.is_floating_point())
    size = floats + base[BUFFER].numel() * 8
    assert sum(counted) == size
    run.fold(tmp_path / "ft")
    assert sum(counted) == size * 2 + floats
    run.render()
    assert sum(counted) == size * 3 + floats


def test_a_device_that_is_not_there_is_a_configuration_error() -> None:
    """A GPU that torch does not see stops the start, in words; so does a device that nobody knows."""
    with pytest.raises(ConfigError, match="cuda:99"):
        Engine(device="cuda:99")
    with pytest.raises(ConfigError):
        Engine(device="abacus")


# ------------------------------------------------------------------------------------------------- furnishing


def furnished(base: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Render version 0 of a base and furnish it."""
    run = bench(out, base)
    model = run.render(dtype=dtype)
    furnish(base, model, "# the card\n", {"method": "opcm"}, dtype)
    return model


def test_what_servers_need_is_beside_the_weights(tmp_path: Path) -> None:
    """Config, tokenizer, subfolders are copied; other weight formats, hidden files and the card are not."""
    base = tmp_path / "base"
    models.make_base(base, shards=2)
    (base / "1_Pooling").mkdir()
    (base / ".git").mkdir()
    (base / "onnx").mkdir()
    for name in ("vocab.txt", "1_Pooling/config.json", "chat_template.jinja"):
        (base / name).write_text(name)
    unwanted = [
        *(
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "tf_model.h5",
            "flax_model.msgpack",
            "rust_model.ot",
        ),
        *("model.gguf", "old.pt", ".gitattributes", ".git/HEAD", "onnx/model.onnx", "gram.safetensors"),
    ]
    for name in unwanted:
        (base / name).write_bytes(b"not wanted")
    (base / "README.md").write_text("the base's card")
    out = furnished(base, tmp_path / "run")
    for name in (
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not [name for name in unwanted if (out / name).exists()]
    assert (out / "README.md").read_text() == "# the card\n"
    assert json.loads((out / MARK).read_bytes()) == {"method": "opcm"}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_index_fits_what_was_rendered(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """The shard index names every weight in its file, and the size as rendered."""
    models.make_base(tmp_path / "base", dtype=torch.bfloat16, shards=3)
    out = furnished(tmp_path / "base", tmp_path / "run", dtype)
    index = json.loads((out / models.INDEX).read_bytes())
    tensors = {p.name: models.load(p) for p in out.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, found in tensors.items() for name in found}
    assert index["metadata"]["total_size"] == sum(
        v.numel() * v.element_size() for found in tensors.values() for v in found.values()
    )


def test_the_index_keeps_the_name_that_was_read(tmp_path: Path) -> None:
    """Where two indexes lie in the base, the one that was followed is the one that is written."""
    base = tmp_path / "base"
    models.make_base(base, shards=2)
    (base / "consolidated.safetensors.index.json").write_text('{"weight_map": {"w": "other.safetensors"}}')
    out = furnished(base, tmp_path / "run")
    assert set(json.loads((out / models.INDEX).read_bytes())["weight_map"]) == set(models.load(base))
    assert find(out).files == tuple(out / path.name for path in find(base).files)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_declared(key: str, tmp_path: Path) -> None:
    """Rendered in float32, config.json says float32 wherever it named the dtype; the rest of it stays."""
    tensors = models.make_base(tmp_path / "made", dtype=torch.bfloat16)
    config = {**models.CONFIG, key: "bfloat16", "text_config": {key: "bfloat16", "layers": 2}}
    models.save(tmp_path / "base", tensors, config=config)
    out = furnished(tmp_path / "base", tmp_path / "run", torch.float32)
    expected = {**config, key: "float32", "text_config": {key: "float32", "layers": 2}}
    assert json.loads((out / "config.json").read_bytes()) == expected
    assert models.load(out)[TALL].dtype == torch.float32


@pytest.mark.parametrize("trick", ["dangling", "loop", "pipe", "read-only"])
def test_odd_things_in_the_bases_folder_are_no_obstacle(trick: str, tmp_path: Path) -> None:
    """A link to nothing or to its own folder, a pipe or a read-only file beside the weights does no harm."""
    base = tmp_path / "base"
    models.make_base(base)
    if trick == "pipe":
        os.mkfifo(base / "pipe")
    elif trick == "read-only":
        (base / "config.json").chmod(0o444)
    else:
        (base / "link").symlink_to("." if trick == "loop" else "gone")
    out = furnished(base, tmp_path / "run", torch.float32)
    assert (out / "config.json").is_file()
    assert sum(1 for _ in out.rglob("*")) < 20


def test_linked_files_are_copied_as_files(tmp_path: Path) -> None:
    """A base out of the Hub's cache, where every file is a link, is furnished with files of its own."""
    models.make_base(tmp_path / "blobs")
    (tmp_path / "base").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "base" / path.name).symlink_to(path)
    out = furnished(tmp_path / "base", tmp_path / "run")
    assert (out / "tokenizer.json").is_file()
    assert not any(path.is_symlink() for path in out.rglob("*"))


# ------------------------------------------------------------------------------------------ the offline merge


def merge(out: Path, base: Path, paths: Iterable[Path], **options: Any) -> dict[str, Any]:
    """Do what `streammerge merge` does."""
    request = offline.Request(base=base, fine_tunes=tuple(paths), out=out, device="cpu", threads=1, **options)
    return offline.merge(request, warn=lambda _: None, console=Console(quiet=True))


def test_an_offline_merge_is_whole_or_not_there(tmp_path: Path) -> None:
    """A refused fine-tune leaves neither OUT nor any temporary folder; it is named with the reason."""
    base = models.make_base(tmp_path / "base")
    good, bad, _ = fine_tunes(tmp_path, base)
    tensors = models.load(bad)
    tensors[TALL][0, 0] = float("inf")
    models.save(bad, tensors)
    before = set(tmp_path.iterdir())
    with pytest.raises(Refused, match="non-finite") as caught:
        merge(tmp_path / "out", tmp_path / "base", [good, bad])
    assert str(bad) in caught.value.message
    assert set(tmp_path.iterdir()) == before


def test_an_offline_merge_says_what_it_did(tmp_path: Path) -> None:
    """The manifest lists fine-tunes in order with digests, the totals and the hash of every weights file."""
    base = models.make_base(tmp_path / "base", shards=2)
    paths = fine_tunes(tmp_path, base)
    manifest = merge(tmp_path / "out", tmp_path / "base", paths)
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes()) == manifest
    assert [entry["name"] for entry in manifest["fine_tunes"]] == [path.name for path in paths]
    assert len({entry["digest"] for entry in manifest["fine_tunes"]}) == 3
    assert manifest["totals"]["count"] == 3
    for name, entry in manifest["files"].items():
        assert sha256(tmp_path / "out" / name) == entry["sha256"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "model"]
    again = merge(tmp_path / "again", tmp_path / "base", paths)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert again == manifest


def test_what_the_screen_refuses_may_be_allowed_by_reason(tmp_path: Path) -> None:
    """Duplicates and the base itself are refused, but folded with --allow; no other reason can be allowed."""
    base = models.make_base(tmp_path / "base")
    (path,) = fine_tunes(tmp_path, base, 1)
    for paths, reason in (([path, path], "duplicate"), ([tmp_path / "base"], "zero-delta")):
        with pytest.raises(Refused) as caught:
            merge(tmp_path / "out", tmp_path / "base", paths)
        assert caught.value.reason == reason
        assert f"--allow {reason}" in caught.value.hint
        merge(tmp_path / reason, tmp_path / "base", paths, allow=frozenset({reason}))
    with pytest.raises(ConfigError):
        merge(tmp_path / "out", tmp_path / "base", [path], allow=frozenset({"non-finite"}))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magic"},
        {"dtype": "float8"},
        {"scale": 0.0},
        {"scale": float("nan")},
        {"knobs": {"alpha": 1}},
    ],
    ids=["method", "dtype", "scale", "scale-nan", "alpha"],
)
def test_a_request_that_makes_no_sense_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    """A wrong method, dtype, scale or knob is a configuration error, and nothing is left."""
    base = models.make_base(tmp_path / "base")
    paths = fine_tunes(tmp_path, base, 1)
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError):
        merge(tmp_path / "out", tmp_path / "base", paths, **options)
    assert set(tmp_path.iterdir()) == before


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """OUT that exists with something in it is refused; an empty folder is taken."""
    base = models.make_base(tmp_path / "base")
    paths = fine_tunes(tmp_path, base, 1)
    (tmp_path / "out").mkdir()
    merge(tmp_path / "out", tmp_path / "base", paths)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="there already"):
        merge(tmp_path / "out", tmp_path / "base", paths)
    assert contents(tmp_path / "out") == before


def test_a_pipe_given_as_a_model_is_an_error_in_words(tmp_path: Path) -> None:
    """What is neither folder nor file ends in an error of ours, not in a traceback."""
    models.make_base(tmp_path / "base")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StreammergeError):
        merge(tmp_path / "out", tmp_path / "base", [tmp_path / "pipe"])
