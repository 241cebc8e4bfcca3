"""Merge methods: how deltas combine. One file a method; the file's name is its name in the configuration.

A method is a module of pure functions on one weight:

    SLOTS                               tensors remembered per weight, each of its shape, with their dtypes
    layout(weight, count, **knobs)      instead of SLOTS, where they have other shapes: slot -> (dtype, shape)
                                        once `count` fine-tunes are folded
    fold(slots, arrival, **knobs)       one delta in -> new slots
    render(slots, totals, **knobs)      what to add to the base now; asks by parameter name for `kind`, for
                                        `figures`, what was recorded of each delta, [fine-tunes, 3] float64,
                                        and for `arrivals`, all deltas of this weight once more
    prepare(slots, **knobs)             optional: data derived from the state alone, merged into `slots`
                                        before `fold`; the daemon may compute it before the delta is there
    unfold(slots, arrival, **knobs)     optional, only where taking out is exact
    removable(**knobs)                  optional: with which knobs it is
    join(slots, others, **knobs)        optional, only where two states can be added
    length(totals, **knobs)             optional: the one factor in `render`, which finalize.cap replaces
    tally(slots)                        optional: a number that render needs summed over all weights
    model_ranks(elements, **knobs)      optional: `arrival.cuts` are the magnitudes of these ranks, 1 the
    weight_ranks(elements, **knobs)     smallest, among all `elements` of the model, or of the weight
    score(slots, totals, arrival, ...)  optional, with score_ranks(elements, **knobs): `arrival.score_cuts`
                                        are the scores of these ranks in the whole model, at render

and of constants: WEIGHTED, whether a fine-tune's own weight counts; ORDER_FREE; SEEDED, whether
`arrival.digest` is needed; PLAIN_SUM, whether the slot "sum" is that of all deltas as they are; SIDECAR, a
file that a fine-tune must bring; ELEMENTWISE, whether projected weights are treated as all others; LOCAL,
whether render asks no more of the totals than `count` and `factors`, which are known before a fold; PAPER and
NOTES for the table in docs/methods.md.

Keyword arguments with defaults are the method's knobs: the signature is the documentation and the
configuration schema. A weight of kind "added" arrives in panels, cut between rows, so what a method does to
it must be elementwise or row by row; with ELEMENTWISE every weight may.

Torch is imported with the first method that is loaded, and not with this.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from pydantic import ConfigDict, ValidationError, create_model

from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from streammerge.linalg import Delta

    Slots = dict[str, Tensor]
    Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

NAMES = (
    "spectral_cap", "opcm", "tsvm", "iso_c", "wudi", "regmean", "fisher", "ties", "dare", "breadcrumbs",
    "consensus_ta", "magmax", "average", "task_arithmetic", "pcb", "iso_cts",
)  # fmt: skip
DEFAULT = "spectral_cap"
SIDE = 1024  # of the matrix by which the size of a state is told

Kind = Literal["projected", "added"]


@dataclass(frozen=True)
class Weight:
    """What a method may know of a weight before it sees a value of it."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Arrival:
    """One weight of the fine-tune that is folded now.

    delta        fine-tune minus base, float32, the base's shape (or one panel of it, flat, where kind is
                 "added" or the method ELEMENTWISE); an adapter's projected weight comes as linalg.LowRank,
                 two factors that linalg's functions take
    digest       of the whole fine-tune; seeds whatever a method draws at random
    factor       the weight a person gave this fine-tune (1.0 unless configured)
    earlier      fine-tunes folded before it
    start        where this panel begins in the flat weight
    width        length of a row, the last dimension; a vector is one row
    cuts         magnitudes of the deltas at the method's ranks
    cut_places   where in the flat weight they stand, for `weight_ranks`: of equal ones the earlier is larger
    score_cuts   its scores at the method's ranks
    sidecar      float32 values that came with the fine-tune: for a panel, flat, as many as it has; or a
                 matrix; None where there are none
    sidecar_norm length of all values of the sidecar
    """

    name: str
    kind: Kind
    delta: Delta
    digest: str
    factor: float = 1.0
    earlier: int = 0
    start: int = 0
    width: int = 0
    cuts: tuple[float, ...] = ()
    cut_places: tuple[int, ...] = ()
    score_cuts: tuple[float, ...] = ()
    sidecar: Tensor | None = None
    sidecar_norm: float = 0.0


@dataclass(frozen=True)
class Totals:
    """Sums over all floating-point weights, tied ones once, in float64; filled by the engine.

    count            fine-tunes folded
    factors          sum of their weights
    mean_delta_norm  mean over fine-tunes of ||delta||
    max_delta_norm   largest ||delta||
    state_norm       norm of the first slot over all weights
    tally            sum of the method's `tally` over all weights
    """

    count: int = 0
    factors: float = 0.0
    mean_delta_norm: float = 0.0
    max_delta_norm: float = 0.0
    state_norm: float = 0.0
    tally: float = 0.0

    @property
    def lambda_(self) -> float:
        """OPCM's adaptive scale: the running sum is divided by it (arXiv 2501.09522 eq. 6)."""
        return self.state_norm / self.mean_delta_norm if self.mean_delta_norm else 1.0

    def ahead(self, factor: float) -> Totals:
        """What is known of the totals before one more fine-tune is folded; the rest is NaN."""
        unknown = math.nan
        return Totals(self.count + 1, self.factors + factor, unknown, unknown, unknown, unknown)

    def after(self, delta_norm: float, state_norm: float, factor: float, tally: float = 0.0) -> Totals:
        """Give the totals once one more fine-tune of norm `delta_norm` is folded."""
        count = self.count + 1
        return Totals(
            count=count,
            factors=self.factors + factor,
            mean_delta_norm=self.mean_delta_norm + (delta_norm - self.mean_delta_norm) / count,
            max_delta_norm=max(self.max_delta_norm, delta_norm),
            state_norm=state_norm,
            tally=tally,
        )


class Method(Protocol):
    """What every method module has; all else in this module's docstring is optional."""

    WEIGHTED: bool
    ORDER_FREE: bool
    PAPER: str
    NOTES: str

    def fold(self, slots: Slots, arrival: Arrival, **knobs: Any) -> Slots:  # noqa: ANN401 -- each method has its own
        """Take one delta in."""

    def render(self, slots: Slots, totals: Totals, **knobs: Any) -> Tensor:  # noqa: ANN401 -- each method has its own
        """Give what is added to the base."""


def load(name: str) -> Method:
    """Import the method called `name`, one of NAMES."""
    assert name in NAMES, name
    return cast("Method", importlib.import_module(f"{__name__}.{name}"))


def layout(method: Method, weight: Weight, count: int, knobs: Mapping[str, Any]) -> Layout:
    """Say what a method remembers of a weight once `count` fine-tunes are folded: slot -> (dtype, shape)."""
    if (given := getattr(method, "layout", None)) is not None:
        found: Layout = given(weight, count, **accepted(given, knobs))
        return found
    return {slot: (dtype, weight.shape) for slot, dtype in cast("Any", method).SLOTS.items()}


def is_elementwise(name: str) -> bool:
    """Whether a method sees no matrices, only elements and rows."""
    return bool(getattr(load(name), "ELEMENTWISE", False))


def is_local(name: str) -> bool:
    """Whether a weight can be rendered before the others are folded."""
    return bool(getattr(load(name), "LOCAL", False))


def rereads(name: str) -> bool:
    """Whether a method's render asks for every fine-tune once more."""
    return "arrivals" in _parameters(load(name).render)


def keeps_plain_sum(name: str) -> bool:
    """Whether the sum of all deltas, as they are, can be had."""
    return bool(getattr(load(name), "PLAIN_SUM", False))


def keeps_sum(name: str, knobs: Mapping[str, Any]) -> bool:
    """Whether the length of what is remembered can be compared with the deltas': it is a sum of theirs."""
    weight = Weight("", "projected", (1, 1))
    return next(iter(layout(load(name), weight, 0, knobs))) == "sum"


def can_unfold(name: str, knobs: Mapping[str, Any]) -> bool:
    """Whether a fine-tune is taken out by subtraction; otherwise what came after it is folded again."""
    method = load(name)
    removable = getattr(method, "removable", None)
    is_removable = removable is None or bool(removable(**accepted(removable, knobs)))
    return hasattr(method, "unfold") and is_removable


def removal(name: str, knobs: Mapping[str, Any]) -> Literal["subtract", "replay"]:
    """How a fine-tune is taken out."""
    return "subtract" if can_unfold(name, knobs) else "replay"


def sidecar(name: str) -> str:
    """Name of the file that a method wants beside a fine-tune's weights, "" for none."""
    return str(getattr(load(name), "SIDECAR", ""))


def knob_fields(name: str) -> dict[str, tuple[Any, Any]]:
    """List a method's knobs as name -> (annotated type, default), over fold and render."""
    method = load(name)
    fields: dict[str, tuple[Any, Any]] = {}
    functions = [getattr(method, name) for name in ("fold", "render", "layout") if hasattr(method, name)]
    for function in functions:
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
    names = _parameters(function)
    return {name: value for name, value in knobs.items() if name in names}


@cache
def _parameters(function: object) -> frozenset[str]:
    return frozenset(inspect.signature(cast("Any", function)).parameters)


@dataclass(frozen=True)
class Description:
    """A method in one line, for people.

    state      size of what it remembers, in float32 copies of a square matrix; and of any other weight
    data       what it needs besides the weights, "" for nothing
    removal    "subtract" or "replay": how a fine-tune is taken out
    """

    name: str
    knobs: dict[str, Any]
    state: float
    state_of_others: float
    data: str
    weighted: bool
    order_free: bool
    removal: Literal["subtract", "replay"]
    paper: str
    notes: str


def describe(name: str) -> Description:
    """Describe a method at its default knobs."""
    method, knobs = load(name), resolve(name, {})
    sizes: list[float] = []
    kinds: tuple[Kind, ...] = ("projected", "added")
    for kind in kinds:
        weight = Weight("", kind, (SIDE, SIDE))
        held = layout(method, weight, 1, knobs).values()
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in held)
        sizes.append(round(size / (4 * weight.elements), 1))
    data = sidecar(name) or ("every fine-tune again at each version" if rereads(name) else "")
    return Description(
        name,
        knobs,
        sizes[0],
        sizes[1],
        data,
        method.WEIGHTED,
        method.ORDER_FREE,
        removal(name, knobs),
        method.PAPER,
        method.NOTES,
    )
