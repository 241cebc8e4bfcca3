"""What a person does to a store: roll back, hold, resume, collect, verify; with and without a daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
import torch
from daemons import STREAMMERGE, Site, command, environment, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LETTERS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A store with versions 0 to 4, into which a, b, c and d were folded."""
    site = Site(tmp_path_factory.mktemp("made") / "site")
    for number, name in enumerate(LETTERS, 1):
        site.publish(name, number)
    site.once()
    assert site.served == list(LETTERS)
    return site


@pytest.fixture
def site(made: Site, tmp_path: Path) -> Site:
    """A copy of that store, for one test."""
    return made.copy(tmp_path / "site")


def states_of_history(site: Site) -> dict[int, str]:
    """Each version's state."""
    return {row["version"]: row["state"] for row in site.ask("history")}


# ----------------------------------------------------------------------------------------------- rollback


def test_a_rollback_needs_no_daemon(site: Site) -> None:
    """Without a daemon the command switches itself, goes to the parent of current, denies, and holds."""
    done = site.ask("rollback", "--yes")
    assert (done["version"], done["from"], done["denied"], done["held"]) == (3, 4, ["d"], True)
    status = site.ask("status")
    assert (status["current"]["version"], status["head"]["version"], status["count"]) == (3, 3, 3)
    assert "version 3" in status["held"]
    assert site.served == ["a", "b", "c"]
    assert site.rows()["d"]["state"] == "denied"
    assert states_of_history(site) == dict.fromkeys(range(4), "accepted") | {4: "rolled_back"}
    site.once()
    assert site.served == ["a", "b", "c"]
    assert site.ask("status")["held"] == status["held"]


def test_a_rollback_stays_until_a_person_lifts_it(site: Site) -> None:
    """It holds through polls, copies under new names and three restarts; resume lifts the hold, no more."""
    with site.daemon() as daemon:
        started = time.monotonic()
        assert site.ask("rollback", "2", "--yes")["denied"] == ["c", "d"]
        assert time.monotonic() - started < 2.0
        assert site.served == ["a", "b"]
        shutil.copytree(site.inflow / "c", site.root / "staging" / "copy-of-c")
        site.move_in("copy-of-c")
        site.publish("e", 5)
        daemon.until_state({"c": "denied", "d": "denied", "e": "pending", "copy-of-c": "pending"})
        until(lambda: daemon.rows()["e"]["step"] == "fetched", "a hold does not stop fetching")
        daemon.look_again(3)
        assert daemon.metric("streammerge_held") == 1
        assert site.served == ["a", "b"]
    for _ in range(3):
        with site.daemon() as daemon:
            os.utime(site.inflow / "d" / "model.safetensors")
            daemon.look_again(2)
            assert daemon.ask("status")["held"]
            assert site.served == ["a", "b"]
            assert daemon.states()["d"] == "denied"
    with site.daemon() as daemon:
        assert site.ask("resume")["held"] is None
        rows = daemon.until_state({"e": "folded", "copy-of-c": "denied", "c": "denied", "d": "denied"})
        assert rows["e"]["version"] == 5
        assert site.ask("history")[-1]["parent"] == site.ask("show", "2")["digest"]
        site.run("fine-tunes", "approve", "d")
        daemon.until_state(d="folded", c="denied")
        assert site.served == ["a", "b", "e", "d"]

        # Rolling forward, to a version that holds what was denied, lets it in again and takes out the others.
        assert site.ask("rollback", "3", "--yes")["denied"] == ["e", "d"]
        daemon.until_state(c="folded", d="denied", e="denied")
        assert daemon.rows()["c"]["version"] == 3
        assert site.served == ["a", "b", "c"]
        assert states_of_history(site) == {
            0: "accepted", 1: "accepted", 2: "accepted", 3: "accepted",
            4: "rolled_back", 5: "rolled_back", 6: "rolled_back",
        }  # fmt: skip
        site.run("resume")
        site.publish("f", 6)
        daemon.until_state(f="folded")
        assert site.current["version"] == 7
        assert site.served == ["a", "b", "c", "f"]
        failed = site.run("rollback", "99", "--yes", code=1)
        assert "version 99 is not on disk" in failed.stderr
        assert "history" in failed.stderr
        site.run("rollback", "0", "--yes")
        failed = site.run("rollback", "--yes", code=1)
        assert "no earlier version" in failed.stderr
        assert site.served == []
    assert site.run("verify").stdout.startswith("every version")


