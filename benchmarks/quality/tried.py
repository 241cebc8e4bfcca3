"""Is there a better rule than the spectral cap, without data? What was tried, each beside it on a whole tier.

    python benchmarks/quality/tried.py tiny
    python benchmarks/quality/tried.py glyph
    python benchmarks/quality/tried.py text

Each row changes one thing of the default: how a matrix of the sum, S = U s V^T, is published, what is summed,
or what becomes of vectors. All fine-tunes are in memory here, and merged at once; a rule that were better
would have had to become a fold. None was: docs/decisions/0006.
"""

from __future__ import annotations

import argparse
import importlib
import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from tier import load_model
from torch.linalg import solve, svd

from streammerge import linalg, methods, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tier import Tier
    from torch import Tensor

    # The deltas of one weight, [fine-tunes, m, n] float32, to the merged delta [m, n].
    Matrices = Callable[[Tensor], Tensor]
    Vectors = Callable[[Tensor], Tensor]

KNOBS = methods.resolve("spectral_cap", {})


def figures(deltas: Tensor) -> Tensor:
    """What a store records of each fine-tune: ||d||, ||d^T d|| and the top singular value, float64."""
    s = torch.linalg.svdvals(deltas.double())
    return torch.stack([s.norm(dim=1), (s**2).norm(dim=1), s[:, 0]], dim=1)


def cap(deltas: Tensor, *, summed: Tensor | None = None, **knobs: float) -> Tensor:
    """The default's matrix; `summed` in the place of the plain sum."""
    matrix = deltas.sum(0) if summed is None else summed
    return linalg.capped(matrix, figures(deltas), **{**KNOBS, **knobs})


