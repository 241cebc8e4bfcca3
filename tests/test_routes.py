"""What a person says beside the method: routes, weights, finalize; through files, as they are served."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from benches import bench_of, fine_tunes, merge
from daemons import Site, command
from models import PROJECTED, SQUARE, WIDE
from safetensors.torch import save_file

from streammerge import linalg
from streammerge.config import Route
from streammerge.config.finalize import Cap, Lines
from streammerge.errors import ConfigError
from streammerge.finalize import Finalize
from streammerge.state import read_statistics

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SUM = {"method": "task_arithmetic", "knobs": {"scale": 1.0}}


def merged(root: Path, paths: list[Path], **options: Any) -> dict[str, Tensor]:
    """Merge and give what is served."""
    merge(root / "out", root / "base", paths, **options)
    return models.load(root / "out" / "model" / "model.safetensors")


def test_a_route_leaves_out_and_the_first_match_holds(tmp_path: Path) -> None:
    """Share 0 leaves a weight as the base has it; another share multiplies; later routes do not count."""
    base = models.make_base(tmp_path / "base")
    one, *_ = fine_tunes(tmp_path, base)
    routes = (Route(weights=SQUARE, share=0), Route(weights=WIDE, share=0.5), Route(weights="*", share=1))
    got, tuned = merged(tmp_path, [one], routes=routes, **SUM), models.load(one)
    for name, values in got.items():
        share = {SQUARE: 0.0, WIDE: 0.5}.get(name, 1.0)
        if not values.is_floating_point():
            continue
        expected = base[name].double() + share * (tuned[name].double() - base[name].double())
        assert torch.allclose(values.double(), expected, atol=1e-6), name
    assert torch.equal(got[SQUARE], base[SQUARE])


def test_layers_are_swapped_by_routes(tmp_path: Path) -> None:
    """Each weight from one of two fine-tunes, as docs/methods.md has it: the others' deltas are left out."""
    base = models.make_base(tmp_path / "base")
    one, two, _ = fine_tunes(tmp_path, base)
    routes = (
        Route(weights=SQUARE, share=1, source=one.name),
        Route(weights=SQUARE, share=0),
        Route(weights="*", share=0, source=one.name),
    )
    got = merged(tmp_path, [one, two], routes=routes, **SUM)
    for name, values in got.items():
        if values.is_floating_point():
            expected = models.load(one if name == SQUARE else two)[name]
            assert torch.allclose(values, expected.to(values.dtype), atol=1e-6), name


def test_routes_of_a_source_hold_in_a_store_for_its_life(tmp_path: Path) -> None:
    """A route of one source leaves others alone, is in store.json and the manifest, and cannot change."""
    site = Site(
        tmp_path / "site", source={"settle": "0s"}, routes=[{"weights": SQUARE, "share": 0, "source": "team"}]
    )
    site.publish("first", 1)
    site.once()
    served = models.load(site.store / "current" / "model" / "model.safetensors")
    assert torch.equal(served[SQUARE], site.base[SQUARE])
    assert not torch.equal(served[WIDE], site.base[WIDE])
    manifest = json.loads((site.store / "current" / "manifest.json").read_bytes())
    assert manifest["routes"] == [{"weights": SQUARE, "share": 0.0, "source": "team"}]
    site.configure(routes=[])
    assert "streammerge rebuild" in site.run("run", "--once", code=2).stderr
    site.configure(routes=[{"weights": "*nothing*", "share": 0, "source": "nobody"}])
    warned = site.ask("config", "check")["warnings"]
    assert any("matches no weight" in text for text in warned)
    assert any("there is no source nobody" in text for text in warned)


