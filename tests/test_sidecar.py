"""Fisher information and Gram matrices beside a fine-tune: checked like weights, part of its identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from benches import bench_of, equal, fine_tunes, merge
from models import BIAS, BUFFER, EMBEDDING, NORM, SQUARE, TALL, WIDE
from safetensors.torch import load_file, save_file
from torch import Tensor

from streammerge import methods, weights
from streammerge.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Values = dict[str, Tensor]
FLOATS = (EMBEDDING, SQUARE, TALL, WIDE, BIAS, NORM)
BOTH = ("fisher", "regmean")
UNIFORM = {"missing": "uniform"}


def brought(method: str, base: Values, seed: int = 0) -> Values:
    """Draw what a method asks for: Fisher information for all weights, Gram matrices for projected ones."""
    random = torch.Generator().manual_seed(seed)
    if method == "fisher":
        return {name: torch.rand(base[name].shape, generator=random) + 0.01 for name in FLOATS}
    inputs = {n: torch.randn(100, base[n].shape[1], generator=random) for n in models.PROJECTED}
    return {name: x.T @ x for name, x in inputs.items()}


def publish(folder: Path, method: str, values: Values) -> None:
    """Put a sidecar beside a fine-tune's weights."""
    save_file({name: v.contiguous() for name, v in values.items()}, folder / methods.sidecar(method))


def complete(root: Path, base: Values, method: str, count: int = 2) -> list[Path]:
    """Make fine-tunes, each with a sidecar of its own."""
    paths = fine_tunes(root, base, count)
    for number, path in enumerate(paths):
        publish(path, method, brought(method, base, number))
    return paths


@pytest.fixture
def base(tmp_path: Path) -> Values:
    """A base, saved at tmp_path / "base"."""
    return models.make_base(tmp_path / "base")


def merged(root: Path, method: str, paths: list[Path], **options: Any) -> Values:
    """Merge and give what servers would load."""
    out = root / f"out-{len(list(root.glob('out-*')))}"
    merge(out, root / "base", paths, method=method, **options)
    return models.load(out / "model")


def near(one: Values, other: Values) -> set[str]:
    """Names of the weights that agree up to rounding."""
    return {name for name, values in other.items() if torch.allclose(one[name], values, rtol=0, atol=1e-6)}


# ---------------------------------------------------------------------------------------------- it is missing


@pytest.mark.parametrize("method", BOTH)
def test_without_the_file_a_fine_tune_is_refused(method: str, base: Values, tmp_path: Path) -> None:
    """The reason is missing-sidecar, the hint names what helps, and nothing is written."""
    good, bad = complete(tmp_path, base, method)
    (bad / methods.sidecar(method)).unlink()
    before = set(tmp_path.iterdir())
    with pytest.raises(Refused, match=methods.sidecar(method)) as caught:
        merge(tmp_path / "out", tmp_path / "base", [good, bad], method=method)
    assert caught.value.reason == "missing-sidecar"
    assert str(bad) in caught.value.message
    assert "missing: uniform" in caught.value.hint
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", BOTH)
def test_without_any_file_uniform_gives_the_mean(method: str, base: Values, tmp_path: Path) -> None:
    """With the knob missing: uniform all elements, or all inputs, count alike."""
    paths = fine_tunes(tmp_path, base, 2)
    mean = merged(tmp_path, "average", paths)
    assert near(merged(tmp_path, method, paths, knobs=UNIFORM), mean) == set(mean)


@pytest.mark.parametrize("method", BOTH)
def test_a_fine_tune_without_the_file_is_folded_beside_one_that_has_it(
    method: str, base: Values, tmp_path: Path
) -> None:
    """Both count: the merge is neither that of the one with a file, nor the mean."""
    paths = complete(tmp_path, base, method)
    (paths[1] / methods.sidecar(method)).unlink()
    got = merged(tmp_path, method, paths, knobs=UNIFORM)
    for other in (
        merged(tmp_path, method, paths[:1]),
        merged(tmp_path, "average", paths),
    ):
        assert not near(got, other) & set(models.PROJECTED)


def test_gram_matrices_may_be_there_for_some_weights_only(base: Values, tmp_path: Path) -> None:
    """A weight without one gets the mean, the others what their inputs ask for."""
    paths = fine_tunes(tmp_path, base, 2)
    for number, path in enumerate(paths):
        grams = brought("regmean", base, number)
        publish(path, "regmean", {name: grams[name] for name in (SQUARE, TALL)})
    mean = merged(tmp_path, "average", paths)
    assert set(mean) - near(merged(tmp_path, "regmean", paths), mean) == {SQUARE, TALL}


