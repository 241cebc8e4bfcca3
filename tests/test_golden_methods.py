"""Every method against golden vectors that public reference implementations computed (tests/golden).

The reference's float64 result is reached at every prefix that is there, and after taking one fine-tune out
again, through the engine that the daemon uses and in float32 files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from benches import bench_of, merge
from safetensors.torch import load_file
from test_golden import relative_error

from streammerge import linalg, methods
from streammerge.config.finalize import Lines
from streammerge.finalize import Finalize
from streammerge.methods import dare

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival

GOLDEN = Path(__file__).parent / "golden" / "methods"
MERGEKIT = Path(__file__).parent / "golden" / "mergekit"
CASES = json.loads((GOLDEN / "manifest.json").read_bytes())["cases"]
EVERY_MATRIX = ("none",)  # the references take embedding and head for matrices like all others


@dataclass(frozen=True)
class Setting:
    """How a case is asked of us."""

    method: str
    knobs: dict[str, Any] = field(default_factory=dict)
    lines: Lines | None = None


SETTINGS = {
    "average": Setting("average"),
    "task_arithmetic": Setting("task_arithmetic", {"scale": 0.3}),
    "ties_sum": Setting("ties", {"density": 0.2, "agg": "sum", "scale": 0.3}),
    "ties_mean": Setting("ties", {"density": 0.2, "agg": "mean", "scale": 1.0}),
    "ties_max": Setting("ties", {"density": 0.2, "agg": "max", "scale": 1.0}),
    "magmax": Setting("magmax", {"scale": 0.5}),
    "dare_linear": Setting("dare", {"p": 0.5, "agg": "sum", "scale": 0.3}),
    "breadcrumbs_rows": Setting("breadcrumbs", {"axis": "row", "keep": 0.2, "drop_top": 0.1, "scale": 0.4}),
    "breadcrumbs_tensor": Setting(
        "breadcrumbs", {"axis": "tensor", "keep": 0.4, "drop_top": 0.02, "scale": 0.4}
    ),
    "consensus_ta": Setting("consensus_ta", {"mask_lambda": 0.4, "k": 2, "scale": 0.3}),
    "pcb": Setting("pcb", {"ratio": 0.1, "lam": 1.0, "scale": 1.0}),
    "lines_ta_auto": Setting("task_arithmetic", {"scale": 1.0}, Lines(alpha="auto", beta=0.6)),
    "lines_ta_explicit": Setting("task_arithmetic", {"scale": 1.0}, Lines(alpha=0.1, beta=0.5)),
    "lines_ties_auto": Setting(  # ties keeps no plain sum: the reference's own alpha is given
        "ties", {"density": 0.2, "agg": "sum", "scale": 1.0}, Lines(alpha=0.2632446717619297, beta=0.6)
    ),
    "fisher": Setting("fisher", {"minimal": 1e-6, "normalize": True}),
    "regmean": Setting("regmean", {"a": 0.95}),
    "iso_c": Setting("iso_c", {"scale": 1.0}),
    "iso_c_1.5": Setting("iso_c", {"scale": 1.5}),
    "iso_c_adapter": Setting("iso_c", {"scale": 1.0}),
    "iso_cts": Setting("iso_cts", {"common_space_fraction": 0.8, "scale": 1.0}),
    "tsvm": Setting("tsvm", {"scale": 1.0}),
    "tsvm_adapter": Setting("tsvm", {"scale": 1.0}),
    "wudi_closed": Setting("wudi", {"ridge": 1e-6}),
    "wudi_closed_adapter": Setting("wudi", {"ridge": 1e-6}),
    "wudi_closed_ridge_0.01": Setting("wudi", {"ridge": 1e-2}),
}


@dataclass(frozen=True)
class Expected:
    """One golden file: which fine-tunes of a case merge to it."""

    case: str
    file: str

    def __str__(self) -> str:
        return Path(self.file).stem

    @property
    def models(self) -> list[str]:
        """Names of the fine-tunes, in order."""
        kind = Path(self.file).stem.removeprefix(self.case).removeprefix(".")
        names: list[str] = CASES[self.case]["models"]
        if kind.startswith("prefix_"):
            return names[: int(kind.removeprefix("prefix_"))]
        return [name for name in names if not (kind == "without_3" and name == "ft_3")]

    @property
    def tolerance(self) -> float:
        """||got - expected|| / ||expected - base||, from the manifest."""
        tolerance = CASES[self.case]["tolerance"]
        return float(tolerance.get("relative", tolerance.get("relative_float64_statistics")))


EXPECTED = [Expected(case, file) for case in SETTINGS for file in CASES[case]["expected"]]


def publish(root: Path, name: str) -> Path:
    """Lay a golden fine-tune out as a folder, with what came beside it."""
    folder = root / name
    if (GOLDEN / "models" / name).is_dir():
        shutil.copytree(GOLDEN / "models" / name, folder)
        return folder
    folder.mkdir()
    shutil.copyfile(GOLDEN / "models" / f"{name}.safetensors", folder / "model.safetensors")
    for sidecar in ("fisher", "gram"):
        path = GOLDEN / "sidecars" / f"{sidecar}_{name.removeprefix('ft_')}.safetensors"
        shutil.copyfile(path, folder / f"{sidecar}.safetensors")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Have DARE take the masks that the reference was given, for the fine-tunes in the order of folding."""
    masks: list[dict[str, Tensor]] = []
    seen: list[str] = []

    def kept(arrival: Arrival, p: float) -> Tensor:
        del p
        if arrival.digest not in seen:
            seen.append(arrival.digest)
        mask = masks[seen.index(arrival.digest)][arrival.name].reshape(-1)
        size = linalg.dense(arrival.delta).numel()
        return mask[arrival.start : arrival.start + size].reshape(arrival.delta.shape)

    monkeypatch.setattr(dare, "kept", kept)
    return masks


