"""The demo's exam as a gate: `python -m streammerge.demo EXAM SNAPSHOT` prints accuracies as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from streammerge.demo import digits


def main(exam: str, snapshot: str) -> None:
    """Examine the model of `snapshot`."""
    accuracy = digits.examine(digits.load_model(Path(snapshot) / "model"), digits.load_exam(Path(exam)))
    sys.stdout.write(json.dumps({"mean": digits.mean_of_tasks(accuracy), **accuracy}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
