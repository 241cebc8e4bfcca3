"""The Hub's addresses that change something: repositories, uploads by Git LFS's basic way, commits, refs.

Knows HTTP and the order in which the real client uploads: preupload, LFS batch, PUT, verify, commit. A path
of a commit never becomes one on this machine's disk; what is uploaded must hash to what was announced.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streammerge.devhub import views
from streammerge.devhub.api import USER, Call, Hub, json_object
from streammerge.devhub.storage import MAIN, EntryNotFound, Exists, File, Invalid

if TYPE_CHECKING:
    from starlette.requests import Request

    from streammerge.devhub.storage import Commit

    Changes = dict[str, File | None]

LFS_SUFFIXES = frozenset([".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"])
LARGEST_REGULAR_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


class Writing:
    """The addresses that write."""

    def __init__(self, hub: Hub) -> None:
        """`hub` says who may."""
        self.hub = hub
        self.store = hub.store

    def routes(self) -> list[Route]:
        """Every address that writes, or only checks what is to be written."""
        route, models = self.hub.route, "/api/models/{org}/{name}"
        return [
            route("/api/repos/create", self.create, "POST"),
            route("/api/repos/delete", self.delete, "DELETE"),
            route("/api/validate-yaml", self.validate_yaml, "POST"),
            route(models + "/settings", self.settings, "PUT"),
            route(models + "/preupload/{revision:path}", self.preupload, "POST"),
            route(models + "/commit/{revision:path}", self.commit, "POST"),
            route(models + "/tag/{ref:path}", self.add_tag, "POST"),
            route(models + "/tag/{ref:path}", self.remove_tag, "DELETE"),
            route(models + "/branch/{ref:path}", self.add_branch, "POST"),
            route(models + "/branch/{ref:path}", self.remove_branch, "DELETE"),
            route(models + "/super-squash/{ref:path}", self.squash, "POST"),
            route("/{org}/{name}.git/info/lfs/objects/batch", self.batch, "POST"),
            route("/_lfs/verify", self.verify, "POST"),
            Route("/_lfs/{oid}/{size:int}/{key}", self.receive, methods=["PUT"]),
        ]

    # Repositories

    def create(self, call: Call) -> Response:
        """Make a repository; of models, there are no others here."""
        self.hub.require_writer(call)
        given = call.json()
        if given.get("type", "model") != "model":
            raise Invalid("dev-hub keeps models only")
        repo_id = named(given)
        answer = {"url": f"{call.base_url}/{repo_id}", "name": repo_id}
        is_private = given.get("visibility") == "private" or given.get("private") is True
        try:
            self.store.create(repo_id, private=is_private)
        except Exists as exc:
            return JSONResponse({**answer, "error": str(exc)}, 409)
        return JSONResponse(answer)

    def delete(self, call: Call) -> Response:
        """Forget a repository."""
        self.hub.require_writer(call)
        self.store.delete(named(call.json()))
        return Response()

    def settings(self, call: Call) -> Response:
        """Make a repository private, public, gated or open."""
        repository = self.hub.writable(call)
        given = call.json()
        visibility = given.get("visibility")
        private = given.get("private") if visibility is None else visibility == "private"
        self.store.mark(repository.id, private=private, gated=given.get("gated"))
        return JSONResponse({"private": repository.private, "gated": repository.gated})

    # Uploads

    def validate_yaml(self, call: Call) -> Response:
        """Say whether a model card's front matter can be read."""
        try:
            views.read_card(str(call.json().get("content", "")))
        except (yaml.YAMLError, TypeError) as exc:
            return JSONResponse({"errors": [{"message": f"Invalid metadata: {exc}"}], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    def preupload(self, call: Call) -> Response:
        """Say of each file how it is to come, and which version is there."""
        repository = self.hub.writable(call)
        head = repository.find(call["revision"])
        answers = []
        for asked in objects(call.json().get("files")):
            path, size = text(asked, "path"), number(asked, "size")
            is_lfs = PurePosixPath(path).suffix in LFS_SUFFIXES or size > LARGEST_REGULAR_BYTES
            there = head.files.get(path)
            oid = None if there is None else there.sha256 if there.lfs else there.oid
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answers, "commitOid": head.id})

    def batch(self, call: Call) -> Response:
        """Say where each LFS file is to be put, unless its content is here already."""
        self.hub.writable(call)
        given = call.json()
        if given.get("operation") != "upload":
            raise Invalid("dev-hub takes LFS uploads; files are downloaded by /resolve/")
        answers = []
        for asked in objects(given.get("objects")):
            oid, size = text(asked, "oid"), number(asked, "size")
            if not SHA256.fullmatch(oid):
                raise Invalid(f"{oid!r} is no SHA-256")
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not self.store.blob(oid).exists():
                put = {"href": f"{call.base_url}/_lfs/{oid}/{size}/{self._key(oid, size)}"}
                answer["actions"] = {"upload": put, "verify": {"href": f"{call.base_url}/_lfs/verify"}}
            answers.append(answer)
        media_type = "application/vnd.git-lfs+json"
        return JSONResponse({"transfer": "basic", "objects": answers}, media_type=media_type)

    async def receive(self, request: Request) -> Response:
        """Take in a file's bytes, in bounded memory; the address itself says that the sender may."""
        oid, size, key = (request.path_params[name] for name in ("oid", "size", "key"))
        if not hmac.compare_digest(key.encode(), self._key(oid, size).encode()):
            return Response("the address was not given out by this hub", 403)
        written, came, digest = self.store.incoming(), 0, hashlib.sha256()
        try:
            with written.open("xb") as file:
                async for chunk in request.stream():
                    came += len(chunk)
                    if came > size:
                        break
                    digest.update(chunk)
                    await run_in_threadpool(file.write, chunk)
            if (came, digest.hexdigest()) != (size, oid):
                return Response(f"the content is not that of {oid}", 400)
            self.store.keep(written, oid)
            return Response(headers={"ETag": f'"{oid}"'})
        finally:
            written.unlink(missing_ok=True)

    def verify(self, call: Call) -> Response:
        """Confirm that a file has come."""
        self.hub.require_writer(call)
        given = call.json()
        self._arrived(text(given, "oid"), number(given, "size"))
        return JSONResponse({})

    def _key(self, oid: str, size: int) -> str:
        secret = f"dev-hub {self.hub.token or ''}".encode()
        return hmac.new(secret, f"{oid} {size}".encode(), hashlib.sha256).hexdigest()

    def _arrived(self, oid: str, size: int | None) -> File:
        blob = self.store.blob(oid)
        if not SHA256.fullmatch(oid) or not blob.exists() or size not in (None, blob.stat().st_size):
            raise Invalid(f"LFS pointer pointed to a file that does not exist: {oid}")
        return File.lfs_of(oid, blob.stat().st_size)

    # Commits and refs

    def commit(self, call: Call) -> Response:
        """Add a commit to a branch: one JSON object a line, first the header, then what changes."""
        repository = self.hub.writable(call)
        if call.asks("create_pr"):
            raise Invalid("dev-hub has no pull requests")
        head = repository.find(call["revision"])
        header: dict[str, Any] = {}
        changes: Changes = {}
        for line in call.body.splitlines():
            if line.strip():
                entry = json_object(line)
                value = entry.get("value")
                if not isinstance(value, dict):
                    raise Invalid("a line has no value")
                if entry.get("key") == "header":
                    header = value
                else:
                    changes |= self._changed(str(entry.get("key")), value, head)
        message = "\n\n".join(views.texts([header.get("summary"), header.get("description")]))
        parent = next(views.texts(header.get("parentCommit")), None)
        made = self.store.commit(
            repository.id, call["revision"], changes, message=message or "Update", parent=parent
        )
        address = f"{call.base_url}/{repository.id}/commit/{made.id}"
        return JSONResponse({"success": True, "commitOid": made.id, "commitUrl": address, "hookOutput": ""})

    def _changed(self, kind: str, value: dict[str, Any], head: Commit) -> Changes:
        path = text(value, "path")
        match kind:
            case "file":
                return {checked(path): self.store.add(decoded(value))}
            case "lfsFile":
                size = number(value, "size") if "size" in value else None
                return {checked(path): self._arrived(text(value, "oid"), size)}
            case "deletedFile":
                gone = {path} & head.files.keys()
            case "deletedFolder":
                gone = {name for name in head.files if name.startswith(path.rstrip("/") + "/")}
            case _:
                raise Invalid(f"dev-hub cannot do {kind!r}")
        if not gone:
            raise EntryNotFound(f"A file with the name {path} does not exist", head.id)
        return dict.fromkeys(gone)

    def add_tag(self, call: Call) -> Response:
        """Name a revision."""
        repository = self.hub.writable(call)
        self.store.add_tag(repository.id, text(call.json(), "tag"), call["ref"])
        return Response(status_code=201)

    def remove_tag(self, call: Call) -> Response:
        """Forget a tag."""
        self.store.remove_ref(self.hub.writable(call).id, call["ref"], is_tag=True)
        return Response()

    def add_branch(self, call: Call) -> Response:
        """Begin a branch at a revision, at main unless one is named."""
        repository = self.hub.writable(call)
        begin = next(views.texts(json_object(call.body or b"{}").get("startingPoint")), MAIN)
        self.store.set_branch(repository.id, call["ref"], begin, is_new=True)
        return Response(status_code=201)

    def remove_branch(self, call: Call) -> Response:
        """Forget a branch."""
        self.store.remove_ref(self.hub.writable(call).id, call["ref"], is_tag=False)
        return Response()

    def squash(self, call: Call) -> Response:
        """Replace a branch's history by one commit."""
        repository = self.hub.writable(call)
        message = next(views.texts(call.json().get("message")), f"Super-squash branch {call['ref']!r}")
        self.store.squash(repository.id, call["ref"], message)
        return Response()


