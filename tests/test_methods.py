"""One suite over all merge methods: each equals its formula, written here in float64, and keeps its laws."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammerge import linalg, methods
from streammerge.errors import ConfigError
from streammerge.methods import Arrival, Totals
from streammerge.state import statistics_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.methods import Kind

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


@dataclass
class Folded:
    """What a method remembers of several fine-tunes, with the totals that the engine would have."""

    method: str
    knobs: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, methods.Slots] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    figures: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)

    def fold(self, model: Model, factor: float = 1.0) -> Folded:
        """Take one fine-tune in."""
        found = methods.load(self.method)
        knobs = methods.accepted(found.fold, self.knobs)
        for name, delta in model.items():
            if name not in self.slots:
                self.slots[name] = {slot: torch.zeros_like(delta) for slot in found.SLOTS}
            arrival = Arrival(name, WEIGHTS[name][0], delta, "digest", factor)
            self.slots[name] = found.fold(self.slots[name], arrival, **knobs)
            figures = statistics_of(delta, arrival.kind, tuple(delta.shape), linalg.squares(delta))
            self.figures.setdefault(name, []).append(figures)
        self.totals = self.totals.after(norm(model), norm(self.sums()), factor)
        return self

    def sums(self) -> Model:
        """The first slot of every weight."""
        return {name: next(iter(slots.values())) for name, slots in self.slots.items()}

    def render(self) -> Model:
        """What is added to the base."""
        return {name: self.rendered(name, slots) for name, slots in self.slots.items()}

    def rendered(self, name: str, slots: methods.Slots) -> Tensor:
        """Render one weight, or a panel of one, with the figures that the engine would give."""
        found = methods.load(self.method)
        figures = torch.tensor(self.figures[name], dtype=torch.float64)
        rendered: Tensor = found.render(
            slots, self.totals, **methods.accepted(found.render, {**self.knobs, "figures": figures})
        )
        return rendered


def norm(model: Model) -> float:
    """Frobenius norm over all weights, in float64."""
    return math.sqrt(sum(float(values.double().square().sum()) for values in model.values()))


def distance(one: Model, other: Model) -> float:
    """||one - other|| / ||other||."""
    return norm({n: one[n].double() - other[n].double() for n in other}) / norm(other)


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
    strength: float = 1.0,
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


FORMULAS: dict[str, Callable[..., Model]] = {
    "opcm": opcm,
    "average": average,
    "task_arithmetic": task_arithmetic,
    "spectral_cap": spectral_cap,
}
TAILS = ("scalar", "diagonal", "keep")
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("opcm", {"tail": tail}) for tail in TAILS),
    *(("opcm", {"tail": tail, "alpha": alpha}) for tail in TAILS for alpha in (0.0, 0.2, 0.95, 0.999)),
    ("opcm", {}),
    ("average", {}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"scale": 1.7}),
    ("spectral_cap", {}),
    ("spectral_cap", {"strength": 0.5, "beta": 1.0}),
    ("spectral_cap", {"level": "fixed"}),
    ("spectral_cap", {"level": "fixed", "kappa": 1.5, "beta": 3.0}),
]
IDS = ["-".join([name, *(f"{k}-{v}" for k, v in knobs.items())]) for name, knobs in CASES]
SUMS = [name for name in methods.NAMES if name != "opcm"]
every_case = pytest.mark.parametrize(("method", "knobs"), CASES, ids=IDS)
every_method = pytest.mark.parametrize("method", methods.NAMES)


def test_every_method_has_a_formula() -> None:
    """No method is offered that this suite does not know."""
    assert set(FORMULAS) == set(methods.NAMES) == {name for name, _ in CASES}
    assert methods.DEFAULT in methods.NAMES


@every_case
@pytest.mark.parametrize("rank", [None, 2], ids=["full-rank", "rank-2"])
def test_it_equals_its_formula(method: str, knobs: dict[str, Any], rank: int | None) -> None:
    """After every one of five fine-tunes the merged delta is that of the formula in float64."""
    models, factors = fine_tunes(5, rank=rank), [1.0, 0.5, 2.0, 1.0, 0.25]
    tolerance = 1e-3 if knobs.get("level") == "fixed" else 2e-5  # top singular values are by power iteration
    folded = Folded(method, knobs)
    for t in range(1, 6):
        folded.fold(models[t - 1], factors[t - 1])
        expected = FORMULAS[method](models[:t], factors[:t], **knobs)
        assert distance(folded.render(), expected) < tolerance, t


@every_case
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_delta_of_zero_changes_nothing(method: str, knobs: dict[str, Any], where: str) -> None:
    """A weight that a fine-tune leaves as it is keeps its state, bit for bit, whenever it comes."""
    models = fine_tunes(3)
    zero = {name: torch.zeros_like(values) for name, values in models[0].items()}
    order = [zero, *models] if where == "first" else [*models, zero]
    without, folded = Folded(method, knobs), Folded(method, knobs)
    for model in models:
        without.fold(model)
    for model in order:
        folded.fold(model)
    for name, values in without.sums().items():
        assert torch.equal(folded.sums()[name], values)


@every_case
def test_the_first_delta_is_taken_whole(method: str, knobs: dict[str, Any]) -> None:
    """Where nothing was folded yet there is nothing to leave alone: the state is the delta, bit for bit."""
    (model,) = fine_tunes(1)
    folded = Folded(method, knobs).fold(model)
    assert all(torch.equal(folded.sums()[name], values) for name, values in model.items())


@every_case
def test_a_fold_keeps_shape_dtype_and_its_inputs(method: str, knobs: dict[str, Any]) -> None:
    """New slots are contiguous float32 of the delta's shape; neither the old slots nor the delta change."""
    first, second = fine_tunes(2)
    folded = Folded(method, knobs).fold(first)
    before = {n: values.clone() for n, values in folded.sums().items()}
    held, delta = dict(folded.sums()), {n: values.clone() for n, values in second.items()}
    folded.fold(second)
    for name, values in second.items():
        new = folded.sums()[name]
        assert (new.shape, new.dtype, new.device) == (values.shape, torch.float32, values.device)
        assert new.is_contiguous()
        assert torch.equal(held[name], before[name])
        assert torch.equal(values, delta[name])
        assert folded.render()[name].shape == values.shape
        assert folded.render()[name].dtype == torch.float32


