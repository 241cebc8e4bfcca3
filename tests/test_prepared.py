"""What opcm derives from the state while idle: the same bits with it and without; nothing is lost with it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import models
import pytest
from benches import Bench, bench
from daemons import Site, until

from streammerge.engine import Engine
from streammerge.methods import opcm
from streammerge.prepared import Prepared

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.methods import Slots

PLENTY = 10**9


def started(root: Path, prepared: Prepared | None, folds: int = 2, **options: object) -> Bench:
    """Fold some fine-tunes with an engine that keeps what it prepares."""
    base = models.make_base(root / "base")
    run = bench(root / "run", root / "base", **options)
    run.engine = Engine(device="cpu", threads=1, residency="disk", prepared=prepared)
    for i in range(folds + 1):
        models.make_fine_tune(root / f"ft{i}", base, seed=i)
    for i in range(folds):
        run.fold(root / f"ft{i}")
    return run


def prepare_all(run: Bench) -> int:
    """Prepare weight by weight until nothing is left; how many there were."""
    count = 0
    while run.engine.prepare_next(run.recipe, run.state):
        count += 1
    return count


@pytest.mark.parametrize("tail", ["scalar", "diagonal", "keep"])
@pytest.mark.parametrize(("memory", "disk"), [(PLENTY, 0), (0, PLENTY), (3000, PLENTY), (3000, 3000)])
def test_a_prepared_fold_gives_the_same_bits(tail: str, memory: int, disk: int, tmp_path: Path) -> None:
    """In memory, on disk, half and half or in part: the state is what a fold without it writes."""
    plain = started(tmp_path / "plain", None, knobs={"tail": tail})
    plain.fold(tmp_path / "plain" / "ft2")
    run = started(tmp_path / "kept", Prepared(tmp_path / "prepared", memory, disk), knobs={"tail": tail})
    assert prepare_all(run) == sum(run.recipe.needs_spectra(n) for n in run.recipe.plan.merged)
    run.fold(tmp_path / "kept" / "ft2")
    assert run.state.hashes == plain.state.hashes


def test_what_is_prepared_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold after all was prepared derives nothing; one for another state derives everything itself."""
    run = started(tmp_path, Prepared(tmp_path / "prepared", 0, PLENTY))
    count = prepare_all(run)
    calls: list[float] = []
    derive = opcm.prepare

    def counted(slots: Slots, *, alpha: float, tail: Literal["scalar", "diagonal", "keep"]) -> Slots:
        calls.append(alpha)
        return derive(slots, alpha=alpha, tail=tail)

    monkeypatch.setattr(opcm, "prepare", counted)
    run.fold(tmp_path / "ft2")
    assert not calls
    run.fold(tmp_path / "ft0")
    assert len(calls) == count


def test_another_process_goes_on_from_what_is_on_disk(tmp_path: Path) -> None:
    """What was prepared before a restart is found again; nothing is derived twice."""
    run = started(tmp_path, Prepared(tmp_path / "prepared", 0, PLENTY))
    assert run.engine.prepare_next(run.recipe, run.state)
    count = prepare_all(run)
    run.engine = Engine(
        device="cpu", threads=1, residency="disk", prepared=Prepared(tmp_path / "prepared", 0, PLENTY)
    )
    assert count > 1
    assert prepare_all(run) == 0


@pytest.mark.parametrize("harm", ["bits", "cut", "gone", "all"])
def test_what_was_spoilt_is_derived_again(harm: str, tmp_path: Path) -> None:
    """A changed, shortened or deleted file is not used: the fold derives what it needs, to the same bits."""
    plain = started(tmp_path / "plain", None)
    plain.fold(tmp_path / "plain" / "ft2")
    folder = tmp_path / "prepared"
    run = started(tmp_path / "kept", Prepared(folder, 0, PLENTY))
    prepare_all(run)
    path = max(folder.glob("*/*.safetensors"), key=lambda p: p.stat().st_size)
    if harm == "bits":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif harm == "gone":
        path.unlink()
    else:
        shutil.rmtree(folder)
    run.fold(tmp_path / "kept" / "ft2")
    assert run.state.hashes == plain.state.hashes
    assert harm == "all" or not path.exists()


def test_only_the_newest_state_has_prepared_data(tmp_path: Path) -> None:
    """What belongs to an older state, or to other knobs or threads, is removed and never used."""
    folder = tmp_path / "prepared"
    run = started(tmp_path, Prepared(folder, 0, PLENTY))
    prepare_all(run)
    (first,) = folder.iterdir()
    run.fold(tmp_path / "ft2")
    prepare_all(run)
    (second,) = folder.iterdir()
    assert first != second
    run.recipe = replace(run.recipe, knobs={**run.recipe.knobs, "alpha": 0.25})
    prepare_all(run)
    (third,) = folder.iterdir()
    assert third != second
    run.engine = Engine(device="cpu", threads=2, residency="disk", prepared=Prepared(folder, 0, PLENTY))
    prepare_all(run)
    (fourth,) = folder.iterdir()
    assert fourth != third


def test_methods_that_derive_nothing_prepare_nothing(tmp_path: Path) -> None:
    """With average, and before the first fold, there is nothing to do while idle."""
    prepared = Prepared(tmp_path / "prepared", PLENTY, PLENTY)
    run = started(tmp_path / "average", prepared, method="average")
    assert prepare_all(run) == 0
    fresh = started(tmp_path / "fresh", prepared, folds=0)
    assert prepare_all(fresh) == 0
    assert not (tmp_path / "prepared").exists()


def test_the_daemon_prepares_while_idle(tmp_path: Path) -> None:
    """After a fold files appear in the store without anything being asked; deleted, the next fold goes on."""
    site = Site(tmp_path / "site", method="opcm")
    prepared = site.root / "store" / "prepared"
    with site.daemon() as daemon:
        site.publish("one", 1)
        daemon.until_state(one="folded")
        until(lambda: len(list(prepared.glob("*/*.safetensors"))) > 1, "weights are prepared")
        shutil.rmtree(prepared, ignore_errors=True)  # the daemon may be writing there
        site.publish("two", 2)
        daemon.until_state(two="folded")


def test_what_is_prepared_gives_way_to_a_fold(tmp_path: Path) -> None:
    """A fold that lacks room on the disk removes what was prepared before it gives up."""
    run = started(tmp_path, Prepared(tmp_path / "prepared", 0, PLENTY))
    prepare_all(run)
    assert run.engine.give_back_disk()
    assert not (tmp_path / "prepared").exists()
    assert not run.engine.give_back_disk()
    run.fold(tmp_path / "ft2")
