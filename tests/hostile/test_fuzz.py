"""The fuzzer of faults/fuzz.py, bounded and always with the same inputs; every crash it ever found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults.fuzz import FOUND, Session, fuzz
from faults.parsers import PARSERS, Bench, Parser, feed_header

from streammerge.errors import Refused

if TYPE_CHECKING:
    from pathlib import Path

INPUTS = 60  # besides the seeds


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One base for all parsers."""
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("parser", PARSERS)
def test_nothing_comes_out_of_a_parser_but_what_it_may_say(parser: str, bench: Bench) -> None:
    """Whatever goes in, a parser takes it or says no in its own words, in bounded time."""
    part = PARSERS[parser]
    session = fuzz(part, bench, inputs=len(part.seeds) + INPUTS)
    assert not session.crashes, next(iter(session.crashes.values()))
    assert session.inputs >= len(part.seeds) + INPUTS


@pytest.mark.parametrize("found", sorted(path.name for path in FOUND.iterdir() if path.suffix == ""))
def test_what_once_crashed_a_parser_does_so_no_more(found: str, bench: Bench) -> None:
    """Inputs that once made something else come out than the parser may say."""
    parser = PARSERS[found.rpartition("-")[0]]
    Session(parser, bench).feed((FOUND / found).read_bytes())


def test_the_fuzzer_finds_a_crash_and_keeps_its_input(bench: Bench) -> None:
    """A parser that lets one byte through where it should not is caught."""

    def feed(_bench: Bench, content: bytes) -> str:
        if b"}" not in content:
            raise KeyError(content)
        raise Refused("malformed", "no")

    session = fuzz(Parser(feed, PARSERS["index"].documents, [b"{}"]), bench, inputs=50)
    assert session.crashes
    assert all(b"}" not in content for content in session.crashes)


def test_the_independent_reader_is_asked(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that we would refuse for a reason of no rule of ours, and safetensors reads, is a finding."""
    import attacks

    good = attacks.file({"w": attacks.weight()}, attacks.FOUR)
    feed_header(bench, good)
    monkeypatch.setattr("streammerge.headers.MAX_HEADER_BYTES", 8)
    with pytest.raises(AssertionError, match="the header claims"):
        feed_header(bench, good)
