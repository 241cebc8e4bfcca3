"""What is folded and what is refused, for which reason; and what may differ from the base without harm."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from models import BIAS, BUFFER, EMBEDDING, HEAD, NORM, SQUARE, TALL, WIDE

from streammerge import plan, screen
from streammerge.arriving import Incoming
from streammerge.config.sources import DirectorySource
from streammerge.engine import Engine
from streammerge.errors import ConfigError, Refused, TryAgain
from streammerge.fit import Tolerance, fit
from streammerge.headers import MARK, Entry, Incomplete, find
from streammerge.methods import Totals
from streammerge.plan import DEFAULT_ADDED, Recipe
from streammerge.sources import directory
from streammerge.sources.directory import Directory
from streammerge.state import State
from streammerge.weights import Weights, identity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

STRICT = Tolerance()
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A base that is open for screening, and a place for fine-tunes of it."""

    folder: Path
    base: dict[str, Tensor]
    recipe: Recipe
    entries: Mapping[str, Entry]

    def screen(
        self, path: Path, tolerance: Tolerance = STRICT, **allow: Any
    ) -> tuple[dict[str, Tensor], str]:
        """Do what the pipeline does: examine, fold, finish, judge. Gives deltas and digest."""
        out = self.folder / f"state-{time.monotonic_ns()}"
        out.mkdir()
        with screen.examine(path, self.entries, self.recipe, tolerance, **allow) as opened:
            old = State(out / "none", {}, Totals())
            state, measured, _ = Engine(device="cpu").fold(self.recipe, Incoming(opened), old, out)
            digest = opened.finish()
        length = sum(float(v.double().square().sum()) for v in self.base.values()) ** 0.5
        screen.judge(measured, length, max_delta_ratio=1.0, **allow)
        deltas: dict[str, Tensor] = {}
        for slot in sorted(state.folder.glob("sum-*.safetensors")):
            deltas |= models.load(slot)
        return deltas, digest

    def refuse(self, path: Path, tolerance: Tolerance = STRICT) -> Refused:
        """Give what a fine-tune is refused with; every refusal has a known reason and a hint."""
        with pytest.raises(Refused) as caught:
            self.screen(path, tolerance)
        assert caught.value.reason in screen.REASONS
        assert caught.value.hint
        assert len(str(caught.value)) < 1000
        return caught.value


def bench(folder: Path, **options: Any) -> Bench:
    """Make a base in folder/base and open it."""
    base = models.make_base(folder / "base", **options)
    found, _ = Engine(device="cpu").open_base(folder / "base", DEFAULT_ADDED)
    with Weights(find(folder / "base")) as weights:
        entries = weights.entries
    recipe = Recipe(found.base, found.base_digest, found.plan, "average", {})
    return Bench(folder, base, recipe, entries)


@pytest.fixture
def toy(tmp_path: Path) -> Bench:
    """The usual base: float32, its head tied and not saved."""
    return bench(tmp_path)


