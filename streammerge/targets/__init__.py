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

    `delivery` is the same at every retry, so that a repeated telling can be recognised.
    """

    version: int
    digest: str
    snapshot: Path
    delivery: str


class Target(Protocol):
    """One configured place that serves versions."""

    name: str

    def tell(self, told: Told) -> None:
        """Return once the version is served; raise TryAgain otherwise."""


def open_target(part: TargetSection, config: Config, beat: Callable[[], None] = lambda: None) -> Target:
    """Make the target that a part of the configuration describes; `beat` is called while it works."""
    module = importlib.import_module(f"{__name__}.{part.type}")
    return cast("Target", module.open_target(part, config, beat))
