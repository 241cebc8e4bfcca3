"""Does it still know its language? Perplexity on texts, and how many times the base's that is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge import measuring, snapshots
from streammerge.config.gates import Limit
from streammerge.measuring import Measurement

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.config.gates import PerplexityGate
    from streammerge.gates import Bench

ALWAYS = {"perplexity": Limit()}  # NaN says that the model foretells nothing
COMPARES = False


def measure(gate: PerplexityGate, snapshot: Path, bench: Bench) -> Measurement | str:
    """Read the texts once; the base reads them at the first time only."""
    found = _of(gate, snapshot / "model", bench)
    if isinstance(found, str):
        return found
    base = found if snapshots.number(snapshot) == 0 else _base(gate, bench)
    return f"the base cannot be measured: {base}" if isinstance(base, str) else _beside(found, base)


def _base(gate: PerplexityGate, bench: Bench) -> Measurement | str:
    """Give the base's figures, which stand with version 0, for that is the base."""
    if known := bench.recall(0, gate):
        return known
    found = _of(gate, bench.base, bench)
    if isinstance(found, Measurement):
        bench.keep(0, gate, _beside(found, found))
    return found


def _of(gate: PerplexityGate, model: Path, bench: Bench) -> Measurement | str:
    return measuring.evaluate(
        "perplexity", model, bench.bounds(gate),
        data=gate.data, max_tokens=gate.max_tokens, device=gate.device, threads=gate.threads,
    )  # fmt: skip


def _beside(found: Measurement, base: Measurement) -> Measurement:
    """Add how many times the base's perplexity it is."""
    ratio = found.figures["perplexity"] / base.figures["perplexity"]
    return replace(found, figures={**found.figures, "vs_base": ratio})
