"""What comes out of every parser that strangers reach, for inputs that nobody thought of?

Hypothesis makes documents around valid ones and mutates bytes of a pool of seeds, which begins with the
catalogue of attacks; in between, bytes are mutated without it, which is faster. An input that reaches an
outcome by a way through the code that none took before joins the pool. A crash is kept as a file:
tests/hostile/found/<parser>-<hash>, replayed by the tests for ever.
"""

from __future__ import annotations

import hashlib
import re
import resource
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from faults import Findings
from faults.branches import measured
from faults.parsers import PARSERS, Bench

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

    from faults.parsers import Parser

FOUND = Path(__file__).resolve().parents[1] / "hostile" / "found"
BATCH = 100
SWARM = 400
MAX_SECONDS = 5.0  # of the processor, for one input
MAX_BYTES = 2 << 30  # resident in this process, torch and Hypothesis included
MAX_CRASHES = 5  # of one parser, then it is enough
SECONDS = {"short": 5.0, "full": 120.0}  # for each parser
TOKENS = [
    b"", b"\0", b"\n", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"-1", b"0", b"1e999", b"NaN", b"null",
    b"true", b'"\\ud800"', b"\xff", b"\xef\xbb\xbf", b"18446744073709551616", b"9" * 5000, b"[" * 2000,
    b"../", b"/etc/passwd", b".safetensors", b"(a+)+", b".?" * 40, b"__metadata__", b"__class__", b"*a",
    b"&a ", b"!!", "\u202e".encode(), b"\x1b[31m", b"2026-13-45",
]  # fmt: skip
EDITS = ("put", "cut", "over", "twice", "flip")


@dataclass
class Session:
    """One parser being fuzzed: how much it got, what it crashed by, which ways were seen."""

    parser: Parser
    bench: Bench
    inputs: int = 0
    crashes: dict[bytes, str] = field(default_factory=dict)
    ways: set[tuple[str, ...]] = field(default_factory=set)
    pool: list[bytes] = field(default_factory=list)
    slowest: float = 0.0

    def __post_init__(self) -> None:
        self.pool = list(self.parser.seeds)

    def feed(self, content: bytes) -> None:
        """Give the parser one input; what it may raise is a way out, anything else goes on up."""
        self.inputs += 1
        started = time.process_time()
        try:
            way: tuple[str, ...] = ("accepted", self.parser.feed(self.bench, content) or "")
        except self.parser.allowed as exc:
            way = _way(exc)
            assert len(str(exc)) < 4000, f"it says {len(str(exc)):,} characters"  # noqa: PT017 -- a finding
        took = time.process_time() - started
        self.slowest = max(self.slowest, took)
        assert took < MAX_SECONDS, f"it took {took:.1f} s"
        if way not in self.ways:
            self.ways.add(way)
            self.pool.append(content)

    def batch(self, inputs: int, number: int | None) -> None:
        """Feed so many; with a number, always the same ones. The smallest input of a crash is kept."""
        last: list[bytes] = [b""]

        def tried(content: bytes) -> None:
            last[0] = content
            self.feed(content)

        quiet = settings(
            max_examples=inputs, database=None, deadline=None, derandomize=False,
            verbosity=Verbosity.quiet, phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
        )  # fmt: skip
        strategy = st.one_of(self.parser.documents, mutated(self.pool))
        search: Callable[[], None] = quiet(given(strategy)(tried))
        try:
            (seed(number)(search) if number is not None else search)()
        except Exception:  # noqa: BLE001 -- whatever it is, it is the finding
            self.crashes[last[0]] = traceback.format_exc(limit=-4)

    def swarm(self, inputs: int, random: Random) -> None:
        """Feed mutations alone, many times as fast; a crash is kept as it is."""
        for _ in range(inputs):
            edits = [
                (random.random(), random.choice(EDITS), random.randrange(256), random.choice(TOKENS))
                for _ in range(random.randint(1, 4))
            ]
            content = _edited(random.choice(self.pool), edits)
            try:
                self.feed(content)
            except Exception:  # noqa: BLE001 -- whatever it is, it is the finding
                self.crashes[content] = traceback.format_exc(limit=-4)
                return


