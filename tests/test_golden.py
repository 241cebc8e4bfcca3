"""OPCM against golden vectors that the reference implementation computed in float64 (tests/golden/opcm)."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from streammerge import offline

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "opcm"
ADDED = ("tok.weight",)
ALLOWED = frozenset({"zero-delta", "duplicate"})
MODEL_TOLERANCE = 5e-5
LAMBDA_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Step:
    """The first `count` fine-tunes of a run, and the file that holds what they merge to."""

    case: str
    run: str
    alpha: float
    fine_tunes: tuple[str, ...]
    expected: str
    lambda_t: float

    def __str__(self) -> str:
        return f"{self.case}-{self.run}-{len(self.fine_tunes)}"


def manifest_of(case: str) -> dict[str, Any]:
    """Read what a case says of itself."""
    return dict(json.loads((GOLDEN / case / "manifest.json").read_bytes()))


def steps() -> list[Step]:
    """List every prefix of every run of every case; where the rank-aware result differs, that is expected."""
    found = []
    for case in json.loads((GOLDEN / "manifest.json").read_bytes())["cases"]:
        for run in manifest_of(case)["runs"]:
            for step in run["steps"]:
                right = step.get("rank_aware", step)
                names = tuple(f"{name}.safetensors" for name in run["order"][: step["t"]])
                found.append(Step(case, run["tag"], run["alpha"], names, right["merged"], right["lambda_t"]))
    return found


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """||got - expected|| / ||expected - base|| over all floating-point weights, as the manifest says."""
    floating = [name for name in base if base[name].is_floating_point()]
    error = sum(float((got[n].double() - expected[n].double()).square().sum()) for n in floating)
    length = sum(float((expected[n].double() - base[n].double()).square().sum()) for n in floating)
    return math.sqrt(error / length)


def check(step: Step, out: Path) -> None:
    """Compare OUT/model and OUT/manifest.json with the golden files."""
    base = load_file(GOLDEN / step.case / "base.safetensors")
    got = load_file(out / "model" / "base.safetensors")
    expected = load_file(GOLDEN / step.case / step.expected)
    totals = json.loads((out / "manifest.json").read_bytes())["totals"]
    assert set(got) == set(base)
    assert relative_error(got, expected, base) <= MODEL_TOLERANCE
    assert abs(totals["lambda"] / step.lambda_t - 1) <= LAMBDA_TOLERANCE
    assert totals["count"] == len(step.fine_tunes)
    for name in manifest_of(step.case)["passthrough"]:
        assert torch.equal(got[name], base[name])


@pytest.mark.parametrize("step", steps(), ids=str)
def test_every_prefix_of_every_run_equals_the_reference(step: Step, tmp_path: Path) -> None:
    """What `streammerge merge` writes is the reference's float64 result within 5e-5 of the merged delta."""
    request = offline.Request(
        base=GOLDEN / step.case / "base.safetensors",
        fine_tunes=tuple(GOLDEN / step.case / name for name in step.fine_tunes),
        out=tmp_path / "out",
        method="opcm",
        knobs={"alpha": step.alpha, "tail": "diagonal"},
        added=ADDED,
        allow=ALLOWED,
        dtype="float32",
        threads=1,
    )
    offline.merge(request, warn=lambda _: None, console=Console(quiet=True))
    check(step, tmp_path / "out")


def test_the_command_writes_the_same(tmp_path: Path) -> None:
    """`streammerge merge`, typed as a person would, gives the reference's result for the longest run."""
    step = next(s for s in steps() if str(s) == "a_mlp-expected-6")
    folder = GOLDEN / step.case
    command = [
        *(sys.executable, "-m", "streammerge", "merge", "--base", str(folder / "base.safetensors")),
        *("--method", "opcm", "--set", "tail=diagonal", "--set", f"alpha={step.alpha}"),
        *("--added", *ADDED, "--dtype", "float32"),
        *("--allow", "zero-delta", "--allow", "duplicate", "--out", str(tmp_path / "out")),
        *(str(folder / name) for name in step.fine_tunes),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    check(step, tmp_path / "out")


def test_the_golden_files_are_those_of_the_manifests() -> None:
    """No golden file was changed since it was computed: each has the hash that its manifest says."""
    for case in json.loads((GOLDEN / "manifest.json").read_bytes())["cases"]:
        manifest = manifest_of(case)
        listed = [manifest["base"], *manifest["finetunes"]]
        for run in manifest["runs"]:
            for step in run["steps"]:
                right = step.get("rank_aware", step)
                listed.append({"file": right["merged"], "sha256": right["sha256"]})
        for entry in listed:
            content = (GOLDEN / case / entry["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry["file"]
