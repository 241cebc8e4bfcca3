"""What does promotion add to a fold, for a model of 8B parameters?

Seals candidates of the size of an 8B model in bf16 with a state of twice that, as sparse files, and takes
each through what comes after the seal: no gate, accepted, `current` switched, old versions removed, a target
told. Everything but the content of the files is as it is for real; none of it is read.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import structlog
import torch
from common import GIB, finish, notes, options, say, table, workplace
from safetensors.torch import save_file

from streammerge import acceptance, recovery, rollout, screen, snapshots
from streammerge.config import Config
from streammerge.engine import Engine
from streammerge.ledger import now
from streammerge.members import Member, Members
from streammerge.metrics import Metrics
from streammerge.targets import open_target

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.recipes import FoldingMerge
    from streammerge.snapshots import Snapshot

MODEL_GIB, STATE_GIB, SHARDS = 15.0, 30.0, 4
KEEP = 3


def open_merge(root: Path) -> FoldingMerge:
    """A store whose base is one small weight, with a target that confirms at once."""
    save_file({"weight": torch.ones(8, 8, dtype=torch.bfloat16)}, root / "base.safetensors")
    config = Config.model_validate(
        {
            "base": root / "base.safetensors", "store": root / "store", "method": "average", "keep": KEEP,
            "keep_spaced": 0, "grace": "0s", "reserve": "1MB",
            "targets": [{"name": "server", "type": "exec", "argv": ["true"]}],
        }
    )  # fmt: skip
    recovery.prepare_folder(config)
    return recovery.open_merge(config, Engine(device="cpu", threads=1), Metrics(screen.REASONS))


def sealed(merge: FoldingMerge, version: int, gib: float) -> Snapshot:
    """Seal a candidate after head whose files are as long as those of a real one."""
    building, hashes = snapshots.begin(merge.store, version), {}
    for folder, whole in (("model", MODEL_GIB), ("state", STATE_GIB)):
        (building / folder).mkdir(exist_ok=True)
        for shard in range(SHARDS):
            path = building / folder / f"{folder}-{shard}.safetensors"
            path.touch()
            os.truncate(path, int(whole / SHARDS * gib / MODEL_GIB * GIB))
            hashes[path.relative_to(building).as_posix()] = f"{version:032x}{shard:032x}"
    member = Member("team", f"fine-tune-{version}", "1", f"{version:064x}", 1.0)
    head = merge.head
    manifest = {
        **head.manifest, "version": version, "parent": head.digest,
        "fine_tunes": Members([*head.fine_tunes, member]),
    }  # fmt: skip
    return snapshots.seal(merge.store, building, manifest, hashes)


def promote_one(merge: FoldingMerge, version: int, gib: float) -> dict[str, float]:
    """Seconds from the seal until `current` is switched, until all is tidied, until the target is told."""
    candidate = sealed(merge, version, gib)
    acceptance.record_candidate(merge, candidate)
    began, began_at = time.perf_counter(), now()
    assert acceptance.conclude(merge, candidate)
    concluded = time.perf_counter()
    rollout.deliver(merge, [open_target(part, merge.config) for part in merge.config.targets])
    told = time.perf_counter()
    switched = (merge.ledger.last_promotion() or {})["switched_at"]
    return {"switched": switched - began_at, "tidied": concluded - began, "told": told - began}


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--gib", type=float, default=MODEL_GIB, help="of the model; the state is twice that")
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    rounds = 3 if asked.quick else asked.rounds
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(sys.stderr))
    with workplace("promotion", None) as root:
        merge = open_merge(root)
        found = [promote_one(merge, number + 1, asked.gib) for number in range(rounds)]
        merge.ledger.close()
        shutil.rmtree(root / "store", ignore_errors=True)
    medians: dict[str, Any] = {key: statistics.median(one[key] for one in found) for key in found[0]}
    worst = {key: max(one[key] for one in found) for key in found[0]}
    names = {"switched": "`current` is switched", "tidied": "old versions are removed", "told": "target told"}
    say(
        table(
            ("seconds from the seal until", "median", "worst"),
            [(names[key], medians[key], worst[key]) for key in names],
        ),
        notes(f"{rounds} promotions of a model of {asked.gib:g} GiB with a state of {2 * asked.gib:g} GiB."),
    )
    finish("promotion", {"gib": asked.gib, "rounds": rounds, "seconds": medians, "worst": worst})


if __name__ == "__main__":
    main()