def test_rolling_forward_settles_what_was_approved_meanwhile(site: Site) -> None:
    """A fine-tune approved after a rollback counts as folded once a version that holds it is served again."""
    with site.daemon() as daemon:
        site.run("rollback", "--yes")
        site.run("fine-tunes", "approve", "d")
        daemon.until_state(d="pending")
        site.run("rollback", "4", "--yes")
        site.run("resume")
        daemon.look_again(2)
        assert site.served == list(LETTERS)
        assert daemon.states() == dict.fromkeys(LETTERS, "folded")


def slow_site(root: Path, weights: int = 8, size: int = 1024) -> Site:
    """A site whose second and later folds take seconds: many large weights, each to be decomposed."""
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{n}.weight": torch.randn(size, size, generator=random) / 32 for n in range(weights)}
    return Site(root, base)


def test_a_rollback_does_not_wait_for_a_running_fold(tmp_path: Path) -> None:
    """It is done while the fold still runs, and what that fold makes is never promoted but folded anew."""
    site = slow_site(tmp_path / "site")
    with site.daemon() as daemon:
        site.publish("first", 1)
        daemon.until_state(first="folded")
        site.publish("second", 2)
        until(lambda: daemon.metric("streammerge_fold_progress_ratio") > 0.1, "the second fold runs")
        started = time.monotonic()
        assert site.ask("rollback", "--yes")["version"] == 0
        took = time.monotonic() - started
        assert daemon.metric("streammerge_fold_in_progress") == 1, f"the fold was over after {took:.1f} s"
        assert took < 3.0
        assert site.served == []
        abandoned = ("streammerge_folds_total", {"result": "abandoned"})
        until(lambda: daemon.metric(abandoned[0], **abandoned[1]) == 1, "the fold is abandoned")
        assert site.versions() == [0, 1]
        assert daemon.ask("status")["current"]["version"] == 0
        assert daemon.states() == {"first": "denied", "second": "pending"}
        site.run("resume")
        daemon.until_state(second="folded")
        assert site.served == ["second"]
        assert site.current["version"] == 3
        assert site.current["parent"] == site.ask("show", "0")["digest"]


# ------------------------------------------------------------------------------------------ hold, queue


def test_a_hold_stops_folding_and_a_resume_goes_on(site: Site) -> None:
    """Held, a fine-tune is announced and fetched, not folded; what --no-wait left is executed."""
    site.run("hold", "--why", "a [holiday]", "--no-wait")
    assert site.ask("status")["held"] is None
    site.publish("e", 5)
    site.once()
    assert site.ask("status")["held"] == "a [holiday]"
    assert "a [holiday]" in site.run("status").stdout
    assert site.rows()["e"]["step"] == "fetched"
    assert len(list((site.store / "inbox").iterdir())) == 1
    with site.daemon() as daemon:
        site.run("resume", "--no-wait")
        daemon.until_state(e="folded")
        site.run("hold")
        assert daemon.ask("status")["held"]
    assert list((site.store / "inbox").iterdir()) == []


def test_two_shells_at_once(site: Site) -> None:
    """Commands typed at the same time are all executed, each once, whichever of them holds the store."""
    asked = (["hold"], ["fine-tunes", "retry", "a"], ["gc"], ["rollback", "--yes"])
    running = [
        subprocess.Popen(
            [*STREAMMERGE, *words, "-c", str(site.config)],
            env=environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for words in asked
    ]  # fmt: skip
    ended = [(process.communicate(timeout=60), process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 1, 0, 0], ended
    assert "folded into version 1 already" in ended[1][0][1]
    assert site.ask("status")["current"]["version"] == 3
    assert site.run("verify").returncode == 0


def test_a_command_on_a_damaged_store_is_not_executed_later(site: Site) -> None:
    """A command that ends with exit 3 has failed: it does not wait until the store is repaired."""
    weights = site.store / "current" / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-4])
    failed = site.run("rollback", "--yes", code=None)
    if failed.returncode == 0:  # rolling back off a damaged version would be better still
        assert site.served == ["a", "b", "c"]
        return
    assert failed.returncode == 3
    assert "rollback" not in failed.stderr, "the hint proposes what was just refused"
    weights.write_bytes(content)
    weights.chmod(0o444)
    site.once()
    assert site.served == list(LETTERS)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a store to somebody else")
