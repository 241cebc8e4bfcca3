"""What does one OPCM step on one weight cost, next to the published recipe and to one matrix product?

The running sum is that of five made-up task vectors, each a rank-48 power-law part, half of it shared with
the others, and Gaussian noise of 0.7 of its length; a sixth arrives. The reference is the recipe as its
authors' code has it: a full SVD of the sum, everything in full bases.

    python benchmarks/hotpath.py             four shapes, about three minutes on two cores
    python benchmarks/hotpath.py --all       4096 x 4096 too, one round: minutes more
    python benchmarks/hotpath.py --lm-head   only the memory that a [32768, 4096] weight needs
    python benchmarks/hotpath.py --quick
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from common import (
    GIB,
    MIB,
    child,
    finish,
    interleaved,
    notes,
    options,
    progress,
    reset_peak,
    say,
    status_mib,
    table,
)

from streammerge import linalg
from streammerge.engine import Engine
from streammerge.methods import Arrival, opcm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from streammerge.linalg import Delta

ALPHA = 0.5
TASKS = 5
RANK = 48
SHARED = 0.5  # of a task's power-law part, by length
BULK = 0.7  # length of the noise over that of the power-law part
ADAPTER_RANK = 16
SHAPES = ((768, 768), (3072, 768), (2048, 2048), (2048, 5632))
LARGEST = (4096, 4096)
QUICK_SHAPES = ((96, 96), (128, 48))
ROUNDS, ROUNDS_OF_LARGE = 5, 3
LARGE = 2048 * 2048  # elements from which on fewer rounds are run
EXAMINED = 2048 * 2048  # elements up to which errors are measured
LM_HEAD, QUICK_LM_HEAD = (32768, 4096), (8192, 256)

REFERENCE, GEMM = "reference", "one matrix product m x m x n"


# ------------------------------------------------------------------------------------------------ the numbers


def task_vectors(shape: tuple[int, int], count: int, seed: int) -> list[Tensor]:
    """Task vectors as fine-tunes have them: a few strong directions, partly common to all, and a bulk.

    [rows, columns] float32 each, of length 1 without the bulk.
    """
    chance = torch.Generator().manual_seed(seed)
    common = _power_law(shape, chance)
    found = []
    for _ in range(count):
        strong = SHARED * common + (1 - SHARED**2) ** 0.5 * _power_law(shape, chance)
        bulk = torch.randn(shape, generator=chance)
        found.append(strong / strong.norm() + bulk * (BULK / bulk.norm()))
    return found


def _power_law(shape: tuple[int, int], chance: torch.Generator) -> Tensor:
    """A matrix of length 1 whose i-th singular value is about 1 / i, up to RANK."""
    rank = min(RANK, *shape)
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=chance)).Q
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=chance)).Q
    values = 1.0 / torch.arange(1, rank + 1)
    return (left * (values / values.norm())) @ right.T


def adapter(shape: tuple[int, int], seed: int) -> linalg.LowRank:
    """A delta of rank 16, as factors, of length about 1."""
    chance = torch.Generator().manual_seed(seed)
    rank = min(ADAPTER_RANK, *shape)
    left = torch.randn(shape[0], rank, generator=chance) / shape[0] ** 0.5
    return linalg.LowRank(left, torch.randn(rank, shape[1], generator=chance) / (rank * shape[1]) ** 0.5)


# -------------------------------------------------------------------------------------- reference, definition


def reference(running: Tensor, delta: Tensor, driver: str | None = None) -> Tensor:
    """The published recipe's step in the inputs' precision, as its authors compute it.

    Full bases U [m, m] and V [n, n] of the sum; U^T X V without its leading r x r block and its diagonal,
    brought back by the same bases. r counts the leading singular values whose cumulative share is at most
    alpha. `driver` is what LAPACK's place is taken by on a GPU.
    """
    u, s, vh = torch.linalg.svd(running, full_matrices=True, driver=driver)
    r = int((s.cumsum(0) / s.sum() > ALPHA).int().argmax())
    seen = u.T @ delta @ vh.T
    seen.diagonal().zero_()
    seen[:r, :r] = 0.0
    return running + u @ seen @ vh


def defined(running: Tensor, delta: Tensor, tail: str) -> Tensor:
    """What the product's step is defined to be, by a thin SVD in float64; see streammerge.methods.opcm."""
    u, s, vh = torch.linalg.svd(running.double(), full_matrices=False)
    q = int((s > max(running.shape) * linalg.FLOAT32_EPSILON * s[0]).sum())
    u, s, vh = u[:, :q], s[:q], vh[:q]
    r = linalg.split_rank(s, ALPHA)
    new = delta.double() - u[:, :r] @ (u[:, :r].T @ delta.double() @ vh[:r].T) @ vh[:r]
    if tail == "diagonal":
        along = ((u[:, r:].T @ delta.double()) * vh[r:]).sum(1)
        return running.double() + new - (u[:, r:] * along) @ vh[r:]
    rest = (u[:, r:] * s[r:]) @ vh[r:]
    return running.double() + new - rest * ((new * rest).sum() / rest.square().sum())


