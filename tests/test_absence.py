"""Every way in which a replay can lack something: found before anything changes, named, and mended."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import models
import pytest
from hubs import Desk
from shops import NAMES, Shop

from streammerge import retracting, verify
from streammerge.devhub import DevHub
from streammerge.errors import StreammergeError, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """By a method that replays: ant, bee, cat and dog folded; their files kept."""
    shop = Shop(tmp_path_factory.mktemp("made") / "shop", "opcm", archive="keep", keep=1, keep_spaced=0)
    shop.publish(NAMES)
    return shop


@pytest.fixture
def shop(made: Shop, tmp_path: Path) -> Shop:
    """A copy of that store and its source, for one test; nothing kept, unless the test keeps it."""
    shutil.copytree(made.root, tmp_path / "shop", symlinks=True)
    return made.moved(tmp_path / "shop", archive="drop")


def team(shop: Shop) -> Path:
    """The folder of the source."""
    return shop.root / "fine-tunes"


def unconfigure(shop: Shop) -> None:
    """The source is not in the configuration any more."""
    shop.config = shop.config.model_copy(update={"sources": ()})


def renew(shop: Shop) -> None:
    """Another revision lies there, and nobody has looked yet."""
    shutil.rmtree(team(shop) / "cat")
    models.make_fine_tune(team(shop) / "cat", shop.base, seed=99)


def flip(path: Path) -> None:
    """Change the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


WAYS: dict[str, tuple[Callable[[Shop], object], str]] = {
    "the source is removed": (unconfigure, "source team is no longer configured"),
    "it is removed": (lambda shop: shutil.rmtree(team(shop) / "cat"), "cat (it is no longer in source team)"),
    "another revision": (renew, "cat (source team has another revision of it now)"),
    "changed in place": (
        lambda shop: flip(team(shop) / "cat" / "model.safetensors"),
        "cat (source team has another revision of it now)",
    ),
    "cut short": (
        lambda shop: (team(shop) / "cat" / "model.safetensors").write_bytes(b"1234"),
        "cat (source team has it damaged",
    ),
    "weights removed": (
        lambda shop: (team(shop) / "cat" / "model.safetensors").unlink(),
        "cat (source team has it damaged",
    ),
}


SOME = ("the source is removed", "it is removed", "changed in place")


@pytest.mark.parametrize(
    "way", [way if way in SOME else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_what_a_replay_lacks_is_named_and_nothing_changes(way: str, shop: Shop, made: Shop) -> None:
    """Retracting what came first folds the others again: what is missing of them is said, exit 1."""
    happen, said = WAYS[way]
    shop.work()  # nothing is kept from now on
    before, config = shop.manifest, shop.config
    happen(shop)
    with pytest.raises(StreammergeError) as refused:
        shop.do("retract", name="ant")
    assert said in refused.value.message, refused.value.message
    assert (refused.value.exit_code, bool(refused.value.hint)) == (1, True)
    assert shop.manifest == before
    shop.config = config
    assert verify.verify(shop.config) == []
    shutil.rmtree(team(shop) / "cat", ignore_errors=True)
    shutil.copytree(made.root / "fine-tunes" / "cat", team(shop) / "cat")
    assert shop.do("retract", name="ant")["state"] == "retracted"
    assert verify.verify(shop.config) == []


def test_a_source_that_is_not_mounted_is_tried_again_later(shop: Shop) -> None:
    """What cannot be seen now is not gone: exit 75, and nothing changes."""
    shop.work()
    team(shop).rename(shop.root / "unmounted")
    with pytest.raises(StreammergeError, match="is not there") as refused:
        shop.do("retract", name="ant")
    assert refused.value.exit_code == TryAgain.exit_code
    assert refused.value.hint
    (shop.root / "unmounted").rename(team(shop))
    assert shop.do("retract", name="ant")["state"] == "retracted"


def test_a_kept_copy_that_rotted_gives_way_to_the_source(shop: Shop) -> None:
    """Found before anything is folded; named where the source has no other, else fetched again."""
    shop.configure(archive="keep")
    kept = sorted((shop.config.store / "inbox").iterdir())[2]
    flip(kept / "model.safetensors")
    aside = team(shop).rename(shop.root / "aside")
    team(shop).mkdir()
    with pytest.raises(StreammergeError, match="what the store kept of it is damaged, and it is no longer"):
        shop.do("retract", name="ant")
    assert (kept / "model.safetensors").exists()
    team(shop).rmdir()
    aside.rename(team(shop))
    assert shop.do("retract", name="ant")["state"] == "retracted"
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == ["bee", "cat", "dog"]
    assert verify.verify(shop.config) == []


def test_a_method_that_rereads_says_what_it_lacks_before_it_folds(tmp_path: Path) -> None:
    """pcb needs every fine-tune for each version: what is gone is named, and nothing changes."""
    shop = Shop(tmp_path / "shop", "pcb", archive="keep")
    shop.publish(NAMES[:2])
    kept, before = min((shop.config.store / "inbox").iterdir()), shop.manifest
    shutil.rmtree(kept)
    aside = (team(shop) / "ant").rename(shop.root / "aside")
    with pytest.raises(TryAgain, match=r"cannot have ant \(it is no longer in source team\)"):
        shop.publish(NAMES[2:3])
    assert shop.manifest == before
    assert not list((shop.config.store / "candidates").iterdir())
    assert verify.verify(shop.config) == []
    aside.rename(team(shop) / "ant")
    shop.soon()
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == list(NAMES[:3])
    flip(sorted((shop.config.store / "inbox").iterdir())[1] / "model.safetensors")
    with pytest.raises(TryAgain, match="what the store kept of bee is not what was folded"):
        shop.publish(NAMES[3:])
    assert verify.verify(shop.config) == []
    shop.soon()
    assert [entry["name"] for entry in shop.manifest["fine_tunes"]] == list(NAMES)


def test_what_a_hub_does_not_give_any_more_is_named(tmp_path: Path) -> None:
    """Removed, private, gated: found by asking; a Hub that is down is waited for."""
    with (
        DevHub(tmp_path / "hub", token="hf_made_up") as hub,
        Desk(tmp_path / "desk", hub, method="opcm", keep_spaced=0) as desk,
    ):
        for number, name in enumerate(("org/a", "org/b", "org/c"), 1):
            desk.publish(name, number)
        desk.settle()
        assert desk.folded == ["org/a", "org/b", "org/c"]
        head = desk.merge.head
        for change, said in (
            ({"private": True}, "org/b (gone at source hub: the repository is not there, or private"),
            ({"gated": "manual", "private": False}, "does not give its files to this token any more"),
        ):
            hub.mark("org/b", **change)
            with pytest.raises(StreammergeError, match="needs the files of") as refused:
                retracting.retract(desk.merge, name="org/a")
            assert said in refused.value.message, refused.value.message
            assert desk.merge.head == head
        hub.mark("org/b", gated=False)
        hub.fault("/api/models/org/c", "500")
        with pytest.raises(TryAgain):
            retracting.retract(desk.merge, name="org/a")
        hub.faults.clear()
        assert desk.merge.head == head
        assert verify.verify(desk.config) == []
        assert retracting.retract(desk.merge, name="org/a")["state"] == "retracted"
        assert desk.folded == ["org/b", "org/c"]
