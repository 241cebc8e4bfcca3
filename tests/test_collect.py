"""What stays on disk for replays: states at growing distances, bounded in number, through any history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from daemons import Site
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.collect import spaced

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


def test_gc_keeps_older_states_only_where_taking_out_replays(tmp_path: Path) -> None:
    """By opcm, versions at doubling distances stay and shorten a retraction; by average, none does."""
    for method, versions in (("opcm", [4, 6, 8, 9]), ("average", [8, 9])):
        site = Site(tmp_path / method, method=method, keep=2, keep_spaced=2, grace="0s", replay_limit=4)
        for number in range(1, 10):
            site.publish(f"tune-{number}", number)
        site.once()
        assert site.versions() == versions
        disk = site.ask("status")["disk"]
        assert disk["full_store_bytes"] == disk["version_bytes"] * (5 if method == "opcm" else 3)
        checked = site.ask("config", "check")["full_store_bytes"]
        assert checked == pytest.approx(disk["full_store_bytes"], rel=0.05)
        site.run("retract", "tune-5", "--yes")
        assert site.served == [f"tune-{number}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]
        failed = site.run("retract", "tune-1", "--yes", code=1 if method == "opcm" else 0)
        assert ("replay_limit is 4" in failed.stderr) == (method == "opcm")
        site.configure(keep_spaced=0)
        site.run("gc")
        assert len(site.versions()) == 2
