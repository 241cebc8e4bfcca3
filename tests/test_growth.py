"""An arrival after thousands of others asks as little of ledger and manifests as the second did."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from typing import TYPE_CHECKING

import models
import pytest
from faults import soak
from hypothesis import given
from hypothesis import strategies as st

from streammerge import (
    files,
    members,
    operations,
    reconcile,
    recovery,
    reports,
    rollout,
    screen,
    snapshots,
    standing,
    turns,
    unfinished,
)
from streammerge.config import Config
from streammerge.engine import Engine
from streammerge.errors import Damaged
from streammerge.members import Member, Members
from streammerge.metrics import Metrics
from streammerge.sources import open_source
from streammerge.targets import open_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streammerge.recipes import FoldingMerge as Merge

MANY = 3000
STEPS = 100  # of SQLite's machine, from one count to the next
LONG_AGO = 1.0


@pytest.fixture
def merge(tmp_path: Path) -> Iterator[Merge]:
    """A merge with a folder as its source and a target that confirms everything."""
    base = models.make_base(tmp_path / "base")
    (tmp_path / "fine-tunes").mkdir()
    for number in range(3):
        models.make_fine_tune(tmp_path / "fine-tunes" / f"ft{number}", base, seed=number + 1)
    config = Config.model_validate(
        {
            "base": tmp_path / "base", "store": tmp_path / "store", "reserve": "1MB", "threads": 1,
            "method": "average", "archive": "keep", "keep": 2, "grace": "1h",
            "sources": [
                {"name": "team", "type": "directory", "path": tmp_path / "fine-tunes", "settle": "0s"}
            ],
            "targets": [{"name": "server", "type": "exec", "argv": ["true"]}],
        }
    )  # fmt: skip
    recovery.prepare_folder(config)
    metrics = Metrics(screen.REASONS)
    found = recovery.open_merge(config, Engine(device="cpu", threads=1), metrics)
    yield found
    found.ledger.close()


def look(merge: Merge) -> None:
    """Look at the folder."""
    [part] = merge.config.sources
    turns.look_at(merge, open_source(part, merge.config), lambda _name, _seconds: None)


def arrive(merge: Merge) -> None:
    """Fold one fine-tune, tell the target, and be scraped."""
    [part] = merge.config.sources
    assert turns.work_once(merge, {"team": open_source(part, merge.config)})
    rollout.deliver(merge, [open_target(merge.config.targets[0], merge.config)])
    turns.refresh(merge)


def steps(merge: Merge, work: Callable[[Merge], None]) -> int:
    """Count the steps of SQLite's machine that some work takes."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    merge.ledger._db.set_progress_handler(tick, STEPS)
    work(merge)
    merge.ledger._db.set_progress_handler(None, STEPS)
    return count * STEPS


def add_history(merge: Merge) -> None:
    """Write down what thousands of arrivals leave in the ledger."""
    ledger = merge.ledger
    with ledger.transaction():
        for number in range(100, 100 + MANY):
            digest = f"{number:064x}"
            ledger.announce(
                "gone", f"old{number}", digest[-16:], state="folded", step="folded", digest=digest,
                version=number, published_at=LONG_AGO,
            )  # fmt: skip
            ledger.write(
                "insert into snapshots (version, digest, state, count, added, removed, sealed_at) "
                "values (?, ?, 'collected', 1, '[]', '[]', ?)",
                number, digest, LONG_AGO,
            )  # fmt: skip
            promotion = ledger.write(
                "insert into promotions (version, digest, cause, intended_at, switched_at) "
                "values (?, ?, 'fold', ?, ?)",
                number, digest, LONG_AGO, LONG_AGO,
            )  # fmt: skip
            ledger.write(
                "insert into outbox (promotion, target, version, state) values (?, 'server', ?, 'done')",
                promotion, number,
            )  # fmt: skip


def test_the_ledger_is_asked_as_little_after_thousands_as_after_one(merge: Merge) -> None:
    """What a fold, a delivery and a scrape read of the ledger is the rows of this arrival, not of all."""
    look(merge)
    arrive(merge)
    second = steps(merge, arrive)
    add_history(merge)
    assert steps(merge, arrive) < 2 * second + 5 * MANY  # of what is archived: its id
    assert merge.head.version == 100 + MANY


def test_a_look_that_finds_nothing_new_writes_one_row(merge: Merge) -> None:
    """What a look sees unchanged is passed over; what a person took up again is still superseded."""
    look(merge)
    arrive(merge)
    before = merge.ledger._db.total_changes
    look(merge)
    assert merge.ledger._db.total_changes == before + 1  # when the source was seen last

    merge.ledger.announce("team", "ft0", "another", state="pending")
    look(merge)
    states = {row["revision"]: row["state"] for row in merge.ledger.fine_tunes() if row["name"] == "ft0"}
    assert states.pop("another") == "superseded"
    assert states.popitem()[1] == "folded"


