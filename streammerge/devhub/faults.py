"""What goes wrong on purpose, and an account of every request.

Knows HTTP messages and nothing of what they are about. The first rule that matches a request, and has its
turn, decides what becomes of it; chance is seeded: the same requests in the same order meet the same faults.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Kind = Literal["429", "500", "cut", "hang", "slow", "flip"]
Style = Literal["ratelimit", "retry-after"]
KINDS: tuple[str, ...] = get_args(Kind)
STYLES: tuple[str, ...] = get_args(Style)
ADMIN = "/_dev/"
MAX_REMEMBERED = 100_000
STEP_SECONDS = 0.05
SLOW_PIECES = 40


@dataclass
class Rule:
    """One way in which requests fail."""

    match: str  # a regular expression, searched in "METHOD /path"
    kind: Kind
    count: int | None = None  # so many times; None: always
    probability: float = 1.0  # of each request that matches
    seconds: float = 1.0  # that `hang` and `slow` take, and that 429 asks for
    after: int = 0  # requests that match and pass before the first that does not
    style: Style = "ratelimit"  # of the header of a 429

    def __post_init__(self) -> None:
        """Raise ValueError for a rule that can never work."""
        try:
            re.compile(self.match)
        except (re.error, TypeError) as exc:
            raise ValueError(f"match: {exc}") from exc
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")
        if self.style not in STYLES:
            raise ValueError(f"style: {self.style!r} is none of {', '.join(STYLES)}")
        numbers = (self.probability, self.seconds, self.after, 0 if self.count is None else self.count)
        if not all(number >= 0 for number in numbers):
            raise ValueError("count, probability, seconds and after are numbers, 0 or more")

    @classmethod
    def from_json(cls, given: object) -> Rule:
        """Read a rule as it comes over HTTP."""
        names = {field.name for field in fields(cls)}
        if not isinstance(given, dict) or not {"match", "kind"} <= set(given) <= names:
            raise ValueError(f"a rule is an object with match and kind, and of {', '.join(sorted(names))}")
        return cls(**{**given, "kind": str(given["kind"])})


@dataclass
class Seen:
    """One request and what became of it; `status` is 0 while nothing was answered."""

    at: float  # seconds since 1970
    method: str
    path: str
    query: str
    range: str
    status: int = 0
    sent_bytes: int = 0  # of the body
    fault: str = ""


class Faults:
    """Rules and account, shared by the server's thread and those who ask and set."""

    def __init__(self, seed: int = 0) -> None:
        """`seed` decides what chance decides."""
        self.stopping = threading.Event()
        self._chance = random.Random(seed)  # noqa: S311 -- faults need no secret randomness
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._seen: deque[Seen] = deque(maxlen=MAX_REMEMBERED)

    def add(self, rule: Rule) -> None:
        """Have requests fail; rules that were there before come first."""
        with self._lock:
            self._rules.append(rule)

    def clear(self) -> None:
        """Have nothing fail any more."""
        with self._lock:
            self._rules.clear()

    def rules(self) -> list[dict[str, Any]]:
        """Give the rules as they stand; `count` and `after` have gone down."""
        with self._lock:
            return [asdict(rule) for rule in self._rules]

    def requests(self, match: str = "") -> list[Seen]:
        """Give the requests so far, those in whose "METHOD /path" `match`, a regular expression, is found."""
        wanted = re.compile(match)
        with self._lock:
            return [seen for seen in self._seen if wanted.search(f"{seen.method} {seen.path}")]

    def forget(self) -> None:
        """Start the account anew."""
        with self._lock:
            self._seen.clear()

    def note(self, seen: Seen) -> Rule | None:
        """Enter a request into the account and choose what befalls it."""
        with self._lock:
            self._seen.append(seen)
            for rule in self._rules:
                if self._has_turn(rule, f"{seen.method} {seen.path}"):
                    seen.fault = rule.kind
                    return rule
            return None

    def _has_turn(self, rule: Rule, line: str) -> bool:
        if not re.search(rule.match, line) or rule.count == 0:
            return False
        if rule.after > 0:
            rule.after -= 1
            return False
        if rule.probability < 1 and self._chance.random() >= rule.probability:
            return False
        rule.count = None if rule.count is None else rule.count - 1
        return True

    def place(self, length: int) -> int:
        """Choose one of `length` bytes."""
        with self._lock:
            return self._chance.randrange(max(length, 1))

    async def wait(self, seconds: float) -> None:
        """Wait, but not beyond the server's end."""
        deadline = time.monotonic() + seconds
        # The end is told from another thread, which an asyncio.Event does not allow.
        while (left := deadline - time.monotonic()) > 0 and not self.stopping.is_set():  # noqa: ASYNC110
            await asyncio.sleep(min(left, STEP_SECONDS))


