"""How far a merge that something left is from one that never had it.

Relative to what was merged: the length of the difference over the length of the merged delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from shops import NAMES, Shop, knobs_of

from streammerge import methods

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from faults import Findings

TOLERANCE = 1e-5  # of the merged delta, for what is subtracted in float32
OWN_TOLERANCE = {"regmean": 1e-4, "wudi": 1e-5}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """||got - expected|| / ||expected - base||."""
    floating = [name for name in base if base[name].is_floating_point()]
    error = sum(float((got[n].double() - expected[n].double()).square().sum()) for n in floating)
    return float(
        (error / sum(float((expected[n] - base[n]).double().square().sum()) for n in floating)) ** 0.5
    )


def retracted(root: Path, method: str, name: str) -> tuple[Shop, Shop, float]:
    """Take one of four out; gives that shop, one that never had it, and how far they are from each other.

    That is 0 only where every bit is the same.
    """
    root.mkdir(exist_ok=True)
    shop, never = Shop(root / "shop", method), Shop(root / "never", method)
    shop.publish(NAMES)
    never.publish([other for other in NAMES if other != name])
    assert shop.do("retract", name=name)["state"] == "retracted"
    ours, theirs = shop.model, never.model
    is_same = all(torch.equal(values, theirs[n]) for n, values in ours.items())
    return shop, never, 0.0 if is_same else distance(ours, theirs, shop.base)


def tolerance(method: str) -> float:
    """How far the two may be: not at all where it is replayed."""
    return OWN_TOLERANCE.get(method, TOLERANCE) if methods.can_unfold(method, knobs_of(method)) else 0.0


def add_to(findings: Findings, work: Path) -> None:
    """Take the second of four out under every method, and add the figures."""
    apart = {method: retracted(work / f"retract-{method}", method, "bee")[2] for method in methods.NAMES}
    exact = [method for method, far in apart.items() if far == 0]
    furthest = max(apart, key=lambda method: apart[method] / (tolerance(method) or 1.0))
    findings.figures += [
        ("retracted and as if never folded, bit for bit", f"{len(exact)} of {len(apart)} methods"),
        (
            "the others, furthest within their tolerance",
            f"{apart[furthest]:.1e} of the merged delta ({furthest}; {tolerance(furthest):.0e} is allowed)",
        ),
    ]
    findings.differences += [
        f"{method}: retracted is {far:.1e} from never folded, {tolerance(method):.0e} is allowed"
        for method, far in apart.items()
        if far > tolerance(method)
    ]