def step(running: Tensor, delta: Delta, tail: str, prepared: dict[str, Tensor] | None = None) -> Tensor:
    """The product's step; with what it derived from the sum before, or from nothing but the sum."""
    slots = prepared if prepared is not None else prepare(running, tail)
    arrival = Arrival("weight", "projected", delta, "")
    return opcm.fold(slots, arrival, alpha=ALPHA, tail=tail)["sum"]  # type: ignore[arg-type]


def prepare(running: Tensor, tail: str) -> dict[str, Tensor]:
    """What the product derives from the running sum alone."""
    return opcm.prepare({"sum": running}, alpha=ALPHA, tail=tail)  # type: ignore[arg-type]


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def cosine(new: Tensor, running: Tensor) -> float:
    """|<P, D>| / (||P|| ||D||) of the step P that was added to the sum D."""
    along, added = running.double(), new.double() - running.double()
    return float((added * along).sum().abs() / (added.norm() * along.norm()))


# ------------------------------------------------------------------------------------------------ measurement


def measure(shape: tuple[int, int], rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Time every row on one shape; errors too where a float64 SVD is quick."""
    *tasks, arriving = (task.to(device) for task in task_vectors(shape, TASKS + 1, seed=shape[0] + shape[1]))
    running = sum_of(tasks)
    del tasks
    factors = adapter(shape, seed=1)
    factors = linalg.LowRank(factors.left.to(device), factors.right.to(device))
    runs = rows(running, arriving, factors)
    settle = torch.cuda.synchronize if device != "cpu" else lambda: None
    is_short = shape[0] * shape[1] < LARGE or device != "cpu"  # there the first call counts
    seconds = interleaved(runs, rounds, settle, warm=is_short)
    steps: dict[str, dict[str, float]] = {}
    if shape[0] * shape[1] <= EXAMINED and device == "cpu":
        steps = examine(running, arriving, factors)
    found = [
        {
            "row": name,
            "seconds": taken,
            "reference_over_this": seconds[REFERENCE] / taken,
            "matrix_products": taken / seconds[GEMM],
            **steps.get(name, {}),
        }
        for name, taken in seconds.items()
    ]
    r = linalg.split_rank(prepare(running, "scalar")["values"], ALPHA)
    return {"shape": list(shape), "rounds": rounds, "device": device, "r": r, "rows": found}


def sum_of(tasks: list[Tensor]) -> Tensor:
    """Add up in place."""
    total = tasks[0].clone()
    for task in tasks[1:]:
        total += task
    return total


def rows(running: Tensor, arriving: Tensor, factors: linalg.LowRank) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by its name in the table."""
    diagonal, scalar = (prepare(running, tail) for tail in ("diagonal", "scalar"))
    wide, out = linalg.lying(arriving), torch.empty_like(running)
    square = linalg.lying(running) @ linalg.lying(running).T
    driver = "gesvd" if running.device.type == "cuda" else None
    return {
        REFERENCE: partial(reference, running, arriving, driver),
        "diagonal, cold": partial(step, running, arriving, "diagonal"),
        "diagonal, basis prepared": partial(step, running, arriving, "diagonal", diagonal),
        "scalar, cold": partial(step, running, arriving, "scalar"),
        "scalar, basis prepared": partial(step, running, arriving, "scalar", scalar),
        "scalar, basis prepared, adapter of rank 16": partial(step, running, factors, "scalar", scalar),
        GEMM: lambda: square @ wide,
        "sum + 0.5 delta": lambda: torch.add(running, arriving, alpha=0.5, out=out),
        "copy": lambda: out.copy_(running),
    }


def examine(running: Tensor, arriving: Tensor, factors: linalg.LowRank) -> dict[str, dict[str, float]]:
    """Compare one step of each kind with float64: with its own definition, and with the reference."""
    exact = reference(running.double(), arriving.double())
    own = {tail: defined(running, arriving, tail) for tail in ("diagonal", "scalar")}
    thin = defined(running, linalg.dense(factors), "scalar")
    first = reference(running, arriving)
    found = {
        REFERENCE: {
            "error": distance(first, exact),
            "from_reference": distance(first, exact),
            "cosine": cosine(first, running),
        }
    }
    for tail, definition in own.items():
        new = step(running, arriving, tail)
        figures = {
            "error": distance(new, definition),
            "from_reference": distance(new, exact),
            "cosine": cosine(new, running),
        }
        found |= {f"{tail}, cold": figures, f"{tail}, basis prepared": figures}
    new = step(running, factors, "scalar")
    found["scalar, basis prepared, adapter of rank 16"] = {
        "error": distance(new, thin),
        "cosine": cosine(new, running),
    }
    return found


def lm_head(shape: tuple[int, int]) -> dict[str, Any]:
    """In a process of its own: memory of one cold scalar step over its two inputs, in sizes of the weight."""
    Engine(device="cpu")  # sets how freed memory is given back
    chance = torch.Generator().manual_seed(0)
    running, arriving = (torch.randn(shape, generator=chance) for _ in range(2))
    reset_peak()
    before = status_mib("VmRSS")
    step(running, arriving, "scalar")
    weight = 4 * shape[0] * shape[1] / MIB
    peak = status_mib("VmHWM") - before
    return {"shape": list(shape), "weight_mib": weight, "over_inputs_mib": peak, "weights": peak / weight}


# ----------------------------------------------------------------------------------------------------- report


def text(found: dict[str, Any]) -> str:
    """The table of one shape."""
    shape, rounds = " x ".join(map(str, found["shape"])), found["rounds"]
    head = ("", "seconds", "reference / this", "matrix products", "error", "from reference", "cos(P, D)")
    keys = ("row", "seconds", "reference_over_this", "matrix_products", "error", "from_reference", "cosine")
    times = "one round" if rounds == 1 else f"medians of {rounds} interleaved rounds"
    title = f"{shape} on {found['device']}, split rank {found['r']}, {times}"
    return f"{title}\n\n{table(head, ([row.get(key) for key in keys] for row in found['rows']))}"


NOTES = notes(
    "Wall time with torch's number of threads. `cold` derives the basis from the sum, as the first arrival "
    "after a start must; `basis prepared` has it.",
    "`error` is one step's distance from a float64 evaluation of that row's own definition, over the length "
    "of the new sum; `from reference` that from the reference in float64. For `scalar` the latter is a "
    "choice and no error; for `diagonal` it is what the directions below float32's numerical rank make, "
    "which the product leaves alone. cos(P, D) is that of the angle between step and sum, at best 0.",
    "One matrix product is that of an [m, m] and an [m, n] matrix in float32, m the smaller side.",
)


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--all", action="store_true", help="4096 x 4096 too, one round")
    parser.add_argument("--lm-head", action="store_true", help="only the memory of a tall weight")
    parser.add_argument("--in-child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.lm_head:
        report_lm_head(asked)
    else:
        report(asked)


def report(asked: argparse.Namespace) -> None:
    """All shapes."""
    shapes = QUICK_SHAPES if asked.quick else (*SHAPES, LARGEST) if asked.all else SHAPES
    results = []
    for shape in shapes:
        progress(f"hotpath: {shape[0]} x {shape[1]}")
        rounds = ROUNDS if shape[0] * shape[1] < LARGE else ROUNDS_OF_LARGE
        results.append(measure(shape, 1 if shape == LARGEST else rounds))
        say(text(results[-1]), "")
    say(NOTES)
    finish("hotpath", {"alpha": ALPHA, "shapes": results})


def report_lm_head(asked: argparse.Namespace) -> None:
    """The memory of a weight as tall as a head."""
    shape = QUICK_LM_HEAD if asked.quick else LM_HEAD
    if asked.in_child:
        print(json.dumps(lm_head(shape)))
        return
    flags = ["--lm-head", "--in-child", *(["--quick"] if asked.quick else [])]
    found = child(__file__, *flags)
    head = ("weight", "MiB in float32", "peak MiB over sum and delta", "in weights")
    row = (" x ".join(map(str, shape)), found["weight_mib"], found["over_inputs_mib"], found["weights"])
    say(
        table(head, [row]),
        notes(
            "Peak resident set of one cold scalar step, the new sum included, over what was resident when "
            "the running sum and the delta were in memory. Heads are added whole unless a person has them "
            "projected; full bases of this one would take "
            f"{4 * shape[0] ** 2 / GIB:.1f} GiB.",
        ),
    )
    finish("hotpath-lm-head", found)


if __name__ == "__main__":
    main()