def tune(base: Mapping[str, Tensor], seed: int = 1) -> Tensors:
    """Give a good fine-tune's tensors, to be spoiled."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: values + 0.02 * torch.randn(values.shape, generator=random).to(values.dtype)
        if values.is_floating_point()
        else values
        for name, values in base.items()
    }


def with_one(values: Tensor, bad: float, place: int = -1) -> Tensor:
    """Replace one element."""
    spoiled = values.clone()
    spoiled.view(-1)[place] = bad
    return spoiled


# ------------------------------------------------------------------------------------------------- refused

SPOILED: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "square-of-another-size": ("wrong-shape", lambda t: {**t, SQUARE: torch.zeros(17, 17)}),
    "transposed": ("wrong-shape", lambda t: {**t, TALL: t[TALL].T}),
    "flattened": ("wrong-shape", lambda t: {**t, TALL: t[TALL].reshape(-1)}),
    "one-dimension-more": ("wrong-shape", lambda t: {**t, NORM: t[NORM][None]}),
    "bias-too-long": ("wrong-shape", lambda t: {**t, BIAS: torch.zeros(49)}),
    "vocabulary-grown": ("vocab-resized", lambda t: {**t, EMBEDDING: torch.zeros(48, 16)}),
    "vocabulary-by-one": ("vocab-resized", lambda t: {**t, EMBEDDING: torch.zeros(41, 16)}),
    "vocabulary-shrunk": ("vocab-resized", lambda t: {**t, EMBEDDING: t[EMBEDDING][:39]}),
    "all-renamed": ("wrong-base", lambda t: {f"block{i}.w": v for i, v in enumerate(t.values())}),
    "most-renamed": (
        "wrong-base",
        lambda t: {n if n in (NORM, BIAS) else f"x.{n}2": v for n, v in t.items()},
    ),
    "another-model": ("wrong-base", lambda _: {"bert.pooler.weight": torch.ones(4, 4)}),
    "one-missing": ("missing-weights", lambda t: {n: v for n, v in t.items() if n != WIDE}),
    "one-more": ("unknown-weights", lambda t: {**t, "model.layers.9.q_proj.weight": torch.ones(16, 16)}),
    "one-integer-more": ("unknown-weights", lambda t: {**t, "model.extra_ids": torch.arange(3)}),
    "one-renamed": ("unknown-weights", lambda t: {n + "_" * (n == WIDE): v for n, v in t.items()}),
    "int8": ("quantised", lambda t: {**t, TALL: t[TALL].to(torch.int8)}),
    "uint8-packed": ("quantised", lambda t: {**t, TALL: torch.zeros(384, 1, dtype=torch.uint8)}),
    "float8": ("quantised", lambda t: {**t, TALL: t[TALL].to(torch.float8_e4m3fn)}),
    "gptq": (
        "quantised",
        lambda t: (
            {n.replace("proj.weight", "proj.qweight"): v for n, v in t.items()}
            | {n.replace("weight", "qzeros"): torch.zeros(2, dtype=torch.int32) for n in (SQUARE, TALL, WIDE)}
        ),
    ),
    "scales-beside": ("quantised", lambda t: {**t, TALL.replace("weight", "weight_scale"): torch.ones(1)}),
    "int64-for-floats": ("unsupported-dtype", lambda t: {**t, TALL: t[TALL].to(torch.int64)}),
    "bool-for-floats": ("unsupported-dtype", lambda t: {**t, TALL: t[TALL] > 0}),
    "nan-last": ("non-finite", lambda t: {**t, TALL: with_one(t[TALL], float("nan"))}),
    "nan-first": ("non-finite", lambda t: {**t, EMBEDDING: with_one(t[EMBEDDING], float("nan"), 0)}),
    "nan-in-a-norm": ("non-finite", lambda t: {**t, NORM: with_one(t[NORM], float("nan"))}),
    "infinite": ("non-finite", lambda t: {**t, WIDE: with_one(t[WIDE], float("inf"))}),
    "minus-infinite": ("non-finite", lambda t: {**t, BIAS: with_one(t[BIAS], float("-inf"))}),
    "implausible-element": ("implausible", lambda t: {**t, NORM: with_one(t[NORM], 1e6)}),
    "implausible-everywhere": ("implausible", lambda t: {n: v * 3 for n, v in t.items()}),
    "negated": ("implausible", lambda t: {n: -v for n, v in t.items()}),
    "another-training": ("implausible", lambda t: {n: v + torch.ones_like(v) for n, v in t.items()}),
    "untied-head": ("untied-head", lambda t: {**t, HEAD: with_one(t[EMBEDDING], 0.5)}),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_does_not_fit_is_refused_with_its_own_reason(case: str, toy: Bench) -> None:
    """Each way in which a folder is no fine-tune of the base has its reason, and a hint what to do."""
    reason, spoil = SPOILED[case]
    models.save(toy.folder / "ft", spoil(tune(toy.base)))
    assert toy.refuse(toy.folder / "ft").reason == reason


def test_the_message_names_the_weight_and_both_shapes(toy: Bench) -> None:
    """A refusal says which weight, what was found and what was expected."""
    models.save(toy.folder / "ft", {**tune(toy.base), SQUARE: torch.zeros(17, 19)})
    message = toy.refuse(toy.folder / "ft").message
    assert SQUARE in message
    assert "[17, 19]" in message
    assert "[16, 16]" in message


def test_the_base_itself_is_refused(toy: Bench) -> None:
    """A fine-tune equal to the base, in any dtype that holds it, is refused as zero-delta, unless allowed."""
    models.save(toy.folder / "same", toy.base)
    models.save(toy.folder / "wider", {n: v.double() if n == TALL else v for n, v in toy.base.items()})
    assert toy.refuse(toy.folder / "same").reason == "zero-delta"
    assert toy.refuse(toy.folder / "wider").reason == "zero-delta"
    deltas, _ = toy.screen(toy.folder / "same", allow={"zero-delta"})
    assert not any(values.any() for values in deltas.values())


def test_an_implausible_fine_tune_may_be_allowed(toy: Bench) -> None:
    """A person who knows better may allow a delta longer than the base."""
    models.save(toy.folder / "ft", {n: v * 3 for n, v in toy.base.items()})
    deltas, _ = toy.screen(toy.folder / "ft", allow={"implausible"})
    assert torch.allclose(deltas[TALL], 2 * toy.base[TALL])


def test_a_base_of_zeros_makes_any_fine_tune_implausible(tmp_path: Path) -> None:
    """A base without length is no reason to divide by zero: the refusal is in words."""
    (tmp_path / "base").mkdir()
    zeros = {SQUARE: torch.zeros(4, 4)}
    models.save(tmp_path / "base", zeros)
    found, _ = Engine(device="cpu").open_base(tmp_path / "base", DEFAULT_ADDED)
    with Weights(find(tmp_path / "base")) as weights:
        entries = weights.entries
    recipe = Recipe(found.base, found.base_digest, found.plan, "average", {})
    models.save(tmp_path / "ft", {SQUARE: torch.ones(4, 4)})
    assert Bench(tmp_path, zeros, recipe, entries).refuse(tmp_path / "ft").reason == "implausible"


def test_our_own_merges_are_refused(toy: Bench) -> None:
    """A folder that carries the mark of a merge is refused before any weight is read, unless allowed."""
    models.make_fine_tune(toy.folder / "ft", toy.base, seed=1)
    (toy.folder / "ft" / MARK).write_text("{}")
    assert toy.refuse(toy.folder / "ft").reason == "own-merge"
    toy.screen(toy.folder / "ft", allow={"own-merge"})


def test_a_configuration_that_says_quantised_is_believed(toy: Bench) -> None:
    """quantization_config in config.json refuses weights that look like floats."""
    config = {**models.CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    models.save(toy.folder / "ft", tune(toy.base), config=config)
    assert toy.refuse(toy.folder / "ft").reason == "quantised"


def test_quantised_weights_under_a_prefix_are_quantised_too(toy: Bench) -> None:
    """One common prefix does not turn a quantised weight into one of another reason."""
    tensors = {f"base.{n}": v.to(torch.int8) if n == TALL else v for n, v in tune(toy.base).items()}
    models.save(toy.folder / "ft", tensors)
    assert toy.refuse(toy.folder / "ft").reason == "quantised"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff\xfe{}"])
def test_a_configuration_that_is_none_is_refused(content: bytes, toy: Bench) -> None:
    """config.json that is no JSON object makes the folder malformed."""
    models.make_fine_tune(toy.folder / "ft", toy.base, seed=1)
    (toy.folder / "ft" / "config.json").write_bytes(content)
    assert toy.refuse(toy.folder / "ft").reason == "malformed"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe{}", b"null"])
def test_a_configuration_of_the_base_that_is_none_is_a_configuration_error(
    content: bytes, tmp_path: Path
) -> None:
    """config.json of the base that is no JSON object stops the start, in words."""
    models.make_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_bytes(content)
    with pytest.raises(ConfigError):
        Engine(device="cpu").open_base(tmp_path / "base", DEFAULT_ADDED)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_a_configuration_error(bad: float, tmp_path: Path) -> None:
    """A base with NaN or infinite values cannot be merged into."""
    base = models.make_base(tmp_path / "good")
    models.save(tmp_path / "base", {**base, TALL: with_one(base[TALL], bad)})
    with pytest.raises(ConfigError, match="NaN or infinite"):
        Engine(device="cpu").open_base(tmp_path / "base", DEFAULT_ADDED)


def test_a_base_whose_shards_are_missing_is_a_configuration_error(tmp_path: Path) -> None:
    """A base that is not all there stops the start; it is not tried again for ever as a fine-tune is."""
    models.make_base(tmp_path / "base", shards=3)
    (tmp_path / "base" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError):
        Engine(device="cpu").open_base(tmp_path / "base", DEFAULT_ADDED)


def test_known_content_is_refused_by_digest() -> None:
    """The same content again is a duplicate; content that was taken out is denied, whatever else it is."""
    for folded, denied, reason in (({"d"}, (), "duplicate"), ((), {"d"}, "denied"), ({"d"}, {"d"}, "denied")):
        with pytest.raises(Refused) as caught:
            screen.refuse_known("d", folded=folded, denied=denied)
        assert caught.value.reason == reason
        assert caught.value.hint
    screen.refuse_known("e", folded={"d"}, denied={"f"})


def test_a_copy_has_the_same_digest(toy: Bench) -> None:
    """The digest given after folding is the fine-tune's identity, whatever folder or shards it lies in."""
    tensors = models.make_fine_tune(toy.folder / "ft", toy.base, seed=1)
    models.save(toy.folder / "copy", tensors, shards=3)
    digests = {toy.screen(toy.folder / name)[1] for name in ("ft", "copy")}
    assert digests == {identity(toy.folder / "ft")}


