"""The run's picture: a panel a tier, a bar a rule from the base's mean to its own, a dot at its worst task.

It draws what it is given and computes nothing but positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from report import mean_of, rules_of
from rules import BASE, EXPERTS, PEER, SUM_NORM

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from report import Report, Result

INK, FAINT, BETTER, WORSE, RIVAL, DOT = "#22262b", "#7d858d", "#2a6f9e", "#c0392b", "#b9c3cc", "#d97b16"
PANEL_WIDTH, ROW_HEIGHT, MARGIN = 4.6, 0.3, 2.1  # inches
ROOM = 3.0  # percent left and right of what is drawn
CAPTION = (
    "Percent right. Bar: mean over the tasks, from the base's mean. Dot: the worst task; dotted: the base's. "
    "Pale: a rival, no method of streammerge. Red: worse than the base."
)


def draw(report: Report, file: Path) -> None:
    """Draw into `file`, a PNG. The rules' order is that of their means over all tiers, best on top."""
    from matplotlib.figure import Figure

    rules = [rule for rule in rules_of(report.results) if rule not in {BASE, EXPERTS}]
    rules.sort(key=lambda rule: mean_of(report.results, rule))
    height = MARGIN + ROW_HEIGHT * len(rules)
    figure = Figure(figsize=(2.2 + PANEL_WIDTH * len(report.results), height), dpi=150, facecolor="white")
    panels = figure.subplots(1, len(report.results), sharex=True, sharey=True, squeeze=False)[0]
    for panel, result in zip(panels, report.results, strict=True):
        _draw_tier(panel, result, rules)
    every = [row for result in report.results for row in result.rows]
    panels[0].set_xlim(min(row.worst for row in every) - ROOM, max(row.mean for row in every) + 2 * ROOM)
    figure.suptitle(
        f"One merged model instead of one a task: {report.family}",
        x=0.01,
        ha="left",
        fontsize=15,
        weight="bold",
    )
    figure.text(0.01, 0.02, CAPTION, color=FAINT, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(file)


def _draw_tier(panel: Axes, result: Result, rules: list[str]) -> None:
    rows = {row.rule: row for row in result.rows}
    low, high = rows[BASE].mean, rows[EXPERTS].mean
    for position, rule in enumerate(rules):
        row = rows[rule]
        color = WORSE if row.mean < low else RIVAL if rule == SUM_NORM or rule.startswith(PEER) else BETTER
        panel.barh(position, row.mean - low, left=low, height=0.62, color=color, zorder=2)
        panel.scatter([row.worst], [position], s=22, color=DOT, zorder=3)
        panel.text(max(row.mean, low) + 0.4, position, f"{row.mean:.1f}", va="center", fontsize=9, color=INK)
    panel.axvline(rows[BASE].worst, color=DOT, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    for mean, name in ((low, "base"), (high, "experts")):
        panel.axvline(mean, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        text = panel.text(mean, len(rules) - 0.3, f"{name} {mean:.1f}", ha="center", fontsize=9, color=FAINT)
        text.set_backgroundcolor("white")
    panel.set_ylim(-0.7, len(rules) + 0.3)
    panel.set_yticks(range(len(rules)), rules, fontsize=10, color=INK)
    panel.set_title(
        f"{result.tier}, {len(result.tasks)} tasks", loc="left", fontsize=12, weight="bold", color=INK
    )
    panel.tick_params(length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.grid(axis="x", color="#e8eaed", linewidth=0.8)
    panel.set_axisbelow(True)
