"""What the benchmark measures: a rule on a tier, over orders of the tasks; and the same through the daemon.

Percent right throughout. A rule that is streamed is examined after every merge, and then also tells what each
merge did to the tasks before it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rules import BASE, EXPERTS, SUM_NORM, sum_norm
from running import Running
from tier import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rules import Rule
    from tier import Tier
    from torch import Tensor

    Order = tuple[int, ...]  # numbers of tasks, as they arrive
    Curve = list[list[float]]  # after each merge, the accuracy of every task

DIGITS = 3  # of a percentage in the JSON; one example is 0.17 or more
OLD = 2  # a task is old from the second merge after its own
FIRST_PUBLISHED = 1_700_000_000  # seconds since 1970; the fine-tunes follow a minute apart


@dataclass(frozen=True)
class Row:
    """A rule on a tier; None where it was not measured.

    mean, worst  of the tasks, after the last merge, averaged over orders
    spread       standard deviation of the mean over orders (n - 1)
    transfer     backward transfer: mean over all tasks of final minus just-merged accuracy
    drop, drop_95  largest loss of an old task in one merge, over all merges and orders; 95th percentile
    path_mean    mean over merges of the accuracy on the tasks merged so far
    seconds      a fine-tune: median fold + median render
    finals       of each order the accuracy of every task, in the tier's order of tasks
    """

    rule: str
    mean: float
    worst: float
    orders: int = 1
    spread: float | None = None
    transfer: float | None = None
    drop: float | None = None
    drop_95: float | None = None
    path_mean: float | None = None
    seconds: float | None = None
    fold_seconds: float | None = None
    render_seconds: float | None = None
    state_bytes: int | None = None
    finals: list[list[float]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Every number; what each task had, in order of the tier's tasks."""
        found = asdict(self)
        for name in ("finals", "curves"):
            found[name] = _rounded(found[name])
        return found


def _rounded(numbers: Any) -> Any:  # noqa: ANN401 -- lists in lists
    return [_rounded(number) for number in numbers] if isinstance(numbers, list) else round(numbers, DIGITS)


@dataclass(frozen=True)
class Run:
    """One order of one rule; the curve has one line where the rule is not streamed."""

    order: Order
    curve: Curve
    fold_seconds: list[float]
    render_seconds: list[float]
    state_bytes: int


def orders_of(tier: Tier, count: int) -> list[Order]:
    """The same orders for every rule, so that differences are paired."""
    tasks = range(len(tier.tasks))
    return [tuple(random.Random(seed).sample(tasks, len(tasks))) for seed in range(count)]


def references(tier: Tier) -> list[Row]:
    """What merging is compared with: the base, each expert on its own task, and the rival."""
    base, experts = load_model(tier.base), [load_model(path) for path in tier.experts]
    alone = [tier.accuracy(expert)[number] for number, expert in enumerate(experts)]
    found = {
        BASE: tier.accuracy(base),
        EXPERTS: alone,
        SUM_NORM: tier.accuracy(sum_norm(base, experts)),
    }
    return [Row(name, statistics.mean(marks), min(marks), finals=[marks]) for name, marks in found.items()]


def measure(tier: Tier, rule: Rule, orders: Sequence[Order]) -> Row:
    """A rule over orders; only the first where neither the result nor the path depends on the order.

    What one merge does to old tasks depends on the order for every rule, so a streamed one takes them all.
    """
    several = rule.is_ordered or rule.is_streamed
    runs = [_run(tier, rule, order) for order in (orders if several else orders[:1])]
    finals = [run.curve[-1] for run in runs]
    means = [statistics.mean(final) for final in finals]
    fold = statistics.median(seconds for run in runs for seconds in run.fold_seconds)
    render = statistics.median(seconds for run in runs for seconds in run.render_seconds)
    row = Row(
        rule.name,
        statistics.mean(means),
        statistics.mean(min(final) for final in finals),
        orders=len(runs),
        spread=statistics.stdev(means) if len(means) > 1 else None,
        seconds=fold + render,
        fold_seconds=fold,
        render_seconds=render,
        state_bytes=max(run.state_bytes for run in runs),
        finals=finals,
        curves=[run.curve for run in runs] if rule.is_streamed else [],
    )
    return _with_path(row, runs) if rule.is_streamed else row