@every_case
def test_an_added_weight_may_come_in_panels(method: str, knobs: dict[str, Any]) -> None:
    """A weight that is added whole gives the same bits whether it comes whole or in flat panels."""
    found = methods.load(method)
    models = fine_tunes(3)
    whole = Folded(method, knobs)
    for model in models:
        whole.fold({"embedding": model["embedding"]}, 0.7)
    parts = []
    for cut in (slice(0, 100), slice(100, 240)):
        slots = {slot: torch.zeros(cut.stop - cut.start) for slot in found.SLOTS}
        for model in models:
            panel = model["embedding"].reshape(-1)[cut]
            arrival = Arrival("embedding", "added", panel, "digest", 0.7)
            slots = found.fold(slots, arrival, **methods.accepted(found.fold, knobs))
        parts.append(whole.rendered("embedding", slots))
    assert torch.equal(torch.cat(parts), whole.render()["embedding"].reshape(-1))


# -------------------------------------------------------------------------------------- order-free methods


@pytest.mark.parametrize("method", SUMS)
def test_the_order_does_not_matter(method: str) -> None:
    """A sum is the same in any order, up to rounding."""
    models = fine_tunes(6)
    there, back = Folded(method), Folded(method)
    for i in range(6):
        there.fold(models[i], 1 + i)
        back.fold(models[5 - i], 6 - i)
    assert distance(there.render(), back.render()) < 1e-6


def test_the_order_matters_to_opcm() -> None:
    """What claims no order independence has none, so that the tests above can fail."""
    models = fine_tunes(4)
    there, back = Folded("opcm"), Folded("opcm")
    for i in range(4):
        there.fold(models[i])
        back.fold(models[3 - i])
    assert distance(there.render(), back.render()) > 1e-2


@every_method
def test_what_was_folded_can_be_taken_out(method: str) -> None:
    """Where a method has `unfold`, any one fine-tune comes out again, up to rounding; OPCM has none."""
    found: Any = methods.load(method)
    assert hasattr(found, "unfold") == (method in SUMS)
    if not hasattr(found, "unfold"):
        return
    models, factors = fine_tunes(5), [1.0, 0.5, 2.0, 1.0, 3.0]
    folded, without = Folded(method), Folded(method)
    for i, model in enumerate(models):
        folded.fold(model, factors[i])
        if i != 2:
            without.fold(model, factors[i])
    for name, delta in models[2].items():
        arrival = Arrival(name, WEIGHTS[name][0], delta, "digest", factors[2])
        folded.slots[name] = found.unfold(folded.slots[name], arrival)
    assert distance(folded.sums(), without.sums()) < 1e-6


