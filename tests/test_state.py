"""What a fold reads and leaves: damage is found and named, figures are right, a stop leaves no trace."""

from __future__ import annotations

import shutil
import struct
from typing import TYPE_CHECKING

import models
import pytest
import torch
from benches import bench, contents, fine_tunes, open_files
from models import BIAS, BUFFER, EMBEDDING, NORM, PROJECTED, SQUARE, TALL, WIDE

from streammerge import finalize, screen
from streammerge.arriving import Incoming
from streammerge.engine import Engine
from streammerge.errors import ConfigError, Damaged, Stopped, StreammergeError
from streammerge.fit import Tolerance
from streammerge.headers import find
from streammerge.state import STATISTICS
from streammerge.weights import Weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


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
    with screen.examine(second, entries, run.recipe, Tolerance()) as finetune:
        if change == "folder-gone":
            shutil.rmtree(tmp_path / "base")
        elif change == "shape":
            models.save(tmp_path / "base", {**base, SQUARE: base[SQUARE].reshape(8, 32)})
        else:
            models.save(tmp_path / "base", {n: v for n, v in base.items() if n != WIDE})
        with pytest.raises(StreammergeError):
            run.engine.fold(run.recipe, Incoming(finetune), run.state, out)


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
        assert measured.delta_norm == pytest.approx(norms[-1], rel=1e-6)
        assert measured.state_norm == pytest.approx(
            sum(float(v.square().sum()) for v in new.values()) ** 0.5, rel=1e-6
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
            assert norm == pytest.approx(float(x.norm()), rel=1e-6)
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
