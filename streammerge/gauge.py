"""Was a fine-tune's attention turned in a way that leaves its function as it was?

Queries and keys of a head act only through Wq^T Wk, values and outputs through Wo Wv. MergeLock (arXiv
2509.01548) multiplies A into one factor and its inverse into the other: the model computes what it did, and
merged with any other it computes noise. A permutation inside heads does the same by accident. So weights far
from the base's with products near the base's are such a model; weights and products both far are another
model's. Recognised here, never undone.

Attention is found by the names under which libraries save it, head counts by the base's config.json. Reads
one product's two factors at a time, and only where a weight is far from the base's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge import linalg

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from streammerge.arriving import Incoming
    from streammerge.headers import Entry
    from streammerge.weights import Weights

# How query, key, value and output end: Llama, Qwen, Mistral, Gemma; OPT, CLIP; BERT; ViT; T5; DistilBERT.
NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("q", "k", "v", "o"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)
FUSED = ("c_attn", "c_proj")  # GPT-2: query, key and value side by side, all transposed
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


class Factor(NamedTuple):
    """One projection: rows [start, stop) of a weight, or of its transpose."""

    name: str
    start: int
    stop: int
    transposed: bool = False


class Product(NamedTuple):
    """Two projections that act only through their product, head by head: [heads * width, n] each.

    shared  heads of `left` that use one head of `right` (grouped queries)
    """

    left: Factor
    right: Factor
    width: int
    shared: int


@dataclass(frozen=True)
class Distance:
    """How far one product's factors and the product itself are from the base's, relative to those."""

    name: str
    raw: float
    invariant: float


def products(base: Mapping[str, Entry], config: Mapping[str, Any]) -> list[Product]:
    """Find the attention of a model; nothing where names or head counts are not known."""
    found: list[Product] = []
    sections = [config, *(part for part in config.values() if isinstance(part, dict))]
    heads, section = next(
        ((int(part[key]), part) for part in sections for key in HEADS if isinstance(part.get(key), int)),
        (0, {}),
    )
    if heads < 1:
        return []
    for name, entry in base.items():
        if len(entry.shape) != 2:
            continue
        for query, *others in NAMES:
            if not name.endswith(f".{query}.weight"):
                continue
            stem = name.removesuffix(f"{query}.weight")
            key, value, output = (f"{part}.weight" for part in others)
            # BERT keeps the output one level above: attention.self.query, attention.output.dense
            above = stem if stem + output in base else stem.rpartition("attention.")[0] + "attention."
            names = (name, stem + key, stem + value, above + output)
            if all(n in base and len(base[n].shape) == 2 for n in names):
                found += _separate(base, names, heads, section)
                break
        if name.endswith(f".{FUSED[0]}.weight"):
            found += _fused(base, name, heads)
    return found


def _separate(
    base: Mapping[str, Entry], names: tuple[str, ...], heads: int, section: Mapping[str, Any]
) -> list[Product]:
    query, key, value, output = names
    rows, few = base[query].shape[0], base[key].shape[0]
    width = section.get("head_dim")
    width = width if isinstance(width, int) and width > 0 else rows // heads
    fits = width and rows % width == 0 and few % width == 0 and few and rows % few == 0
    if not fits or base[value].shape[0] != few or base[output].shape[1] != rows:
        return []
    shared = rows // few
    return [
        Product(Factor(query, 0, rows), Factor(key, 0, few), width, shared),
        Product(Factor(output, 0, rows, transposed=True), Factor(value, 0, few), width, shared),
    ]


def _fused(base: Mapping[str, Entry], name: str, heads: int) -> list[Product]:
    output = name.removesuffix(f"{FUSED[0]}.weight") + f"{FUSED[1]}.weight"
    size = base[name].shape[0]
    if base[name].shape[1] != 3 * size or output not in base or base[output].shape != (size, size):
        return []
    if size % heads:
        return []
    query, key, value = (Factor(name, i * size, (i + 1) * size, transposed=True) for i in range(3))
    width = size // heads
    return [Product(query, key, width, 1), Product(Factor(output, 0, size), value, width, 1)]


def measure(
    found: list[Product],
    incoming: Incoming,
    base: Weights,
    moved: Mapping[str, float],
    *,
    raw: float,
    beat: Callable[[], None] = lambda: None,
) -> list[Distance]:
    """Give the distances of every product one of whose weights moved by more than `raw` lengths of its own.

    moved  how far each weight moved, as the fold of this fine-tune saw it; it is still open
    """
    far = {name for name, distance in moved.items() if distance > raw}

    def pair(factor: Factor) -> tuple[Tensor, Tensor]:
        original = base.read(factor.name).float()
        delta = incoming.finetune.read(factor.name, 0, original.numel())(original)
        tuned = linalg.plus(original, delta)
        both = (m.T if factor.transposed else m for m in (original, tuned))
        before, after = (m[factor.start : factor.stop] for m in both)
        return before, after

    distances = []
    with incoming.finetune.rereading():
        for product in found:
            if {product.left.name, product.right.name} & far:
                left, right = pair(product.left), pair(product.right)
                apart = invariant(*left, *right, width=product.width, shared=product.shared)
                if math.isfinite(apart):
                    name = f"{product.left.name} with {product.right.name}"
                    distances.append(Distance(name, _raw(left, right), apart))
            beat()
    return distances


def _raw(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    squares = sum(linalg.squares(after - before) for before, after in (left, right))
    return math.sqrt(squares / sum(linalg.squares(before) for before, _ in (left, right)))


def invariant(
    left: Tensor, new_left: Tensor, right: Tensor, new_right: Tensor, *, width: int, shared: int = 1
) -> float:
    """||P' - P|| / ||P|| over all heads, with P = A^T B of a head; no P is ever made.

    left, new_left    [heads * width, m], before and after: A of each head, one below the other
    right, new_right  [heads / shared * width, n]: B

    ||A^T B||_F^2 = <A A^T, B B^T>, and so for every inner product of two such: [width, width] matrices.
    """
    apart = whole = 0.0
    for head in range(left.shape[0] // width):
        here = slice(head * width, (head + 1) * width)
        there = slice(head // shared * width, (head // shared + 1) * width)
        a, c, b, d = left[here], new_left[here], right[there], new_right[there]
        old = float((linalg.cross(a, a) * linalg.cross(b, b)).sum())
        new = float((linalg.cross(c, c) * linalg.cross(d, d)).sum())
        mixed = float((linalg.cross(c, a) * linalg.cross(d, b)).sum())
        apart += max(old + new - 2 * mixed, 0.0)
        whole += old
    return math.sqrt(apart / whole) if whole else math.inf  # a product that the base does not have yet
