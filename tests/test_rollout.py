"""From current to served: in order, canary first, verified; a version that is served wrong is taken back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import models
import pytest

from streammerge import operations, promote, recovery, reports, retracting, rollout, screen, snapshots, turns
from streammerge.config import Config
from streammerge.config.targets import Probe, Rollout
from streammerge.engine import Engine
from streammerge.errors import AnsweredWrong, TryAgain
from streammerge.metrics import Metrics
from streammerge.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streammerge.recipes import FoldingMerge
    from streammerge.targets import Told

NAMES = ("canary", "second", "third")
LONG = 10_000.0


@dataclass
class Server:
    """A serving process: it may be away, refuse versions, or restart with what it was launched with."""

    name: str
    takes_all: bool = False
    serving: str = "launch"
    away: bool = False
    refuses: set[int] = field(default_factory=set)
    wrong_times: int = 0
    told: list[Told] = field(default_factory=list)

    def tell(self, told: Told) -> None:
        """Take a version."""
        self.told.append(told)
        if self.away:
            raise TryAgain(f"{self.name} is away")
        if told.version in self.refuses or self.wrong_times > 0:
            self.wrong_times -= 1
            raise AnsweredWrong(f"{self.name} refuses {told.label}")
        self.serving = told.label

    def serves(self) -> str:
        """Say what it serves."""
        if self.away:
            raise TryAgain(f"{self.name} is away")
        return self.serving

    @property
    def version(self) -> int | None:
        """The number of what it serves."""
        return snapshots.version_of(self.serving)


class Fleet:
    """A merge whose fine-tunes come one by one, and three serving processes that it tells."""

    def __init__(self, root: Path, method: str) -> None:
        """Make the base and the store; version 0 is promoted, and nobody was told of it."""
        self.base = models.make_base(root / "base")
        self.inflow = root / "fine-tunes"
        self.inflow.mkdir()
        config = Config.model_validate(
            {
                "base": root / "base", "store": root / "store", "reserve": "1MB", "threads": 1,
                "method": method, "keep": 9,
                "sources": [{"name": "team", "type": "directory", "path": self.inflow, "settle": "0s"}],
                "targets": [
                    {"name": name, "type": "exec", "argv": ["true"], "check": "1h"} for name in NAMES
                ],
            }
        )  # fmt: skip
        recovery.prepare_folder(config)
        self.metrics = Metrics(screen.REASONS)
        self.merge: FoldingMerge = recovery.open_merge(config, Engine(device="cpu", threads=1), self.metrics)
        self.servers = [Server(name) for name in NAMES]
        self.source = open_source(config.sources[0], config)

    def publish(self, *names: str) -> None:
        """Publish fine-tunes, each as different as its name."""
        for name in names:
            models.make_fine_tune(self.inflow / name, self.base, seed=sum(name.encode()))
        turns.look_at(self.merge, self.source, lambda _name, _seconds: None)

    def fold(self, *names: str) -> None:
        """Publish fine-tunes and fold all that may be folded now."""
        self.publish(*names)
        while turns.work_once(self.merge, {"team": self.source}):
            pass

    def roll(self, times: int = 1) -> None:
        """Tell the servers what is due, as if the time until the next attempt had passed, so many times."""
        for _ in range(times):
            self.merge.ledger.write("update outbox set next_try_at = 0")
            rollout.deliver(self.merge, self.servers)

    def take(self, *names: str) -> None:
        """Fold and tell."""
        self.fold(*names)
        self.roll()

    def set_rollout(self, **keys: Any) -> None:
        """Change how versions reach the servers."""
        self.merge.take(self.merge.config.model_copy(update={"rollout": Rollout(**keys)}))

    @property
    def versions(self) -> list[int | None]:
        """What the servers serve."""
        return [server.version for server in self.servers]

    @property
    def folded(self) -> list[str]:
        """What is in head, in order."""
        return [member.name for member in self.merge.head.fine_tunes]

    def state(self, name: str) -> str:
        """What became of a fine-tune."""
        return str(reports.match_fine_tune(self.merge.ledger.fine_tunes(), name)["state"])

    def states(self) -> list[str]:
        """What `status` says of the targets."""
        return [reports.target_status(self.merge.ledger, name)["state"] for name in NAMES]

    def on_disk(self) -> set[int]:
        """The numbers of the versions that are kept."""
        return {snapshots.number(path) for path in snapshots.folders(self.merge.store.snapshots)}

    def current(self) -> int:
        """The number of what is current."""
        path = snapshots.current(self.merge.store)
        assert path is not None
        return snapshots.number(path)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Three servers that serve version 0."""
    made = Fleet(tmp_path, "average")
    made.roll()
    assert made.versions == [0, 0, 0]
    yield made
    made.merge.ledger.close()


