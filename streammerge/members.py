"""What a version lists of each fine-tune in it: thousands, perhaps, in the order in which they were folded.

Imports nothing of ours: whoever reads a manifest reads them alike.
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Member(NamedTuple):
    """One fine-tune of a version; files.write_json writes it as an object.

    source, name  where it was published; a newer revision takes its place
    revision      how the source names what was folded
    digest        of the content that was folded
    weight        what its delta was multiplied with
    """

    source: str
    name: str
    revision: str
    digest: str
    weight: float

    @classmethod
    def of(cls, source: str, name: str, revision: str, digest: str, weight: float) -> Self:
        """Make one of many: the few sources and weights that there are lie in memory once."""
        return cls(sys.intern(source), name, revision, digest, _shared(weight))

    @property
    def series(self) -> tuple[str, str]:
        """What its revisions have in common: source and name."""
        return self.source, self.name

    @property
    def announced(self) -> tuple[str, str, str]:
        """What it was announced as: source, name, revision."""
        return self.source, self.name, self.revision

    def __str__(self) -> str:
        """Name it as a person does."""
        return f"{self.source}:{self.name}"


@lru_cache(maxsize=64)
def _shared(weight: float) -> float:
    return weight


FIELDS = frozenset(Member._fields)


def parse(manifest: bytes) -> Any:  # noqa: ANN401 -- whatever JSON it is
    """Read a manifest, with Members for what it lists; ValueError for what cannot be one."""
    try:  # each at once: all of them as dicts would take thrice as much
        return json.loads(manifest, object_hook=_recognised)
    except (TypeError, RecursionError) as exc:
        raise ValueError(f"it is no manifest: {exc}") from exc


def _recognised(found: dict[str, Any]) -> Member | dict[str, Any]:
    return Member.of(**found) if found.keys() == FIELDS else found


def hold_once(members: list[Member], known: Iterable[Sequence[Member]]) -> None:
    """Have what versions list alike, nearly all of what they list, in memory once."""
    for other in known:
        for place, (member, same) in enumerate(zip(members, other, strict=False)):
            if member is not same and member == same:
                members[place] = same