def test_another_users_store_is_left_alone(site: Site) -> None:
    """A command that would change a store of somebody else exits 2 and says how to run it as them."""
    stranger = 12345
    for path in [site.store, *site.store.rglob("*")]:
        os.chown(path, stranger, stranger, follow_symlinks=False)
    for words in (["hold"], ["rollback", "--yes"], ["run", "--once"], ["run"]):
        refused = site.run(*words, code=2)
        assert f"sudo -u #{stranger}" in refused.stderr
    assert site.ask("status")["held"] is None
    assert {path.stat().st_uid for path in site.store.iterdir()} == {stranger}


# ----------------------------------------------------------------------------------------------- gc, adopt


def test_gc_keeps_what_is_needed(site: Site) -> None:
    """It removes no head, no current, none of the newest `keep`, nothing that was current within `grace`."""
    site.run("rollback", "1", "--yes")
    site.configure(keep=1)
    assert site.ask("gc")["removed"] == []
    site.configure(grace="0s")
    assert [name[:6] for name in site.ask("gc")["removed"]] == ["000000", "000002", "000003"]
    assert site.versions() == [1, 4]
    assert states_of_history(site) == {
        0: "collected", 1: "accepted", 2: "collected", 3: "collected", 4: "rolled_back",
    }  # fmt: skip
    assert site.run("verify").returncode == 0


@pytest.mark.slow
def test_gc_while_a_fold_reads_what_is_no_head_any_more(tmp_path: Path) -> None:
    """A fold whose starting version is collected meanwhile is abandoned; the daemon goes on."""
    site = slow_site(tmp_path / "site", weights=6)
    with site.daemon() as daemon:
        for number, name in enumerate(("first", "second"), 1):
            site.publish(name, number)
            daemon.until_state({name: "folded"})
        site.run("rollback", "1", "--yes")
        site.run("resume")
        site.publish("third", 3)
        until(lambda: daemon.metric("streammerge_fold_progress_ratio") > 0.1, "the third fold runs")
        site.configure(keep=1, grace="0s")
        daemon.reload()
        site.run("rollback", "2", "--yes")
        site.run("gc")
        site.run("resume")
        daemon.until_state(third="folded")
        assert site.served == ["first", "second", "third"]


def test_a_current_moved_by_hand_is_adopted(site: Site) -> None:
    """At start, a `current` that a person pointed elsewhere is served, with a hold and an error logged."""
    link = site.store / "current"
    link.unlink()
    link.symlink_to(next((site.store / "snapshots").glob("000002-*")).relative_to(site.store))
    site.publish("e", 5)
    with site.daemon() as daemon:
        until(lambda: daemon.states().get("e") == "pending", "e is announced")
        status = daemon.ask("status")
        assert (status["current"]["version"], status["head"]["version"]) == (2, 4)
        assert "by hand" in status["held"]
        assert [event["level"] for event in daemon.events("current.adopted")] == ["error"]
        assert site.served == ["a", "b"]
        site.run("resume")
        daemon.until_state(e="folded")
        assert site.served == [*LETTERS, "e"]


# ------------------------------------------------------------------------------------------- verify, damage


def find(site: Site, version: int, name: str) -> Path:
    """Find one file of a version, and make it and its folder writable."""
    path = next((site.store / "snapshots").glob(f"{version:06d}-*")) / name
    path.parent.chmod(0o755)
    if path.exists():
        path.chmod(0o644)
    return path


def flip(path: Path) -> Path:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def remove(path: Path) -> Path:
    """Remove a file."""
    path.unlink()
    return path


def add(path: Path) -> Path:
    """Put a file where none was."""
    path.write_text("new")
    return path