def test_a_folder_without_weights_is_waited_for(toy: Bench) -> None:
    """A folder in which only a configuration lies is incomplete, not refused."""
    (toy.folder / "ft").mkdir()
    (toy.folder / "ft" / "config.json").write_text("{}")
    with pytest.raises(Incomplete):
        toy.screen(toy.folder / "ft")


def test_every_reason_is_worded() -> None:
    """Reasons are short stable words, each explained in a phrase."""
    for reason, meaning in screen.REASONS.items():
        assert reason == reason.lower()
        assert " " not in reason
        assert meaning


def test_screening_takes_linear_time() -> None:
    """Matching thousands of names takes no time, also where each of them might have the common prefix."""
    names = [f"model.layers.{i}.experts.up_proj.weight" for i in range(6_000)]
    base = {name: Entry(name, "F32", (4, 4), 0, 0, 64) for name in names}
    kinds = plan.Plan(dict.fromkeys(base, plan.PROJECTED))
    hostile = {f"{i}.{names[-1]}": base[name] for i, name in enumerate(names)}
    started = time.process_time()
    assert len(fit(base, base, {}, kinds, STRICT).sources) == 6_000
    with pytest.raises(Refused):
        fit(base, hostile, {}, kinds, STRICT)
    assert time.process_time() - started < 1.5


