"""Targets: who is told of a promotion. One file a kind; the file's name is the `type` in the configuration.

A target makes one place take a version, a serving process or a repository, and says whether it serves it. It
does not know why the version was promoted, and keeps nothing: what is still to be told lies in the ledger.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.config.targets import TargetSection


@dataclass(frozen=True)
class Told:
    """What a target is told.

    `delivery` is the same at every retry, so that a repeated telling can be recognised. `cause` is why the
    version was promoted: first, fold, retract, rollback, answered-wrong; or test.
    """

    version: int
    digest: str
    snapshot: Path
    delivery: str
    cause: str

    @property
    def label(self) -> str:
        """The version's name for serving processes: that of its folder, 000042-<digest12>."""
        return self.snapshot.name

    def variables(self, seen: str) -> dict[str, str]:
        """Give what a program is told, in its environment; `seen` is the folder as it sees it."""
        return {
            "STREAMMERGE_SNAPSHOT": seen,
            "STREAMMERGE_VERSION": str(self.version),
            "STREAMMERGE_DIGEST": self.digest,
            "STREAMMERGE_DELIVERY": self.delivery,
        }


class Target(Protocol):
    """One configured place that serves versions."""

    name: str
    takes_all: bool  # every promotion in its order; a serving process needs only the newest

    def tell(self, told: Told) -> None:
        """Return once the version is served.

        Raises TryAgain where the target cannot be reached or does not do it now, AnsweredWrong where it says
        that it cannot serve this version, or serves another one after it said that it had taken this one.
        """

    def serves(self) -> str | None:
        """Ask what it serves, by label; None where it cannot say. Raises TryAgain if it does not answer."""


def open_target(part: TargetSection, config: Config, beat: Callable[[], None] = lambda: None) -> Target:
    """Make the target that a part of the configuration describes; `beat` is called while it works."""
    module = importlib.import_module(f"{__name__}.{part.type}")
    return cast("Target", module.open_target(part, config, beat))
