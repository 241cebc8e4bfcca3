"""Announcement after announcement from a Hub of which every tenth request fails, in every way that it can.

None is lost, none folded twice, and every digest in the merge is that of what was published.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import models
import pytest
import torch
from hubs import CARD, Desk, Files, delta

from streammerge.devhub import DevHub, Rule
from streammerge.weights import identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

WAVES = 10
LOOK_SECONDS = 0.5
RULES = (  # what befalls a request, and how often, in hundredths; each comes after those before it
    Rule(".", "429", probability=0.01, seconds=1, style="ratelimit"),
    Rule(".", "429", probability=0.01, seconds=1, style="retry-after"),
    Rule(".", "500", probability=0.02),
    Rule(".", "cut", probability=0.02),
    Rule(".", "hang", probability=0.01, seconds=3),
    Rule(".", "slow", probability=0.01, seconds=0.5),
    Rule("/resolve/", "flip", probability=0.05),  # what else is said has no hash to prove it
)


def publish(hub: DevHub, base: Mapping[str, Tensor], scratch: Path, count: int) -> dict[str, str]:
    """Publish in waves, with the server gone for a while half-way; gives the digests by name."""
    published = {}
    for number in range(count):
        tensors = delta(base, number)
        models.save(scratch, tensors)
        files: Files = {"README.md": CARD, "model.safetensors": scratch}
        published[f"team/m{number}"] = identity(scratch)
        hub.publish(f"team/m{number}", files)
        if number % (count // WAVES) == 0:
            time.sleep(0.5)
        if number == count // 2:
            hub.stop()
            time.sleep(1.5)
            hub.start()
    return published


@pytest.mark.parametrize(
    "count",
    [pytest.param(50), pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_every_announcement_is_folded_once(tmp_path: Path, count: int) -> None:
    """One thread publishes, one looks, one fetches, one folds, as in the daemon, until all is in."""
    base = {"w": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    done = threading.Event()
    with (
        DevHub(tmp_path / "hub") as hub,
        Desk(tmp_path / "desk", hub, base=base, method="average", grace="0s") as desk,
        ThreadPoolExecutor() as threads,
    ):
        once = [replace(rule, probability=1.0, count=1) for rule in RULES]  # for chance may leave one out
        for rule in (*once, *RULES):
            hub.faults.add(replace(rule))

        def look() -> None:
            while not done.wait(LOOK_SECONDS):
                desk.try_to_look()

        def fetch() -> None:
            while not done.is_set():
                if not desk.fetch():
                    done.wait(0.02)

        publishing = threads.submit(publish, hub, base, tmp_path / "one.safetensors", count)
        others = [threads.submit(look), threads.submit(fetch)]
        try:
            while not publishing.done() or len(desk.folded) < len(publishing.result()):
                assert not any(thread.done() for thread in others)
                if not desk.fold():
                    time.sleep(0.02)
        finally:
            done.set()
        for thread in others:
            thread.result()
        members = desk.merge.head.fine_tunes
        assert {member.name: member.digest for member in members} == publishing.result()
        assert len(members) == count
        assert set(desk.states().values()) == {"folded"}
        faults = [seen.fault for seen in hub.requests() if seen.fault]
        assert set(faults) == {"429", "500", "cut", "hang", "slow", "flip"}
        assert len(faults) > 0.05 * hub.count()
        assert list(desk.merge.store.inbox.iterdir()) == []
        mean = sum((delta(base, number)["w"] - base["w"]).double() for number in range(count)) / count
        served = models.load(desk.served / "model")["w"]
        torch.testing.assert_close(served.double(), base["w"] + mean, atol=1e-5, rtol=1e-4)