def test_the_command_line_says_it_too(tmp_path: Path) -> None:
    """--weight, --route and --finalize mean what the configuration means; mistakes exit 2 with a hint."""
    base = models.make_base(tmp_path / "base")
    paths = fine_tunes(tmp_path, base, count=2)
    common: list[str | Path] = ["merge", "--base", tmp_path / "base", *paths, "--method", "task_arithmetic"]
    out = tmp_path / "merged"
    command(
        *common, "--out", out, "--weight", "1", "--weight", "-0.5", "--route", f"{SQUARE}=0",
        "--finalize", "lines.alpha=0.5", "--finalize", "lines.beta=0.25", "--set", "scale=1",
    )  # fmt: skip
    served = models.load(out / "model" / "model.safetensors")
    assert torch.equal(served[SQUARE], base[SQUARE])
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert [entry["weight"] for entry in manifest["fine_tunes"]] == [1.0, -0.5]
    assert (manifest["finalize"]["lines"]["alpha"], manifest["finalize"]["lines"]["beta"]) == (0.5, 0.25)
    for wrong, word in (
        (["--weight", "1", "--weight", "2", "--weight", "3"], "--weight is given 3 times"),
        (["--weight", "0"], "other than 0"),
        (["--route", "lm_head"], "--route lm_head"),
        (["--finalize", "cap.lvl=fixed"], "cap.lvl"),
    ):
        failed = command(*common, "--out", tmp_path / "none", *wrong, code=2)
        assert word in failed.stderr
        assert "hint: " in failed.stderr


def test_a_cap_takes_the_place_of_opcms_length(tmp_path: Path) -> None:
    """finalize.cap bounds the spectrum of the unscaled sum; what is not projected keeps its length."""
    base = models.make_base(tmp_path / "base", dtype=torch.float32)
    run = bench_of(tmp_path / "run", tmp_path / "base", method="opcm")
    for path in fine_tunes(tmp_path, base):
        run.fold(path)
    figures = read_statistics(run.state, run.recipe.plan)
    sums = models.load(run.state.folder / "sum-00001.safetensors")
    got = models.load(run.render(finish=Finalize(cap=Cap(level="fixed"))) / "model.safetensors")
    for name, total in sums.items():
        expected = total / run.state.totals.lambda_
        if name in PROJECTED:
            expected = linalg.capped(total, figures[name], level="fixed", strength=1.0, kappa=0.6, beta=2.0)
        assert torch.allclose(got[name] - base[name], expected, atol=2e-6), name


def test_lines_without_a_plain_sum_need_a_number(tmp_path: Path) -> None:
    """`alpha: auto` is found by the sum of all deltas: a method without it is refused at once."""
    base = models.make_base(tmp_path / "base")
    paths = fine_tunes(tmp_path, base)
    with pytest.raises(ConfigError, match=r"alpha is auto") as refused:
        merged(tmp_path, paths, method="ties", finalize=Finalize(lines=Lines()))
    assert refused.value.hint
    site = Site(tmp_path / "site", method="opcm", finalize={"lines": {"beta": 1}})
    assert "alpha is auto" in site.run("run", "--once", code=2).stderr


def test_a_method_that_rereads_needs_the_archive(tmp_path: Path) -> None:
    """pcb and iso_cts read all fine-tunes for each version: without `archive: keep` nothing starts."""
    site = Site(tmp_path / "site", source={"settle": "0s"}, method="pcb")
    for words in (("config", "check"), ("run", "--once")):
        assert "archive: keep" in site.run(*words, code=2).stderr
    site.configure(archive="keep")
    for number, name in enumerate(("one", "two"), 1):
        site.publish(name, number)
    site.once()
    assert site.served == ["one", "two"]


def test_a_changed_sidecar_is_a_new_revision(tmp_path: Path) -> None:
    """Fisher information counts to what a fine-tune is, for the method that uses it, and for no other."""
    for method, folds in (("fisher", 2), ("average", 1)):
        site = Site(tmp_path / method, source={"settle": "0s"}, method=method)
        site.publish("model", 1)
        folder = site.inflow / "model"
        for strength in (1.0, 2.0):
            floats = {name: values for name, values in site.base.items() if values.is_floating_point()}
            ones = {name: torch.full_like(values, strength) for name, values in floats.items()}
            save_file(ones, folder / "fisher.safetensors")
            site.once()
        assert len(site.versions()) == 1 + folds, method
        assert site.served == ["model"]


def test_the_methods_are_listed() -> None:
    """`streammerge methods --json` has every method with what it needs and how one is taken out."""
    found = json.loads(command("methods", "--json").stdout)
    assert sum(entry["default"] for entry in found) == 1
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["spectral_cap"]["default"]
    assert by_name["opcm"]["removal"] == "replay"
    assert by_name["ties"]["removal"] == "subtract"
    assert by_name["fisher"]["data"] == "fisher.safetensors"
    assert "opcm" in command("methods").stdout
