"""Run by arrivals.py in the peer's own environment: merges models by mergekit, one after another.

Answers every line of standard input, which names a configuration and a folder, with a line that has the
seconds. Knows nothing of the benchmark or of streammerge.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
from mergekit.merge import run_merge  # type: ignore[import-not-found]
from mergekit.options import MergeOptions  # type: ignore[import-not-found]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        settings = json.loads(Path(asked["config"]).read_text(encoding="utf-8"))
        run_merge(MergeConfiguration.model_validate(settings), asked["out"], options)
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)


if __name__ == "__main__":
    main()