def test_a_name_that_no_ledger_could_hold_is_refused_at_every_look(merge: Merge, tmp_path: Path) -> None:
    """The others are looked at all the same."""
    (tmp_path / "fine-tunes" / os.fsdecode(b"A\xff")).mkdir()
    for _ in range(2):
        look(merge)
        states = sorted(row["state"] for row in merge.ledger.fine_tunes())
        assert states == ["pending", "pending", "pending", "refused"]


def test_what_a_source_remembers_is_read_a_part_at_a_time(merge: Merge) -> None:
    """In the order of names or in any other; of another source nothing; never more than a part at once."""
    names = [f"ft{number:04d}" for number in range(2 * reconcile.REMEMBERED_AT_ONCE + 7)]
    with merge.ledger.transaction():
        for name in names:
            merge.ledger.write("insert into sightings values ('hub', ?, ?, 'r', 1.0)", name, f"of {name}")
        merge.ledger.write("insert into sightings values ('other', 'ft0000a', 'f', 'r', 1.0)")
    remembered = reconcile.Remembered(merge.ledger, "hub")
    assert list(remembered) == names
    assert len(remembered) == len(names)
    for order in (names, names[::-1], names[::97] + names[1::97]):
        assert all(remembered[name].fingerprint == f"of {name}" for name in order)
        assert len(remembered._part) <= reconcile.REMEMBERED_AT_ONCE
    strangers = ["", "a", "ft0000a", names[reconcile.REMEMBERED_AT_ONCE - 1] + "a", "ft9999", "z"]
    assert not [name for name in strangers + strangers[::-1] if name in remembered]


def test_what_went_and_came_back_unchanged_is_announced_again(merge: Merge, tmp_path: Path) -> None:
    """A row that says `gone` is no row that needs no second thought."""
    look(merge)
    (tmp_path / "fine-tunes" / "ft1").rename(tmp_path / "ft1")
    look(merge)
    assert reports.match_fine_tune(merge.ledger.fine_tunes(), "ft1")["state"] == "gone"
    (tmp_path / "ft1").rename(tmp_path / "fine-tunes" / "ft1")
    look(merge)
    assert reports.match_fine_tune(merge.ledger.fine_tunes(), "ft1")["state"] == "pending"


def test_a_manifest_is_parsed_once_and_again_when_it_changed(merge: Merge) -> None:
    """What is remembered of a sealed manifest never stands in for one that was tampered with."""
    look(merge)
    arrive(merge)
    head = merge.head
    assert merge.head.manifest is head.manifest
    path = head.path / "manifest.json"
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole.replace(b'"ft0"', b'"ft9"'))
    os.utime(path, (LONG_AGO, LONG_AGO))
    with pytest.raises(Damaged, match="not the one that was sealed"):
        snapshots.read(head.path)
    path.write_bytes(whole)
    assert snapshots.read(head.path).manifest == head.manifest


