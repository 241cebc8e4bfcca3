"""What can it still do? The share of right answers in each task, of a classifier or by choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge import measuring
from streammerge.config.gates import Limit

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.config.gates import AccuracyGate
    from streammerge.gates import Bench
    from streammerge.measuring import Measurement

ALWAYS = {"log_loss": Limit()}  # NaN says that the model computes none of its answers
COMPARES = False


def measure(gate: AccuracyGate, snapshot: Path, bench: Bench) -> Measurement | str:
    """Put every question once."""
    return measuring.evaluate(
        "accuracy", snapshot / "model", bench.bounds(gate),
        data=gate.data, max_rows=gate.max_rows, device=gate.device, threads=gate.threads,
    )  # fmt: skip
