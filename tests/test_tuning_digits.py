"""Tuning on a network that does something: the demo's digits, with tasks that fine-tunes were trained for.

Rows to choose by are images that nothing was trained on; what is claimed is examined on others.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from daemons import REPOSITORY
from merges import opened, work_off
from torch.nn.functional import cross_entropy

from streammerge.demo import digits

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.demo.digits import Exam, Model
    from streammerge.recipes import FoldingMerge

ROWS = 300  # of the images that nothing was trained on: to tune on; the others examine
MEASURE = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
import torch
from torch.nn.functional import cross_entropy
from streammerge.demo import digits
torch.set_num_threads(1)
model, exam = digits.load_model(Path(sys.argv[1])), digits.load_exam(Path(sys.argv[3]))
rows = [json.loads(line) for line in open(sys.argv[2])]
losses = [0.0] * len(rows)
for task in {{row["task"] for row in rows}}:
    places = [place for place, row in enumerate(rows) if row["task"] == task]
    images = torch.tensor([rows[place]["image"] for place in places])
    answers = exam.answers(task)[images]
    found = cross_entropy(digits._cosines(model, exam, task, images), answers, reduction="none")
    for place, loss in zip(places, found.tolist()):
        losses[place] = loss
print(json.dumps({{"losses": losses}}))
"""


@pytest.fixture
def school(tmp_path: Path) -> tuple[Exam, dict[str, Model]]:
    """The base, its seven fine-tunes, published, and rows of all tasks."""
    base, exam = digits.begin(1)
    digits.save_model(base, tmp_path / "base")
    digits.save_exam(exam, tmp_path / "exam.safetensors")
    (tmp_path / "fine-tunes").mkdir()
    tuned = {}
    for task in digits.TASKS:
        tuned[task] = digits.fine_tune(base, exam, task, seed=1)
        digits.save_model(tuned[task], tmp_path / "fine-tunes" / task)
    rows = [{"task": task, "image": int(i)} for i in exam.test[:ROWS] for task in digits.TASKS]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "measure.py").write_text(MEASURE)
    return exam, tuned


def tune(root: Path, **keys: Any) -> dict[str, Any]:
    """Have it tuned by the program above."""
    argv = [
        sys.executable, str(root / "measure.py"), "{model}", "{data}", str(root / "exam.safetensors")
    ]  # fmt: skip
    return {"tune": {"data": root / "rows.jsonl", "measure": "command", "argv": argv, **keys}}


def losses_of(merge: FoldingMerge, exam: Exam) -> dict[str, float]:
    """Log-loss of what is served, by task, on the images that examine."""
    model, images = digits.load_model(merge.head.model), exam.test[ROWS:]
    with torch.no_grad():
        return {
            task: float(cross_entropy(digits._cosines(model, exam, task, images), exam.answers(task)[images]))
            for task in digits.TASKS
        }


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("method", ["average", "spectral_cap"])
def test_a_tuned_scale_is_better_on_images_that_it_never_saw(
    method: str, school: tuple[Exam, dict[str, Model]], tmp_path: Path
) -> None:
    """Chosen on one half, judged on the other, and better, or as good, on the images of the examination."""
    exam, _ = school
    found = {}
    for store, keys in (("plain", {}), ("tuned", tune(tmp_path, kind="scale", span=4.0))):
        with opened(tmp_path, store, method=method, batch=7, **keys) as merge:
            work_off(merge)
            losses = losses_of(merge, exam)
            found[store] = sum(losses.values()) / len(losses)
            account = merge.head.manifest.get("tuning", {})
            print(method, store, found[store], account)  # noqa: T201 -- shown with -s
    assert found["tuned"] <= found["plain"] + 0.005
    assert found["tuned"] < found["plain"] or not account["accepted"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_preference_moves_what_is_served(school: tuple[Exam, dict[str, Model]], tmp_path: Path) -> None:
    """With the new task preferred its loss is lower than with the old ones preferred, and vice versa."""
    exam, _ = school
    last = list(digits.TASKS)[-1]
    late = tmp_path / "fine-tunes" / last
    late.rename(tmp_path / "late")
    found = {}
    for prefer in (0.0, 1.0):
        keys = tune(tmp_path, kind="pareto", prefer=prefer, evaluations=8)
        with opened(tmp_path, f"store-{prefer}", method="average", batch=7, **keys) as merge:
            work_off(merge)
            (tmp_path / "late").rename(late)
            work_off(merge)
            late.rename(tmp_path / "late")
            losses = losses_of(merge, exam)
            old = [loss for task, loss in losses.items() if task != last]
            found[prefer] = sum(old) / len(old), losses[last]
            print(prefer, found[prefer], merge.head.manifest["tuning"])  # noqa: T201 -- shown with -s
    assert found[1.0][0] < found[0.0][0]
    assert found[0.0][1] < found[1.0][1]
