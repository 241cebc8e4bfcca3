"""Is this a valid, safe fine-tune of our base? Verdicts are exceptions: errors.Refused with one of REASONS.

Headers first, before anything is read; values while the fold reads them; figures once it has. Knows nothing
of the ledger: who else is folded is told to it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from streammerge import methods
from streammerge.errors import Refused
from streammerge.finetune import FineTune, open_fine_tune
from streammerge.folding import RETRAIN
from streammerge.headers import MARK
from streammerge.sidecar import missing as refuse_missing

if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from pathlib import Path

    from streammerge.fit import Tolerance
    from streammerge.folding import Measured
    from streammerge.headers import Entry
    from streammerge.plan import Recipe

# Every reason a fine-tune can be refused or set aside for: stable words for logs, metrics and --allow.
REASONS = {
    "answered-wrong": "a target did not serve it right, and the version before it right",
    "attention-gauge-transformed": "attention turned so that it cannot be merged, its function unchanged",
    "bad-sidecar": "a file of Fisher information or Gram matrices that does not fit the base",
    "corrupted": "a file whose content is not what its place declares",
    "denied": "taken out by a rollback or rejected by a person",
    "duplicate": "the same content is folded or waiting already",
    "empty": "a file without weights",
    "implausible": "its delta is longer than max_delta_ratio times the base",
    "incomplete": "files were still missing after incomplete_after",
    "malformed": "a file that is not what its header claims",
    "missing-sidecar": "no Fisher information or Gram matrices beside the weights, which the method needs",
    "missing-weights": "weights of the base are not in it",
    "near-duplicate": "its delta is that of what is folded already",
    "needs-replay": "a changed revision of a folded fine-tune",
    "non-finite": "NaN or infinite values",
    "not-this-base": "nothing of the base is left in it",
    "one-direction": "the delta of a weight lies in one direction",
    "opposed": "its delta undoes what is folded",
    "oversized": "many times as large as the base",
    "overflow": "the merged weight does not fit into the base's dtype",
    "own-merge": "one of streammerge's own merges",
    "pickle-only": "no safetensors, only pickled weights",
    "quality": "a gate refused the candidate",
    "quantised": "stored in fewer bits than a float has",
    "symlink": "a symbolic link, which the source does not follow",
    "unknown-weights": "weights that the base does not have",
    "unsupported-adapter": "an adapter whose delta is not known exactly",
    "unsupported-dtype": "integers where the base has floats",
    "untied-head": "a head that differs from the embedding it is tied to",
    "unusual-norm": "its delta is much longer than those that are folded",
    "vocab-resized": "a vocabulary of another size",
    "wrong-base": "made from another model",
    "wrong-shape": "a weight of another shape",
    "zero-delta": "equal to the base",
}


def examine(
    path: Path, base: Mapping[str, Entry], recipe: Recipe, tolerance: Tolerance, allow: Container[str] = ()
) -> FineTune:
    """Open a fetched fine-tune and check everything that its headers and configuration can show."""
    if path.is_dir() and (path / MARK).exists() and "own-merge" not in allow:
        raise Refused(
            "own-merge",
            f"it holds {MARK}: it is a merge made by streammerge",
            hint="publish merges where no source of theirs looks",
        )
    sidecar = methods.sidecar(recipe.method)
    found = open_fine_tune(path, base, recipe.plan, tolerance, sidecar)
    if sidecar and found.sidecar is None and recipe.knobs.get("missing") == "refuse":
        found.__exit__(None, None, None)
        raise refuse_missing(sidecar)
    return found


def refuse_known(digest: str, *, folded: Container[str], denied: Container[str]) -> None:
    """Refuse content that is in the merge already, or that a person took out."""
    if digest in denied:
        raise Refused(
            "denied",
            f"content {digest[:12]} was taken out",
            hint="`streammerge fine-tunes approve` lets it in again",
        )
    if digest in folded:
        raise Refused(
            "duplicate", f"content {digest[:12]} is folded or waiting already", hint="nothing to do"
        )


def judge(measured: Measured, base: float, *, max_delta_ratio: float, allow: Container[str] = ()) -> None:
    """Refuse by what the fold measured: a delta of zero, or one longer than the base allows.

    base  ||base||
    """
    delta = measured.delta_norm
    if delta == 0.0 and "zero-delta" not in allow:
        raise Refused(
            "zero-delta",
            "every weight equals the base's",
            hint="the base itself was published, or the fine-tuned weights were not saved",
        )
    if delta > max_delta_ratio * base and "implausible" not in allow:
        raise Refused(
            "implausible",
            f"||delta|| = {delta:.4g} is {delta / base if base else math.inf:.2f} x ||base||, "
            f"more than max_delta_ratio = {max_delta_ratio:g}",
            hint=RETRAIN,
        )