def _way(error: BaseException) -> tuple[str, ...]:
    """How an outcome was reached: the lines of ours that the error went through, and its plain words."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/streammerge/" in f.filename]
    words = re.sub(r"[^a-z ]+|\b\w*\d\w*\b", "", str(error).lower())[:60]
    return (*lines[-6:], words if len(lines) < 2 else "")


def mutated(pool: list[bytes]) -> SearchStrategy[bytes]:
    """Change a few places of something in the pool: cut, doubled, overwritten, words put in."""
    edit = st.tuples(
        st.floats(0, 1), st.sampled_from(EDITS), st.integers(0, 255),
        st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6)),
    )  # fmt: skip
    return st.builds(_edited, st.sampled_from(pool), st.lists(edit, min_size=1, max_size=4))


def _edited(content: bytes, edits: list[tuple[float, str, int, bytes]]) -> bytes:
    for where, how, length, word in edits:
        at = int(where * len(content))
        end = min(len(content), at + (length if how in ("cut", "twice") else len(word)))
        if how == "put":
            content = content[:at] + word + content[at:]
        elif how == "cut":
            content = content[:at] + content[end:]
        elif how == "over":
            content = content[:at] + word + content[end:]
        elif how == "twice":
            content = content[:end] + content[at:end] + content[end:]
        elif at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
    return content[: 1 << 21]


def fuzz(parser: Parser, bench: Bench, *, inputs: int = 0, seconds: float = 0.0) -> Session:
    """Fuzz one parser: so many inputs, always the same ones; or new ones for so long."""
    session = Session(parser, bench)
    for content in parser.seeds:
        try:
            session.feed(content)
        except Exception:  # noqa: BLE001 -- whatever it is, it is the finding
            session.crashes[content] = traceback.format_exc(limit=-4)
    ends = time.monotonic() + seconds
    number = 0
    while (session.inputs < inputs or time.monotonic() < ends) and len(session.crashes) < MAX_CRASHES:
        left = max(1, min(inputs // 3, inputs - session.inputs)) if inputs else BATCH
        if number % 2:
            session.swarm(left if inputs else SWARM, Random(number if inputs else None))
        else:
            session.batch(left, number if inputs else None)
        number += 1
    return session


def keep(parser: str, crashes: dict[bytes, str]) -> list[str]:
    """Write each crash's input to a file of its own; gives one sentence for each."""
    FOUND.mkdir(exist_ok=True)
    said = []
    for content, trace in crashes.items():
        name = f"{parser}-{hashlib.sha256(content).hexdigest()[:12]}"
        (FOUND / name).write_bytes(content)
        said.append(f"{parser}: {name}: {trace.strip().splitlines()[-1][:300]}")
    return said


def measure(work: Path, scale: str) -> Findings:
    """Fuzz every parser for as long, and count."""
    findings = Findings("What comes out of the parsers for inputs that nobody thought of?")
    total, base = 0, _resident()
    bench = Bench(work)
    for name, parser in PARSERS.items():
        session = fuzz(parser, bench, seconds=SECONDS[scale])
        total += session.inputs
        value = f"{session.inputs:,} ({len(session.ways)} ways out, slowest {session.slowest:.2f} s)"
        findings.figures.append((f"inputs: {name}", value))
        findings.differences += keep(name, session.crashes)
    most = _resident()
    findings.figures.append(("inputs in all", f"{total:,}"))
    findings.figures.append(("most memory, in MiB", f"{most >> 20:,} (before: {base >> 20:,})"))
    if most > MAX_BYTES:
        findings.differences.append(f"{most:,} bytes of memory were taken, more than {MAX_BYTES:,}")
    findings.figures += (branches := measured(work)).figures
    findings.notes += branches.notes
    findings.differences += branches.differences
    findings.notes.append(
        "An input is right when nothing comes out but what the parser may say (Refused, TryAgain, "
        "ConfigError, a 4xx), in bounded time, and when the safetensors library reads the same from every "
        "header that is taken, and takes none that is refused but for a rule of ours."
    )
    return findings


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
