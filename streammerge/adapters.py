"""LoRA adapters as PEFT publishes them, opened as deltas of the base: never a full-size copy of one.

Knows PEFT's names and settings; nothing of engines or methods. The delta of a projected weight stays in its
two factors (`linalg.LowRank`); what is no product of factors (DoRA, whole modules saved beside the adapter)
is computed for one weight, or a panel of one, at a time. What the settings mean follows PEFT's own merge
(tests/test_adapters.py); an adapter whose delta is not known exactly is refused by name.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from streammerge.errors import Refused
from streammerge.fit import common_prefix, refuse_strange, refuse_untied, wrong_base
from streammerge.linalg import LowRank
from streammerge.lora import MERGE_FIRST, malformed, read_settings, unsupported
from streammerge.plan import ADDED, PROJECTED
from streammerge.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from torch import Tensor

    from streammerge.fit import Tolerance
    from streammerge.headers import Entry, WeightsSet
    from streammerge.linalg import Delta, Read
    from streammerge.plan import Plan

PREFIX = "base_model.model."  # a PeftModel holds a LoraModel, which holds the model that was adapted
# How a tensor's name ends -> what it is to the module's weight or bias; any other stands in a weight's place.
ENDINGS = {
    ".lora_A.weight": ("A", ".weight"),
    ".lora_B.weight": ("B", ".weight"),
    ".lora_embedding_A": ("embedding A", ".weight"),
    ".lora_embedding_B": ("embedding B", ".weight"),
    ".lora_magnitude_vector": ("magnitude", ".weight"),
    ".lora_magnitude_vector.weight": ("magnitude", ".weight"),
    ".lora_B.bias": ("bias", ".bias"),
    ".base_layer.weight": ("whole", ".weight"),
    ".base_layer.bias": ("whole", ".bias"),
}
MAX_RANK = 1024  # or the smaller side of the weight, where that is more


@dataclass
class Change:
    """What an adapter holds for one weight: the tensors' names by their part, and the module's path.

    That of a head which the base ties to its embedding must repeat the embedding's own, and counts once.
    """

    module: str
    parts: dict[str, str] = field(default_factory=dict)
    is_head: bool = False

    @property
    def factors(self) -> tuple[str, str] | None:
        """The names of A and B; None where there are none."""
        kinds = [[self.parts.get(f"{infix}{letter}") for letter in "AB"] for infix in ("", "embedding ")]
        found = [pair for pair in kinds if any(pair)]
        if len(found) == 2 or any(None in pair for pair in found):
            raise malformed(f"{self.module} does not have one A and one B")
        return (str(found[0][0]), str(found[0][1])) if found else None


class Adapter:
    """An open LoRA adapter of the base."""

    in_panels = False

    def __init__(
        self, found: WeightsSet, base: Mapping[str, Entry], plan: Plan, tolerance: Tolerance
    ) -> None:
        """Open the file and fit it to the base; raises Refused."""
        self.settings = read_settings(found.adapter or {})
        self._base, self._plan = base, plan
        self.weights = Weights(found, hashing=True)
        try:
            self.changes = self._fit(tolerance)
            self.settings.refuse_slow({c.module for changes in self.changes.values() for c in changes})
            self._lowrank = {name: self._check(name, changes) for name, changes in self.changes.items()}
        except BaseException:
            self.weights.__exit__(None, None, None)
            raise
        self._loaded: tuple[str, list[LowRank | None]] = ("", [])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.weights.__exit__(kind, error, trace)

    @contextmanager
    def rereading(self) -> Iterator[None]:
        """See finetune.Deltas.rereading."""
        with self.weights.unhashed():
            yield
        self._loaded = ("", [])

    def _fit(self, tolerance: Tolerance) -> dict[str, list[Change]]:
        """Find the base's weight that each tensor changes; what changes a tied head stands last."""
        targets = group(self.weights.entries)
        rename = common_prefix(self._base, targets)
        changes: dict[str, list[Change]] = {}
        heads, strange = [], []
        for target, change in targets.items():
            name = rename(target)
            place = self._plan.tied.get(name, name)
            if place in self._base and place == name:
                changes.setdefault(place, []).append(change)
            elif place in self._base or self._may_be_head(change):
                heads.append((place if place in self._base else self._plan.embedding, change))
            else:
                strange.append(target)
        for embedding, head in heads:
            changes.setdefault(embedding, []).append(replace(head, is_head=True))
        if not changes:
            what = f"it changes {next(iter(targets))} and the like"
            raise wrong_base(f"{what}, none of which the base has; the base has {min(self._base)}")
        refuse_strange(strange, tolerance)
        return changes

    def _may_be_head(self, change: Change) -> bool:
        """Whether a tensor that the base has not is the head that the base ties to its embedding."""
        if self._plan.embedding not in self._base:
            return False
        shape = self._base[self._plan.embedding].shape
        if "whole" in change.parts:
            return self.weights.entries[change.parts["whole"]].shape == shape
        factors = change.factors
        return (
            factors is not None and self._shape(*factors, is_embedding="embedding A" in change.parts) == shape
        )

    def _shape(self, a: str, b: str, *, is_embedding: bool) -> tuple[int, int]:
        """The shape of B A, or of its transpose for an embedding."""
        first, second = self.weights.entries[a].shape, self.weights.entries[b].shape
        if len(first) != 2 or len(second) != 2 or first[0] != second[1]:
            raise malformed(f"{a} is {list(first)} and {b} is {list(second)}: no two factors of one matrix")
        return (first[1], second[0]) if is_embedding else (second[0], first[1])

    def _check(self, name: str, changes: list[Change]) -> bool:
        """Refuse what does not fit one weight of the base; gives whether its delta is factors alone."""
        entry, alone = self._base[name], True
        if not entry.is_floating:
            raise Refused("unsupported-dtype", f"{name} is {entry.dtype} in the base", hint=MERGE_FIRST)
        for change in changes:
            if change.is_head and (changes[0].is_head or bool(change.factors) > bool(changes[0].factors)):
                raise refuse_untied(change.module, name)
            tensors = [self.weights.entries[tensor] for tensor in change.parts.values()]
            if odd := [tensor for tensor in tensors if not tensor.is_floating]:
                raise Refused(
                    "quantised",
                    f"{odd[0].name} is stored as {odd[0].dtype}",
                    hint="publish the adapter in bf16, f16 or f32",
                )
            alone = alone and change.factors is not None and len(tensors) == 2 and len(changes) == 1
            if change.factors:
                self._check_factors(entry, change)
            elif not change.parts.keys() & {"whole", "bias"}:
                raise malformed(f"{change.module} has a magnitude and no factors")
            if "bias" in change.parts:
                self._bias_scaling(change)
            for part in ("whole", "bias"):
                if part in change.parts and self.weights.entries[change.parts[part]].shape != entry.shape:
                    raise self._misfit(entry, self.weights.entries[change.parts[part]].shape)
        return alone and self._plan.kinds[name] == PROJECTED

    def _check_factors(self, entry: Entry, change: Change) -> None:
        assert change.factors
        is_embedding = "embedding A" in change.parts
        if len(entry.shape) != 2:
            raise unsupported(f"{entry.name} is no matrix; LoRA of a convolution")
        shape = self._shape(*change.factors, is_embedding=is_embedding)
        if shape != entry.shape and (is_embedding or shape[::-1] != entry.shape):
            raise self._misfit(entry, shape)
        rank = self.weights.entries[change.factors[0]].shape[0]
        if rank > max(MAX_RANK, *sorted(entry.shape)[:1]):  # its factors would be larger than the weight
            raise unsupported(f"LoRA of rank {rank:,} of {entry.name}, which is {list(entry.shape)},")
        self.settings.scaling(change.module, rank)
        if "magnitude" in change.parts:
            rows = self.weights.entries[change.parts["magnitude"]].elements
            if self._plan.kinds[entry.name] != PROJECTED or is_embedding or "whole" in change.parts:
                raise unsupported(f"DoRA of {entry.name}, which is read in panels,")
            if rows != (entry.shape[1] if self._is_transposed(entry, shape) else entry.shape[0]):
                raise self._misfit(entry, (rows,))

    def _misfit(self, entry: Entry, shape: tuple[int, ...]) -> Refused:
        grown = shape[1:] == entry.shape[1:] and self._plan.kinds[entry.name] == ADDED and len(shape) == 2
        return Refused(
            "vocab-resized" if grown else "wrong-shape",
            f"{entry.name} is {list(shape)} in the adapter and {list(entry.shape)} in the base",
            hint="check base_model_name_or_path in its adapter_config.json; "
            "a vocabulary that was resized cannot be folded",
        )

    def _is_transposed(self, entry: Entry, shape: tuple[int, int]) -> bool:
        """Whether the base stores the weight [in, out]; `shape` is [out, in]."""
        if shape != shape[::-1]:
            return shape != entry.shape
        return self.settings.fan_in_fan_out

    def read(self, name: str, start: int, stop: int) -> Read:
        """See finetune.Deltas.read: factors for a projected weight where that is exact."""
        changes = self.changes.get(name, [])
        if not changes:
            return _nothing
        if self._loaded[0] != name:  # each tensor is read once, front to back
            self._loaded = (name, self._products(self._base[name], changes))
        products = self._loaded[1]
        if self._lowrank.get(name):
            product = next(product for product in products if product)
            return lambda original: _on(product, original.device)
        steps = [
            self._step(name, start, stop, change, product)
            for change, product in zip(changes, products, strict=False)
        ]

        def total(original: Tensor) -> Tensor:
            found = torch.zeros_like(original)
            for step in steps:
                step(found, original)
            return found

        return total

    def _step(
        self, name: str, start: int, stop: int, change: Change, product: LowRank | None
    ) -> Callable[[Tensor, Tensor], None]:
        """Read one change of a weight's elements [start, stop); what it gives adds it to a total."""
        parts = change.parts
        magnitude = self._read(parts["magnitude"]).reshape(-1) if "magnitude" in parts else None
        whole = self._read(parts["whole"], start, stop) if "whole" in parts else None
        bias = None
        if "bias" in parts:
            bias = self._bias_scaling(change) * self._read(parts["bias"], start, stop)

        def add(total: Tensor, original: Tensor) -> None:
            on = original.device
            if magnitude is not None:
                assert product
                total += self._dora(name, change, original, _on(product, on), magnitude.to(on))
            elif product:
                total += _panel(_on(product, on), start, stop).reshape(original.shape)
            if whole is not None:
                total += whole.to(on).reshape(original.shape)
                total -= original
            if bias is not None:
                total += bias.to(on)

        return add

    def _products(self, entry: Entry, changes: list[Change]) -> list[LowRank | None]:
        """Read the factors of one weight; a tied head's must be the embedding's own, turned."""
        own = [change for change in changes if not change.is_head]
        factors = [tuple(self._read(t) for t in change.factors or ()) for change in own]
        for head in changes[len(own) :]:
            repeated = tuple(self._read(tensor).T for tensor in head.factors or ())[::-1]
            if repeated and not all(map(torch.equal, repeated, factors[0])):
                raise refuse_untied(head.module, entry.name)
        return [
            self._product(entry, c, *pair) if pair else None for c, pair in zip(own, factors, strict=True)
        ]

    def _bias_scaling(self, change: Change) -> float:
        """A bias of B is scaled as B is."""
        factor = self.weights.entries.get(change.parts["bias"].removesuffix("bias") + "weight")
        if factor is None or len(factor.shape) != 2:
            raise malformed(f"{change.module} has a bias of B and no B")
        return self.settings.scaling(change.module, factor.shape[1])

    def _read(self, tensor: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weights.read(tensor, start, stop).float()

    def _product(self, entry: Entry, change: Change, a: Tensor, b: Tensor) -> LowRank:
        """Turn a module's factors as the base stores the weight, the scaling in one of them."""
        b = b * self.settings.scaling(change.module, a.shape[0])
        is_turned = "embedding A" in change.parts or self._is_transposed(entry, (b.shape[0], a.shape[1]))
        return LowRank(a.T, b.T) if is_turned else LowRank(b, a)

    def _dora(
        self, name: str, change: Change, original: Tensor, product: LowRank, magnitude: Tensor
    ) -> Tensor:
        """(g - 1) W + g BA with g = m / ||W + BA|| for each output (arXiv 2402.09353 eq. 5)."""
        dense = product.left @ product.right
        assert change.factors
        shape = self._shape(*change.factors, is_embedding=False)
        outputs = 0 if self._is_transposed(self._base[name], shape) else 1
        norm = torch.linalg.vector_norm(original + dense, dim=outputs, dtype=torch.float64)
        gain = (magnitude.double() / norm).unsqueeze(outputs)
        return dense.mul_(gain.float()).addcmul_(original, (gain - 1).float())

    def finish(self) -> str:
        """See finetune.Deltas.finish; a tied head that was saved twice must repeat its embedding."""
        self.weights.read_rest()
        for embedding, changes in self.changes.items():
            for head in [
                change.parts["whole"] for change in changes if change.is_head and "whole" in change.parts
            ]:
                own = changes[0].parts.get("whole", "")
                if not own or self.weights.tensor_digest(head) != self.weights.tensor_digest(own):
                    raise refuse_untied(head, embedding)
        return self.weights.content_digest()


def group(names: Mapping[str, Entry]) -> dict[str, Change]:
    """Put an adapter's tensors beside the weight each changes, named as in the model that was adapted."""
    found: dict[str, Change] = {}
    for name in names:
        path = name.removeprefix(PREFIX)
        ending = next((ending for ending in ENDINGS if path.endswith(ending)), "")
        part, leaf = ENDINGS.get(ending, ("whole", ""))
        module = path.removesuffix(ending) if ending else path.rpartition(".")[0]
        change = found.setdefault(module + leaf if ending else path, Change(module))
        if part in change.parts:
            raise malformed(f"{name} and {change.parts[part]} stand for the same")
        change.parts[part] = name
    return found


def _nothing(original: Tensor) -> Delta:
    """What an adapter that leaves a weight alone adds to it."""
    if original.dim() != 2:
        return torch.zeros_like(original)
    return LowRank(original.new_empty(original.shape[0], 0), original.new_empty(0, original.shape[1]))


def _on(product: LowRank, device: torch.device) -> LowRank:
    return LowRank(product.left.to(device), product.right.to(device))


def _panel(product: LowRank, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a product, row after row."""
    columns = product.right.shape[1]
    first, last = start // columns, -(-stop // columns)
    rows = (product.left[first:last] @ product.right).reshape(-1)
    return rows[start - first * columns : stop - first * columns]