def named(given: dict[str, Any]) -> str:
    """Put together a repository's name; without an organisation it is the user's."""
    return f"{given.get('organization') or USER}/{text(given, 'name')}"


def text(given: dict[str, Any], key: str) -> str:
    """Read a text."""
    if not isinstance(value := given.get(key), str) or not value:
        raise Invalid(f"{key}: a text was expected")
    return value


def number(given: dict[str, Any], key: str) -> int:
    """Read a size."""
    if not isinstance(value := given.get(key), int) or value < 0:
        raise Invalid(f"{key}: a size was expected")
    return value


def objects(value: object) -> list[dict[str, Any]]:
    """Read a list of objects."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise Invalid("a list of objects was expected")
    return value


def decoded(value: dict[str, Any]) -> bytes:
    """Read the content of a regular file."""
    content = value.get("content")
    if not isinstance(content, str):
        raise Invalid("content: a text was expected")
    if value.get("encoding") != "base64":
        return content.encode()
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as exc:
        raise Invalid(f"content: {exc}") from exc


def checked(path: str) -> str:
    """Refuse a path that git would refuse too."""
    parts = path.split("/")
    if {"", ".", "..", ".git"} & set(parts) or "\\" in path or not path.isprintable():
        raise Invalid(f"Invalid path in repo: {path!r}")
    return path
