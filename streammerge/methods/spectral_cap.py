"""The spectral cap, our own rule: the plain sum of all deltas, its spectrum bounded by the fine-tunes' own.

What hurts a merge is the top of the summed spectrum, where deltas pile up on common directions. A matrix of
the sum, S = U s V^T, is published as U min(beta * s, c) V^T; everything else as the mean. A single fine-tune
is published as it is. Order-free, joinable, and exactly removable up to float32 rounding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le

from streammerge import linalg

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods import Arrival, Slots, Totals

SLOTS = {"sum": torch.float32}
WEIGHTED = False

INTERFERENCE_LEVEL = 0.9
CLAMP = 3.0  # one delta that is nearly empty, or ten times as long, must not move the mean

Level = Literal["interference", "fixed"]
Factor = Annotated[float, Gt(0.0), Le(100.0)]


def fold(slots: Slots, arrival: Arrival) -> Slots:
    """Add a delta to the running sum. sum and delta: one shape, float32."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta)}


def unfold(slots: Slots, arrival: Arrival) -> Slots:
    """Subtract what `fold` added, up to float32 rounding."""
    return {"sum": linalg.plus(slots["sum"], arrival.delta, factor=-1.0)}


def join(slots: Slots, others: Slots) -> Slots:
    """Add two states that were folded apart."""
    return {"sum": slots["sum"] + others["sum"]}


def render(
    slots: Slots,
    totals: Totals,
    figures: Tensor,
    *,
    level: Level = "interference",
    strength: Factor = 1.0,
    kappa: Factor = 0.6,
    beta: Annotated[float, Ge(1.0), Le(100.0)] = 2.0,
) -> Tensor:
    """Cap the spectrum of a matrix of the sum; divide what is no matrix, or streams in panels, by the count.

    slots["sum"]  [out, in] float32, or a flat panel
    figures       [fine-tunes, 3] float64: ||delta||_F, ||delta^T delta||_F and top singular value of each;
                  NaN for a matrix that is added whole
    level         what c is: "interference" falls where fine-tunes collide (`bound`); "fixed" is kappa times
                  the mean of the fine-tunes' top singular values
    strength      multiplies c at level interference
    beta          how much a singular value below the cap is raised, at most to it
    """
    running = slots["sum"]
    if running.dim() != 2 or bool(figures.isnan().any()):
        return running / max(totals.count, 1)
    there = figures[figures[:, 0] > 0]
    if len(there) < 2:
        return running
    wide = linalg.lying(running)
    vectors, s = linalg.spectrum(wide)
    if not s.numel():
        return running
    cap = kappa * mean(there[:, 2]) if level == "fixed" else strength * bound(there, s)
    over = int((beta * s > cap).sum())
    top = vectors[:, :over].float()
    lowered = ((beta - cap / s[:over]).float().unsqueeze(1)) * (top.T @ wide)
    capped = torch.addmm(wide, top, lowered, beta=beta, alpha=-1.0)
    return (capped if capped.shape == running.shape else capped.T).contiguous()


def bound(figures: Tensor, s: Tensor) -> float:
    """Where the fine-tunes of one matrix collide, c falls: 0.9 w sqrt(R / tau_S).

    tau(d) = ||d^T d||_F / ||d||_F is a delta's energy-weighted singular value, w the mean of the fine-tunes'
    taus, R the root of the sum of their squares, tau_S the sum's own tau. tau_S / R is 1 for deltas that
    share no direction and sqrt(n) for n copies of one.
    """
    taus = figures[:, 1] / figures[:, 0]
    tau_of_sum = float(s.pow(4).sum().sqrt() / s.square().sum().sqrt())
    together = float(taus.square().sum().sqrt())
    return INTERFERENCE_LEVEL * mean(taus) * math.sqrt(together / tau_of_sum)


def mean(values: Tensor) -> float:
    """Geometric mean of positive values [n], each clamped to a third and to three times their median."""
    middle = float(values.quantile(0.5))
    return math.exp(float(values.clamp(middle / CLAMP, middle * CLAMP).log().mean()))
