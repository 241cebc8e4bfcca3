"""Taking one fine-tune out again, under every method: what is left is as if it had never come."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import models
import pytest
import torch
from daemons import Site, until
from faults.retracts import TOLERANCE, distance, retracted, tolerance
from rich.console import Console
from shops import NAMES, Shop

from streammerge import methods, once, rebuild
from streammerge.errors import StreammergeError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("method", "name"),
    [*((method, "bee") for method in methods.NAMES), ("opcm", "ant"), ("opcm", "dog"), ("average", "ant")],
)
def test_retracted_equals_never_folded(method: str, name: str, tmp_path: Path) -> None:
    """The model is what the others alone give; bit for bit where it is replayed."""
    shop, never, far = retracted(tmp_path, method, name)
    assert far <= tolerance(method)
    for key in ("count", "mean_delta_norm", "max_delta_norm", "state_norm"):
        assert shop.manifest["totals"][key] == pytest.approx(never.manifest["totals"][key], rel=1e-5), key
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == [n for n in NAMES if n != name]
    once.run_once(shop.config)  # its source still shows it: it stays out
    assert name not in [entry["name"] for entry in shop.manifest["fine_tunes"]]


@pytest.mark.parametrize("method", ["opcm", "average"])
def test_a_changed_revision_takes_the_place_of_the_old_one(method: str, tmp_path: Path) -> None:
    """`replace` takes the old revision out and folds the new one at the end, in one version."""
    shop, never = Shop(tmp_path / "shop", method), Shop(tmp_path / "never", method)
    shop.publish(["ant", "bee", "cat"])
    versions = shop.manifest["version"]
    shutil.rmtree(shop.root / "fine-tunes" / "ant")
    models.make_fine_tune(shop.root / "fine-tunes" / "ant", shop.base, seed=99)
    once.run_once(shop.config)
    assert shop.manifest["version"] == versions + 1
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == ["bee", "cat", "ant"]
    never.publish(["bee", "cat"])
    models.make_fine_tune(never.root / "fine-tunes" / "ant", never.base, seed=99)
    once.run_once(never.config)
    assert distance(shop.model, never.model, shop.base) <= (0 if method == "opcm" else TOLERANCE)


def test_what_a_replay_lacks_is_found_before_anything_changes(tmp_path: Path) -> None:
    """A later fine-tune's files are gone everywhere: it is named, and nothing is different."""
    shop = Shop(tmp_path / "shop", "opcm", archive="drop")
    shop.publish(NAMES)
    before = sorted(path.name for path in (shop.root / "store" / "snapshots").iterdir())
    shutil.rmtree(shop.root / "fine-tunes" / "cat")
    with pytest.raises(StreammergeError, match=r"cat \(it is no longer in source team") as refused:
        shop.do("retract", name="ant")
    assert refused.value.hint
    assert sorted(path.name for path in (shop.root / "store" / "snapshots").iterdir()) == before
    assert not list((shop.root / "store" / "candidates").iterdir())
    models.make_fine_tune(shop.root / "fine-tunes" / "cat", shop.base, seed=12)  # it is published again
    assert shop.do("retract", name="ant")["version"] == 5


def test_a_replay_of_too_many_is_refused(tmp_path: Path) -> None:
    """`replay_limit` bounds what may be folded again."""
    shop = Shop(tmp_path / "shop", "opcm", replay_limit=2, keep=9)
    shop.publish(NAMES)
    with pytest.raises(StreammergeError, match="3 fine-tunes folded again, and replay_limit is 2"):
        shop.do("retract", name="ant")
    assert shop.do("retract", name="bee")["state"] == "retracted"


def test_the_last_one_goes_without_reading_any(tmp_path: Path) -> None:
    """The state before it is on disk: no fine-tune's files are needed."""
    shop = Shop(tmp_path / "shop", "opcm", archive="drop")
    shop.publish(["ant", "bee"])
    for name in ("ant", "bee"):
        shutil.rmtree(shop.root / "fine-tunes" / name)
    expected = models.load(
        next((shop.root / "store" / "snapshots").glob("000001-*")) / "model" / "model.safetensors"
    )
    shop.do("retract", name="bee")
    assert all(torch.equal(values, expected[n]) for n, values in shop.model.items())


