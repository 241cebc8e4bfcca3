"""Linear algebra that methods share: norms, Gram matrices, spectra, the split rank, the projected step.

Knows matrices, not models. Matrices are float32; what is summed over many elements is summed in float64,
panel by panel, so that no float64 copy of a whole weight and no n x n matrix for a wide weight is ever made.

Letters: D running sum, X new delta, U and s left singular vectors and singular values of D, r split rank, all
oriented so that m <= n (`lying`), because every formula here commutes with transposition. A delta may be a
matrix or two thin factors of one (`LowRank`), which are not multiplied out where the formula can do without.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
DOT_ELEMENTS = 1 << 16
SMALLEST_SUM = 1e-25  # of float32 products; below it they may have vanished
PANEL_ELEMENTS = 1 << 21
GRAM_BLOCKS, SMALLEST_BLOCK = 4, 64
FLOAT32_EPSILON = 1.1920929e-07
INTERFERENCE_LEVEL = 0.9
CLAMP = 3.0
POWER_ITERATIONS = 64
POWER_TOLERANCE = 1e-7


@dataclass(frozen=True)
class LowRank:
    """A matrix [m, n] as left [m, r] @ right [r, n], float32; r may be 0, which is the zero matrix."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """[m, n]."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def T(self) -> LowRank:  # noqa: N802 -- torch's own name for it
        """The transposed matrix."""
        return LowRank(self.right.T, self.left.T)


Delta = torch.Tensor | LowRank
Read = Callable[[torch.Tensor], Delta]  # computes a delta of the base's values
Oriented = TypeVar("Oriented", torch.Tensor, LowRank, Delta)


def dense(delta: Delta) -> Tensor:
    """Multiply the factors out."""
    return delta.left @ delta.right if isinstance(delta, LowRank) else delta


def is_zero(delta: Delta) -> bool:
    """Whether every element is exactly zero."""
    return squares(delta) == 0.0 if isinstance(delta, LowRank) else not bool(delta.any())


def squares(delta: Delta) -> float:
    """||delta||_F^2 in float64; of factors by their Gram matrices: tr((L^T L) (R R^T))."""
    if isinstance(delta, LowRank):
        found = float((cross(delta.left.T, delta.left.T) * cross(delta.right, delta.right)).sum())
        return found if math.isnan(found) else max(found, 0.0)
    return dot(delta, delta)


def inner(delta: Delta, matrix: Tensor) -> float:
    """<delta, matrix>; of factors as <L^T matrix, R>."""
    if isinstance(delta, LowRank):
        return dot(delta.left.T @ matrix, delta.right)
    return dot(delta, matrix)


def times(matrix: Tensor, delta: Delta) -> Tensor:
    """Matrix product matrix @ delta."""
    return (matrix @ delta.left) @ delta.right if isinstance(delta, LowRank) else matrix @ delta


def plus(matrix: Tensor, delta: Delta, *, scale: float = 1.0, factor: float = 1.0) -> Tensor:
    """Give scale * matrix + factor * delta as a new matrix."""
    if isinstance(delta, LowRank):
        return torch.addmm(matrix, delta.left, delta.right, beta=scale, alpha=factor)
    if scale == 1.0:
        return torch.add(matrix, delta, alpha=factor)
    return torch.add(delta if factor == 1.0 else factor * delta, matrix, alpha=scale)


def scaled(delta: Delta, factor: float) -> Delta:
    """Multiply every element."""
    return LowRank(delta.left * factor, delta.right) if isinstance(delta, LowRank) else delta * factor


def dot(a: Tensor, b: Tensor) -> float:
    """Sum of a * b in float64, over blocks of fixed size: the same bits for the same number of threads."""
    a, b = a.reshape(-1), b.reshape(-1)
    if a.device.type != "cpu":
        blocks = [
            torch.dot(x.double(), y.double())
            for x, y in zip(a.split(PANEL_ELEMENTS), b.split(PANEL_ELEMENTS), strict=True)
        ]
        return float(torch.stack(blocks).sum()) if blocks else 0.0
    return sum(
        float(torch.dot(x.double(), y.double()))
        for x, y in zip(a.split(BLOCK_ELEMENTS), b.split(BLOCK_ELEMENTS), strict=True)
    )


