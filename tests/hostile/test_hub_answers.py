"""A Hub that means harm, or has been taken over: what it says is bounded, checked, and ends no daemon."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from streammerge.config.sources import HubSource
from streammerge.errors import TryAgain
from streammerge.hub import Hub
from streammerge.sources.hub import HubRepositories

if TYPE_CHECKING:
    from collections.abc import Iterator

SHA = "0123456789abcdef" * 2 + "01234567"
FILE = {"rfilename": "model.safetensors", "size": 4, "lfs": {"sha256": "0" * 64, "size": 4}}
REPO: dict[str, Any] = {
    "id": "org/name", "sha": SHA, "lastModified": "2026-01-01T00:00:00Z", "createdAt": "2026-01-01T00:00:00Z",
    "tags": [], "siblings": [FILE],
}  # fmt: skip

REPOS: dict[str, Any] = {
    "sha-escape": {**REPO, "sha": "../../etc/passwd"},
    "sha-half-character": {**REPO, "sha": "\ud800"},
    "sha-object": {**REPO, "sha": {"a": 1}},
    "sha-1-MB": {**REPO, "sha": "a" * (1 << 20)},
    "no-object": [REPO],
    "name-up": {**REPO, "id": "../etc"},
    "name-absolute": {**REPO, "id": "/etc/passwd"},
    "name-half-character": {**REPO, "id": "org/\ud800"},
}
FILES: dict[str, Any] = {
    "up": {**FILE, "rfilename": "../../model.safetensors"},
    "absolute": {**FILE, "rfilename": "/etc/model.safetensors"},
    "nul": {**FILE, "rfilename": "a\0.safetensors"},
    "half-character": {**FILE, "rfilename": "\ud800.safetensors"},
    "newline": {**FILE, "rfilename": "a\n.safetensors"},
    "10-kB": {**FILE, "rfilename": "a" * 10_000 + ".safetensors"},
    "size-negative": {**FILE, "lfs": {"size": -1}},
    "size-4000-digits": {**FILE, "lfs": {"size": 10**4000}},
    "size-true": {**FILE, "lfs": {"size": True}},
    "size-nan": {**FILE, "lfs": {"size": float("nan")}},
    "no-object": ["model.safetensors"],
    "number": 7,
}
TAGS = ["base_model:\ud800", "base_model:\x1b[31m", 7, None, "a" * 10_000, ["base_model:a/b"]]
TIMES = ["0001-01-01", "9999-12-31T23:59:59-23:59", "9" * 5000, "\ud800", 7, None, {}, "2026-13-45"]


class Evil(BaseHTTPRequestHandler):
    """Answers every request with what the test wants."""

    body: ClassVar[bytes] = b""
    link: ClassVar[str] = ""
    address: ClassVar[str] = ""
    asked: ClassVar[int] = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        is_listing = self.path.startswith("/api/models?")
        body = self.body if self.link or not is_listing else b"[]"
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if self.link:
            self.send_header("link", f'<{self.address}{self.link}>; rel="next"')
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    """The address of a Hub that means harm."""
    Evil.body, Evil.link, Evil.asked = b"[]", "", 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    Evil.address = f"http://127.0.0.1:{server.server_port}"
    yield Evil.address
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again without waiting."""
    monkeypatch.setattr("streammerge.hub.FIRST_PAUSE_SECONDS", 0.0)


def source(endpoint: str, most_bytes: float = 1 << 30) -> HubRepositories:
    """A source that asks for one repository."""
    part = HubSource(
        type="hub", name="hub", repos=("org/name",), endpoint=endpoint, first_run="fold", timeout=5
    )
    return HubRepositories(part, ("org/base",), lambda: None, most_bytes=most_bytes)


@pytest.mark.parametrize("attack", REPOS)
def test_a_repository_that_cannot_be_is_no_answer(attack: str, endpoint: str) -> None:
    """A name or commit that could not be written down or joined to an address is no answer: tried again."""
    Evil.body = json.dumps(REPOS[attack]).encode()
    with pytest.raises(TryAgain, match="not what a Hub says"):
        Hub(endpoint=endpoint).repo("org/name")
    look = source(endpoint).look({}, "")
    assert not look.sightings
    assert look.again_at


@pytest.mark.parametrize("attack", FILES)
def test_a_file_that_could_lead_elsewhere_is_not_there(attack: str, endpoint: str) -> None:
    """A file whose name or size cannot be is left out; all that a look tells can be written down."""
    Evil.body = json.dumps({**REPO, "siblings": [FILES[attack]]}).encode()
    (seen,) = source(endpoint).look({}, "").sightings
    assert seen.waiting_for == "it holds no weights yet"
    repr(seen).encode()


@pytest.mark.parametrize("place", ["tags", "lastModified", "createdAt"])
def test_words_of_a_hub_are_only_words(place: str, endpoint: str) -> None:
    """Tags and times of any kind neither end a look nor reach a ledger that could not hold them."""
    for value in [TAGS] if place == "tags" else TIMES:
        Evil.body = json.dumps({**REPO, place: value}).encode()
        for seen in source(endpoint).look({}, "").sightings:
            for text in (seen.name, seen.revision, seen.waiting_for, seen.fingerprint):
                assert text.isprintable()
                assert len(text) < 1000


@pytest.mark.parametrize("body", [b"[" * 100_000, b"9" * 5000, b"\xff", b"", b"NaN", b'{"id":'], ids=range(6))
def test_an_answer_that_is_no_json_is_tried_again(body: bytes, endpoint: str) -> None:
    """Nesting, digits and broken text are an answer that no Hub gives."""
    Evil.body = body
    with pytest.raises(TryAgain, match="not what a Hub says"):
        Hub(endpoint=endpoint).repo("org/name")
    look = source(endpoint).look({}, "")
    assert not look.sightings
    assert look.again_at


def test_a_listing_without_an_end_is_given_up(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that lead to themselves are read so many times and no more."""
    Evil.body, Evil.link = json.dumps([REPO]).encode(), "/api/models?again"
    monkeypatch.setattr("streammerge.hub.MAX_PAGES", 5)
    with pytest.raises(TryAgain, match="does not end"):
        list(Hub(endpoint=endpoint).pages({"filter": "x"}))
    assert Evil.asked == 5


def test_a_repository_many_times_the_base_is_refused_unfetched(endpoint: str) -> None:
    """A size that no fine-tune of the base has is refused by what the Hub declares."""
    Evil.body = json.dumps(
        {**REPO, "siblings": [{**FILE, "lfs": {"sha256": "0" * 64, "size": 1 << 40}}]}
    ).encode()
    (seen,) = source(endpoint).look({}, "").sightings
    assert seen.refused == "oversized"
