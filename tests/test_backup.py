"""Backup and restore: always whole, never taken from what is damaged, and gone on from with nothing twice."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import pytest
from daemons import Site, until
from shops import NAMES, Shop

from streammerge import backup, configfile, snapshots, verify
from streammerge.errors import ConfigError, Damaged, NoSpace
from streammerge.snapshots import Store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A store with versions 0 to 3, of which two are beyond `keep`; beside it how it looks with one more."""
    shop = Shop(tmp_path_factory.mktemp("made") / "shop", "average", keep=2, archive="keep")
    shop.publish(NAMES[:3])
    shutil.copytree(shop.config.store, shop.root / "store-4", symlinks=True)
    shop.at(shop.root / "store-4").publish(NAMES[3:])
    return shop


@pytest.fixture
def shop(made: Shop, tmp_path: Path) -> Shop:
    """A copy of the store with three, for one test."""
    shutil.copytree(made.root / "store", tmp_path / "shop", symlinks=True)
    return made.at(tmp_path / "shop")


def one_more(made: Shop, place: Path) -> Shop:
    """A copy of the store with four."""
    shutil.copytree(made.root / "store-4", place, symlinks=True)
    return made.at(place)


def quiet(_name: str, _bytes: int) -> None:
    """Nobody watches."""


def save(shop: Shop, place: Path) -> dict[str, Any]:
    """Back a store up and check that the copy is a sound store itself."""
    made = backup.backup(shop.config, place, quiet)
    assert verify.verify(shop.at(place).config) == []
    return made


def flip(path: Path) -> None:
    """Change one bit of a sealed file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


def folders(place: Path) -> list[str]:
    """Names of the versions in a store."""
    return sorted(path.name for path in (place / "snapshots").iterdir())


def test_the_second_backup_copies_what_is_new(made: Shop, shop: Shop, tmp_path: Path) -> None:
    """The same twice copies nothing; one more fine-tune copies one version and removes what gc removed."""
    place = tmp_path / "backup"
    first = save(shop, place)
    assert (first["version"], first["versions"], first["damaged"]) == (3, 2, [])
    assert folders(place) == folders(shop.config.store)
    assert save(shop, place)["copied_bytes"] == 0
    later = one_more(made, tmp_path / "later")
    second = save(later, place)
    assert 0 < second["copied_bytes"] < first["copied_bytes"]
    assert folders(place) == folders(later.config.store)
    assert (place.stat().st_mode & 0o777, (place / "ledger.db").stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_restored_store_goes_on_with_nothing_twice(made: Shop, shop: Shop, tmp_path: Path) -> None:
    """What came after the backup is folded again, once; what waited then is not executed."""
    place = tmp_path / "backup"
    ledger = sqlite3.connect(shop.config.store / "ledger.db")
    with contextlib.closing(ledger):
        ledger.execute("insert into commands (verb, arguments, asked_at) values ('rollback', '{}', 0)")
        ledger.commit()
        save(shop, place)
    expected = one_more(made, tmp_path / "later").manifest["fine_tunes"]
    other = shop.at(tmp_path / "elsewhere" / "store")
    (tmp_path / "elsewhere").mkdir()
    restored = backup.restore(other.config, place, quiet)
    assert (restored["version"], restored["damaged"]) == (3, [])
    assert verify.verify(other.config) == []
    assert [entry["name"] for entry in other.manifest["fine_tunes"]] == list(NAMES[:3])
    other.work()
    assert other.manifest["fine_tunes"] == expected
    assert other.manifest["version"] == 4
    assert verify.verify(other.config) == []
    with pytest.raises(ConfigError, match="there is a store"):
        backup.restore(other.config, place, quiet)
    assert backup.backup(other.config, place, quiet)["version"] == 4  # it is the same store to its backup


def test_damage_does_not_reach_the_backup(shop: Shop, tmp_path: Path) -> None:
    """An older version: left out and said, or kept as it was. Head: refused; the copy of before stays."""
    place, fresh = tmp_path / "backup", tmp_path / "fresh"
    save(shop, place)
    old, head = folders(shop.config.store)
    flip(shop.config.store / "snapshots" / old / "model" / "config.json")
    assert save(shop, place)["damaged"] == []
    assert folders(place) == [old, head]
    assert ["config.json" in line for line in save(shop, fresh)["damaged"]] == [True]
    assert folders(fresh) == [head]
    flip(shop.config.store / "snapshots" / head / "state" / "sum-00001.safetensors")
    with pytest.raises(Damaged, match="sum-00001"):
        backup.backup(shop.config, tmp_path / "third", quiet)
    assert not Store(tmp_path / "third").exists
    save(shop, place)
    flip(place / "snapshots" / head / "model" / "config.json")
    with pytest.raises(Damaged):
        backup.backup(shop.config, place, quiet)
    other = shop.at(tmp_path / "store")
    with pytest.raises(Damaged, match=r"config\.json"):
        backup.restore(other.config, place, quiet)
    with pytest.raises(ConfigError, match="is being restored"):
        other.work()
    shutil.copy(shop.root / "base" / "config.json", place / "snapshots" / head / "model" / "config.json")
    backup.restore(other.config, place, quiet)
    assert verify.verify(other.config) == []


def test_what_goes_while_it_is_copied_is_left_out(shop: Shop, tmp_path: Path) -> None:
    """gc removes in any order: a version whose manifest goes while its files are copied is no bug."""
    old, head = folders(shop.config.store)
    manifest = shop.config.store / "snapshots" / old / "manifest.json"

    def collect(name: str, _bytes: int) -> None:
        if name.startswith(old):
            manifest.parent.chmod(0o755)
            manifest.unlink(missing_ok=True)

    made = backup.backup(shop.config, tmp_path / "backup", collect)
    assert [str(manifest) in line for line in made["damaged"]] == [True]
    assert folders(tmp_path / "backup") == [head]


def test_what_rotted_in_the_backup_is_copied_again(shop: Shop, tmp_path: Path) -> None:
    """Each run reads the copy back."""
    place = tmp_path / "backup"
    save(shop, place)
    flip(place / "snapshots" / folders(place)[0] / "model" / "config.json")
    kept = min((place / "inbox").iterdir()) / "model.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert save(shop, place)["copied_bytes"] > 0
    assert save(shop, place)["copied_bytes"] == 0


class Cut(BaseException):
    """As a kill would."""


class Moments:
    """Counts every change of a name on disk, and ends what is under way before the one it is told."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod")

    def __init__(self) -> None:
        """Off until it is told; there is no way to take an audit hook back."""
        self.seen, self.cut_at = 0, 0
        sys.addaudithook(self._note)

    def _note(self, event: str, _arguments: object) -> None:
        if self.cut_at and event in self.CHANGES:
            self.seen += 1
            if self.seen == self.cut_at:
                self.cut_at = 0
                raise Cut


