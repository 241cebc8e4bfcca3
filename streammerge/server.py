"""One HTTP port: status page, JSON, metrics, health, and a Hub's webhook. Nothing here changes the merge.

Knows what it is given to show, nothing of how it comes about.
"""

from __future__ import annotations

import hmac
import html
import json
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry
    from starlette.requests import Request

MAX_HOOK_BYTES = 1 << 20
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>streammerge</title>
<meta http-equiv="refresh" content="5">
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;width:100%}}
td,th{{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ddd}}
code{{font-size:.9em}}h1{{font-size:1.4rem}}h2{{font-size:1.1rem;margin-top:2rem}}
.hold{{background:#fff3cd;padding:.5rem 1rem}}</style>
<h1>streammerge</h1>{body}
<p><a href="api/v1/status">status</a> · <a href="api/v1/history">history</a> ·
<a href="api/v1/fine-tunes">fine-tunes</a> · <a href="metrics">metrics</a></p></html>"""


@dataclass(frozen=True)
class HubHook:
    """What a Hub's webhook may do: say that a repository changed. Its secret must match.

    mention  takes the repository's name; whether any source cares
    """

    secret: str | None
    mention: Callable[[str], bool]

    async def __call__(self, request: Request) -> Response:
        """Answer POST /hooks/hub: 403 without the secret, 202 once the repository will be looked at."""
        given = request.headers.get("x-webhook-secret", "").encode()
        if self.secret is None:
            return _no(403, "no secret is configured: set http.hub_secret_file")
        if not hmac.compare_digest(given, self.secret.encode()):
            return _no(403, "the secret does not match")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_HOOK_BYTES:
                return _no(413, "the message is too long")
        try:
            name = json.loads(body)["repo"]["name"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return _no(400, "this is no message of a Hub's webhook")
        heard = isinstance(name, str) and self.mention(name)
        return JSONResponse({"looked_at": heard}, status_code=202)


def _no(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status_code=status)


@dataclass(frozen=True)
class Views:
    """What there is to show; each is called at every request."""

    status: Callable[[], dict[str, Any]]
    history: Callable[[], list[dict[str, Any]]]
    fine_tunes: Callable[[], list[dict[str, Any]]]
    problems: Callable[[], list[str]]
    is_alive: Callable[[], bool]
    registry: Callable[[], CollectorRegistry]
    hub_hook: HubHook


def make_app(views: Views) -> Starlette:
    """Lay the views on their addresses."""

    def page(_request: Request) -> Response:
        return HTMLResponse(PAGE.format(body=summary(views)))

    def as_json(view: Callable[[], Any]) -> Callable[[Request], Response]:
        return lambda _request: JSONResponse(view())

    def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(views.registry()), media_type=None, headers={"content-type": content_type})

    def healthz(_request: Request) -> Response:
        return (
            JSONResponse({"alive": True})
            if views.is_alive()
            else JSONResponse({"alive": False}, status_code=503)
        )

    def readyz(_request: Request) -> Response:
        problems = views.problems()
        return JSONResponse(
            {"ready": not problems, "problems": problems}, status_code=503 if problems else 200
        )

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/v1/status", as_json(views.status)),
            Route("/api/v1/history", as_json(views.history)),
            Route("/api/v1/fine-tunes", as_json(views.fine_tunes)),
            Route("/metrics", metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/hooks/hub", views.hub_hook.__call__, methods=["POST"]),
        ]
    )


def summary(views: Views) -> str:
    """Write the page's middle: what is served, what is held, the latest fine-tunes and versions."""
    status = views.status()
    current, head = status["current"] or {}, status["head"] or {}
    path = html.escape(str(current.get("path", "")))
    serving = (
        f"<p>Serving version <b>{current.get('version', '-')}</b> of {status['count']} fine-tunes "
        f"by <b>{status['method']}</b>; head is {head.get('version', '-')}, {status['pending']} pending."
        f"<br><code>{path}</code></p>"
    )
    parts = [serving]
    parts += [f'<p class="hold">Held: {html.escape(status["held"])}</p>'] if status["held"] else []
    parts += [f'<p class="hold">Not ready: {html.escape(problem)}</p>' for problem in views.problems()]
    parts.append(
        table(
            "Fine-tunes",
            views.fine_tunes()[-20:],
            ("name", "source", "revision", "state", "reason", "version", "detail"),
        )
    )
    parts.append(
        table(
            "Versions",
            [{**row, "gates": verdicts(row["gates"])} for row in views.history()[-20:][::-1]],
            ("version", "state", "added", "removed", "promoted_at", "gates", "note"),
        )
    )
    return "".join(parts)


def verdicts(gates: dict[str, Any]) -> str:
    """Write what each gate said of a version."""
    return ", ".join(f"{name}: {found['verdict']}" for name, found in gates.items() if found["verdict"])


def table(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Write rows as an HTML table."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    lines = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape('' if row[c] is None else str(row[c]))}</td>" for c in columns)
        + "</tr>"
        for row in rows
    )
    return f"<h2>{title}</h2><table><tr>{head}</tr>{lines}</table>"


class Server:
    """Serves an app on its own thread from the moment it is made until `stop`."""

    def __init__(self, app: Starlette, address: tuple[str, int], *, setting: str = "http.listen") -> None:
        """Open the port at once: a taken port is a ConfigError before anything else starts.

        Port 0 is any free one, `address` has it then; `setting` is where a person would change it.
        """
        host, port = address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Named as TCP, or asyncio would not turn Nagle's algorithm off, which holds answers back for 40 ms.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen()  # who comes before the thread is up waits, and is not turned away
        except (OSError, OverflowError, TypeError, ValueError) as exc:  # the last two for what is no host
            self._socket.close()
            raise ConfigError(
                f"{setting} {host}:{port}: {exc}", hint=f"choose another port in {setting}"
            ) from exc
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Answer what is under way and close the port."""
        self._server.should_exit = True
        self._thread.join(timeout=5.0)
        self._socket.close()
