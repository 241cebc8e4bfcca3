"""A command as a gate: it prints one JSON object of numbers and exits 0; 75 says later.

The command gets the candidate's folder in its arguments and in STREAMMERGE_SNAPSHOT, a small environment, and
nothing on standard input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge import measuring

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streammerge.config.gates import CommandGate, Limit
    from streammerge.gates import Bench
    from streammerge.measuring import Measurement

ALWAYS: Mapping[str, Limit] = {}
COMPARES = False


def measure(gate: CommandGate, snapshot: Path, bench: Bench) -> Measurement | str:
    """Run the command once."""
    argv = tuple(part.replace("{snapshot}", str(snapshot)) for part in gate.argv)
    found = measuring.run(argv, {"STREAMMERGE_SNAPSHOT": str(snapshot)}, bench.bounds(gate))
    return found if isinstance(found, str) else measuring.numbers(found)
