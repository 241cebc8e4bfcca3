"""Order statistics of a stream equal those of a sort, bit for bit, however the stream is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammerge.selection import Cut, select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 1e-45  # the least float32 above zero, a denormal

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "bf16": lambda x: x.bfloat16().float(),
    "constant": lambda x: torch.full_like(x, -1.5),
    "zero": torch.zeros_like,
    "negative": lambda x: -x.abs() - 1e-3,
    "magnitudes": lambda x: x.abs(),
    "denormal": lambda x: (x * 4).round() * SMALLEST,
    "huge": lambda x: x.sign() * (1 - x.abs().clamp(max=1) * 1e-3) * LARGEST,
    "few": lambda x: (x * 2).round() / 2,
    "every size": lambda x: x * 10 ** (x * 12),
    "one in a hundred": lambda x: torch.where(x > 2.3, x, torch.zeros_like(x)),
}


def values_of(kind: str, size: int, seed: int) -> Tensor:
    """Draw float32 values; no zero among them is negative."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return KINDS[kind](drawn) + 0.0


def cut(values: Tensor, edges: list[int]) -> Iterator[Tensor]:
    """Cut a vector at these places; some of the parts are empty, some are matrices."""
    parts = torch.tensor_split(values, sorted(edges)) if edges else (values,)
    return (part.reshape(2, -1) if part.numel() % 2 == 0 and part.numel() else part for part in parts)


def by_definition(values: Tensor, rank: int) -> Cut:
    """The element of a rank: of equal elements the earlier is the larger."""
    order = sorted(range(values.numel()), key=lambda i: (float(values[i]), -i))
    return Cut(float(values[order[rank - 1]]), order[rank - 1])


Stream = tuple[Tensor, list[int], list[int]]


@st.composite
def streams(draw: st.DrawFn, largest: int) -> Stream:
    """Draw values, where to cut them, and ranks, both ends of the order among them."""
    size = draw(st.integers(1, largest))
    values = values_of(draw(st.sampled_from(sorted(KINDS))), size, draw(st.integers(0, 1 << 20)))
    ranks = draw(st.lists(st.integers(1, size), max_size=3))
    return values, draw(st.lists(st.integers(0, size), max_size=5)), [*ranks, 1, size]


@given(stream=streams(5000))
@settings(deadline=None, max_examples=60)
def test_it_is_the_kth_value_for_any_cutting(stream: Stream) -> None:
    """Each rank gives what torch.kthvalue gives, all ranks at once and each on its own."""
    values, edges, ranks = stream
    found = select(lambda: cut(values, edges), ranks)
    assert [c.value for c in found] == [float(values.kthvalue(rank).values) for rank in ranks]
    assert select(lambda: [values], ranks[:1]) == found[:1]


@given(stream=streams(150))
@example(stream=(torch.zeros(5), [2, 3], [1, 2, 3, 4, 5]))
@settings(deadline=None, max_examples=60)
def test_of_equal_elements_the_earlier_is_the_larger(stream: Stream) -> None:
    """Places are those of the order by value, then from back to front, also across the stream's parts."""
    values, edges, ranks = stream
    found = select(lambda: cut(values, edges), ranks, placed=True)
    assert list(found) == [by_definition(values, rank) for rank in ranks]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_values_is_ordered(kind: str) -> None:
    """No value is too small, too large or too common: the whole order comes back."""
    values = values_of(kind, 64, 7)
    found = select(lambda: values.split(20), range(1, 65), placed=True)
    assert list(found) == [by_definition(values, rank) for rank in range(1, 65)]


def test_places_are_looked_for_only_where_they_are_wanted() -> None:
    """Equal elements fill their ranks from back to front; unasked, a place is -1."""
    values, ranks = torch.full((7,), 2.5), range(1, 8)
    placed = select(lambda: [values[:3], values[3:]], ranks, placed=True)
    assert [c.place for c in placed] == [6, 5, 4, 3, 2, 1, 0]
    assert {c.place for c in select(lambda: [values], ranks)} == {-1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_float_dtypes_are_taken_as_they_are(dtype: torch.dtype) -> None:
    """Values of fewer bits are ordered as float32 holds them."""
    values = values_of("random", 999, 3).to(dtype)
    (found,) = select(lambda: values.split(100), [500])
    assert found.value == float(values.float().kthvalue(500).values)


def test_no_rank_reads_nothing() -> None:
    """Where nothing is asked for, the stream is not begun."""

    def never() -> Iterator[Tensor]:
        raise AssertionError

    assert select(never, []) == ()


def test_a_stream_is_read_twice_and_a_third_time_for_places() -> None:
    """However many ranks are asked for: each reading may be one of a large file."""
    begun = []

    def stream() -> list[Tensor]:
        begun.append(1)
        return [torch.arange(10.0)]

    select(stream, [3, 7, 1])
    assert len(begun) == 2
    select(stream, [3, 7, 1], placed=True)
    assert len(begun) == 5
