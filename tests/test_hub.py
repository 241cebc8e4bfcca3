"""The door to a Hub: bounded in time, proven by hashes, and never taken for what it is not."""

from __future__ import annotations

import email.utils
import json
import os
import time
from typing import TYPE_CHECKING

import hubs
import pytest
from hubs import LISTING, Strange

from streammerge import hub as ours
from streammerge import hubfacts
from streammerge.devhub import DevHub
from streammerge.errors import RateLimited, Refused, Stopped, TryAgain, Withheld
from streammerge.hub import Hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streammerge.devhub.faults import Style
    from streammerge.hubfacts import File

TOKEN = "hf_made_up_for_tests"
WEIGHTS = os.urandom(3 << 20)
NAMES = ("model.safetensors", "config.json")  # one goes by LFS, the other by git
RESOLVE = "GET /team/one/resolve/"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevHub]:
    """A hub with one model, for the whole module; `clean` takes away what a test had go wrong."""
    with DevHub(tmp_path_factory.mktemp("hub") / "hub") as running:
        running.publish(
            "team/one", {"README.md": hubs.CARD, "config.json": '{"a": 1}', "model.safetensors": WEIGHTS}
        )
        yield running


@pytest.fixture(autouse=True)
def clean(dev: DevHub) -> Iterator[None]:
    """Nothing fails and nothing is counted at first."""
    dev.faults.clear()
    dev.faults.forget()
    yield
    dev.faults.clear()


@pytest.fixture
def hub(dev: DevHub) -> Hub:
    """The client under test."""
    return Hub(endpoint=dev.url, timeout=1.0)


def file_of(hub: Hub, name: str = NAMES[0]) -> tuple[str, File]:
    """The commit, and a file of it."""
    repo = hub.repo("team/one")
    return repo.sha, next(file for file in repo.files if file.path == name)


# ---------------------------------------------------------------------------------------------- what there is


def test_a_repository_is_described_with_its_files(dev: DevHub, hub: Hub) -> None:
    """Commit, times, tags, and each file's size and hash come in one request."""
    repo = hub.repo("team/one")
    stored = dev.store.get("team/one")
    assert (repo.id, repo.sha) == ("team/one", stored.branches["main"])
    assert "base_model:finetune:org/base" in repo.tags
    assert abs(repo.last_modified - time.time()) < 60
    named = {file.path: file for file in repo.files}
    commit = stored.find("main")
    assert named["model.safetensors"].identity == commit.files["model.safetensors"].sha256
    assert named["model.safetensors"].size == len(WEIGHTS)
    assert named["config.json"].identity == commit.files["config.json"].oid
    assert dev.count() == 1


def test_a_listing_is_read_a_page_at_a_time(tmp_path: Path) -> None:
    """Every page costs one request, latest change first, and none is asked for before it is wanted."""
    with DevHub(tmp_path / "hub", page_size=2) as dev:
        for number in range(5):
            dev.publish(f"team/m{number}", {"README.md": hubs.CARD})
        pages = Hub(endpoint=dev.url).pages({"filter": "base_model:finetune:org/base"})
        assert [repo.id for repo in next(pages)] == ["team/m4", "team/m3"]
        assert dev.count(LISTING) == 1
        assert [repo.id for page in pages for repo in page] == ["team/m2", "team/m1", "team/m0"]
        assert dev.count() == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gated": "manual"}, "gated"),
        ({"disabled": True}, "disabled"),
        ({"private": True}, "gone"),
        ({}, "moved"),
    ],
)
def test_what_is_not_given_is_a_state(tmp_path: Path, change: dict[str, bool], reason: str) -> None:
    """Gated, disabled, private and vanished are told apart, and none of them is tried again and again."""
    with DevHub(tmp_path / "hub", token=TOKEN) as dev:
        dev.publish("team/one", {"model.safetensors": b"abc"})
        hub = Hub(endpoint=dev.url, timeout=1.0)
        commit, file = file_of(hub)
        dev.mark("team/one", **change)
        before = dev.count()
        with pytest.raises(Withheld) as caught:
            hub.download("team/one", commit if change else "f" * 40, file, tmp_path / "f")
        assert caught.value.reason == reason
        assert caught.value.hint
        assert dev.count() == before + 1
        assert Hub(endpoint=dev.url, token=TOKEN).may_read("team/one", commit, file.path) is (
            reason != "disabled"
        )


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_on_the_way_is_downloaded_again(
    dev: DevHub, hub: Hub, tmp_path: Path, name: str
) -> None:
    """What does not hash to what the Hub declares is not believed, by LFS or by git."""
    commit, file = file_of(hub, name)
    dev.fault(RESOLVE, "flip", count=2)
    hub.download("team/one", commit, file, tmp_path / name)
    assert (tmp_path / name).read_bytes() == (WEIGHTS if name == NAMES[0] else b'{"a": 1}')
    assert dev.count(RESOLVE) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_wrong_at_its_place_is_refused(tmp_path: Path, name: str) -> None:
    """The same wrong content of the right size three times is `corrupted`, with a hint; nothing is left."""
    with DevHub(tmp_path / "hub") as dev:
        dev.publish("team/one", {"config.json": b'{"a": 1}', "model.safetensors": b"\0" * 2000})
        hub = Hub(endpoint=dev.url, timeout=1.0)
        commit, file = file_of(hub, name)
        stored = dev.store.blob(dev.store.get("team/one").find("main").files[name].sha256)
        stored.write_bytes(b"\1" + stored.read_bytes()[1:])
        with pytest.raises(Refused, match=name) as caught:
            hub.download("team/one", commit, file, tmp_path / name)
        assert caught.value.reason == "corrupted"
        assert caught.value.hint == "upload the file again"
        assert not (tmp_path / name).exists()
        assert dev.count(RESOLVE) == ours.SAME_WRONG_CONTENT


