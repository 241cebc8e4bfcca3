"""People's commands without a daemon: done without torch, and what may wait for the next fold does wait."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from daemons import REPOSITORY, Site, environment
from shops import NAMES, Shop

from streammerge import files, obeying, operations
from streammerge.config import Route
from streammerge.errors import ConfigError, Damaged
from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

TRAP = "raise AssertionError('torch was imported')\n"
TYPE = """
import json, sys, streammerge.cli
for words in json.loads(sys.argv[1]):
    streammerge.cli.app(words, standalone_mode=False)
"""
HEADER = (2).to_bytes(8, "little") + b"[]"  # of a file that is refused at a look, once it has settled


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Versions 0 to 2, with two fine-tunes folded."""
    shop = Shop(tmp_path_factory.mktemp("made") / "shop", "task_arithmetic")
    shop.publish(NAMES[:2])
    return shop


@pytest.fixture
def shop(made: Shop, tmp_path: Path) -> Shop:
    """A copy of that store, for one test."""
    shutil.copytree(made.root, tmp_path / "shop", symlinks=True)
    return made.moved(tmp_path / "shop")


def served(shop: Shop) -> list[str]:
    """Names of what is served, in folding order."""
    return [entry["name"] for entry in shop.manifest["fine_tunes"]]


def held(shop: Shop) -> str:
    """Why the store is held, "" if it is not."""
    ledger = Ledger(shop.config.store / "ledger.db")
    hold = ledger.fact("hold")
    ledger.close()
    return str(hold["why"]) if hold else ""


def commands(site: Site) -> list[tuple[str, str]]:
    """Verb and state of all that was asked for."""
    ledger = Ledger(site.store / "ledger.db", read_only=True)
    found = ledger.tuples("select verb, state from commands")
    ledger.close()
    return found


def rewrite(shop: Shop, **settings: object) -> None:
    """Change keys of store.json; None takes one away."""
    path = shop.config.store / "store.json"
    known = json.loads(path.read_bytes()) | settings
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))


def test_what_folds_nothing_is_done_without_torch(tmp_path: Path) -> None:
    """The other verbs, in processes that fail if they import torch, as a retract does; a target is told."""
    site = Site(tmp_path / "site", targets=[{"name": "server", "type": "exec", "argv": ["./tell"]}])
    site.program("tell", 'echo "$STREAMMERGE_VERSION" >> "$(dirname "$0")/told"')
    for number, name in enumerate("ab", 1):
        site.publish(name, number)
    (site.publish("bad", 3), (site.inflow / "bad" / "model.safetensors").write_bytes(HEADER))
    site.once()
    site.configure(keep=1, grace="0s")
    (tmp_path / "torch.py").write_text(TRAP)
    env = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    assert site.ask("rollback", "--yes", env=env)["denied"] == ["b"]
    assert site.served == ["a"]
    assert (site.root / "told").read_text().split() == ["0", "1", "2", "1"]
    decided = [["fine-tunes", *words.split()] for words in ("approve b", "reject b", "retry bad")]
    typed = [[*words, "-c", str(site.config)] for words in (*decided, ["resume"], ["hold"], ["gc"])]
    subprocess.run([sys.executable, "-c", TYPE, json.dumps(typed)], env=environment(env), check=True)
    assert {verb for verb, state in commands(site) if state == "done"} == set(operations.VERBS)
    assert site.versions() == [1, 2]
    with pytest.raises(AssertionError, match="torch was imported"):
        site.run("retract", "a", "--yes", env=env)


def test_a_rollback_asks_nothing_of_the_base(shop: Shop) -> None:
    """Where the base cannot be read one rolls back all the same; nothing is folded until it is there."""
    (shop.root / "base").rename(shop.root / "away")
    assert shop.do("rollback")["version"] == 1
    assert served(shop) == ["ant"]
    with pytest.raises(ConfigError, match=r"base .* cannot be read"):
        shop.work()


