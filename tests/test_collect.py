"""What stays on disk for replays: states at growing distances, bounded in number, through any history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shops import Shop, obey

from streammerge import files, offline, reports, snapshots
from streammerge.collect import spaced
from streammerge.errors import StreammergeError

if TYPE_CHECKING:
    from pathlib import Path

Line = tuple[int, ...]


@given(arrivals=st.integers(0, 200), first=st.integers(1, 8), levels=st.integers(1, 6))
@settings(max_examples=25)
def test_arrivals_alone_leave_a_short_replay_everywhere(arrivals: int, first: int, levels: int) -> None:
    """After any number of arrivals, collected after each: few versions, and a near one for each place."""
    on_disk: set[int] = {0}
    for count in range(1, arrivals + 1):
        on_disk = {*range(max(count - first + 1, 0), count + 1)} | spaced(
            on_disk | {count}, count, first=first, levels=levels
        )
        assert len(on_disk) <= first + levels
    reach = first * 2 ** (levels - 1)
    for back in range(1, min(arrivals, reach) + 1):  # 1 is the newest one
        begin = max((count for count in on_disk if count <= arrivals - back), default=0)
        assert arrivals - begin - 1 < 4 * max(back, first), (back, sorted(on_disk))


@given(data=st.data(), keep=st.integers(1, 4), levels=st.integers(1, 4))
@settings(max_examples=60)
def test_any_history_leaves_few_versions_and_what_short_replays_need(
    data: st.DataObject, keep: int, levels: int
) -> None:
    """Arrivals, retractions and rollbacks in any order: bounded, and no replay becomes four times as long."""
    versions: list[tuple[int, Line]] = [(0, ())]
    number, name, head = 0, 0, ()  # type: int, int, Line
    for step in data.draw(st.lists(st.sampled_from("fffffffffrb"), max_size=80)):
        if step == "b":
            head = data.draw(st.sampled_from([line for _, line in versions]))
        else:
            if step == "f" or not head:
                name += 1
                head = (*head, name)
            else:
                out = data.draw(st.sampled_from(head))
                head = tuple(each for each in head if each != out)
            number += 1
            versions.append((number, head))
        prefixes = {len(line): (n, line) for n, line in versions if line == head[: len(line)]}
        stones = spaced(prefixes, len(head), first=keep, levels=levels)
        assert len(stones) <= levels + 1
        current = [pair for pair in versions if pair[1] == head][-1:]
        kept = sorted({*versions[-keep:], *current, *(prefixes[count] for count in stones)})
        left = [len(line) for _, line in kept if line == head[: len(line)]]
        for back in range(1, len(head) + 1):
            place = len(head) - back
            before = len(head) - max((count for count in prefixes if count <= place), default=0)
            after = len(head) - max((count for count in left if count <= place), default=0)
            if max(back, before) <= keep * 2 ** (levels - 1):
                assert after < 4 * max(before, keep), (back, prefixes, left)
        versions = kept


@pytest.mark.parametrize(("method", "versions", "most"), [("opcm", [4, 6, 8, 9], 5), ("average", [8, 9], 3)])
def test_gc_keeps_older_states_only_where_taking_out_replays(
    method: str, versions: list[int], most: int, tmp_path: Path
) -> None:
    """By opcm, versions at doubling distances stay and shorten a retraction; by average, none does."""
    shop = Shop(tmp_path / "shop", method, keep=2, keep_spaced=2, replay_limit=4)
    for number in range(1, 10):
        models.make_fine_tune(shop.root / "fine-tunes" / f"tune-{number}", shop.base, seed=number)
    shop.work()
    assert numbers(shop) == versions
    store, ledger = reports.open_for_reading(shop.config)
    disk = reports.status(shop.config, store, ledger)["disk"]
    assert (disk["full_store_versions"], disk["full_store_bytes"]) == (most, most * disk["version_bytes"])
    assert offline.check(shop.config)["full_store_bytes"] == pytest.approx(disk["full_store_bytes"], rel=0.05)
    ledger.close()
    shop.do("retract", name="tune-5")
    assert [entry["name"][5:] for entry in shop.manifest["fine_tunes"]] == list("12346789")
    if method == "opcm":
        with pytest.raises(StreammergeError, match="replay_limit is 4"):
            shop.do("retract", name="tune-1")
    shop.configure(keep_spaced=0)
    shop.do("gc")
    assert len(numbers(shop)) == 2


def test_gc_ends_a_removal_that_a_failing_disk_cut_short(tmp_path: Path) -> None:
    """Without a start in between, and leaves alone what is being built."""
    shop = Shop(tmp_path / "shop", "average")
    shop.work()
    rest = shop.config.store / "snapshots" / f"{files.DOOMED}000001-0123456789ab" / "model"
    rest.mkdir(parents=True)
    rest.parent.chmod(0o555)
    building = shop.config.store / "candidates" / ".building-000009"
    building.mkdir()
    obey(shop.config, "gc", {})
    assert not rest.parent.exists()
    assert building.exists()


def numbers(shop: Shop) -> list[int]:
    """Numbers of the versions on disk."""
    return [int(path.name[:6]) for path in snapshots.folders(shop.config.store / "snapshots")]
