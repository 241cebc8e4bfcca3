"""Serving processes for tests: real HTTP servers that speak the protocols of real ones and really read the
model folders that they are told of.

    with SglangServer(launch=base) as server:
        server.fault = "stale"                # from now on; None is a server that works
        server.faults["000002-"] = "refuses"  # or only with a version whose label begins so
        server.serves, server.label           # whose bytes it has, and what it says that it serves
        server.restart()                      # same port, launch weights

They are built from what SGLang 0.5.23, vLLM 0.33.0 and Triton (tritonclient 2.73.0) publish; each module says
from which files. They are no proof that the real ones behave so.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import uvicorn
from daemons import free_port
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request

    View = Callable[[Request], Awaitable[Response]]

Fault = Literal[
    "500",  # every answer is an error
    "nonsense",  # every answer is 200 and no JSON
    "endless",  # every answer is 200 and has no end
    "dripping",  # every answer comes a byte at a time
    "hangs",  # takes requests and answers none
    "refuses",  # says that it cannot load this version, and keeps the one it has
    "stale",  # says that it took the version, and keeps the weights it has
    "other",  # says that it took the version, and that it serves another one
    "restarts",  # once: ends while it loads, and comes back as it was launched
    "slow",  # takes `pause` seconds to load
]
SERVER_FAULTS = ("500", "nonsense", "endless", "dripping", "hangs")
START_SECONDS = 20.0


@dataclass(frozen=True)
class Weights:
    """What a server read from a model folder: `label` names the version, `digest` the bytes."""

    label: str
    digest: str


def read_model(folder: Path) -> Weights:
    """Read a model folder as a server does: its config.json, and every tensor that the files declare."""
    json.loads((folder / "config.json").read_bytes())
    running = hashlib.sha256()
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"no safetensors in {folder}")
    for shard in shards:
        content = shard.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if 8 + length + end != len(content):
            raise ValueError(f"{shard} is cut off")
        running.update(content)
    return Weights(folder.resolve().parent.name, running.hexdigest())


class ModelServer:
    """What all of them have: a port for life, launch weights, faults, an account of what was asked."""

    def __init__(self, launch: Path, *, port: int | None = None) -> None:
        """`launch` is the model folder in its launch line."""
        self.launch = launch
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.fault: Fault | None = None
        self.faults: dict[str, Fault] = {}
        self.pause = 0.5
        self.asked: list[tuple[str, str, Any]] = []  # method, path with query, body
        self.starts = 0
        self._running: tuple[uvicorn.Server, threading.Thread] | None = None
        self._lock = threading.RLock()  # it may be restarting by itself
        self.weights = read_model(launch)

    # What it serves

    @property
    def serves(self) -> str:
        """The label of the version whose bytes it has, whatever it says."""
        return self.weights.label

    @property
    def label(self) -> str:
        """What it says that it serves."""
        raise NotImplementedError

    def begin(self) -> None:
        """Take up the launch weights."""
        self.weights = read_model(self.launch)

    def routes(self) -> dict[tuple[str, str], View]:
        """Give the views by method and path."""
        raise NotImplementedError

    async def take(self, folder: str) -> Weights | str:
        """Load a folder, as the faults have it; gives what was read, or why it could not be."""
        fault = self.fault_with(folder)
        if fault == "slow":
            await asyncio.sleep(self.pause)
        if fault == "restarts":
            self._forget(fault)
            threading.Thread(target=self.restart, daemon=True).start()
            await asyncio.sleep(START_SECONDS)
        if fault == "refuses":
            return "it was told to refuse"
        try:
            found = read_model(Path(folder))
        except (OSError, ValueError, KeyError, struct.error) as exc:
            return f"{type(exc).__name__}: {exc}"
        if fault != "stale":
            self.weights = found
        return found

    def fault_with(self, folder: str) -> Fault | None:
        """Which fault it has with a version."""
        label = Path(folder).resolve().parent.name
        return next((fault for start, fault in self.faults.items() if label.startswith(start)), self.fault)

    def _forget(self, fault: Fault) -> None:
        """Have a fault that happens once not happen again."""
        self.fault = None if self.fault == fault else self.fault
        self.faults = {start: other for start, other in self.faults.items() if other != fault}

    # The process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen at the port, with the launch weights."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        self.begin()
        routes = [
            Route(path, self._faulty(view), methods=[method])
            for (method, path), view in self.routes().items()
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=self.port, log_level="critical", lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not server.started:
            assert thread.is_alive(), f"no server at port {self.port}"
            assert time.monotonic() < deadline, f"no server at port {self.port} within {START_SECONDS} s"
            time.sleep(0.01)
        self._running = server, thread
        self.starts += 1

    def stop(self) -> None:
        """End at once: connections are dropped, nobody listens any more."""
        with self._lock:
            if self._running:
                server, thread = self._running
                for connection in list(server.server_state.connections):  # as a process that was killed
                    connection.loop.call_soon_threadsafe(connection.transport.abort)
                server.should_exit = server.force_exit = True
                thread.join(START_SECONDS)
                assert not thread.is_alive()
                self._running = None

    def restart(self) -> None:
        """End and come back at the same port, as it was launched."""
        with self._lock:
            self.stop()
            self.start()

    def _faulty(self, view: View) -> View:
        async def answer(request: Request) -> Response:
            content: Any = await request.body()
            query = f"?{request.url.query}" if request.url.query else ""
            with suppress(ValueError):
                content = json.loads(content) if content else None
            self.asked.append((request.method, request.url.path + query, content))
            if self.fault in SERVER_FAULTS:
                return await _broken(self.fault)
            return await view(request)

        return answer

    def calls(self, path: str) -> list[Any]:
        """The bodies with which a path was asked."""
        return [body for _, asked, body in self.asked if asked.partition("?")[0] == path]


async def _broken(fault: str) -> Response:
    if fault == "hangs":
        await asyncio.sleep(3600)
    if fault == "500":
        return JSONResponse({"error": {"message": "out of order"}}, status_code=500)
    if fault == "nonsense":
        return Response("<html>Welcome to the login page</html>", media_type="text/html")

    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" " * (1 if fault == "dripping" else 1 << 20)
            await asyncio.sleep(0.05 if fault == "dripping" else 0)

    return StreamingResponse(drip(), media_type="application/json")
