"""Reading and writing safetensors a part at a time, bit for bit, and the digest that a model is known by."""

from __future__ import annotations

import hashlib
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from streammerge.errors import Refused, TryAgain
from streammerge.headers import ITEM_BYTES, find
from streammerge.weights import CODES, DTYPES, Weights, Writer, element_panels, identity

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = ((), (1,), (7,), (3, 5), (1, 4), (4, 1), (2, 3, 4), (0,), (0, 4), (5, 0))


def bits(values: Tensor) -> Tensor:
    """A tensor's bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return values.contiguous().reshape(-1).view(torch.uint8) if values.numel() else torch.empty(0)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def any_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A tensor of random bytes: NaNs, infinities and denormals among them."""
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        return (raw % 2).bool().reshape(shape)
    return raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def open_files() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


# ------------------------------------------------------------------------------------------------- reading


def test_a_header_and_torch_agree_on_the_size_of_every_dtype() -> None:
    """What a header is proven by, without torch, is what torch reads by: the same dtypes and sizes."""
    assert {code: dtype.itemsize for code, dtype in DTYPES.items()} == ITEM_BYTES


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_read_bit_for_bit(code: str, tmp_path: Path) -> None:
    """A weight of any dtype and shape reads as safetensors itself wrote it, every bit."""
    tensors = {f"w{i}": any_bits(DTYPES[code], shape, i) for i, shape in enumerate(SHAPES)}
    save_file(tensors, tmp_path / "model.safetensors")
    with Weights(find(tmp_path)) as weights:
        assert {entry.dtype for entry in weights.entries.values()} == {code}
        for name, values in tensors.items():
            assert same(weights.read(name), values), name


