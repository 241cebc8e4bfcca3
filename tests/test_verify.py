"""Deep verification: each damage is named exactly, all of them in one run, and nothing that is none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from shops import NAMES, Shop

from streammerge import methods, snapshots, verify
from streammerge.files import canonical_json, protect
from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A store with versions 0 to 4 that keeps the files of its fine-tunes."""
    shop = Shop(tmp_path_factory.mktemp("made") / "shop", "opcm", keep=9, archive="keep")
    shop.publish(NAMES)
    assert verify.verify(shop.config) == []
    return shop


@pytest.fixture
def shop(made: Shop, tmp_path: Path) -> Shop:
    """A copy of that store, for one test."""
    shutil.copytree(made.root / "store", tmp_path / "store", symlinks=True)
    return made.at(tmp_path / "store")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is at work here: the second look can follow at once."""
    monkeypatch.setattr(verify, "PAUSE_SECONDS", 0.0)


def version(shop: Shop, number: int) -> Path:
    """One version's folder, all of it writable."""
    folder = next((shop.config.store / "snapshots").glob(f"{number:06d}-*"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    return folder


def flip(path: Path) -> None:
    """Change one bit near the end of a file."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def sql(shop: Shop, *statements: str) -> None:
    """Change rows behind everybody's back."""
    with contextlib.closing(sqlite3.connect(shop.config.store / "ledger.db")) as ledger:
        for statement in statements:
            ledger.execute(statement)
        ledger.commit()


def damage(shop: Shop) -> list[str]:
    """What verify calls damage."""
    found = verify.verify(shop.config)
    assert all(finding.hint for finding in found)
    return [finding.what for finding in found if finding.is_damage]


def unfinished(shop: Shop) -> list[str]:
    """What verify calls unfinished, where nothing is damaged."""
    found = verify.verify(shop.config)
    assert not [finding for finding in found if finding.is_damage]
    return [finding.what for finding in found]


def test_every_damage_is_named_in_one_run(shop: Shop) -> None:
    """A flipped bit, a file missing, one too many, an edited manifest, a row gone: these and no other."""
    flip(version(shop, 1) / "state" / "sum-00001.safetensors")
    (version(shop, 1) / "model" / "tokenizer.json").unlink()
    (version(shop, 2) / "state" / "more.txt").write_text("more")
    manifest = version(shop, 4) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"dog"', b'"dug"'))
    sql(shop, "delete from snapshots where version = 3")
    one, two, three, four = (version(shop, number) for number in (1, 2, 3, 4))
    for number in (1, 2, 3, 4):
        protect(version(shop, number))
    named = damage(shop)
    expected = [
        f"{one}/model/tokenizer.json is missing",
        f"{one}/state/sum-00001.safetensors does not have the content",
        f"{two}/state/more.txt was not there",
        f"{four}/manifest.json is not the one that was sealed",
        f"{three} has no row in",
    ]
    assert len(named) == len(expected), named
    for what in expected:
        assert sum(line.startswith(what) for line in named) == 1, (what, named)


def reseal(shop: Shop, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Seal the newest version anew with another manifest, and have the ledger agree on its digest."""
    folder = version(shop, number)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    content = canonical_json(manifest)
    (folder / "manifest.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    old = folder.name
    folder.rename(folder.with_name(snapshots.folder_name(number, digest)))
    protect(folder.with_name(snapshots.folder_name(number, digest)))
    (shop.config.store / "current").unlink()
    (shop.config.store / "current").symlink_to(f"snapshots/{snapshots.folder_name(number, digest)}")
    sql(
        shop,
        f"update snapshots set digest = '{digest}' where version = {number}",
        f"update promotions set digest = '{digest}' where version = {number}",
        f"update facts set value = replace(value, '{old}', '{snapshots.folder_name(number, digest)}')",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["totals"].update(state_norm=9.0), "totals.state_norm is 9, and its state says"),
        (lambda m: m["totals"].update(mean_delta_norm=9.0), "totals.mean_delta_norm is 9"),
        (lambda m: m["totals"].update(max_delta_norm=9.0), "totals.max_delta_norm is 9"),
        (lambda m: m["totals"].update(count=3), "totals.count is 3, and its state says 4"),
        (lambda m: m["totals"].update(factors=2.0), "totals.factors is 2, and its state says 4"),
        (lambda m: m.update(parent="0" * 64), "follows 000000000000, which"),
        (lambda m: m.update(parent=None), "follows no version, and only version 0 does so"),
        (lambda m: m.update(knobs={"alpha": 0.1}), "was made with knobs {'alpha': 0.1}"),
        (lambda m: m["base"].update(digest="f" * 64), "has base ffffffffffff"),
        (lambda m: m["fine_tunes"][3].update(digest="e" * 64), "says that dog@"),
        (lambda m: m["fine_tunes"].pop(), "statistics.safetensors has not 3 rows"),
        (lambda m: m["fine_tunes"].append(m["fine_tunes"][0]), "is in it more than once"),
    ],
)
def test_a_version_that_was_sealed_wrongly_is_found(
    shop: Shop, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    """Every hash fits; what the manifest says does not fit the state, the chain, store.json or the ledger."""
    if "dog@" in said:
        said = "for dog, version 4 has eeeeeeeeeeee"
    reseal(shop, 4, change)
    assert [line for line in damage(shop) if said in line], damage(shop)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("update snapshots set parent = 'abc' where version = 2", "says parent abc of version 2"),
        ("update snapshots set count = 7 where version = 2", "says count 7 of version 2"),
        ("update snapshots set added = '[]' where version = 2", "says added [] of version 2"),
        ("update snapshots set removed = '[\"x\"]' where version = 2", 'says removed ["x"] of version 2'),
        ("update snapshots set digest = 'abc' where version = 2", "says abc"),
        ("update snapshots set state = 'refused' where version = 2", "lies among the accepted"),
        ("delete from fine_tunes where name = 'bee'", "does not say that it is folded"),
        ("update fine_tunes set state = 'denied' where name = 'bee'", "does not say that it is folded"),
        ("update fine_tunes set digest = 'abc' where name = 'bee'", "has digest abc for bee"),
        (
            (
                "insert into fine_tunes "
                "(source, name, revision, state, published_at, first_seen_at, updated_at) "
                "values ('team', 'eel', 'r', 'folded', 0, 0, 0)"
            ),
            "eel@r is folded, version 4, the head, does not hold it",
        ),
        ("update promotions set digest = 'abc' where version = 3", "which is in no row"),
        ("delete from promotions where version = 4", "promoted 000003-"),
        ("delete from facts where name = 'head'", "names no head"),
    ],
)
def test_an_account_that_does_not_fit_the_manifests_is_found(shop: Shop, change: str, said: str) -> None:
    """Every row is compared with what the sealed versions say."""
    sql(shop, change)
    assert [line for line in damage(shop) if said in line], damage(shop)


def test_what_a_kill_leaves_is_unfinished(shop: Shop) -> None:
    """An intent not carried out, a folder not removed yet, a mode not set yet: none of it is damage."""
    sql(shop, "update promotions set switched_at = null where version = 4")
    assert ["is still to be switched" in line for line in unfinished(shop)] == [True]
    sql(shop, "update snapshots set state = 'collected' where version = 1")
    assert any("collected and not yet removed" in line for line in unfinished(shop))
    (version(shop, 2) / "model").chmod(0o755)
    protect(version(shop, 3))
    assert any("may be written to" in line for line in unfinished(shop))
    (shop.config.store / "ledger.db").chmod(0o644)
    assert any("may be read by others" in line for line in unfinished(shop))


def test_a_version_without_its_row_is_unfinished_only_behind_head(shop: Shop) -> None:
    """Moved into place and killed: the next start records it. The same in the middle is damage."""
    head = version(shop, 3).name
    protect(version(shop, 3).parent / head)
    sql(
        shop,
        "delete from snapshots where version = 4",
        "delete from promotions where version = 4",
        "update fine_tunes set state = 'pending', version = null where name = 'dog'",
        f"update facts set value = '\"{head}\"' where name = 'head'",
    )
    (shop.config.store / "current").unlink()
    (shop.config.store / "current").symlink_to(f"snapshots/{head}")
    assert ["accepted and not yet recorded" in line for line in unfinished(shop)] == [True]
    shop.work()
    assert verify.verify(shop.config) == []
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == list(NAMES)


def test_a_link_is_followed(shop: Shop) -> None:
    """`current` missing or leading out of the store is damage; to another version, a person's wish."""
    link = shop.config.store / "current"
    right = link.readlink()
    link.unlink()
    assert [f"{link} is missing"] == damage(shop)
    link.symlink_to("/nowhere")
    assert ["no accepted version" in line for line in damage(shop)] == [True]
    link.unlink()
    link.symlink_to(f"snapshots/{version(shop, 2).name}")
    protect(link.resolve())
    assert ["moved by hand" in line for line in unfinished(shop)] == [True]
    link.unlink()
    link.symlink_to(right)
    assert verify.verify(shop.config) == []


def test_kept_files_of_fine_tunes_are_read_too(shop: Shop) -> None:
    """A bit that flipped in the inbox is found before a replay needs it."""
    kept = sorted((shop.config.store / "inbox").iterdir())[1]
    flip(kept / "model.safetensors")
    assert damage(shop) == [f"{kept} is not what was folded of bee"]


def test_a_damaged_ledger_hides_no_damaged_version(shop: Shop) -> None:
    """Where SQLite cannot read its file, the versions are looked at all the same; so without store.json."""
    flip(version(shop, 2) / "model" / "config.json")
    ledger = shop.config.store / "ledger.db"
    content = bytearray(ledger.read_bytes())
    content[4096 : len(content) : 7] = bytes(len(range(4096, len(content), 7)))
    ledger.write_bytes(content)
    (shop.config.store / "store.json").write_text("{")
    named = damage(shop)
    assert any("config.json" in line for line in named), named
    assert any("ledger" in line for line in named), named
    assert any("store.json" in line for line in named), named


@pytest.mark.parametrize(
    "method",
    ["tsvm", *(pytest.param(name, marks=pytest.mark.slow) for name in methods.NAMES if name != "tsvm")],
)
def test_totals_follow_from_the_state_of_every_kind_of_method(method: str, tmp_path: Path) -> None:
    """What a method remembers first has the length that its manifest gives."""
    shop = Shop(tmp_path / "shop", method, keep=9)
    shop.publish(NAMES[:2])
    assert verify.verify(shop.config) == []


def test_a_writer_that_comes_later_is_no_damage(shop: Shop) -> None:
    """A ledger opened while nobody wrote is opened anew when reading fails and a writer is there now."""
    reading = Ledger(shop.config.store / "ledger.db", read_only=True)
    writing = Ledger(shop.config.store / "ledger.db")
    writing.write("create table more (n integer)")
    writing.write("insert into more values (1)")
    assert reading.rows("select n from more") == [{"n": 1}]
    writing.close()
    reading.close()
