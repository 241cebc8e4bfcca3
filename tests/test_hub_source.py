"""Repositories of a Hub as a source: what is taken, at what cost, and what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import hubs
import models
import pytest
import torch
from benches import sha256
from daemons import Site, until
from hubs import BASE, CARD, LISTING, Desk, Files, card, delta, files_of
from safetensors.torch import save

from streammerge import configfile, recovery
from streammerge.config import Config
from streammerge.credentials import read as read_secret
from streammerge.devhub import DevHub
from streammerge.errors import ConfigError, TryAgain
from streammerge.origin import bring_base
from streammerge.sources import hub as hub_source
from streammerge.weights import identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DAY = 86400.0
TOKEN = "hf_made_up_for_tests"
SECRET = "a-secret-for-webhooks"


class Clock:
    """A clock that goes when it is told to, beginning with today."""

    def __init__(self) -> None:
        self.at = time.time()

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    """The hub's clock, and the source's where a test says so."""
    return Clock()


@pytest.fixture
def hub(tmp_path: Path, clock: Clock) -> Iterator[DevHub]:
    """An empty hub; where it has private models, TOKEN reads them."""
    with DevHub(tmp_path / "hub", token=TOKEN, clock=clock) as running:
        yield running


def meta(hub: DevHub, *names: str, text: str = CARD) -> None:
    """Publish repositories that are made of a card alone."""
    for name in names:
        hub.publish(name, {"README.md": text})


# ---------------------------------------------------------------------------------------------------- queries


def test_what_is_left_out_is_listed_with_its_rule(hub: DevHub, tmp_path: Path) -> None:
    """Every rule of the configuration leaves out what it should, says so, and nothing else is left out."""
    rules: dict[str, Any] = {
        "names": ["team/*", "other/*"], "ignore": ["*/scratch-*"], "tags": ["chosen"],
        "without_tags": ["nsfw"], "gated": "ignore", "private": "ignore", "max_bytes": "20kB",
        "relations": ["finetune", "adapter"],
    }  # fmt: skip
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    with Desk(tmp_path / "desk", hub, source={**rules, "token_file": tmp_path / "token"}) as desk:
        good = card(tags=["chosen"])
        desk.publish("team/good", 1, good)
        desk.publish("stranger/names", 2, good)
        desk.publish("team/scratch-ignore", 3, good)
        desk.publish("team/tags", 4)
        desk.publish("team/without_tags", 5, card(tags=["chosen", "nsfw"]))
        desk.publish("team/gated", 6, good)
        hub.mark("team/gated", gated="auto")
        desk.publish("team/private", 7, good)
        hub.mark("team/private", private=True)
        desk.publish("team/max_bytes", 8, good, **{"more.safetensors": os.urandom(1 << 16)})
        desk.publish("team/merged", 9, card(tags=["chosen"], base_model_relation="merge"))
        desk.publish("else/base", 10, card(base_model="other/base"))
        desk.settle()
        assert desk.states() == {
            "team/good": "folded",
            "stranger/names": "ignored names",
            "team/scratch-ignore": "ignored ignore",
            "team/tags": "ignored tags",
            "team/without_tags": "ignored without_tags",
            "team/gated": "ignored gated",
            "team/private": "ignored private",
            "team/max_bytes": "ignored max_bytes",
        }, "merges and other bases' are not even in the listings"
        assert desk.rows()["team/max_bytes"]["detail"].startswith("it has ")


def test_authors_and_single_repositories(hub: DevHub, tmp_path: Path) -> None:
    """Without a lineage tag authors' and named repositories are taken; what is no fine-tune is left out."""
    source = {"base_models": [], "authors": ["team"], "repos": ["other/one", "other/merged", "other/none"]}
    with Desk(tmp_path / "desk", hub, source=source) as desk:
        desk.publish("team/a", 1, "no card")
        desk.publish("other/one", 2, "no card")
        desk.publish("other/two", 3, "no card")
        desk.publish("other/merged", 4, card(base_model_relation="merge"))
        desk.publish("team/quantized", 5, card(base_model_relation="quantized"))
        desk.settle()
        assert desk.states() == {
            "team/a": "folded",
            "other/one": "folded",
            "other/merged": "ignored relation",
            "team/quantized": "ignored relation",
            "other/none": "waiting",
        }
        assert "give a token" in desk.rows()["other/none"]["detail"], "it may be private"
        desk.publish("other/none", 6, "no card")
        assert desk.settle()["other/none"]["state"] == "folded", "named before it was there"


def test_both_relations_are_asked_for_by_default(hub: DevHub, tmp_path: Path) -> None:
    """Full weights and adapters are two listings."""
    with Desk(tmp_path / "desk", hub, source={"relations": ["finetune", "adapter"]}) as desk:
        desk.look()
        asked = [seen.query.split("&")[0] for seen in hub.requests(LISTING)]
        assert asked == [f"filter=base_model%3A{r}%3Aorg%2Fbase" for r in ("finetune", "adapter")]


