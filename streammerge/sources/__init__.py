"""Sources: places that announce fine-tunes. One file a kind, named like its `type` in the configuration.

A source knows how its place looks, when something in it is complete, and how to bring it here. It does not
know what was folded, and never decides what is good. Its `look` is the truth; events only make the next look
come sooner.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from streammerge.config import DirectorySource


@dataclass(frozen=True)
class Sighting:
    """What a source sees of one fine-tune now.

    revision      "" while it is not complete; then what names this content for good
    waiting_for   why it is not complete yet, "" once it is
    until         when the source expects to know more, seconds since 1970; 0.0 if it cannot tell
    refused       a reason to refuse it at once, seen from outside ("" for none); waiting_for tells more
    fingerprint   what the source recognises unchanged files by; handed back at the next start
    digest        the content's identity (weights.identity) where the source knows it, else ""
    published_at  seconds since 1970
    """

    name: str
    revision: str
    published_at: float
    waiting_for: str = ""
    until: float = 0.0
    refused: str = ""
    fingerprint: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Known:
    """What was remembered of a fine-tune from an earlier look."""

    fingerprint: str
    revision: str
    first_seen_at: float


class Source(Protocol):
    """One configured place."""

    name: str

    def look(self, known: Mapping[str, Known]) -> Sequence[Sighting]:
        """List every fine-tune there now. Raises TryAgain if the place cannot be seen."""

    def fetch(self, name: str, revision: str, into: Path) -> None:
        """Copy one revision into the empty folder `into`, every file fsynced. Raises TryAgain or Refused."""

    def watch(self, hint: Callable[[], None]) -> Callable[[], None]:
        """Call `hint` when something may have changed; gives the function that stops it."""


def open_source(config: DirectorySource, beat: Callable[[], None] = lambda: None) -> Source:
    """Make the source that a part of the configuration describes; `beat` is called during long reads."""
    module = importlib.import_module(f"{__name__}.{config.type}")
    return cast("Source", module.open_source(config, beat))
