"""A small Hugging Face Hub in a folder, for tests, demos and trials offline: `streammerge dev-hub`.

    with DevHub(tmp_path / "hub") as hub:
        hub.publish("team/model", {"README.md": card, "model.safetensors": weights})
        HfApi(endpoint=hub.url).model_info("team/model")

It speaks to the real huggingface_hub client and does not import it; nor does it know anything of merging. It
keeps models only, without pull requests, discussions, Xet or renamed repositories, and is no server for the
internet.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from streammerge.devhub.api import Call, Hub, Reading
from streammerge.devhub.faults import Faults, Injector, Rule, Seen
from streammerge.devhub.storage import MAIN, Invalid, RepoNotFound, Store
from streammerge.devhub.uploads import LARGEST_REGULAR_BYTES, LFS_SUFFIXES, Writing, checked
from streammerge.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from starlette.routing import Route

    from streammerge.devhub.faults import Kind, Style
    from streammerge.devhub.storage import File, Gated

__all__ = ["DevHub", "Rule", "Seen"]

PAGE_SIZE = 1000
START_SECONDS = 10.0


class DevHub:
    """The hub in a folder, and the server in front of it, from `start` to `stop` and as often as wanted."""

    def __init__(
        self,
        folder: Path,
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        token: str | None = None,
        seed: int = 0,
        page_size: int = PAGE_SIZE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Port 0 is any free one, the same after a restart; `seed` decides what faults leave to chance."""
        self.store = Store(folder, clock)
        self.faults = Faults(seed)
        self.hub = Hub(self.store, token, page_size)
        self._address = listen
        self._server: Server | None = None
        routes = [*Admin(self).routes(), *Writing(self.hub).routes(), *Reading(self.hub).routes()]
        self.app = Starlette(routes=routes, middleware=[Middleware(Injector, faults=self.faults)])

    # The server

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        host, port = self._address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Serve on a thread of its own; connections are accepted when this returns."""
        self.faults.stopping.clear()
        self._server = Server(self.app, self._address, setting="--listen")
        self._address = self._server.address
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(self._address, timeout=START_SECONDS).close()
                return
            time.sleep(0.01)
        raise TimeoutError(f"{self.url} was not served within {START_SECONDS:g} s")

    def stop(self) -> None:
        """Close the port: connections are refused from now on."""
        self.faults.stopping.set()
        if self._server:
            self._server.stop()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # What is on it

    def publish(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | Path | None],
        *,
        message: str = "Upload",
        branch: str = MAIN,
    ) -> str:
        """Commit files, given as content or as a path of this machine; None deletes. Gives the commit's id.

        The repository is made if it is not there. What an upload would send by LFS is an LFS file here too.
        """
        with self.store.lock:
            if repo_id not in self.store.repositories:
                self.store.create(repo_id)
            changes: dict[str, File | None] = {}
            for path, given in files.items():
                content = given.read_bytes() if isinstance(given, Path) else given
                if content is None:
                    changes[checked(path)] = None
                    continue
                encoded = content.encode() if isinstance(content, str) else content
                is_lfs = Path(path).suffix in LFS_SUFFIXES or len(encoded) > LARGEST_REGULAR_BYTES
                changes[checked(path)] = self.store.add(encoded, lfs=is_lfs and bool(encoded))
            return self.store.commit(repo_id, branch, changes, message=message).id

    def mark(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        gated: Gated | None = None,
        disabled: bool | None = None,
    ) -> None:
        """Change settings of a repository; None leaves one as it is. `gated` is "auto", "manual" or False."""
        self.store.mark(repo_id, private=private, gated=gated, disabled=disabled)

    def move(self, repo_id: str, revision: str, *, branch: str = MAIN) -> None:
        """Point a branch at another commit by force; commits that it had stay reachable by their ids."""
        self.store.set_branch(repo_id, branch, revision)

    def squash(self, repo_id: str, *, branch: str = MAIN) -> str:
        """Make one commit of a branch's history and forget the others; gives its id."""
        return self.store.squash(repo_id, branch).id

    # What goes wrong, and what was asked

    def fault(
        self,
        match: str,
        kind: Kind,
        *,
        count: int | None = None,
        probability: float = 1.0,
        seconds: float = 1.0,
        after: int = 0,
        style: Style = "ratelimit",
    ) -> None:
        """Have requests fail whose "METHOD /path" has the regular expression `match` in it: see `Rule`."""
        self.faults.add(Rule(match, kind, count, probability, seconds, after, style))

    def requests(self, match: str = "") -> list[Seen]:
        """Give the requests so far, those of this module's own addresses left out."""
        return self.faults.requests(match)

    def count(self, match: str = "") -> int:
        """Count the requests so far."""
        return len(self.requests(match))


class Admin:
    """The addresses below /_dev/, for tests and trials in another process; the token guards them too."""

    def __init__(self, dev: DevHub) -> None:
        """`dev` does what is asked for."""
        self.dev = dev

    def routes(self) -> list[Route]:
        """Every address of ours."""
        route = self.dev.hub.route
        return [
            route("/_dev/faults", self.faults, "GET", "POST", "DELETE"),
            route("/_dev/requests", self.requests, "GET", "DELETE"),
            route("/_dev/repos/{org}/{name}", self.repository, "POST"),
        ]

    def faults(self, call: Call) -> Response:
        """List the rules, add one or several, or forget all."""
        self.dev.hub.require_writer(call)
        if call.request.method == "DELETE":
            self.dev.faults.clear()
        elif call.request.method == "POST":
            given = call.json()
            try:
                for rule in [Rule.from_json(entry) for entry in given.get("rules", [given])]:
                    self.dev.faults.add(rule)
            except (TypeError, ValueError) as exc:
                raise Invalid(str(exc)) from exc
        return JSONResponse(self.dev.faults.rules())

    def requests(self, call: Call) -> Response:
        """Give the account of requests, or of those that `match` fits; or start it anew."""
        self.dev.hub.require_writer(call)
        if call.request.method == "DELETE":
            self.dev.faults.forget()
        try:
            found = self.dev.requests(call.request.query_params.get("match", ""))
        except ValueError as exc:
            raise Invalid(f"match: {exc}") from exc
        return JSONResponse({"count": len(found), "requests": [vars(seen) for seen in found]})

    def repository(self, call: Call) -> Response:
        """Mark a repository, move its branch, or squash that."""
        self.dev.hub.require_writer(call)
        given = call.json()
        unknown = given.keys() - {"private", "gated", "disabled", "move", "squash", "branch"}
        if unknown:
            raise Invalid(f"unknown: {', '.join(sorted(unknown))}")
        if call.repo_id not in self.dev.store.repositories:
            raise RepoNotFound("Repository not found")
        branch = str(given.get("branch", MAIN))
        self.dev.mark(call.repo_id, **{key: given.get(key) for key in ("private", "gated", "disabled")})
        if "move" in given:
            self.dev.move(call.repo_id, str(given["move"]), branch=branch)
        if given.get("squash") is True:
            self.dev.squash(call.repo_id, branch=branch)
        repository = self.dev.store.get(call.repo_id)
        return JSONResponse({**repository.to_json(), "sha": repository.branches[MAIN]})
