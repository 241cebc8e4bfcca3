"""Two shells at once: the functions of `python -m faults --only under_fire`, at a scale of seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults.under_fire import Field

if TYPE_CHECKING:
    from pathlib import Path


def test_two_shells_command_a_daemon_at_random(tmp_path: Path) -> None:
    """Whatever they type while it folds, gates, promotes and collects, the store stays sound."""
    battle = Field(tmp_path / "site", seed=20)
    battle.fire(3.0)
    assert battle.differences == []
    assert battle.codes.total() > 0


PAIRS = [
    (["rollback", "--yes"], ["retract", "tune-1", "--yes"]),
    (["rollback", "--yes"], ["rollback", "1", "--yes"]),
    (["gc"], ["rollback", "1", "--yes"]),
    (["backup", "BACKUP"], ["gc"]),
    (["verify"], ["retract", "tune-1", "--yes"]),
    (["hold"], ["resume"]),
    (["run", "--once"], ["rollback", "--yes"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("has_daemon", [True, False], ids=["daemon", "alone"])
@pytest.mark.parametrize("pair", PAIRS, ids=[" and ".join(word[0] for word in pair) for pair in PAIRS])
def test_two_commands_at_once(pair: tuple[list[str], list[str]], has_daemon: bool, tmp_path: Path) -> None:
    """These two again and again, each from its own shell, while fine-tunes come in."""
    battle = Field(tmp_path / "site", seed=1, has_daemon=has_daemon, only=(*pair, ["resume"]))
    battle.fire(15.0)
    assert battle.differences == []
    assert battle.codes["0"] > 0