@every_method
def test_states_folded_apart_can_be_joined(method: str) -> None:
    """Where a method has `join`, two states added are the state of all; OPCM has none."""
    found: Any = methods.load(method)
    assert hasattr(found, "join") == (method in SUMS)
    if not hasattr(found, "join"):
        return
    models = fine_tunes(5)
    together, one, other = Folded(method), Folded(method), Folded(method)
    for i, model in enumerate(models):
        together.fold(model, 1 + i)
        (one if i < 2 else other).fold(model, 1 + i)
    joined = {n: found.join(one.slots[n], other.slots[n])["sum"] for n in one.slots}
    assert distance(joined, together.sums()) < 1e-6


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


def test_a_weight_counts_only_where_a_method_says_so() -> None:
    """A fine-tune's own weight changes the result exactly where WEIGHTED says it does."""
    models = fine_tunes(3)
    for method in methods.NAMES:
        plain, weighted = Folded(method), Folded(method)
        for i, model in enumerate(models):
            plain.fold(model)
            weighted.fold(model, 1.0 + i)
        differs = distance(weighted.render(), plain.render()) > 1e-3
        assert differs == methods.load(method).WEIGHTED, method


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


def published(models: list[Model], **knobs: Any) -> Model:
    """Fold by the spectral cap and render."""
    folded = Folded("spectral_cap", knobs)
    for model in models:
        folded.fold(model)
    return folded.render()


def top(matrix: Tensor) -> float:
    """The largest singular value."""
    return float(torch.linalg.svdvals(matrix.double())[0])


def test_one_fine_tune_is_published_as_it_is() -> None:
    """Also where others leave a matrix alone: it is then that one's, bit for bit."""
    (model,) = fine_tunes(1)
    zero = {name: torch.zeros_like(values) for name, values in model.items()}
    assert all(torch.equal(values, model[name]) for name, values in published([model]).items())
    both = published([zero, model])
    assert all(torch.equal(both[name], model[name]) for name in MATRICES)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_no_singular_value_is_above_the_fixed_cap(beta: float) -> None:
    """At level fixed the cap is kappa times the mean of the fine-tunes' own top singular values."""
    models = fine_tunes(6)
    for name, values in published(models, level="fixed", beta=beta).items():
        if name in MATRICES:
            tops = [top(m[name]) for m in models]
            cap = 0.6 * math.exp(sum(map(math.log, tops)) / len(tops))
            assert top(values) <= cap * (1 + 1e-5), name


def test_copies_of_one_fine_tune_raise_nothing_over_the_cap() -> None:
    """Nine copies collide fully, tau_S / R = 3: the cap falls to 0.9 tau / sqrt(3)."""
    (model,) = fine_tunes(1)
    for name, values in published([model] * 9).items():
        if name in MATRICES:
            s = torch.linalg.svdvals(model[name].double())
            tau = float((s**4).sum().sqrt() / (s**2).sum().sqrt())
            assert top(values) <= 0.9 * tau / math.sqrt(3) * (1 + 1e-5), name


def test_ten_times_the_deltas_publish_ten_times_the_merge() -> None:
    """The rule has no scale of its own."""
    models = fine_tunes(4)
    scaled = [{name: 10 * values for name, values in model.items()} for model in models]
    tenfold = {name: 10 * values for name, values in published(models).items()}
    assert distance(published(scaled), tenfold) < 1e-5


@pytest.mark.parametrize("factor", [1e-6, 10.0])
def test_an_odd_one_out_does_not_move_the_cap_far(factor: float) -> None:
    """A fine-tune that is nearly empty, or ten times as long, changes the cap by a clamped share at most."""
    models = fine_tunes(8)
    odd = [{name: factor * values for name, values in models[0].items()}, *models[1:]]
    before, after = published(models, level="fixed"), published(odd, level="fixed")
    for name in ("square", "tall", "wide"):
        assert 3 ** (-1 / 8) * 0.95 <= top(after[name]) / top(before[name]) <= 3 ** (1 / 8) * 1.05, name


def test_the_cap_at_a_fixed_level_brings_nothing_further_apart() -> None:
    """With beta 1 it is a projection onto a ball: two sums are not farther apart after it than before."""
    models, others = fine_tunes(3), fine_tunes(3, seed=1)
    one, other = Folded("spectral_cap"), Folded("spectral_cap")
    for model, second in zip(models, others, strict=True):
        one.fold(model)
        other.fold(second)
    found: Any = methods.load("spectral_cap")
    figures = torch.tensor([[1.0, 1.0, 0.05]] * 3, dtype=torch.float64)
    knobs = {"figures": figures, "level": "fixed", "beta": 1.0}
    for name in MATRICES:
        capped = [found.render(folded.slots[name], folded.totals, **knobs) for folded in (one, other)]
        before = (one.slots[name]["sum"] - other.slots[name]["sum"]).norm()
        assert (capped[0] - capped[1]).norm() <= before * (1 + 1e-5), name
