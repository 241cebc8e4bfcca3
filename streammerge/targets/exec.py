"""A command as a target: exit 0 says that the version is served, 75 means later, anything else is a failure.

The command gets STREAMMERGE_SNAPSHOT (the resolved folder), _VERSION, _DIGEST and _DELIVERY in a small
environment and nothing on standard input. On a timeout its whole process group is killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge import programs
from streammerge.errors import TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config import Config
    from streammerge.config.targets import ExecTarget
    from streammerge.targets import Told

LATER = 75


class Exec:
    """One command."""

    takes_all = True

    def __init__(self, config: ExecTarget, beat: Callable[[], None]) -> None:
        """Keep the configuration."""
        self.name = config.name
        self.config = config
        self._beat = beat

    def tell(self, told: Told) -> None:
        """Run the command once."""
        environment = told.variables(self.config.sees(told.snapshot))
        code, output, errors = programs.run(self.config.argv, environment, self.config.timeout, self._beat)
        if code == LATER:
            raise TryAgain(f"target {self.name} says later (exit 75)", hint="it is told again by itself")
        if code is None:
            raise TryAgain(
                f"target {self.name} did not end within {self.config.timeout:g} s",
                hint="raise its timeout, or mend the command",
            )
        if code:
            raise TryAgain(
                f"target {self.name} failed with exit {code}: "
                f"{(errors or output)[-300:].strip() or 'no output'}",
                hint="it is told again by itself; `streammerge targets test` tries it now",
            )

    def serves(self) -> None:
        """A command is told, not asked."""


def open_target(part: ExecTarget, config: Config, beat: Callable[[], None]) -> Exec:
    """Make the target."""
    return Exec(part, beat)
