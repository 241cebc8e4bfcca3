"""Merge methods: how deltas combine. One file a method; the file's name is its name in the configuration.

A method is a module of pure functions on one weight:

    SLOTS                               tensors remembered per weight, with their dtypes
    WEIGHTED                            whether a fine-tune's own weight counts
    fold(slots, arrival, **knobs)       one delta in -> new slots
    render(slots, totals, **knobs)      what to add to the base now; a parameter `figures` is given the
                                        recorded figures of this weight, [fine-tunes, 3] float64
    prepare(slots, **knobs)             optional: data derived from the state alone, merged into `slots`
                                        before `fold`; the daemon may compute it before the delta is there
    unfold(slots, arrival, **knobs)     optional, only where taking out is exact
    join(slots, others, **knobs)        optional, only where two states can be added

Keyword arguments with defaults are the method's knobs: the signature is the documentation and the
configuration schema. A weight of kind "added" may arrive in panels, so what a method does to it must be
elementwise.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from pydantic import ConfigDict, ValidationError, create_model

from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from streammerge.linalg import Delta

NAMES = ("opcm", "average", "task_arithmetic", "spectral_cap")
DEFAULT = "opcm"

Slots = dict[str, torch.Tensor]
Kind = Literal["projected", "added"]


@dataclass(frozen=True)
class Arrival:
    """One weight of the fine-tune that is folded now.

    delta   fine-tune minus base, float32, the base's shape (or one panel of it, flat, where kind is "added");
            an adapter's projected weight comes as linalg.LowRank, two factors that linalg's functions take
    digest  of the whole fine-tune; seeds whatever a method draws at random
    factor  the weight a person gave this fine-tune (1.0 unless configured)
    """

    name: str
    kind: Kind
    delta: Delta
    digest: str
    factor: float = 1.0


@dataclass(frozen=True)
class Totals:
    """Sums over all floating-point weights, tied ones once, in float64; filled by the engine.

    count            fine-tunes folded
    factors          sum of their weights
    mean_delta_norm  mean over fine-tunes of ||delta||
    max_delta_norm   largest ||delta||
    state_norm       norm of the first slot over all weights
    """

    count: int = 0
    factors: float = 0.0
    mean_delta_norm: float = 0.0
    max_delta_norm: float = 0.0
    state_norm: float = 0.0

    @property
    def lambda_(self) -> float:
        """OPCM's adaptive scale: the running sum is divided by it (arXiv 2501.09522 eq. 6)."""
        return self.state_norm / self.mean_delta_norm if self.mean_delta_norm else 1.0

    def after(self, delta_norm: float, state_norm: float, factor: float) -> Totals:
        """Give the totals once one more fine-tune of norm `delta_norm` is folded."""
        count = self.count + 1
        return Totals(
            count=count,
            factors=self.factors + factor,
            mean_delta_norm=self.mean_delta_norm + (delta_norm - self.mean_delta_norm) / count,
            max_delta_norm=max(self.max_delta_norm, delta_norm),
            state_norm=state_norm,
        )


class Method(Protocol):
    """What the engine needs of a method module; `prepare`, `unfold` and `join` are optional."""

    SLOTS: Mapping[str, torch.dtype]
    WEIGHTED: bool

    def fold(self, slots: Slots, arrival: Arrival, **knobs: Any) -> Slots:  # noqa: ANN401 -- each method has its own
        """Take one delta in."""

    def render(self, slots: Slots, totals: Totals, **knobs: Any) -> Tensor:  # noqa: ANN401 -- each method has its own
        """Give what is added to the base."""


def load(name: str) -> Method:
    """Import the method called `name`, one of NAMES."""
    assert name in NAMES, name
    return cast("Method", importlib.import_module(f"{__name__}.{name}"))


def knob_fields(name: str) -> dict[str, tuple[Any, Any]]:
    """List a method's knobs as name -> (annotated type, default), over fold and render."""
    method = load(name)
    fields: dict[str, tuple[Any, Any]] = {}
    for function in (method.fold, method.render):
        for knob in inspect.signature(function).parameters.values():
            if knob.kind is knob.KEYWORD_ONLY:
                # Its annotation is a string that the method's module understands.
                annotation = eval(knob.annotation, vars(method))  # noqa: S307 -- our own annotations
                fields[knob.name] = (annotation, knob.default)
    return fields


def resolve(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check knobs against the method's signature and fill in the defaults; raises ConfigError."""
    fields = knob_fields(name)
    for knob in given:
        if knob not in fields:
            nearest = difflib.get_close_matches(knob, fields, n=1)
            known = ", ".join(fields) or "none"
            raise ConfigError(
                f"knobs.{knob}: method {name} has no such knob; it has {known}",
                hint=f"did you mean {nearest[0]}?" if nearest else "see docs/methods.md",
            )
    model = create_model(
        "Knobs", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **cast("Any", fields)
    )
    try:
        return dict(model(**given).model_dump())
    except ValidationError as exc:
        found = exc.errors()[0]
        raise ConfigError(
            f"knobs.{found['loc'][0]}: {found['msg']}, not {found['input']!r}", hint="see docs/methods.md"
        ) from exc


def accepted(function: object, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the knobs that one of a method's functions takes."""
    names = inspect.signature(cast("Any", function)).parameters
    return {name: value for name, value in knobs.items() if name in names}
