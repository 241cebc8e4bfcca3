"""One suite over all merge methods: each equals its formula, written here in float64, and keeps its laws."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammerge import finalize, linalg, methods, plan
from streammerge.config.finalize import Cap
from streammerge.errors import ConfigError
from streammerge.methods import Arrival, Totals, Weight, dare
from streammerge.state import statistics_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from streammerge.methods import Kind, Slots

Model = dict[str, Tensor]  # the deltas of one fine-tune, by weight

WEIGHTS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "square": ("projected", (24, 24)),
    "tall": ("projected", (40, 12)),
    "wide": ("projected", (12, 40)),
    "row": ("projected", (1, 20)),
    "column": ("projected", (20, 1)),
    "one": ("projected", (1, 1)),
    "embedding": ("added", (30, 8)),
    "bias": ("added", (17,)),
    "scalar": ("added", ()),
    "conv": ("added", (4, 2, 3)),
}
MATRICES = [name for name, (kind, _) in WEIGHTS.items() if kind == "projected"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With matrices as small as these, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kind_of(name: str) -> Kind:
    """How a weight of these models is merged."""
    return WEIGHTS[name][0]


def empty(method: str, knobs: dict[str, Any], name: str) -> Slots:
    """What is remembered of a weight before the first fine-tune: zeros, in the layout of no fine-tune."""
    layout = methods.layout(methods.load(method), Weight(name, *WEIGHTS[name]), 0, knobs)
    return {slot: torch.zeros(shape, dtype=dtype) for slot, (dtype, shape) in layout.items()}


def digest_of(model: Model) -> str:
    """Know a fine-tune by its content."""
    found = hashlib.sha256()
    for values in model.values():
        found.update(values.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def drawn(digest: str, name: str, *shape: int) -> Tensor:
    """Draw normal numbers that follow from a fine-tune's content, float32."""
    seed = int(hashlib.sha256(f"{digest} {name}".encode()).hexdigest()[:12], 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brought(method: str, knobs: dict[str, Any], digest: str, name: str) -> Tensor | None:
    """What a fine-tune has beside a weight: Fisher information, or a Gram matrix but for some weights."""
    kind, shape = WEIGHTS[name]
    if method == "fisher" and not (knobs.get("missing") == "uniform" and int(digest, 16) % 2):
        return drawn(digest, name, *shape).square()
    if method == "regmean" and kind == "projected" and int(digest, 16) % 7 != len(name) % 7:
        inputs = drawn(digest, name, 2 * shape[1] + 3, shape[1])
        return inputs.T @ inputs
    return None


def length_brought(knobs: dict[str, Any], digest: str, model: Model) -> float:
    """The length of all Fisher information of a fine-tune; where it has none, every element's is one."""
    found = [brought("fisher", knobs, digest, name) for name in model]
    sizes = [values.numel() for values in model.values()]
    return math.sqrt(
        sum(n if v is None else float(v.double().square().sum()) for v, n in zip(found, sizes, strict=True))
    )


def ranked(values: Tensor, ranks: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Elements of these ranks, 1 the smallest, and their places; of equal ones the earlier is larger."""
    found = values.reshape(-1).flip(0).sort(stable=True)
    places = [values.numel() - 1 - int(found.indices[rank - 1]) for rank in ranks]
    return tuple(float(found.values[rank - 1]) for rank in ranks), tuple(places)


def everything(model: Model) -> Tensor:
    """All values of a model in one vector."""
    return torch.cat([values.reshape(-1) for values in model.values()])


def arriving(
    method: str, knobs: dict[str, Any], model: Model, earlier: int = 0, factor: float = 1.0
) -> dict[str, Arrival]:
    """Put a fine-tune before a method as the engine does, with all that it asks for."""
    found: Any = methods.load(method)
    digest = digest_of(model)

    def ranks(of: str, elements: int) -> tuple[int, ...]:
        given = getattr(found, of, None)
        return given(elements, **methods.accepted(given, knobs)) if given and elements else ()

    everywhere = everything(model).abs()
    whole, _ = ranked(everywhere, ranks("model_ranks", everywhere.numel()))
    arrivals = {}
    for name, delta in model.items():
        own, places = ranked(delta.abs(), ranks("weight_ranks", delta.numel()))
        sidecar = brought(method, knobs, digest, name)
        arrivals[name] = Arrival(
            name,
            kind_of(name),
            delta,
            digest,
            factor,
            earlier=earlier,
            width=plan.row_of(WEIGHTS[name][1]),
            cuts=whole or own,
            cut_places=places,
            sidecar=None if sidecar is None else sidecar.to(delta.device),
            sidecar_norm=length_brought(knobs, digest, model) if method == "fisher" else 0.0,
        )
    return arrivals


@dataclass
class Folded:
    """What a method remembers of several fine-tunes, with the totals that the engine would have."""

    method: str
    knobs: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, methods.Slots] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    figures: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    arrived: list[dict[str, Arrival]] = field(default_factory=list)

    def fold(self, model: Model, factor: float = 1.0) -> Folded:
        """Take one fine-tune in."""
        found = methods.load(self.method)
        knobs = methods.accepted(found.fold, self.knobs)
        self.arrived.append(arriving(self.method, self.knobs, model, self.totals.count, factor))
        for name, arrival in self.arrived[-1].items():
            delta = model[name]
            if name not in self.slots:
                zeros = empty(self.method, self.knobs, name)
                self.slots[name] = {slot: values.to(delta.device) for slot, values in zeros.items()}
            self.slots[name] = found.fold(self.slots[name], arrival, **knobs)
            is_spectral = arrival.kind == "projected"
            figures = statistics_of(delta, tuple(delta.shape), linalg.squares(delta), is_spectral=is_spectral)
            self.figures.setdefault(name, []).append(figures)
        tally = getattr(found, "tally", lambda _: 0.0)
        tallied = sum(tally(slots) for slots in self.slots.values())
        self.totals = self.totals.after(norm(model), norm(self.sums()), factor, tallied)
        return self

    def unfold(self, index: int) -> dict[str, methods.Slots]:
        """What is remembered once fine-tune number `index` is taken out."""
        found: Any = methods.load(self.method)
        knobs = methods.accepted(found.unfold, self.knobs)
        return {n: found.unfold(self.slots[n], a, **knobs) for n, a in self.arrived[index].items()}

    def sums(self) -> Model:
        """The first slot of every weight."""
        return {name: next(iter(slots.values())) for name, slots in self.slots.items()}

    def render(self) -> Model:
        """What is added to the base."""
        return {name: self.rendered(name, slots) for name, slots in self.slots.items()}

    def rendered(self, name: str, slots: methods.Slots, cut: slice | None = None) -> Tensor:
        """Render one weight, or a panel of one, with all that the engine would give."""
        found = methods.load(self.method)
        given = {
            **self.knobs,
            "figures": torch.tensor(self.figures[name], dtype=torch.float64),
            "kind": kind_of(name),
            "arrivals": (part(a, cut) if cut else a for a in self.again(name)),
        }
        rendered: Tensor = found.render(slots, self.totals, **methods.accepted(found.render, given))
        return rendered

    def again(self, name: str) -> Iterator[Arrival]:
        """All deltas of a weight once more, with the scores at the ranks that the method asks for."""
        found: Any = methods.load(self.method)
        for arrivals in self.arrived:
            cuts: tuple[float, ...] = ()
            if hasattr(found, "score_ranks"):
                scores = everything(
                    {n: found.score(self.slots[n], self.totals, a) for n, a in arrivals.items()}
                )
                wanted = found.score_ranks(scores.numel(), **methods.accepted(found.score_ranks, self.knobs))
                cuts, _ = ranked(scores, wanted)
            yield replace(arrivals[name], score_cuts=cuts)


def part(arrival: Arrival, cut: slice) -> Arrival:
    """One panel of an added weight, flat."""
    delta = cast("Tensor", arrival.delta).reshape(-1)[cut]
    sidecar = None if arrival.sidecar is None else arrival.sidecar.reshape(-1)[cut]
    return replace(arrival, delta=delta, sidecar=sidecar, start=cut.start)


def norm(model: Model) -> float:
    """Frobenius norm over all weights, in float64."""
    return math.sqrt(sum(float(values.double().square().sum()) for values in model.values()))


def distance(one: Model, other: Model) -> float:
    """||one - other|| / ||other||; where nothing is expected, ||one||."""
    return norm({n: one[n].double() - other[n].double() for n in other}) / (norm(other) or 1.0)


def fine_tunes(count: int, *, rank: int | None = None, seed: int = 0, shared: float = 0.3) -> list[Model]:
    """Draw fine-tunes whose deltas have a direction in common, as real ones do."""
    random = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...]) -> Tensor:
        if rank is None or len(shape) != 2:
            return torch.randn(shape, generator=random) * 0.01
        left = torch.randn(shape[0], rank, generator=random)
        return left @ torch.randn(rank, shape[1], generator=random) * 0.01

    common = {name: one(shape) * shared for name, (_, shape) in WEIGHTS.items()}
    return [{n: common[n] + one(shape) for n, (_, shape) in WEIGHTS.items()} for _ in range(count)]


def coarse(count: int, seed: int) -> list[Model]:
    """Draw fine-tunes of few bits, as bf16 has them: many equal magnitudes, and float32 sums are exact."""
    return [
        {n: (values * 2**13).round() / 2**13 for n, values in model.items()}
        for model in fine_tunes(count, seed=seed)
    ]


# ------------------------------------------------------------------------ the formulas, in float64, in one go


def average(models: list[Model], factors: list[float]) -> Model:
    """sum_i w_i delta_i / sum_i w_i."""
    pairs = list(zip(models, factors, strict=True))
    return {n: torch.stack([w * m[n].double() for m, w in pairs]).sum(0) / sum(factors) for n in models[0]}


def task_arithmetic(models: list[Model], factors: list[float], *, scale: float = 0.3) -> Model:
    """scale * sum_i w_i delta_i."""
    pairs = list(zip(models, factors, strict=True))
    return {n: scale * torch.stack([w * m[n].double() for m, w in pairs]).sum(0) for n in models[0]}


def opcm(models: list[Model], factors: list[float], *, alpha: float = 0.5, tail: str = "scalar") -> Model:
    """The paper's recursion, rescaled at each step: tau_t = (lambda_{t-1} tau_{t-1} + P(x_t)) / lambda_t."""
    tau, lambda_ = {n: x.double() for n, x in models[0].items()}, 1.0
    for t, model in enumerate(models[1:], 2):
        whole = {}
        for name, delta in model.items():
            x = delta.double()
            if WEIGHTS[name][0] == "projected" and tau[name].any():
                x = projection(lambda_ * tau[name], x, alpha, tail)
            whole[name] = lambda_ * tau[name] + x
        lambda_ = norm(whole) / (sum(norm(m) for m in models[:t]) / t)
        tau = {n: d / lambda_ for n, d in whole.items()}
    return tau


def projection(d: Tensor, x: Tensor, alpha: float, tail: str) -> Tensor:
    """P(X) by the full SVD of D; of the tail only as many directions as float32 can tell from rounding."""
    u, s, vh = torch.linalg.svd(d)
    r = int((s.cumsum(0) / s.sum() <= alpha).sum())
    q = int((s > max(d.shape) * 1.19e-7 * s[0]).sum())
    removed = torch.zeros_like(d)
    c = u.T @ x @ vh.T
    removed[:r, :r] = c[:r, :r]
    if tail == "diagonal":
        for i in range(r, q):
            removed[i, i] = c[i, i]
    p: Tensor = x - u @ removed @ vh
    if tail == "scalar":
        d_tail = d - u[:, :r] * s[:r] @ vh[:r]
        p = p - (p * d_tail).sum() / d_tail.square().sum() * d_tail
    return p


def spectral_cap(
    models: list[Model],
    factors: list[float],
    *,
    level: str = "interference",
    strength: float = 0.93,
    kappa: float = 0.6,
    beta: float = 2.0,
) -> Model:
    """U min(beta s, c) V^T of the sum of each projected weight, by the full SVD; the mean of all others."""
    del factors

    def clamped(values: Tensor) -> float:
        middle = float(values.quantile(0.5))
        return math.prod(min(max(float(v), middle / 3), middle * 3) for v in values) ** (1 / len(values))

    def of_one(name: str) -> Tensor:
        deltas = [m[name].double() for m in models]
        total = torch.stack(deltas).sum(0)
        if WEIGHTS[name][0] == "added":
            return total / len(models)
        moved = [torch.linalg.svdvals(d) for d in deltas if d.any()]
        if len(moved) < 2:
            return total
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        taus = torch.stack([(v**4).sum().sqrt() / (v**2).sum().sqrt() for v in moved])
        tau_of_sum = (s**4).sum().sqrt() / (s**2).sum().sqrt()
        cap = 0.9 * strength * clamped(taus) * float((taus.square().sum().sqrt() / tau_of_sum).sqrt())
        if level == "fixed":
            cap = kappa * clamped(torch.stack([v[0] for v in moved]))
        capped: Tensor = u * (beta * s).clamp(max=cap) @ vh
        return capped

    return {name: of_one(name) for name in models[0]}


def kept_largest(values: Tensor, density: float) -> float:
    """The least magnitude among the largest int(d * density) elements, and all that equal it."""
    size = values.numel()
    return float(values.abs().reshape(-1).sort().values[max(size - int(size * density), 1) - 1])


def elected(parts: list[Model], factors: list[float], agg: str) -> Model:
    """TIES steps 2 and 3: the sign of the sum, of the majority where it is zero; merge what has it."""
    deltas = {n: torch.stack([w * m[n] for m, w in zip(parts, factors, strict=True)]) for n in parts[0]}
    signs = {n: d.sum(0).sign() for n, d in deltas.items()}
    majority = 1.0 if sum(float(found.sum()) for found in signs.values()) >= 0 else -1.0
    weights = torch.tensor(factors, dtype=torch.float64).abs()

    def merged(name: str) -> Tensor:
        sign = torch.where(signs[name] == 0, majority, signs[name])
        agreeing = deltas[name] * (deltas[name] * sign > 0)
        if agg == "max":
            return sign * agreeing.abs().amax(0)
        if agg == "sum":
            return agreeing.sum(0)
        shares = weights.reshape(-1, *[1] * sign.ndim) * (agreeing != 0)
        return agreeing.sum(0) / shares.sum(0).where(agreeing.any(0), torch.ones_like(sign))

    return {name: merged(name) for name in deltas}


def ties(
    models: list[Model],
    factors: list[float],
    *,
    density: float = 0.2,
    scope: str = "model",
    agg: str = "mean",
    scale: float = 1.0,
) -> Model:
    """Trim, elect, merge: section 3 of the paper."""
    trimmed = []
    for model in models:
        cut = kept_largest(everything(model), density)
        cuts = {n: kept_largest(d, density) if scope == "tensor" else cut for n, d in model.items()}
        trimmed.append({n: d.double() * (d.abs() >= cuts[n]) for n, d in model.items()})
    return {n: scale * found for n, found in elected(trimmed, factors, agg).items()}


def dare_formula(
    models: list[Model], factors: list[float], *, p: float = 0.5, agg: str = "sum", scale: float = 0.3
) -> Model:
    """Drop and rescale: scale * sum_i w_i mask_i delta_i / (1 - p), or the election over them."""

    def thinned(model: Model) -> Model:
        digest = digest_of(model)
        masks = {n: dare.kept(Arrival(n, kind_of(n), d, digest), p) for n, d in model.items()}
        return {n: d.double() * masks[n] / (1 - p) for n, d in model.items()}

    parts = [thinned(model) for model in models]
    if agg == "ties":
        return {n: scale * found for n, found in elected(parts, factors, "mean").items()}
    return task_arithmetic(parts, factors, scale=scale)


def breadcrumbs(
    models: list[Model],
    factors: list[float],
    *,
    axis: str = "row",
    keep: float = 0.2,
    drop_top: float = 0.1,
    scale: float = 0.4,
) -> Model:
    """Of each row or weight leave out the int(d * drop_top) largest, keep the int(d * keep) that follow."""

    def middle(delta: Tensor) -> Tensor:
        width = delta.shape[-1] if axis == "row" and delta.ndim else delta.numel()
        rows = delta.double().reshape(-1, width)
        kept = int(width * keep)
        dropped = min(int(width * drop_top), width - kept)
        order = rows.abs().argsort(dim=1, descending=True, stable=True)[:, dropped : dropped + kept]
        found = torch.zeros_like(rows).scatter(1, order, rows.gather(1, order))
        return found.reshape(delta.shape)

    parts = [{n: middle(d) for n, d in model.items()} for model in models]
    return task_arithmetic(parts, factors, scale=scale)


def magmax(models: list[Model], factors: list[float], *, scale: float = 0.5) -> Model:
    """Of every element the delta of largest magnitude."""
    del factors

    def furthest(name: str) -> Tensor:
        deltas = torch.stack([m[name].double() for m in models])
        return scale * deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]

    return {name: furthest(name) for name in models[0]}


def consensus_ta(
    models: list[Model], factors: list[float], *, mask_lambda: float = 0.4, k: int = 2, scale: float = 0.3
) -> Model:
    """scale * sum where at least k fine-tunes have |delta| > mask_lambda |sum - delta|."""
    del factors

    def claimed(name: str) -> Tensor:
        deltas = torch.stack([m[name].double() for m in models])
        total = deltas.sum(0)
        claims = (deltas.abs() > mask_lambda * (total - deltas).abs()).sum(0)
        return scale * total * (claims >= k)

    return {name: claimed(name) for name in models[0]}


def svd(matrix: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of what float32 can tell from rounding, at the size of `like`: u, s, v."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    bound = torch.linalg.svdvals(matrix if like is None else like)[0] if s.numel() else 0.0
    q = int((s > max(matrix.shape) * 1.19e-7 * bound).sum())
    return u[:, :q], s[:q], vh[:q].T


def polar(matrix: Tensor) -> Tensor:
    """Nearest orthonormal columns: U V^T."""
    u, _, v = svd(matrix)
    return u @ v.T


def of_matrices(models: list[Model], one: Callable[[str, list[Tensor]], Tensor], scale: float = 1.0) -> Model:
    """Apply a formula to the deltas of every projected weight; scale times the mean for all others."""
    found = {}
    for name in models[0]:
        deltas = [m[name].double() for m in models]
        is_matrix = kind_of(name) == "projected"
        found[name] = one(name, deltas) if is_matrix else scale * torch.stack(deltas).mean(0)
    return found


def iso_c(models: list[Model], factors: list[float], *, scale: float = 1.0) -> Model:
    """scale * mean(s) U V^T of the sum."""
    del factors

    def flat(_: str, deltas: list[Tensor]) -> Tensor:
        u, s, v = svd(torch.stack(deltas).sum(0))
        return scale * s.mean() * u @ v.T

    return of_matrices(models, flat, scale)


def tsvm(models: list[Model], factors: list[float], *, scale: float = 1.0) -> Model:
    """Each fine-tune's floor(r / T) leading triples; polar(U) diag(s) polar(V)^T of all of them."""
    del factors

    def decorrelated(_: str, deltas: list[Tensor]) -> Tensor:
        budget = min(deltas[0].shape) // len(deltas)
        if not budget:
            return scale * torch.stack(deltas).mean(0)
        triples = [[part[..., :budget] for part in svd(d)] for d in deltas]
        u, s, v = (torch.cat(parts, -1) for parts in zip(*triples, strict=True))
        return scale * polar(u) * s @ polar(v).T

    return of_matrices(models, decorrelated, scale)


def wudi(models: list[Model], factors: list[float], *, ridge: float = 1e-2) -> Model:
    """B (A + ridge tr(A)/n I)^-1 with A = sum D^T D / ||D||^2, B = sum D D^T D / ||D||^2."""
    del factors

    def solved(_: str, deltas: list[Tensor]) -> Tensor:
        grams = [d.T @ d / d.square().sum() for d in deltas]
        a = torch.stack(grams).sum(0)
        b = torch.stack([d @ g for d, g in zip(deltas, grams, strict=True)]).sum(0)
        n = a.shape[0]
        found: Tensor = b @ torch.linalg.inv(a + ridge * a.trace() / n * torch.eye(n, dtype=torch.float64))
        return found

    return of_matrices(models, solved)


def regmean(models: list[Model], factors: list[float], *, a: float = 0.95, missing: str = "refuse") -> Model:
    """(sum D_t G_t) (sum G_t)^-1, off the diagonal a * G_t; a missing G_t is I times the others' mean."""
    del factors, missing
    digests = [digest_of(model) for model in models]

    def solved(name: str, deltas: list[Tensor]) -> Tensor:
        one = torch.eye(deltas[0].shape[1], dtype=torch.float64)
        given = [brought("regmean", {}, digest, name) for digest in digests]
        there = [g.double() for g in given if g is not None]
        if not there:
            return torch.stack(deltas).mean(0)
        strength = torch.stack([g.diagonal().mean() for g in there]).mean()
        grams = [strength * one if g is None else a * g.double() + (1 - a) * g.double() * one for g in given]
        products = [d @ g for d, g in zip(deltas, grams, strict=True)]
        found: Tensor = torch.stack(products).sum(0) @ torch.linalg.inv(torch.stack(grams).sum(0))
        return found

    return of_matrices(models, solved)


def fisher(
    models: list[Model],
    factors: list[float],
    *,
    minimal: float = 1e-6,
    normalize: bool = True,
    missing: str = "refuse",
) -> Model:
    """sum w F' delta / sum w F' with F' = (F + minimal) / (||F|| + minimal), or F + minimal."""
    knobs = {"missing": missing}
    digests = [digest_of(model) for model in models]
    lengths = [length_brought(knobs, d, m) + minimal for d, m in zip(digests, models, strict=True)]

    def weighted(name: str) -> Tensor:
        deltas = torch.stack([m[name].double() for m in models])
        given = [brought("fisher", knobs, digest, name) for digest in digests]
        ones = torch.ones_like(deltas[0])
        shares = torch.stack(
            [
                w * ((ones if f is None else f.double()) + minimal) / (size if normalize else 1.0)
                for f, w, size in zip(given, factors, lengths, strict=True)
            ]
        )
        return (shares * deltas).sum(0) / shares.sum(0)

    return {name: weighted(name) for name in models[0]}


def stretched(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp to [low, high] and map to [0, 1]."""
    return (values.clamp(low, high) - low) / (high - low)


def pcb(
    models: list[Model], factors: list[float], *, ratio: float = 0.1, lam: float = 1.0, scale: float = 1.0
) -> Model:
    """The authors' root script over the whole model as one vector a fine-tune."""
    del factors
    deltas = torch.stack([everything(model).double() for model in models])
    total, size = deltas.sum(0), deltas.shape[1]
    mass, weight = torch.zeros_like(total), torch.zeros_like(total)
    for delta in deltas:
        order = delta.abs().sort().values
        low, high = order[int(size * 1e-4)], order[int(size * (1 - 1e-4) - 1)]
        score = (len(models) * stretched(delta.abs(), low, high) ** 2).exp() * (delta * total).tanh()
        share = stretched(score, score.sort().values[int(size * (1 - ratio))], score.max())
        mass += share * delta.sign() * delta.abs().clamp(low, high) * lam
        weight += share
    merged = (scale * mass / weight.clamp(min=1e-12)).split([v.numel() for v in models[0].values()])
    return {n: found.reshape(v.shape) for (n, v), found in zip(models[0].items(), merged, strict=True)}


def iso_cts(
    models: list[Model], factors: list[float], *, common_space_fraction: float = 0.8, scale: float = 1.0
) -> Model:
    """Iso-C over the sum's leading directions and each fine-tune's leading ones outside of them."""
    del factors
    count = len(models)

    def flat(_: str, deltas: list[Tensor]) -> Tensor:
        rank = min(deltas[0].shape)
        own = min(round((rank - int(rank * common_space_fraction)) / count), rank // count)
        parts = [[p[..., : rank - own * count] for p in svd(torch.stack(deltas).sum(0))]]
        outside = torch.eye(deltas[0].shape[0], dtype=torch.float64) - parts[0][0] @ parts[0][0].T
        parts += [[p[..., :own] for p in svd(outside @ d, like=d)] for d in deltas]
        u, s, v = (torch.cat(found, -1) for found in zip(*parts, strict=True))
        return scale * s.mean() * polar(u) @ polar(v).T

    return of_matrices(models, flat, scale)


FORMULAS: dict[str, Callable[..., Model]] = {
    "opcm": opcm,
    "average": average,
    "task_arithmetic": task_arithmetic,
    "spectral_cap": spectral_cap,
    "ties": ties,
    "dare": dare_formula,
    "breadcrumbs": breadcrumbs,
    "magmax": magmax,
    "consensus_ta": consensus_ta,
    "iso_c": iso_c,
    "tsvm": tsvm,
    "wudi": wudi,
    "regmean": regmean,
    "fisher": fisher,
    "pcb": pcb,
    "iso_cts": iso_cts,
}
TAILS = ("scalar", "diagonal", "keep")
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"scale": 1.7}),
    ("spectral_cap", {}),
    ("spectral_cap", {"strength": 0.5, "beta": 1.0}),
    ("spectral_cap", {"level": "fixed"}),
    ("spectral_cap", {"level": "fixed", "kappa": 1.5, "beta": 3.0}),
    *(
        ("ties", {"agg": agg, "scope": scope})
        for agg in ("mean", "sum", "max")
        for scope in ("model", "tensor")
    ),
    ("ties", {}),
    ("ties", {"density": 1.0, "agg": "mean", "scale": 0.4}),
    ("dare", {}),
    ("dare", {"p": 0.9, "scale": 1.0}),
    ("dare", {"agg": "ties", "p": 0.3}),
    ("breadcrumbs", {}),
    ("breadcrumbs", {"axis": "tensor", "keep": 0.4, "drop_top": 0.05}),
    ("breadcrumbs", {"keep": 1.0, "drop_top": 0.3, "scale": 1.0}),
    ("magmax", {}),
    *(("consensus_ta", {"k": k}) for k in (1, 2, 3)),
    ("consensus_ta", {"k": 2, "mask_lambda": 1.0, "scale": 1.0}),
    ("iso_c", {}),
    ("iso_c", {"scale": 1.5}),
    ("tsvm", {}),
    ("tsvm", {"scale": 0.5}),
    ("wudi", {}),
    ("wudi", {"ridge": 1.0}),
    ("regmean", {}),
    ("regmean", {"a": 0.0}),
    ("fisher", {}),
    ("fisher", {"normalize": False, "minimal": 0.1}),
    ("fisher", {"missing": "uniform"}),
    ("pcb", {}),
    ("pcb", {"ratio": 0.3, "lam": 1.2, "scale": 0.5}),
    ("iso_cts", {}),
    ("iso_cts", {"common_space_fraction": 0.5, "scale": 1.5}),
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("opcm", {"tail": tail}) for tail in TAILS),
    *(("opcm", {"tail": tail, "alpha": alpha}) for tail in TAILS for alpha in (0.0, 0.2, 0.95, 0.999)),
    ("opcm", {}),
    *OTHERS,
]


