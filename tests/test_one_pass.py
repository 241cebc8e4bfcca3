"""A fold that renders in the same pass, sees weights in panels and works on threads gives the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import models
import pytest
import torch
from benches import PLAIN, bench_of, contents, equal, fine_tunes, open_files, sha256
from models import BIAS, EMBEDDING, NORM, PROJECTED, SQUARE, TALL, WIDE
from safetensors.torch import load_file, save_file

from streammerge import finalize, methods, plan, weights
from streammerge.arriving import Incoming
from streammerge.config.finalize import Cap, Lines
from streammerge.engine import Serve
from streammerge.errors import ConfigError, Refused, Stopped
from streammerge.headers import find
from streammerge.methods import Arrival, Totals, Weight
from streammerge.state import STATISTICS
from streammerge.streams import Behind
from streammerge.weights import PANEL_ELEMENTS, Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from benches import Bench
    from torch import Tensor

    from streammerge.engine import Folded
    from streammerge.methods import Kind, Slots

Values = dict[str, "Tensor"]

LOCAL = tuple(n for n in methods.NAMES if methods.is_local(n) and not methods.rereads(n))
ELEMENTWISE = tuple(n for n in methods.NAMES if methods.is_elementwise(n))
SCALED = finalize.Finalize(scale=0.7)
BY_DEPTH = finalize.Finalize(scale=1.1, lines=Lines(alpha=0.4, beta=0.8))
CAPPED = finalize.Finalize(cap=Cap(beta=1.5), scale=0.9)
AUTO = finalize.Finalize(lines=Lines())


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    """Engines say how many threads torch uses: the next test begins as this one did."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def at_work() -> list[str]:
    """Name the threads that read ahead or write behind."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("ahead", "behind"))]


def fold_and_serve(
    run: Bench, path: Path, finish: finalize.Finalize = PLAIN, factor: float = 1.0, digest: str = "digest"
) -> Folded:
    """Fold one fine-tune as `Bench.fold` does, and ask for the model in the same pass."""
    out = served(run)
    out.mkdir()
    with run.opened(path) as finetune:
        incoming = Incoming(finetune, digest, factor)
        folded = run.engine.fold(run.recipe, incoming, run.state, run._next(), Serve(out, finish))
        assert finetune.finish() == weights.identity(path, sidecar=methods.sidecar(run.recipe.method))
    run.folded.append((path, factor, digest))
    run._seal(folded.state)
    return folded


def served(run: Bench) -> Path:
    """Where the model of the next fold goes."""
    return run.root / f"served-{run.folds + 1}"


def adapter(path: Path, base: Mapping[str, Tensor], seed: int, rank: int = 3) -> None:
    """Publish an adapter of every matrix, and a whole norm."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, values in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if values.ndim == 2 and values.is_floating_point() and name != EMBEDDING:
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, values.shape[1], generator=draw) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(values.shape[0], rank, generator=draw) * 0.1
    if NORM in base:
        tensors[f"base_model.model.{NORM}"] = base[NORM].float() + torch.randn(16, generator=draw) * 0.02
    publish_adapter(path, tensors, rank)