def test_a_revision_must_be_of_age(hub: DevHub, tmp_path: Path) -> None:
    """With min_age a new commit is seen at once, says until when it waits, and is fetched after that."""
    with Desk(tmp_path / "desk", hub, source={"min_age": "1h"}) as desk:
        desk.publish("team/a", 1)
        row = desk.settle()["team/a"]
        assert (row["state"], row["step"]) == ("pending", "announced")
        assert "min_age" in row["detail"]
        ready = desk.merge.ledger.fine_tunes("pending")[0]["next_try_at"]
        assert abs(ready - time.time() - 3600) < 60
        desk.wait_over()
        assert desk.settle()["team/a"]["state"] == "folded"


def test_only_so_many_a_day(hub: DevHub, tmp_path: Path) -> None:
    """With max_per_day the others wait their turn, a day after those before them; none is lost."""
    with Desk(tmp_path / "desk", hub, source={"max_per_day": 2}) as desk:
        for number in range(5):
            desk.publish(f"team/m{number}", number + 1)
        desk.settle()
        assert len(desk.folded) == 2
        waits = sorted(row["next_try_at"] - time.time() for row in desk.merge.ledger.fine_tunes("pending"))
        assert [round(wait / DAY) for wait in waits] == [1, 1, 2]
        desk.wait_over()
        desk.work()
        assert len(desk.folded) == 5


def test_first_run_ignore_takes_only_what_comes_later(hub: DevHub, tmp_path: Path, clock: Clock) -> None:
    """What is there at the first look is left out for good; new weights, in old repositories too, are not.

    The hub's own clock decides, whatever ours says.
    """
    clock.at -= 3 * 3600
    source = {"first_run": "ignore", "repos": ["single/old"]}
    with Desk(tmp_path / "desk", hub, source=source) as desk:
        for number, name in enumerate(("team/old", "team/renewed", "single/old"), 1):
            desk.publish(name, number, CARD if name.startswith("team") else "no card")
        desk.look()
        wanted = dict.fromkeys(("team/old", "team/renewed", "single/old"), "ignored first_run")
        assert desk.states() == wanted
        desk.publish("team/new", 3)
        desk.publish("team/renewed", 4)
        hub.publish("team/old", {"README.md": CARD + "edited"})
        hub.publish("single/old", {"README.md": "edited"})
        desk.restart()
        desk.settle()
        assert desk.states() == {**wanted, "team/new": "folded", "team/renewed": "folded"}


def test_first_run_since_looks_at_the_weights(hub: DevHub, tmp_path: Path, clock: Clock) -> None:
    """What was published before the day is left out, be its README edited after it or not."""
    today, clock.at = clock.at, clock.at - 10 * DAY
    since = time.strftime("%Y-%m-%d", time.gmtime(today - 5 * DAY))
    with Desk(tmp_path / "desk", hub, source={"first_run": {"since": since}}) as desk:
        desk.publish("team/old", 1)
        desk.publish("team/edited", 2)
        desk.publish("team/renewed", 3)
        clock.at = today
        hub.publish("team/edited", {"README.md": CARD + "edited"})
        desk.publish("team/renewed", 4)
        desk.publish("team/new", 5)
        desk.settle()
        assert desk.states() == {
            "team/old": "ignored first_run",
            "team/edited": "ignored first_run",
            "team/renewed": "folded",
            "team/new": "folded",
        }


def test_first_run_must_be_said(tmp_path: Path) -> None:
    """A Hub has more than a folder: what to do with it all is asked, not guessed."""
    site = Site(tmp_path)
    part = {key: value for key, value in hubs.SOURCE.items() if key != "first_run"}
    site.configure(sources=[part])
    with pytest.raises(ConfigError, match="first_run"):
        configfile.load(site.config)


# ------------------------------------------------------------------------------------------ what a poll costs


def test_a_poll_costs_one_request(hub: DevHub, tmp_path: Path) -> None:
    """When nothing changed a look is one request: with folded, refused, left out and waiting ones there."""
    with Desk(tmp_path / "desk", hub, source={"ignore": ["*/left"]}) as desk:
        desk.publish("team/a", 1)
        desk.publish("team/left", 2)
        meta(hub, "team/empty")
        hub.publish("team/pickled", {"README.md": CARD, "pytorch_model.bin": b"x"})
        desk.publish("team/gated", 3)
        hub.mark("team/gated", gated="manual")
        desk.settle()
        assert desk.states() == {
            "team/a": "folded", "team/left": "ignored ignore", "team/empty": "waiting",
            "team/pickled": "refused pickle-only", "team/gated": "waiting",
        }  # fmt: skip
        for _ in range(3):
            before = hub.count()
            desk.look()
            assert hub.count() == before + 1


def test_an_edited_readme_is_no_fine_tune(hub: DevHub, tmp_path: Path) -> None:
    """Another commit with the same weights costs one request for its repository, once, and no more."""
    with Desk(tmp_path / "desk", hub) as desk:
        commit = desk.publish("team/a", 1)
        desk.publish("team/b", 2)
        desk.settle()
        hub.publish("team/a", {"README.md": CARD + "edited", "notes.txt": "new"})
        for requests in (2, 1):
            before = hub.count()
            desk.settle()
            assert hub.count() == before + requests
        rows = desk.merge.ledger.fine_tunes()
        assert [(row["name"], row["revision"]) for row in rows][:1] == [("team/a", commit)]
        assert len(rows) == 2