def test_every_target_is_told_in_order_and_serves_what_is_current(fleet: Fleet) -> None:
    """One after the other, with one delivery id for all attempts of one telling."""
    fleet.take("one")
    assert fleet.versions == [1, 1, 1]
    assert fleet.states() == ["confirmed"] * 3
    assert [server.told[-1].cause for server in fleet.servers] == ["fold"] * 3
    assert promote.verified(fleet.merge) == [1, 0]


def test_a_serving_process_is_told_of_the_newest_version_only(fleet: Fleet) -> None:
    """What came while it was away is passed over; a target that takes all gets all, in order."""
    away, takes_all = fleet.servers[1], fleet.servers[2]
    takes_all.takes_all = True
    away.away = takes_all.away = True
    fleet.take("one")
    fleet.fold("two", "three")
    away.away = takes_all.away = False
    fleet.roll()
    assert [told.version for told in away.told] == [0, 1, 3]
    assert [told.version for told in takes_all.told] == [0, 1, 1, 2, 3]
    assert len({told.delivery for told in takes_all.told}) == 4
    assert fleet.states() == ["confirmed"] * 3


def test_one_that_cannot_be_reached_says_nothing_about_a_version(fleet: Fleet) -> None:
    """It is told again for ever; the others are told all the same, and nothing is set aside."""
    fleet.servers[0].away = True
    fleet.take("one")
    fleet.roll(5)
    assert fleet.versions == [0, 1, 1]
    assert fleet.states() == ["failing", "confirmed", "confirmed"]
    assert (fleet.state("one"), fleet.current(), fleet.merge.held) == ("folded", 1, "")
    fleet.servers[0].away = False
    fleet.roll()
    assert fleet.versions == [1, 1, 1]


def test_one_wrong_answer_is_asked_again(fleet: Fleet) -> None:
    """A server that restarts in the middle answers wrong once."""
    fleet.servers[0].wrong_times = 1
    fleet.take("one")
    assert fleet.states()[0] == "wrong"
    fleet.roll()
    assert fleet.versions == [1, 1, 1]
    assert fleet.state("one") == "folded"


def test_a_version_that_is_served_wrong_is_taken_back_everywhere(fleet: Fleet) -> None:
    """The version that all had served is head, current and on every server; the culprit is set aside."""
    fleet.take("good")
    fleet.servers[1].refuses = {2}
    fleet.take("bad")
    fleet.roll(2)
    assert fleet.versions == [1, 1, 1]
    assert (fleet.merge.head.version, fleet.current()) == (1, 1)
    assert (fleet.state("bad"), fleet.state("good"), fleet.merge.held) == ("quarantined", "folded", "")
    row = reports.match_fine_tune(fleet.merge.ledger.fine_tunes(), "bad")
    assert row["reason"] == "answered-wrong"
    assert "second served version 1 right, and version 2 wrong: second refuses 000002" in row["detail"]
    taken = fleet.merge.ledger.snapshot(2)
    assert taken is not None
    assert taken["state"] == "rolled_back"
    assert taken["note"] in row["detail"]
    assert fleet.metrics.registry.get_sample_value(
        "streammerge_promotions_total", {"cause": "answered-wrong"}
    ) == 1.0  # fmt: skip
    fleet.take("next")
    assert fleet.folded == ["good", "next"]
    assert fleet.versions == [3, 3, 3]


def test_a_target_that_serves_nothing_right_is_to_blame_itself(fleet: Fleet) -> None:
    """Where it refuses the version before as well, nothing is taken back; it stays an open item."""
    fleet.take("good")
    fleet.servers[2].refuses = {1, 2}
    fleet.take("fine")
    fleet.roll(6)
    assert (fleet.current(), fleet.state("fine")) == (2, "folded")
    assert fleet.states() == ["confirmed", "confirmed", "wrong"]
    fleet.servers[2].refuses = set()
    fleet.roll()
    assert fleet.versions == [2, 2, 2]


def test_what_all_have_served_is_not_taken_back(fleet: Fleet) -> None:
    """A server that refuses later what it had served, after a restart, is to blame itself."""
    fleet.take("one")
    server = fleet.servers[0]
    server.serving, server.refuses = "launch", {1}
    fleet.merge.ledger.write("delete from served")
    rollout.look(fleet.merge, fleet.servers)
    fleet.roll(4)
    assert (fleet.current(), fleet.state("one"), fleet.states()[0]) == (1, "folded", "wrong")