def named(cases: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """Give each case an id."""
    return ["-".join([name, *(f"{k}-{v}" for k, v in knobs.items())]) for name, knobs in cases]


FEW: list[tuple[str, dict[str, Any]]] = [("opcm", {}), ("opcm", {"tail": "diagonal"}), *OTHERS]
REMOVABLE = [case for case in OTHERS if methods.can_unfold(*case)]
JOINABLE = [case for case in OTHERS if hasattr(methods.load(case[0]), "join")]
PLAIN = {
    "opcm",
    "spectral_cap",
    "tsvm",
    "iso_c",
    "consensus_ta",
    "average",
    "task_arithmetic",
    "pcb",
    "iso_cts",
}
every_case = pytest.mark.parametrize(("method", "knobs"), CASES, ids=named(CASES))
few_cases = pytest.mark.parametrize(("method", "knobs"), FEW, ids=named(FEW))
every_method = pytest.mark.parametrize("method", methods.NAMES)
seeds = st.integers(0, 1 << 20)


def tolerance_of(method: str, knobs: dict[str, Any]) -> float:
    """How near float32 comes to a formula in float64."""
    if knobs.get("level") == "fixed":
        return 1e-3  # top singular values are by power iteration
    return {"iso_cts": 1e-4, "pcb": 1e-4}.get(method, 2e-5)


def test_every_method_has_a_formula() -> None:
    """No method is offered that this suite does not know."""
    assert set(FORMULAS) == set(methods.NAMES) == {name for name, _ in CASES}
    assert methods.DEFAULT in methods.NAMES


@every_case
@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "rank-2"])
def test_it_equals_its_formula(method: str, knobs: dict[str, Any], rank: int | None) -> None:
    """After every one of five fine-tunes the merged delta is that of the formula in float64."""
    models, factors = fine_tunes(5, rank=rank), [1.0, 0.5, 2.0, 1.0, 0.25]
    folded = Folded(method, knobs)
    for t in range(1, 6):
        folded.fold(models[t - 1], factors[t - 1])
        expected = FORMULAS[method](models[:t], factors[:t], **knobs)
        assert distance(folded.render(), expected) < tolerance_of(method, knobs), t


