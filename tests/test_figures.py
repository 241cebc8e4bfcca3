"""The screens that judge by figures: what each sees in good fine-tunes and in bad ones, and what follows."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

import locks
import models
import pytest
import torch
from benches import Watch, merge
from daemons import Site, newest
from models import TALL

from streammerge import figures, gauge, reports, samples
from streammerge.config.screens import Screens
from streammerge.errors import Quarantined, Refused
from streammerge.headers import Entry
from streammerge.ledger import M001_FIRST, M002_MARKS, Ledger
from streammerge.linalg import LowRank, dense

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from streammerge.figures import Figure

Tensors = dict[str, Any]
GOOD = 8


def toy(root: Path, count: int = GOOD, **how: Any) -> Watch:
    """Merge some good fine-tunes of the usual toy base; none of them may be flagged."""
    base = models.make_base(root / "made")
    watch = Watch(root, base, **how)
    for seed in range(count):
        assert flags(watch.take(good(base, seed))) == {}
    return watch


def good(base: Mapping[str, Tensor], seed: int, size: float = 0.01) -> Tensors:
    """Move every floating-point weight a little."""
    random = torch.Generator().manual_seed(100 + seed)
    return {
        name: v + size * torch.randn(v.shape, generator=random) if v.is_floating_point() else v
        for name, v in base.items()
    }


def flags(found: Mapping[str, Figure]) -> dict[str, str]:
    """Which screens are not content, and why."""
    return {name: figure.reason for name, figure in found.items() if figure.is_beyond}


# ------------------------------------------------------------------------------------------------ attention


def test_the_distance_of_a_product_is_that_of_the_matrices_multiplied_out() -> None:
    """By Gram matrices of head size, or by every head's whole n x n product: the same number."""
    base = locks.make_base(layers=1)
    other = locks.tuned(base, 1, 0.3)
    q, k, _, _ = locks.layer(0)
    old, new = (
        torch.stack(
            [
                t[q].double().reshape(locks.HEADS, locks.WIDTH, -1)[h].T
                @ t[k].double().reshape(-1, locks.WIDTH, locks.HIDDEN)[h // locks.SHARED]
                for h in range(locks.HEADS)
            ]
        )
        for t in (base, other)
    )
    expected = float((new - old).norm() / old.norm())
    how = {"width": locks.WIDTH, "shared": locks.SHARED}
    assert gauge.invariant(base[q], other[q], base[k], other[k], **how) == pytest.approx(expected, rel=1e-6)
    assert 0.2 < expected < 1


CASES: dict[str, tuple[Callable[[Tensors], Tensors], str, tuple[float, float], tuple[float, float]]] = {
    "fine-tune": (lambda b: locks.tuned(b, 1), "", (0.01, 0.03), (0, 0)),
    "mergelock": (
        lambda b: locks.turned(locks.tuned(b, 1), map(locks.layer, range(2)), locks.lock()),
        "attention-gauge-transformed", (1.5, 99), (0.02, 0.04),
    ),
    "permuted": (
        lambda b: locks.turned(locks.tuned(b, 1), map(locks.layer, range(2)), locks.permutation()),
        "attention-gauge-transformed", (1.1, 1.5), (0.02, 0.04),
    ),
    "one-layer-permuted": (
        lambda b: locks.turned(locks.tuned(b, 1), [locks.layer(1)], locks.permutation()),
        "attention-gauge-transformed", (1.1, 1.5), (0.02, 0.04),
    ),
    "unrelated": (lambda _: locks.make_base(seed=9), "not-this-base", (1.3, 1.5), (1.3, 1.6)),
    "hard-trained": (lambda b: locks.tuned(b, 1, 0.4), "", (0.35, 0.45), (0.4, 0.8)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_attention_that_was_turned_is_known_by_what_did_not_change(case: str, tmp_path: Path) -> None:
    """Weights far and products near is a lock or a permutation; both far is another model."""
    spoil, reason, raw, product = CASES[case]
    base = locks.make_base()
    watch = Watch(tmp_path, base, locks.CONFIG, "average")
    tensors = spoil(base)
    found = watch.take(tensors)["gauge"]
    assert found.reason == reason
    assert found.value is not None
    assert raw[0] < found.value < raw[1]
    assert all(product[0] < seen.invariant < product[1] for seen in watch.attention if seen.raw > 0.3)


@pytest.mark.parametrize("limits", ["off", "warn", "refuse"])
def test_what_becomes_of_it_is_configured(limits: Any, tmp_path: Path) -> None:
    """Every screen refuses, sets aside, warns or says nothing, as its action says."""
    base = locks.make_base()
    watch = Watch(tmp_path, base, locks.CONFIG, "average")
    locked = locks.turned(locks.tuned(base, 1), [locks.layer(0)], locks.lock())
    found = watch.take(locked, Screens(gauge={"action": limits}))  # type: ignore[arg-type]
    if limits != "refuse":
        assert found["gauge"].verdict == {"off": "off", "warn": "warned"}[limits]
        figures.refuse([found["gauge"]])
        return
    with pytest.raises(Refused) as caught:
        figures.refuse(found.values())
    assert not isinstance(caught.value, Quarantined)
    assert caught.value.reason == "attention-gauge-transformed"


def entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """List weights of these shapes."""
    return {name: Entry(name, "F32", shape, 0, 0, 0) for name, shape in shapes.items()}


FAMILIES: dict[str, tuple[dict[str, tuple[int, ...]], Tensors, list[tuple[str, str, int, int]]]] = {
    "bert": (
        {f"encoder.layer.0.attention.{n}.weight": (24, 24)
         for n in ("self.query", "self.key", "self.value", "output.dense")},
        {"num_attention_heads": 3},
        [("self.query", "self.key", 8, 1), ("output.dense", "self.value", 8, 1)],
    ),
    "llama": (
        {f"model.layers.0.self_attn.{n}_proj.weight": s
         for n, s in {"q": (32, 24), "k": (16, 24), "v": (16, 24), "o": (24, 32)}.items()},
        {"text_config": {"num_attention_heads": 4, "head_dim": 8}},
        [("q_proj", "k_proj", 8, 2), ("o_proj", "v_proj", 8, 2)],
    ),
    "gpt2": (
        {"h.0.attn.c_attn.weight": (24, 72), "h.0.attn.c_proj.weight": (24, 24),
         "h.0.mlp.c_proj.weight": (96, 24)},
        {"n_head": 3},
        [("c_attn", "c_attn", 8, 1), ("c_proj", "c_attn", 8, 1)],
    ),
    "heads-unknown": ({f"a.{n}_proj.weight": (24, 24) for n in "qkvo"}, {}, []),
    "another-shape": ({f"a.{n}_proj.weight": (25, 24) for n in "qkvo"}, {"num_attention_heads": 4}, []),
    "no-attention": ({"a.up_proj.weight": (24, 24)}, {"num_attention_heads": 4}, []),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_found_by_name(family: str) -> None:
    """Query with key, output with value, with the head's width and how many queries share a key."""
    shapes, config, expected = FAMILIES[family]
    found = gauge.products(entries(shapes), config)
    assert [(p.width, p.shared) for p in found] == [part[2:] for part in expected]
    for product, (left, right, _, _) in zip(found, expected, strict=True):
        assert product.left.name.removesuffix(".weight").endswith(left)
        assert product.right.name.removesuffix(".weight").endswith(right)


def test_fused_attention_is_turned_too(tmp_path: Path) -> None:
    """Query, key and value in one transposed weight, as in GPT-2: a permutation is known there too."""
    random = torch.Generator().manual_seed(0)
    base = {"h.0.attn.c_attn.weight": torch.randn(32, 96, generator=random),
            "h.0.attn.c_proj.weight": torch.randn(32, 32, generator=random)}  # fmt: skip
    order = torch.cat([h * 8 + torch.randperm(8, generator=random) for h in range(4)])
    attention, output = base.values()
    turned = torch.cat([part[:, order] for part in attention.split(32, dim=1)], dim=1)
    watch = Watch(tmp_path, base, {"n_head": 4}, "average")
    moved = {"h.0.attn.c_attn.weight": turned + 0.01, "h.0.attn.c_proj.weight": output[order] + 0.01}
    assert flags(watch.take(moved)) == {"gauge": "attention-gauge-transformed", "identity": "not-this-base"}
    assert len(watch.attention) == 2
    assert all(seen.invariant < 0.1 for seen in watch.attention)


# ----------------------------------------------------------------------------- against what is merged already


def noisy(base: Tensors, tensors: Tensors) -> Tensors:
    """The same fine-tune again, with a twentieth of noise on its delta."""
    random = torch.Generator().manual_seed(7)
    return {
        n: v + 0.0005 * torch.randn(v.shape, generator=random) if v.is_floating_point() else v
        for n, v in tensors.items()
    }


def against(base: Tensors, tensors: Tensors, factor: float) -> Tensors:
    """The base plus a fine-tune's delta times a factor."""
    return {n: v + factor * (tensors[n] - v) if v.is_floating_point() else v for n, v in base.items()}


def spiked(base: Tensors, tensors: Tensors) -> Tensors:
    """A good fine-tune but for one weight, whose delta is a single direction."""
    random = torch.Generator().manual_seed(8)
    one = torch.outer(torch.randn(48, generator=random), torch.randn(16, generator=random))
    return {**tensors, TALL: base[TALL] + 0.02 * one}


def replaced(base: Tensors, _: Tensors) -> Tensors:
    """Another model of the same shapes that is near enough not to be implausible."""
    other = good(base, 50, size=0.3)
    scale = 0.8 * sum(float(v.square().sum()) for n, v in base.items() if v.is_floating_point()) ** 0.5
    length = (
        sum(float((other[n] - v).square().sum()) for n, v in base.items() if v.is_floating_point()) ** 0.5
    )
    return against(base, other, scale / length)


BAD: dict[str, tuple[Callable[[Tensors, Tensors], Tensors], dict[str, str]]] = {
    "good": (lambda b, _: good(b, 99), {}),
    "half-as-long": (lambda b, _: against(b, good(b, 99), 0.5), {}),
    "twice-as-long-again": (lambda b, _: against(b, good(b, 99), 1.8), {}),
    "duplicate": (noisy, {"nearest": "near-duplicate"}),
    "undone": (lambda b, t: against(b, t, -1.0), {"nearest": "opposed"}),
    "ten-times": (lambda b, _: against(b, good(b, 99), 10.0), {"norm": "unusual-norm"}),
    "one-direction": (spiked, {"spectrum": "one-direction"}),
    "another-base": (replaced, {"identity": "not-this-base", "norm": "unusual-norm"}),
}


@pytest.mark.parametrize("case", BAD)
def test_each_kind_of_bad_fine_tune_is_known(case: str, tmp_path: Path) -> None:
    """Eight good ones pass, and so does another good one; each bad one is flagged, for its own reason."""
    spoil, expected = BAD[case]
    watch = toy(tmp_path)
    assert flags(watch.take(spoil(watch.base, good(watch.base, 3)))) == expected


def test_the_sum_is_looked_at_too(tmp_path: Path) -> None:
    """What repeats or undoes the merge as a whole is like no single fine-tune, and is known by the sum."""
    watch = toy(tmp_path)
    total = {n: sum(good(watch.base, s)[n] - v for s in range(GOOD)) for n, v in watch.base.items()}
    limits = Screens(norm={"action": "off"})  # type: ignore[arg-type]
    for factor, reason in ((0.3, "near-duplicate"), (-0.6, "opposed")):
        mixed = {n: v + factor * total[n] if v.is_floating_point() else v for n, v in watch.base.items()}
        found = watch.take(mixed, limits)
        assert flags(found)["cosine"] == reason, found


def test_seven_are_too_few_to_compare_with(tmp_path: Path) -> None:
    """Before eight are folded, lengths and cosines are not judged, and the figure says how many there are."""
    watch = toy(tmp_path, GOOD - 1)
    found = watch.take(against(watch.base, good(watch.base, 3), -10.0))
    assert flags(found) == {}
    for name in ("norm", "cosine", "nearest"):
        assert (found[name].value, found[name].verdict) == (None, "unjudged")
        assert found[name].note == "7 of 8 fine-tunes are folded"


@pytest.mark.parametrize("method", ["ties", "opcm", "magmax"])
def test_a_figure_that_a_method_cannot_give_says_so(method: str, tmp_path: Path) -> None:
    """Without a sum there is no cosine to it, without spectra no share; samples are compared all the same."""
    watch = toy(tmp_path, method=method)
    found = watch.take(noisy(watch.base, good(watch.base, 3)))
    assert found["nearest"].reason == "near-duplicate"
    assert (found["cosine"].value is None) == (method != "opcm")
    assert (found["spectrum"].value is None) == (method != "opcm")
    assert all(figure.note for figure in found.values())


def test_figures_are_the_same_bits_each_time(tmp_path: Path) -> None:
    """Folded twice, in panels or whole, by one thread: equal figures and equal samples."""
    once, again = (toy(tmp_path / name) for name in "ab")
    assert once.samples == again.samples
    last = good(once.base, 77)
    assert once.take(last) == again.take(last)


# -------------------------------------------------------------------------------------------------- samples


def test_samples_tell_how_alike_two_deltas_are() -> None:
    """Cosines by samples are near those of the whole; of too few changed elements nothing is said."""
    random = torch.Generator().manual_seed(0)
    shapes = [(256, 300), (512, 200), (1000,)]
    one = [torch.randn(s, generator=random) for s in shapes]
    other = [0.6 * a + 0.8 * torch.randn(a.shape, generator=random) for a in one]

    def sample(deltas: list[Tensor]) -> bytes:
        parts = [(d, samples.places(d.numel(), len(deltas))) for d in deltas]
        return samples.packed([samples.taken(d, 0, d.numel(), at, d.numel()) for d, at in parts])

    packs = [sample(one), sample(other), sample([-a for a in one])]
    assert all(len(pack) <= 2 * samples.ELEMENTS for pack in packs)
    assert samples.cosines(packs[0], packs) == pytest.approx([1.0, 0.6, -1.0], abs=0.06)
    few = [torch.zeros_like(a) for a in one]
    few[2][:20] = 1.0
    assert samples.cosines(sample(few), [sample(few)]) == [0.0]


def test_a_sample_is_the_same_in_panels_and_of_factors() -> None:
    """How a weight comes, whole, cut or as two factors, does not change what is taken of it."""
    random = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(64, 4, generator=random), torch.randn(4, 96, generator=random))
    whole, elements = dense(factors), 64 * 96
    chosen = samples.places(elements, 5)
    assert 0.9 * samples.ELEMENTS / 5 < len(chosen) <= samples.ELEMENTS // 5
    taken = samples.taken(whole, 0, elements, chosen, elements)
    cut = [samples.taken(whole.reshape(-1)[a : a + 1024], a, a + 1024, chosen, elements)
           for a in range(0, elements, 1024)]  # fmt: skip
    assert torch.equal(torch.cat(cut), taken)
    assert torch.allclose(samples.taken(factors, 0, elements, chosen, elements), taken, atol=1e-5)


# ---------------------------------------------------------------------------------------- in store and shell


def test_a_ledger_of_an_earlier_release_gets_its_figures(tmp_path: Path) -> None:
    """An older ledger that is only read has no figures, nor what came later; the writer makes room."""
    path = tmp_path / "ledger.db"
    old = sqlite3.connect(path)
    old.executescript(f"{M001_FIRST} {M002_MARKS} pragma user_version = 2;")
    old.close()
    reader = Ledger(path, read_only=True)
    assert reader.figures() == {}
    assert (reader.served("server"), reader.measured(0)) == (None, {})
    reader.close()
    writer = Ledger(path)
    writer.announce("team", "one", "r1", state="pending")
    assert writer.fine_tunes()[0]["overruled"] == ""
    kept = {"norm": {"value": 1.5, "threshold": 10.0, "verdict": "passed", "note": ""}}
    with writer.transaction():
        for number in range(300):
            writer.keep_figures(f"{number:03d}", kept, bytes(4))
    assert writer.figures()["007"] == kept
    assert writer.values_of("007") == {"norm": 1.5}
    assert writer.values_of("another") == {}
    assert writer.samples(["299", "another", "007"]) == [("299", bytes(4)), ("007", bytes(4))]
    writer.close()


def rows_of(site: Site) -> dict[str, dict[str, Any]]:
    """What `fine-tunes --json` prints, by name; of a changed one the newer revision."""
    ledger = Ledger(site.store / "ledger.db", read_only=True)
    rows = reports.fine_tunes(ledger)
    ledger.close()
    return newest(rows)


def test_a_quarantined_fine_tune_waits_for_a_person_and_is_let_in(tmp_path: Path) -> None:
    """Set aside with its figures; approved it goes in, and that a person overruled the screen is kept."""
    site = Site(tmp_path, base=locks.make_base())
    models.save(site.root / "base", site.base, config=locks.CONFIG)
    for seed in range(2):
        models.save(site.inflow / f"good-{seed}", locks.tuned(site.base, seed), config=locks.CONFIG)
    turned = locks.turned(locks.tuned(site.base, 9), [locks.layer(0)], locks.permutation())
    models.save(site.inflow / "permuted", turned, config=locks.CONFIG)
    wild = locks.turned(locks.tuned(site.base, 9), [locks.layer(0)], lambda n: 9 * locks.lock()(n))
    models.save(site.inflow / "locked", wild, config=locks.CONFIG)
    log = site.once().stderr
    rows = rows_of(site)
    assert {name: row["state"] for name, row in rows.items()} == {
        "good-0": "folded", "good-1": "folded", "permuted": "quarantined", "locked": "quarantined",
    }  # fmt: skip
    for name in ("permuted", "locked"):
        assert rows[name]["reason"] == "attention-gauge-transformed"
        assert rows[name]["figures"]["gauge"]["verdict"] == "quarantined"
    assert rows["locked"]["figures"]["identity"]["note"].endswith("beyond 0.6")
    assert rows["good-1"]["figures"]["gauge"]["verdict"] == "passed"
    logged = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    refused = [line for line in logged if line["event"] == "finetune.refused"]
    assert {line["name"] for line in refused} == {"permuted", "locked"}
    assert all(line["figures"]["gauge"] > 1 for line in refused)

    ledger = Ledger(site.store / "ledger.db")
    for name in ("permuted", "locked"):
        ledger.ask("approve", {"name": name})
    ledger.close()
    log = site.once().stderr
    assert site.served == ["good-0", "good-1", "permuted"]
    shown = rows_of(site)["permuted"]
    assert shown["overruled"] == ["attention-gauge-transformed", "not-this-base"]
    assert shown["figures"]["gauge"]["verdict"] == "overruled"
    assert "finetune.flagged" in log
    locked = rows_of(site)["locked"]
    assert (locked["state"], locked["reason"]) == ("refused", "implausible"), "the absolute screen stays"
    told = site.run("fine-tunes", "show", "permuted").stdout
    assert "overruled" in told
    assert "gauge" in told


def test_the_relative_screens_of_a_daemon_compare_with_head(tmp_path: Path) -> None:
    """A duplicate with noise is set aside and says of whom; a new revision may be like its old one."""
    lax = {"min_folds": 2}
    screens = {"cosine": lax, "norm": lax}
    site = Site(tmp_path, screens=screens, on_update="add", archive="keep")
    first = {n: good(dict(site.base), n) for n in range(3)}
    for seed, tensors in first.items():
        models.save(site.inflow / f"a-{seed}", tensors)
    site.once()
    models.save(site.inflow / "again", noisy(dict(site.base), first[1]))
    models.save(site.inflow / "long", against(dict(site.base), good(dict(site.base), 8), 9.0))
    (site.inflow / "a-2").rename(tmp_path / "a-2")
    models.save(tmp_path / "changed", noisy(dict(site.base), first[2]))
    (tmp_path / "changed").rename(site.inflow / "a-2")
    site.once()
    rows = rows_of(site)
    assert (rows["again"]["state"], rows["again"]["reason"]) == ("quarantined", "near-duplicate")
    assert "team:a-1" in rows["again"]["detail"]
    assert (rows["long"]["state"], rows["long"]["reason"]) == ("quarantined", "unusual-norm")
    assert rows["a-2"]["state"] == "folded"
    site.run("rebuild", "--method", "average", "--store", str(tmp_path / "renewed"))
    assert json.loads((tmp_path / "renewed/current/manifest.json").read_text())["totals"]["count"] == 4


def test_merge_only_warns(tmp_path: Path) -> None:
    """Offline, figures that speak against a fine-tune are said, and it is merged."""
    base = models.make_base(tmp_path / "base")
    paths = []
    for seed in range(GOOD):
        paths.append(tmp_path / f"ft{seed}")
        models.save(paths[-1], good(base, seed))
    models.save(tmp_path / "again", noisy(base, good(base, 3)))
    said: list[str] = []
    manifest = merge(tmp_path / "out", tmp_path / "base", [*paths, tmp_path / "again"], warn=said.append)
    assert len(manifest["fine_tunes"]) == GOOD + 1
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'again'}: cosine 0.99")
    assert said[0].endswith("to ft3, by samples (near-duplicate)")