class Cut(Exception):
    """The answer ends here."""


class Injector:
    """ASGI middleware: notes each request and makes of its answer what the rules say."""

    def __init__(self, app: ASGIApp, faults: Faults) -> None:
        """`faults` has the rules and takes the account."""
        self.app = app
        self.faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith(ADMIN):
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("range", "")
        query = scope["query_string"].decode("latin-1")
        seen = Seen(time.time(), scope["method"], scope["path"], query, asked)
        rule = self.faults.note(seen)
        app = self.app
        send = self._noted(seen, send)
        match rule.kind if rule else "":
            case "429" | "500" if rule:
                app = failure(rule)
            case "hang" if rule:
                await self.faults.wait(rule.seconds)
            case "slow" if rule:
                send = self._slow(send, rule.seconds)
            case "flip":
                send = self._flipped(send)
            case "cut":
                send = cut(send)
        try:
            await app(scope, receive, send)
        except* (Cut, ClientDisconnect):
            pass  # an answer that ends early has the server close the connection; nobody waits for the other

    def _noted(self, seen: Seen, send: Send) -> Send:
        async def through(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            await send(message)
            seen.sent_bytes += len(message.get("body", b""))

        return through

    def _slow(self, send: Send, seconds: float) -> Send:
        length = 0

        async def through(message: Message) -> None:
            nonlocal length
            body = message.get("body", b"")
            if message["type"] == "http.response.start":
                length = length_of(message)
            if not body:
                await send(message)
                return
            size = max(1, length // SLOW_PIECES)
            for begin in range(0, len(body), size):
                piece = body[begin : begin + size]
                await self.faults.wait(seconds * len(piece) / max(length, len(body)))
                has_more = begin + size < len(body) or message.get("more_body", False)
                await send({**message, "body": piece, "more_body": has_more})

        return through

    def _flipped(self, send: Send) -> Send:
        place = 0

        async def through(message: Message) -> None:
            nonlocal place
            body = message.get("body", b"")
            if message["type"] == "http.response.start":
                place = self.faults.place(length_of(message))
            elif 0 <= place < len(body):
                changed = bytearray(body)
                changed[place] ^= 1
                message = {**message, "body": bytes(changed)}
            if message["type"] == "http.response.body":
                place -= len(body)
            await send(message)

        return through


def length_of(message: Message) -> int:
    """How long an answer says that it will be."""
    return int(Headers(raw=message["headers"]).get("content-length", "0"))


def cut(send: Send) -> Send:
    """Let half of a body through, and no more."""
    left = 0

    async def through(message: Message) -> None:
        nonlocal left
        body = message.get("body", b"")
        if message["type"] == "http.response.start":
            left = length_of(message) // 2
        elif len(body) > left:
            await send({**message, "body": body[:left], "more_body": True})
            raise Cut
        left -= len(body)
        await send(message)

    return through


def failure(rule: Rule) -> JSONResponse:
    """Write the answer of a server that has had enough, or that has a bug."""
    if rule.kind == "500":
        return JSONResponse({"error": "Internal Error - an injected fault"}, 500)
    seconds = round(rule.seconds)
    headers = (
        {"Retry-After": str(seconds)}
        if rule.style == "retry-after"
        else {"RateLimit": f'"api";r=0;t={seconds}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    )
    return JSONResponse({"error": "Too Many Requests - an injected fault"}, 429, headers=headers)
