"""What survives? Runs every module of faults that has `measure`, prints the figures, writes a dated report.

    python -m faults                         everything, in the bounded form: some minutes
    python -m faults --full                  as the committed reports were made: an hour and more
    python -m faults --only kills,soak       some
    python -m faults --out DIR               the report elsewhere

Ends with 1 where anything was not as promised.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults import Findings

PARTS = ("kills", "writes", "fuzz", "soak", "under_fire", "serving")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def main() -> int:
    """Run, print, write."""
    asked = arguments()
    scale = "full" if asked.full else "short"
    found: dict[str, tuple[Findings, float]] = {}
    for part in asked.only.split(","):
        print(f"{part}: running", file=sys.stderr, flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"faults-{part}-", ignore_cleanup_errors=True) as work:
            findings: Findings = importlib.import_module(f"faults.{part}").measure(Path(work), scale)
        found[part] = (findings, time.monotonic() - started)
        print(table(*found[part]), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    written = asked.out / f"{datetime.now(UTC):%Y-%m-%d}-faults{'' if asked.full else '-short'}.md"
    written.write_text(report(found, scale))
    print(f"written to {written}")
    print(json.dumps({part: asdict(findings) for part, (findings, _) in found.items()}))
    return int(any(findings.differences for findings, _ in found.values()))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--full", action="store_true", help="the long form")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the report goes")
    asked = parser.parse_args()
    if unknown := set(asked.only.split(",")) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: these are there: {', '.join(PARTS)}")
    return asked


def table(findings: Findings, seconds: float) -> str:
    """Give one part of the report, as Markdown."""
    figures = [
        *findings.figures,
        ("differences", f"{len(findings.differences):,}"),
        ("took", f"{seconds:,.0f} s"),
    ]
    width = max(len(name) for name, _ in figures)
    lines = [f"## {findings.question}", "", f"| {'':{width}} | |", f"|-{'-' * width}-|--:|"]
    lines += [f"| {name:{width}} | {value} |" for name, value in figures]
    lines += ["", *(f"- {note}" for note in findings.notes)]
    lines += [f"- **not as promised:** {difference}" for difference in findings.differences]
    return "\n".join(lines).rstrip() + "\n"


def report(found: dict[str, tuple[Findings, float]], scale: str) -> str:
    """Give the whole report."""
    option = " --full" if scale == "full" else ""
    command = f"python -m faults{option} --only {','.join(found)}"
    place = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"
    lines = [
        f"# Faults made on purpose, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`{command}` with `tests` in PYTHONPATH. {place}, Python {platform.python_version()}.",
        "",
    ]
    return "\n".join([*lines, *(table(*part) for part in found.values())])


if __name__ == "__main__":
    sys.exit(main())
