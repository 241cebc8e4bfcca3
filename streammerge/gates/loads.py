"""Do servers get a model out of this folder? transformers builds it and runs one forward pass, elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge import measuring
from streammerge.config.gates import Limit

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.config.gates import LoadsGate
    from streammerge.gates import Bench
    from streammerge.measuring import Measurement

# What is missing the loader would fill at random.
ALWAYS = {"missing": Limit(max=0), "mismatched": Limit(max=0), "finite": Limit(min=1)}
COMPARES = False


def measure(gate: LoadsGate, snapshot: Path, bench: Bench) -> Measurement | str:
    """Build the model once."""
    return measuring.evaluate(
        "loads", snapshot / "model", bench.bounds(gate), device=gate.device, threads=gate.threads
    )