@given(elements=st.integers(0, 40), cuts=st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=30, deadline=None)
def test_panels_put_together_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, elements: int, cuts: list[int]
) -> None:
    """Reading a weight in any panels gives the same elements as reading it whole."""
    values = torch.arange(elements, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("drawn")
    save_file({"a": torch.ones(3), "w": values}, folder / "model.safetensors")
    edges = [0, *sorted(min(cut, elements) for cut in cuts), elements]
    with Weights(find(folder), hashing=True) as weights:
        parts = [weights.read("w", start, stop) for start, stop in pairwise(edges)]
        weights.read_rest()
        assert torch.equal(torch.cat(parts), values)
        assert weights.tensor_digest("w") == hashlib.sha256(bytes(bits(values).tolist())).hexdigest()


@given(st.integers(0, 1000), st.integers(1, 300))
def test_panels_tile_a_weight(elements: int, panel: int) -> None:
    """Panels follow one another from 0 to the end, none longer than asked; an empty weight has one, empty."""
    cut = list(element_panels(elements, panel))
    assert cut[0][0] == 0
    assert cut[-1][1] == elements
    assert all(before[1] == after[0] for before, after in pairwise(cut))
    assert all(0 <= stop - start <= panel for start, stop in cut)
    assert len(cut) == max(1, math.ceil(elements / panel))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_are_one_set(shards: int, tmp_path: Path) -> None:
    """A folder of one or more shards opens as one set of weights, each read from its own file."""
    tensors = models.make_base(tmp_path / "base", shards=shards)
    with Weights(find(tmp_path / "base")) as weights:
        assert len(weights.set.files) == shards
        assert set(weights.entries) == set(tensors)
        assert all(same(weights.read(name), values) for name, values in tensors.items())


def test_what_is_in_the_folder_decides_which_files_are_read(tmp_path: Path) -> None:
    """An index comes before model.safetensors, that before an adapter, that before any one other file."""
    one = {"w": torch.ones(1)}
    save_file(one, tmp_path / "weights.safetensors")
    assert find(tmp_path).files == (tmp_path / "weights.safetensors",)
    save_file(one, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_dropout": 0.1}')
    assert find(tmp_path).files == (tmp_path / "adapter_model.safetensors",)
    assert find(tmp_path).adapter == {"peft_type": "LORA", "r": 4}
    save_file(one, tmp_path / "model.safetensors")
    assert find(tmp_path).files == (tmp_path / "model.safetensors",)
    assert find(tmp_path).adapter is None
    (tmp_path / models.INDEX).write_text('{"weight_map": {"w": "weights.safetensors"}}')
    assert find(tmp_path).files == (tmp_path / "weights.safetensors",)
    assert find(tmp_path / "model.safetensors").files == (tmp_path / "model.safetensors",)


def test_the_usual_index_comes_before_others(tmp_path: Path) -> None:
    """Where several indexes lie side by side, model.safetensors.index.json is the one that counts."""
    for name, index in (("a", "consolidated.safetensors.index.json"), ("b", models.INDEX)):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
        (tmp_path / index).write_text('{"weight_map": {"w": "%s.safetensors"}}' % name)  # noqa: UP031
    assert find(tmp_path).files == (tmp_path / "b.safetensors",)


def test_a_file_that_shrinks_while_it_is_read_is_tried_again(tmp_path: Path) -> None:
    """A file cut short after it was opened gives TryAgain, not zeros and not a crash."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    with Weights(find(tmp_path)) as weights:
        os.truncate(path, path.stat().st_size - 400)
        assert torch.equal(weights.read("w", 0, 900), torch.ones(900))
        with pytest.raises(TryAgain, match="shorter"):
            weights.read("w", 900, 1000)


def test_a_file_renamed_over_is_read_as_it_was_opened(tmp_path: Path) -> None:
    """One handle is used throughout: what is renamed over an open file is not mixed in."""
    save_file({"w": torch.ones(9)}, tmp_path / "model.safetensors")
    with Weights(find(tmp_path)) as weights:
        save_file({"w": torch.zeros(9)}, tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / "model.safetensors")
        assert torch.equal(weights.read("w"), torch.ones(9))


def test_files_are_closed(tmp_path: Path) -> None:
    """No descriptor stays open after use, nor after a refusal halfway through a set."""
    models.make_base(tmp_path / "good", shards=3)
    models.make_base(tmp_path / "bad", shards=3)
    (tmp_path / "bad" / "model-00003-of-00003.safetensors").write_bytes(b"\xff" * 99)
    before = open_files()
    with Weights(find(tmp_path / "good"), hashing=True) as weights:
        weights.read_rest()
    with pytest.raises(Refused, match="header"), Weights(find(tmp_path / "bad")):
        pass
    assert open_files() == before


# ------------------------------------------------------------------------------------------------- writing


@st.composite
def written(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Draw tensors of mixed dtypes and shapes, and for each where it is cut into panels."""
    tensors, cuts = {}, []
    order = sorted(DTYPES.values(), key=lambda dtype: -dtype.itemsize)
    for i, dtype in enumerate(sorted(draw(st.lists(st.sampled_from(order), max_size=6)), key=order.index)):
        values = any_bits(dtype, draw(st.sampled_from(SHAPES)), i)
        tensors[f"weight {i} é"] = values
        cuts.append(sorted(draw(st.lists(st.integers(0, values.numel()), max_size=3))))
    return tensors, cuts


@given(drawn=written())
@settings(max_examples=30, deadline=None)
def test_what_is_written_loads_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Tensor], list[list[int]]]
) -> None:
    """A written file loads in safetensors itself with every bit, however its weights were cut into panels."""
    tensors, cuts = drawn
    folder = tmp_path_factory.mktemp("drawn")
    declared = [(name, CODES[values.dtype], tuple(values.shape)) for name, values in tensors.items()]
    with Writer(folder / "whole.safetensors", declared) as whole:
        for name, values in tensors.items():
            whole.write(name, values)
    with Writer(folder / "cut.safetensors", declared) as cut:
        for (name, values), places in zip(tensors.items(), cuts, strict=True):
            edges = [0, *places, values.numel()]
            for start, stop in pairwise(edges):
                if stop > start:
                    cut.write(name, values.reshape(-1)[start:stop])
    content = (folder / "whole.safetensors").read_bytes()
    assert (folder / "cut.safetensors").read_bytes() == content
    assert whole.sha256 == cut.sha256 == hashlib.sha256(content).hexdigest()
    loaded = load_file(folder / "whole.safetensors")
    assert set(loaded) == set(tensors)
    assert all(same(loaded[name], values) for name, values in tensors.items())
    if tensors:
        with Weights(find(folder / "whole.safetensors")) as weights:
            assert list(weights.entries) == list(tensors) or any(not v.numel() for v in tensors.values())
            for entry in weights.entries.values():
                assert entry.start % DTYPES[entry.dtype].itemsize == 0