def test_content_that_is_wrong_in_another_way_each_time_is_the_network(
    dev: DevHub, hub: Hub, tmp_path: Path
) -> None:
    """A route that damages everything is no reason to refuse a fine-tune for good."""
    commit, file = file_of(hub)
    dev.fault(RESOLVE, "flip")
    with pytest.raises(TryAgain, match="damaged"):
        hub.download("team/one", commit, file, tmp_path / "f")


def test_a_cut_download_is_gone_on_from(dev: DevHub, hub: Hub, tmp_path: Path) -> None:
    """After a cut half-way only the rest is asked for, and the whole is proven."""
    commit, file = file_of(hub)
    dev.fault(RESOLVE, "cut", count=1)
    hub.download("team/one", commit, file, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == WEIGHTS
    assert [seen.range for seen in dev.requests(RESOLVE)] == ["", f"bytes={len(WEIGHTS) // 2}-"]
    assert sum(seen.sent_bytes for seen in dev.requests(RESOLVE)) == len(WEIGHTS)


def test_what_lies_there_already_is_proven_too(dev: DevHub, hub: Hub, tmp_path: Path) -> None:
    """A whole file costs no request; a damaged or too long beginning is thrown away."""
    commit, file = file_of(hub)
    (tmp_path / "f").write_bytes(WEIGHTS)
    hub.download("team/one", commit, file, tmp_path / "f")
    assert dev.count(RESOLVE) == 0
    for begun in (b"\0" * 1000, WEIGHTS + b"more"):
        (tmp_path / "f").write_bytes(begun)
        hub.download("team/one", commit, file, tmp_path / "f")
        assert (tmp_path / "f").read_bytes() == WEIGHTS


# ------------------------------------------------------------------------------------------- a Hub that fails


@pytest.mark.parametrize("style", ["ratelimit", "retry-after"])
def test_a_429_is_obeyed(dev: DevHub, hub: Hub, style: Style) -> None:
    """Whichever header says so, nothing at all is asked for until it may be; then it goes on."""
    dev.fault("GET", "429", count=1, seconds=1.0, style=style)
    with pytest.raises(RateLimited) as caught:
        hub.repo("team/one")
    assert caught.value.seconds == 1.0
    for _ in range(3):
        with pytest.raises(RateLimited):
            hub.repo("team/one")
    assert dev.count() == 1
    time.sleep(1.0)
    assert hub.repo("team/one").id == "team/one"


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("Retry-After: 7", 7, 7),
        ("Retry-After: {in 500 s}", 490, 501),
        ('RateLimit: "api";r=0;t=55', 55, 55),
        ("Retry-After: 99999999999999999999", ours.LONGEST_WAIT_SECONDS, ours.LONGEST_WAIT_SECONDS),
        ("Retry-After: \xb2", 60, 60),
        ("Retry-After: Thu, 01 Jan 1970 00:00:00 GMT", 0, 0),
        ("X-Other: 1", 60, 60),
    ],
)
def test_a_wait_is_read_however_it_is_written(header: str, least: float, most: float) -> None:
    """Seconds, a date, the IETF's header, nonsense, nothing: a wait that is neither negative nor endless."""
    date = email.utils.formatdate(time.time() + 500, usegmt=True)
    header = header.replace("{in 500 s}", date)
    answer = b"HTTP/1.1 429 Too Many Requests\r\n" + header.encode("latin-1") + b"\r\n\r\n"
    with Strange(answer) as server, pytest.raises(RateLimited) as caught:
        Hub(endpoint=server.url, timeout=1.0).repo("team/one")
    assert least <= caught.value.seconds <= most