def shorten(path: Path) -> Path:
    """Cut off the last byte."""
    path.write_bytes(path.read_bytes()[:-1])
    return path


def edit(path: Path) -> Path:
    """Change a word of a text."""
    path.write_text(path.read_text().replace('"spectral_cap"', '"mean"'))
    return path


DAMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "bit in the model": (flip, "model/model.safetensors"),
    "bit in the state": (flip, "state/sum-00001.safetensors"),
    "bit in the configuration": (flip, "model/config.json"),
    "file missing": (remove, "model/tokenizer.json"),
    "file added": (add, "model/more.json"),
    "file shortened": (shorten, "state/statistics.safetensors"),
    "manifest edited": (edit, "manifest.json"),
    "manifest missing": (remove, "manifest.json"),
}


ONE_OF_A_KIND = ("bit in the model", "file missing", "manifest edited")  # the others take as long again
EACH_DAMAGE = [
    pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.slow) for name in DAMAGES
]


@pytest.mark.parametrize("damage", EACH_DAMAGE)
def test_verify_names_what_is_damaged(site: Site, damage: str) -> None:
    """Exit 3 and the path of the damaged file, whichever version it is in."""
    assert site.ask("verify") == {"damaged": False, "findings": [], "unfinished": [], "hints": {}}
    change, name = DAMAGES[damage]
    path = change(find(site, 2, name))
    found = site.ask("verify", code=3)
    assert found["damaged"]
    assert len(found["findings"]) == 1
    assert str(path) in found["findings"][0]
    assert str(path) in site.run("verify", code=3).stdout.replace("\n", "")


def test_verify_compares_ledger_and_folders(site: Site) -> None:
    """A row missing in the middle, and a version's folder missing, are each named: exit 3."""
    folder = next((site.store / "snapshots").glob("000003-*"))
    folder.rename(site.root / "elsewhere")
    assert [str(folder) in line for line in site.ask("verify", code=3)["findings"]] == [True]
    (site.root / "elsewhere").rename(folder)
    with contextlib.closing(sqlite3.connect(site.store / "ledger.db")) as ledger:
        ledger.execute("delete from snapshots where version = 2")
        ledger.commit()
    found = " ".join(site.ask("verify", code=3)["findings"])
    assert "row" in found
    assert "000002-" in found or "version 2" in found


def listing(store: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below snapshots/ with its size, mode and time of modification, and where `current` leads."""
    found = {
        str(path.relative_to(store)): (s.st_size, s.st_mode, s.st_mtime_ns)
        for path in (store / "snapshots").rglob("*")
        for s in [path.lstat()]
    }
    return {**found, str((store / "current").readlink()): (0, 0, 0)}


@pytest.mark.parametrize("damage", [shorten, flip])
def test_a_damaged_head_stops_everything(site: Site, damage: Callable[[Path], Path]) -> None:
    """Hands off: exit 3 with the path of the damage; nothing is folded, touched or removed."""
    site.publish("e", 5)
    site.configure(keep=1, grace="0s")
    path = damage(find(site, 4, "model/model.safetensors"))
    path.chmod(0o444)
    path.parent.chmod(0o555)
    before = listing(site.store)
    stopped = command("run", "-c", site.config, code=3)
    assert str(path) in stopped.stderr
    assert listing(site.store) == before
    site.once(code=3)
    assert listing(site.store) == before


def test_damage_in_an_older_version_is_marked(site: Site) -> None:
    """The service goes on, the version is named in status and metrics and not offered for a rollback."""
    path = shorten(find(site, 2, "model/model.safetensors"))
    site.publish("e", 5)
    with site.daemon() as daemon:
        daemon.until_state(e="folded")
        assert list(daemon.ask("status")["damaged"]) == ["2"]
        assert str(path) in daemon.ask("status")["damaged"]["2"]
        assert daemon.metric("streammerge_damaged_snapshots") == 1
        assert daemon.events("snapshot.damaged")[0]["version"] == 2
        refused = site.run("rollback", "2", "--yes", code=1)
        assert "damaged" in refused.stderr
        assert site.served == [*LETTERS, "e"]
        site.run("rollback", "1", "--yes")
        assert site.served == ["a"]
