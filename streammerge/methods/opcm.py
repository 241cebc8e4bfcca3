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

    slots["sum"]      [out, in] float32, oriented here as D [m, n], m <= n
    adds "values"     [q] float64, singular values of the sum above its numerical rank, largest first
    adds "left"       [m, k] float32, the first k left singular vectors: all q for the diagonal tail, else r
    adds "right"      [k, n] float32, the right ones that belong to them
    adds "rest"       [m, n] float32, D without these directions; for the scalar tail only
    """
    running = linalg.lying(slots["sum"])
    vectors, s = linalg.spectrum(running)
    k = s.numel() if tail == "diagonal" else linalg.split_rank(s, alpha)
    left = vectors[:, :k].float()
    along = left.T @ running
    found = {"values": s, "left": left}
    if tail == "scalar":
        found["rest"] = torch.addmm(running, left, along, alpha=-1.0)
    return {**slots, **found, "right": along.div_(s[:k].float().unsqueeze(1))}


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
    new = step(linalg.lying(running), linalg.lying(delta), slots, alpha)
    return {"sum": (new if new.shape == running.shape else new.T).contiguous()}


def _block_step(running: Tensor, delta: Delta, slots: Slots, alpha: float) -> Tensor:
    """D + B - b D_tail, with B = X - U_r (U_r^T X V_r) V_r^T and b = <B, D_tail> / ||D_tail||^2.

    <B, D_tail> is <X, D_tail>. Of a delta that comes as two factors U_r^T X V_r is two factors too.
    """
    s, left, right = slots["values"], slots["left"], slots["right"]
    r = linalg.split_rank(s, alpha)
    if isinstance(delta, linalg.LowRank):
        lefts = torch.cat([delta.left, left @ (left.T @ delta.left)], 1)
        rights = torch.cat([delta.right, -(delta.right @ right.T) @ right], 0)
        new = torch.addmm(running, lefts, rights)
    else:
        new = (running + delta).addmm_(left, (left.T @ delta) @ right.T @ right, alpha=-1.0)
    if (rest := slots.get("rest")) is None:
        return new
    b = linalg.inner(delta, rest) / float(s[r:].square().sum())
    return new.sub_(rest, alpha=b) if abs(b) < LARGEST_MULTIPLE else new


def _diagonal_step(running: Tensor, delta: Delta, slots: Slots, alpha: float) -> Tensor:
    """D + X - U_r (U_r^T X V_r) V_r^T - sum_{r <= i < q} (u_i^T X v_i) u_i v_i^T.

    Written as D + X - U W: each row of W is what one left singular vector takes away.
    """
    s, left, right = slots["values"], slots["left"], slots["right"]
    delta = linalg.dense(delta)
    r = linalg.split_rank(s, alpha)
    seen = left.T @ delta
    removed = right * torch.linalg.vecdot(seen, right).unsqueeze(1)
    removed[:r] = (seen[:r] @ right[:r].T) @ right[:r]
    return (running + delta).addmm_(left, removed, alpha=-1.0)


def render(slots: Slots, totals: Totals) -> Tensor:
    """Scale the running sum so that the merged delta is as long as the fine-tunes' deltas are on average.

    One scalar for the whole model: mean_i ||delta_i|| / ||D|| (arXiv 2501.09522 eq. 6).
    """
    return slots["sum"] * length(totals)


def length(totals: Totals) -> float:
    """What the sum is multiplied by: 1 / lambda."""
    return 1.0 / totals.lambda_ if totals.state_norm else 1.0