# ------------------------------------------------------------------------------------------ it cannot be true


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Values], Values]:
    """Change one tensor."""
    return lambda values: {**values, name: change(values[name])}


def with_element(value: float, row: int = 2, column: int = 3) -> Callable[[Tensor], Tensor]:
    """Set one element."""

    def change(values: Tensor) -> Tensor:
        values = values.clone()
        values[row, column] = value
        return values

    return change


def renamed(values: Values) -> Values:
    """Give one weight a name that the base does not have."""
    return {"model.layers.0.stranger" if name == SQUARE else name: v for name, v in values.items()}


BAD: dict[str, tuple[str, Callable[[Values], Values], str]] = {
    "fisher-name": ("fisher", renamed, "model.layers.0.stranger"),
    "fisher-extra": ("fisher", lambda v: {**v, "stranger": torch.ones(3)}, "stranger"),
    "fisher-shape": ("fisher", replaced(TALL, lambda v: v.T), TALL),
    "fisher-flat": ("fisher", replaced(TALL, lambda v: v.reshape(-1)), TALL),
    "fisher-integers": ("fisher", replaced(NORM, lambda v: (100 * v).int()), NORM),
    "fisher-nan": ("fisher", replaced(EMBEDDING, with_element(float("nan"))), EMBEDDING),
    "fisher-infinite": ("fisher", replaced(WIDE, with_element(float("inf"))), WIDE),
    "fisher-negative": ("fisher", replaced(SQUARE, with_element(-1e-9)), SQUARE),
    "fisher-lacking": ("fisher", lambda v: {n: x for n, x in v.items() if n != BIAS}, BIAS),
    "fisher-buffer": ("fisher", lambda v: {**v, BUFFER: torch.ones(12)}, BUFFER),
    "gram-name": ("regmean", renamed, "model.layers.0.stranger"),
    "gram-of-outputs": ("regmean", replaced(TALL, lambda _: torch.eye(48)), TALL),
    "gram-shape": ("regmean", replaced(WIDE, lambda v: v[:, :7]), WIDE),
    "gram-integers": ("regmean", replaced(SQUARE, lambda v: v.long()), SQUARE),
    "gram-nan": ("regmean", replaced(SQUARE, with_element(float("nan"))), SQUARE),
    "gram-infinite": ("regmean", replaced(SQUARE, with_element(float("inf"), 4, 4)), SQUARE),
    "gram-asymmetric": ("regmean", replaced(TALL, with_element(60.0)), TALL),
    "gram-diagonal": ("regmean", replaced(WIDE, with_element(-1e-3, 5, 5)), WIDE),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_true_is_refused_by_the_tensors_name(case: str, base: Values, tmp_path: Path) -> None:
    """Names, shapes, dtypes and values are checked; the reason is bad-sidecar, and nothing is written."""
    method, spoil, name = BAD[case]
    (path,) = complete(tmp_path, base, method, 1)
    merge(tmp_path / "good", tmp_path / "base", [path], method=method)
    publish(path, method, spoil(brought(method, base)))
    before = set(tmp_path.iterdir())
    with pytest.raises(Refused) as caught:
        merge(tmp_path / "out", tmp_path / "base", [path], method=method)
    assert caught.value.reason == "bad-sidecar"
    assert f"{methods.sidecar(method)}: " in caught.value.message
    assert name in caught.value.message
    assert caught.value.hint
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", BOTH)
def test_a_file_that_is_no_safetensors_is_refused(method: str, base: Values, tmp_path: Path) -> None:
    """It is read by the same rules as weights are, and the file is named."""
    (path,) = fine_tunes(tmp_path, base, 1)
    (path / methods.sidecar(method)).write_bytes(b"\xff" * 100)
    with pytest.raises(Refused, match=methods.sidecar(method)):
        merge(tmp_path / "out", tmp_path / "base", [path], method=method)


def test_rounding_is_no_asymmetry(base: Values, tmp_path: Path) -> None:
    """A Gram matrix in bf16 whose two halves were rounded apart is taken."""
    (path,) = fine_tunes(tmp_path, base, 1)
    random = torch.Generator().manual_seed(1)
    grams = brought("regmean", base)
    noisy = {n: g * (1 + 1e-4 * torch.randn(g.shape, generator=random)) for n, g in grams.items()}
    rounded = {name: gram.bfloat16() for name, gram in noisy.items()}
    assert any(not torch.equal(gram, gram.T) for gram in rounded.values())
    publish(path, "regmean", rounded)
    assert near(merged(tmp_path, "regmean", [path]), models.load(path)) == set(base)


# ------------------------------------------------------------------------------------- what it is, and counts


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("change", ["added", "dropped"])
def test_names_may_have_one_prefix_more_or_less(
    method: str, change: str, base: Values, tmp_path: Path
) -> None:
    """As a fine-tune's own names may: the merge has the same bytes."""
    paths = complete(tmp_path, base, method)
    expected = merged(tmp_path, method, paths)
    for number, path in enumerate(paths):
        values = brought(method, base, number)
        new = {f"base.{n}" if change == "added" else n.removeprefix("model."): v for n, v in values.items()}
        assert not set(new) & set(values)
        publish(path, method, new)
    assert equal(merged(tmp_path, method, paths), expected)


@pytest.mark.parametrize("method", BOTH)
def test_a_fine_tune_is_known_by_its_sidecar_too(method: str, base: Values, tmp_path: Path) -> None:
    """A changed file makes another fine-tune for a method that reads it, and none for one that does not."""
    (path,) = fine_tunes(tmp_path, base, 1)
    name, other = (methods.sidecar(m) for m in (method, *(m for m in BOTH if m != method)))
    bare = weights.identity(path)
    assert weights.identity(path, sidecar=name) == bare
    digests = {bare}
    for seed in (0, 1):
        publish(path, method, brought(method, base, seed))
        digests.add(weights.identity(path, sidecar=name))
        assert weights.identity(path) == weights.identity(path, sidecar=other) == bare
    assert len(digests) == 3


@pytest.mark.parametrize("method", [*BOTH, "average"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_digest_of_a_fold_is_the_identity(method: str, shards: int, base: Values, tmp_path: Path) -> None:
    """What a fine-tune is known by before the fold is what the fold read: its sidecar where that counts."""
    (path,) = fine_tunes(tmp_path, base, 1, shards=shards)
    for each in BOTH:
        publish(path, each, brought(each, base))
    (entry,) = merge(tmp_path / "out", tmp_path / "base", [path], method=method)["fine_tunes"]
    assert entry["digest"] == weights.identity(path, sidecar=methods.sidecar(method))
    assert (entry["digest"] == weights.identity(path)) == (method == "average")


@pytest.mark.parametrize("method", BOTH)
def test_the_numbers_are_the_definitions(method: str, base: Values, tmp_path: Path) -> None:
    """Two fine-tunes through files and engine give the formula's weights, each with its own sidecar."""
    paths = complete(tmp_path, base, method)
    tuned = [models.load(path) for path in paths]
    got = merged(tmp_path, method, paths)
    beside = [{n: v.double() for n, v in load_file(p / methods.sidecar(method)).items()} for p in paths]
    sizes = [torch.cat([v.reshape(-1) for v in found.values()]).norm() for found in beside]
    for name in FLOATS:
        one, other = (found[name].double() for found in tuned)
        if method == "fisher":
            f, g = ((v[name] + 1e-6) / (size + 1e-6) for v, size in zip(beside, sizes, strict=True))
            expected = (one * f + other * g) / (f + g)
        elif name in models.PROJECTED:
            f, g = (0.95 * v[name] + 0.05 * v[name].diagonal().diag() for v in beside)
            expected = (one @ f + other @ g) @ torch.linalg.inv(f + g)
        else:
            expected = (one + other) / 2
        assert torch.allclose(got[name].double(), expected, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("method", BOTH)
def test_taking_out_reads_the_sidecar_again(method: str, base: Values, tmp_path: Path) -> None:
    """A fine-tune comes out with what it brought; what is left is the others' merge."""
    paths = complete(tmp_path, base, method, 3)
    run, others = (bench_of(tmp_path / n, tmp_path / "base", method=method) for n in ("run", "others"))
    for path in paths:
        run.fold(path)
        if path != paths[1]:
            others.fold(path)
    run.unfold(paths[1], 1)
    expected = models.load(others.render())
    assert near(models.load(run.render()), expected) == set(expected)


def test_a_sidecar_that_nobody_asked_for_is_not_opened(base: Values, tmp_path: Path) -> None:
    """A method that wants none folds a fine-tune with broken ones beside it, and gives the same bytes."""
    (path,) = fine_tunes(tmp_path, base, 1)
    expected = merged(tmp_path, "opcm", [path])
    for method in BOTH:
        (path / methods.sidecar(method)).write_bytes(b"nothing")
    assert equal(merged(tmp_path, "opcm", [path]), expected)
