"""Does the sum stay what it is defined to be over twenty merges, and does a first small error stay small?

Twenty made-up fine-tunes of one weight are folded one after the other: by the product in float32, by its own
definition in float64, and by the published recipe in float64 and in float32. Then all again with a first
fine-tune that differs by 1e-7 of its length, which is what float32 rounds away, and by a hundred times that.

    python benchmarks/chain.py           320 x 448 and 768 x 768, about three minutes on two cores
    python benchmarks/chain.py --quick
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from common import finish, notes, options, progress, say, table
from hotpath import defined, distance, reference, step, task_vectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    Step = Callable[[Tensor, Tensor], Tensor]

SHAPES, QUICK_SHAPES = ((320, 448), (768, 768)), ((48, 64),)
MERGES = 20
SHOWN = (2, 5, 10, 20)
PERTURBATIONS = (1e-7, 1e-5)
SINGLE, DOUBLE = torch.float32, torch.float64

# Name, step, precision of the sum, what it is compared with as its own definition.
CHAINS: tuple[tuple[str, Step, torch.dtype, str], ...] = (
    ("reference, float64", reference, DOUBLE, ""),
    ("reference, float32", reference, SINGLE, "reference, float64"),
    ("diagonal, its definition in float64", partial(defined, tail="diagonal"), DOUBLE, ""),
    ("diagonal, the product", partial(step, tail="diagonal"), SINGLE, "diagonal, its definition in float64"),
    ("scalar, its definition in float64", partial(defined, tail="scalar"), DOUBLE, ""),
    ("scalar, the product", partial(step, tail="scalar"), SINGLE, "scalar, its definition in float64"),
)
REFERENCE = CHAINS[0][0]


def sums(deltas: list[Tensor], merge: Step, dtype: torch.dtype) -> Iterator[Tensor]:
    """The running sum after each merge; the first delta is taken over as it is."""
    running = deltas[0].to(dtype)
    yield running
    for delta in deltas[1:]:
        running = merge(running, delta.to(dtype))
        yield running


def perturbed(deltas: list[Tensor], by: float) -> list[Tensor]:
    """The same with a first one that differs by this share of its length, in float64."""
    first = deltas[0].double()
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return [first + noise * (by * first.norm() / noise.norm()), *deltas[1:]]


def measure(shape: tuple[int, int]) -> dict[str, Any]:
    """Every chain on one shape: distances after the merges shown, and the growth of a perturbation."""
    deltas = task_vectors(shape, MERGES, seed=sum(shape))
    found: dict[str, dict[int, Tensor]] = {}
    rows = []
    for name, merge, dtype, own in CHAINS:
        progress(f"chain: {shape[0]} x {shape[1]}, {name}")
        reached = dict(enumerate(sums(deltas, merge, dtype), start=1))
        found[name] = {merges: reached[merges] for merges in SHOWN}
        disturbed = {by: [*sums(perturbed(deltas, by), merge, dtype)][-1] for by in PERTURBATIONS}
        rows.append(
            {
                "chain": name,
                "from_definition": distances(found[name], found[own]) if own else None,
                "from_reference": distances(found[name], found[REFERENCE]) if name != REFERENCE else None,
                "growth": {f"{by:g}": distance(last, reached[MERGES]) / by for by, last in disturbed.items()},
            }
        )
    return {"shape": list(shape), "merges": MERGES, "rows": rows}


def distances(found: dict[int, Tensor], expected: dict[int, Tensor]) -> dict[str, float]:
    """After each of the merges shown."""
    return {str(merges): distance(found[merges], expected[merges]) for merges in SHOWN}


def text(found: dict[str, Any]) -> str:
    """Two tables of one shape."""
    shape = " x ".join(map(str, found["shape"]))
    after = [f"after {merges}" for merges in SHOWN]
    parts = []
    for key, title in (("from_definition", "its own definition"), ("from_reference", "the reference")):
        rows = [[row["chain"], *row[key].values()] for row in found["rows"] if row[key]]
        parts.append(f"{shape}: distance of the sum from {title} in float64, over its length")
        parts.append(table(("", *after), rows))
    parts.append(f"{shape}: how many times a perturbation has grown over {MERGES} merges")
    sizes = (f"of {by:g}" for by in PERTURBATIONS)
    parts.append(table(("", *sizes), ([row["chain"], *row["growth"].values()] for row in found["rows"])))
    return "\n\n".join(parts)


NOTES = notes(
    "Growth is ||D' - D|| / ||D|| after the last merge, over the perturbation's size. A chain in float32 "
    "rounds at every merge too, and what it rounds differently counts as growth: beside 1e-7 that is most "
    "of it, beside 1e-5 hardly anything.",
    "The reference removes the component along every single singular direction of the noise, and those turn "
    "at a touch: its own growth bounds how near to it anything in float32 can stay.",
    "The definitions leave alone what lies below float32's numerical rank, as the product does.",
)


def main() -> None:
    """Measure and print."""
    asked = options(__doc__).parse_args()
    results = [measure(shape) for shape in (QUICK_SHAPES if asked.quick else SHAPES)]
    say(*(text(found) for found in results), NOTES)
    finish("chain", {"perturbations": PERTURBATIONS, "shapes": results})


if __name__ == "__main__":
    main()