@pytest.mark.parametrize("method", ["ties", "dare", "breadcrumbs", "magmax", "fisher"])
@settings(deadline=None, max_examples=3)
@given(seed=seeds)
def test_equal_magnitudes_are_decided_as_the_formula_does(method: str, seed: int) -> None:
    """Of deltas in few bits, with ties and cancellations, no element is taken otherwise."""
    models = coarse(4, seed)
    cases = [knobs for name, knobs in OTHERS if name == method and knobs.get("p", 0.5) == 0.5]
    for knobs in [*cases, *([{"agg": "ties"}] if method == "dare" else [])]:
        folded = Folded(method, knobs)
        for model in models:
            folded.fold(model)
        got, expected = folded.render(), FORMULAS[method](models, [1.0] * 4, **knobs)
        if method == "magmax":  # which of two equal magnitudes counts has a test of its own
            got, expected = ({n: v.abs() for n, v in found.items()} for found in (got, expected))
        assert distance(got, expected) < 1e-5


def test_of_equal_magnitudes_magmax_takes_the_later() -> None:
    """Wherever two fine-tunes moved an element equally far, the second one decides."""
    (model,) = fine_tunes(1)
    opposite = {name: -values for name, values in model.items()}
    folded = Folded("magmax", {"scale": 1.0}).fold(model).fold(opposite)
    assert all(torch.equal(values, opposite[name]) for name, values in folded.render().items())


