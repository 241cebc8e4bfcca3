"""Which branches of the parsers do hostile and good files reach? Their tests, run under coverage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from faults import Findings

REPOSITORY = Path(__file__).resolve().parents[2]
PARSERS = ("headers", "weights", "lora", "adapters", "sidecar", "hubfacts", "quantities")
FEEDERS = ("tests/hostile", "tests/test_weights.py", "tests/test_sidecar.py", "tests/test_adapters.py")


def measured(work: Path) -> Findings:
    """Run the tests and count; what no test reached is named."""
    findings = Findings("Which branches of the parsers do hostile and good files reach?")
    report = work / "coverage.json"
    coverage = [sys.executable, "-m", "coverage"]
    stored = f"--data-file={work / 'coverage'}"
    included = "--include=" + ",".join(f"streammerge/{name}.py" for name in PARSERS)
    plain = ["-p", "no:randomly", "-p", "no:cacheprovider", f"--basetemp={work / 'tmp'}"]
    ran = subprocess.run(
        [*coverage, "run", "--branch", stored, included, "-m", "pytest", "-q", *plain, *FEEDERS],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        findings.differences.append(f"the tests do not pass: {ran.stdout.strip().splitlines()[-1]}")
    subprocess.run([*coverage, "json", stored, "-o", report], cwd=REPOSITORY, capture_output=True, check=True)
    for file, facts in sorted(json.loads(report.read_bytes())["files"].items()):
        count, reached = facts["summary"]["num_branches"], facts["summary"]["covered_branches"]
        findings.figures.append((f"branches of {Path(file).name} reached", f"{reached} of {count}"))
        for start, stop in facts["missing_branches"]:
            where = f"line {stop}" if stop > 0 else "the end"
            findings.notes.append(f"not reached in {Path(file).name}: from line {start} to {where}")
    return findings
