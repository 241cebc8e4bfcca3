"""OPCM: sequential orthogonal projection with adaptive scaling, the method streammerge is built around.

After "Merging Models on the Fly Without Retraining", arXiv 2501.09522.

D is the running, unscaled sum of what each fine-tune contributed; with D = U S V^T and r the split rank, the
part of a delta X that lives in D's leading r x r block is dropped, the remainder is made orthogonal to D, and
the rest is added. The paper's per-step rescaling is equal to one global factor applied when weights are
written, so the state stays exact. Differences from the authors' code: a sum of lower rank than its shape
protects only the directions it has (theirs deletes the delta's literal diagonal there), and tails other than
"diagonal" exist because that one amplifies rounding two- to fourfold per merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Lt

from streammerge import linalg

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.linalg import Delta
    from streammerge.methods import Arrival, Slots, Totals

SLOTS = {"sum": torch.float32}
WEIGHTED = False
ORDER_FREE = False
PAPER = "OPCM, arXiv 2501.09522, eq. 4-6"
NOTES = "tail scalar instead of diagonal; only directions that the sum has are protected"

LARGEST_MULTIPLE = 1e30  # a sum that needs more of it than this is nothing beside the delta

Alpha = Annotated[float, Ge(0.0), Lt(1.0)]
Tail = Literal["scalar", "diagonal", "keep"]


def prepare(slots: Slots, *, alpha: Alpha = 0.5, tail: Tail = "scalar") -> Slots:
    """Derive from the running sum the directions that a new delta must leave alone.

    slots["sum"]      [out, in] float32
    adds "values"     [q] float64, singular values of the sum above its numerical rank, largest first
    adds "directions" [m, r] float32, or all q of them in float64 for the diagonal tail; m the smaller side
    """
    vectors, s = linalg.spectrum(linalg.lying(slots["sum"]))
    kept = vectors if tail == "diagonal" else vectors[:, : linalg.split_rank(s, alpha)].float()
    return {**slots, "values": s, "directions": kept.contiguous()}


def fold(slots: Slots, arrival: Arrival, *, alpha: Alpha = 0.5, tail: Tail = "scalar") -> Slots:
    """Add to the running sum the part of a delta that leaves earlier fine-tunes' directions alone.

    slots["sum"]   [out, in] float32, on the delta's device; zeros before the first fine-tune
    arrival.delta  [out, in] float32, or its factors; a weight that is not projected is added whole
    alpha          0 <= alpha < 1, share of the sum's singular-value mass whose directions are protected
    tail           what happens to the component along the rest of the sum: "scalar" removes the one multiple
                   of the rest that makes the contribution orthogonal to the sum; "diagonal" removes each
                   singular direction's own (the authors' later code); "keep" leaves it (their published
                   figures)

    The sum stays unscaled (arXiv 2501.09522 eq. 4-6; equal to the per-step recursion, tests/test_methods.py).
    """
    running, delta = slots["sum"], arrival.delta
    if arrival.kind == "added":
        return {"sum": linalg.plus(running, delta)}
    if linalg.is_zero(delta):
        return {"sum": running}
    if not bool(running.any()):
        return {"sum": linalg.dense(delta)}
    if "values" not in slots:
        slots = prepare(slots, alpha=alpha, tail=tail)
    step = _diagonal_step if tail == "diagonal" else _block_step
    new = step(linalg.lying(running), linalg.lying(delta), slots, alpha, remove_tail=tail != "keep")
    return {"sum": (new if new.shape == running.shape else new.T).contiguous()}


def _block_step(running: Tensor, delta: Delta, slots: Slots, alpha: float, *, remove_tail: bool) -> Tensor:
    """D + B - b D_tail, with B = X - U_r (U_r^T X V_r) V_r^T and b = <B, D_tail> / ||D_tail||^2.

    Written with Z = U_r^T D [r, n] and Y = U_r^T X [r, n], so that V is never formed:
    U_r^T X V_r V_r^T = (Y Z^T S_r^-2) Z and <B, D_tail> = <X, D> - <Y, Z>.
    """
    s, vectors = slots["values"], slots["directions"]
    r = linalg.split_rank(s, alpha)
    z, y = vectors.T @ running, linalg.times(vectors.T, delta)
    core = linalg.cross(y, z) / s[:r].square()
    b = 0.0
    if remove_tail:
        b = (linalg.inner(delta, running) - linalg.dot(y, z)) / float(s[r:].square().sum())
        b = b if abs(b) < LARGEST_MULTIPLE else 0.0
        core.diagonal().sub_(b)
    new = linalg.plus(running, delta, scale=1.0 - b)
    return new.addmm_(vectors, core.float() @ z, alpha=-1.0)


def _diagonal_step(running: Tensor, delta: Delta, slots: Slots, alpha: float, *, remove_tail: bool) -> Tensor:
    """D + X - U_r (U_r^T X V_r) V_r^T - sum_{r <= i < q} (u_i^T X v_i) u_i v_i^T, in float64.

    One-sided: with N = U^T X D^T U and K = N S^-2 restricted to its leading block and the diagonal, what is
    removed equals (U K U^T) D; only [m, m] matrices and panels of D and X are held in float64.
    """
    assert remove_tail
    s, vectors, delta = slots["values"], slots["directions"], linalg.dense(delta)
    r = linalg.split_rank(s, alpha)
    k = vectors.T @ linalg.cross(delta, running) @ vectors
    k /= s.square()
    removed = k.diagonal().diag_embed()
    removed[:r, :r] = k[:r, :r]
    operator = vectors @ removed @ vectors.T
    new = torch.empty_like(running)
    for cut in linalg.panels(running.shape[1], running.shape[0]):
        old = running[:, cut].double()
        new[:, cut] = (old + delta[:, cut].double() - operator @ old).float()
    return new


def render(slots: Slots, totals: Totals) -> Tensor:
    """Scale the running sum so that the merged delta is as long as the fine-tunes' deltas are on average.

    One scalar for the whole model: mean_i ||delta_i|| / ||D|| (arXiv 2501.09522 eq. 6).
    """
    return slots["sum"] * length(totals)


def length(totals: Totals) -> float:
    """What the sum is multiplied by: 1 / lambda."""
    return 1.0 / totals.lambda_ if totals.state_norm else 1.0
