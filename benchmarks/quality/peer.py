"""The peer's rows: mergekit on the same base and experts, for what streammerge has not, and two to compare.

mergekit, under the LGPL, is run as a program in an environment of its own, and nothing of it comes in here:
peer_program.py merges there and writes files, which sit the tier's exam. It takes all experts at once, so its
rows have no columns about one merge after another. `nuslerp` takes two models only, and has no row.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import Row
from peer_environment import REQUIRES, environment
from rules import PEER
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tier import Tier

PROGRAM = Path(__file__).with_name("peer_program.py")
SHARE = "1/n"  # as a weight: of n experts, each the n-th part

ABOUT = f"""\
Rows named `{PEER}` are the work of {" and ".join(REQUIRES)}, run as a program, once on all experts; its
methods do not depend on their order. What a row does not say is as there: `lambda` 1, `gamma` 0.01, `epsilon`
0.15, `select_topk` 1, `max_iter` 10. `weight` has no default there. Where a method divides by the sum of
weights it is 1; where it does not, there are two rows, of weight 0.3, as in our own rows, and of 1/n for n
experts, as in its example bio-merge.yml. `density` is 0.5, as in that example, and 0.9 for breadcrumbs, as in
its method guide; at the default 1 nothing is dropped. dare_ties and della_linear draw at random: one seed."""


@dataclass(frozen=True)
class Merge:
    """One row.

    parameters  of the method, the same for every expert; a weight may be SHARE
    with_base   whether the base is handed over as such; without it, weights are merged and not deltas
    """

    name: str
    method: str
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    with_base: bool = True


HALF, MOST = {"density": 0.5}, {"density": 0.9}
MERGES = (
    Merge("model_stock", "model_stock"),
    Merge("karcher", "karcher", with_base=False),
    Merge("multislerp", "multislerp", {"weight": 1.0}),
    Merge("multislerp, no base", "multislerp", {"weight": 1.0}, with_base=False),
    Merge("sce", "sce"),
    Merge("sce top 0.1", "sce", {"select_topk": 0.1}),
    Merge("task_arithmetic 0.3", "task_arithmetic", {"weight": 0.3}),
    Merge("task_arithmetic 1/n", "task_arithmetic", {"weight": SHARE}),
    Merge("ties", "ties", {"weight": 1.0, **HALF}),
    Merge("dare_ties 0.3", "dare_ties", {"weight": 0.3, **HALF}),
    Merge("dare_ties 1/n", "dare_ties", {"weight": SHARE, **HALF}),
    Merge("della_linear 0.3", "della_linear", {"weight": 0.3, **HALF}),
    Merge("della_linear 1/n", "della_linear", {"weight": SHARE, **HALF}),
    Merge("breadcrumbs_ties 0.3", "breadcrumbs_ties", {"weight": 0.3, **MOST}),
    Merge("breadcrumbs_ties 1/n", "breadcrumbs_ties", {"weight": SHARE, **MOST}),
)


def rows(tier: Tier) -> tuple[list[Row], dict[str, str]]:
    """The peer's rows on one tier, and of each merge that it refused, its words."""
    with tempfile.TemporaryDirectory(prefix="streammerge-quality-") as made:
        out = Path(made)
        _merge(tier, out)
        refused = json.loads((out / "refused.json").read_bytes())
        names = [merge.name for merge in MERGES if merge.name in refused]
        notes = {f"{PEER} {name} on {tier.name}": refused[name] for name in names}
        found = []
        for number, merge in enumerate(MERGES):
            if merge.name not in refused:
                marks = tier.accuracy(load_file(out / f"{number}.safetensors"))
                found.append(Row(f"{PEER} {merge.name}", statistics.mean(marks), min(marks), finals=[marks]))
        return found, notes


def _merge(tier: Tier, out: Path) -> None:
    """Run the peer: `out` gets a file a merge, by the merge's number, and refused.json."""
    count = len(tier.experts)
    job = {
        "base": str(tier.base),
        "experts": [str(path) for path in tier.experts],
        "out": str(out),
        "merges": [
            {
                "name": merge.name,
                "method": merge.method,
                "parameters": {
                    name: 1 / count if value == SHARE else value for name, value in merge.parameters.items()
                },
                "with_base": merge.with_base,
            }
            for merge in MERGES
        ],
    }
    python = environment() / "bin" / "python"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # -I: neither this folder's modules nor PYTHONPATH's are the peer's.
    subprocess.run([python, "-I", PROGRAM], input=json.dumps(job), text=True, env=env, check=True)
