"""Is each good content in the merge exactly once, each broken one refused for its reason, each target told?

Holds a store that nothing works on against the account of what was published. Differences are sentences;
of a kind that is found more than a few times only the first are written out.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import models

if TYPE_CHECKING:
    from collections.abc import Iterable

    from faults.arrivals import Arrivals, Key
    from streammerge.ledger import Ledger, Row

Figures = list[tuple[str, str]]
SHOWN = 5
NOT_ONCE, NOT_REFUSED, OFF, NOT_TOLD = "not exactly once", "not refused", "served weights", "not told"


class Reckoning:
    """What is found wrong with one store, and the figures."""

    def __init__(self, arrivals: Arrivals, ledger: Ledger) -> None:
        """`arrivals` have published all they will; `ledger` is open for reading."""
        self.arrivals, self.site, self.ledger = arrivals, arrivals.site, ledger
        self.differences: list[str] = []
        self.wrong: Counter[str] = Counter()

    def differ(self, kind: str, what: str) -> None:
        """Note one difference."""
        self.wrong[kind] += 1
        if self.wrong[kind] <= SHOWN:
            self.differences.append(f"{kind}: {what}")

    def check(self, targets: Iterable[str]) -> Figures:
        """Check everything."""
        merged = self.check_contents()
        self.check_refusals()
        self.check_history()
        off, one = self.check_weights()
        told = [self.check_target(name) for name in targets]
        for line in self.site.ask("verify", code=None)["findings"]:
            self.differ("verify", line)
        arrivals = self.arrivals
        states = Counter(row["state"] for row in self.ledger.fine_tunes())
        failed = Counter(seen.fault for seen in arrivals.hub.requests() if seen.fault)
        return [
            ("fine-tunes published", f"{arrivals.published:,}"),
            *listed(arrivals.counts),
            ("in the merge at the end", f"{merged:,} of {len(arrivals.digests):,}"),
            ("what became of all that were announced", ""),
            *listed(states),
            ("not in the merge exactly once", f"{self.wrong[NOT_ONCE]:,}"),
            ("wrong or missing refusals", f"{self.wrong[NOT_REFUSED]:,}"),
            ("served weights off the mean of all deltas", f"{off:.1e}"),
            ("one fine-tune more or less would be", f"{one:.1e}"),
            ("requests to the hub", f"{arrivals.hub.count():,}"),
            *listed({f"failed, {kind}": count for kind, count in failed.items()}),
            *told,
        ]

    def check_contents(self) -> int:
        """Each content that was wanted is in head's manifest once, and no other is; gives how many are."""
        head = self.site.ask("show", "head")
        merged = Counter(entry["digest"] for entry in head["fine_tunes"])
        wanted = {digest: key for key, digest in self.arrivals.digests.items()}
        for digest, key in wanted.items():
            if merged[digest] != 1:
                self.differ(NOT_ONCE, f"{key} is {merged[digest]} times in the merge")
        for digest in merged.keys() - wanted.keys():
            self.differ(NOT_ONCE, f"content {digest[:12]} is in the merge and was not to be")
        return sum(merged.values())

    def check_refusals(self) -> None:
        """Each broken one, and each duplicate, was refused for its reason."""
        rows: dict[Key, Row] = {(row["source"], row["name"]): row for row in self.ledger.fine_tunes()}
        for key, reason in self.arrivals.reasons.items():
            row = rows.get(key, {"state": "unknown", "reason": ""})
            if (row["state"], row["reason"]) != ("refused", reason):
                self.differ(NOT_REFUSED, f"{key} is {row['state']} {row['reason']}, not refused as {reason}")

    def check_history(self) -> None:
        """Over all versions that were ever accepted nothing was folded twice but what had changed."""
        folded: Counter[str] = Counter()
        for row in self.ledger.rows("select added from snapshots where state in ('accepted', 'collected')"):
            folded.update(json.loads(row["added"]))
        changed = {name for _, name in self.arrivals.earlier}
        for name, count in folded.items():
            if count > 1 and name not in changed:
                self.differ(NOT_ONCE, f"{name} was folded in {count} versions")

    def check_weights(self) -> tuple[float, float]:
        """What is served is the base plus the mean of all deltas, to a tenth of one of them.

        Gives how far it is off, and how far it would be with one fine-tune more.
        """
        served = models.load(self.site.store / "current" / "model")
        off = max(
            float((served[name].double() - values).abs().max())
            for name, values in self.arrivals.mean().items()
        )
        smallest = min(
            max(float(values.abs().max()) for values in self.arrivals.deltas[digest].values())
            for digest in self.arrivals.digests.values()
        )
        one = smallest / len(self.arrivals.digests)
        if not off < one / 10:
            self.differ(OFF, f"off the mean of all deltas by {off:.2g}; one of them makes {one:.2g}")
        return off, one

    def check_target(self, name: str) -> tuple[str, str]:
        """A target was told of every version, in order, and again only with the same delivery id."""
        lines = (self.site.root / f"{name}.told").read_text().split("\n")[:-1]
        told = [(int(version), delivery) for version, delivery in map(str.split, lines)]
        once = list(dict.fromkeys(told))
        promoted = [row["version"] for row in self.ledger.rows("select version from promotions order by id")]
        if [version for version, _ in once] != promoted:
            self.differ(NOT_TOLD, f"{name} was told of {len(once)} versions, {len(promoted)} were promoted")
        current = self.site.current["version"]
        if told[-1][0] != current or told != sorted(told, key=lambda entry: entry[0]):
            self.differ(NOT_TOLD, f"{name} was last told of version {told[-1][0]}, current is {current}")
        return f"target {name} was told of", f"{len(once):,} versions, {len(told) - len(once)} of them twice"


def listed(counts: dict[str, int] | Counter[str]) -> Figures:
    """Write counts as lines below another."""
    return [(f"- {kind}", f"{count:,}") for kind, count in sorted(counts.items())]
