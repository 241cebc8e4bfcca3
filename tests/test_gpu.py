"""The engine on a CUDA device: what the CPU gives, by every place that the state may lie in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import models
import pytest
import torch
from benches import bench, fine_tunes

from streammerge import methods
from streammerge.lanes import Lane, homeward

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", [name for name in methods.NAMES if not methods.rereads(name)])
@pytest.mark.parametrize("residency", ["device", "host", "disk"])
def test_a_gpu_serves_nearly_the_same(method: str, residency: str, tmp_path: Path) -> None:
    """Three fine-tunes folded and rendered on the GPU give nearly what the CPU gives; every time the same."""
    base = models.make_base(tmp_path / "base", dtype=torch.float32, shards=2)
    paths = fine_tunes(tmp_path, base)
    found = []
    for name, device in (("cpu", "cpu"), ("one", "cuda"), ("two", "cuda")):
        run = bench(tmp_path / name, tmp_path / "base", method=method, device=device, residency=residency)
        for path in paths:
            run.fold(path)
        found.append((models.load(run.render()), run.state.hashes))
    (on_cpu, _), (on_gpu, hashes), (_, again) = found
    assert hashes == again
    for weight, values in on_cpu.items():
        assert torch.allclose(on_gpu[weight].double(), values.double(), rtol=1e-3, atol=1e-5), weight


def test_values_survive_the_way_there_and_back() -> None:
    """What a lane brings can be computed with at once; what goes home has all that was computed before."""
    lane = Lane(torch.device("cuda"))
    for number in range(50):
        values = torch.full((1 << 20,), float(number))
        there = lane(values)
        assert there.is_cuda
        doubled = there * 2 + 1
        assert torch.equal(homeward(doubled)(), values * 2 + 1)
