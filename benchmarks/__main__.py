"""All benchmarks but those of quality, one after another, and a dated report of what they print.

    python benchmarks                            everything: about half an hour on two cores
    python benchmarks --quick                    small runs, to see that all of them work; no report
    python benchmarks --only stream,chain        some
    python benchmarks --out DIR                  the report elsewhere

Each script runs in a process of its own, prints tables and ends with one line of JSON; both are kept, in a
report named by the day and the kind of machine. A script that fails is noted, and the others go on.
"""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import QUICK, machine, notes, progress, slug, versions

from streammerge import allocator

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One script with the options of a full run and of a quick one, and the question if it is another."""

    name: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    question: str = ""


RUNS = (
    Run("hotpath"),
    Run(
        "hotpath",
        ("--lm-head",),
        ("--lm-head", "--quick"),
        "What memory does that step need on a tall weight?",
    ),
    Run("chain"),
    Run("stream"),
    Run("arrivals"),
    Run(
        "memory",
        ("--gib", "0.1", "--hidden", "512"),
        ("--gib", "0.01", "--hidden", "128", "--fine-tunes", "3"),
    ),
    Run("thresholds", ("--gib", "0.25"), ("--gib", "0.05")),
    Run("promotion"),
    Run("gpu"),
)

CAREFUL = notes(
    "Ratios hold within one table, whose rows ran in turn; seconds of two tables, days or machines do not "
    "compare.",
    "The load at the start, above, says whether other work was done at the same time. Threads that have to "
    "share a core wait for each other at every small step: such seconds can be many times too long.",
    "All models and fine-tunes are random numbers: shapes and bytes are those of real ones, spectra are not.",
    "On a virtual machine the host may cache what the guest dropped from its cache, and share its cores.",
)


def main() -> None:
    """Run, and write the report."""
    asked = arguments()
    allocator.begin()  # as every command does; for the peers' processes too
    parts: list[str] = []
    figures: list[dict[str, Any]] = []
    failed: list[str] = []
    before = machine()
    for run in RUNS:
        if asked.only and run.name not in asked.only:
            continue
        flags = run.quick if asked.quick else run.full
        command = ["python", f"benchmarks/{run.name}.py", *flags]
        progress(f"== {shlex.join(command)}")
        printed, code = captured(run.name, flags)
        if code:
            failed.append(run.name)
        tables, line = split(printed)
        figures += [{"command": shlex.join(command), "exit": code, **line}]
        parts.append(section(run, shlex.join(command), tables, code))
    out = asked.out or (None if asked.quick else HERE / "results")
    if out is not None:
        write(out, before, parts, figures)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def write(out: Path, before: dict[str, Any], parts: list[str], figures: list[dict[str, Any]]) -> None:
    """Write the report, and beside it the figures as JSON."""
    date = datetime.now(tz=UTC).date().isoformat()
    out.mkdir(parents=True, exist_ok=True)
    report = out / f"{date}-{slug(before)}.md"
    report.write_text("\n\n".join((head(date, before), *parts)) + "\n", encoding="utf-8")
    kept = {"date": date, **before, **versions(), "runs": figures}
    report.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    progress(f"written: {report} and .json")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="scripts, with commas")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of reports: results/, and of --quick none, where left out",
    )
    asked = parser.parse_args()
    if unknown := set(asked.only) - {run.name for run in RUNS}:
        parser.error(f"--only: no such script: {', '.join(sorted(unknown))}")
    return asked


def captured(name: str, flags: tuple[str, ...]) -> tuple[str, int]:
    """Run a script, pass on what it prints, and keep it."""
    argv = [sys.executable, str(HERE / f"{name}.py"), *flags]
    lines = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines), process.returncode


def split(printed: str) -> tuple[str, dict[str, Any]]:
    """Part what is for people from the line of JSON at the end; there is none where nothing was measured."""
    text, _, last = printed.rstrip().rpartition("\n")
    try:
        found = json.loads(last)
    except json.JSONDecodeError:
        return printed.strip(), {}
    return text.strip(), found


def section(run: Run, command: str, tables: str, code: int) -> str:
    """One script's part of the report: the question, the command, what it printed."""
    tree = ast.parse((HERE / f"{run.name}.py").read_text(encoding="utf-8"))
    question, _, rest = (ast.get_docstring(tree) or "").partition("\n\n")
    about = rest.partition("\n\n")[0] if not run.question else ""
    is_table = "\n| -" in tables or not tables
    body = tables if is_table else f"```\n{tables}\n```"
    ended = f"It failed, with exit code {code}." if code else ""
    heading = f"## {run.question or question}"
    return "\n\n".join(part for part in (heading, f"`{command}`", about, body, ended) if part)


def head(date: str, found: dict[str, Any]) -> str:
    """What the figures depend on, and what to be careful about."""
    software = versions()
    command = shlex.join(["python", "benchmarks", *sys.argv[1:]])
    facts = notes(
        f"Processor: {found['processor']}, {found['cores']} cores; {found['memory_gib']:g} GiB of memory.",
        f"Disk: {found['disk']}. GPU: {found['gpu'] or 'none'}.",
        f"torch {software['torch']}, {software['threads']} threads, Python {software['python']}.",
        f"Load when it began: {found['load']:g}.",
    )
    return f"# Benchmarks, {date}\n\n`{command}`\n\n{facts}\n\nWhat to be careful about:\n\n{CAREFUL}"


if __name__ == "__main__":
    main()