def spectrum(deltas: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """U, s and V^T of the sum in float64, and the level c of the cap."""
    u, s, vt = svd(deltas.sum(0).double(), full_matrices=False)
    return u, s, vt, KNOBS["strength"] * linalg.interference_bound(figures(deltas), s)


def shaped(deltas: Tensor, shape: Callable[[Tensor], Tensor]) -> Tensor:
    """Another curve than min(2x, 1), of x = s / c."""
    u, s, vt, c = spectrum(deltas)
    return ((u * (c * shape(s / c))) @ vt).float()


def as_long(deltas: Tensor, other: Tensor) -> Tensor:
    """Another matrix at the default's length."""
    return other * (cap(deltas).norm() / other.norm().clamp(min=1e-30))


def power(deltas: Tensor, exponent: float) -> Tensor:
    """U s^p V^T at the default's length."""
    u, s, vt = svd(deltas.sum(0).double(), full_matrices=False)
    return as_long(deltas, ((u * (s**exponent * (s > 1e-6 * s[0]))) @ vt).float())


def wudi(deltas: Tensor, ridge: float = 1.0) -> Tensor:
    """The closed form of WUDI, arXiv 2503.08099."""
    parts = deltas.double() / deltas.double().norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    grams = parts.mT @ parts
    total = grams.sum(0)
    held = total + ridge * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
    return solve(held, (deltas.double() @ grams).sum(0).T).T.float()


def tsvm(deltas: Tensor) -> Tensor:
    """TSV-M, arXiv 2412.00081: the top of each, whitened together."""
    u, s, vt = svd(deltas.double(), full_matrices=False)
    rank = max(1, s.shape[1] // len(deltas))
    u, vt = (polar(torch.cat(list(part), dim)) for part, dim in ((u[:, :, :rank], 1), (vt[:, :rank], 0)))
    return ((u * s[:, :rank].flatten()) @ vt).float()


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns."""
    u, _, vt = svd(matrix, full_matrices=False)
    return u @ vt


def shared(deltas: Tensor, exponent: float) -> Tensor:
    """A level for each direction: higher (exponent > 0) or lower where more fine-tunes use it."""
    u, s, vt, c = spectrum(deltas)
    uses = torch.einsum("mr,tmn,rn->tr", u, deltas.double(), vt)
    used_by = (uses**2).sum(0) / (uses**2).amax(0).clamp(min=1e-30)  # 1 to all
    levels = c * used_by**exponent
    even = torch.minimum(2 * s, torch.full_like(s, c)).norm()
    levels *= (even / torch.minimum(2 * s, levels).norm()).clamp(0.5, 2.0)
    return ((u * torch.minimum(2 * s, levels)) @ vt).float()


def elected(deltas: Tensor) -> Tensor:
    """Only what agrees in sign with the sum, as TIES elects."""
    return deltas * (deltas.sign() == deltas.sum(0).sign())


def trimmed(deltas: Tensor, keep: float) -> Tensor:
    """Only the largest of each, as TIES trims."""
    sizes = deltas.abs().flatten(1)
    least = sizes.kthvalue(max(1, int(sizes.shape[1] * (1 - keep))), dim=1).values
    return deltas * (deltas.abs() > least.view(-1, 1, 1))


def as_long_as_each_other(deltas: Tensor) -> Tensor:
    """All deltas of a matrix at their mean length."""
    lengths = deltas.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return deltas * (lengths.log().mean().exp() / lengths)


def mean_raised(deltas: Tensor, factor: float) -> Tensor:
    """What all have in common counts more, or less."""
    mean = deltas.mean(0)
    return cap(deltas, summed=(deltas - mean).sum(0) + factor * len(deltas) * mean)


def half(other: Matrices, deltas: Tensor) -> Tensor:
    """The mean of the default's matrix and another's."""
    return (cap(deltas) + other(deltas)) / 2


def mean(deltas: Tensor) -> Tensor:
    """The default's vectors."""
    return deltas.mean(0)


TRIED: dict[str, tuple[Matrices, Vectors]] = {
    "the default": (cap, mean),
    "beta 1.5": (partial(cap, beta=1.5), mean),
    "beta 3": (partial(cap, beta=3.0), mean),
    "c tanh(2s/c)": (partial(shaped, shape=lambda x: torch.tanh(2 * x)), mean),
    "2s / (1 + (2s/c)^4)^(1/4)": (partial(shaped, shape=lambda x: 2 * x / (1 + (2 * x) ** 4) ** 0.25), mean),
    "no doubling below c/4": (
        partial(shaped, shape=lambda x: torch.where(x < 0.25, x, (2 * x).clamp(max=1.0))),
        mean,
    ),
    "all singular values equal": (partial(power, exponent=0.0), mean),
    "square roots of them": (partial(power, exponent=0.5), mean),
    "c higher where shared": (partial(shared, exponent=0.25), mean),
    "c lower where shared": (partial(shared, exponent=-0.25), mean),
    "half all equal": (partial(half, partial(power, exponent=0.0)), mean),
    "half wudi": (partial(half, wudi), mean),
    "half tsvm": (partial(half, tsvm), mean),
    "wudi, capped": (lambda deltas: cap(deltas, summed=wudi(deltas)), mean),
    "tsvm, capped": (lambda deltas: cap(deltas, summed=tsvm(deltas)), mean),
    "deltas of one length": (lambda deltas: cap(as_long_as_each_other(deltas)), mean),
    "signs elected": (lambda deltas: cap(deltas, summed=elected(deltas).sum(0)), mean),
    "trimmed to a half": (lambda deltas: cap(trimmed(deltas, 0.5)), mean),
    "trimmed to a fifth": (lambda deltas: cap(trimmed(deltas, 0.2)), mean),
    "the mean half as much": (partial(mean_raised, factor=0.5), mean),
    "the mean 1.5 times": (partial(mean_raised, factor=1.5), mean),
    "the mean twice": (partial(mean_raised, factor=2.0), mean),
    "vectors: sum / sqrt(count)": (cap, lambda deltas: deltas.sum(0) / math.sqrt(len(deltas))),
    "vectors: sum": (cap, lambda deltas: deltas.sum(0)),
}


def merged(tier: Tier, matrices: Matrices, vectors: Vectors) -> dict[str, Tensor]:
    """One model of all the tier's experts."""
    base, experts = load_model(tier.base), [load_model(folder) for folder in tier.experts]
    found = dict(base)
    for name, weight in base.items():
        if weight.is_floating_point():
            deltas = torch.stack([expert.get(name, weight) - weight for expert in experts])
            is_added = weight.ndim != 2 or plan.matches(name, plan.DEFAULT_ADDED)
            found[name] = weight + (vectors if is_added else matrices)(deltas)
    return found


def main(family: str, wanted: Sequence[str]) -> None:
    """Print a line a rule and tier: mean and worst task in percent."""
    for tier in importlib.import_module(family).tiers():
        for name in wanted or TRIED:
            accuracy = tier.accuracy(merged(tier, *TRIED[name]))
            print(
                f"{tier.name:9} {name:27} {sum(accuracy) / len(accuracy):5.1f} {min(accuracy):5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=("tiny", "glyph", "text"))
    parser.add_argument("--rule", action="append", default=[], choices=TRIED, help="only these")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    main(asked.family, asked.rule)