@pytest.mark.parametrize("kind", ["500", "cut", "hang", "slow"])
def test_a_passing_failure_is_not_seen(dev: DevHub, kind: str) -> None:
    """One error, cut, hang or slow answer is tried again, or waited for, within seconds."""
    hub = Hub(endpoint=dev.url, timeout=0.3)
    dev.fault("GET", kind, count=1, seconds=0.6)  # type: ignore[arg-type]
    began = time.monotonic()
    assert hub.repo("team/one").files
    assert time.monotonic() - began < 4.0
    assert dev.count() == (1 if kind == "slow" else 2)


@pytest.mark.parametrize("kind", ["500", "hang"])
def test_a_lasting_failure_ends_in_bounded_time(dev: DevHub, kind: str) -> None:
    """A Hub that does not answer is TryAgain after a few tries, with the hint that it goes on by itself."""
    hub = Hub(endpoint=dev.url, timeout=0.3)
    dev.fault("GET", kind, seconds=60.0)  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(TryAgain) as caught:
        hub.repo("team/one")
    assert time.monotonic() - began < 5.0
    assert "tried again by itself" in caught.value.hint
    assert dev.count() == ours.ATTEMPTS
    dev.faults.stopping.set()  # lets the hanging answers go
    time.sleep(0.1)
    dev.faults.stopping.clear()


def test_a_hub_that_is_not_there_is_try_again() -> None:
    """Connection refused, an address that is none, and a redirect in a circle are the place's failures."""
    for endpoint in ("http://127.0.0.1:9", "http://[", "https://"):
        with pytest.raises(TryAgain):
            Hub(endpoint=endpoint, timeout=0.2).repo("team/one")
    circle = b"HTTP/1.1 302 Found\r\nlocation: /api/models\r\ncontent-length: 0\r\n\r\n"
    with Strange(circle) as server, pytest.raises(TryAgain):
        Hub(endpoint=server.url, timeout=0.2).repo("team/one")


@pytest.mark.parametrize("what", ["listing", "file"])
def test_a_trickle_is_no_answer(dev: DevHub, tmp_path: Path, what: str) -> None:
    """Bytes that come one by one, each before the time-out, do not hold anybody for ever."""
    answer = JSON_HEAD + b"content-length: 3145728\r\n\r\n" + b" " * 10_000
    _, file = file_of(Hub(endpoint=dev.url))
    with Strange(answer, pause=0.02) as server:
        hub = Hub(endpoint=server.url, timeout=0.05)
        asked: dict[str, Callable[[], object]] = {
            "file": lambda: hub.download("team/one", "f" * 40, file, tmp_path / "f"),
            "listing": lambda: next(hub.pages({"author": "team"})),
        }
        began = time.monotonic()
        with pytest.raises(TryAgain):
            asked[what]()
        assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    "body",
    [b"not json", b"[1, 2", b"{}", b'{"id": "../x", "sha": "1"}', b'"text"', b"\xff\xfe", b"[" * 100_000],
    ids=range(7),
)
def test_nonsense_is_the_hubs_failure(body: bytes) -> None:
    """An answer that is no Hub's is TryAgain, never taken for an empty Hub or a repository that is gone."""
    with Strange(JSON_HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body) as server:
        hub = Hub(endpoint=server.url, timeout=0.2)
        with pytest.raises(TryAgain) as caught:
            hub.repo("team/one")
        assert not isinstance(caught.value, Withheld)


@pytest.mark.parametrize("body", [b'"a text"', b"[1]", b"\xe9 la page", b"{}", b'{"error": ["a"]}'])
def test_an_errors_body_may_be_anything(body: bytes) -> None:
    """What a proxy writes under its 502 stops nobody."""
    head = f"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/html\r\ncontent-length: {len(body)}\r\n\r\n"
    with Strange(head.encode() + body) as server, pytest.raises(TryAgain, match="502"):
        Hub(endpoint=server.url, timeout=0.2).repo("team/one")