def test_a_long_listing_is_walked_to_its_mark(tmp_path: Path, clock: Clock) -> None:
    """Of 10,000 repositories only the latest changes are read again, after a restart too."""
    clock.at -= 30 * DAY
    size, steps = 10_000, 200.0
    with DevHub(tmp_path / "hub", clock=clock) as hub:
        meta(hub, "team/m0")
        pattern = hub.store.get("team/m0")
        written = json.dumps(pattern.to_json())
        for number in range(1, size):
            clock.at += steps
            text = written.replace("team/m0", f"team/m{number}").replace(pattern.updated_at, hub.store.now())
            copy = type(pattern).from_json(json.loads(text))
            hub.store.repositories[copy.id] = copy
        with Desk(tmp_path / "desk", hub, source={"names": ["new/*"], "timeout": "60s"}) as desk:
            desk.look()
            assert hub.count() == 10
            assert len(desk.rows()) == size
            desk.look()
            assert hub.count() == 10 + 1, "the mark, not the end"
            desk.publish("new/a", 1)
            desk.restart()
            hub.faults.forget()
            desk.look()
            assert hub.count() == 2, "one page, and one new repository"
            assert desk.states()["new/a"] == "pending"


def test_a_look_that_is_cut_short_keeps_what_it_saw(hub: DevHub, tmp_path: Path) -> None:
    """A rate limit in the middle of many new repositories costs none of them, and no request twice."""
    with Desk(tmp_path / "desk", hub) as desk:
        for number in range(6):
            desk.publish(f"team/m{number}", number + 1)
        hub.fault("/revision/main", "429", after=4, count=1, seconds=2)
        soon = desk.look()
        assert len(desk.rows()) == 4
        assert 0.5 < soon[0] <= 2.0
        assert "rate limit" in desk.try_to_look()
        assert hub.count("/revision/main") == 5
        time.sleep(2.0)
        desk.settle()
        assert len(desk.folded) == 6
        assert hub.count("/revision/main") == 5 + 2


def test_one_repository_that_fails_stops_no_other(hub: DevHub, tmp_path: Path, clock: Clock) -> None:
    """It is asked about again by name, after a restart too, while the listing's mark goes on."""
    with Desk(tmp_path / "desk", hub) as desk:
        clock.at -= DAY
        for name in ("broken", "a", "c"):
            desk.publish(f"team/{name}", ord(name[0]))
            clock.at += 3600
        hub.fault("/team/broken/revision", "500")
        assert desk.look()
        assert set(desk.rows()) == {"team/a", "team/c"}
        assert desk.state_of_source() == "ok"
        desk.restart()
        hub.faults.clear()
        desk.settle()
        assert sorted(desk.folded) == ["team/a", "team/broken", "team/c"]


def test_a_date_to_come_hides_nothing(hub: DevHub, tmp_path: Path) -> None:
    """One repository that says it changed a hundred years from now does not end all later listings."""
    with Desk(tmp_path / "desk", hub) as desk:
        desk.publish("team/future", 1)
        hub.store.get("team/future").updated_at = "2126-01-01T00:00:00.000Z"
        desk.settle()
        desk.publish("team/present", 2)
        desk.settle()
        assert sorted(desk.folded) == ["team/future", "team/present"]


# ---------------------------------------------------------------------------------------- identity by content


def test_the_same_weights_elsewhere_are_a_duplicate(hub: DevHub, tmp_path: Path) -> None:
    """Another repository with the same weights is refused, whatever else is in it."""
    with Desk(tmp_path / "desk", hub) as desk:
        desk.publish("team/a", 1)
        desk.publish("team/copy", 1, CARD + "mine!", **{"config.json": '{"other": 1}'})
        desk.settle()
        assert desk.states() == {"team/a": "folded", "team/copy": "refused duplicate"}


def test_a_branch_that_moved_is_resolved_anew(hub: DevHub, tmp_path: Path) -> None:
    """Back to an earlier commit before the fold: that one is folded. Back after it: not a second time."""
    with Desk(tmp_path / "desk", hub, on_update="add") as desk:
        first = desk.publish("team/a", 1)
        desk.look()
        second = desk.publish("team/a", 2)
        desk.look()
        hub.move("team/a", first)
        desk.settle()
        assert [member.revision for member in desk.merge.head.fine_tunes] == [first]
        hub.move("team/a", second)
        desk.settle()
        hub.move("team/a", first)
        desk.settle()
        assert [member.revision for member in desk.merge.head.fine_tunes] == [first, second]


@pytest.mark.parametrize("when", ["pending", "folded"])
def test_a_squashed_history_loses_nothing(hub: DevHub, tmp_path: Path, when: str) -> None:
    """A commit that is gone is looked for anew; the same weights are neither lost nor folded twice."""
    with Desk(tmp_path / "desk", hub) as desk:
        desk.publish("team/a", 1)
        desk.look()
        if when == "folded":
            desk.work()
        squashed = hub.squash("team/a")
        for _ in range(3):
            desk.settle()
        assert desk.folded == ["team/a"]
        if when == "pending":
            assert [member.revision for member in desk.merge.head.fine_tunes] == [squashed]


# ------------------------------------------------------------------------------------------ every file proven


