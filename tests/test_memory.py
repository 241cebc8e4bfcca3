"""The memory of a fold: bounded by the largest projected weight, not by the model or the number of folds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import streammerge

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
BOUND_MIB = 160
BOUND_WEIGHTS = 8
GROWTH = 1.05
ROWS, COLUMNS = 128, 8192

# Prints the peak resident set in MiB: with torch and safetensors imported, then after every fold and render.
# Not ru_maxrss: across fork and exec that begins with what the test's own process takes.
FOLDS = textwrap.dedent(
    """
    import json, pathlib, shutil, sys

    from streammerge import allocator

    allocator.begin()  # as every command does
    import safetensors.torch, torch

    def peak():
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    peaks = [peak()]
    root, folds = pathlib.Path(sys.argv[1]), int(sys.argv[2])

    from dataclasses import replace
    from streammerge import finalize, headers, methods, plan, screen, weights
    from streammerge.arriving import Incoming
    from streammerge.engine import Engine
    from streammerge.fit import Tolerance
    from streammerge.state import State

    engine = Engine(device="cpu", threads=1, residency="disk")
    found, _ = engine.open_base(root / "base", plan.DEFAULT_ADDED)
    recipe = replace(found, method="opcm", knobs=methods.resolve("opcm", {}))
    with weights.Weights(headers.find(root / "base")) as base:
        entries = base.entries
    state = State(root / "state-0", {}, methods.Totals())
    for number in range(1, folds + 1):
        for name in (f"state-{number}", "model"):
            shutil.rmtree(root / name, ignore_errors=True)
            (root / name).mkdir()
        path = root / f"ft{number % 2}"
        with screen.examine(path, entries, recipe, Tolerance()) as finetune:
            state, *_ = engine.fold(recipe, Incoming(finetune), state, root / f"state-{number}")
            finetune.finish()
        engine.render(recipe, state, finalize.Finalize(), root / "model")
        shutil.rmtree(root / f"state-{number - 1}", ignore_errors=True)
        peaks.append(peak())
    print(json.dumps(peaks))
    """
)


def make_models(root: Path, matrices: int, vocabulary: int) -> None:
    """Save a bf16 base and two fine-tunes: an embedding of `vocabulary` rows, and matrices of 2 MiB each."""
    for seed, name in enumerate(("base", "ft0", "ft1")):
        random = torch.Generator().manual_seed(0)
        noise = torch.Generator().manual_seed(seed)
        shapes = {"model.embed_tokens.weight": (vocabulary, 1024)}
        shapes |= {f"model.layers.{i}.weight": (ROWS, COLUMNS) for i in range(matrices)}
        tensors = {}
        for weight, shape in shapes.items():
            values = torch.randn(shape, generator=random).mul_(0.02)
            if seed:
                values += torch.randn(shape, generator=noise).mul_(0.001)
            tensors[weight] = values.bfloat16()
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")


def make_adapters(root: Path, matrices: int, vocabulary: int) -> None:
    """Put adapters of rank 16, of all matrices and the embedding, in the place of the fine-tunes."""
    lora = "base_model.model.model."
    for name in ("ft0", "ft1"):
        random = torch.Generator().manual_seed(int(name[-1]))
        shapes = {
            f"{lora}embed_tokens.lora_embedding_A": (16, vocabulary),
            f"{lora}embed_tokens.lora_embedding_B": (1024, 16),
        }
        for i in range(matrices):
            shapes[f"{lora}layers.{i}.lora_A.weight"] = (16, COLUMNS)
            shapes[f"{lora}layers.{i}.lora_B.weight"] = (ROWS, 16)
        tensors = {key: torch.randn(shape, generator=random).mul_(0.01) for key, shape in shapes.items()}
        shutil.rmtree(root / name)
        (root / name).mkdir()
        save_file(tensors, root / name / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
        (root / name / "adapter_config.json").write_text(json.dumps(settings))


def peaks(root: Path, folds: int) -> list[float]:
    """Fold in a process of its own; peak MiB when idle and after every fold."""
    ended = subprocess.run(
        [sys.executable, "-c", FOLDS, str(root), str(folds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=Path(streammerge.__file__).parents[1],
    )
    assert ended.returncode == 0, ended.stderr
    return list(json.loads(ended.stdout))


def bound() -> float:
    """What a fold may take above idle, in MiB."""
    return BOUND_MIB + BOUND_WEIGHTS * ROWS * COLUMNS * 4 / MIB


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(None, id="full weights"),
        pytest.param(make_adapters, id="adapters", marks=pytest.mark.slow),
    ],
)
def test_a_fold_takes_what_its_largest_weight_takes(
    make: Callable[[Path, int, int], None] | None, tmp_path: Path
) -> None:
    """Folding into a model of 64 MiB takes 160 MiB + 8 x the largest projected weight at most.

    No file is made but the state's and the model's: no full-size copy of an adapter.
    """
    make_models(tmp_path, matrices=24, vocabulary=8192)
    if make:
        make(tmp_path, 24, 8192)
    before = {path.name for path in tmp_path.iterdir()}
    found = peaks(tmp_path, 6)
    assert found[6] - found[0] <= bound(), found
    assert found[6] <= found[2] * GROWTH, found
    assert {path.name for path in tmp_path.iterdir()} - before == {"model", "state-6"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_twelfth_fold_takes_what_the_second_took(tmp_path: Path) -> None:
    """In one process that folds twelve times the peak does not grow after the second, within 5 %."""
    make_models(tmp_path, matrices=24, vocabulary=8192)
    found = peaks(tmp_path, 12)
    assert found[12] - found[0] <= bound(), found
    assert found[12] <= found[2] * GROWTH, found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_large_embedding_streams_through(tmp_path: Path) -> None:
    """An embedding of 200 MiB in a model with the same matrices does not raise the bound."""
    make_models(tmp_path, matrices=4, vocabulary=102_400)
    found = peaks(tmp_path, 2)
    assert found[2] - found[0] <= bound(), found
