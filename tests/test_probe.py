"""Probes: what is asked, what counts as right, wrong, or no answer; against servers at real ports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from daemons import free_port
from hubs import Strange
from places import make_versions, section
from servers.inbox import Inbox

from streammerge import probe
from streammerge.errors import AnsweredWrong, TryAgain

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.targets import Told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A version."""
    return make_versions(tmp_path_factory.mktemp("store"))[1]


def says(body: str, status: str = "200 OK") -> bytes:
    """An answer of HTTP."""
    return f"HTTP/1.1 {status}\r\nconnection: close\r\n\r\n{body}".encode()


def ask(told: Told, **keys: Any) -> None:
    """Ask as the section of a target says."""
    probe.ask(section(type="exec", argv=["true"], probe=keys), told, lambda: None)


ANSWER = json.dumps(
    {"a/b": [{"text": "It is 4."}], "n": 1.5, "yes": True, "none": None, "object": {"level": 1}}
)
RIGHT: list[dict[str, Any]] = [
    {},
    {"contains": "It is 4"},
    {"values": {"/a~1b/0/text": "It is 4."}},
    {"values": {"/a~1b/0/text": {"matches": r"\d"}}},
    {"values": {"/n": 1.5, "/yes": True, "/none": None}},
    {"values": {"/n": {"min": 1, "max": 2}}},
    {"values": {"/object": {"level": 1}, "": {"matches": "It is"}}},
]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"values": {"/object": {"level": 2}}}, '/object is {"level": 1}'),
    ({"status": 201}, "answers 200"),
    ({"contains": "It is {version}"}, "'It is 1' is not in 200"),
    ({"values": {"/a~1b/0/text": "It is 5."}}, '/a~1b/0/text is "It is 4.", not "It is 5."'),
    ({"values": {"/a~1b/1/text": "It is 4."}}, "/a~1b/1/text is not in"),
    ({"values": {"/a~1b/text": 1}}, "/a~1b/text is not in"),
    ({"values": {"/n": {"max": 1}}}, '/n is 1.5, not {"max": 1.0}'),
    ({"values": {"/yes": {"min": 0}}}, "/yes is true"),
    ({"values": {"/yes": 1}}, "/yes is true, not 1"),
    ({"values": {"/a~1b/0/text": {"matches": "^4"}}}, "/a~1b/0/text is"),
]


def test_an_answer_is_right_or_wrong(told: Told) -> None:
    """Every expectation holds for an answer that fits, and names what does not fit."""
    with Strange(says(ANSWER)) as server:
        for keys in RIGHT:
            ask(told, url=server.url, **keys)
        for keys, said in WRONG:
            with pytest.raises(AnsweredWrong) as raised:
                ask(told, url=server.url, **keys)
            assert said in raised.value.message
            assert raised.value.hint
    with (
        Strange(says("no JSON at all")) as server,
        pytest.raises(AnsweredWrong, match="no JSON: 200, no JSON at"),
    ):
        ask(told, url=server.url, values={"/a": 1})


def test_no_answer_is_no_wrong_answer(told: Told) -> None:
    """Nobody there, a proxy's error, a key: nothing of it says anything about the version."""
    unanswered = {"url": f"http://127.0.0.1:{free_port()}", "timeout": "300ms"}
    with pytest.raises(TryAgain) as raised:
        ask(told, **unanswered)
    assert raised.type is TryAgain
    for status in ("503 Busy", "502 Gateway", "401 Who", "429 Slow", "504 Late"):
        with Strange(says("", status)) as server:
            with pytest.raises(TryAgain) as raised:
                ask(told, url=server.url)
            assert raised.type is TryAgain
            ask(told, url=server.url, status=int(status[:3]))
    for status in ("500 Broken", "404 Gone"):
        with Strange(says("", status)) as server, pytest.raises(AnsweredWrong):
            ask(told, url=server.url)
    with (
        Strange(says("x" * 100), pause=0.05) as server,
        pytest.raises(TryAgain, match=r"within 0\.3 s") as raised,
    ):
        ask(told, url=server.url, timeout="300ms")
    assert raised.type is TryAgain