def test_values_are_converted_to_the_declared_dtype(tmp_path: Path) -> None:
    """Values of another dtype or layout are written as declared: rounded as torch rounds, in row order."""
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).T
    with Writer(tmp_path / "w.safetensors", [("w", "BF16", (6, 4))]) as writer:
        writer.write("w", values)
    assert same(load_file(tmp_path / "w.safetensors")["w"], values.to(torch.bfloat16).contiguous())


def test_a_file_whose_weights_are_not_all_written_is_not_finished(tmp_path: Path) -> None:
    """Leaving a writer early, by mistake or by an error, gives no hash: the file counts for nothing."""
    with pytest.raises(AssertionError, match="never written"), Writer(tmp_path / "a", _TWO) as writer:
        writer.write("a", torch.ones(2))
    assert writer.sha256 == ""
    with pytest.raises(KeyError), Writer(tmp_path / "b", _TWO) as writer:
        raise KeyError
    assert writer.sha256 == ""


def test_weights_are_written_in_the_declared_order_only(tmp_path: Path) -> None:
    """Writing another weight than the next, or more elements than declared, is a mistake that is caught."""
    with pytest.raises(AssertionError, match="is next"), Writer(tmp_path / "a", _TWO) as writer:
        writer.write("b", torch.ones(2))
    with pytest.raises(AssertionError), Writer(tmp_path / "b", _TWO) as writer:
        writer.write("a", torch.ones(3))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A writer refuses a name that is taken."""
    (tmp_path / "w.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError), Writer(tmp_path / "w.safetensors", _TWO):
        pass
    assert (tmp_path / "w.safetensors").read_bytes() == b"precious"


_TWO = [("a", "F32", (2,)), ("b", "F32", (2,))]


# ------------------------------------------------------------------------------------------------ identity


def test_the_identity_does_not_depend_on_how_a_model_is_stored(tmp_path: Path) -> None:
    """File names, sharding, order, metadata and other files of the folder do not change the digest."""
    tensors = models.make_base(tmp_path / "one")
    models.make_base(tmp_path / "three", shards=3)
    models.save(tmp_path / "backwards.safetensors", dict(reversed(tensors.items())))
    save_file(tensors, tmp_path / "metadata.safetensors", metadata={"format": "pt", "trained": "today"})
    (tmp_path / "three" / "README.md").write_text("edited")
    places = ("one", "three", "backwards.safetensors", "metadata.safetensors")
    assert len({identity(tmp_path / place) for place in places}) == 1


def test_the_identity_is_that_of_names_dtypes_shapes_and_bytes(tmp_path: Path) -> None:
    """The digest is the hash over one sorted line per weight: name, dtype, shape, hash of its bytes."""
    tensors = models.make_base(tmp_path / "base", dtype=torch.bfloat16)
    lines = []
    for name, values in sorted(tensors.items()):
        content = hashlib.sha256(bytes(bits(values).tolist())).hexdigest()
        lines.append(f"{name}\0{CODES[values.dtype]}\0{list(values.shape)}\0{content}\n")
    assert identity(tmp_path / "base") == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3, dtype=torch.int32)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(6)},
        {"w": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
        {"w": torch.zeros(2, 3), "v": torch.zeros(0)},
        {"w": torch.zeros(2, 3, dtype=torch.bfloat16)},
    ],
    ids=["name", "dtype", "shape", "flat", "sign-of-zero", "one-more", "half"],
)
def test_the_identity_changes_with_what_counts(other: dict[str, Any], tmp_path: Path) -> None:
    """Another name, dtype, shape, weight or a single bit is another digest."""
    models.save(tmp_path / "a.safetensors", {"w": torch.zeros(2, 3)})
    models.save(tmp_path / "b.safetensors", other)
    assert identity(tmp_path / "a.safetensors") != identity(tmp_path / "b.safetensors")


def test_hashing_does_not_depend_on_the_order_of_reading(tmp_path: Path) -> None:
    """Weights may be read in any order, each front to back, and give the same digest."""
    models.make_base(tmp_path / "base")
    with Weights(find(tmp_path / "base"), hashing=True) as weights:
        for name in reversed(list(weights.entries)):
            weights.read(name)
        assert weights.content_digest() == identity(tmp_path / "base")


def test_a_file_read_whole_has_its_own_hash(tmp_path: Path) -> None:
    """Reading the one file weight by weight as stored gives the sha256 of the file, header included."""
    models.make_base(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    with Weights(find(path), whole=True) as weights:
        for name in weights.entries:
            weights.read(name)
        assert weights.file_digest() == hashlib.sha256(path.read_bytes()).hexdigest()
