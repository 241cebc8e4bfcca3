"""Is this candidate good enough to serve? Runs the configured commands and compares numbers with limits.

A gate measures a folder; it does not know what happens after its verdict. A gate that fails on the version
being served too says nothing about the candidate: then the queue is held (TryAgain), not the fine-tune
refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from streammerge import programs
from streammerge.errors import TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from streammerge.config.gates import CommandGate, Limit

LATER = 75

log = structlog.get_logger()


class GateBroken(TryAgain):
    """A gate does not even work on the version being served."""


@dataclass(frozen=True)
class Verdict:
    """What the gates found: `reasons` is empty for a candidate that may be served."""

    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def check(
    gates: Sequence[CommandGate],
    candidate: Path,
    current: Path | None,
    beat: Callable[[], None] = lambda: None,
    *,
    drops_refuse: bool = True,
) -> Verdict:
    """Run every gate in order until one refuses; `max_drop` may only be told of."""
    figures: dict[str, Mapping[str, float]] = {}
    for gate in gates:
        measured = measure(gate, candidate, beat)
        if isinstance(measured, str):
            if current is not None and isinstance(again := measure(gate, current, beat), str):
                raise GateBroken(
                    f"gate {gate.name} fails on the version being served too: {again}",
                    hint="mend the gate's command; the queue goes on by itself then",
                )
            return Verdict((f"gate {gate.name}: {measured}",), figures)
        figures[gate.name] = measured
        needs_current = any(limit.max_drop is not None for limit in gate.limits.values())
        served = measure(gate, current, beat) if needs_current and current is not None else {}
        if isinstance(served, str):
            raise GateBroken(
                f"gate {gate.name} fails on the version being served: {served}",
                hint="mend the gate's command",
            )
        if not drops_refuse:
            for key, limit in gate.limits.items():
                if breach(key, limit, measured, served) and not breach(key, limit, measured, {}):
                    log.warning("gate.drop", gate=gate.name, detail=breach(key, limit, measured, served))
            served = {}
        if reasons := [
            r for key, limit in gate.limits.items() if (r := breach(key, limit, measured, served))
        ]:
            return Verdict(tuple(f"gate {gate.name}: {reason}" for reason in reasons), figures)
    return Verdict((), figures)


def measure(
    gate: CommandGate, snapshot: Path, beat: Callable[[], None] = lambda: None
) -> dict[str, float] | str:
    """Run one gate on one folder: its numbers, or in words why there are none."""
    argv = tuple(part.replace("{snapshot}", str(snapshot)) for part in gate.argv)
    code, output, errors = programs.run(argv, {"STREAMMERGE_SNAPSHOT": str(snapshot)}, gate.timeout, beat)
    if code == LATER:
        raise TryAgain(f"gate {gate.name} says later (exit 75)", hint="it is asked again by itself")
    if code is None:
        return f"did not end within {gate.timeout:g} s"
    if code:
        return f"failed with exit {code}: {(errors or output)[-300:].strip() or 'no output'}"
    try:
        found = json.loads(output)
        return {str(key): float(value) for key, value in found.items()}
    except (ValueError, TypeError, AttributeError):
        return f"printed no JSON object of numbers: {output[-300:].strip() or 'nothing'}"


def breach(key: str, limit: Limit, measured: Mapping[str, float], served: Mapping[str, float]) -> str:
    """Say how a number breaks its limit; "" if it does not."""
    value = measured.get(key, math.nan)
    if math.isnan(value):
        return f"{key} was not measured"
    if limit.min is not None and value < limit.min:
        return f"{key} = {value:g} is below {limit.min:g}"
    if limit.max is not None and value > limit.max:
        return f"{key} = {value:g} is above {limit.max:g}"
    if limit.max_drop is not None and key in served and served[key] - value > limit.max_drop:
        return f"{key} fell from {served[key]:g} to {value:g}, more than {limit.max_drop:g}"
    return ""