def test_what_is_told_is_put_in_everywhere(told: Told, tmp_path: Path) -> None:
    """Address, headers, what is sent and the program's arguments get label, version, digest and path."""
    (tmp_path / "token").write_text("t0ken")
    script = tmp_path / "judge"
    script.write_text(
        f'#!/bin/sh\ncat >{tmp_path}/heard\nprintf "%s\\n" "$STREAMMERGE_DIGEST" "$@" >{tmp_path}/said\n'
    )
    script.chmod(0o755)
    with Inbox(status=200, answer=told.label.encode()) as inbox:
        ask(
            told, url=inbox.url + "/v{version}?label={label}", headers={"X-Version": "{digest}"},
            send={"a": ["{path}", 1]}, token_file=str(tmp_path / "token"), contains="{label}",
            argv=[str(script), "{label}"],
        )  # fmt: skip
        ask(told, url=inbox.url, send="as it is: {version}", method="PUT")
    posted, put = inbox.got
    assert (posted.method, posted.path) == ("POST", f"/v1?label={told.label}")
    kept = {"x-version": told.digest, "content-type": "application/json", "authorization": "Bearer t0ken"}
    assert posted.headers.items() >= kept.items()
    assert json.loads(posted.body) == {"a": [str(told.snapshot), 1]}
    assert (put.method, put.headers["content-type"], put.body) == ("PUT", "text/plain", b"as it is: 1")
    assert (tmp_path / "heard").read_text() == told.label
    assert (tmp_path / "said").read_text().split() == [told.digest, told.label]


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ("exit 0", None),
        ("cat >/dev/null; exit 0", None),
        ("echo it says nonsense >&2; exit 3", AnsweredWrong),
        ("exit 75", TryAgain),
        ("sleep 30", TryAgain),
    ],
)
def test_a_program_judges(lines: str, verdict: type[TryAgain] | None, told: Told, tmp_path: Path) -> None:
    """Exit 0 is right, 75 and the timeout are no judgement, all else is wrong; it may read a megabyte."""
    script = tmp_path / "judge"
    script.write_text(f"#!/bin/sh\n{lines}\n")
    script.chmod(0o755)
    with Strange(says("x" * (1 << 20))) as server:
        keys = {"url": server.url, "argv": [str(script)], "timeout": "500ms"}
        if verdict is None:
            ask(told, **keys)
            return
        with pytest.raises(verdict) as raised:
            ask(told, **keys)
        assert raised.type is verdict
        assert verdict is TryAgain or "it says nonsense" in raised.value.message


def test_a_program_that_is_not_there_does_not_judge(told: Told) -> None:
    """A typing error in the configuration takes no version back."""
    with pytest.raises(TryAgain, match="No such file") as raised:
        ask(told, argv=["/no/such/program"])
    assert raised.type is TryAgain


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "url to ask"),
        ({"argv": ["x"], "contains": "y"}, "needs a url"),
        ({"url": "http://x", "values": {"text": 1}}, "no JSON pointer"),
        ({"url": "http://x", "values": {"/a": {"matches": "("}, "/b": 1}}, ""),
        ({"url": "http://user:secret@x"}, "pattern"),
        ({"url": "ftp://x"}, "pattern"),
        ({"url": "http://x", "headers": {"a b": "c"}}, "pattern"),
        ({"url": "http://x", "headers": {"a": "c\r\nd: e"}}, "pattern"),
    ],
)
def test_a_probe_that_makes_no_sense_is_refused(keys: dict[str, Any], said: str) -> None:
    """What cannot be asked, or could never be answered, is found when the configuration is read."""
    if not said:  # no regular expression, so a value like any other
        section(type="exec", argv=["true"], probe=keys)
        return
    with pytest.raises(ValueError, match=said):
        section(type="exec", argv=["true"], probe=keys)
