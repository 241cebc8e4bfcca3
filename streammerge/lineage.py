"""How a merge came about, written down: the manifest's facts, the health figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from streammerge import methods
from streammerge.methods import Totals

if TYPE_CHECKING:
    from streammerge import finalize
    from streammerge.engine import Engine
    from streammerge.folding import Measured
    from streammerge.members import Members
    from streammerge.plan import Recipe


def manifest_of(
    engine: Engine,
    recipe: Recipe,
    finish: finalize.Finalize,
    folded: Members,
    totals: Totals,
    norm: float,
    measured: Measured | None,
) -> dict[str, Any]:
    """Describe how a merge came about, without times; shared with `streammerge merge`."""
    return {
        "method": recipe.method,
        "knobs": dict(recipe.knobs),
        "finalize": finish.model_dump(),
        "threads": engine.threads,
        "device": str(engine.device),
        "torch": torch.__version__,
        "fine_tunes": folded,
        "totals": {**{k: getattr(totals, k) for k in Totals.__dataclass_fields__}, "lambda": totals.lambda_},
        "health": health(recipe, totals, norm, measured),
    }


def health(recipe: Recipe, totals: Totals, norm: float, measured: Measured | None) -> dict[str, float | None]:
    """Give the figures that tell a sound merge from a sick one; those about the sum where one is kept."""
    sums = methods.keeps_sum(recipe.method, recipe.knobs)
    return {
        "merged_norm": norm,
        "norm_ratio": norm / totals.max_delta_norm if totals.max_delta_norm else None,
        "lambda_over_sqrt_count": totals.lambda_ / totals.count**0.5 if totals.count and sums else None,
        "delta_norm": measured.delta_norm if measured else None,
        "kept_energy": measured.kept_energy if measured and sums else None,
        "orthogonality": measured.orthogonality if measured and sums else None,
    }