def test_what_two_versions_list_is_in_memory_once(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart reads head and the version before it: thousands of entries each, nearly all the same."""
    monkeypatch.setattr(members, "PIECE", 1)
    look(merge)
    arrive(merge)
    arrive(merge)
    monkeypatch.setattr(snapshots, "MANIFESTS", snapshots.Manifests(most=2))
    one, two = (snapshots.read(path) for path in snapshots.folders(merge.store.snapshots)[-2:])
    assert [len(one.fine_tunes), len(two.fine_tunes)] == [1, 2]
    assert one.fine_tunes.pieces[0] is two.fine_tunes.pieces[0]


ENTRIES = st.lists(st.integers(0, 9), unique=True)


@given(ENTRIES, ENTRIES, ENTRIES)
def test_what_a_version_changed_is_told_from_what_it_kept(
    common: list[int], ours: list[int], theirs: list[int]
) -> None:
    """Added and removed are the differences of the two lists, each in its order, wherever they part."""
    lists = [
        [Member("team", str(n), "1", str(n), 1.0) for n in [*common, *(n for n in rest if n not in common)]]
        for rest in (ours, theirs)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "PIECE", 2)
        added, removed = Members(lists[0]).changes(Members(lists[1]))
    assert added == [entry for entry in lists[0] if entry not in lists[1]]
    assert removed == [entry for entry in lists[1] if entry not in lists[0]]


@given(ENTRIES, ENTRIES, st.sets(st.integers(0, 9)), st.integers(1, 4))
def test_members_are_a_list_that_never_changes(
    first: list[int], more: list[int], places: set[int], piece: int
) -> None:
    """Longer by some, shorter by some, and read again: it is what a list would be."""
    listed, after = ([Member("team", f"é{n}", "1", str(n), 0.1) for n in some] for some in (first, more))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "PIECE", piece)
        held = Members(listed)
        longer, left = held + after, held.without(places)
        assert [*longer] == listed + after
        assert [*left] == [member for place, member in enumerate(listed) if place not in places]
        assert (len(held), len(longer), len(left)) == (len([*held]), len([*longer]), len([*left]))
        assert [*held] == listed
        assert longer == Members(listed + after)
        assert (held == longer) == (not after)
        assert left + after == Members([*left, *after])
        assert members.parse(files.canonical_json({"fine_tunes": left})) == {"fine_tunes": left}
        shared = Members(listed)
        shared.hold_once([longer, left])
        assert shared == held


def test_a_manifest_of_thousands_is_written_a_piece_at_a_time(tmp_path: Path) -> None:
    """What is held while it is written does not grow with what it lists."""
    peaks = []
    for count in (1_000, 20_000):
        entries = Members(Member("team", f"ft{n}", "1", f"{n:064x}", 1.0) for n in range(count))
        tracemalloc.start()
        digest = files.write_json(tmp_path / str(count), {"fine_tunes": entries})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert digest == hashlib.sha256((tmp_path / str(count)).read_bytes()).hexdigest()
    assert peaks[1] < 1.5 * peaks[0]


def test_what_holds_a_beginning_of_the_merge_is_found_without_parsing_it_again(merge: Merge) -> None:
    """Versions that wait for a slow target are many; a changed manifest is not taken for the one known."""
    look(merge)
    arrive(merge)
    arrive(merge)
    digests = merge.head.digests
    line = list(snapshots.line_of(merge.store, digests))
    assert [count for _, count in line] == [0, 1, 2]
    assert list(snapshots.line_of(merge.store, digests[1:])) == line[:1]
    parsed = snapshots._beginning.cache_info().misses
    assert list(snapshots.line_of(merge.store, digests[:1])) == line[:2]
    assert snapshots._beginning.cache_info().misses == parsed

    manifest = line[1][0] / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes().replace(b'"ft0"', b'"ft9"'))
    assert list(snapshots.line_of(merge.store, digests)) == [line[0], line[2]]


def test_a_start_looks_into_the_newest_versions_alone(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others only that they are there; they are read while there is nothing else to do."""
    look(merge)
    for _ in range(3):
        arrive(merge)
    first, second, third, head = snapshots.folders(merge.store.snapshots)
    for path in (second, third):
        (path / "model" / "config.json").chmod(0o644)
        (path / "model" / "config.json").write_text("{}")
    files.remove_tree(first)
    monkeypatch.setattr(standing, "CHECKED_AT_ONCE", 2)
    standing.settle(merge)
    assert set(merge.ledger.fact("damaged")) == {"0", "2"}

    unchecked = turns.check_served(merge)
    while turns.check_another(merge, unchecked):
        pass
    assert set(merge.ledger.fact("damaged")) == {"0", "1", "2"}
    (head / "model" / "config.json").chmod(0o644)
    (head / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(standing, "CHECKED_AT_ONCE", 0)
    with pytest.raises(Damaged, match=r"config\.json has 2 bytes"):
        standing.settle(merge)


def test_the_versions_on_disk_are_asked_about_at_once(merge: Merge) -> None:
    """Each turn of work looks for what a kill left: as many questions for three versions as for one."""
    asked: list[str] = []
    counts = []
    look(merge)
    for _ in range(3):
        merge.ledger._db.set_trace_callback(asked.append)
        unfinished.finish(merge)
        merge.ledger._db.set_trace_callback(None)
        counts.append(len(asked))
        asked.clear()
        arrive(merge)
    assert counts[0] == counts[1] == counts[2]


def test_a_target_that_lags_behind_holds_up_no_other(merge: Merge, tmp_path: Path) -> None:
    """Where several promotions are due for two targets, they are told in turn."""
    script = tmp_path / "tell.sh"
    script.write_text(f'#!/bin/sh\necho "$1 $STREAMMERGE_VERSION" >> {tmp_path}/told\n')
    script.chmod(0o755)
    targets = [{"name": name, "type": "exec", "argv": [str(script), name]} for name in ("one", "two")]
    facts = merge.config.model_dump(mode="json") | {"targets": targets}
    merge.take(Config.model_validate(facts))
    look(merge)
    [part] = merge.config.sources
    for _ in range(2):
        assert turns.work_once(merge, {"team": open_source(part, merge.config)})
    rollout.deliver(merge, [open_target(target, merge.config) for target in merge.config.targets])
    told = (tmp_path / "told").read_text().split("\n")
    assert told == ["one 1", "two 1", "one 2", "two 2", ""]


def test_the_inbox_keeps_what_is_archived_and_waiting_and_nothing_else(merge: Merge) -> None:
    """Tidying asks which folders may stay; one whose fine-tune is out of the merge goes."""
    look(merge)
    arrive(merge)
    arrive(merge)
    [one, two, _] = merge.ledger.fine_tunes()
    stranger = merge.store.inbox / "77"
    stranger.mkdir()
    merge.ledger.update_fine_tune(two["id"], state="denied")
    operations.gc(merge)
    assert [path.name for path in merge.store.inbox.iterdir()] == [str(one["id"])]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_soak(tmp_path: Path) -> None:
    """Over many arrivals, kills and failures each good content gets in exactly once, and nothing grows."""
    assert soak.measure(tmp_path, "short").differences == []