@few_cases
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_delta_of_zero_changes_nothing(method: str, knobs: dict[str, Any], where: str) -> None:
    """A weight that a fine-tune leaves as it is keeps its state, bit for bit, whenever it comes.

    What only says how much the fine-tunes know of an element counts it: Fisher information, Gram matrices.
    TSV-M's lists grow shorter as with any other.
    """
    models = fine_tunes(3)
    zero = {name: torch.zeros_like(values) for name, values in models[0].items()}
    order = [zero, *models] if where == "first" else [*models, zero]
    without, folded = Folded(method, knobs), Folded(method, knobs)
    for model in models:
        without.fold(model)
    for model in order:
        folded.fold(model)
    counted = {"information", "gram", "grams", "left", "values", "right"}
    if method == "wudi":
        counted = set()
    for name, slots in without.slots.items():
        for slot in set(slots) - counted:
            assert torch.equal(folded.slots[name][slot], slots[slot]), (name, slot)


@pytest.mark.parametrize("knobs", [{}, {"scale": 0.5}], ids=str)
def test_a_delta_of_zero_leaves_what_tsvm_keeps_of_others(knobs: dict[str, Any]) -> None:
    """Its triples are zeros: the merge is that of the others with the budget that its coming leaves them."""
    models = fine_tunes(3)
    zero = {name: torch.zeros_like(values) for name, values in models[0].items()}
    got = Folded("tsvm", knobs)
    for model in (models[0], zero, *models[1:]):
        got.fold(model)
    for name in ("square", "tall", "wide"):
        budget = min(WEIGHTS[name][1]) // 4
        triples = [[p[..., :budget] for p in svd(m[name].double())] for m in models]
        u, s, v = (torch.cat(parts, -1) for parts in zip(*triples, strict=True))
        expected = knobs.get("scale", 1.0) * polar(u) * s @ polar(v).T
        assert distance({name: got.render()[name]}, {name: expected}) < 2e-5