def _run(tier: Tier, rule: Rule, order: Order) -> Run:
    """Merge one after another, and examine."""
    curve: Curve = []
    with Running(tier.base, rule.method, rule.knobs, rule.finish) as running:
        for merged, number in enumerate(order, 1):
            running.fold(tier.experts[number])
            if rule.is_streamed or merged == len(order):
                curve.append(tier.accuracy(running.render()))
        return Run(order, curve, running.fold_seconds, running.render_seconds, running.state_bytes)


def _with_path(row: Row, runs: Sequence[Run]) -> Row:
    """Add what only a curve tells."""
    drops = torch.tensor([drop for run in runs for drop in old_drops(run.order, run.curve)])
    return Row(
        **{
            **vars(row),
            "transfer": statistics.mean(backward_transfer(run.order, run.curve) for run in runs),
            "drop": drops.max().item() if len(drops) else None,
            "drop_95": drops.quantile(0.95).item() if len(drops) else None,
            "path_mean": statistics.mean(path_mean(run.order, run.curve) for run in runs),
        }
    )


def backward_transfer(order: Order, curve: Curve) -> float:
    """Mean over all tasks of final minus just-merged accuracy; the last task adds 0, and counts."""
    gains = [curve[-1][number] - curve[merged][number] for merged, number in enumerate(order)]
    return sum(gains) / len(order)


def old_drops(order: Order, curve: Curve) -> list[float]:
    """Of every merge, what each task merged at least two merges earlier lost; below 0 where it gained."""
    return [
        curve[merge - 1][number] - curve[merge][number]
        for merge in range(OLD, len(order))
        for number in order[: merge - OLD + 1]
    ]


def path_mean(order: Order, curve: Curve) -> float:
    """Mean over merges of the mean accuracy on what is merged by then."""
    return statistics.mean(
        statistics.mean(curve[merge][number] for number in order[: merge + 1]) for merge in range(len(order))
    )


def through_the_daemon(tier: Tier, rule: Rule, order: Order) -> bool:
    """Whether the daemon's path, files in and snapshot out, serves the library's result bit for bit.

    The fine-tunes lie in a watched folder with ages in that order, and `streammerge run --once` takes them.
    """
    root = Path(tempfile.mkdtemp(prefix="streammerge-quality-"))
    try:
        _publish(tier, order, root / "fine-tunes")
        source = {"type": "directory", "name": "tasks", "path": str(root / "fine-tunes"), "settle": "0s"}
        config = {
            "base": str(tier.base), "store": str(root / "store"), "device": "cpu", "threads": 1,
            "method": rule.method, "knobs": dict(rule.knobs), "finalize": dict(rule.finish),
            "sources": [source],
        }  # fmt: skip
        file = root / "streammerge.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")  # every JSON is YAML too
        argv = [sys.executable, "-m", "streammerge", "run", "--once", "-c", str(file)]
        subprocess.run(argv, check=True, capture_output=True)
        served = load_model(root / "store" / "current" / "model")
        with Running(tier.base, rule.method, rule.knobs, rule.finish) as running:
            for number in order:
                running.fold(tier.experts[number])
            return _same(served, running.render())
    finally:
        subprocess.run(["chmod", "-R", "u+w", root], check=True)  # noqa: S607 -- a store's versions are read-only
        shutil.rmtree(root)


def _publish(tier: Tier, order: Order, folder: Path) -> None:
    """Copy the experts in, each a minute younger than the one before."""
    folder.mkdir()
    for position, number in enumerate(order):
        published = folder / tier.tasks[number]
        shutil.copytree(tier.experts[number], published)
        then = FIRST_PUBLISHED + 60 * position
        for path in (*published.iterdir(), published):
            os.utime(path, (then, then))


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names and every bit agree."""
    return set(one) == set(other) and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )
