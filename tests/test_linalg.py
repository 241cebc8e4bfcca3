"""Norms, spectra and ranks against textbook computations in float64."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streammerge import linalg

SHAPES = ((1, 1), (1, 40), (5, 5), (24, 24), (24, 60), (60, 24), (40, 1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw a float32 tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_values(values: list[float], rows: int, columns: int) -> Tensor:
    """Make a matrix [rows, columns] with these singular values, as float32 holds it."""
    u = torch.linalg.qr(normal(rows, len(values), seed=1).double())[0]
    v = torch.linalg.qr(normal(columns, len(values), seed=2).double())[0]
    matrix: Tensor = u * torch.tensor(values, dtype=torch.float64) @ v.T
    return matrix.float()


# ---------------------------------------------------------------------------------------------------- sums


def test_a_dot_product_of_ten_million_elements_is_exact() -> None:
    """The sum over 1e7 float32 products, rests of blocks included, is right to 1e-12."""
    a, b = normal(10_000_019), normal(10_000_019, seed=1).abs() + 1
    for x, y in ((a, a), (b, b)):
        exact = float((x.double() * y.double()).sum())
        assert linalg.dot(x, y) == pytest.approx(exact, rel=1e-12)
    assert linalg.dot(a, b) == pytest.approx(float((a.double() * b.double()).sum()), abs=1e-6)


def test_a_dot_product_is_the_same_for_the_same_number_of_threads() -> None:
    """With one number of threads the sum has the same bits each time."""
    a, threads = normal(1_000_003), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert linalg.dot(a, a) == linalg.dot(a.clone(), a.clone())
    finally:
        torch.set_num_threads(threads)


def test_a_dot_product_takes_any_shape() -> None:
    """Scalars, empty tensors, matrices and views that are not contiguous are summed over all elements."""
    a = normal(6, 9)
    assert linalg.dot(torch.tensor(3.0), torch.tensor(2.0)) == 6.0
    assert linalg.dot(torch.empty(0), torch.empty(0)) == 0.0
    assert linalg.dot(a.T, a.T) == pytest.approx(linalg.dot(a, a), rel=1e-12)
    assert linalg.dot(torch.full((3,), 1e30), torch.full((3,), 1e30)) == pytest.approx(3e60, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cross_product_is_summed_in_float64(shape: tuple[int, int]) -> None:
    """a b^T equals the product of the float64 matrices."""
    a, b = normal(*shape), normal(*shape, seed=1)
    assert torch.allclose(linalg.cross(a, b), a.double() @ b.double().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_lying_down_twice_is_standing(shape: tuple[int, int]) -> None:
    """The smaller side comes first, and doing it twice gives the matrix back."""
    matrix = normal(*shape)
    assert linalg.lying(matrix).shape == tuple(sorted(shape))
    again = linalg.lying(matrix) if shape[0] <= shape[1] else linalg.lying(matrix).T
    assert torch.equal(again, matrix)


@given(columns=st.integers(0, 10_000_000), rows=st.integers(1, 5000))
def test_panels_tile_the_columns(columns: int, rows: int) -> None:
    """Panels cover every column once and hold at most about two million elements, or one column."""
    cut = list(linalg.panels(columns, rows))[:3]
    assert all(s.stop - s.start == 1 or (s.stop - s.start) * rows <= linalg.PANEL_ELEMENTS for s in cut)
    assert [s.start for s in cut] == [0, *(s.stop for s in cut)][: len(cut)]


# ------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] <= shape[1]])
def test_the_spectrum_is_that_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    """Singular values and what the vectors span equal those of torch.linalg.svd in float64."""
    matrix = normal(*shape)
    vectors, s = linalg.spectrum(matrix)
    u, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert s.dtype == vectors.dtype == torch.float64
    assert torch.allclose(s, values, rtol=1e-9)
    assert torch.allclose(vectors.T @ vectors, torch.eye(len(s), dtype=torch.float64), atol=1e-12)
    assert torch.allclose((vectors.T @ u).abs(), torch.eye(len(s), dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (20, 50)])
@pytest.mark.parametrize("rank", [1, 4, 19])
def test_a_matrix_of_low_rank_has_as_many_directions(rows: int, columns: int, rank: int) -> None:
    """The product of thin factors, rounded to float32, has their rank and no directions beyond it."""
    matrix = normal(rows, rank) @ normal(rank, columns, seed=1)
    vectors, s = linalg.spectrum(matrix)
    assert vectors.shape == (rows, rank)
    assert s.shape == (rank,)


@pytest.mark.parametrize(("factor", "counted"), [(1.5, 3), (0.7, 2)])
def test_the_rank_counts_what_float32_can_hold(factor: float, counted: int) -> None:
    """A singular value counts when it exceeds max(m, n) * 1.19e-7 times the largest."""
    matrix = torch.zeros(3, 100)
    smallest = factor * 100 * 1.1920929e-07
    matrix[range(3), range(3)] = torch.tensor([1.0, 0.5, smallest])
    assert len(linalg.spectrum(matrix)[1]) == counted


def test_zeros_have_no_spectrum() -> None:
    """A matrix of zeros has rank 0: no values, no vectors."""
    vectors, s = linalg.spectrum(torch.zeros(3, 5))
    assert vectors.shape == (3, 0)
    assert not s.numel()


@given(
    values=st.lists(st.integers(1, 1000), max_size=12).map(lambda found: sorted(found, reverse=True)),
    eighths=st.integers(0, 7),
)
def test_the_split_rank_counts_shares_of_the_sum(values: list[int], eighths: int) -> None:
    """r is the number of leading values whose cumulative share is at most alpha, ties included."""
    alpha, total = Fraction(eighths, 8), sum(values)
    expected = sum(Fraction(sum(values[: i + 1])) <= alpha * total for i in range(len(values)))
    assert linalg.split_rank(torch.tensor(values, dtype=torch.float64), float(alpha)) == expected


@given(
    values=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=60).map(lambda v: sorted(v, reverse=True)),
    alpha=st.sampled_from([0.999, 1 - 1e-12, 0.9999999999999999]),
)
def test_some_direction_is_always_left(values: list[float], alpha: float) -> None:
    """However near alpha is to 1, the last direction is never split off: a share below 1 is not the whole."""
    assert linalg.split_rank(torch.tensor(values, dtype=torch.float64), alpha) < len(values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-20, 1e-4, 1e15])
def test_statistics_are_sums_of_powers_of_singular_values(shape: tuple[int, int], size: float) -> None:
    """||X||_F, ||X^T X||_F and s_1, whatever the matrix's size, shape or orientation."""
    matrix = with_values([4.0, 2.0, 1.0][: min(shape)], *shape) * size
    s = torch.linalg.svdvals(matrix.double())
    norm, gram, largest = linalg.statistics(matrix)
    assert norm == pytest.approx(float(s.square().sum().sqrt()), rel=1e-9)
    assert gram == pytest.approx(float(s.pow(4).sum().sqrt()), rel=1e-5)
    assert largest == pytest.approx(float(s[0]), rel=1e-5)


def test_the_largest_singular_value_of_noise_is_within_a_percent() -> None:
    """Where singular values lie close together, as in noise, the power iteration is less than 1 % low."""
    for seed in range(5):
        matrix = normal(128, 200, seed=seed)
        true = float(torch.linalg.matrix_norm(matrix.double(), 2))
        found = linalg.statistics(matrix)[2]
        assert 0.99 * true <= found <= true * (1 + 1e-5)


def test_statistics_of_zeros_are_zero() -> None:
    """Nothing is divided by the norm of a weight that did not change."""
    assert linalg.statistics(torch.zeros(3, 5)) == (0.0, 0.0, 0.0)