@pytest.mark.parametrize("method", sorted(PLAIN))
def test_the_first_delta_is_taken_whole(method: str) -> None:
    """Where nothing was folded yet there is nothing to leave alone: the sum is the delta, bit for bit."""
    (model,) = fine_tunes(1)
    folded = Folded(method).fold(model)
    assert all(torch.equal(folded.sums()[name], values) for name, values in model.items())


ALONE: list[tuple[str, dict[str, Any], float]] = [
    ("opcm", {}, 1e-6),
    ("average", {}, 1e-7),
    ("spectral_cap", {}, 0.0),
    ("task_arithmetic", {"scale": 1.0}, 0.0),
    ("ties", {"density": 1.0}, 0.0),
    ("dare", {"p": 0.0, "scale": 1.0}, 0.0),
    ("breadcrumbs", {"keep": 1.0, "drop_top": 0.0, "scale": 1.0}, 0.0),
    ("magmax", {"scale": 1.0}, 0.0),
    ("consensus_ta", {"k": 1, "scale": 1.0}, 0.0),
    ("tsvm", {}, 2e-6),
    ("wudi", {}, 3e-2),
    ("wudi", {"ridge": 1e-9}, 1e-4),
    ("regmean", {}, 1e-6),
    ("fisher", {}, 1e-6),
    ("fisher", {"missing": "uniform", "normalize": False}, 1e-6),
]


@pytest.mark.parametrize(
    ("method", "knobs", "tolerance"), ALONE, ids=named((name, knobs) for name, knobs, _ in ALONE)
)
def test_a_single_fine_tune_is_itself(method: str, knobs: dict[str, Any], tolerance: float) -> None:
    """Where nothing competes and nothing is scaled or dropped, the merge is the fine-tune."""
    (model,) = fine_tunes(1)
    assert distance(Folded(method, knobs).fold(model).render(), model) <= tolerance


def test_a_single_fine_tune_is_itself_but_where_the_definition_says_otherwise() -> None:
    """Iso-C and Iso-CTS even out one spectrum too, PCB drops one's own small elements."""
    (model,) = fine_tunes(1)
    alone = {name for name, _, _ in ALONE}
    assert set(methods.NAMES) - alone == {"iso_c", "iso_cts", "pcb"}
    for method in set(methods.NAMES) - alone:
        assert distance(Folded(method).fold(model).render(), model) > 0.1


@few_cases
def test_a_fold_keeps_its_inputs_and_gives_what_the_layout_says(method: str, knobs: dict[str, Any]) -> None:
    """New slots are contiguous, of the layout's dtypes and shapes; neither old slots nor the delta change."""
    models = fine_tunes(3)
    folded = Folded(method, knobs)
    for count, model in enumerate(models, 1):
        held = {n: dict(slots) for n, slots in folded.slots.items()}
        before = {n: {s: v.clone() for s, v in slots.items()} for n, slots in held.items()}
        delta = {n: values.clone() for n, values in model.items()}
        folded.fold(model)
        merged = folded.render()
        for name, values in model.items():
            layout = methods.layout(methods.load(method), Weight(name, *WEIGHTS[name]), count, knobs)
            new = folded.slots[name]
            assert {slot: (v.dtype, tuple(v.shape)) for slot, v in new.items()} == layout
            assert all(v.is_contiguous() and v.device == values.device for v in new.values())
            assert torch.equal(values, delta[name])
            assert (merged[name].shape, merged[name].dtype) == (values.shape, torch.float32)
            for slot, old in before.get(name, {}).items():
                assert torch.equal(held[name][slot], old)


@few_cases
def test_many_fine_tunes_take_no_more_memory_than_one(method: str, knobs: dict[str, Any]) -> None:
    """The layout's bytes are the same for every count; TSV-M's are at most those of full triples."""
    for name, (kind, shape) in WEIGHTS.items():
        found = [layout_bytes(method, Weight(name, kind, shape), count, knobs) for count in range(1, 70)]
        assert max(found) == found[0] > 0
        if method != "tsvm":
            assert set(found) == {found[0]}


def layout_bytes(method: str, weight: Weight, count: int, knobs: dict[str, Any]) -> int:
    """How much is remembered of a weight."""
    layout = methods.layout(methods.load(method), weight, count, knobs)
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


@pytest.mark.parametrize("method", methods.NAMES)
def test_more_fine_tunes_than_a_matrix_has_directions(method: str) -> None:
    """The stream has no end: after 14 fine-tunes of a [40, 12] matrix each method still has an answer."""
    models = [{n: m[n] for n in ("tall", "one", "bias")} for m in fine_tunes(14)]
    folded = Folded(method)
    for count, model in enumerate(models, 1):
        folded.fold(model)
        for name, slots in folded.slots.items():
            layout = methods.layout(methods.load(method), Weight(name, *WEIGHTS[name]), count, {})
            assert {slot: (v.dtype, tuple(v.shape)) for slot, v in slots.items()} == layout
    assert distance(folded.render(), FORMULAS[method](models, [1.0] * 14)) < tolerance_of(method, {})


def test_pcb_bears_a_hundred_fine_tunes() -> None:
    """exp(T a^2) leaves float32's range at T = 89; the shares that it is for do not."""
    models = [{n: m[n] for n in ("wide", "bias")} for m in fine_tunes(100)]
    folded = Folded("pcb")
    for model in models:
        folded.fold(model)
    assert distance(folded.render(), pcb(models, [1.0] * 100)) < 1e-3


@few_cases
def test_a_weight_without_elements_is_none_of_a_methods_business(method: str, knobs: dict[str, Any]) -> None:
    """A model may hold an empty weight: it is folded and rendered as what it is."""
    found = methods.load(method)
    slots = {
        slot: torch.zeros(shape, dtype=dtype)
        for slot, (dtype, shape) in methods.layout(found, Weight("w", "added", (0,)), 0, knobs).items()
    }
    cuts = (0.1, 0.2) if method in ("pcb", "ties") and knobs.get("scope") != "tensor" else ()
    delta = torch.zeros(0)
    arrival = Arrival("w", "added", delta, "digest", width=0, cuts=cuts, score_cuts=(0.0, 1.0))
    new = found.fold(slots, arrival, **methods.accepted(found.fold, knobs))
    given = {**knobs, "kind": "added", "figures": torch.zeros(1, 3).double(), "arrivals": [arrival]}
    totals = Totals().after(1.0, 1.0, 1.0)
    merged = found.render(new, totals, **methods.accepted(found.render, given))
    assert merged.numel() == 0


@few_cases
@pytest.mark.parametrize(("name", "at"), [("embedding", 104), ("embedding", 8), ("conv", 9)])
def test_an_added_weight_may_come_in_panels(method: str, knobs: dict[str, Any], name: str, at: int) -> None:
    """A weight that is added gives the same bits whether it comes whole or in panels of whole rows."""
    found = methods.load(method)
    whole = Folded(method, knobs)
    for model in fine_tunes(3):
        whole.fold({name: model[name], "bias": model["bias"]}, 0.7)
    parts = []
    for cut in (slice(0, at), slice(at, math.prod(WEIGHTS[name][1]))):
        slots = {s: v.reshape(-1)[cut] for s, v in empty(method, knobs, name).items()}
        for arrivals in whole.arrived:
            slots = found.fold(slots, part(arrivals[name], cut), **methods.accepted(found.fold, knobs))
        parts.append(whole.rendered(name, slots, cut))
    assert torch.equal(torch.cat(parts), whole.render()[name].reshape(-1))


@few_cases
def test_an_adapters_factors_are_folded_as_the_matrix_they_make(method: str, knobs: dict[str, Any]) -> None:
    """A delta that comes as two factors leaves the state that their product leaves, up to rounding."""
    found: Any = methods.load(method)
    random = torch.Generator().manual_seed(5)
    factors = linalg.LowRank(*(torch.randn(*shape, generator=random) for shape in ((24, 3), (3, 24))))
    thin_delta = linalg.scaled(factors, 0.01)
    first, second = fine_tunes(1)[0]["square"], linalg.dense(thin_delta)
    folded = Folded(method, knobs).fold({"square": first})
    arrival = arriving(method, knobs, {"square": second}, 1)["square"]
    thin = replace(arrival, delta=thin_delta)
    given = methods.accepted(found.fold, knobs)
    dense = found.fold(folded.slots["square"], arrival, **given)
    for slot, values in found.fold(folded.slots["square"], thin, **given).items():
        if slot not in ("left", "right"):  # singular vectors have a sign of their own
            assert float((values - dense[slot]).norm()) <= 1e-4 * float(dense[slot].norm())


