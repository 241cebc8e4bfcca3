"""The named moments at which a crash test may end the process. Passing one does nothing else but count."""

from __future__ import annotations

import os
import signal
from collections import Counter

KILL_VARIABLE = "STREAMMERGE_KILL_AT"
JOURNEY = (
    "announced", "copied", "fetched", "screened", "folded", "rendered", "sealed", "recorded", "gated",
    "accepted", "intended", "switched", "told",
)  # fmt: skip
BESIDE = (
    "made", "asked", "obeyed", "answered", "refused", "replayed", "tuned", "prepared", "collected", "hidden",
)  # fmt: skip
STEPS = (*JOURNEY, *BESIDE)

passed: Counter[str] = Counter()


def reached(step: str) -> None:
    """Mark a step of DESIGN.md's tables. STREAMMERGE_KILL_AT=STEP[:NTH] kills the process here."""
    assert step in STEPS, step
    passed[step] += 1
    wanted, _, nth = os.environ.get(KILL_VARIABLE, "").partition(":")
    if wanted == step and passed[step] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)
