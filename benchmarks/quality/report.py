"""What is left of a run: a table on the terminal, a dated Markdown report, all numbers as JSON, a picture."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rules import BASE, EXPERTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from measuring import Row

NOT_MEASURED = "-"
MILLION = 1e6
WIDTH = 132  # characters of a table that is not on a terminal
VERSIONS = ("torch", "numpy", "safetensors")


@dataclass(frozen=True)
class Result:
    """A tier's rows, and whether the daemon served the library's bits; None where that was not tried."""

    tier: str
    tasks: tuple[str, ...]
    rows: list[Row]
    equal: bool | None = None


@dataclass(frozen=True)
class Report:
    """A whole run.

    notes  of each rule that could not run, or on which tier it failed, why
    peer   what the peer's rows are; "" where there are none
    """

    family: str
    date: str
    command: str
    results: list[Result]
    notes: Mapping[str, str]
    peer: str = ""


def _fixed(digits: int) -> Callable[[float | None], str]:
    return lambda value: NOT_MEASURED if value is None else f"{value:.{digits}f}"


def _milliseconds(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{1000 * seconds:.0f}"


def _megabytes(size: int | None) -> str:
    return NOT_MEASURED if size is None else f"{size / MILLION:.1f}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "rule": lambda row: row.rule,
    "mean": lambda row: _fixed(1)(row.mean),
    "worst task": lambda row: _fixed(1)(row.worst),
    "orders": lambda row: str(row.orders),
    "std": lambda row: _fixed(2)(row.spread),
    "backward transfer": lambda row: _fixed(1)(row.transfer),
    "old task's drop: p95": lambda row: _fixed(1)(row.drop_95),
    "max": lambda row: _fixed(1)(row.drop),
    "ms a fine-tune": lambda row: _milliseconds(row.seconds),
    "state MB": lambda row: _megabytes(row.state_bytes),
}
LEGEND = """\
Percent right on test examples. `mean` and `worst task` are after the last merge, averaged over orders; `std`
is the mean's over orders, the same seeded ones for every rule. `backward transfer` is the mean over all tasks
of final minus just-merged accuracy. An old task's drop is what a task merged at least two merges ago lost in
one merge, over all merges and orders. `ms a fine-tune` is the median fold plus the median render, files
written; `state MB` is what the method remembers on disk after the last merge. `-`: not measured.
"""


def show(result: Result) -> None:
    """Print one tier."""
    table = Table(title=f"{result.tier}: {len(result.tasks)} tasks")
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in result.rows:
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table)


def write(report: Report, folder: Path) -> Path:
    """Write the Markdown, the JSON and the picture; gives the Markdown's path."""
    import picture

    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{report.date}-quality-{report.family}"
    stem.with_suffix(".json").write_text(json.dumps(_numbers(report)) + "\n", encoding="utf-8")
    picture.draw(report, stem.with_suffix(".png"))
    text = stem.with_suffix(".md")
    text.write_text(_markdown(report, stem.with_suffix(".png").name), encoding="utf-8")
    return text


def rules_of(results: Sequence[Result]) -> list[str]:
    """The rules that ran on every tier, in the table's order."""
    ran = [{row.rule for row in result.rows} for result in results]
    return [row.rule for row in results[0].rows if all(row.rule in rules for rules in ran)]


def mean_of(results: Sequence[Result], rule: str) -> float:
    """A rule's mean over tiers."""
    return statistics.mean(row.mean for result in results for row in result.rows if row.rule == rule)


def _numbers(report: Report) -> dict[str, Any]:
    return {
        "family": report.family,
        "date": report.date,
        "command": report.command,
        "machine": machine(),
        "versions": versions(),
        "not_run": dict(report.notes),
        "peer": report.peer,
        "tiers": [
            {
                "tier": result.tier,
                "tasks": result.tasks,
                "daemon_equals_library": result.equal,
                "rows": [row.as_json() for row in result.rows],
            }
            for result in report.results
        ],
    }


def _markdown(report: Report, drawing: str) -> str:
    about = ", ".join(f"{name} {found}" for name, found in versions().items())
    parts = [
        f"# Which method merges best: {report.family}, {report.date}",
        f"`{report.command}`: {machine()}; {about}.",
        f"![Mean accuracy and worst task of every rule]({drawing})",
        LEGEND.rstrip(),
        *([report.peer] if report.peer else []),
    ]
    if len(report.results) > 1:
        parts += ["## All tiers: mean accuracy", _summary(report.results)]
    for result in report.results:
        parts += [f"## {result.tier}", f"{len(result.tasks)} tasks: {', '.join(result.tasks)}."]
        parts += [_table(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in result.rows])]
    tried = {result.tier: result.equal for result in report.results if result.equal is not None}
    parts += [
        f"The default method on one order of {tier}, folded by `streammerge run --once` from a folder, "
        f"served {'the same bits as' if equal else 'OTHER bits than'} the library."
        for tier, equal in tried.items()
    ]
    if report.notes:
        parts += ["Not run, or not to the end:"]
        parts += ["\n".join(f"- {name}: {why}" for name, why in report.notes.items())]
    return "\n\n".join(parts) + "\n"


def _summary(results: Sequence[Result]) -> str:
    """One line a rule, one column a tier, and how much of the way from base to experts it goes."""
    low, high = mean_of(results, BASE), mean_of(results, EXPERTS)
    lines = []
    for rule in rules_of(results):
        means = [row.mean for result in results for row in result.rows if row.rule == rule]
        overall = statistics.mean(means)
        share = 100 * (overall - low) / (high - low)
        lines.append([rule, *(f"{mean:.1f}" for mean in means), f"{overall:.1f}", f"{share:.0f}"])
    return _table(["rule", *(result.tier for result in results), "all", "% of the way to the experts"], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    under = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, under, *lines])


def machine() -> str:
    """The hardware in one line; other work on the machine is not known here."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = {line.partition(":")[2].strip() for line in info if line.startswith("model name")}
    load = os.getloadavg()[0]
    return f"{', '.join(sorted(names))}, {os.cpu_count()} cores, one thread used, load {load:.1f} at the end"


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
        "threads": str(torch.get_num_threads()),
    }