# ------------------------------------------------------------------------------------------------- allowed


def expected(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fine-tune minus base, in float32."""
    return {n: tuned[n].float() - v.float() for n, v in base.items() if v.is_floating_point() and n in tuned}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names and every bit of the values agree."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in other)


def test_a_fine_tune_is_taken_as_it_is(toy: Bench) -> None:
    """The delta of every floating-point weight is fine-tune minus base, exactly."""
    tuned = models.make_fine_tune(toy.folder / "ft", toy.base, seed=1)
    assert equal(toy.screen(toy.folder / "ft")[0], expected(toy.base, tuned))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_base", [torch.float32, torch.bfloat16, torch.float16])
def test_another_float_dtype_is_no_obstacle(dtype: torch.dtype, of_base: torch.dtype, tmp_path: Path) -> None:
    """A fine-tune saved in another float dtype than its base's folds with the values it has."""
    toy = bench(tmp_path, dtype=of_base)
    tuned = models.make_fine_tune(tmp_path / "ft", toy.base, seed=1, dtype=dtype)
    assert equal(toy.screen(tmp_path / "ft")[0], expected(toy.base, tuned))


def test_a_single_file_is_a_fine_tune(toy: Bench) -> None:
    """One .safetensors file without any folder around it folds as well."""
    tuned = models.make_fine_tune(toy.folder / "ft.safetensors", toy.base, seed=1)
    assert equal(toy.screen(toy.folder / "ft.safetensors")[0], expected(toy.base, tuned))


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_need_not_be_the_bases(shards: int, toy: Bench) -> None:
    """A fine-tune may be cut into other files than its base."""
    tuned = models.make_fine_tune(toy.folder / "ft", toy.base, seed=1, shards=shards)
    assert equal(toy.screen(toy.folder / "ft")[0], expected(toy.base, tuned))


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
@pytest.mark.parametrize("buffer", [True, False], ids=["with-buffer", "without-buffer"])
def test_one_common_prefix_more_is_no_obstacle(prefix: str, buffer: bool, toy: Bench) -> None:
    """A prefix that all names of the fine-tune have more than the base's means the same weights."""
    tuned = tune(toy.base)
    models.save(toy.folder / "ft", {prefix + n: v for n, v in tuned.items() if buffer or n != BUFFER})
    assert equal(toy.screen(toy.folder / "ft")[0], expected(toy.base, tuned))


@pytest.mark.parametrize("buffer", [True, False], ids=["with-buffer", "without-buffer"])
def test_one_common_prefix_less_is_no_obstacle(buffer: bool, toy: Bench) -> None:
    """A prefix that all names of the base have more than the fine-tune's means the same weights."""
    tuned = tune(toy.base)
    kept = {n.removeprefix("model."): v for n, v in tuned.items() if buffer or n != BUFFER}
    models.save(toy.folder / "ft", kept)
    assert equal(toy.screen(toy.folder / "ft")[0], expected(toy.base, tuned))


@pytest.mark.parametrize("more", [True, False], ids=["prefix-more", "prefix-less"])
def test_a_prefix_is_found_though_the_longest_name_is_missing(more: bool, tmp_path: Path) -> None:
    """A missing integer buffer is no obstacle to finding the prefix, however long its name is."""
    long = "model.layers.0.self_attention.rotary_embedding.position_ids"
    base = {**models.make_base(tmp_path / "made"), long: torch.arange(5)}
    models.save(tmp_path / "base", base)
    found, _ = Engine(device="cpu").open_base(tmp_path / "base", DEFAULT_ADDED)
    with Weights(find(tmp_path / "base")) as weights:
        entries = weights.entries
    recipe = Recipe(found.base, found.base_digest, found.plan, "average", {})
    tuned = {n: v for n, v in tune(base).items() if n != long}
    models.save(
        tmp_path / "ft", {"x." + n if more else n.removeprefix("model."): v for n, v in tuned.items()}
    )
    deltas, _ = Bench(tmp_path, base, recipe, entries).screen(tmp_path / "ft")
    assert equal(deltas, expected(base, tuned))


def test_a_prefix_that_only_some_names_have_is_no_prefix(toy: Bench) -> None:
    """Two names that would become one are not quietly taken for the same weight."""
    tuned = tune(toy.base)
    models.save(toy.folder / "ft", {**{f"x.{n}": v for n, v in tuned.items()}, SQUARE: toy.base[SQUARE]})
    assert toy.refuse(toy.folder / "ft").reason == "unknown-weights"


def test_a_tied_head_that_was_saved_is_dropped(toy: Bench) -> None:
    """A head that only the fine-tune saved, equal to its embedding, is the embedding a second time."""
    tuned = tune(toy.base)
    models.save(toy.folder / "ft", {**tuned, HEAD: tuned[EMBEDDING].clone()})
    assert equal(toy.screen(toy.folder / "ft")[0], expected(toy.base, tuned))


def test_a_tied_head_under_a_prefix_is_dropped(toy: Bench) -> None:
    """The same with a common prefix before the embedding's name."""
    tuned = tune(toy.base)
    models.save(toy.folder / "ft", {f"x.{n}": v for n, v in tuned.items()} | {HEAD: tuned[EMBEDDING].clone()})
    assert equal(toy.screen(toy.folder / "ft")[0], expected(toy.base, tuned))


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD, "both"])
def test_a_base_that_saved_its_tied_head_takes_either_name(kept: str, tmp_path: Path) -> None:
    """Where the base holds both names of one tied weight, a fine-tune may hold either of them, or both."""
    toy = bench(tmp_path, head="tied")
    tuned = tune({n: v for n, v in toy.base.items() if n != HEAD})
    tuned[HEAD] = tuned[EMBEDDING].clone()
    dropped = {EMBEDDING: HEAD, HEAD: EMBEDDING}.get(kept, "")
    models.save(tmp_path / "ft", {n: v for n, v in tuned.items() if n != dropped})
    deltas, _ = toy.screen(tmp_path / "ft")
    whole = expected(toy.base, tuned)
    (folded,) = set(deltas) & {EMBEDDING, HEAD}
    assert torch.equal(deltas[folded], whole[folded])
    assert len(deltas) == len(whole) - 1


