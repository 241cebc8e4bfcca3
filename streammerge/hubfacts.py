"""What a Hub says of a repository and its files, read from its JSON; nothing it says is taken unchecked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from streammerge.headers import MAX_FILES, is_file_name

COMMIT = re.compile(r"[0-9a-zA-Z]{1,64}")
HASH = re.compile(r"[0-9a-fA-F]{40,64}")
LARGEST_FILE = 1 << 50


@dataclass(frozen=True, slots=True)
class File:
    """A file of a repository at one commit; sha256 for LFS files, else the git object id."""

    path: str
    size: int
    sha256: str = ""
    oid: str = ""

    @property
    def identity(self) -> str:
        """What changes with its content."""
        return self.sha256 or self.oid


@dataclass(frozen=True, slots=True)
class Repo:
    """What a Hub says of a repository; `files` only where they were asked for; times since 1970."""

    id: str
    sha: str
    last_modified: float
    created_at: float = 0.0
    tags: tuple[str, ...] = ()
    is_gated: bool = False
    is_private: bool = False
    is_disabled: bool = False
    files: tuple[File, ...] = ()


def read_repo(found: object) -> Repo | None:
    """Read a repository's facts; None for what has no usable name."""
    if not isinstance(found, dict) or not is_repo_id(found.get("id")):
        return None
    siblings = found.get("siblings")
    listed = siblings[:MAX_FILES] if isinstance(siblings, list) else []
    tags = found.get("tags")
    return Repo(
        id=found["id"],
        sha=_word(found.get("sha"), COMMIT),
        last_modified=read_seconds(found.get("lastModified")),
        created_at=read_seconds(found.get("createdAt")),
        tags=tuple(tag for tag in tags if isinstance(tag, str) and is_file_name(tag))
        if isinstance(tags, list)
        else (),
        is_gated=bool(found.get("gated")),
        is_private=bool(found.get("private")),
        is_disabled=bool(found.get("disabled")),
        files=tuple(file for item in listed if (file := read_file(item))),
    )


def read_file(found: object) -> File | None:
    """Read a file's facts; None for a name that could lead elsewhere."""
    if not isinstance(found, dict) or not isinstance(found.get("rfilename"), str):
        return None
    path, lfs = found["rfilename"], found.get("lfs")
    if not is_inner_path(path):
        return None
    lfs = lfs if isinstance(lfs, dict) else {}
    size = lfs.get("size", found.get("size"))
    if type(size) is not int or not 0 <= size <= LARGEST_FILE:
        return None
    sha256 = _word(lfs.get("sha256") or lfs.get("oid"), HASH)
    return File(path, size, sha256, _word(found.get("blobId"), HASH))


def _word(found: object, pattern: re.Pattern[str]) -> str:
    """Take a stranger's word where it has the form it must have; "" else."""
    return found if isinstance(found, str) and pattern.fullmatch(found) else ""


def is_inner_path(path: str) -> bool:
    """Whether a stranger's word may stand for a file below a folder, and nowhere else."""
    parts = PurePosixPath(path).parts
    strange = path.startswith("/") or "\\" in path or not parts or bool({"..", "."} & set(parts))
    return not strange and all(map(is_file_name, parts))


def is_repo_id(name: object) -> bool:
    """Whether this is ORG/NAME (or a legacy NAME) as the Hub allows it."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 200
        and name.count("/") <= 1
        and all(part and part[0] not in "-." and _is_plain(part) for part in name.split("/"))
    )


def _is_plain(part: str) -> bool:
    return part.isascii() and all(c.isalnum() or c in "-_." for c in part) and ".." not in part


def read_seconds(text: object) -> float:
    """Read an ISO time; 0.0 for anything else."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return 0.0
