"""What a version lists of each fine-tune in it: thousands, perhaps, in the order in which they were folded.

Imports nothing of ours: whoever reads a manifest reads them alike.
"""

from __future__ import annotations

import json
import operator
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

PIECE = 64  # fine-tunes


class Member(NamedTuple):
    """One fine-tune of a version.

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


class Members:
    """All that a version lists, in order and never changed; whoever walks it makes each Member anew.

    It is kept as text, in pieces: small objects that come with every arrival and stay would keep the large
    blocks, in which Python has memory from the system, from going back. A piece lies outside of them, and
    what two versions list alike they have in common (decision 0008).

    pieces  JSON, of PIECE fine-tunes at most each
    """

    __slots__ = ("_count", "pieces")

    def __init__(self, members: Iterable[Member] = ()) -> None:
        """List these."""
        rest, pieces, self._count = iter(members), [], 0
        while some := list(islice(rest, PIECE)):
            pieces.append(_packed(some))
            self._count += len(some)
        self.pieces = tuple(pieces)

    @classmethod
    def _of(cls, pieces: Iterable[str], count: int) -> Members:
        made = cls()
        made.pieces, made._count = tuple(pieces), count
        return made

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def __iter__(self) -> Iterator[Member]:
        """Walk them, a piece at a time."""
        for piece in self.pieces:
            yield from _unpacked(piece)

    def __eq__(self, other: object) -> bool:
        """Whether the same are listed in the same order."""
        if not isinstance(other, Members):
            return NotImplemented
        return self.pieces == other.pieces or (len(self) == len(other) and all(map(operator.eq, self, other)))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show them as a person would write them."""
        return f"Members({[*self]})"

    def __add__(self, more: Iterable[Member]) -> Members:
        """List more of them, after these."""
        *full, last = self.pieces or ("[]",)
        begun = _unpacked(last)
        rest = Members([*begun, *more])
        return Members._of([*full, *rest.pieces], self._count - len(begun) + len(rest))

    def without(self, places: Container[int]) -> Members:
        """List all but those at `places`, counted from 0."""
        pieces, place, count = [], 0, 0
        for piece in self.pieces:
            there = _unpacked(piece)
            left = [member for number, member in enumerate(there, place) if number not in places]
            if left:
                pieces.append(piece if len(left) == len(there) else _packed(left))
            place, count = place + len(there), count + len(left)
        return Members._of(pieces, count)

    def changes(self, since: Members) -> tuple[list[Member], list[Member]]:
        """Tell which are in here and not in the other list, and the other way round."""
        pairs = zip(self.pieces, since.pieces, strict=False)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        ours, theirs = (
            [member for piece in listed.pieces[alike:] for member in _unpacked(piece)]
            for listed in (self, since)
        )
        kept = {member.digest for member in ours} & {member.digest for member in theirs}
        return (
            [member for member in ours if member.digest not in kept],
            [member for member in theirs if member.digest not in kept],
        )

    def hold_once(self, known: Iterable[Members]) -> None:
        """Have what these list alike, nearly all of what versions list, in memory once."""
        for other in known:
            pairs = zip(self.pieces, other.pieces, strict=False)
            common = [theirs if ours == theirs else ours for ours, theirs in pairs]
            self.pieces = (*common, *self.pieces[len(common) :])


def _packed(some: list[Member]) -> str:
    return json.dumps(some, separators=(",", ":"))


def _unpacked(piece: str) -> list[Member]:
    return [*map(Member._make, json.loads(piece))]


FIELDS = frozenset(Member._fields)


def parse(manifest: bytes) -> Any:  # noqa: ANN401 -- whatever JSON it is
    """Read a manifest, whose fine-tunes are Members; ValueError for what cannot be one."""
    listed, some = Members(), []

    def take(found: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal listed
        if found.keys() != FIELDS:
            return found
        some.append(Member(**found))  # many of them at once as dicts would take ten times as much
        if len(some) == PIECE:
            listed += some
            some.clear()
        return None

    try:
        found = json.loads(manifest, object_hook=take)
        listed += some
    except RecursionError as exc:
        raise ValueError(f"it is no manifest: {exc}") from exc
    if isinstance(found, dict) and "fine_tunes" in found:
        if found["fine_tunes"] != [None] * len(listed):
            raise ValueError("it is no manifest: it lists something else than fine-tunes")
        found["fine_tunes"] = listed
    return found