def test_a_retract_that_waits_does_not_hold_up_a_rollback(shop: Shop) -> None:
    """It is left to whoever folds next, and done then."""
    ledger = Ledger(shop.config.store / "ledger.db")
    number = ledger.ask("retract", {"name": "ant"})
    assert shop.do("rollback", version=1)["denied"] == ["bee"]
    assert [row["id"] for row in ledger.asked()] == [number]
    shop.work()
    assert ledger.asked() == []
    ledger.close()
    assert served(shop) == []


def test_a_current_moved_by_hand_is_adopted_before_a_command(shop: Shop) -> None:
    """A `resume` lifts the hold that comes with it, so that the next start neither adopts nor holds."""
    link = shop.config.store / "current"
    link.unlink()
    link.symlink_to(next((shop.config.store / "snapshots").glob("000001-*")).relative_to(shop.config.store))
    assert "by hand to version 1" in shop.do("resume")["was"]
    shop.work()
    assert (held(shop), served(shop)) == ("", ["ant"])


def test_damage_stops_every_command_but_a_rollback_off_it(shop: Shop) -> None:
    """A head that is not whole: nothing is decided or collected upon it, and one may go back."""
    weights = shop.config.store / "current" / "model" / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-4])
    for verb in ("hold", "resume", "gc"):
        with pytest.raises(Damaged):
            shop.do(verb)
    assert shop.do("rollback")["version"] == 1


def test_a_store_is_not_obeyed_as_another(shop: Shop) -> None:
    """A configuration that means another store is refused as at any start; the same said otherwise is not."""
    kept = shop.config
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"method": "average"}, "method is 'average', but the store"),
        ({"knobs": {"alpha": 0.3}}, "method task_arithmetic has no such knob"),
        ({"knobs": {"scale": 0.7}}, "knobs is {'scale': 0.7}"),
        ({"added": ("*",)}, r"added is \['\*'\]"),
        ({"routes": (Route(weights="*", share=0.5),)}, "routes is"),
    )
    for keys, message in wrong:
        shop.config = kept.model_copy(update=keys)
        with pytest.raises(ConfigError, match=message):
            shop.do("hold")
    assert held(shop) == ""
    shop.config = kept.model_copy(update={"knobs": {"scale": str(shop.manifest["knobs"]["scale"])}})
    assert shop.do("hold")["held"]


@pytest.mark.parametrize("rereads", [True, None])
def test_gc_takes_nothing_that_a_method_reads_again(rereads: bool | None, tmp_path: Path) -> None:
    """Where `archive` would let go of it that is refused, by what store.json says, and by the method else."""
    shop = Shop(tmp_path / "shop", "pcb")
    shop.publish(NAMES[:1])
    rewrite(shop, rereads=rereads)
    shop.configure(archive="drop")
    with pytest.raises(ConfigError, match="archive: keep"):
        shop.do("gc")
    assert list((shop.config.store / "inbox").iterdir())


def test_a_store_without_a_version_is_made_whole_first(shop: Shop) -> None:
    """As a kill leaves it right after the ledger was made: the next command makes version 0 first."""
    store = shop.config.store
    for path in [*(store / "snapshots").iterdir(), *(store / "inbox").iterdir()]:
        files.remove_tree(path)
    for path in (store / "current", *store.glob("ledger.db*")):
        path.unlink()
    assert shop.do("hold", why="so")["held"] == "so"
    assert (held(shop), served(shop)) == ("so", [])


def test_an_answer_stands(shop: Shop) -> None:
    """What fails after a command was answered does not make it one that failed."""
    ledger = Ledger(shop.config.store / "ledger.db")
    number = ledger.ask("hold", {})
    obeying.obey(shop.config, "hold")
    ledger.answer(number, "failed", {})
    assert ledger.row("select state from commands where id = ?", number) == {"state": "done"}
    ledger.close()


def test_what_an_earlier_command_took_out_does_not_stay_in_the_inbox(shop: Shop) -> None:
    """A command without a daemon removes, as a start does, what was fetched and no journey needs."""
    inbox = shop.config.store / "inbox"
    kept = {path.name for path in inbox.iterdir()}
    assert len(kept) == 2
    shop.do("rollback", version=1)
    shop.do("hold")
    assert {path.name for path in inbox.iterdir()} < kept