def test_two_names_of_a_tied_weight_must_agree(tmp_path: Path) -> None:
    """Where the base holds both names, a fine-tune whose two differ is refused as untied."""
    toy = bench(tmp_path, head="tied")
    models.save(tmp_path / "ft", tune(toy.base))
    assert toy.refuse(tmp_path / "ft").reason == "untied-head"


def test_a_head_of_its_own_is_a_weight_like_others(tmp_path: Path) -> None:
    """Where the base does not tie its head, head and embedding have deltas of their own."""
    toy = bench(tmp_path, head="untied")
    tuned = tune(toy.base)
    models.save(tmp_path / "ft", tuned)
    assert equal(toy.screen(tmp_path / "ft")[0], expected(toy.base, tuned))


def test_a_missing_integer_buffer_is_no_obstacle(toy: Bench) -> None:
    """Integers are the base's: a fine-tune may leave them out, or have others."""
    tuned = tune(toy.base)
    models.save(toy.folder / "without", {n: v for n, v in tuned.items() if n != BUFFER})
    models.save(toy.folder / "other", {**tuned, BUFFER: torch.arange(99)})
    for name in ("without", "other"):
        assert equal(toy.screen(toy.folder / name)[0], expected(toy.base, tuned))


def test_what_may_be_ignored_is_ignored(toy: Bench) -> None:
    """tensors.ignore_extra leaves weights out by glob; others still refuse."""
    tuned = {**tune(toy.base), "value_head.weight": torch.ones(1, 16), "value_head.bias": torch.ones(1)}
    models.save(toy.folder / "ft", tuned)
    assert toy.refuse(toy.folder / "ft", Tolerance(ignore_extra=("*.bias",))).reason == "unknown-weights"
    deltas, _ = toy.screen(toy.folder / "ft", Tolerance(ignore_extra=("value_head.*",)))
    assert equal(deltas, expected(toy.base, tuned))


