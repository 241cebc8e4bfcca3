"""What the hub keeps: blobs by their content, and for each repository its commits, refs and settings.

    blobs/<sha256>          the bytes of a file, of whatever repository and revision
    incoming/               uploads under way; emptied at start
    repos/<org>%2F<name>.json

Knows nothing of HTTP, tokens, faults, or what is in a file. The invariants: a name on disk has its whole
content or is not there; a commit names only blobs that are there; dates strictly increase over the whole hub.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

from streammerge import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Gated = str | bool

MAIN = "main"
ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_.][\w.-]{0,95}", re.ASCII)
REF = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{7,40}")
GIT_ATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n"
    for ending in ("bin", "gguf", "h5", "msgpack", "onnx", "pt", "pth", "safetensors")
)


class HubError(Exception):
    """What was asked for cannot be done."""


class RepoNotFound(HubError):
    """There is no such repository, or none that the caller may know of."""


class RevisionNotFound(HubError):
    """The repository has no such branch, tag or commit."""


class EntryNotFound(HubError):
    """The revision has no such file or folder; `commit` is the revision's."""

    def __init__(self, message: str, commit: str = "") -> None:
        """`commit` is empty where the revision is not known."""
        super().__init__(message)
        self.commit = commit


class Exists(HubError):
    """The name is taken already."""


class Outrun(HubError):
    """Somebody else committed in between."""


class Invalid(HubError):
    """The request contradicts itself, or cannot be understood."""


@dataclass(frozen=True)
class File:
    """One file of a commit; `oid` is what git would call it: of an LFS file, its pointer's."""

    sha256: str
    size: int
    lfs: bool
    oid: str

    @classmethod
    def lfs_of(cls, sha256: str, size: int) -> File:
        """Name a file that git keeps as a pointer."""
        return cls(sha256, size, lfs=True, oid=git_oid(pointer(sha256, size)))


@dataclass(frozen=True)
class Commit:
    """One version of a repository, with all of its files."""

    id: str
    parent: str | None
    date: str
    message: str
    files: dict[str, File]

    @property
    def title(self) -> str:
        """The first line of the message."""
        return self.message.partition("\n")[0]