@few_cases
def test_factors_whose_product_vanishes_do_no_harm(method: str, knobs: dict[str, Any]) -> None:
    """A stranger's factors of 1e-30 each make a matrix of zeros: nothing is divided by it."""
    found: Any = methods.load(method)
    tiny = linalg.LowRank(torch.full((24, 1), 1e-30), torch.full((1, 24), 1e-30))
    (model,) = fine_tunes(1)
    folded = Folded(method, knobs).fold({"square": model["square"]})
    arrival = arriving(method, knobs, {"square": linalg.dense(tiny)}, 1)["square"]
    given = methods.accepted(found.fold, knobs)
    new = found.fold(folded.slots["square"], replace(arrival, delta=tiny), **given)
    assert all(bool(torch.isfinite(values).all()) for values in new.values())


# -------------------------------------------------------------------------------- order, taking out, joining


@few_cases
@settings(deadline=None, max_examples=3)
@given(seed=seeds, order=st.permutations(range(4)))
def test_the_order_does_not_matter_where_a_method_says_so(
    method: str, knobs: dict[str, Any], seed: int, order: list[int]
) -> None:
    """The merge of four fine-tunes is the same in any order, each with its own weight."""
    if not methods.load(method).ORDER_FREE:
        return
    models, factors = coarse(4, seed), [1.0, 0.5, 2.0, 4.0]
    there, shuffled = Folded(method, knobs), Folded(method, knobs)
    for i in range(4):
        there.fold(models[i], factors[i])
        shuffled.fold(models[order[i]], factors[order[i]])
    assert distance(shuffled.render(), there.render()) < 1e-4


@few_cases
def test_the_order_matters_exactly_where_a_method_says_so(method: str, knobs: dict[str, Any]) -> None:
    """A fine-tune and its opposite: what claims no order independence has none."""
    (model,) = fine_tunes(1)
    opposite = {name: -values for name, values in model.items()}
    there = Folded(method, knobs).fold(model).fold(opposite).render()
    back = Folded(method, knobs).fold(opposite).fold(model).render()
    apart = norm({n: there[n].double() - back[n].double() for n in there}) / norm(model)
    assert (apart > 1e-2) == (not methods.load(method).ORDER_FREE), apart


def far(one: dict[str, Slots], other: dict[str, Slots]) -> dict[torch.dtype, float]:
    """The largest relative distance of two states' slots, by the precision they are kept in."""
    found = {torch.float32: 0.0, torch.float64: 0.0}
    for name, slots in other.items():
        assert set(one[name]) == set(slots)
        for slot, values in slots.items():
            apart = float((one[name][slot].double() - values.double()).norm())
            found[values.dtype] = max(found[values.dtype], apart / max(float(values.double().norm()), 1e-3))
    return found


@pytest.mark.parametrize(("method", "knobs"), REMOVABLE, ids=named(REMOVABLE))
@settings(deadline=None, max_examples=3)
@given(seed=seeds, index=st.integers(0, 3))
def test_what_was_folded_can_be_taken_out(method: str, knobs: dict[str, Any], seed: int, index: int) -> None:
    """Any one fine-tune comes out again: the state is that of the others, up to rounding."""
    models, factors = fine_tunes(4, seed=seed), [1.0, 0.5, 2.0, 3.0]
    folded, without = Folded(method, knobs), Folded(method, knobs)
    for i, model in enumerate(models):
        folded.fold(model, factors[i])
        if i != index:
            without.fold(model, factors[i])
    apart = far(folded.unfold(index), without.slots)
    assert apart[torch.float32] < 2e-6
    assert apart[torch.float64] < 1e-12


def test_what_cannot_be_taken_out_or_joined_says_so() -> None:
    """OPCM depends on the order, TSV-M's tails are gone, and a maximum forgets what it was before."""
    names = set(methods.NAMES)
    assert {name for name, _ in REMOVABLE} == names - {"opcm", "tsvm", "consensus_ta", "magmax"}
    assert {name for name, _ in JOINABLE} == names - {"opcm", "tsvm", "consensus_ta"}
    assert [knobs["agg"] for name, knobs in OTHERS if name == "ties" and (name, knobs) not in REMOVABLE] == [
        "max",
        "max",
    ]


@pytest.mark.parametrize(("method", "knobs"), JOINABLE, ids=named(JOINABLE))
@settings(deadline=None, max_examples=3)
@given(seed=seeds, at=st.integers(0, 4))
def test_states_folded_apart_can_be_joined(method: str, knobs: dict[str, Any], seed: int, at: int) -> None:
    """Two states joined are the state of all, in the order of joining, also where one is empty."""
    found: Any = methods.load(method)
    models = coarse(4, seed)
    together, one, other = Folded(method, knobs), Folded(method, knobs), Folded(method, knobs)
    for folded in (one, other):
        folded.slots = {name: empty(method, knobs, name) for name in WEIGHTS}
    for i, model in enumerate(models):
        together.fold(model, 2.0**i)
        (one if i < at else other).fold(model, 2.0**i)
    joined = {n: found.join(one.slots[n], other.slots[n]) for n in one.slots}
    apart = far(joined, together.slots)
    assert apart[torch.float32] < 2e-6
    assert apart[torch.float64] < 1e-12


def test_rare_fisher_information_survives_what_is_taken_out() -> None:
    """An element that only the fine-tune taken out knew of has the others' mean again, as before."""
    found: Any = methods.load("fisher")
    knobs = {"normalize": False, "minimal": 1e-6}
    one, other = (
        Arrival("w", "added", torch.tensor([delta]), "d", width=1, sidecar=torch.tensor([known]))
        for delta, known in ((0.5, 0.0), (-0.25, 100.0))
    )
    slots = {slot: torch.zeros(1, dtype=dtype) for slot, dtype in found.SLOTS.items()}
    slots = found.fold(found.fold(slots, one, **knobs), other, **knobs)
    left = found.render(found.unfold(slots, other, **knobs), Totals().after(1.0, 1.0, 1.0))
    assert float(left) == pytest.approx(0.5, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- DARE


def masked(digest: str, name: str, p: float, size: int = 40_000, start: int = 0) -> Tensor:
    """Draw a mask."""
    return dare.kept(Arrival(name, "added", torch.ones(size), digest, start=start), p)


@given(p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]), digest=st.text("0123456789abcdef", min_size=8))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_dare_keeps_the_share_that_it_says(p: float, digest: str) -> None:
    """Of 40,000 elements 1 - p stay, within five standard deviations; of neighbours, independently so."""
    kept = masked(digest, "w", p).double()
    bound = 5 * math.sqrt(p * (1 - p) / len(kept))
    assert abs(float(kept.mean()) - (1 - p)) <= bound
    assert abs(float((kept[1:] * kept[:-1]).mean()) - (1 - p) ** 2) <= 2 * bound


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dare_masks_of_other_weights_and_fine_tunes_are_others(p: float) -> None:
    """Two masks agree as often as independent draws do: p^2 + (1 - p)^2."""
    masks = [masked(digest, name, p) for digest in ("a1", "b2") for name in ("w", "v", "ww")]
    agree = p**2 + (1 - p) ** 2
    bound = 5 * math.sqrt(agree * (1 - agree) / 40_000)
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one == other).double().mean()) - agree) <= bound


@given(cuts=st.lists(st.integers(0, 5000), max_size=6), p=st.sampled_from([0.1, 0.5, 0.9]))
@settings(deadline=None, max_examples=10)
def test_a_dare_mask_is_the_same_for_any_panels(cuts: list[int], p: float) -> None:
    """Wherever a weight is cut, and in whatever shape it comes, the same elements stay; and every time."""
    whole = masked("digest", "w", p, 5000)
    edges = [0, *sorted(cuts), 5000]
    parts = [masked("digest", "w", p, stop - start, start) for start, stop in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)
    shaped = dare.kept(Arrival("w", "projected", torch.ones(50, 100), "digest"), p)
    assert torch.equal(shaped.reshape(-1), whole)