def test_what_may_be_missing_counts_as_unchanged(toy: Bench) -> None:
    """tensors.allow_missing takes a missing weight as equal to the base's, by glob."""
    tuned = {n: v for n, v in tune(toy.base).items() if n not in (WIDE, BIAS)}
    models.save(toy.folder / "ft", tuned)
    assert toy.refuse(toy.folder / "ft", Tolerance(allow_missing=("*.bias",))).reason == "missing-weights"
    deltas, _ = toy.screen(toy.folder / "ft", Tolerance(allow_missing=("*.bias", "*down*")))
    zeros = {WIDE: torch.zeros(16, 48), BIAS: torch.zeros(48)}
    assert equal(deltas, expected(toy.base, tuned) | zeros)


# ----------------------------------------------------------------------------------------- while it is copied


def test_a_folder_moved_away_while_it_is_copied_is_no_fault_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is gone between the listing and the copy is waited for; another kind is refused."""
    (tmp_path / "team" / "model").mkdir(parents=True)
    (tmp_path / "into").mkdir()
    source = Directory(DirectorySource(name="team", type="directory", path=tmp_path / "team"), lambda: None)
    monkeypatch.setattr(directory, "_files_of", lambda path: [path / "config.json"])
    with pytest.raises(TryAgain, match="cannot be fetched"):
        source.fetch("model", "", tmp_path / "into", lambda _bytes: None)
    (tmp_path / "team" / "model" / "config.json").mkdir()
    with pytest.raises(Refused, match="no regular file"):
        source.fetch("model", "", tmp_path / "into", lambda _bytes: None)
