"""The smallest tier: the demo's digits, seven yes-or-no questions, four seeds. Seconds for all four.

Base, fine-tunes and exam are streammerge.demo.digits' own, trained a little less. The base's skill of reading
digits is examined by the demo, and is no task here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tier import Tier, folders, kept

from streammerge.demo import digits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

SEEDS = (0, 1, 2, 3)
BASE_STEPS = 120  # on all images at a time; the fine-tunes learn from small batches
BATCH = 32


def tiers() -> list[Tier]:
    """One tier a seed."""
    return [_tier(seed) for seed in SEEDS]


def _tier(seed: int) -> Tier:
    root = kept(f"tiny-{seed}", _settings(seed), lambda folder: _make(folder, seed))
    exam, tasks = digits.load_exam(root / "exam.safetensors"), tuple(digits.TASKS)

    def accuracy(weights: Mapping[str, Tensor]) -> list[float]:
        found = digits.examine(dict(weights), exam)
        return [found[task] for task in tasks]

    return Tier(f"tiny-{seed}", root / "base", folders(root, tasks), tasks, accuracy)


def _make(folder: Path, seed: int) -> None:
    base, exam = digits.begin(seed, steps=BASE_STEPS, batch=None)
    digits.save_model(base, folder / "base")
    digits.save_exam(exam, folder / "exam.safetensors")
    for task in digits.TASKS:
        digits.save_model(digits.fine_tune(base, exam, task, seed=seed, batch=BATCH), folder / task)


def _settings(seed: int) -> dict[str, object]:
    return {
        "seed": seed,
        "sizes": digits.SIZES,
        "base_steps": BASE_STEPS,
        "steps": digits.STEPS,
        "batch": BATCH,
        "rate": digits.RATE,
        "shots": digits.SHOTS,
        "sharpness": digits.SHARPNESS,
        "tasks": {task: sorted(yes) for task, (_, yes) in digits.TASKS.items()},
    }