def test_a_dare_mask_does_not_change_between_releases() -> None:
    """What was folded years ago must be taken out with its mask: SplitMix64 of the place, seeded by names."""
    seed = int.from_bytes(hashlib.sha256(b"digest\0w").digest()[:8], "little")
    word = (1 << 64) - 1

    def draw(place: int) -> int:
        z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & word
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & word
        return (z ^ z >> 31) >> 32

    kept = [draw(place) >= 0.3 * 2**32 for place in range(2000)]
    assert masked("digest", "w", 0.3, 2000).tolist() == kept


# ---------------------------------------------------------------------------------------------------- OPCM


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw a running sum and a delta of one shape: any rank, sizes far apart, a part in common."""
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    rank = draw(st.integers(1, min(m, n)))
    d = torch.randn(m, rank, generator=random) @ torch.randn(rank, n, generator=random)
    x = torch.randn(m, n, generator=random) + draw(st.sampled_from([0.0, 1.0, -3.0])) * d
    return d * draw(st.sampled_from([1e-6, 1.0, 1e3])), x * draw(st.sampled_from([1e-3, 1.0, 30.0]))


def opcm_fold(d: Tensor, x: Tensor, **knobs: Any) -> Tensor:
    """Fold X into D."""
    return methods.load("opcm").fold({"sum": d}, Arrival("w", "projected", x, "digest"), **knobs)["sum"]


@given(
    pair=pairs(), alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9]), tail=st.sampled_from(["scalar", "diagonal"])
)
@settings(deadline=None)
def test_a_contribution_is_orthogonal_to_the_sum(
    pair: tuple[Tensor, Tensor], alpha: float, tail: str
) -> None:
    """<P, D> = 0 for the scalar and the diagonal tail, up to the rounding of what float32 stores."""
    d, x = pair
    new = opcm_fold(d, x, alpha=alpha, tail=tail)
    p = new.double() - d.double()
    size = max(float(new.double().norm()), float(d.double().norm()), float(x.double().norm()))
    assert abs(float((p * d.double()).sum())) <= 1e-6 * size * float(d.double().norm())


@given(pair=pairs(), alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9]), tail=st.sampled_from(TAILS))
@settings(deadline=None)
def test_transposed_inputs_give_the_transposed_result(
    pair: tuple[Tensor, Tensor], alpha: float, tail: str
) -> None:
    """The layout in which a framework stores a weight does not matter: fold(D^T, X^T) = fold(D, X)^T."""
    d, x = pair
    one = opcm_fold(d, x, alpha=alpha, tail=tail)
    other = opcm_fold(d.T.contiguous(), x.T.contiguous(), alpha=alpha, tail=tail)
    assert torch.allclose(one, other.T, rtol=0, atol=2e-5 * float(d.norm() + x.norm()))


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_of_a_single_row_or_column_what_lies_along_the_sum_is_removed(shape: tuple[int, int]) -> None:
    """A vector has one direction: the delta's component along the sum goes, the rest stays."""
    random = torch.Generator().manual_seed(0)
    d, x = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    expected = d + x - (x * d).sum() / d.square().sum() * d
    for tail in ("scalar", "diagonal"):
        assert torch.allclose(opcm_fold(d, x, tail=tail), expected, atol=1e-6)


def test_the_same_fine_tune_twice_adds_nothing_to_projected_weights() -> None:
    """A repeated delta lies wholly along the sum: two of the tails add nothing of it."""
    (model,) = fine_tunes(1)
    for tail in ("scalar", "diagonal"):
        folded = Folded("opcm", {"tail": tail}).fold(model).fold(model)
        for name in MATRICES:
            assert torch.allclose(folded.sums()[name], model[name], atol=1e-7 * 10)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("alpha", [0.999, 1 - 1e-12, 0.9999999999999999])
def test_alpha_may_come_near_one(tail: str, alpha: float) -> None:
    """Any alpha below 1 gives finite values: there always is a tail, if only of rounding errors."""
    for shape in ((1, 1), (5, 5), (3, 30), (40, 8)):
        random = torch.Generator().manual_seed(1)
        for _ in range(20):
            d, x = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
            assert torch.isfinite(opcm_fold(d, x, alpha=alpha, tail=tail)).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-19])
def test_a_tiny_sum_does_no_harm(tail: str, size: float) -> None:
    """A stranger's fine-tune that moves one element by next to nothing cannot spoil the merges after it."""
    d = torch.zeros(6, 9)
    d[2, 3] = size
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    new = opcm_fold(d, x, tail=tail)
    assert torch.isfinite(new).all()
    assert float((new - x).norm()) <= float(x.norm())


def test_a_perturbation_does_not_grow() -> None:
    """With the scalar tail a change of 1e-7 in the first fine-tune is at most 1e-6 after 20 merges."""
    models = fine_tunes(20)
    random = torch.Generator().manual_seed(99)
    noise = {n: torch.randn(values.shape, generator=random) for n, values in models[0].items()}
    size = 1e-7 * norm(models[0]) / norm(noise)
    changed = [{n: values + noise[n] * size for n, values in models[0].items()}, *models[1:]]
    results = []
    for run in (models, changed):
        folded = Folded("opcm", {"tail": "scalar"})
        for model in run:
            folded.fold(model)
        results.append(folded.render())
    assert distance(*results) <= 1e-6


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_prepared_ahead_changes_no_bit(tail: str) -> None:
    """A basis computed before the delta is there gives the same bits as one computed with it."""
    found: Any = methods.load("opcm")
    first, second = fine_tunes(2)
    for name in MATRICES:
        arrival = Arrival(name, "projected", second[name], "digest")
        ready = found.prepare({"sum": first[name]}, alpha=0.4, tail=tail)
        ahead = found.fold(ready, arrival, alpha=0.4, tail=tail)
        assert torch.equal(ahead["sum"], opcm_fold(first[name], second[name], alpha=0.4, tail=tail))
        assert set(ahead) == set(found.SLOTS)


@every_method
def test_the_merged_delta_of_opcm_is_as_long_as_the_deltas_are(method: str) -> None:
    """OPCM's render has the mean length of the fine-tunes' deltas; averaging is shorter, adding is not."""
    models = fine_tunes(6)
    folded = Folded(method)
    for model in models:
        folded.fold(model)
    mean = sum(norm(model) for model in models) / 6
    ratio = norm(folded.render()) / mean
    assert (abs(ratio - 1) < 1e-6) == (method == "opcm")
    assert folded.totals.mean_delta_norm == pytest.approx(mean, rel=1e-12)
    assert folded.totals.lambda_ == pytest.approx(norm(folded.sums()) / mean, rel=1e-12)


@few_cases
def test_a_weight_counts_only_where_a_method_says_so(method: str, knobs: dict[str, Any]) -> None:
    """A fine-tune's own weight changes the result exactly where WEIGHTED says it does."""
    models = fine_tunes(3)
    plain, weighted = Folded(method, knobs), Folded(method, knobs)
    for i, model in enumerate(models):
        plain.fold(model)
        weighted.fold(model, 1.0 + i)
    differs = distance(weighted.render(), plain.render())
    assert (differs > 1e-2) == methods.load(method).WEIGHTED
    assert differs == 0.0 or methods.load(method).WEIGHTED


# --------------------------------------------------------------------------------------------------- knobs


@every_method
def test_defaults_are_filled_in(method: str) -> None:
    """Resolved knobs name every knob of fold and render: a new release's default changes no old store."""
    knobs = methods.resolve(method, {})
    assert knobs == {name: default for name, (_, default) in methods.knob_fields(method).items()}
    assert methods.resolve(method, knobs) == knobs


def test_opcm_has_the_knobs_of_the_design() -> None:
    """alpha is 0.5 and the tail scalar unless told otherwise."""
    assert methods.resolve("opcm", {}) == {"alpha": 0.5, "tail": "scalar"}


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("opcm", {"alfa": 0.5}, "did you mean alpha"),
        ("opcm", {"tial": "keep"}, "did you mean tail"),
        ("opcm", {"zzz": 1}, "alpha, tail"),
        ("average", {"alpha": 0.5}, "it has none"),
        ("task_arithmetic", {"scal": 0.5}, "did you mean scale"),
        ("opcm", {"alpha": 1}, "less than 1"),
        ("opcm", {"alpha": 1.0}, "less than 1"),
        ("opcm", {"alpha": -0.1}, "greater than or equal to 0"),
        ("opcm", {"alpha": float("nan")}, "knobs.alpha"),
        ("opcm", {"alpha": float("inf")}, "knobs.alpha"),
        ("opcm", {"alpha": "half"}, "knobs.alpha"),
        ("opcm", {"alpha": None}, "knobs.alpha"),
        ("opcm", {"tail": "foo"}, "'scalar', 'diagonal' or 'keep'"),
        ("opcm", {"tail": ["keep"]}, "knobs.tail"),
        ("task_arithmetic", {"scale": 0}, "greater than 0"),
    ],
)
def test_a_wrong_knob_is_refused_in_words(method: str, given: dict[str, Any], said: str) -> None:
    """An unknown knob is answered with the nearest, a value out of range with the range."""
    with pytest.raises(ConfigError) as caught:
        methods.resolve(method, given)
    assert said in str(caught.value)
    assert caught.value.hint


