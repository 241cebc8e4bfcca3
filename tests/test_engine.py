"""Folding and rendering on real files: the same bits by any route, and all that is not meant left alone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from benches import PLAIN, bench, contents, equal, fine_tunes, merge
from models import BIAS, BUFFER, EMBEDDING, HEAD, NORM, PROJECTED, SQUARE, TALL, WIDE
from rich.console import Console

from streammerge import finalize, methods, offline, screen
from streammerge.engine import Engine
from streammerge.errors import Damaged, NoDeviceMemory, Refused
from streammerge.headers import ITEM_BYTES, find
from streammerge.state import STATISTICS
from streammerge.weights import Weights, element_panels

if TYPE_CHECKING:
    from pathlib import Path

    from benches import Bench

    from streammerge.headers import Entry


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
    slots = {slot for entry in entries_of(run).values() for slot in run.recipe.layout(entry, 3)}
    files = {name.removeprefix("state-3/") for name in found[0] if name.startswith("state-3/")}
    assert {name.rsplit("-", 1)[0] for name in files} == {*slots, STATISTICS}


def entries_of(run: Bench) -> dict[str, Entry]:
    """Give the base's merged weights."""
    with Weights(find(run.recipe.base)) as base:
        return {name: base.entries[name] for name in run.recipe.plan.merged}


def test_a_base_that_changes_between_fold_and_render_is_noticed(tmp_path: Path) -> None:
    """What is rendered is hashed where it is not the very file that was folded; the same content is fine."""
    base = models.make_base(tmp_path / "base", dtype=torch.bfloat16)
    run = bench(tmp_path / "run", tmp_path / "base")
    run.fold(fine_tunes(tmp_path, base)[0])
    file = tmp_path / "base" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content)
    shutil.rmtree(run.render())
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Damaged, match="not the one this store was made with"):
        run.render()


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
        merge(tmp_path / "out", tmp_path / "base", [first, second], method="opcm", knobs={"tail": tail})
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
            assert entry.start % ITEM_BYTES[entry.dtype] == 0, entry


# ----------------------------------------------------------------------------------------- memory of a device


def test_a_device_without_memory_goes_on_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that does not fit is kept on disk from then on: the fold is tried again, to the same bits."""
    base = models.make_base(tmp_path / "base")
    for i in range(2):
        models.make_fine_tune(tmp_path / f"ft{i}", base, seed=i)
    plain = bench(tmp_path / "plain", tmp_path / "base")
    run = bench(tmp_path / "run", tmp_path / "base", residency="host")
    for one in (plain, run):
        one.fold(tmp_path / "ft0")
    plain.fold(tmp_path / "ft1")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(run.engine, "_put", full)
        with pytest.raises(NoDeviceMemory, match="CUDA out of memory") as raised:
            run.fold(tmp_path / "ft1")
    assert "disk" in raised.value.hint
    assert run.engine.residency == "disk"
    shutil.rmtree(tmp_path / "run" / "state-2")
    run.fold(tmp_path / "ft1")
    assert run.state.hashes == plain.state.hashes


def test_merge_goes_on_when_a_device_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`streammerge merge` warns, folds again and gives what it gives elsewhere."""
    base = models.make_base(tmp_path / "base")
    models.make_fine_tune(tmp_path / "ft", base, seed=1)
    fold, failures, warnings = Engine.fold, [1], list[str]()

    def first_full(self: Engine, *given: Any) -> Any:
        found = fold(self, *given)
        if failures:
            failures.pop()
            raise NoDeviceMemory("cuda is out of memory", hint="the state is read from disk")
        return found

    monkeypatch.setattr(Engine, "fold", first_full)
    for name in ("one", "other"):
        request = offline.Request(tmp_path / "base", (tmp_path / "ft",), tmp_path / name, device="cpu")
        offline.merge(request, warn=warnings.append, console=Console(quiet=True))
    assert warnings == ["cuda is out of memory; the state is read from disk"]
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
