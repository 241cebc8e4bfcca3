"""The Hub's addresses that only read, and what every address shares: who may, how errors are said, pages.

Knows HTTP and the real client's expectations of it (headers, error codes, `Link`); what is said is `views`'.
Every answer is made while the store's lock is held; files are streamed after that, from blobs that never
change.
"""

from __future__ import annotations

import base64
import hmac
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from streammerge.devhub import views
from streammerge.devhub.storage import (
    MAIN,
    EntryNotFound,
    Exists,
    HubError,
    Invalid,
    Outrun,
    RepoNotFound,
    RevisionNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from streammerge.devhub.storage import Repository, Store

    Handler = Callable[["Call"], Response]

USER = "dev"
MAX_BODY_BYTES = 256 << 20
SORT_KEYS = {"createdAt": "createdAt", "created_at": "createdAt"}  # by anything else: last modified first
TRUE = frozenset(["1", "true", "True"])


class Denied(HubError):
    """The caller must show a token, or another one."""


class GatedRepo(HubError):
    """The files are for those who were let in."""


class Disabled(HubError):
    """The Hub has taken the repository out of use."""


class TooLarge(HubError):
    """More was sent than is read into memory."""


STATUS: dict[type[HubError], int] = {
    Denied: 401,
    Disabled: 403,
    EntryNotFound: 404,
    Exists: 409,
    GatedRepo: 403,
    Invalid: 400,
    Outrun: 412,
    RepoNotFound: 404,
    RevisionNotFound: 404,
    TooLarge: 413,
}
NAMED = (
    EntryNotFound,
    GatedRepo,
    RepoNotFound,
    RevisionNotFound,
)  # the client reads their names in X-Error-Code


@dataclass(frozen=True)
class Call:
    """One request with its body."""

    request: Request
    body: bytes

    @property
    def repo_id(self) -> str:
        """The repository in the address."""
        return f"{self['org']}/{self['name']}"

    @property
    def base_url(self) -> str:
        """Where the client sees this server, without a slash at the end."""
        return str(self.request.base_url).rstrip("/")

    def __getitem__(self, name: str) -> str:
        return str(self.request.path_params[name])

    def asks(self, name: str) -> bool:
        """Whether the query says yes to something."""
        return self.request.query_params.get(name) in TRUE

    def number(self, name: str, default: int) -> int:
        """Read a number of the query."""
        text = self.request.query_params.get(name, str(default))
        if not (text.isascii() and text.isdigit()):
            raise Invalid(f"{name}: {text!r} is no number")
        return int(text)

    def json(self) -> dict[str, Any]:
        """Read the body as one JSON object."""
        return json_object(self.body)


@dataclass
class Hub:
    """What all addresses have in common."""

    store: Store
    token: str | None
    page_size: int

    def route(self, path: str, handler: Handler, *methods: str) -> Route:
        """Lay a handler on an address."""

        async def endpoint(request: Request) -> Response:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    return say(TooLarge(f"more than {MAX_BODY_BYTES} bytes"))
            return await run_in_threadpool(self.answer, handler, Call(request, bytes(body)))

        return Route(path, endpoint, methods=list(methods) or ["GET"])

    def answer(self, handler: Handler, call: Call) -> Response:
        """Run a handler alone; its error is the answer."""
        try:
            with self.store.lock:
                if call.request.headers.get("authorization"):
                    self.require_token_is_right(call)
                return handler(call)
        except HubError as exc:
            return say(exc)

    def knows(self, call: Call) -> bool:
        """Whether the caller has shown the token."""
        shown = call.request.headers.get("authorization", "")
        return self.token is not None and hmac.compare_digest(shown.encode(), f"Bearer {self.token}".encode())

    def require_token_is_right(self, call: Call) -> None:
        """Refuse a wrong token also where none is needed, as the Hub does."""
        if self.token is not None and not self.knows(call):
            raise Denied("Invalid credentials in Authorization header")

    def sees(self, call: Call, repository: Repository) -> bool:
        """Whether the caller may know that a repository is there."""
        return not repository.private or self.token is None or self.knows(call)

    def readable(self, call: Call, *, files: bool = False) -> Repository:
        """Give the repository in the address to those who may read of it, or its files."""
        repository = self.store.get(call.repo_id)
        if not self.sees(call, repository):
            raise RepoNotFound("Repository not found")
        if repository.disabled:
            raise Disabled("Access to this resource is disabled.")
        if files and repository.gated and not self.knows(call):
            raise GatedRepo(
                f"Access to model {repository.id} is restricted and you are not in the authorized list."
            )
        return repository

    def require_writer(self, call: Call) -> None:
        """Let through whoever may write."""
        if self.token is not None and not self.knows(call):
            raise Denied("Invalid username or password.")

    def writable(self, call: Call) -> Repository:
        """Give the repository in the address to those who may change it."""
        self.require_writer(call)
        return self.readable(call)


def json_object(text: bytes) -> dict[str, Any]:
    """Read one JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise Invalid(f"not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise Invalid("a JSON object was expected")
    return value


def say(error: HubError) -> Response:
    """Write an error as the client reads it."""
    text = str(error)
    headers = {"X-Error-Message": text.encode("ascii", "replace").decode().replace("\n", " ")}
    if isinstance(error, NAMED):
        headers["X-Error-Code"] = type(error).__name__
    if isinstance(error, EntryNotFound) and error.commit:
        headers["X-Repo-Commit"] = error.commit
    return JSONResponse({"error": text}, STATUS[type(error)], headers=headers)


def page(call: Call, items: list[Any], size: int) -> Response:
    """Give the items from the cursor on, at most `size`, and where there are more of them."""
    begin = call.number("cursor", 0)
    headers = {"X-Total-Count": str(len(items))}
    if begin + size < len(items):
        headers["Link"] = next_link(call, str(begin + size))
    return JSONResponse(items[begin : begin + size], headers=headers)


def next_link(call: Call, cursor: str) -> str:
    """Write where the next page is."""
    return f'<{call.request.url.include_query_params(cursor=cursor)}>; rel="next"'


class Reading:
    """The addresses that read."""

    def __init__(self, hub: Hub) -> None:
        """`hub` says who may."""
        self.hub = hub

    def routes(self) -> list[Route]:
        """Every address that reads."""
        route, models = self.hub.route, "/api/models/{org}/{name}"
        return [
            route("/api/whoami-v2", self.whoami),
            route("/api/models", self.models),
            route(models + "/revision/{revision:path}", self.model),
            route(models + "/tree/{rest:path}", self.tree),
            route(models + "/paths-info/{revision:path}", self.paths, "POST"),
            route(models + "/commits/{revision:path}", self.commits),
            route(models + "/refs", self.refs),
            route(models, self.model),
            route("/{org}/{name}/resolve/{rest:path}", self.resolve),
        ]

    def whoami(self, call: Call) -> Response:
        """Say whose token it is; whoever shows none here is nobody."""
        if not call.request.headers.get("authorization"):
            raise Denied("Invalid username or password.")
        access = {"displayName": "dev-hub", "role": "write", "createdAt": "2025-01-01T00:00:00.000Z"}
        return JSONResponse(
            {
                "type": "user",
                "id": "0" * 24,
                "name": USER,
                "fullname": USER,
                "isPro": False,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": access},
            }
        )

    def models(self, call: Call) -> Response:
        """List models, the newest first, and a page at a time.

        The cursor is the last model's place and not a number: what changes in between is neither skipped nor
        shown twice, unless it moved to the front.
        """
        query = call.request.query_params
        filters, author, search = set(query.getlist("filter")), query.get("author"), query.get("search", "")
        found = [
            facts
            for repository in self.hub.store.repositories.values()
            if self.hub.sees(call, repository)
            and (not author or repository.id.startswith(f"{author}/"))
            and search.lower() in repository.id.lower()
            and filters <= set((facts := views.facts_of(self.hub.store, repository))["tags"])
        ]
        key = SORT_KEYS.get(query.get("sort", ""), "lastModified")
        found.sort(key=lambda facts: (facts[key], facts["id"]), reverse=True)
        if cursor := query.get("cursor"):
            last = read_cursor(cursor)
            found = [facts for facts in found if (facts[key], facts["id"]) < last]
        size = max(min(call.number("limit", self.hub.page_size), self.hub.page_size), 1)
        shown = [
            views.listed(
                facts, query.getlist("expand"), is_full=call.asks("full"), has_card=call.asks("cardData")
            )
            for facts in found[:size]
        ]
        headers = {}
        if len(found) > size:
            headers["Link"] = next_link(call, write_cursor((found[size - 1][key], found[size - 1]["id"])))
        return JSONResponse(shown, headers=headers)

    def model(self, call: Call) -> Response:
        """Describe one model at a revision, which is main unless the address names one."""
        repository = self.hub.readable(call)
        revision = call.request.path_params.get("revision")
        facts = views.facts_of(self.hub.store, repository, revision)
        if call.asks("blobs"):
            facts["siblings"] = views.siblings(repository.find(revision or MAIN))
        if expand := call.request.query_params.getlist("expand"):
            facts = views.listed(facts, expand, is_full=True, has_card=True)
        return JSONResponse(facts)

    def tree(self, call: Call) -> Response:
        """List the files of a revision, or of a folder in it."""
        repository = self.hub.readable(call)
        commit, folder = views.split_revision(repository, call["rest"])
        expand = call.asks("expand")
        found = views.tree(repository, commit, folder, is_deep=call.asks("recursive"), expand=expand)
        return page(call, found, min(self.hub.page_size, 50 if expand else 1000))

    def paths(self, call: Call) -> Response:
        """Describe those of some paths that are there; they come as a form, or as JSON."""
        repository = self.hub.readable(call)
        commit = repository.find(call["revision"])
        if call.request.headers.get("content-type", "").startswith("application/json"):
            given = call.json()
            asked, expand = list(views.texts(given.get("paths"))), given.get("expand") is True
        else:
            form = parse_qs(call.body.decode("utf-8", "replace"))
            asked, expand = form.get("paths", []), form.get("expand", [""])[0] in TRUE
        names = [path.strip("/") for path in asked]
        return JSONResponse(views.entries(repository, commit, names, expand=expand))

    def commits(self, call: Call) -> Response:
        """List a revision's history."""
        repository = self.hub.readable(call)
        found = views.commits(repository, repository.find(call["revision"]))
        return page(call, found, min(self.hub.page_size, max(call.number("limit", 50), 1)))

    def refs(self, call: Call) -> Response:
        """List branches and tags."""
        return JSONResponse(views.refs(self.hub.readable(call)))

    def resolve(self, call: Call) -> Response:
        """Give a file of a revision, or the part of it that Range asks for."""
        repository = self.hub.readable(call, files=True)
        commit, path = views.split_revision(repository, call["rest"])
        if path not in commit.files:
            raise EntryNotFound("Entry not found", commit.id)
        file = commit.files[path]
        etag = f'"{file.sha256 if file.lfs else file.oid}"'
        return FileResponse(
            self.hub.store.blob(file.sha256),
            filename=path.rpartition("/")[2],
            content_disposition_type="inline",
            headers={
                "ETag": etag,
                "X-Repo-Commit": commit.id,
                "X-Linked-Etag": etag,
                "X-Linked-Size": str(file.size),
            },
        )


def write_cursor(place: tuple[str, str]) -> str:
    """Write a place in a listing so that it passes through an address."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def read_cursor(cursor: str) -> tuple[str, str]:
    """Read what `write_cursor` wrote."""
    try:
        at, repo_id = json.loads(base64.urlsafe_b64decode(cursor))
    except (ValueError, TypeError) as exc:
        raise Invalid(f"cursor: {exc}") from exc
    return str(at), str(repo_id)