@pytest.mark.gpu
@every_case
def test_a_gpu_gives_nearly_the_same(method: str, knobs: dict[str, Any]) -> None:
    """After five fine-tunes GPU and CPU agree; slots stay where the deltas are."""
    on_cpu, on_gpu = Folded(method, knobs), Folded(method, knobs)
    for model in fine_tunes(5):
        on_cpu.fold(model)
        on_gpu.fold({name: values.cuda() for name, values in model.items()})
    assert all(values.is_cuda for values in on_gpu.sums().values())
    got = {name: values.cpu() for name, values in on_gpu.render().items()}
    assert distance(got, on_cpu.render()) < (1e-3 if knobs.get("tail") == "diagonal" else 1e-5)
    d, x = (torch.randn(64, 96, generator=torch.Generator().manual_seed(i)).cuda() for i in (0, 1))
    assert linalg.dot(d, x) == pytest.approx(linalg.dot(d.cpu(), x.cpu()), rel=1e-9)


# ------------------------------------------------------------------------------------------ the spectral cap


DOORS = ("method", "finalize")  # the method spectral_cap, and finalize.cap on what OPCM gives
every_door = pytest.mark.parametrize("door", DOORS)


def summed(door: str, models: list[Model]) -> Folded:
    """Fold what the cap is put on."""
    folded = Folded("spectral_cap" if door == "method" else "opcm")
    for model in models:
        folded.fold(model)
    return folded


def published(models: list[Model], door: str = "method", **knobs: Any) -> Model:
    """Fold and render under a cap."""
    folded = summed(door, models)
    if door == "method":
        folded.knobs = knobs
        return folded.render()
    return {
        name: finalize.apply(
            values, Cap(**knobs), torch.tensor(folded.figures[name], dtype=torch.float64), 1.0
        )
        for name, values in folded.sums().items()
        if name in MATRICES
    }


def top(matrix: Tensor) -> float:
    """The largest singular value."""
    return float(torch.linalg.svdvals(matrix.double())[0])


def clamped(values: list[float]) -> float:
    """Geometric mean, each value clamped to a third and to three times their median."""
    middle = float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
    return math.exp(sum(math.log(min(max(v, middle / 3), middle * 3)) for v in values) / len(values))


def tau(matrix: Tensor) -> float:
    """Energy-weighted singular value: ||M^T M|| / ||M||."""
    s = torch.linalg.svdvals(matrix.double())
    return float((s**4).sum().sqrt() / (s**2).sum().sqrt())


def interference(total: Tensor, deltas: list[Tensor]) -> float:
    """0.9 w sqrt(R / tau_S)."""
    taus = [tau(delta) for delta in deltas]
    return 0.9 * clamped(taus) * math.sqrt(math.sqrt(sum(t**2 for t in taus)) / tau(total))


def test_one_fine_tune_is_published_as_it_is() -> None:
    """Also where others leave a matrix alone: it is then that one's, bit for bit."""
    (model,) = fine_tunes(1)
    zero = {name: torch.zeros_like(values) for name, values in model.items()}
    assert all(torch.equal(values, model[name]) for name, values in published([model]).items())
    for door in DOORS:
        both = published([zero, model], door)
        assert all(torch.equal(both[name], model[name]) for name in MATRICES)


@every_door
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_no_singular_value_is_above_the_fixed_cap(beta: float, door: str) -> None:
    """At level fixed the cap is kappa times the mean of the fine-tunes' own top singular values."""
    models = fine_tunes(6)
    for name, values in published(models, door, level="fixed", beta=beta).items():
        if name in MATRICES:
            assert top(values) <= 0.6 * clamped([top(m[name]) for m in models]) * (1 + 1e-5), name


@every_door
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_no_singular_value_is_above_the_cap_of_interference(strength: float, door: str) -> None:
    """Nor is it at level interference; and the cap is reached, so it is the cap that did it."""
    models = fine_tunes(6, shared=1.0)
    totals = summed(door, models).sums()
    for name, values in published(models, door, strength=strength).items():
        if name in ("square", "tall", "wide"):
            cap = strength * interference(totals[name], [m[name] for m in models])
            assert top(values) == pytest.approx(cap, rel=1e-5), name


@every_door
@given(copies=st.integers(2, 12), seed=seeds)
@settings(deadline=None, max_examples=5)
def test_copies_of_one_fine_tune_raise_nothing_over_the_cap(copies: int, seed: int, door: str) -> None:
    """However often it comes: summed, n copies have tau_S / R = sqrt(n), and the cap falls with it."""
    (model,) = fine_tunes(1, seed=seed)
    totals = summed(door, [model] * copies).sums()
    for name, values in published([model] * copies, door).items():
        if name in MATRICES:
            cap = interference(totals[name], [model[name]] * copies)
            assert top(values) <= cap * (1 + 1e-5), name
            if door == "method":
                assert cap == pytest.approx(0.9 * tau(model[name]) / copies**0.25, rel=1e-4)


@every_door
def test_ten_times_the_deltas_publish_ten_times_the_merge(door: str) -> None:
    """The rule has no scale of its own."""
    models = fine_tunes(4)
    scaled = [{name: 10 * values for name, values in model.items()} for model in models]
    tenfold = {name: 10 * values for name, values in published(models, door).items()}
    assert distance(published(scaled, door), tenfold) < 1e-5


@every_door
@pytest.mark.parametrize("level", ["fixed", "interference"])
@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("factor", [1e-6, 10.0])
def test_an_odd_one_out_does_not_move_the_cap_far(factor: float, place: int, level: str, door: str) -> None:
    """A fine-tune that is nearly empty, or ten times as long, moves what is published by less than 3x.

    At level fixed that is a clamped share of the mean: the eighth root of three.
    """
    models = fine_tunes(8)
    odd = [
        {n: factor * v for n, v in model.items()} if i == place else model for i, model in enumerate(models)
    ]
    before, after = published(models, door, level=level), published(odd, door, level=level)
    most = 3 ** (1 / 8) * 1.05 if level == "fixed" else 3.0
    for name in ("square", "tall", "wide"):
        assert 1 / most <= top(after[name]) / top(before[name]) <= most, name


@every_door
@given(seed=seeds, size=st.sampled_from([1e-3, 0.1, 1.0, 100.0]), level=st.sampled_from([0.01, 0.05, 1.0]))
@settings(deadline=None, max_examples=8)
def test_the_cap_at_a_fixed_level_brings_nothing_further_apart(
    seed: int, size: float, level: float, door: str
) -> None:
    """With beta 1 it is a projection onto a ball: a change of one delta is not larger after it."""
    models, noise = fine_tunes(3, seed=seed), fine_tunes(1, seed=seed + 1)[0]
    totals = {name: sum((m[name] for m in models[1:]), models[0][name]) for name in MATRICES}
    moved = {name: values + size * noise[name] for name, values in totals.items()}
    figures = torch.tensor([[1.0, 1.0, level]] * 3, dtype=torch.float64)
    found: Any = methods.load("spectral_cap")

    def capped(total: Tensor) -> Tensor:
        if door == "finalize":
            return finalize.apply(total, Cap(level="fixed", beta=1.0), figures, 1.0)
        given = {"kind": "projected", "figures": figures, "level": "fixed", "beta": 1.0}
        rendered: Tensor = found.render({"sum": total}, Totals(), **given)
        return rendered

    for name, total in totals.items():
        apart = (capped(total) - capped(moved[name])).norm()
        assert apart <= (total - moved[name]).norm() * (1 + 1e-5) + 1e-6 * total.norm(), name