def test_a_file_damaged_at_its_place_is_refused_and_the_queue_goes_on(hub: DevHub, tmp_path: Path) -> None:
    """Right size, wrong content: `corrupted`, with what to do; uploaded again it is folded."""
    with Desk(tmp_path / "desk", hub) as desk:
        desk.publish("team/bad", 1)
        stored = hub.store.blob(hub.store.get("team/bad").find("main").files["model.safetensors"].sha256)
        whole = stored.read_bytes()
        stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        desk.publish("team/good", 2)
        desk.settle()
        assert desk.states() == {"team/bad": "refused corrupted", "team/good": "folded"}
        assert "upload the file again" in desk.rows()["team/bad"]["detail"]
        assert list(desk.merge.store.inbox.iterdir()) == []
        desk.publish("team/bad", 3)
        assert desk.settle()["team/bad"]["state"] == "folded"


def test_what_flips_on_the_way_is_folded_unharmed(hub: DevHub, tmp_path: Path) -> None:
    """The digest of what is folded is that of what was published."""
    with Desk(tmp_path / "desk", hub) as desk:
        hub.fault("/resolve/.*safetensors", "flip", count=2)
        desk.publish("team/a", 1)
        models.save(tmp_path / "same", delta(desk.base, 1))
        desk.settle()
        assert hub.count("/resolve/.*safetensors") == 3
        assert desk.merge.head.digests == [identity(tmp_path / "same")]


def test_a_cut_fetch_is_gone_on_from_at_the_next_try(hub: DevHub, tmp_path: Path) -> None:
    """What came before the Hub went away is not asked for again, even by another process."""
    with Desk(tmp_path / "desk", hub) as desk:
        desk.publish("team/a", 1)
        desk.look()
        hub.fault("/resolve/.*safetensors", "cut", count=1)
        hub.fault("/resolve/.*safetensors", "500")
        assert desk.fetch()
        row = desk.rows()["team/a"]
        assert (row["state"], row["attempts"]) == ("pending", 1)
        desk.restart()
        hub.faults.clear()
        hub.faults.forget()
        desk.wait_over()
        desk.work()
        size = len(save(delta(desk.base, 1), metadata={"format": "pt"}))
        [asked] = hub.requests("/resolve/.*safetensors")
        assert asked.range == f"bytes={size // 2}-"
        assert desk.folded == ["team/a"]


def test_a_daemon_killed_in_a_download_goes_on_from_there(tmp_path: Path) -> None:
    """kill -9 in the middle of a slow download: the next start asks for the rest alone."""
    big = {"model.embed_tokens.weight": torch.randn(1000, 500)}
    with DevHub(tmp_path / "hub") as hub:
        part = {**hubs.SOURCE, "endpoint": hub.url, "timeout": "5s"}
        site = Site(tmp_path / "site", big, method="average", sources=[part])
        hub.publish("team/a", files_of(delta(big, 1)))
        hub.fault("/resolve/.*safetensors", "slow", count=1, seconds=20)
        inbox = site.store / "inbox"
        with site.daemon(code=None) as daemon:
            until(lambda: sum(p.stat().st_size for p in inbox.rglob("*.safetensors")) > 200_000, "some bytes")
            daemon.process.send_signal(signal.SIGKILL)
            daemon.process.wait()
        with site.daemon() as daemon:
            daemon.until_state({"team/a": "folded"})
        first, second = hub.requests("/resolve/.*safetensors")
        assert not first.range
        assert int(second.range.removeprefix("bytes=").rstrip("-")) > 100_000
        assert second.status == 206


def test_a_superseded_download_leaves_nothing(hub: DevHub, tmp_path: Path) -> None:
    """A newer revision that comes while the older one is fetched takes its place, and its files go."""
    with Desk(tmp_path / "desk", hub) as desk:
        desk.publish("team/a", 1)
        desk.look()
        fetch, source = desk.source.fetch, desk.source

        def meanwhile(name: str, revision: str, into: Path, room: Callable[[int], None]) -> None:
            fetch(name, revision, into, room)
            source.fetch = fetch  # type: ignore[method-assign]
            desk.publish("team/a", 2)
            desk.look()

        source.fetch = meanwhile  # type: ignore[method-assign]
        assert desk.fetch()
        assert list(desk.merge.store.inbox.iterdir()) == []
        desk.work()
        assert len(desk.folded) == 1


def test_not_more_is_fetched_than_is_folded(hub: DevHub, tmp_path: Path) -> None:
    """Fetching runs ahead of folding by little: the inbox must not take the room that a fold needs."""
    with Desk(tmp_path / "desk", hub) as desk:
        for number in range(5):
            desk.publish(f"team/m{number}", number + 1)
        desk.look()
        while desk.fetch():
            pass
        assert len(list(desk.merge.store.inbox.iterdir())) == 2
        desk.work()
        assert len(desk.folded) == 5


# ------------------------------------------------------------------------------------------- a Hub that fails