def test_of_several_that_came_since_the_one_to_blame_names_itself(fleet: Fleet) -> None:
    """All are folded again, each only when all servers serve the one before; the innocent end up in."""
    fleet.take("good")
    fleet.fold("first", "culprit", "last")
    assert fleet.current() == 4
    fleet.servers[1].refuses = {4}  # it holds all three
    fleet.roll(2)
    assert (fleet.current(), fleet.folded) == (1, ["good"])
    assert {fleet.state(name) for name in ("first", "culprit", "last")} == {"pending"}
    culprit = next(r["digest"] for r in fleet.merge.ledger.fine_tunes() if r["name"] == "culprit")
    for _ in range(12):
        fleet.fold()
        head = fleet.merge.head
        fleet.servers[1].refuses = {head.version} if culprit in head.digests else set()
        fleet.roll()
    assert fleet.state("culprit") == "quarantined"
    assert sorted(fleet.folded) == ["first", "good", "last"]
    assert fleet.versions == [fleet.current()] * 3
    assert fleet.merge.held == ""


def test_nothing_is_folded_upon_a_suspect_that_is_not_proven(fleet: Fleet) -> None:
    """While a suspect is in head and not served by all within reach, the queue waits; then it goes on."""
    fleet.take("good")
    fleet.fold("a", "b")
    fleet.servers[0].refuses = {3}
    fleet.roll(2)
    assert fleet.folded == ["good"]
    fleet.fold()
    assert len(fleet.folded) == 2
    fleet.fold()
    assert len(fleet.folded) == 2
    fleet.roll()
    fleet.fold()
    assert sorted(fleet.folded) == ["a", "b", "good"]


def test_three_in_a_row_are_for_a_person(fleet: Fleet) -> None:
    """The third fine-tune that is set aside without one that was served in between holds the queue."""
    for number, name in enumerate(("a", "b", "c")):
        assert fleet.merge.held == ""
        fleet.fold(name)
        fleet.servers[0].refuses = {fleet.merge.head.version}
        fleet.roll(2)
        assert fleet.state(name) == "quarantined", number
    assert fleet.merge.held.startswith("3 fine-tunes in a row were not served right")
    fleet.fold("d")
    assert fleet.folded == []
    operations.resume(fleet.merge)
    fleet.servers[0].refuses = set()
    fleet.take()
    assert fleet.folded == ["d"]
    assert fleet.merge.ledger.fact("taken_back") == 0


def test_what_a_person_went_back_to_stays(fleet: Fleet) -> None:
    """After a rollback a wrong answer is an open item, and no reason to serve what was rolled back from."""
    fleet.take("one")
    fleet.take("two")
    fleet.servers[0].refuses = {1}
    fleet.merge.ledger.ask("rollback", {"version": 1})
    operations.work_off(fleet.merge)
    fleet.roll(6)
    assert (fleet.current(), fleet.state("two")) == (1, "denied")
    assert fleet.versions == [2, 1, 1]
    assert fleet.states() == ["wrong", "confirmed", "confirmed"]


def test_who_takes_all_is_not_told_any_more_of_what_was_gone_back_from(fleet: Fleet) -> None:
    """A version that it cannot serve does not stand in the way of the one that was gone back to."""
    for server in fleet.servers:
        server.takes_all = True
    fleet.take("one")
    fleet.servers[0].away = True
    fleet.take("two")
    fleet.merge.ledger.ask("rollback", {"version": 1})
    operations.work_off(fleet.merge)
    fleet.servers[0].away, fleet.servers[0].refuses = False, {2}
    fleet.roll()
    assert fleet.versions == [1, 1, 1]
    assert fleet.states() == ["confirmed"] * 3


def test_a_retraction_that_is_served_wrong_is_undone_and_held(fleet: Fleet) -> None:
    """Nothing was folded that could be set aside: a person is to look, and what was served is served."""
    fleet.take("one")
    fleet.take("two")
    fleet.merge.ledger.ask("retract", {"name": "one"})
    retracting.work_off(fleet.merge)
    fleet.servers[1].refuses = {3}
    fleet.roll(2)
    assert fleet.versions == [2, 2, 2]
    assert (fleet.state("one"), fleet.folded) == ("folded", ["one", "two"])
    assert fleet.merge.held.startswith("nothing was folded, and yet target second served version 2 right")


