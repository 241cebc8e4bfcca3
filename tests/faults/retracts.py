"""A store in this process, and how far a merge that something left is from one that never had it.

Relative to what was merged: the length of the difference over the length of the merged delta.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import models
import torch

from streammerge import files, methods, once, snapshots
from streammerge.config import Config
from streammerge.errors import StreammergeError
from streammerge.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from faults import Findings

NAMES = ("ant", "bee", "cat", "dog")
TOLERANCE = 1e-5  # of the merged delta, for what is subtracted in float32
OWN_TOLERANCE = {"regmean": 1e-4, "wudi": 1e-5}


def knobs_of(method: str) -> dict[str, Any]:
    """Knobs without which fine-tunes without sidecars are refused."""
    return {"missing": "uniform"} if methods.sidecar(method) else {}


class Shop:
    """A store in this process, worked off by `run --once`."""

    def __init__(self, root: Path, method: str, **keys: Any) -> None:
        """Publish nothing yet."""
        self.root = root
        root.mkdir()
        self.base = models.make_base(root / "base")
        (root / "fine-tunes").mkdir()
        source = {"name": "team", "type": "directory", "path": root / "fine-tunes", "settle": 0}
        given = {"archive": "keep", "keep": 2, "grace": 0, **keys}
        told = {"base": root / "base", "store": root / "store", "device": "cpu", "threads": 1, **given}
        self.config = Config.model_validate(
            {**told, "method": method, "knobs": knobs_of(method), "sources": [source]}
        )

    def publish(self, names: Sequence[str]) -> None:
        """Fold these, one after another."""
        for name in names:
            models.make_fine_tune(self.root / "fine-tunes" / name, self.base, seed=10 + NAMES.index(name[:3]))
            once.run_once(self.config)

    def do(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Execute one command as the command line would without a daemon."""
        return obey(self.config, verb, arguments)

    @property
    def model(self) -> dict[str, Tensor]:
        """What is served."""
        return models.load(self.root / "store" / "current" / "model" / "model.safetensors")

    @property
    def manifest(self) -> dict[str, Any]:
        """How it came about."""
        return dict(json.loads((self.root / "store" / "current" / "manifest.json").read_bytes()))


def obey(config: Config, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Leave a command in the ledger, have it executed, give its answer."""
    store = snapshots.Store(config.store)
    ledger = Ledger(store.ledger)
    number = ledger.ask(verb, arguments)
    with files.locked(store.lock):
        once.obey_once(config)
    row = ledger.row("select * from commands where id = ?", number)
    ledger.close()
    assert row is not None
    result = json.loads(row["result"])
    if row["state"] == "failed":
        raise StreammergeError(result["error"], hint=result["hint"])
    return dict(result)


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