@pytest.mark.parametrize("style", ["ratelimit", "retry-after"])
def test_a_rate_limit_is_obeyed_by_looks_and_fetches(hub: DevHub, tmp_path: Path, style: Any) -> None:
    """After a 429 the source asks for nothing until it may, and no fine-tune is blamed for it."""
    with Desk(tmp_path / "desk", hub) as desk:
        for number in range(3):
            desk.publish(f"team/m{number}", number + 1)
        desk.look()
        hub.fault("/resolve/", "429", count=1, seconds=2, style=style)
        hub.faults.forget()
        while desk.fetch():
            pass
        assert "rate limit" in desk.try_to_look()
        assert hub.count() == 2, "what a fetch asks first, and the 429"
        assert {row["attempts"] for row in desk.rows().values()} == {0}
        time.sleep(2.0)
        desk.settle()
        assert len(desk.folded) == 3


def test_the_daemon_goes_on_while_the_hub_does_not(tmp_path: Path) -> None:
    """Hanging, failing, gone: a folder beside it is folded meanwhile, and what is served stays.

    The source's state and its metric tell; back again, it goes on by itself.
    """
    dev = DevHub(tmp_path / "hub")
    dev.start()
    site = Site(tmp_path / "site", method="average")
    part = {**hubs.SOURCE, "endpoint": dev.url, "timeout": "300ms"}
    site.configure(sources=[*site.keys["sources"], part])
    try:
        dev.publish("hub/a", files_of(delta(site.base, 1)))
        dev.fault("/resolve/", "hang", count=3, seconds=1)
        with site.daemon() as daemon:

            def up() -> float:
                return daemon.metric("streammerge_source_up", source="hub")

            site.publish("b", 2)
            daemon.until_state({"b": "folded"})
            daemon.until_state({"hub/a": "folded"})
            assert up() == 1
            for secret in ("", "any", None):
                assert post(site, {"repo": {"name": "hub/a"}}, secret) == 403, "none is configured"
            served = sha256(site.store / "current" / "model" / "model.safetensors")
            dev.fault(".", "hang", seconds=30)
            until(lambda: up() == 0, "the source is down")
            dev.stop()

            def state() -> Any:
                return {row["name"]: row for row in daemon.ask("status")["sources"]}["hub"]

            until(lambda: "cannot be reached" in (state()["error"] or ""), "connections are refused")
            assert state()["state"] == "error"
            assert state()["last_success"]
            assert sha256(site.store / "current" / "model" / "model.safetensors") == served
            began = time.monotonic()
            site.publish("c", 3)
            daemon.until_state({"c": "folded"})
            assert time.monotonic() - began < 10
            dev.faults.clear()
            dev.start()
            dev.publish("hub/d", files_of(delta(site.base, 4)))
            daemon.until_state({"hub/d": "folded", "hub/a": "folded"})
            assert up() == 1
            assert sorted(site.served) == ["b", "c", "hub/a", "hub/d"]
            assert daemon.events("source.unreachable")
            assert daemon.events("source.reachable")
    finally:
        dev.stop()


# ------------------------------------------------------------------------------- what vanishes or is withheld


def test_what_is_withheld_waits_and_comes_back(hub: DevHub, tmp_path: Path, clock: Clock) -> None:
    """Gated, disabled and deleted before the fetch are states of theirs, no errors; access brings them in."""
    with Desk(tmp_path / "desk", hub, clock=clock) as desk:
        for number, name in enumerate(("gated", "disabled", "private", "good"), 1):
            desk.publish(f"team/{name}", number)
        desk.look()
        hub.mark("team/gated", gated="manual")
        hub.mark("team/disabled", disabled=True)
        hub.mark("team/private", private=True)
        desk.settle()
        wanted = {
            "team/gated": "waiting gated", "team/disabled": "waiting disabled",
            "team/private": "gone gone", "team/good": "folded",
        }  # fmt: skip
        assert desk.states() == wanted
        for _ in range(2):
            desk.settle()
            assert desk.states().keys() == wanted.keys()
            assert desk.state_of_source() == "ok"
        hub.mark("team/gated", gated=False)
        hub.mark("team/disabled", disabled=False)
        hub.mark("team/private", private=False)
        before = hub.count("/(gated|disabled)/revision/")
        desk.settle()
        assert hub.count("/(gated|disabled)/revision/") == before, "asked every hour, not at every look"
        assert desk.states()["team/private"] == "folded", "it is new in the listing"
        clock.at += hub_source.RECHECK_SECONDS
        desk.settle()
        assert set(desk.states().values()) == {"folded"}


def test_gated_from_the_beginning(hub: DevHub, tmp_path: Path, clock: Clock) -> None:
    """It waits, for as long as it takes, and says where to ask and that a token is missing."""
    with Desk(tmp_path / "desk", hub, clock=clock, incomplete_after="0s") as desk:
        desk.publish("team/gated", 1)
        hub.mark("team/gated", gated="auto")
        for _ in range(3):
            row = desk.settle()["team/gated"]
            clock.at += hub_source.RECHECK_SECONDS
            assert row["state"] == "waiting"
        assert f"{hub.url}/team/gated" in row["detail"]
        assert "token_file" in row["detail"]
        hub.mark("team/gated", gated=False)
        assert desk.settle()["team/gated"]["state"] == "folded"