def test_a_listing_does_not_lead_to_another_server() -> None:
    """The next page is the same Hub's, or the listing is not believed: the token would go there."""
    empty = b"content-length: 2\r\n\r\n[]"
    with Strange(JSON_HEAD + empty) as other:
        link = f'link: <{other.url}/api/models>; rel="next"\r\n'.encode()
        with Strange(JSON_HEAD + link + empty) as server:
            pages = Hub(endpoint=server.url, token=TOKEN).pages({"author": "team"})
            assert next(pages) == []
            with pytest.raises(TryAgain):
                next(pages)
        assert other.asked == []


def test_a_stop_is_heard_in_the_middle(dev: DevHub, tmp_path: Path) -> None:
    """A download and the pause between two tries end at once where the daemon is told to stop."""
    beats = iter([None] * 4)

    def beat() -> None:
        if next(beats, "stop"):
            raise Stopped("stop")

    commit, file = file_of(Hub(endpoint=dev.url))
    dev.fault(RESOLVE, "slow", seconds=30.0)
    began = time.monotonic()
    with pytest.raises(Stopped):
        Hub(endpoint=dev.url, beat=beat, timeout=10.0).download("team/one", commit, file, tmp_path / "f")
    assert time.monotonic() - began < 10.0
    dev.faults.stopping.set()
    time.sleep(0.1)
    dev.faults.stopping.clear()
    beats = iter([None] * 2)
    dev.faults.clear()
    dev.fault("GET", "500")
    with pytest.raises(Stopped):
        Hub(endpoint=dev.url, beat=beat).repo("team/one")
    assert (tmp_path / "f").stat().st_size > 0, "what came stays, to be gone on from"


# ------------------------------------------------------------------------------------------------------ names


def test_names_that_lead_elsewhere_are_not_heard() -> None:
    """A file whose name is no path below a folder, or no name that a disk takes, is not listed at all."""
    odd = ["/etc/passwd", "../up", "a/../../b", "a\\b", "", ".", "line\nbreak", "n" * 300 + ".safetensors",
           "\ud800.json", 7, None]  # fmt: skip
    body = json.dumps(
        {
            "id": "team/one",
            "sha": "f" * 40,
            "siblings": [{"rfilename": name, "size": 1, "blobId": "0"} for name in [*odd, "a/b.json", "c d"]]
            + [{"rfilename": "x", "size": -1}, {"rfilename": "y", "size": "1"}, "z", None],
        }
    ).encode()
    with Strange(JSON_HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body) as server:
        repo = Hub(endpoint=server.url).repo("team/one")
    assert [file.path for file in repo.files] == ["a/b.json", "c d"]


@pytest.mark.parametrize("name", ["a/b", "a", "A-1/b_c.d"])
def test_repository_names(name: str) -> None:
    """The Hub's own names pass."""
    assert hubfacts.is_repo_id(name)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "../a", "a/..", "a//b", "/a", "a/", "a b/c", "a/b\n", "a/ü", "-a/b", None, 7]
)
def test_other_names(name: object) -> None:
    """What is no repository's name is never put into an address."""
    assert not hubfacts.is_repo_id(name)


# ------------------------------------------------------------------------------------------------------ token


def test_the_token_is_sent_where_given_and_no_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of this machine's, by variable or file, is not used unless it was handed over."""
    monkeypatch.setenv("HF_TOKEN", "hf_another_from_the_environment")
    with Strange(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n") as server:
        for token in (None, TOKEN):
            with pytest.raises(TryAgain):
                Hub(endpoint=server.url, token=token).repo("team/one")
    assert server.asked == ["", f"Bearer {TOKEN}"]


def test_a_wrong_token_says_how_to_give_another(tmp_path: Path) -> None:
    """Invalid credentials are no vanished repository."""
    with DevHub(tmp_path / "hub", token=TOKEN) as dev:
        dev.publish("team/one", {"README.md": hubs.CARD})
        with pytest.raises(TryAgain, match="401") as caught:
            Hub(endpoint=dev.url, token="hf_wrong").repo("team/one")
        assert not isinstance(caught.value, Withheld)
        assert "token_file" in caught.value.hint
