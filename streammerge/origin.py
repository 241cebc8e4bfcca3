"""A base that lies on a Hub: brought into the store once, at one commit, before anything else is made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import structlog

from streammerge import credentials, files, machine
from streammerge.errors import ConfigError, Refused, Withheld
from streammerge.headers import PICKLES, read_json
from streammerge.hub import Hub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.hubfacts import Repo

RECORD = ".origin.json"
CODE_SUFFIXES = (".py", ".sh", ".so")

log = structlog.get_logger()


def bring_base(config: Config, beat: Callable[[], None]) -> None:
    """Fetch the configured base unless it is here; what a cut fetch left is gone on from.

    Raises ConfigError for a repository that cannot be had or another one than is here, TryAgain for a Hub
    that cannot be reached.
    """
    assert config.hub_base
    repo, revision = config.hub_base
    wanted = {"repo": repo, "revision": revision}
    if config.base_path.exists():
        refuse_another(config, wanted)
        return
    part = config.base_path.with_name("base.part")
    hub = Hub(token=credentials.read(None, credential="hf-token", variable="HF_TOKEN"), beat=beat)
    try:
        found = begin(hub, part, wanted)
        wanted_files = [file for file in found.files if is_wanted(file.path)]
        size = sum(file.size for file in wanted_files)
        machine.require_space(config.store, size, reserve_bytes=config.reserve, purpose="fetching the base")
        log.info("base.fetching", repo=repo, commit=found.sha, bytes=size)
        for file in wanted_files:
            (part / file.path).parent.mkdir(parents=True, exist_ok=True)
            with machine.errors("fetching the base"):
                hub.download(repo, found.sha, file, part / file.path)
    except (Refused, Withheld) as exc:
        raise ConfigError(f"base {config.base}: {exc.message}", hint=exc.hint) from exc
    files.fsync_tree(part)
    files.rename_folder(part, config.base_path)


def begin(hub: Hub, part: Path, wanted: dict[str, str]) -> Repo:
    """Choose the commit: the one that was begun with, as long as it is there and still wanted."""
    record = read_json(part / RECORD)
    if wanted.items() <= record.items():
        try:
            return hub.repo(wanted["repo"], str(record["commit"]))
        except Withheld as exc:
            if exc.reason != "moved":
                raise
    files.remove_tree(part)
    found = hub.repo(wanted["repo"], wanted["revision"])
    part.mkdir()
    files.replace_file(part / RECORD, json.dumps({**wanted, "commit": found.sha}).encode())
    return found


def is_wanted(path: str) -> bool:
    """Whether a file of the repository is part of a base: no pickles, no code, nothing hidden."""
    hidden = any(piece.startswith(".") for piece in path.split("/"))
    return not hidden and not PICKLES.match(path) and not path.endswith(CODE_SUFFIXES)


def refuse_another(config: Config, wanted: dict[str, str]) -> None:
    """The base of a store stays: a configuration that names another is wrong."""
    record = read_json(config.base_path / RECORD)
    if {key: record.get(key) for key in wanted} != wanted:
        raise ConfigError(
            f"base is {config.base}, but the store {config.store} was made with "
            f"hf://{record.get('repo')}@{record.get('revision')}",
            hint="put base back, or give the new base a new store",
        )