@pytest.mark.parametrize("change", [{"gated": "manual"}, {"disabled": True}, {"private": True}, {}])
def test_what_vanishes_after_the_fold_stays_in(hub: DevHub, tmp_path: Path, change: dict[str, Any]) -> None:
    """Nothing that a Hub does with a repository takes anything out of the merge."""
    with Desk(tmp_path / "desk", hub, source={"repos": ["team/a"]}) as desk:
        desk.publish("team/a", 1)
        desk.settle()
        served = desk.served
        if change:
            hub.mark("team/a", **change)
        else:
            hub.store.delete("team/a")
        for _ in range(2):
            desk.settle()
        assert desk.states() == {"team/a": "folded"}
        assert desk.served == served
        assert desk.state_of_source() == "ok"


def test_a_named_repository_that_comes_back_is_taken_up(hub: DevHub, tmp_path: Path, clock: Clock) -> None:
    """One of `repos` that vanishes before its fetch is gone, and pending again once it is back."""
    with Desk(tmp_path / "desk", hub, source={"repos": ["team/a"]}, clock=clock) as desk:
        desk.publish("team/a", 1)
        desk.look()
        hub.mark("team/a", private=True)
        desk.look()
        assert desk.states() == {"team/a": "gone"}
        hub.mark("team/a", private=False)
        clock.at += hub_source.RECHECK_SECONDS
        assert desk.settle()["team/a"]["state"] == "folded"


# --------------------------------------------------------------------------------------------------- refusals


def test_every_refusal_has_its_reason_and_the_rest_goes_on(hub: DevHub, tmp_path: Path) -> None:
    """What is no fine-tune of this base is refused in its own word; those before and after are folded."""
    source = {"repos": ["team/other-base"]}
    with Desk(tmp_path / "desk", hub, source=source) as desk:
        base = desk.base
        desk.publish("team/first", 1)
        hub.publish("team/pickled", {"README.md": CARD, "pytorch_model.bin": b"\x80\x04."})
        vocabulary = delta(base, 2) | {models.EMBEDDING: torch.randn(44, 16)}
        hub.publish("team/resized", files_of(vocabulary))
        hub.publish("team/new-head", files_of(delta(base, 3) | {"classifier.weight": torch.randn(2, 16)}))
        desk.publish("team/other-base", 4, "---\nbase_model: other/base\n---\n")
        hub.publish("team/liar", files_of({"something.else": torch.randn(8, 8)}))
        index = json.dumps({"weight_map": {models.SQUARE: "../../outside.safetensors"}})
        desk.publish("team/index", 5, **{models.INDEX: index})
        index = json.dumps({"weight_map": {models.SQUARE: "model-00002-of-00002.safetensors"}})
        desk.publish("team/half", 6, **{models.INDEX: index})
        whole = save(delta(base, 7))
        hub.publish("team/truncated", {"README.md": CARD, "model.safetensors": whole[:-100]})
        desk.publish("team/own", 8, **{"streammerge.json": "{}"})
        hub.publish("team/zero", files_of(base))
        desk.publish("team/last", 9)
        desk.settle()
        assert desk.states() == {
            "team/first": "folded",
            "team/pickled": "refused pickle-only",
            "team/resized": "refused vocab-resized",
            "team/new-head": "refused unknown-weights",
            "team/other-base": "refused wrong-base",
            "team/liar": "refused wrong-base",
            "team/index": "refused malformed",
            "team/half": "refused incomplete",
            "team/truncated": "refused incomplete",
            "team/own": "refused own-merge",
            "team/zero": "refused zero-delta",
            "team/last": "folded",
        }
        assert hub.count("/team/(pickled|other-base|own)/resolve/") == 0, "known without fetching"
        assert all(row["detail"] for row in desk.rows().values() if row["state"] == "refused")


def test_what_is_mended_by_its_card_is_taken(hub: DevHub, tmp_path: Path) -> None:
    """A wrong base_model that is put right by editing the README alone is judged anew."""
    with Desk(tmp_path / "desk", hub, source={"repos": ["team/a"]}) as desk:
        desk.publish("team/a", 1, "---\nbase_model: other/base\n---\n")
        desk.settle()
        assert desk.states() == {"team/a": "refused wrong-base"}
        hub.publish("team/a", {"README.md": CARD})
        desk.settle()
        assert desk.states() == {"team/a": "folded"}


def test_the_user_decides_what_may_differ(hub: DevHub, tmp_path: Path) -> None:
    """tensors.ignore_extra and allow_missing let in a new head and a resized vocabulary."""
    tensors = {"ignore_extra": ["classifier.*"], "allow_missing": [models.EMBEDDING]}
    with Desk(tmp_path / "desk", hub, tensors=tensors) as desk:
        hub.publish("team/head", files_of(delta(desk.base, 1) | {"classifier.weight": torch.randn(2, 16)}))
        hub.publish("team/words", files_of(delta(desk.base, 2) | {models.EMBEDDING: torch.randn(44, 16)}))
        desk.settle()
        assert desk.states() == {"team/head": "folded", "team/words": "folded"}


# --------------------------------------------------------------------------------------------------- adapters


