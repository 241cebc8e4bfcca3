"""The demo's picture: what the served model could do, version by version.

On the left the mean over the tasks, on the right one small panel for each skill, all to one scale. It draws
what it is given and computes nothing but positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.demo.digits import SKILL, TASKS, mean_of_tasks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

INK, FAINT, LINE, ARRIVAL, HARM = "#22262b", "#7d858d", "#2a6f9e", "#d97b16", "#c0392b"
PRINT: Mapping[str, Any] = {"fontsize": 11, "weight": "bold", "ha": "center"}
HIGHEST = 102  # percent; the lowest follows the story


@dataclass(frozen=True)
class Served:
    """One moment of the story: a version that was served, and its accuracy in percent."""

    version: int
    event: str  # "base", the name of the fine-tune that came in, or "rollback"
    accuracy: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Over the seven tasks."""
        return mean_of_tasks(self.accuracy)


def draw(story: Sequence[Served], file: Path, *, contrast: Mapping[str, float], harmful: str) -> None:
    """Draw `story` into `file`, a PNG; `contrast` names other means, drawn as lines to compare with.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.8), dpi=150, facecolor="white")
    left = figure.add_gridspec(1, 1, left=0.04, right=0.335, top=0.78, bottom=0.14)
    right = figure.add_gridspec(2, 4, left=0.475, right=0.97, top=0.78, bottom=0.14, wspace=0.3, hspace=0.55)
    _draw_mean(figure.add_subplot(left[0]), story, contrast, harmful)
    for position, task in enumerate((*TASKS, SKILL)):
        panel = figure.add_subplot(right[position // 4, position % 4])
        _draw_task(panel, story, task, harmful)
        panel.tick_params(labelleft=position % 4 == 0)
    title = "One served model, seven fine-tunes folded in one by one"
    figure.text(0.02, 0.925, title, fontsize=19, weight="bold", color=INK)
    about = "accuracy of the served model in percent, on test digits that no model was trained on"
    figure.text(0.02, 0.875, about, fontsize=12, color=FAINT)
    figure.text(0.475, 0.035, "●  this task's own fine-tune came in", fontsize=11, color=ARRIVAL)
    figure.text(0.695, 0.035, "●  a harmful one, until rollback", fontsize=11, color=HARM)
    figure.text(0.885, 0.035, "┄┄  the base", fontsize=11, color=FAINT)
    figure.savefig(file)


def _draw_mean(panel: Axes, story: Sequence[Served], contrast: Mapping[str, float], harmful: str) -> None:
    means = [served.mean for served in story]
    _draw_line(panel, story, means, harmful)
    panel.set_title("mean of the seven tasks", loc="left", fontsize=13, weight="bold", color=INK, pad=10)
    for name, mean in contrast.items():
        panel.axhline(mean, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        away = "top" if mean < means[-1] else "bottom"  # from the line's own label
        _write_beside(panel, len(story) - 0.45, mean, f"{mean:.1f}  {name}", FAINT, towards=away)
    _write_beside(panel, len(story) - 0.45, means[-1], f"{means[-1]:.1f}  served", LINE)
    for position, (served, mean) in enumerate(zip(story, means, strict=True)):
        if served.event in {"base", harmful}:
            color = HARM if served.event == harmful else LINE
            panel.text(position, mean - 1.5, f"{mean:.1f}", color=color, va="top", **PRINT)
    panel.set_xticks(range(len(story)), [label(served) for served in story], rotation=50, ha="right")
    panel.tick_params(labelsize=10.5)
    panel.set_ylim((min(means) - 5) // 10 * 10, HIGHEST)


def _draw_task(panel: Axes, story: Sequence[Served], task: str, harmful: str) -> None:
    values = [served.accuracy[task] for served in story]
    _draw_line(panel, story, values, harmful)
    question = TASKS[task][0] if task in TASKS else "which digit is it?"
    panel.set_title(task, loc="left", fontsize=12, weight="bold", color=INK, pad=19)
    panel.text(0, 1.04, question, transform=panel.transAxes, fontsize=9.5, color=FAINT)
    panel.axhline(values[0], color=FAINT, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
    arrived = [position for position, served in enumerate(story) if served.event == task]
    panel.scatter(arrived, [values[position] for position in arrived], s=62, color=ARRIVAL, zorder=4)
    _write_beside(panel, len(story) - 0.6, values[-1], f"{values[-1]:.0f}", LINE)
    panel.set_xticks(range(len(story)), _ticks(story))
    panel.tick_params(labelsize=8.5)
    panel.set_ylim((min(min(served.accuracy.values()) for served in story) - 5) // 10 * 10, HIGHEST)


def _draw_line(panel: Axes, story: Sequence[Served], values: Sequence[float], harmful: str) -> None:
    """The line over the versions, interrupted while the harmful one was served."""
    bad = [position for position, served in enumerate(story) if served.event == harmful]
    good = [float("nan") if position in bad else value for position, value in enumerate(values)]
    panel.plot(range(len(story)), good, color=LINE, linewidth=2.2, marker="o", markersize=4, zorder=3)
    for position in bad:
        around = range(max(position - 1, 0), min(position + 2, len(story)))
        panel.plot(around, [values[near] for near in around], color=HARM, linewidth=1.2, zorder=2)
        panel.scatter([position], [values[position]], s=42, color=HARM, zorder=4)
        panel.axvspan(position - 0.5, position + 0.5, color=HARM, alpha=0.1, linewidth=0, zorder=0)
    panel.set_xlim(-0.5, len(story) - 0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=INK, length=0)
    panel.grid(axis="y", color="#e8eaed", linewidth=0.8)
    panel.set_axisbelow(True)


def _write_beside(panel: Axes, x: float, y: float, text: str, color: str, *, towards: str = "center") -> None:
    panel.annotate(text, (x, y), color=color, fontsize=11, weight="bold", va=towards, annotation_clip=False)


def label(served: Served) -> str:
    """How a row and the axis call that moment."""
    return served.event if served.event in {"base", "rollback"} else f"+ {served.event}"


def _ticks(story: Sequence[Served]) -> list[str]:
    """What the small panel has room for: the base, the last good version, the way back to it."""
    last = story[-1].version
    return [
        "base" if served.version == 0 else f"v{last}" if served.version == last else "" for served in story
    ]
