"""What becomes of a fine-tune that was read: its figures written down, and whatever speaks against it raised.

Only what arrives is judged. What a replay, a rebuild or a rollback folds again was accepted once.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import structlog

from streammerge import figures, files, screen
from streammerge.errors import TryAgain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streammerge.arriving import Incoming
    from streammerge.engine import Folded
    from streammerge.folding import Measured
    from streammerge.ledger import Ledger, Row
    from streammerge.members import Member
    from streammerge.recipes import FoldingMerge

COMPARED_AT_ONCE = 64

log = structlog.get_logger()


class Changed(TryAgain):
    """What is read of a fine-tune is not what was fetched."""


def judge(merge: FoldingMerge, row: Row, folded: Iterable[Member], incoming: Incoming, found: Folded) -> None:
    """Raise Refused or Quarantined for a fine-tune that is not to go in; its files are still open.

    folded  what is in the merge without it
    """
    if incoming.finetune.finish() != row["digest"]:
        files.remove_tree(merge.store.inbox / str(row["id"]))
        merge.ledger.update_fine_tune(row["id"], step="announced")
        raise Changed("the fetched files changed before they were folded", hint="they are fetched again")
    _weigh(merge, row, folded, incoming, found.measured)


def _weigh(
    merge: FoldingMerge, row: Row, folded: Iterable[Member], incoming: Incoming, measured: Measured
) -> None:
    """Write down its figures, and raise where one of them, or its length, speaks against it."""
    limits = merge.config.screens
    found = figures.examine(
        figures.Evidence(
            measured,
            merge.base_norm,
            merge.engine.attention(merge.recipe, incoming, measured, raw=limits.gauge.raw),
            _nearest(merge, row, folded, measured.sample),
        ),
        limits,
        row["overruled"].split(),
    )
    merge.ledger.keep_figures(
        row["digest"], {name: figure.plain for name, figure in found.items()}, measured.sample
    )
    for name, figure in found.items():
        if figure.verdict in ("warned", "overruled"):
            log.warning(
                "finetune.flagged",
                screen=name,
                verdict=figure.verdict,
                reason=figure.reason,
                detail=figure.note,
            )
    figures.refuse([found["gauge"]])  # the truest reason first: locked attention makes a long delta
    screen.judge(measured, merge.base_norm, max_delta_ratio=merge.config.max_delta_ratio)
    figures.refuse(found.values())


def _nearest(
    merge: FoldingMerge, row: Row, folded: Iterable[Member], sample: bytes
) -> tuple[float, str] | None:
    """Find what is most alike of what is folded, by the name that a person knows; not its own revisions."""
    others = (member for member in folded if member.series != (row["source"], row["name"]))
    return figures.nearest(sample, _samples(merge.ledger, others))


def _samples(ledger: Ledger, members: Iterator[Member]) -> Iterator[list[tuple[str, bytes]]]:
    """Give the name and the sample of each, of thousands, some at a time."""
    while part := {member.digest: str(member) for member in islice(members, COMPARED_AT_ONCE)}:
        yield [(part[digest], sample) for digest, sample in ledger.samples(part)]