def test_adapters_are_folded_among_full_weights(hub: DevHub, tmp_path: Path) -> None:
    """An adapter's repository, found by its lineage, moves the served model by B A scaled."""
    with Desk(
        tmp_path / "desk", hub, source={"relations": ["finetune", "adapter"]}, method="average"
    ) as desk:
        down, up = torch.randn(2, 16) / 10, torch.randn(16, 2) / 10
        stem = f"base_model.model.{models.SQUARE.removesuffix('.weight')}"
        factors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": BASE}
        adapter: Files = {
            "adapter_config.json": json.dumps(settings),
            "adapter_model.safetensors": save(factors),
            "README.md": "---\nlibrary_name: peft\n---\n",
        }
        hub.publish("team/lora", adapter)
        full = delta(desk.base, 1)
        desk.publish("team/full", 1)
        desk.settle()
        assert desk.states() == {"team/lora": "folded", "team/full": "folded"}
        moved = (full[models.SQUARE] - desk.base[models.SQUARE] + 2 * up @ down) / 2
        found = models.load(desk.served / "model")[models.SQUARE]
        torch.testing.assert_close(found, desk.base[models.SQUARE] + moved, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------ a base on the Hub


def base_config(tmp_path: Path, base: str) -> Any:
    """A configuration with a base on the Hub, and its store's folder."""
    made = Config.model_validate({"base": base, "store": tmp_path / "store", "reserve": "1MB"})
    recovery.prepare_folder(made)
    return made


def test_a_base_is_brought_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:// alone is enough: base and descendants come from there, at the commit named, byte for byte.

    It is brought once; a configuration that names another commit or base later is wrong.
    """
    with DevHub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        tensors = models.make_base(tmp_path / "made", shards=2)
        files: Files = {path.name: path for path in (tmp_path / "made").iterdir()}
        unwanted: Files = {"pytorch_model.bin": b"x", "run.py": b"x", ".hidden": b"x", "deep/er.json": "{}"}
        commit = hub.publish(BASE, {**files, **unwanted})
        hub.publish(BASE, {"config.json": "{}"})
        hub.publish("team/a", files_of(delta(tensors, 1)))
        site = Site(tmp_path / "site", tensors)
        part = {key: value for key, value in hubs.SOURCE.items() if key != "base_models"}
        site.configure(base=f"hf://{BASE}@{commit}", sources=[part])
        site.once(HF_ENDPOINT=hub.url)
        assert site.served == ["team/a"]
        brought = {p.name: p.read_bytes() for p in (site.store / "base").iterdir() if p.is_file()}
        assert brought.pop(".origin.json")
        assert brought == {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
        assert (site.store / "base" / "deep" / "er.json").exists()
        before = hub.count(f"/{BASE}/")
        bring_base(configfile.load(site.config)[0], lambda: None)
        for other in (f"hf://{BASE}@main", "hf://org/another"):
            site.configure(base=other)
            with pytest.raises(ConfigError, match="was made with"):
                bring_base(configfile.load(site.config)[0], lambda: None)
        assert hub.count(f"/{BASE}/") == before


def test_a_cut_base_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit begun with is finished, though the branch has moved; what came is not fetched again."""
    with DevHub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        wanted = base_config(tmp_path, f"hf://{BASE}")
        weights = os.urandom(5000)
        hub.publish(BASE, {"model.safetensors": weights, "config.json": '{"a": 1}'})
        hub.fault("/resolve/.*safetensors", "cut", count=1)
        hub.fault("/resolve/.*safetensors", "500")
        with pytest.raises(TryAgain):
            bring_base(wanted, lambda: None)
        assert not wanted.base_path.exists()
        hub.faults.clear()
        hub.faults.forget()
        hub.publish(BASE, {"model.safetensors": b"another", "config.json": "{}"})
        bring_base(wanted, lambda: None)
        assert (wanted.base_path / "model.safetensors").read_bytes() == weights
        assert (wanted.base_path / "config.json").read_bytes() == b'{"a": 1}'
        assert [seen.range for seen in hub.requests("/resolve/")] == ["bytes=2500-"]


@pytest.mark.parametrize("what", ["another base", "another revision", "squashed"])
def test_a_base_that_cannot_be_gone_on_from_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What was begun of a base that is not wanted any more, or gone, is thrown away."""
    with DevHub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        for name in (BASE, "org/other"):
            hub.publish(name, {"model.safetensors": name.encode() * 100})
        hub.fault("/resolve/", "cut", count=1)
        hub.fault("/resolve/", "500")
        with pytest.raises(TryAgain):
            bring_base(base_config(tmp_path, f"hf://{BASE}"), lambda: None)
        hub.faults.clear()
        commit = hub.publish(BASE, {"model.safetensors": b"new" * 100})
        if what == "squashed":
            hub.squash(BASE)
        named = {"another base": "org/other", "another revision": f"{BASE}@{commit}", "squashed": BASE}[what]
        wanted = base_config(tmp_path, f"hf://{named}")
        bring_base(wanted, lambda: None)
        found = (wanted.base_path / "model.safetensors").read_bytes()
        assert found == (b"org/other" if what == "another base" else b"new") * 100


def test_a_base_that_cannot_be_had_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing or private: exit 2 with the name and how to give a token. Unreachable: try again."""
    with DevHub(tmp_path / "hub", token=TOKEN) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        site = Site(tmp_path / "site")
        site.configure(base=f"hf://{BASE}", sources=[])
        said = site.once(2, HF_ENDPOINT=hub.url).stderr
        assert BASE in said
        assert "HF_TOKEN" in said
        hub.publish(BASE, {path.name: path for path in (site.root / "base").iterdir()})
        hub.mark(BASE, private=True)
        wanted = base_config(tmp_path, f"hf://{BASE}")
        with pytest.raises(ConfigError, match="private"):
            bring_base(wanted, lambda: None)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(TryAgain):
            bring_base(wanted, lambda: None)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        bring_base(wanted, lambda: None)
        assert (wanted.base_path / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------ webhook and token


def test_the_webhook_brings_a_look_at_once(tmp_path: Path) -> None:
    """With the right secret the repository named is looked at now, though the poll is an hour away.

    A wrong or missing secret is 403, nonsense 400, too much 413; what is outside the lineage is not folded.
    The token that reads the private repository is in no log, no answer and no process's arguments.
    """
    with DevHub(tmp_path / "hub", token=TOKEN) as hub:
        site = Site(tmp_path / "site", method="average")
        for name, text in (("whsec", SECRET), ("token", TOKEN)):
            (tmp_path / name).write_text(text + "\n")
            (tmp_path / name).chmod(0o600)
        part = {**hubs.SOURCE, "endpoint": hub.url, "poll": "1h", "token_file": str(tmp_path / "token")}
        site.configure(
            sources=[part],
            http={"listen": f"127.0.0.1:{site.port}", "hub_secret_file": str(tmp_path / "whsec")},
        )
        with site.daemon() as daemon:
            until(lambda: daemon.looks("hub") >= 1, "the first look")
            hub.publish("team/a", files_of(delta(site.base, 1)))
            hub.mark("team/a", private=True)
            hub.publish("team/stranger", files_of(delta(site.base, 2), "no card"))
            told = {"event": {"action": "update", "scope": "repo.content"}, "repo": {"name": "team/a"}}
            for secret in ("wrong", "", None):
                assert post(site, told, secret) == 403
            for body in (b"{", b"[]", b'{"repo": 1}', b"[" * 100_000):
                assert post(site, body, SECRET) == 400
            assert post(site, b" " * (2 << 20), SECRET) == 413
            assert daemon.looks("hub") == 1
            assert post(site, {"repo": {"name": "team/stranger"}}, SECRET) == 202
            assert post(site, {"repo": {"name": "../../etc"}}, SECRET) == 202
            assert post(site, told, SECRET) == 202
            rows = daemon.until_state({"team/a": "folded", "team/stranger": "ignored"})
            assert rows["team/stranger"]["reason"] == "lineage"
            assert "../../etc" not in rows
            pages = ("/api/v1/status", "/api/v1/fine-tunes", "/", "/metrics")
            shown = [daemon.get(path)[1] for path in pages]
            arguments = Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
        told_anywhere = "".join([*shown, arguments, daemon.log.read_text()])
        assert TOKEN not in told_anywhere
        assert SECRET not in told_anywhere


def post(site: Site, told: Any, secret: str | None) -> int:
    """Send what a Hub's webhook sends; gives the status."""
    body = told if isinstance(told, bytes) else json.dumps(told).encode()
    headers = {} if secret is None else {"X-Webhook-Secret": secret}
    return httpx.post(f"http://127.0.0.1:{site.port}/hooks/hub", content=body, headers=headers).status_code


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configured file, else the systemd credential, else HF_TOKEN; a broken one is said, without it."""

    def token(file: Path | None = None) -> str | None:
        return read_secret(file, credential="hf-token", variable="HF_TOKEN")

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert token() is None
    monkeypatch.setenv("HF_TOKEN", "hf_variable\n")
    assert token() == "hf_variable"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert token() == "hf_variable"
    (tmp_path / "hf-token").write_text("hf_credential\n")
    assert token() == "hf_credential"
    (tmp_path / "file").write_text("hf_file\n")
    assert token(tmp_path / "file") == "hf_file"
    (tmp_path / "hf-token").unlink()
    for wrong in ("hf_two\nlines", "hf_ü"):
        monkeypatch.setenv("HF_TOKEN", wrong)
        with pytest.raises(ConfigError, match="HF_TOKEN") as caught:
            token()
        assert wrong not in str(caught.value)


def test_a_token_lying_about_is_not_used(tmp_path: Path) -> None:
    """The one in ~/.cache/huggingface is somebody else's; it is said how to give one that is ours."""
    with DevHub(tmp_path / "hub", token=TOKEN) as hub:
        site = Site(tmp_path / "site")
        site.configure(sources=[{**hubs.SOURCE, "endpoint": hub.url, "repos": ["team/a"]}])
        hub.publish("team/a", files_of(delta(site.base, 1)))
        hub.mark("team/a", private=True)
        home = tmp_path / "home" / ".cache" / "huggingface"
        home.mkdir(parents=True)
        (home / "token").write_text(TOKEN)
        env = {"HOME": str(tmp_path / "home"), "HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token")}
        tried = site.run("sources", "test", env=env, code=None)
        assert "HF_TOKEN" in tried.stdout + tried.stderr
        site.once(0, **env)
        assert site.served == []
