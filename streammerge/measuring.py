"""What a program measured of a model: its figures, or in words why there are none.

Any program that prints one JSON object, and `python -m streammerge.evaluate`, which knows transformers.
Either runs in a process of its own, with limits: what crashes, hangs or floods memory ends that process only.
Knows nothing of gates, candidates or verdicts.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import programs
from streammerge.errors import TryAgain
from streammerge.quantities import write_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LATER = 75
PACKAGES = Path(__file__).resolve().parent.parent
# No network, no telemetry.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(PACKAGES),
}
PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
)  # finding a GPU; where caches may be


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    notes  what a figure is about, by its name: which weight, which keys
    tasks  for each task of the data {"rows", "log_loss"} and, with labels or choices, "accuracy"
    rows   where they were asked for, in the data's order: {"task", "log_loss"} and "right"
    """

    figures: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Bounds:
    """What a program may take, and who asks: `who` begins the sentence in a message."""

    who: str
    timeout: float
    memory: int | None = None
    beat: Callable[[], None] = lambda: None


def evaluate(
    what: str, model: Path, bounds: Bounds, *, each: bool = False, **options: object
) -> Measurement | str:
    """Measure a model folder by `python -m streammerge.evaluate WHAT`, see there for the options.

    what     loads, perplexity or accuracy
    each     every row's log-loss as well
    options  data, max_tokens, max_rows, device, threads; None leaves one to its default
    """
    # -P: what lies in the working folder is not imported.
    argv = [sys.executable, "-P", "-m", "streammerge.evaluate", what, str(model)]
    argv += [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None]
    passed = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    found = run(argv + ["--each"] * each, {**passed, **OFFLINE}, bounds)
    return found if isinstance(found, str) else Measurement(**found)


def run(argv: Sequence[str], environment: Mapping[str, str], bounds: Bounds) -> dict[str, Any] | str:
    """Run a program that measures: the JSON object that it printed, or in words why there is none.

    Exit 75 is TryAgain.
    """
    try:
        code, output, errors = programs.run(
            argv, environment, bounds.timeout, bounds.beat, memory=bounds.memory, is_expendable=True
        )
    except programs.OverMemory as exc:
        assert bounds.memory is not None
        return f"used more than its memory limit of {write_size(bounds.memory)}: {exc.used / 2**30:.2f} GiB"
    if code == LATER:
        raise TryAgain(f"{bounds.who} says later (exit 75)", hint="it is asked again by itself")
    if code is None:
        return f"did not end within {bounds.timeout:g} s"
    if code:
        return programs.ending(code, errors or output)
    try:
        found = json.loads(output)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else _no_object(output)


def _no_object(output: str) -> str:
    return f"printed no JSON object of numbers: {output[-300:].strip() or 'nothing'}"


def numbers(found: Mapping[str, Any]) -> Measurement | str:
    """Take a program's JSON object as figures."""
    try:
        return Measurement({str(key): float(value) for key, value in found.items()})
    except (ValueError, TypeError, OverflowError):
        return _no_object(json.dumps(found))
