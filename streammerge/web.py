"""The door to the HTTP client for serving processes: one request, one answer, bounded in size and time.

Nothing is followed to another address, for a token would go with it; certificates are verified; what is not
said within the time limit, byte by byte or not at all, is given up. A stop ends a request at once; only a
name that is being resolved is waited for, as long as the system's resolver takes. Knows nothing of targets:
what an answer means is theirs to say.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import httpx2

from streammerge import __version__, credentials
from streammerge.errors import ConfigError, TryAgain

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Container, Mapping
    from pathlib import Path

MAX_ANSWER_BYTES = 4 << 20
GLANCE_SECONDS = 0.1  # how often a request in flight is looked at, and whether to stop
MAX_QUOTED_CHARACTERS = 300
BUSY = frozenset({408, 425, 429, 502, 503, 504})
TIMES = "it is tried again by itself; is it running, and is its address right?"


@dataclass(frozen=True)
class Answer:
    """What a server said; `url` without its query, which may be nobody's business."""

    url: str
    status: int
    content: bytes

    @property
    def is_good(self) -> bool:
        """Whether it says that it did it."""
        return 200 <= self.status < 300

    @property
    def quoted(self) -> str:
        """How it begins, for a message."""
        text = self.content[: 4 * MAX_QUOTED_CHARACTERS].decode(errors="replace").strip()
        return f"{self.status}, {text[:MAX_QUOTED_CHARACTERS] or 'with nothing in it'}"

    def json(self) -> Any:  # noqa: ANN401 -- whatever JSON can say
        """Read it as JSON; TryAgain for what is none: somebody else answers there."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as exc:
            raise TryAgain(f"{self.url} answers no JSON: {self.quoted}", hint=TIMES) from exc


def send(
    method: str,
    url: str,
    *,
    content: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float,
    beat: Callable[[], None] = lambda: None,
) -> Answer:
    """Send one request and give the answer, whatever its status.

    Raises TryAgain where there is none of at most MAX_ANSWER_BYTES within `timeout` seconds, and what `beat`
    raises, which is called several times a second.
    """
    given = {"user-agent": f"streammerge/{__version__}", "accept-encoding": "identity", **(headers or {})}
    return asyncio.run(_watched(_exchange(method, url, content, given, timeout), beat))


async def _watched(exchange: Any, beat: Callable[[], None]) -> Answer:  # noqa: ANN401 -- a coroutine
    """Have it done while `beat` is called; when that raises, the connection is closed at once."""
    task: asyncio.Task[Answer] = asyncio.ensure_future(exchange)
    try:
        while not task.done():
            beat()
            await asyncio.wait({task}, timeout=GLANCE_SECONDS)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})
        _ = task.cancelled() or task.exception()  # seen, so that asyncio says nothing of it


async def _exchange(
    method: str, url: str, content: bytes | None, headers: Mapping[str, str], seconds: float
) -> Answer:
    place = url.partition("?")[0]
    try:
        async with (
            asyncio.timeout(seconds),
            httpx2.AsyncClient(verify=_certificates(), timeout=None, follow_redirects=False) as client,
            client.stream(method, url, content=content, headers=dict(headers)) as answer,
        ):
            read = bytearray()
            async for chunk in answer.aiter_raw():
                read += chunk
                if len(read) > MAX_ANSWER_BYTES:
                    raise TryAgain(f"{place} answers more than {MAX_ANSWER_BYTES:,} bytes", hint=TIMES)
            return Answer(place, answer.status_code, bytes(read))
    except TimeoutError as exc:
        raise TryAgain(
            f"{place} did not answer within {seconds:g} s",
            hint="it is tried again by itself; or raise its timeout",
        ) from exc
    except (httpx2.RequestError, httpx2.StreamError, httpx2.InvalidURL) as exc:
        raise TryAgain(f"{place} cannot be reached: {str(exc) or type(exc).__name__}", hint=TIMES) from exc


@cache
def _certificates() -> ssl.SSLContext:
    """Read the certificates of the authorities once; SSL_CERT_FILE names others."""
    return httpx2.create_ssl_context()


@dataclass(frozen=True)
class Server:
    """One server that takes and answers JSON. `timeout` is for what it may take its time with."""

    url: str
    timeout: float
    beat: Callable[[], None]
    key_file: Path | None = None

    def ask(
        self, method: str, path: str, body: object = None, *, timeout: float | None = None,
        key_file: Path | None = None, failures: Container[int] = (),
    ) -> Answer:  # fmt: skip
        """Send one request; gives an answer that says something about it: yes, no, or no such thing.

        Raises TryAgain for all others: busy, failing, another key, another address. `failures` are statuses
        from 500 on that say something here.
        """
        headers = bearer(key_file or self.key_file)
        content = None if body is None else json.dumps(body).encode()
        if content is not None:
            headers["content-type"] = "application/json"
        answer = send(
            method, self.url.rstrip("/") + path, content=content, headers=headers,
            timeout=timeout or self.timeout, beat=self.beat,
        )  # fmt: skip
        if answer.status in (401, 403):
            raise TryAgain(f"{answer.url} wants another key: {answer.quoted}", hint="see api_key_file")
        if 300 <= answer.status < 400:
            raise TryAgain(
                f"{answer.url} points elsewhere: {answer.status}", hint="give the address that it points to"
            )
        if answer.status in BUSY or (answer.status >= 500 and answer.status not in failures):
            raise TryAgain(f"{answer.url} answers {answer.quoted}", hint=TIMES)
        return answer


def bearer(key_file: Path | None) -> dict[str, str]:
    """Give the header for the key in a file, which is read anew each time: it may be exchanged."""
    if key_file is None:
        return {}
    try:
        key = credentials.read(key_file, credential="")
    except ConfigError as exc:
        raise TryAgain(exc.message, hint=exc.hint) from exc
    return {"authorization": f"Bearer {key}"}