@dataclass
class Repository:
    """One repository: commits in the order in which they were made, refs by name, settings."""

    id: str
    created_at: str
    updated_at: str
    private: bool = False
    gated: Gated = False
    disabled: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Repository:
        """Read what `to_json` wrote."""
        commits = {
            entry["id"]: Commit(
                **{**entry, "files": {path: File(**file) for path, file in entry["files"].items()}}
            )
            for entry in read.pop("commits")
        }
        return cls(**read, commits=commits)

    def to_json(self) -> dict[str, Any]:
        """Give plain values; commits as a list, which keeps their order."""
        plain = asdict(self)
        return {**plain, "commits": list(plain["commits"].values())}

    def find(self, revision: str) -> Commit:
        """Give the commit that a branch, a tag, a full ref or the beginning of a commit's id names."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if found := self.branches.get(name) or self.tags.get(name):
            return self.commits[found]
        begun = (
            [key for key in self.commits if key.startswith(revision)] if COMMIT.fullmatch(revision) else []
        )
        if len(begun) != 1:
            raise RevisionNotFound(f"Invalid rev id: {revision}")
        return self.commits[begun[0]]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """Give a commit and those before it, newest first."""
        at: Commit | None = commit
        while at:
            yield at
            at = self.commits[at.parent] if at.parent else None


class Store:
    """All repositories, in memory and on disk. Whoever reads or changes more than one thing holds `lock`."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        """Read what is there; `clock` gives seconds since 1970."""
        self.lock = threading.RLock()
        self._clock = clock
        self._blobs, self._incoming, self._repos = (folder / name for name in ("blobs", "incoming", "repos"))
        shutil.rmtree(self._incoming, ignore_errors=True)
        for part in (self._blobs, self._incoming, self._repos):
            part.mkdir(parents=True, exist_ok=True)
        found = [Repository.from_json(json.loads(path.read_bytes())) for path in self._repos.glob("*.json")]
        self.repositories = {repository.id: repository for repository in found}
        newest = max((repository.updated_at for repository in found), default="1970-01-01T00:00:00.000Z")
        self._last_ms = round(datetime.fromisoformat(newest).timestamp() * 1000)

    def now(self) -> str:
        """Give the time as the Hub writes it, later than any that was given before."""
        self._last_ms = max(int(self._clock() * 1000), self._last_ms + 1)
        at = datetime.fromtimestamp(self._last_ms / 1000, UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    # Blobs

    def blob(self, sha256: str) -> Path:
        """Where the bytes of a file lie, if they are there."""
        return self._blobs / sha256

    def incoming(self) -> Path:
        """Give a path to write an upload to."""
        return self._incoming / uuid4().hex

    def keep(self, written: Path, sha256: str) -> None:
        """Take in a file that was written to a path of `incoming` and hashes to `sha256`."""
        written.replace(self.blob(sha256))

    def add(self, content: bytes, *, lfs: bool = False) -> File:
        """Take in bytes as a file."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.blob(sha256).exists():
            path = self.incoming()
            path.write_bytes(content)
            self.keep(path, sha256)
        if lfs:
            return File.lfs_of(sha256, len(content))
        return File(sha256, len(content), lfs=False, oid=git_oid(content))

    # Repositories

    def create(self, repo_id: str, *, private: bool = False) -> Repository:
        """Make a repository with the first commit that the Hub makes."""
        if not ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
            raise Invalid(f"Invalid repository name: {repo_id}")
        with self.lock:
            if repo_id in self.repositories:
                raise Exists("You already created this model repo")
            at = self.now()
            repository = Repository(repo_id, at, at, private=private)
            self._append(
                repository,
                MAIN,
                None,
                {".gitattributes": self.add(GIT_ATTRIBUTES.encode())},
                "initial commit",
            )
            self.repositories[repo_id] = repository
            return repository

    def get(self, repo_id: str) -> Repository:
        """Give a repository."""
        if repo_id not in self.repositories:
            raise RepoNotFound("Repository not found")
        return self.repositories[repo_id]

    def delete(self, repo_id: str) -> None:
        """Forget a repository; its blobs stay, others may have them too."""
        with self.lock:
            self.get(repo_id)
            del self.repositories[repo_id]
            self._path(repo_id).unlink()
            files.fsync_folder(self._repos)

    def mark(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        gated: Gated | None = None,
        disabled: bool | None = None,
    ) -> None:
        """Change settings; None leaves one as it is. `gated` is "auto", "manual" or False."""
        if gated not in (None, False, "auto", "manual"):
            raise Invalid(f"gated: {gated!r} is none of auto, manual, false")
        for key, value in (("private", private), ("disabled", disabled)):
            if not isinstance(value, bool | None):
                raise Invalid(f"{key}: {value!r} is neither true nor false")
        with self.lock:
            repository = self.get(repo_id)
            repository.private = repository.private if private is None else private
            repository.gated = repository.gated if gated is None else gated
            repository.disabled = repository.disabled if disabled is None else disabled
            self._save(repository)

    # Commits

    def commit(
        self,
        repo_id: str,
        branch: str,
        changes: Mapping[str, File | None],
        *,
        message: str,
        parent: str | None = None,
    ) -> Commit:
        """Add a commit to a branch: `changes` gives new files by path, and None for what goes.

        `parent`, where given, must be the branch's head, or at least its beginning.
        """
        with self.lock:
            repository = self.get(repo_id)
            if branch not in repository.branches:
                raise RevisionNotFound(f"Invalid rev id: {branch}")
            head = repository.commits[repository.branches[branch]]
            if parent is not None and not (COMMIT.fullmatch(parent) and head.id.startswith(parent)):
                raise Outrun("A commit has happened since. Please refresh and try again.")
            merged = {**head.files, **changes}
            kept = {path: file for path, file in sorted(merged.items()) if file is not None}
            return self._append(repository, branch, head.id, kept, message)

    def set_branch(self, repo_id: str, branch: str, revision: str, *, is_new: bool = False) -> None:
        """Point a branch at any commit, whether or not that continues what it had."""
        with self.lock:
            repository = self.get(repo_id)
            require_ref_name(branch)
            if is_new and branch in repository.branches:
                raise Exists(f"Reference already exists: {branch}")
            repository.branches[branch] = repository.find(revision).id
            if not is_new:
                repository.updated_at = self.now()
            self._save(repository)

    def add_tag(self, repo_id: str, tag: str, revision: str) -> None:
        """Name a commit."""
        with self.lock:
            repository = self.get(repo_id)
            require_ref_name(tag)
            if tag in repository.tags:
                raise Exists(f"Tag reference exists already: {tag}")
            repository.tags[tag] = repository.find(revision).id
            self._save(repository)

    def remove_ref(self, repo_id: str, name: str, *, is_tag: bool) -> None:
        """Forget a tag or a branch, but never `main`."""
        with self.lock:
            repository = self.get(repo_id)
            refs = repository.tags if is_tag else repository.branches
            if name not in refs:
                raise RevisionNotFound(f"Reference does not exist: {name}")
            if refs is repository.branches and name == MAIN:
                raise Invalid("The main branch cannot be deleted")
            del refs[name]
            self._save(repository)

    def squash(self, repo_id: str, branch: str = MAIN, message: str = "Super-squash branch") -> Commit:
        """Replace a branch's history by one commit; commits that no ref leads to are gone."""
        with self.lock:
            repository = self.get(repo_id)
            if branch not in repository.branches:
                raise RevisionNotFound(f"Invalid rev id: {branch}")
            head = repository.commits[repository.branches[branch]]
            squashed = self._append(repository, branch, None, head.files, message)
            refs = {**repository.branches, **repository.tags}.values()
            reached = {at.id for ref in refs for at in repository.history(repository.commits[ref])}
            repository.commits = {key: at for key, at in repository.commits.items() if key in reached}
            self._save(repository)
            return squashed

    def _append(
        self, repository: Repository, branch: str, parent: str | None, kept: dict[str, File], message: str
    ) -> Commit:
        at = self.now()
        named = [repository.id, parent, at, message, sorted((path, file.oid) for path, file in kept.items())]
        key = hashlib.sha1(json.dumps(named).encode(), usedforsecurity=False).hexdigest()
        commit = Commit(key, parent, at, message, kept)
        repository.commits[key] = commit
        repository.branches[branch] = key
        repository.updated_at = at
        self._save(repository)
        return commit

    def _path(self, repo_id: str) -> Path:
        return self._repos / f"{quote(repo_id, safe='')}.json"

    def _save(self, repository: Repository) -> None:
        files.replace_file(self._path(repository.id), files.canonical_json(repository.to_json()))


def require_ref_name(name: str) -> None:
    """Refuse what can be no branch's or tag's name, or would be taken for a commit."""
    if not REF.fullmatch(name) or ".." in name or re.fullmatch(r"[0-9a-f]{40}", name):
        raise Invalid(f"Invalid reference name: {name}")


def pointer(sha256: str, size: int) -> bytes:
    """Write what git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    """Name content as git does."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
