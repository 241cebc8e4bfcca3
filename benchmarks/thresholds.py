"""What does a threshold over the whole model cost, as TIES-merging needs one of every fine-tune?

A Llama-shaped bf16 model of random numbers and a fine-tune of it. Timed in turn, five times: the plain loop
that merging by hand is (read both, subtract, add, write); the reading that finds the magnitude below which
80 % of all delta's elements lie, as `method: ties` does it, by counting; and the same by sorting everything.

    python benchmarks/thresholds.py              0.25 GiB
    python benchmarks/thresholds.py --gib 1
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from memory import shapes
from safetensors.torch import load_file, save_file

from streammerge import methods
from streammerge.arriving import Arriving, Incoming
from streammerge.engine import Engine
from streammerge.headers import find
from streammerge.offline import Job, Request
from streammerge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable

DENSITY = 0.2
ROUNDS = 5


def make(root: Path, gib: float) -> None:
    """Save a base and a fine-tune."""
    random = torch.Generator().manual_seed(0)
    base = {n: (torch.randn(s, generator=random) * 0.02).bfloat16() for n, s in shapes(gib, 1024).items()}
    tuned = {
        n: (v.float() + torch.randn(v.shape, generator=random) * 1e-3).bfloat16() for n, v in base.items()
    }
    for name, model in (("base", base), ("tuned", tuned)):
        (root / name).mkdir()
        save_file(model, root / name / "model.safetensors", metadata={"format": "pt"})


def loop(root: Path) -> None:
    """Merge by hand: base + 0.3 delta."""
    base, tuned = (load_file(root / name / "model.safetensors") for name in ("base", "tuned"))
    merged = {n: (v.float() + 0.3 * (tuned[n].float() - v.float())).bfloat16() for n, v in base.items()}
    save_file(merged, root / "merged.safetensors")


def count(root: Path, job: Job) -> float:
    """Find the threshold as the engine does before it folds."""
    with Weights(find(root / "base")) as base, job.opened(root / "tuned") as tuned:
        device = torch.device("cpu")
        arriving = Arriving(job.recipe, Incoming(tuned), 0, device, lambda: None, lambda _whole: None)
        arriving.survey(base)
    return arriving.cuts[0]


def sort(root: Path) -> float:
    """Find it by sorting all magnitudes."""
    base, tuned = (load_file(root / name / "model.safetensors") for name in ("base", "tuned"))
    flat = torch.cat([(tuned[n].float() - v.float()).abs_().reshape(-1) for n, v in base.items()])
    return float(flat.sort().values[max(flat.numel() - int(flat.numel() * DENSITY), 1) - 1])


def timed(function: Callable[[], float | None]) -> tuple[float, float | None]:
    """Seconds, and what it gave."""
    began = time.perf_counter()
    found = function()
    return time.perf_counter() - began, found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=0.25)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="streammerge-thresholds-"))
    try:
        make(root, asked.gib)
        engine = Engine(device="cpu", threads=1, residency="disk")
        knobs = methods.resolve("ties", {"density": DENSITY})
        job = Job.begin(Request(root / "base", (), root / "out", "ties", knobs), engine, root)
        runs: dict[str, Callable[[], float | None]] = {
            "plain loop": lambda: loop(root),
            "threshold by counting": lambda: count(root, job),
            "threshold by sorting": lambda: sort(root),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        found: dict[str, float | None] = {}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                took, found[name] = timed(run)
                seconds[name].append(took)
    finally:
        shutil.rmtree(root)
    assert found["threshold by counting"] == found["threshold by sorting"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:24s} {value:7.2f} s {value / medians['plain loop']:6.2f} x")
    print(
        json.dumps(
            {"gib": asked.gib, "seconds": medians, "torch": torch.__version__, "machine": platform.machine()}
        )
    )


if __name__ == "__main__":
    main()