def publish_adapter(path: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write an adapter as PEFT does."""
    path.mkdir()
    save_file({n: v.contiguous() for n, v in tensors.items()}, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (path / "adapter_config.json").write_text(json.dumps(settings))


def bring(path: Path, base: Mapping[str, Tensor], method: str, seed: int) -> None:
    """Put beside a fine-tune what a method asks for."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, values in base.items():
        if method == "fisher" and values.is_floating_point():
            found[name] = torch.rand(values.shape, generator=draw) + 0.01
        elif method == "regmean" and name in PROJECTED:
            inputs = torch.randn(100, values.shape[1], generator=draw)
            found[name] = inputs.T @ inputs
    if found:
        save_file(found, path / methods.sidecar(method))


def arrivals(root: Path, base: Mapping[str, Tensor], method: str, kinds: Sequence[str]) -> list[Path]:
    """Make fine-tunes, whole or adapters, with what the method asks for; the last one without."""
    paths = [root / f"ft{number}" for number in range(len(kinds))]
    for number, (path, kind) in enumerate(zip(paths, kinds, strict=True)):
        if kind == "adapter":
            adapter(path, base, number)
        else:
            models.make_fine_tune(path, base, seed=number)
        if number + 1 < len(paths):
            bring(path, base, method, number)
    return paths


def deeper(root: Path, side: int = 16) -> Values:
    """Save a base of two blocks in two files; of a large `side`, work on it is worth a thread."""
    base = models.make_base(root / "made", dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(9)
    base["model.layers.1.q_proj.weight"] = torch.randn(side, side, generator=draw).bfloat16()
    base["model.layers.1.norm.weight"] = torch.randn(16, generator=draw).bfloat16()
    base["model.layers.1.conv.weight"] = torch.randn(4, 3, 5, generator=draw).bfloat16()
    models.save(root / "base", base, shards=2)
    return base


# --------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("finish", [PLAIN, SCALED, BY_DEPTH, CAPPED], ids=["plain", "scale", "lines", "cap"])
@pytest.mark.parametrize("method", LOCAL)
def test_the_model_of_the_fold_is_that_of_the_state(
    method: str, finish: finalize.Finalize, tmp_path: Path
) -> None:
    """Rendered in the fold, a model has every bit, hash and the length of one rendered of the state."""
    base = deeper(tmp_path)
    run = bench_of(tmp_path / "run", tmp_path / "base", method=method)
    run.recipe = dataclasses.replace(run.recipe, is_capped=finish.cap is not None)
    for number, path in enumerate(arrivals(tmp_path, base, method, ("full", "adapter", "full"))):
        out, after = served(run), tmp_path / f"after-{number}"
        model = fold_and_serve(run, path, finish, factor=1.0 + 0.5 * number).model
        assert model is not None
        after.mkdir()
        expected = run.engine.render(run.recipe, run.state, finish, after)
        assert model.hashes == expected.hashes == contents(after) == contents(out)
        assert model.norm == pytest.approx(expected.norm, rel=1e-9)
        assert model.norm > 0 or number == 0  # one fine-tune alone is no consensus
    assert not at_work()


@pytest.mark.parametrize("method", LOCAL)
def test_the_state_does_not_depend_on_what_is_served(method: str, tmp_path: Path) -> None:
    """A fold that serves writes the state, and measures, what one that does not serve does."""
    base = deeper(tmp_path)
    plain, serving = (bench_of(tmp_path / name, tmp_path / "base", method=method) for name in ("one", "two"))
    for path in arrivals(tmp_path, base, method, ("full", "adapter")):
        measured = plain.fold(path)
        folded = fold_and_serve(serving, path, BY_DEPTH)
        assert repr(folded.measured) == repr(measured)  # where NaN is NaN
        assert serving.state.hashes == plain.state.hashes
        assert serving.state.totals == plain.state.totals


@pytest.mark.parametrize("method", sorted({*LOCAL} & {*ELEMENTWISE}))
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_weights_longer_than_a_panel_are_served_the_same(method: str, kind: str, tmp_path: Path) -> None:
    """However a weight is cut in the fold and in the render, whole for adapters, its bits are the same.

    Negative zeros of the base, too, where a fine-tune changed a part of the weight only.
    """
    draw = torch.Generator().manual_seed(0)
    base = {SQUARE: torch.randn(600, 1024, generator=draw).bfloat16(), NORM: torch.ones(16).bfloat16()}
    base[SQUARE][::7, ::5] = -0.0
    models.save(tmp_path / "base", base)
    if kind == "adapter":
        stem = f"base_model.model.{SQUARE.removesuffix('.weight')}"
        b = torch.randn(600, 4, generator=draw)
        b[:300] = 0  # the first panel, all of it, is left alone
        a = torch.randn(4, 1024, generator=draw) * 0.02
        publish_adapter(tmp_path / "ft", {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, 4)
    else:
        tuned = base[SQUARE].clone()
        tuned[300:] += 0.02
        models.save(tmp_path / "ft", {**base, SQUARE: tuned})
    run = bench_of(tmp_path / "run", tmp_path / "base", method=method)
    out = served(run)
    folded = fold_and_serve(run, tmp_path / "ft")
    assert folded.model is not None
    rendered = models.load(run.render())
    assert equal(models.load(out), rendered)
    assert equal({"": rendered[SQUARE][:256]}, {"": base[SQUARE][:256]})
    assert folded.model.hashes == {"model.safetensors": sha256(run.root / "model" / "model.safetensors")}


# ------------------------------------------------------------------------------- where one pass is not enough


@pytest.mark.parametrize("method", [name for name in methods.NAMES if name not in LOCAL])
def test_what_must_know_all_is_not_served_in_the_fold(method: str, tmp_path: Path) -> None:
    """A method whose render asks for more than is known then gives no model, and nothing is written."""
    base = models.make_base(tmp_path / "base")
    run = bench_of(tmp_path / "run", tmp_path / "base", method=method)
    for path in fine_tunes(tmp_path, base, 2):
        out = served(run)
        assert fold_and_serve(run, path).model is None
        assert not contents(out)


@pytest.mark.parametrize("method", LOCAL)
@pytest.mark.parametrize("why", ["tied", "auto"])
def test_what_is_not_served_in_the_fold_is_rendered_after_it(why: str, method: str, tmp_path: Path) -> None:
    """A tied weight that is stored twice, and LiNeS' own alpha, need a second pass: no model in the first."""
    base = models.make_base(tmp_path / "base", head="tied" if why == "tied" else "none")
    if why == "auto" and not methods.keeps_plain_sum(method):
        pytest.skip("has no sum for LiNeS' own alpha")
    run = bench_of(tmp_path / "run", tmp_path / "base", method=method)
    path, other = fine_tunes(tmp_path, base, 2)
    finish = AUTO if why == "auto" else PLAIN
    out = served(run)
    assert fold_and_serve(run, path, finish).model is None
    assert not contents(out)
    run.fold(other)
    assert not equal(models.load(run.render(finish=finish)), base)


def knobs_of(method: str) -> list[dict[str, Any]]:
    """List a method's default knobs, and each other choice of those that are a choice."""
    given = []
    for knob, (annotation, default) in methods.knob_fields(method).items():
        if annotation is bool or get_origin(annotation) is Literal:
            choices = (True, False) if annotation is bool else get_args(annotation)
            given += [{knob: choice} for choice in choices if choice != default]
    return [methods.resolve(method, each) for each in ({}, *given)]


def shown_twice(method: str, knobs: Mapping[str, Any], kind: Kind) -> Slots:
    """Fold two random deltas of one weight, opposite in a row, the second with what the method asks for."""
    module, draw, shape = methods.load(method), torch.Generator().manual_seed(0), (6, 20)
    weight = Weight("w", kind, shape)
    layout = methods.layout(module, weight, 0, knobs)
    slots = {slot: torch.zeros(size, dtype=dtype) for slot, (dtype, size) in layout.items()}
    first = torch.randn(shape, generator=draw)
    for number in range(2):
        delta = first if number == 0 else torch.cat([-first[:1], torch.randn(5, 20, generator=draw)])
        sidecar = None
        if methods.sidecar(method) and number:
            sidecar = delta.abs() if method == "fisher" else delta.T @ delta
        cuts = tuple(delta.abs().reshape(-1).sort().values[[8, 90]].tolist())
        arrival = Arrival(
            "w", kind, delta, "digest", earlier=number, width=20, cuts=cuts, cut_places=(0, 0),
            sidecar=sidecar, sidecar_norm=5.0,
        )  # fmt: skip
        slots = module.fold(slots, arrival, **methods.accepted(module.fold, knobs))
    return slots


@pytest.mark.parametrize("kind", ["projected", "added"])
@pytest.mark.parametrize("method", LOCAL)
def test_a_local_method_asks_for_what_is_known_before_a_fold(method: str, kind: Kind) -> None:
    """With any choice of knobs, count and factors are all of the totals that its render and length read."""
    module = methods.load(method)
    known = Totals(1, 1.5, 3.0, 4.0, 5.0, 6.0)
    before, afters = known.ahead(0.5), [known.after(7.0, 8.0, 0.5, tally) for tally in (9.0, -9.0)]
    assert {(after.count, after.factors) for after in afters} == {(before.count, before.factors)}
    figures = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    for knobs in knobs_of(method):
        slots = shown_twice(method, knobs, kind)
        given = methods.accepted(module.render, {**knobs, "figures": figures, "kind": kind})
        found = module.render(slots, before, **given)
        assert found.isfinite().all(), knobs
        assert found.any(), knobs
        assert all(torch.equal(found, module.render(slots, after, **given)) for after in afters), knobs
        if (length := getattr(module, "length", None)) is not None:
            accepted = methods.accepted(length, knobs)
            assert {length(after, **accepted) for after in afters} == {length(before, **accepted)}


def test_nothing_else_of_the_totals_is_known_before_a_fold() -> None:
    """What is not known is NaN, so that a method that read it would be found out."""
    before = Totals(1, 1.5, 3.0, 4.0, 5.0, 6.0).ahead(0.5)
    assert dataclasses.astuple(before)[:2] == (2, 2.0)
    assert all(figure != figure for figure in dataclasses.astuple(before)[2:])  # noqa: PLR0124 -- NaN


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("residency", ["disk", "host"])
@pytest.mark.parametrize("method", ["average", "spectral_cap", "wudi"])
def test_a_fine_tune_that_is_bad_at_its_end_leaves_no_thread(
    method: str, residency: str, tmp_path: Path
) -> None:
    """NaN in the last element of the last weight is refused; state, files and threads are as before."""
    base = deeper(tmp_path, 300)
    run, other = (
        bench_of(tmp_path / name, tmp_path / "base", method=method, residency=residency)
        for name in ("run", "other")
    )
    first, bad, second = fine_tunes(tmp_path, base)
    with Weights(find(tmp_path / "base")) as found:
        last = [name for names in plan.shards(found) for name in names if base[name].is_floating_point()][-1]
    tensors = models.load(bad)
    tensors[last].view(-1)[-1] = float("nan")
    models.save(bad, tensors)
    for bench in (run, other):
        fold_and_serve(bench, first)
    before, files = contents(run.state.folder), open_files()
    with pytest.raises(Refused, match=last) as caught:
        fold_and_serve(run, bad)
    assert caught.value.reason == "non-finite"
    assert not at_work()
    assert (contents(run.state.folder), open_files()) == (before, files)
    for folder in ("state-2", "served-2"):
        shutil.rmtree(run.root / folder)
    for bench in (run, other):
        fold_and_serve(bench, second)
    assert contents(run.root) == contents(other.root)


def test_a_model_that_overflows_is_refused_in_the_fold(tmp_path: Path) -> None:
    """float16 that would overflow is refused by the weight's name, and no thread or file stays behind."""
    base = models.make_base(tmp_path / "made", dtype=torch.float16)
    base[NORM] = torch.full((16,), 40_000.0, dtype=torch.float16)
    base["a.weight"] = torch.ones(300, 300, dtype=torch.float16)  # work on it is worth a thread
    models.save(tmp_path / "base", base)
    models.save(tmp_path / "ft", {**base, NORM: base[NORM] + 20_000})
    run = bench_of(tmp_path / "run", tmp_path / "base", method="average")
    files = open_files()
    with pytest.raises(Refused, match=NORM) as caught:
        fold_and_serve(run, tmp_path / "ft", finalize.Finalize(scale=2.0))
    assert not at_work()
    assert caught.value.reason == "overflow"
    assert open_files() == files
    shutil.rmtree(run.root / "state-1")
    shutil.rmtree(served(run))
    assert fold_and_serve(run, tmp_path / "ft").model is not None


def test_a_stop_leaves_no_thread(tmp_path: Path) -> None:
    """Stopped at any beat, whichever thread it comes on, a fold that serves ends all that it began."""
    base = deeper(tmp_path, 300)
    run = bench_of(tmp_path / "run", tmp_path / "base", method="average")
    (path,) = fine_tunes(tmp_path, base, 1)
    files, beats = open_files(), itertools.count()
    for allowed in itertools.count(0, 4):
        beats = itertools.count()

        def beat(allowed: int = allowed, beats: Iterator[int] = beats) -> None:
            if next(beats) >= allowed:
                raise Stopped("asked to stop")

        run.engine.beat = beat
        try:
            fold_and_serve(run, path)
        except Stopped:
            assert not at_work()
            assert open_files() == files
            shutil.rmtree(run.root / "state-1")
            shutil.rmtree(served(run))
        else:
            break
    assert next(beats) > 10


# ------------------------------------------------------------------------------------------ weights in panels


@dataclass(frozen=True)
class Coarse:
    root: Path
    base: Values
    tuned: list[Values]


FACTORS = (1.0, 0.7)
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ELEMENTWISE),
    ("ties", {"scope": "tensor"}),
    ("ties", {"agg": "max"}),
    ("ties", {"agg": "sum"}),
    ("breadcrumbs", {"axis": "tensor"}),
    ("dare", {"agg": "ties"}),
    ("fisher", {"normalize": False}),
    ("consensus_ta", {"k": 3}),
)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Coarse:
    """A base and two fine-tunes, larger than panels, with many deltas of equal magnitude."""
    root = tmp_path_factory.mktemp("coarse")
    draw = torch.Generator().manual_seed(0)
    shapes = {SQUARE: (600, 1024), EMBEDDING: (300, 1001), BIAS: (PANEL_ELEMENTS + 17,), WIDE: (3, 5)}

    def grid(width: int) -> Values:
        return {n: torch.randint(-width, width, s, generator=draw).float() / 4096 for n, s in shapes.items()}

    base = grid(4000)
    models.save(root / "base", base)
    tuned = [{n: base[n] + delta for n, delta in grid(200).items()} for _ in FACTORS]
    for number, values in enumerate(tuned):
        models.save(root / f"ft{number}", values)
        bring(root / f"ft{number}", base, "fisher", number)  # which others do not open
    return Coarse(root, base, tuned)


def cuts_at(deltas: Sequence[Tensor], ranks: Sequence[int]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Sort all magnitudes; give those of some ranks, 1 the smallest, and their places; first is larger."""
    magnitudes = torch.cat([delta.abs().reshape(-1) for delta in deltas])
    values, places = magnitudes.sort(descending=True, stable=True)
    index = [len(magnitudes) - rank for rank in ranks]
    return tuple(values[index].tolist()), tuple(places[index].tolist())


def whole_arrival(run: Bench, deltas: Values, name: str, path: Path, number: int) -> Arrival:
    """Put a whole weight before a method, with all that it asks for, found by sorting."""
    method, knobs = run.recipe.method, run.recipe.knobs
    module = methods.load(method)
    cuts: tuple[float, ...] = ()
    places: tuple[int, ...] = ()
    if (ranks := getattr(module, "model_ranks", None)) is not None:
        elements = sum(delta.numel() for delta in deltas.values())
        cuts, _ = cuts_at(list(deltas.values()), ranks(elements, **methods.accepted(ranks, knobs)))
    ranks = getattr(module, "weight_ranks", None)
    if ranks is not None and not cuts:
        wanted = ranks(deltas[name].numel(), **methods.accepted(ranks, knobs))
        cuts, places = cuts_at([deltas[name]], wanted)
    sidecar, norm = None, 0.0
    if methods.sidecar(method):
        sidecar = load_file(path / methods.sidecar(method))[name]
        with run.opened(path) as finetune:
            assert finetune.sidecar is not None
            norm = finetune.sidecar.norm(lambda: None)
    return Arrival(
        name=name,
        kind="projected" if run.recipe.plan.kinds[name] == plan.PROJECTED else "added",
        delta=deltas[name],
        digest=f"digest {number}",
        factor=FACTORS[number],
        earlier=number,
        width=deltas[name].shape[-1],
        cuts=cuts,
        cut_places=places,
        sidecar=sidecar,
        sidecar_norm=norm,
    )


@pytest.mark.parametrize(("method", "knobs"), CASES, ids=lambda case: str(case) if case else "default")
def test_panels_give_the_state_of_the_whole_weight(
    method: str, knobs: dict[str, Any], coarse: Coarse, tmp_path: Path
) -> None:
    """A projected weight that streams in panels is remembered as if the method had seen it at once."""
    base = coarse.base
    run = bench_of(tmp_path / "run", coarse.root / "base", method=method, knobs=knobs)
    module, slots = methods.load(method), dict[str, "Slots"]()
    assert run.recipe.plan.kinds[SQUARE] == plan.PROJECTED
    assert base[SQUARE].numel() > 2 * PANEL_ELEMENTS
    for number, values in enumerate(coarse.tuned):
        path = coarse.root / f"ft{number}"
        run.fold(path, FACTORS[number], digest=f"digest {number}")
        deltas = {name: values[name] - base[name] for name in run.recipe.plan.merged}
        for name in deltas:
            arrival = whole_arrival(run, deltas, name, path, number)
            weight = Weight(name, arrival.kind, tuple(base[name].shape))
            layout = methods.layout(module, weight, number, run.recipe.knobs)
            old = slots.get(name) or {s: torch.zeros(size, dtype=d) for s, (d, size) in layout.items()}
            slots[name] = module.fold(old, arrival, **methods.accepted(module.fold, run.recipe.knobs))
        for slot in slots[SQUARE]:
            found = load_file(run.state.folder / f"{slot}-00001.safetensors")
            assert equal(found, {name: held[slot] for name, held in slots.items()}), (slot, number)


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_spectra_are_recorded_where_a_cap_needs_them(method: str, tmp_path: Path) -> None:
    """Of a projected weight only the length is recorded, with a cap the whole spectrum's figures."""
    base = models.make_base(tmp_path / "base")
    tuned = models.make_fine_tune(tmp_path / "ft", base, seed=1)
    for is_capped in (False, True):
        run = bench_of(tmp_path / str(is_capped), tmp_path / "base", method=method)
        run.recipe = dataclasses.replace(run.recipe, is_capped=is_capped)
        run.fold(tmp_path / "ft")
        found = models.load(run.state.folder / STATISTICS)
        for name in PROJECTED:
            s = torch.linalg.svdvals((tuned[name] - base[name]).double())
            norm, gram, largest = found[name][0].tolist()
            assert norm == pytest.approx(float(s.norm()), rel=1e-6)
            if is_capped:
                assert gram == pytest.approx(float(s.square().norm()), rel=1e-5)
                assert largest == pytest.approx(float(s[0]), rel=1e-3)
            else:
                assert gram != gram  # noqa: PLR0124 -- NaN
                assert largest != largest  # noqa: PLR0124 -- NaN


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_a_cap_over_what_was_not_recorded_is_a_configuration_error(method: str, tmp_path: Path) -> None:
    """A cap switched on later says what to do, at render and in the next fold; without it all is well."""
    base = models.make_base(tmp_path / "base")
    first, second = fine_tunes(tmp_path, base, 2)
    run = bench_of(tmp_path / "run", tmp_path / "base", method=method)
    run.fold(first)
    without = run.recipe
    run.recipe = dataclasses.replace(run.recipe, is_capped=True)
    with pytest.raises(ConfigError, match="cap") as caught:
        run.render("capped", CAPPED)
    assert "rebuild" in caught.value.hint
    if method in LOCAL:
        with pytest.raises(ConfigError, match="cap"):
            fold_and_serve(run, second, CAPPED)
        shutil.rmtree(run.root / "state-2")
        shutil.rmtree(served(run))
    assert not at_work()
    run.recipe = without
    fold_and_serve(run, second)
    run.render()


# ---------------------------------------------------------------------------------------- whatever the timing


def folded_and_served(root: Path, base: Path, method: str, paths: Sequence[Path], **options: Any) -> Any:
    """Fold all and render: the hash of every file."""
    run = bench_of(root, base, method=method, **options)
    for path in paths:
        fold_and_serve(run, path)
    run.render()
    return contents(root)


def dawdle(monkeypatch: pytest.MonkeyPatch, call: str, seed: int) -> list[float]:
    """Let a system call take its time, now and then; gives the delays, as they come."""
    draw, real, delays = random.Random(seed), getattr(os, call), list[float]()

    def slow(*arguments: Any) -> Any:
        delays.append(draw.choice((0.0, 0.0, 0.0005, 0.002)))
        time.sleep(delays[-1])
        return real(*arguments)

    monkeypatch.setattr(os, call, slow)
    return delays


@pytest.fixture
def _small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a small model into many."""
    monkeypatch.setattr(plan, "PANEL_ELEMENTS", 64)


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("method", methods.NAMES)
def test_the_bits_do_not_depend_on_timing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading and writing fall behind now and then, every file has the same bytes."""
    base = deeper(tmp_path)
    paths = arrivals(tmp_path, base, method, ("full", "adapter"))
    expected = folded_and_served(tmp_path / "run", tmp_path / "base", method, paths)
    delays = dawdle(monkeypatch, "preadv", 0), dawdle(monkeypatch, "write", 1)
    assert folded_and_served(tmp_path / "late", tmp_path / "base", method, paths) == expected
    assert all(map(any, delays))


class Late(Behind):
    """Makes every call some time after it was asked to."""

    def __call__(self, function: Callable[[], None], size: int) -> None:
        def call() -> None:
            time.sleep(0.003)
            function()

        super().__call__(call, size)


@pytest.mark.parametrize("method", ["average", "magmax", "fisher", "spectral_cap", "opcm", "tsvm"])
def test_what_is_read_may_be_hashed_and_written_late(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is changed in place that is still to be hashed or written, float32 throughout included."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(200, 150, generator=draw) for name in (SQUARE, EMBEDDING)}
    models.save(tmp_path / "base", base)
    paths = fine_tunes(tmp_path, base, 2)
    expected = folded_and_served(tmp_path / "run", tmp_path / "base", method, paths, residency="host")
    monkeypatch.setattr(weights, "Behind", Late)
    assert expected == folded_and_served(
        tmp_path / "late", tmp_path / "base", method, paths, residency="host"
    )


@pytest.mark.usefixtures("_small_panels")
@pytest.mark.parametrize("method", ["fisher", "spectral_cap"])
def test_the_bits_do_not_depend_on_turns(method: str, tmp_path: Path) -> None:
    """Where threads take turns a thousand times as often, every file has the same bytes."""
    base = deeper(tmp_path)
    paths = arrivals(tmp_path, base, method, ("full", "adapter", "full"))
    expected = folded_and_served(tmp_path / "run", tmp_path / "base", method, paths)
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        assert folded_and_served(tmp_path / "turns", tmp_path / "base", method, paths) == expected
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_elementwise_bits_do_not_depend_on_the_number_of_threads(
    method: str, coarse: Coarse, tmp_path: Path
) -> None:
    """One thread or two, of the engine's or left by others, fold and render the same bits."""
    found = []
    for threads in (1, 2):
        run = bench_of(tmp_path / f"of-{threads}", coarse.root / "base", method=method, threads=threads)
        torch.set_num_threads(3 - threads)
        for number in range(len(FACTORS)):
            fold_and_serve(run, coarse.root / f"ft{number}", factor=FACTORS[number])
        found.append((run.state.hashes, contents(run.root / "served-2"), run.state.totals))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["spectral_cap", "opcm", "wudi", "average"])
def test_the_callers_thread_does_not_matter(method: str, tmp_path: Path) -> None:
    """In another thread, and whatever number of threads torch was told before, a fold gives the same bits."""
    base = {TALL: torch.randn(300, 200, generator=torch.Generator().manual_seed(0)), NORM: torch.ones(16)}
    models.save(tmp_path / "base", base)
    paths = fine_tunes(tmp_path, base, 2)
    found = []

    def fold(name: str, others: int) -> None:
        run = bench_of(tmp_path / name, tmp_path / "base", method=method)
        torch.set_num_threads(others)
        for path in paths:
            fold_and_serve(run, path)
        run.render()
        found.append(contents(run.root))

    fold("here", 1)
    fold("after others", 2)
    beside = threading.Thread(target=fold, args=("beside", 2))
    beside.start()
    beside.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
