"""Sources: places that announce fine-tunes. One file a kind, named like its `type` in the configuration.

A source knows how its place looks, when something in it is complete, and how to bring it here. It does not
know what was folded, and never decides what is good. Its `look` is the truth; events and webhooks only make
the next look come sooner.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.config.sources import DirectorySource, HubSource


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a source sees of one fine-tune now.

    revision      "" while it is not complete; then what names this content for good
    waiting_for   why it is not complete yet, "" once it is
    is_withheld   whether it is complete and kept back by others: that may take as long as it takes
    until         when the source expects to know more, seconds since 1970; 0.0 if it cannot tell
    refused       a reason to refuse it at once, seen from outside ("" for none); waiting_for tells more
    excluded      the rule of the configuration that leaves it out ("" for none); waiting_for tells more
    not_before    when it may be fetched at the earliest, seconds since 1970
    fingerprint   what the source recognises unchanged files by; handed back at the next start
    digest        the content's identity (weights.identity) where the source knows it, else ""
    published_at  seconds since 1970
    is_dated      whether published_at is the place's own account; else it counts for the first look only
    """

    name: str
    revision: str
    published_at: float
    waiting_for: str = ""
    is_withheld: bool = False
    until: float = 0.0
    refused: str = ""
    excluded: str = ""
    not_before: float = 0.0
    is_dated: bool = False
    fingerprint: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """What was remembered of a fine-tune from an earlier look."""

    fingerprint: str
    revision: str
    first_seen_at: float

    def is_same(self, sighting: Sighting) -> bool:
        """Whether a source sees what it saw at its last look."""
        return (sighting.fingerprint, sighting.revision) == (self.fingerprint, self.revision)


@dataclass(frozen=True)
class Look:
    """What one look at a source found.

    sightings  every fine-tune there that may have changed since the last look
    unchanged  names of those that are there as they are known: thousands, perhaps
    gone       names that are not there any more; None where whatever was not seen is gone
    mark       how far the place was read, handed back at the next look
    again_at   when to look again at the latest, seconds since 1970; 0.0 for the next poll
    """

    sightings: Sequence[Sighting]
    unchanged: Sequence[str] = ()
    gone: frozenset[str] | None = None
    mark: str = ""
    again_at: float = 0.0


class Source(Protocol):
    """One configured place.

    is_remote  whether fetching may take long: it then runs beside the folding, and a cut fetch is resumed
    """

    name: str
    is_remote: bool

    def look(self, known: Mapping[str, Known], mark: str) -> Look:
        """Say what is there now. Raises TryAgain if the place cannot be seen."""

    def preview(self) -> Sequence[Sighting]:
        """Say what would be announced, for a person; changes nothing. Raises TryAgain."""

    def fetch(self, name: str, revision: str, into: Path, room: Callable[[int], None]) -> None:
        """Bring one revision into the folder `into`, every file fsynced. Raises TryAgain or Refused.

        `into` is empty, or holds what an earlier fetch of the same revision from a remote source left.
        `room` is asked before the first byte, with the bytes of all files; it raises where they do not fit.
        """

    def absence(self, name: str, revision: str, digest: str) -> str:
        """Say why a revision that was folded with this content cannot be had any more, "" where it can.

        Raises TryAgain if the place cannot be seen. Nothing is fetched; what lies here is read.
        """

    def watch(self, hint: Callable[[], None]) -> Callable[[], None]:
        """Call `hint` when something may have changed; gives the function that stops it."""

    def mention(self, name: str) -> bool:
        """Somebody says that `name` changed: look at it next time. Whether it can be one of this place."""


def open_source(
    part: DirectorySource | HubSource,
    config: Config,
    beat: Callable[[], None] = lambda: None,
) -> Source:
    """Make the source that a part of the configuration describes; `beat` is called during long work."""
    module = importlib.import_module(f"{__name__}.{part.type}")
    return cast("Source", module.open_source(part, config, beat))
