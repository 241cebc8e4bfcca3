"""Taking one fine-tune out of the merge because a person asks for it: the one command that folds.

It is executed where folding is done, a row in the ledger like every other; one that was cut short is gone on
from.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from streammerge import acceptance, operations, pipeline
from streammerge.errors import StreammergeError, TryAgain
from streammerge.steps import reached

if TYPE_CHECKING:
    from streammerge.ledger import Row
    from streammerge.recipes import FoldingMerge

ATTEMPTS = 3


def work_off(merge: FoldingMerge) -> int:
    """Execute every retract that was asked for; gives how many."""
    return operations.each(merge, operations.FOLDING, execute)


def execute(merge: FoldingMerge, row: Row) -> dict[str, Any]:
    """Carry out one retract, then answer it; one that was done before a kill says so."""
    result = retract(merge, **json.loads(row["arguments"]))
    reached("obeyed")
    merge.ledger.answer(row["id"], "done", result)
    reached("answered")
    return result


def retract(merge: FoldingMerge, *, name: str) -> dict[str, Any]:
    """Take one fine-tune out of the merge, in a new version; its content is denied under any name.

    Acts during a hold, which stays. Where bytes are missing, or a gate refuses, nothing changes.
    """
    row = operations.find_fine_tune(merge, name, prefer="folded")
    answer = {"name": row["name"], "source": row["source"], "revision": row["revision"]}
    if row["state"] == "retracted":
        return {**answer, "version": merge.head.version, "state": "retracted"}
    for _ in range(ATTEMPTS):
        head = merge.head
        places = [p for p, member in enumerate(head.fine_tunes) if member.digest == row["digest"]]
        if not places or row["state"] != "folded":
            raise StreammergeError(
                f"{row['name']} is {row['state']}, not folded; nothing to retract",
                hint="`streammerge fine-tunes` shows what is folded",
            )
        candidate = pipeline.without(merge, head, places)
        if acceptance.conclude(merge, candidate, asked_for=True):
            return {**answer, "version": candidate.version, "state": "retracted"}
        refused = merge.ledger.snapshot(candidate.version) or {}
        if not str(refused.get("note", "")).startswith("discarded"):
            raise StreammergeError(
                f"the merge without {row['name']} is refused: {refused.get('note')}",
                hint="nothing was changed; loosen the gate's limits to take it out all the same",
            )
    raise TryAgain("head moved each time while the fine-tune was taken out", hint="ask again")
