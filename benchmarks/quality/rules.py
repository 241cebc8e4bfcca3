"""The rows of the table: each a method of the product with knobs and a finish, and one rival of our own.

A row that this streammerge cannot run, for it lacks the method, a knob or a part of `finalize`, says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from streammerge import finalize, methods
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

BASE, EXPERTS, SUM_NORM = "base", "experts", "sum+norm (rival)"
PEER = "mergekit"  # how the names of the peer's rows begin; see peer.py


@dataclass(frozen=True)
class Rule:
    """One row.

    knobs        of the method; those not named have their defaults
    finish       the keys of `finalize:` in a configuration
    is_streamed  whether the model is examined after every merge, not only after the last
    """

    name: str
    method: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    finish: Mapping[str, Any] = field(default_factory=dict)
    is_streamed: bool = False

    @property
    def is_ordered(self) -> bool:
        """Whether the order of the fine-tunes matters."""
        return not methods.load(self.method).ORDER_FREE

    def missing(self) -> str:
        """What this streammerge lacks to run the rule; "" where nothing."""
        if self.method not in methods.NAMES:
            return f"no method {self.method}"
        try:
            methods.resolve(self.method, self.knobs)
            finalize.Finalize(**self.finish)
        except ConfigError as exc:
            return exc.message
        except ValidationError as exc:
            found = exc.errors()[0]
            return f"finalize.{'.'.join(map(str, found['loc']))}: {found['msg']}"
        return ""


def default() -> Rule:
    """What a configuration that names no method gets."""
    return Rule(methods.DEFAULT, methods.DEFAULT)


RULES = (
    Rule("average", "average", is_streamed=True),
    Rule("task_arithmetic 0.3", "task_arithmetic", {"scale": 0.3}, is_streamed=True),
    Rule("ties sum 0.3", "ties", {"density": 0.2, "agg": "sum", "scale": 0.3}),
    Rule("ties mean 1", "ties", {"density": 0.2, "agg": "mean", "scale": 1.0}),
    Rule("dare 0.3", "dare", {"p": 0.5, "scale": 0.3}),
    Rule("breadcrumbs", "breadcrumbs"),
    Rule("magmax 0.5", "magmax", {"scale": 0.5}),
    Rule("consensus_ta", "consensus_ta"),
    Rule("pcb", "pcb"),
    Rule("iso_c 1", "iso_c", {"scale": 1.0}, is_streamed=True),
    Rule("iso_c 1.5", "iso_c", {"scale": 1.5}),
    Rule("iso_cts", "iso_cts"),
    Rule("tsvm", "tsvm", is_streamed=True),
    Rule("wudi 0.01", "wudi", {"ridge": 0.01}),
    Rule("wudi 0.1", "wudi", {"ridge": 0.1}, is_streamed=True),
    Rule("wudi 1", "wudi", {"ridge": 1.0}),
    Rule("opcm scalar", "opcm", {"tail": "scalar"}, is_streamed=True),
    Rule("opcm diagonal", "opcm", {"tail": "diagonal"}),
    Rule("opcm keep", "opcm", {"tail": "keep"}),
    Rule("opcm + cap", "opcm", {"tail": "scalar"}, {"cap": {"level": "interference"}}, is_streamed=True),
    Rule("opcm + lines", "opcm", {"tail": "scalar"}, {"lines": {"alpha": 0.6, "beta": 0.8}}),
    Rule("spectral_cap interference", "spectral_cap", {"level": "interference"}, is_streamed=True),
    Rule("spectral_cap fixed", "spectral_cap", {"level": "fixed"}, is_streamed=True),
)  # fmt: skip


def chosen(wanted: Sequence[str]) -> tuple[list[Rule], dict[str, str]]:
    """The rules that can run, and of each that cannot, why. `wanted` are methods or rows; all where empty."""
    rules = [rule for rule in RULES if not wanted or rule.method in wanted or rule.name in wanted]
    notes = {rule.name: rule.missing() for rule in rules}
    return [rule for rule in rules if not notes[rule.name]], {name: why for name, why in notes.items() if why}


def sum_norm(base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The plain sum of all deltas, as long as one delta is on average: OPCM without its projection.

    No method of the product, so computed here. With S the sum: base + S mean_i ||delta_i|| / ||S||.
    """
    deltas = [{name: expert[name].double() - base[name].double() for name in base} for expert in experts]
    total = {name: torch.stack([delta[name] for delta in deltas]).sum(0) for name in base}
    scale = sum(map(_norm, deltas)) / len(deltas) / _norm(total)
    return {name: (base[name].double() + scale * total[name]).float() for name in base}


def _norm(weights: Mapping[str, Tensor]) -> float:
    """Frobenius norm over all weights."""
    return float(sum(weight.square().sum() for weight in weights.values()) ** 0.5)