def dot32(a: Tensor, b: Tensor) -> float:
    """Sum of a * b, blocks of DOT_ELEMENTS in float32 and their sums in float64: for lengths and health.

    Within 1e-6 of |a| |b|, at the speed of the memory; `dot` is for where differences of sums matter.
    """
    if a.device.type != "cpu":
        return dot(a, b)
    a, b = a.reshape(-1), b.reshape(-1)
    cuts = (slice(start, start + DOT_ELEMENTS) for start in range(0, a.numel(), DOT_ELEMENTS))
    found = math.fsum(float(torch.dot(a[cut], b[cut])) for cut in cuts)
    return found if SMALLEST_SUM < abs(found) < math.inf else dot(a, b)


def lying(matrix: Oriented) -> Oriented:
    """View a matrix with its smaller side first; applied twice it is the identity."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def panels(columns: int, rows: int) -> Iterator[slice]:
    """Cut the columns of a [rows, columns] matrix into slices of about PANEL_ELEMENTS elements."""
    width = max(1, PANEL_ELEMENTS // max(rows, 1))
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def cross(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in float64. a, b [m, n] float32 -> [m, m] float64."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for cut in panels(a.shape[1], a.shape[0]):
        total.addmm_(a[:, cut].double(), b[:, cut].double().T)
    return total


def gram(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Lower triangle of matrix matrix^T, [m, m] `dtype`; what stands above the diagonal means nothing.

    matrix  [m, n] float32, converted panel by panel; five eighths of the work of a whole product
    """
    m, n = matrix.shape
    total = torch.zeros(m, m, dtype=dtype, device=matrix.device)
    step = max(-(-m // GRAM_BLOCKS), SMALLEST_BLOCK)
    for cut in panels(n, m):
        panel = matrix[:, cut].to(dtype)
        for top in range(0, m, step):
            total[top:, top : top + step].addmm_(panel[top:], panel[top : top + step].T)
    return total


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values above the numerical rank, largest first.

    matrix   [m, n] float32, m <= n
    returns  U [m, q] float64, s [q] float64

    By the eigenvectors of the Gram matrix in float64: as exact as an SVD for what float32 storage can hold
    (s_i > max(m, n) * 1.19e-7 * s_1, the rank rule), and no [n, n] matrix is made.
    """
    values, vectors = torch.linalg.eigh(gram(matrix))  # which reads the lower triangle alone
    s = values.clamp_(min=0).sqrt_().flip(0)
    q = int((s > max(matrix.shape) * FLOAT32_EPSILON * s[0]).sum()) if s.numel() else 0
    return vectors.flip(1)[:, :q], s[:q]


def applied(operator: Tensor, matrix: Tensor) -> Tensor:
    """Matrix product operator @ matrix as float32; [r, m] float64 times [m, n] float32, summed in float64."""
    out = torch.empty(operator.shape[0], matrix.shape[1], device=matrix.device)
    for cut in panels(matrix.shape[1], max(matrix.shape[0], operator.shape[0])):
        out[:, cut] = (operator @ matrix[:, cut].double()).float()
    return out


def polar(matrix: Tensor) -> Tensor:
    """Nearest matrix with orthonormal columns: X (X^T X)^(-1/2), [m, k] float32, k <= m.

    Columns that others hold already, or that are zero, add no direction.
    """
    rows = matrix.T
    vectors, s = spectrum(rows)
    return applied(vectors / s @ vectors.T, rows).T


def capped(
    matrix: Tensor, figures: Tensor, *, level: str, strength: float, kappa: float, beta: float
) -> Tensor:
    """Bound the spectrum of a sum by that of its parts: U min(beta s, c) V^T.

    matrix   [m, n] float32, U s V^T
    figures  [parts, 3] float64, `statistics` of each; fewer than two that are not zero leave it as it is
    level    "interference": c = strength * `interference_bound`; "fixed": c = kappa * the clamped mean of the
             parts' largest singular values
    """
    there = figures[figures[:, 0] > 0]
    if len(there) < 2:
        return matrix
    wide = lying(matrix)
    vectors, s = spectrum(wide)
    if not s.numel():
        return matrix
    cap = kappa * clamped_mean(there[:, 2]) if level == "fixed" else strength * interference_bound(there, s)
    over = int((beta * s > cap).sum())
    top = vectors[:, :over].float()
    lowered = (top.T @ wide).mul_((beta - cap / s[:over]).float().unsqueeze(1))
    found = torch.addmm(wide, top, lowered, beta=beta, alpha=-1.0)
    return (found if found.shape == matrix.shape else found.T).contiguous()


def interference_bound(figures: Tensor, s: Tensor) -> float:
    """A bound for a sum's singular values s that falls where its parts collide: 0.9 w sqrt(R / tau_S).

    tau(d) = ||d^T d||_F / ||d||_F is a part's energy-weighted singular value, w the clamped mean of the
    parts' taus, R the root of the sum of their squares, tau_S the sum's own tau. tau_S / R is 1 for parts
    that share no direction and sqrt(n) for n copies of one.
    """
    taus = figures[:, 1] / figures[:, 0]
    tau_of_sum = float(s.pow(4).sum().sqrt() / s.square().sum().sqrt())
    together = float(taus.square().sum().sqrt())
    return INTERFERENCE_LEVEL * clamped_mean(taus) * math.sqrt(together / tau_of_sum)


def clamped_mean(values: Tensor) -> float:
    """Geometric mean of positive values [n], each clamped to a third and to three times their median.

    One delta that is nearly empty, or ten times as long as the others, must not move it.
    """
    middle = float(values.quantile(0.5))
    return math.exp(float(values.clamp(middle / CLAMP, middle * CLAMP).log().mean()))


def split_rank(s: Tensor, alpha: float) -> int:
    """Count the leading singular values whose cumulative share of sum(s) is at most alpha < 1: never all."""
    if not s.numel():
        return 0
    return min(int((s.cumsum(0) <= alpha * s.sum()).sum()), s.numel() - 1)


def statistics(delta: Delta) -> tuple[float, float, float]:
    """||delta||_F, ||delta^T delta||_F and the largest singular value of a matrix [m, n] float32."""
    norm = squares(delta) ** 0.5
    if norm == 0.0:
        return 0.0, 0.0, 0.0
    if isinstance(delta, LowRank):
        s = singular_values(delta)
        return norm, float(s.square().square().sum()) ** 0.5, float(s[0])
    lower = gram(
        lying(delta) / norm, torch.float32
    ).tril_()  # of norm 1: squares of tiny deltas stay in range
    unit = lower + lower.tril(-1).T
    return norm, norm**2 * dot(unit, unit) ** 0.5, norm * largest_eigenvalue(unit) ** 0.5


def singular_values(delta: LowRank) -> Tensor:
    """Singular values [min(m, n, r)] float64, largest first: those of the factors' triangular parts."""
    left, right = (torch.linalg.qr(part.double(), mode="r").R for part in (delta.left, delta.right.T))
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def largest_eigenvalue(gram: Tensor) -> float:
    """Largest eigenvalue of a positive semi-definite [m, m] matrix, by power iteration from a fixed seed."""
    seed = torch.Generator().manual_seed(0)
    vector = torch.randn(gram.shape[0], generator=seed, dtype=torch.float32).to(gram.device)
    previous = value = 0.0
    for step in itertools.count(1):
        vector = gram @ (vector / vector.norm())
        value = float(vector.norm())
        if step == POWER_ITERATIONS or abs(value - previous) <= POWER_TOLERANCE * value:
            return value
        previous = value
    raise AssertionError  # itertools.count never ends
