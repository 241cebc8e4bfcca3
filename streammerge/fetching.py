"""Bringing a fine-tune's files into the inbox: whole or not at all, and known by their content."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from streammerge import files, machine, methods, reports, weights
from streammerge.errors import Refused
from streammerge.headers import Incomplete
from streammerge.steps import reached

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.ledger import Row
    from streammerge.recipes import FoldingMerge
    from streammerge.sources import Source


def bring_in(merge: FoldingMerge, row: Row, source: Source) -> Path:
    """Step 2: fetch the files of a row into the inbox, where they are not yet; gives the folder."""
    inbox = merge.store.inbox / str(row["id"])
    if inbox.exists():
        if row["step"] == "announced":
            files.fsync_folder(merge.store.inbox)  # it may have been cut off before that
    else:
        part = merge.store.inbox / f"{row['id']}.part"
        if not source.is_remote:
            files.remove_tree(part)
        part.mkdir(exist_ok=True)  # what a cut fetch left of the same revision is gone on from
        with merge.metrics.stage("fetch"), machine.errors("fetching", merge.store.root):
            source.fetch(row["name"], row["revision"], part, partial(require_room, merge, part))
            reached("copied")
            files.fsync_tree(part)
            merge.metrics.fetched_bytes.labels(row["source"]).inc(files.tree_bytes(part))
            files.rename_folder(part, inbox)
        reached("fetched")
    return inbox


def require_room(merge: FoldingMerge, part: Path, size: int) -> None:
    """Raise NoSpace unless a fine-tune of `size` bytes can be brought and then folded.

    What is brought must not take the room that its own fold needs: it would wait there for ever.
    """
    store, version = merge.store.root, reports.version_bytes(merge.settings)
    missing = max(0, size - files.tree_bytes(part))
    purpose = "fetching, and folding what is fetched,"
    machine.require_space(store, missing + version, reserve_bytes=merge.config.reserve, purpose=purpose)


def identify(inbox: Path, row: Row, source: Source, merge: FoldingMerge) -> str:
    """Know a fetched fine-tune by its content; what a remote revision lacks will never be in it."""
    try:
        return weights.identity(
            published(inbox, row["name"]), merge.engine.beat, methods.sidecar(merge.recipe.method)
        )
    except Incomplete as exc:
        if not source.is_remote:
            raise
        raise Refused("incomplete", exc.message, hint="publish the whole model in one commit") from exc


def published(folder: Path, name: str) -> Path:
    """Give a fetched fine-tune as it was published: a file where it was a file, else the folder."""
    file = folder / name
    return file if file.suffix == ".safetensors" and file.is_file() else folder
