"""Toy models with attention, and what is done to attention so that it cannot be merged.

A lock multiplies a matrix into one projection of a head and its inverse into the one it acts with, as
MergeLock does (arXiv 2509.01548); with permutations as matrices, it is a permutation inside heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

WIDTH, HEADS, SHARED, HIDDEN = 8, 8, 2, 32
CONFIG: dict[str, Any] = {
    "model_type": "toy",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // SHARED,
    "head_dim": WIDTH,
}


class Layer(NamedTuple):
    """The names of one layer's projections."""

    query: str
    key: str
    value: str
    output: str


def layer(number: int) -> Layer:
    """Name them as Llama does."""
    stem = f"model.layers.{number}.self_attn"
    return Layer(*(f"{stem}.{part}_proj.weight" for part in "qkvo"))


def make_base(*, layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Make a base with grouped queries: every two heads share a key and a value."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) / 4

    few = HEADS // SHARED * WIDTH
    tensors = {"model.embed_tokens.weight": normal(60, HIDDEN)}
    for number in range(layers):
        names = layer(number)
        shapes = ((HEADS * WIDTH, HIDDEN), (few, HIDDEN), (few, HIDDEN), (HIDDEN, HEADS * WIDTH))
        tensors |= {name: normal(*shape) for name, shape in zip(names, shapes, strict=True)}
        tensors[f"model.layers.{number}.mlp.up_proj.weight"] = normal(48, HIDDEN)
    return tensors


def tuned(base: Mapping[str, Tensor], seed: int, share: float = 0.02) -> dict[str, Tensor]:
    """Train a little: every weight moves by this share of its own length."""
    random = torch.Generator().manual_seed(seed)
    steps = {name: torch.randn(values.shape, generator=random) for name, values in base.items()}
    return {name: v + steps[name] * (share * v.norm() / steps[name].norm()) for name, v in base.items()}


def turned(
    tensors: Mapping[str, Tensor],
    names: Iterable[Layer],
    matrix: Callable[[int], Tensor],
    *,
    width: int = WIDTH,
    shared: int = SHARED,
) -> dict[str, Tensor]:
    """Multiply matrix(n), [width, width], into every head, and its inverse out of the head's partner."""
    found = {name: values.clone() for name, values in tensors.items()}
    number = 0
    for part in names:
        for group in range(found[part.key].shape[0] // width):
            a, b = matrix(number).double(), matrix(number + 1).double()
            number += 2
            here = slice(group * width, (group + 1) * width)
            found[part.key][here] = (torch.linalg.inv(a).T @ found[part.key][here].double()).float()
            found[part.value][here] = (b @ found[part.value][here].double()).float()
            for head in range(group * shared, (group + 1) * shared):
                rows = slice(head * width, (head + 1) * width)
                found[part.query][rows] = (a @ found[part.query][rows].double()).float()
                columns = found[part.output][:, rows].double() @ torch.linalg.inv(b)
                found[part.output][:, rows] = columns.float()
    return found


def lock(width: int = WIDTH) -> Callable[[int], Tensor]:
    """Give random matrices that can be inverted."""
    return lambda n: torch.randn(width, width, generator=torch.Generator().manual_seed(n))


def permutation(width: int = WIDTH) -> Callable[[int], Tensor]:
    """Give random permutations."""
    return lambda n: torch.eye(width)[torch.randperm(width, generator=torch.Generator().manual_seed(n))]
