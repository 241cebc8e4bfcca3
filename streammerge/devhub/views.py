"""What the Hub says of a repository, as JSON: tags from its model card, facts, files, commits, refs.

Knows how to read a model card and the names that the Hub gives to things; nothing of HTTP, and changes
nothing. Anybody may have written a card: it is bounded, and read as data.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

import yaml

from streammerge.devhub.storage import COMMIT, MAIN, EntryNotFound, RevisionNotFound, pointer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from streammerge.devhub.storage import Commit, File, Repository, Store

    Facts = dict[str, Any]

MAX_CARD_BYTES = 64 << 10
MAX_CARD_BRACKETS = 500  # the reader's time grows with the square of how deep they nest
MAX_ADAPTER_CONFIG_BYTES = 1 << 20
BASIC = frozenset(
    [
        "_id",
        "createdAt",
        "downloads",
        "id",
        "library_name",
        "likes",
        "modelId",
        "pipeline_tag",
        "private",
        "tags",
    ]
)
FULL = BASIC | {"author", "disabled", "gated", "lastModified", "sha", "siblings"}


# ------------------------------------------------------------------------------------------------- cards


def front_matter(text: str) -> str:
    """Give the YAML between the `---` lines at the start of a model card, or nothing."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return ""
    ends = [number for number, line in enumerate(lines) if number and line.rstrip() == "---"]
    return "\n".join(lines[1 : ends[0]]) if ends else ""


def read_card(text: str) -> Facts:
    """Read a model card's front matter; raises YAMLError for one that is none, or is built to blow up."""
    head = front_matter(text)
    if head.count("[") + head.count("{") > MAX_CARD_BRACKETS:
        raise yaml.YAMLError("too many brackets")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(head)):
            raise yaml.YAMLError("aliases are not read")
        card = yaml.safe_load(head)
    except (RecursionError, ValueError) as exc:
        raise yaml.YAMLError(str(exc)) from exc
    if card is None:
        return {}
    if not isinstance(card, dict):
        raise yaml.YAMLError("the front matter is no mapping")
    written = json.dumps({str(key): value for key, value in card.items()}, default=str)
    plain: Facts = json.loads(written, parse_constant=lambda _: None)  # NaN and its like are no JSON
    return plain


@functools.lru_cache(maxsize=4096)
def _card_at(blob: Path) -> Facts:
    with blob.open("rb") as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    try:
        return read_card(text)
    except (yaml.YAMLError, TypeError):
        return {}


@functools.lru_cache(maxsize=4096)
def _adapted_by(blob: Path) -> str:
    with blob.open("rb") as file:
        text = file.read(MAX_ADAPTER_CONFIG_BYTES)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) else ""


def card_of(store: Store, commit: Commit) -> Facts:
    """Give what the model card of a commit says; an adapter without a base takes its configuration's."""
    readme, adapter = commit.files.get("README.md"), commit.files.get("adapter_config.json")
    card = dict(_card_at(store.blob(readme.sha256))) if readme else {}
    if adapter and not card.get("base_model") and (base := _adapted_by(store.blob(adapter.sha256))):
        card["base_model"] = base
    return card


def tags_of(card: Facts, paths: Iterable[str]) -> list[str]:
    """Derive a model's tags as the Hub does, each once."""
    there = set(paths)
    tags = [*texts(card.get("library_name")), *(["safetensors"] if any(map(is_safetensors, there)) else [])]
    tags += [*texts(card.get("pipeline_tag")), *texts(card.get("tags")), *texts(card.get("language"))]
    relation = next(texts(card.get("base_model_relation")), None)
    relation = relation or ("adapter" if "adapter_config.json" in there else "finetune")
    for base in texts(card.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"license:{word}" for word in texts(card.get("license"))]
    tags += [f"dataset:{word}" for word in texts(card.get("datasets"))]
    return list(dict.fromkeys(tags))


def texts(value: object) -> Iterator[str]:
    """Give a text, or those in a list."""
    yield from (
        text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text
    )


def is_safetensors(path: str) -> bool:
    """Whether a file is named like one with weights in it."""
    return path.endswith(".safetensors")


# ----------------------------------------------------------------------------------------- a repository