def test_the_only_one_leaves_the_base(tmp_path: Path) -> None:
    """What is served then is the base itself, and what comes next folds as the first."""
    for method in ("opcm", "average"):
        shop = Shop(tmp_path / method, method)
        shop.publish(["ant"])
        shop.do("retract", name="ant")
        assert all(torch.equal(values, shop.base[n]) for n, values in shop.model.items())
        assert shop.manifest["totals"]["count"] == 0
        shop.publish(["bee"])
        assert shop.manifest["totals"]["count"] == 1


def test_a_gate_that_refuses_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """`max_drop` only warns; a limit that does not hold without the fine-tune refuses, exit 1, no change."""
    site = Site(tmp_path / "site", source={"settle": "0s"}, archive="keep")
    script = tmp_path / "count.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "found = json.loads(pathlib.Path(sys.argv[1], 'manifest.json').read_text())\n"
        "print(json.dumps({'count': len(found['fine_tunes'])}))\n"
    )
    for name in ("ant", "bee"):
        site.publish(name, 1 + ("ant", "bee").index(name))
    site.once()
    gate = {"name": "size", "type": "command", "argv": [sys.executable, str(script), "{snapshot}"]}
    site.configure(gates=[{**gate, "limits": {"count": {"min": 2}}}])
    refused = site.run("retract", "ant", "--yes", code=1)
    assert "is refused" in refused.stderr
    assert site.served == ["ant", "bee"]
    assert site.states() == {"ant": "folded", "bee": "folded"}
    site.configure(gates=[{**gate, "limits": {"count": {"max_drop": 0}}}])
    assert "is taken out in version" in site.run("retract", "ant", "--yes").stdout
    assert site.served == ["bee"]
    assert site.states() == {"ant": "retracted", "bee": "folded"}


def test_the_daemon_retracts_during_a_hold_and_keeps_it(tmp_path: Path) -> None:
    """A hold stops folding, not taking out; a copy under another name stays out, until it is approved."""
    site = Site(tmp_path / "site", source={"settle": "100ms"}, archive="keep")
    with site.daemon() as daemon:
        for number, name in enumerate(("ant", "bee"), 1):
            site.publish(name, number)
            daemon.until_state({name: "folded"})
        site.run("hold")
        found = site.ask("retract", "ant", "--yes")
        assert (found["name"], found["state"]) == ("ant", "retracted")
        assert site.served == ["bee"]
        assert site.ask("status")["held"]
        site.run("resume")
        site.publish("copy", 1)
        daemon.until_state(copy="denied")
        site.run("fine-tunes", "approve", "ant")
        daemon.until_state(ant="folded")
        until(lambda: site.served == ["bee", "ant"], "approved")
    history = site.ask("history")
    assert [row["removed"] for row in history if row["removed"]] == [["ant"]]


def test_rebuild_makes_a_new_store_by_another_method(tmp_path: Path) -> None:
    """The same fine-tunes in the same order give what a store made by that method would hold; exact."""
    shop, other = Shop(tmp_path / "shop", "opcm"), Shop(tmp_path / "other", "ties")
    shop.publish(NAMES)
    other.publish(NAMES)
    shop.do("retract", name="bee")
    made = rebuild.rebuild(shop.config, "ties", {}, tmp_path / "new", Console(quiet=True))
    assert (made["count"], made["method"]) == (3, "ties")
    renewed = shop.config.model_copy(update={"method": "ties", "knobs": {}, "store": tmp_path / "new"})
    once.run_once(renewed)
    other.do("retract", name="bee")
    served = models.load(tmp_path / "new" / "current" / "model" / "model.safetensors")
    assert distance(served, other.model, shop.base) <= TOLERANCE
    manifest = json.loads((tmp_path / "new" / "current" / "manifest.json").read_bytes())
    assert [entry["name"] for entry in manifest["fine_tunes"]] == ["ant", "cat", "dog"]
