"""Steps 5 and 6: what servers load is written, tuned where that is asked for, and sealed as a candidate.

Knows a state and what is folded into it, not how it came about.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import structlog

from streammerge import files, methods, replay, snapshots, trials, tuning
from streammerge.card import card
from streammerge.errors import TryAgain
from streammerge.furnish import furnish
from streammerge.lineage import manifest_of
from streammerge.recording import record_candidate
from streammerge.rendering import Mix, Rendered
from streammerge.steps import reached

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from streammerge.folding import Measured
    from streammerge.members import Members
    from streammerge.recipes import FoldingMerge
    from streammerge.snapshots import Snapshot
    from streammerge.state import State

log = structlog.get_logger()


def render(
    merge: FoldingMerge,
    state: State,
    folded: Members,
    parent: Snapshot | None,
    version: int,
    building: Path,
    measured: Measured | None = None,
    model: Rendered | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Step 5: write what servers load; gives the manifest to be and the hashes known so far.

    `model` is given where its weights are written already.
    """
    recipe, finish = merge.recipe, merge.config.finalize
    account = None
    with ExitStack() as stack:
        rereads = methods.rereads(recipe.method)
        again = [stack.enter_context(replay.opened(merge, member)) for member in (folded if rereads else ())]

        def write(choice: tuning.Choice, out: Path) -> Rendered:
            with merge.metrics.stage("render"):
                return merge.engine.render(
                    recipe, state, choice.finish, out, folded=again, mix=mix_of(merge, choice, parent)
                )

        if model is None:
            model = write(tuning.Choice(finish), building / "model")
        if is_tuned(merge, state, folded, parent):
            new = new_names(folded, parent)
            finish, model, account = tuned(merge, building, model, write, new)
        for incoming, member in zip(again, folded, strict=False):  # none but for methods that read them again
            if incoming.finetune.finish() != member.digest:
                kept = (merge.ledger.fine_tune(*member.announced) or {}).get("id")
                files.remove_tree(merge.store.inbox / str(kept))
                raise TryAgain(
                    f"what the store kept of {member.name} is not what was folded",
                    hint="it is fetched from its source again",
                )
    rendered, norm = model
    hashes = {f"state/{name}": found for name, found in state.hashes.items()}
    hashes |= {f"model/{name}": found for name, found in rendered.items()}
    manifest = {
        "version": version,
        "parent": parent.digest if parent else None,
        "base": {"digest": recipe.base_digest, "name": recipe.base.name},
        **manifest_of(merge.engine, recipe, finish, folded, state.totals, norm, measured),
        "added": merge.settings["added"],
        "routes": [route.model_dump() for route in recipe.routes],
        **({"tuning": account} if account else {}),
    }
    mark = {
        key: manifest[key]
        for key in ("version", "parent", "base", "method", "knobs", "finalize", "fine_tunes")
    }
    base_model = next(iter(merge.config.base_models), recipe.base.name)
    furnish(recipe.base, building / "model", card(manifest, base_model=base_model), mark)
    reached("rendered")
    return manifest, hashes


def is_tuned(merge: FoldingMerge, state: State, folded: Members, parent: Snapshot | None) -> bool:
    """Whether there is something to choose: a delta, and for two shares something old and something new."""
    section = merge.config.tune
    if section is None or not state.has_slots():
        return False
    has_both = parent is not None and bool(parent.fine_tunes) and bool(new_names(folded, parent))
    return section.kind != "pareto" or has_both


def new_names(folded: Members, parent: Snapshot | None) -> frozenset[str]:
    """Give the names of the fine-tunes that a version has and its parent has not."""
    added = folded.changes(parent.fine_tunes)[0] if parent else folded
    return frozenset(member.name for member in added)


def mix_of(merge: FoldingMerge, choice: tuning.Choice, parent: Snapshot | None) -> Mix | None:
    """Give what is to be mixed; None where all of both is served."""
    if parent is None or choice.shares == tuning.UNTOUCHED:
        return None
    return Mix(merge.state_of(parent), *choice.shares)


def tuned(
    merge: FoldingMerge,
    building: Path,
    model: Rendered,
    write: Callable[[tuning.Choice, Path], Rendered],
    new: frozenset[str],
) -> tuning.Tuned:
    """Choose how strongly what was rendered is served, where that is asked for."""
    assert merge.config.tune is not None
    asked = tuning.Asked(
        merge.config.tune, merge.config.finalize, merge.recipe.base, building / "model", model, write, new,
        merge.engine.beat,
    )  # fmt: skip
    with merge.metrics.stage("tune"), trials.beside(building) as folder:
        found = tuning.tune(asked, folder)
    reached("tuned")
    log.info("version.tuned", **{key: value for key, value in found.account.items() if key != "points"})
    return found


def seal(
    merge: FoldingMerge, building: Path, manifest: Mapping[str, Any], hashes: Mapping[str, str]
) -> Snapshot:
    """Step 6: an immutable candidate, then its row."""
    with merge.metrics.stage("seal"):
        candidate = snapshots.seal(merge.store, building, manifest, hashes)
    reached("sealed")
    record_candidate(merge, candidate)
    reached("recorded")
    return candidate
