"""What damage does to the service: in head it stops everything, elsewhere it is marked and gone around."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from shops import NAMES, Shop

from streammerge import verify
from streammerge.config.gates import CommandGate
from streammerge.errors import Damaged, StreammergeError, TryAgain
from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """By a method that replays: versions 0 to 3, and one more fine-tune that waits at the source."""
    shop = Shop(tmp_path_factory.mktemp("made") / "shop", "opcm", keep=9, archive="keep")
    shop.publish(NAMES[:3])
    return shop


@pytest.fixture
def shop(made: Shop, tmp_path: Path) -> Shop:
    """A copy of that store and its source, for one test."""
    shutil.copytree(made.root, tmp_path / "shop", symlinks=True)
    return made.moved(tmp_path / "shop")


def folder(shop: Shop, version: int) -> Path:
    """One version's folder, writable."""
    found = next((shop.config.store / "snapshots").glob(f"{version:06d}-*"))
    for path in (found, *found.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    return found


def flip(path: Path) -> None:
    """Change the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


HARMS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bit in the state": ("state/sum-00001.safetensors", flip),
    "bit in the statistics": ("state/statistics.safetensors", flip),
    "bit in the model": ("model/model.safetensors", flip),
    "bit in the manifest": ("manifest.json", flip),
    "manifest gone": ("manifest.json", lambda path: path.unlink()),
    "state gone": ("state/sum-00001.safetensors", lambda path: path.unlink()),
    "one too many": ("state/more.safetensors", lambda path: path.write_text("more")),
}


SOME = ("bit in the state", "bit in the manifest", "one too many")
EACH = [harm if harm in SOME else pytest.param(harm, marks=pytest.mark.slow) for harm in HARMS]


@pytest.mark.parametrize("harm", EACH)
def test_damage_in_head_stops_everything_before_the_first_fold(harm: str, shop: Shop) -> None:
    """Work ends with the path of what is damaged; nothing is folded, changed or removed; so do commands."""
    name, do = HARMS[harm]
    do(folder(shop, 3) / name)
    damaged = str(folder(shop, 3) / name)
    before = {path: path.stat().st_mtime_ns for path in (shop.config.store / "snapshots").rglob("*")}
    with pytest.raises(Damaged) as stopped:
        shop.publish(NAMES[3:])
    assert damaged in stopped.value.message
    assert (stopped.value.exit_code, bool(stopped.value.hint)) == (3, True)
    assert {p: p.stat().st_mtime_ns for p in (shop.config.store / "snapshots").rglob("*")} == before
    assert not list((shop.config.store / "candidates").iterdir())
    assert [damaged in found.what for found in verify.verify(shop.config) if found.is_damage] == [True]


@pytest.mark.parametrize("harm", EACH)
def test_damage_in_an_older_version_is_gone_around(harm: str, shop: Shop) -> None:
    """The next fine-tune is folded, a retraction begins elsewhere, and the version is offered to nobody."""
    name, do = HARMS[harm]
    do(folder(shop, 1) / name)
    damaged = str(folder(shop, 1) / name)
    shop.publish(NAMES[3:])
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == list(NAMES)
    if "bit" not in harm or "manifest" in harm:  # what a look at names and sizes finds is marked at once
        ledger = Ledger(shop.config.store / "ledger.db")
        assert damaged in ledger.fact("damaged")["1"]
        ledger.close()
        with pytest.raises(StreammergeError, match="version 1 is damaged") as refused:
            shop.do("rollback", version=1)
        assert refused.value.exit_code == 1
    if harm in ("bit in the state", "bit in the statistics"):  # the replay comes upon it: it is marked
        with pytest.raises(StreammergeError, match="to begin from, is damaged") as refused:
            shop.do("retract", name="bee")
        assert refused.value.exit_code == 75
        assert damaged in refused.value.message
    shop.do("retract", name="bee")
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == ["ant", "cat", "dog"]
    with_head = [found.what for found in verify.verify(shop.config) if found.is_damage]
    assert [damaged in what for what in with_head] == [True]


def test_a_rollback_to_a_damaged_parent_is_refused_and_nothing_stops(shop: Shop) -> None:
    """Damaged while the daemon ran: the command fails with 1, not the store with 3."""
    (folder(shop, 2) / "model" / "config.json").unlink()
    with pytest.raises(StreammergeError, match="version 2 is damaged") as refused:
        shop.do("rollback")
    assert refused.value.exit_code == 1
    assert shop.manifest["version"] == 3


@pytest.mark.parametrize("name", ["manifest.json", "state/sum-00001.safetensors"])
def test_a_damaged_candidate_is_made_again(name: str, shop: Shop) -> None:
    """It was never official: it goes, and its fine-tune is folded once more, under another number."""
    shop.configure(gates=(gate(shop.root, "exit 75"),))
    with pytest.raises(TryAgain):
        shop.publish(NAMES[3:])
    [sealed] = (shop.config.store / "candidates").iterdir()
    (sealed / name).chmod(0o644)
    flip(sealed / name)
    shop.configure(gates=())
    shop.soon()
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == list(NAMES)
    assert shop.manifest["version"] == 5
    assert verify.verify(shop.config) == []


def gate(root: Path, line: str) -> CommandGate:
    """A gate that does one thing."""
    script = root / "gate.sh"
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    return CommandGate(type="command", name="gate", argv=(str(script),))


def test_a_damaged_ledger_is_damage(shop: Shop) -> None:
    """Pages that SQLite cannot read end the work with exit 3, not with a bug."""
    path = shop.config.store / "ledger.db"
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(byte ^ 0x55 for byte in content[4096:])
    path.write_bytes(content)
    with pytest.raises(Damaged):
        shop.work()