def test_a_replacement_that_is_served_wrong_leaves_the_older_revision_in(fleet: Fleet) -> None:
    """The new revision is set aside, and the one that it replaced is folded as before."""
    fleet.take("one")
    before = fleet.merge.head.digests
    models.make_fine_tune(fleet.inflow / "one", fleet.base, seed=77)
    turns.look_at(fleet.merge, fleet.source, lambda _name, _seconds: None)
    fleet.fold()
    assert fleet.merge.head.digests != before
    fleet.servers[1].refuses = {2}
    fleet.roll(2)
    assert fleet.merge.head.digests == before
    states = sorted(row["state"] for row in fleet.merge.ledger.fine_tunes())
    assert states == ["folded", "quarantined"]


# Canary first


def test_the_canary_serves_alone_until_it_has_soaked(fleet: Fleet) -> None:
    """The others are told when its time is over and it is found to serve the version still."""
    fleet.set_rollout(soak=LONG)
    fleet.take("one")
    assert fleet.versions == [1, 0, 0]
    fleet.roll(2)
    assert fleet.versions == [1, 0, 0]
    fleet.merge.ledger.write("update outbox set done_at = done_at - ?", 2 * LONG)
    fleet.roll()
    assert fleet.versions == [1, 1, 1]


def test_a_canary_that_fails_while_it_soaks_keeps_the_version_from_the_others(fleet: Fleet) -> None:
    """It is told again and refuses: the version is taken back before any other server had it."""
    fleet.set_rollout(soak=LONG)
    fleet.take("one")
    fleet.servers[0].serving, fleet.servers[0].refuses = "launch", {1}
    fleet.merge.ledger.write("update outbox set done_at = done_at - ?", 2 * LONG)
    fleet.roll(3)
    assert fleet.versions == [0, 0, 0]
    assert fleet.state("one") == "quarantined"
    assert [told.version for told in fleet.servers[2].told] == [0, 0]


def test_going_back_waits_for_no_canary(fleet: Fleet) -> None:
    """A rollback reaches all servers at once."""
    fleet.take("one")
    fleet.set_rollout(soak=LONG, max_unavailable=0)
    fleet.servers[0].away = True
    fleet.merge.ledger.ask("rollback", {})
    operations.work_off(fleet.merge)
    fleet.roll()
    assert fleet.versions == [1, 0, 0]


def test_a_version_stops_where_too_many_are_unavailable(fleet: Fleet) -> None:
    """With more failing than `max_unavailable`, those that are left keep what they serve."""
    fleet.set_rollout(max_unavailable=0)
    fleet.servers[0].away = True
    fleet.take("one")
    assert fleet.versions == [0, 0, 0]
    fleet.set_rollout(max_unavailable=1)
    fleet.roll()
    assert fleet.versions == [0, 1, 1]


# Is it still so?


def test_a_server_that_restarted_with_other_weights_is_told_again(fleet: Fleet) -> None:
    """It is asked what it serves; until it serves what is current, nobody says that it does."""
    fleet.take("one")
    fleet.servers[1].serving = "launch"
    rollout.look(fleet.merge, fleet.servers)
    assert fleet.states() == ["confirmed"] * 3  # it was asked lately
    fleet.merge.ledger.write("update served set asked_at = 0")
    rollout.look(fleet.merge, fleet.servers)
    found = reports.target_status(fleet.merge.ledger, "second")
    assert (found["state"], found["snapshot"], found["open"]) == ("telling", None, 1)
    turns.refresh(fleet.merge)
    assert matches(fleet, "second") == 0.0
    assert matches(fleet, "third") == 1.0
    fleet.roll()
    turns.refresh(fleet.merge)
    assert fleet.versions == [1, 1, 1]
    assert matches(fleet, "second") == 1.0


def matches(fleet: Fleet, target: str) -> float | None:
    """Read streammerge_served_snapshot_matches."""
    return fleet.metrics.registry.get_sample_value("streammerge_served_snapshot_matches", {"target": target})


def test_one_that_cannot_be_asked_is_not_said_to_serve(fleet: Fleet) -> None:
    """It may be told nothing new, and yet be away."""
    fleet.take("one")
    fleet.servers[2].away = True
    fleet.merge.ledger.write("update served set asked_at = 0")
    rollout.look(fleet.merge, fleet.servers)
    turns.refresh(fleet.merge)
    assert fleet.states() == ["confirmed", "confirmed", "unreachable"]
    assert matches(fleet, "third") == 0.0