def facts_of(store: Store, repository: Repository, revision: str | None = None) -> Facts:
    """Everything that the Hub says of a model at a revision."""
    commit = repository.find(revision or MAIN)
    card = card_of(store, commit)
    is_main = revision in (None, MAIN)
    return {
        "_id": hashlib.sha256(repository.id.encode()).hexdigest()[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.id.partition("/")[0],
        "sha": commit.id,
        "createdAt": repository.created_at,
        "lastModified": repository.updated_at if is_main else commit.date,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": repository.disabled,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(card, commit.files),
        "library_name": next(texts(card.get("library_name")), None),
        "pipeline_tag": next(texts(card.get("pipeline_tag")), None),
        "cardData": card,
        "siblings": [{"rfilename": path} for path in commit.files],
        "usedStorage": sum({file.sha256: file.size for file in commit.files.values()}.values()),
    }


def listed(facts: Facts, expand: Iterable[str], *, is_full: bool, has_card: bool) -> Facts:
    """Leave of a model's facts those that a listing was asked for, which are few unless it is told."""
    if wanted := set(expand):
        return {key: value for key, value in facts.items() if key in wanted | {"_id", "id"}}
    kept = (FULL if is_full else BASIC) | ({"cardData"} if has_card else set())
    return {key: value for key, value in facts.items() if key in kept}


def siblings(commit: Commit) -> list[Facts]:
    """Every file of a commit with its size and names."""
    return [
        {
            "rfilename": path,
            "size": file.size,
            "blobId": file.oid,
            **({"lfs": {"sha256": file.sha256, **lfs_sizes(file)}} if file.lfs else {}),
        }
        for path, file in commit.files.items()
    ]


def lfs_sizes(file: File) -> dict[str, int]:
    """The size of an LFS file and of what git keeps in its place."""
    return {"size": file.size, "pointerSize": len(pointer(file.sha256, file.size))}


# ------------------------------------------------------------------------------------------- its files


def tree(repository: Repository, commit: Commit, folder: str, *, is_deep: bool, expand: bool) -> list[Facts]:
    """The files and folders below a folder, all of them or those directly in it; "" is the top."""
    prefix = f"{folder}/" if folder else ""
    below = [path for path in commit.files if path.startswith(prefix)]
    if folder and not below:
        raise EntryNotFound(f"{folder} does not exist on {commit.id}", commit.id)
    shown = set()
    for path in below:
        parts = path.removeprefix(prefix).split("/")
        ends = range(1, len(parts) + 1) if is_deep else range(1, 2)
        shown |= {prefix + "/".join(parts[:end]) for end in ends}
    return entries(repository, commit, sorted(shown), expand=expand)


def entries(repository: Repository, commit: Commit, paths: Iterable[str], *, expand: bool) -> list[Facts]:
    """Describe those of the paths that are there, with the last commit that touched each if `expand`."""
    found = []
    for path in paths:
        inside = {name: file for name, file in commit.files.items() if name.startswith(f"{path}/")}
        if file := commit.files.get(path):
            entry: Facts = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, **lfs_sizes(file)}
        elif inside:
            named = "".join(f"{name} {file.oid}\n" for name, file in inside.items())
            oid = hashlib.sha1(named.encode(), usedforsecurity=False).hexdigest()
            entry = {"type": "directory", "oid": oid, "size": 0, "path": path}
        else:
            continue
        if expand:
            touched = last_touched(repository, commit, [path] if file else list(inside))
            entry["lastCommit"] = {"id": touched.id, "title": touched.title, "date": touched.date}
        found.append(entry)
    return found


def last_touched(repository: Repository, commit: Commit, paths: list[str]) -> Commit:
    """Give the newest commit, up to `commit`, that changed any of the files."""
    for at in repository.history(commit):
        before = repository.commits[at.parent].files if at.parent else {}
        if any(at.files.get(path) != before.get(path) for path in paths):
            return at
    raise AssertionError("a file that is there was added by some commit")


def split_revision(repository: Repository, rest: str) -> tuple[Commit, str]:
    """Part `REVISION/PATH`, where either may have slashes in it."""
    parts = rest.strip("/").split("/")
    for end in range(1, len(parts) + 1):
        name = "/".join(parts[:end])
        is_ref = name.startswith("refs/") or name in repository.branches or name in repository.tags
        if is_ref or COMMIT.fullmatch(name):
            try:
                return repository.find(name), "/".join(parts[end:])
            except RevisionNotFound:
                continue
    raise RevisionNotFound(f"Invalid rev id: {parts[0]}")


# -------------------------------------------------------------------------------------- commits and refs


def commits(repository: Repository, commit: Commit) -> list[Facts]:
    """A commit and those before it, newest first."""
    return [
        {
            "id": at.id,
            "title": at.title,
            "message": at.message.partition("\n")[2].strip("\n"),
            "date": at.date,
            "authors": [{"user": repository.id.partition("/")[0]}],
        }
        for at in repository.history(commit)
    ]


def refs(repository: Repository) -> Facts:
    """Every branch and tag with its commit."""

    def written(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in sorted(found.items())]

    return {
        "branches": written("heads", repository.branches),
        "tags": written("tags", repository.tags),
        "converts": [],
        "pullRequests": [],
    }
