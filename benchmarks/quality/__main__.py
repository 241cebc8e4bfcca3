"""Which merge method is best? One base, several experts, one merged model: how much is right on every task.

    python benchmarks/quality tiny                          seven questions about digits, four seeds; seconds
    python benchmarks/quality glyph                         8, 14 and 20 tasks of small pictures; needs Pillow
    python benchmarks/quality text                          ten tasks for a MiniLM; see text.py
    python benchmarks/quality tiny --methods opcm,average   only these methods, or rows of the table
    python benchmarks/quality tiny --orders 1 --out DIR     fewer orders; the report elsewhere
    python benchmarks/quality tiny --peer                   rows of mergekit too, installed apart; see peer.py

Every merge is done by streammerge's own engine. The data and the trained experts are kept between runs, in
$XDG_CACHE_HOME/streammerge-quality. The last thing tried is the default method through the real daemon.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import measuring
import peer
import report
import rules
import torch

from streammerge.errors import StreammergeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rules import Rule
    from tier import Tier

FAMILIES = ("tiny", "glyph", "text")
ORDERS = 5


def main() -> None:
    asked = _arguments()
    torch.set_num_threads(1)
    wanted = [name.strip() for name in asked.methods.split(",") if name.strip()]
    chosen, notes = rules.chosen(wanted)
    if not chosen and not notes:
        raise SystemExit(f"--methods {asked.methods}: no such method or row")
    for name, why in notes.items():
        print(f"not run: {name}: {why}")
    tiers: list[Tier] = importlib.import_module(asked.family).tiers()
    results = []
    for tier in tiers:
        found = _measure(tier, chosen, asked, notes)
        results.append(_try_the_daemon(tier, found) if tier is tiers[-1] else found)
    command = shlex.join(["python", "benchmarks/quality", *sys.argv[1:]])
    date = datetime.now(tz=UTC).date().isoformat()
    about = peer.ABOUT if asked.peer else ""
    print(report.write(report.Report(asked.family, date, command, results, notes, about), asked.out))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/quality", description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument(
        "--methods", default="", help="methods or rows, with commas between; all where left out"
    )
    parser.add_argument(
        "--orders", type=int, default=ORDERS, help=f"orders of the tasks, {ORDERS} where left out"
    )
    parser.add_argument(
        "--peer", action="store_true", help="also merge by mergekit; installs it apart, 1.6 GB"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "results", help="folder of reports"
    )
    asked = parser.parse_args()
    if asked.orders < 1:
        parser.error("--orders must be at least 1")
    return asked


def _measure(
    tier: Tier, chosen: Sequence[Rule], asked: argparse.Namespace, notes: dict[str, str]
) -> report.Result:
    """All rows of one tier. A rule whose merge streammerge refuses is noted, and the others go on."""
    orders = measuring.orders_of(tier, asked.orders)
    rows = measuring.references(tier)
    for rule in chosen:
        print(f"{tier.name}: {rule.name}", file=sys.stderr, flush=True)
        try:
            rows.append(measuring.measure(tier, rule, orders))
        except StreammergeError as exc:
            notes[f"{rule.name} on {tier.name}"] = exc.message
            print(f"failed: {rule.name} on {tier.name}: {exc.message}")
    if asked.peer:
        peers, refused = peer.rows(tier)
        rows += peers
        notes |= refused
    found = report.Result(tier.name, tier.tasks, rows)
    report.show(found)
    return found


def _try_the_daemon(tier: Tier, found: report.Result) -> report.Result:
    """One order with the default method by `streammerge run --once`, compared bit by bit."""
    equal = measuring.through_the_daemon(tier, rules.default(), measuring.orders_of(tier, 1)[0])
    print(f"through the daemon: {'equal' if equal else 'NOT EQUAL'}")
    return replace(found, equal=equal)


if __name__ == "__main__":
    main()