def test_a_target_that_is_configured_again_is_told_of_what_is_current(fleet: Fleet) -> None:
    """What it was told of before it went is no reason not to tell it."""
    config, gone = fleet.merge.config, fleet.servers.pop()
    fleet.merge.take(config.model_copy(update={"targets": config.targets[:2]}))
    fleet.take("one")
    fleet.merge.take(config)
    fleet.servers.append(gone)
    fleet.roll()
    assert fleet.versions == [1, 1, 1]


def test_a_telling_that_was_dropped_with_its_target_is_taken_up_again(
    fleet: Fleet,
) -> None:
    """When the target is configured again, nothing else has been promoted."""
    config, gone = fleet.merge.config, fleet.servers[2]
    gone.away = True
    fleet.take("one")
    fleet.merge.take(config.model_copy(update={"targets": config.targets[:2]}))
    rollout.deliver(fleet.merge, fleet.servers[:2])
    fleet.merge.take(config)
    gone.away = False
    fleet.roll()
    assert fleet.versions == [1, 1, 1]


def test_a_server_that_has_the_right_label_and_answers_wrong_is_not_said_to_serve(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Its probe is asked as well; nothing claims that it serves until it answers right."""
    sign = tmp_path / "sign"
    sign.touch()
    config = fleet.merge.config
    first = config.targets[0].model_copy(update={"probe": Probe(argv=("test", "-e", str(sign)), timeout=5.0)})
    fleet.merge.take(config.model_copy(update={"targets": (first, *config.targets[1:])}))
    fleet.take("one")
    sign.unlink()
    fleet.merge.ledger.write("update served set asked_at = 0")
    rollout.look(fleet.merge, fleet.servers)
    fleet.roll()
    turns.refresh(fleet.merge)
    assert (fleet.states()[0], matches(fleet, "canary"), fleet.current()) == ("wrong", 0.0, 1)
    sign.touch()
    fleet.roll()
    turns.refresh(fleet.merge)
    assert (fleet.states()[0], matches(fleet, "canary")) == ("confirmed", 1.0)


# The account


def test_the_time_from_publication_is_measured_for_each_fine_tune_and_target(fleet: Fleet) -> None:
    """Also for those that are served first by a later version, because the server was away."""
    fleet.servers[0].away = True
    fleet.take("one")
    fleet.fold("two")
    fleet.servers[0].away = False
    fleet.roll()
    count = fleet.metrics.registry.get_sample_value
    for name in NAMES:
        assert count("streammerge_publish_to_serve_seconds_count", {"target": name}) == 2.0
    for stage in ("announce", "queue", "fetch", "fold", "render", "seal", "gate"):
        assert count("streammerge_stage_duration_seconds_count", {"stage": stage}), stage


def test_show_says_who_confirmed_a_version_and_when(fleet: Fleet) -> None:
    """In the order in which they did."""
    fleet.take("one")
    found = reports.show(fleet.merge.store, fleet.merge.ledger, "1")
    assert [served["target"] for served in found["served"]] == list(NAMES)
    assert all(served["at"] for served in found["served"])
    json.dumps(found)


def test_what_a_target_serves_is_not_removed(fleet: Fleet) -> None:
    """Nor is the newest version that all have served: it may have to be put back."""
    fleet.take("one")
    fleet.servers[0].away = True
    config = fleet.merge.config
    fleet.merge.take(config.model_copy(update={"keep": 1, "grace": 0.0, "keep_spaced": 0}))
    for name in ("two", "three", "four"):
        fleet.take(name)
    operations.gc(fleet.merge)
    assert {1, 4} <= fleet.on_disk()
    assert 2 not in fleet.on_disk()


def test_the_newest_version_that_all_have_served_is_not_removed(fleet: Fleet) -> None:
    """Even where each target has served a newer one: it may have to be put back."""
    config = fleet.merge.config
    fleet.take("one")
    fleet.merge.take(config.model_copy(update={"keep": 1, "grace": 0.0, "keep_spaced": 0}))
    fleet.servers[1].wrong_times = fleet.servers[2].wrong_times = 1
    fleet.take("two")  # the first has it
    fleet.servers[0].wrong_times = 1
    fleet.take("three")  # the other two have it
    operations.gc(fleet.merge)
    assert {1, 2, 3} <= fleet.on_disk()
    fleet.roll()
    operations.gc(fleet.merge)
    assert fleet.on_disk() == {3}