@pytest.mark.parametrize("expected", EXPECTED, ids=str)
def test_every_golden_case_is_reached(
    expected: Expected, tmp_path: Path, drawn: list[dict[str, Tensor]]
) -> None:
    """What `streammerge merge` writes is the reference's result within the manifest's tolerance."""
    setting = SETTINGS[expected.case]
    drawn += [load_file(path) for name in expected.models if (path := mask_of(name)).exists()]
    merge(
        tmp_path / "out",
        GOLDEN / "models" / "base.safetensors",
        [publish(tmp_path, name) for name in expected.models],
        method=setting.method,
        knobs=setting.knobs,
        added=EVERY_MATRIX,
        finalize=Finalize(lines=setting.lines),
    )
    assert error_of(tmp_path / "out" / "model" / "base.safetensors", expected) <= expected.tolerance


def mask_of(name: str) -> Path:
    """Where the mask lies that DARE was given for a fine-tune."""
    return GOLDEN / "inputs" / f"dare_mask_{name.removeprefix('ft_')}.safetensors"


def error_of(got: Path, expected: Expected) -> float:
    """Compare a merged file with a golden one."""
    base = load_file(GOLDEN / "models" / "base.safetensors")
    return relative_error(load_file(got), load_file(GOLDEN / expected.file), base)


REMOVED = [e for e in EXPECTED if "without_3" in e.file]


@pytest.mark.parametrize("expected", REMOVED, ids=str)
def test_taking_one_out_again_gives_what_the_others_merge_to(
    expected: Expected, tmp_path: Path, drawn: list[dict[str, Tensor]]
) -> None:
    """Five folded and the third unfolded is the reference's batch result of the other four."""
    setting = SETTINGS[expected.case]
    names = CASES[expected.case]["models"]
    drawn += [load_file(mask_of(name)) for name in names]
    run = bench_of(
        tmp_path / "run",
        GOLDEN / "models" / "base.safetensors",
        method=setting.method,
        knobs=setting.knobs,
        added=EVERY_MATRIX,
    )
    assert methods.can_unfold(run.recipe.method, run.recipe.knobs)
    paths = [publish(tmp_path, name) for name in names]
    for path in paths:
        run.fold(path, digest=path.name)
    run.unfold(paths[2], 2, digest="ft_3")
    assert error_of(run.render() / "base.safetensors", expected) <= 2 * expected.tolerance


MERGEKIT_CASES = {
    "linear": ("average", {}, (1.0, 2.0, 0.5)),
    "task_arithmetic": ("task_arithmetic", {"scale": 0.7}, (0.6, 0.3, -0.2)),
    "breadcrumbs": (
        "breadcrumbs",
        {"axis": "tensor", "keep": 0.9, "drop_top": 0.01, "scale": 1.0},
        (0.5, 0.4, 0.3),
    ),
}


@pytest.mark.parametrize("case", MERGEKIT_CASES)
def test_the_same_recipe_gives_what_mergekit_gives(case: str, tmp_path: Path) -> None:
    """Same weights and settings: every element within 2e-6 of mergekit 0.1.5's result."""
    method, knobs, factors = MERGEKIT_CASES[case]
    merge(
        tmp_path / "out",
        MERGEKIT / "models" / "base.safetensors",
        [MERGEKIT / "models" / f"ft{number}.safetensors" for number in (1, 2, 3)],
        method=method,
        knobs=knobs,
        weights=factors,
        dtype="float32",
    )
    got = load_file(tmp_path / "out" / "model" / "base.safetensors")
    expected = load_file(MERGEKIT / "expected" / f"{case}.safetensors")
    assert set(got) == set(expected)
    assert max(float((got[n] - values).abs().max()) for n, values in expected.items()) <= 2e-6


def test_the_same_recipe_in_bf16_differs_by_mergekits_rounding(tmp_path: Path) -> None:
    """mergekit computes in bf16, we in float32 and round once: two steps of bf16 apart at most."""
    merge(
        tmp_path / "out",
        MERGEKIT / "models" / "base.safetensors",
        [MERGEKIT / "models" / f"ft{number}.safetensors" for number in (1, 2, 3)],
        method="task_arithmetic",
        knobs={"scale": 1.0},
        weights=(0.4,),
        dtype="bfloat16",
    )
    got = load_file(tmp_path / "out" / "model" / "base.safetensors")
    expected = load_file(MERGEKIT / "expected" / "task_arithmetic_bf16.safetensors")
    base = load_file(MERGEKIT / "models" / "base.safetensors")
    for name, values in expected.items():
        step = 2.0**-7 * base[name].abs().clamp(min=2.0**-7)
        assert bool(((got[name].float() - values.float()).abs() <= 2 * step).all()), name


def test_the_golden_files_are_those_of_the_manifests() -> None:
    """No golden file was changed since it was computed: each has the hash that its manifest says."""
    for case in CASES.values():
        for file, facts in case["expected"].items():
            assert hashlib.sha256((GOLDEN / file).read_bytes()).hexdigest() == facts["sha256"], file
    for facts in json.loads((MERGEKIT / "manifest.json").read_bytes())["cases"].values():
        assert hashlib.sha256((MERGEKIT / facts["file"]).read_bytes()).hexdigest() == facts["sha256"]


def test_every_case_is_asked() -> None:
    """No case of the golden manifest is left out, and every method but ours and OPCM has one."""
    assert set(SETTINGS) == set(CASES)
    assert {setting.method for setting in SETTINGS.values()} == set(methods.NAMES) - {"opcm", "spectral_cap"}