moments = Moments()
LAST = 90  # a backup of one new version makes fewer changes than that


@pytest.mark.parametrize(
    "cut_at", [n if n % 30 == 26 else pytest.param(n, marks=pytest.mark.slow) for n in range(1, LAST)]
)
def test_cut_anywhere_the_backup_is_the_old_or_the_new_one(
    cut_at: int, made: Shop, shop: Shop, tmp_path: Path
) -> None:
    """Stopped before any change of a name, what lies there can be restored; run again, it is complete."""
    place = tmp_path / "backup"
    save(shop, place)
    later = one_more(made, tmp_path / "later")
    moments.seen, moments.cut_at = 0, cut_at
    with contextlib.suppress(Cut):
        backup.backup(later.config, place, quiet)
        assert moments.seen < LAST
    moments.cut_at = 0
    other = shop.at(tmp_path / "store")
    restored = backup.restore(other.config, place, quiet)
    assert (restored["version"] in (3, 4), restored["versions"], restored["damaged"]) == (True, 2, [])
    assert verify.verify(other.config) == []
    assert save(later, place)["version"] == 4
    assert folders(place) == folders(later.config.store)


def test_a_backup_goes_nowhere_it_should_not(shop: Shop, tmp_path: Path) -> None:
    """Not into the store, not over other things, not over another store's backup, not onto a full disk."""
    inside = shop.config.store / "inbox" / "backup"
    with pytest.raises(ConfigError, match="lie within each other"):
        backup.backup(shop.config, inside, quiet)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ConfigError, match=r"cat\.jpg"):
        backup.backup(shop.config, tmp_path / "photos", quiet)
    other = Shop(tmp_path / "other", "average")
    other.publish(NAMES[:1])
    save(other, tmp_path / "backup")
    with pytest.raises(ConfigError, match="another store"):
        backup.backup(shop.config, tmp_path / "backup", quiet)
    with pytest.raises(ConfigError, match="no backup"):
        backup.restore(other.at(tmp_path / "new").config, tmp_path / "photos", quiet)
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ConfigError, match=r"not empty: it holds cat\.jpg"):
        backup.restore(other.at(tmp_path / "photos").config, tmp_path / "backup", quiet)
    full = shop.at(shop.config.store)
    full.config = full.config.model_copy(update={"reserve": 1 << 60})
    with pytest.raises(NoSpace, match="copying 2 versions"):
        backup.backup(full.config, tmp_path / "nightly", quiet)


def test_a_backup_while_the_daemon_folds_can_be_restored(tmp_path: Path) -> None:
    """Taken again and again while fine-tunes come in, each copy is whole; the restored one goes on."""
    site = Site(tmp_path / "site", keep=1, grace="0s", archive="keep")
    config, _ = configfile.load(site.config)
    place, names = tmp_path / "backup", [f"tune-{number}" for number in range(1, 7)]
    with site.daemon() as daemon:
        for number, name in enumerate(names, 1):
            site.publish(name, number)
            made = backup.backup(config, place, quiet)
            assert made["damaged"] == []
            copied = config.model_copy(update={"store": place})
            assert [finding for finding in verify.verify(copied) if finding.is_damage] == []
            until(lambda name=name: name in daemon.states(), "it is seen")  # type: ignore[misc]
        daemon.until_state(dict.fromkeys(names, "folded"))
    site.configure(store="./restored", targets=[{"name": "hook", "type": "exec", "argv": ["true"]}])
    config, _ = configfile.load(site.config)
    restored = backup.restore(config, place, quiet)
    assert [finding for finding in verify.verify(config) if finding.is_damage] == []
    with site.daemon() as daemon:
        daemon.until_state(dict.fromkeys(names, "folded"))
        until(lambda: daemon.ask("status")["targets"][0]["state"] == "confirmed", "the target is told")
        assert daemon.ask("status")["count"] == 6
        assert daemon.ask("status")["current"]["version"] >= restored["version"]
    current, _ = configfile.load(site.config)
    manifest = snapshots.read((current.store / "current").resolve())
    assert sorted(member.name for member in manifest.fine_tunes) == names


def test_a_store_may_be_moved(shop: Shop, tmp_path: Path) -> None:
    """Nothing in it names its own place: it verifies there, and goes on."""
    shop.config.store.rename(tmp_path / "moved")
    moved = shop.at(tmp_path / "moved")
    assert verify.verify(moved.config) == []
    moved.work()
    assert [entry["name"] for entry in moved.manifest["fine_tunes"]] == list(NAMES)
    assert verify.verify(moved.config) == []
