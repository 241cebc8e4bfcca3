"""Run by peer.py in the peer's own environment: merges that mergekit does in memory, a file each.

Reads the job from standard input, as JSON; knows nothing of the benchmark or of streammerge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

SEED = 0
BASE = "base"


def main() -> None:
    torch.set_num_threads(1)
    job: dict[str, Any] = json.load(sys.stdin)
    base = {BASE: load_file(Path(job["base"]) / "model.safetensors")}
    experts = {path: load_file(Path(path) / "model.safetensors") for path in job["experts"]}
    refused = {}
    for number, merge in enumerate(job["merges"]):
        print(f"mergekit: {merge['name']}", file=sys.stderr, flush=True)
        torch.manual_seed(SEED)
        given = {**base, **experts} if merge["with_base"] else experts
        try:
            with torch.no_grad():
                merged = merge_state_dicts(
                    given,
                    merge["method"],
                    parameters=merge["parameters"],
                    base=BASE if merge["with_base"] else None,
                )
        except ValueError as exc:  # how mergekit refuses inputs
            refused[merge["name"]] = str(exc)
            continue
        # Results can be parts of one tensor, and a file has none that share memory.
        weights = {name: weight.clone().contiguous() for name, weight in merged.items()}
        save_file(weights, Path(job["out"]) / f"{number}.safetensors")
    (Path(job["out"]) / "refused.json").write_text(json.dumps(refused), encoding="utf-8")


if __name__ == "__main__":
    main()
