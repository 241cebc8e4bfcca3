"""Servers of three kinds, told by the real daemon, end on one verified version whatever goes wrong in one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults import serving

if TYPE_CHECKING:
    from pathlib import Path


def test_servers_end_on_one_verified_version(tmp_path: Path) -> None:
    """One that lies has its version taken back everywhere; one that was down is brought up to date."""
    with serving.Fleet(tmp_path / "fleet") as fleet:
        fleet.suffer("stale", 1)
        fleet.suffer("half down", 2)
    assert fleet.differences == []
    assert fleet.lies == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_fault_of_a_server_ends_well(tmp_path: Path) -> None:
    """Each fault at one server or another."""
    assert serving.measure(tmp_path, "short").differences == []
