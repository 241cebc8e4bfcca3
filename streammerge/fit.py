"""How a fine-tune's names, shapes and dtypes may differ from its base's and still mean the same weights.

One common prefix more or less, another float dtype, a tied head saved beside its embedding. Everything else
is refused with its own reason. Driven by the base's names and shapes alone: there is no table of
architectures. Reads no weight.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import Refused
from streammerge.plan import Plan, matches

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from streammerge.headers import Entry

QUANTISED_DTYPES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2", "I32", "I16"})
QUANTISED_PARTS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".absmax",
    ".quant_state",
    ".weight_scale",
    ".SCB",
    ".g_idx",
)
SHARE_OF_WRONG_BASE = 0.5
MAX_PREFIX_PARTS = 4


@dataclass(frozen=True)
class Fit:
    """How a fine-tune's weights stand for the base's.

    sources  base name -> the fine-tune's name for it
    absent   floating-point base names the fine-tune lacks, allowed by configuration: their delta is zero
    heads    fine-tune names that must be equal in bytes to another of its weights (tied, saved twice)
    """

    sources: Mapping[str, str]
    absent: frozenset[str]
    heads: Mapping[str, str]


@dataclass(frozen=True)
class Tolerance:
    """The `tensors:` section: globs over names."""

    ignore_extra: tuple[str, ...] = ()
    allow_missing: tuple[str, ...] = ()


def fit(
    base: Mapping[str, Entry],
    found: Mapping[str, Entry],
    config: Mapping[str, object],
    plan: Plan,
    tolerance: Tolerance,
) -> Fit:
    """Match a fine-tune's weights with the base's by name and shape, or raise Refused with the reason."""
    rename = common_prefix(base, found)
    sources = {theirs: name for name in found if (theirs := rename(name)) in base}
    for second, first in plan.tied.items():  # one name of a tied pair is enough, whichever it is
        if second in sources:
            sources.setdefault(first, sources[second])
    refuse_quantised(base, found, sources, config)
    floating = [name for name, entry in base.items() if entry.is_floating and name not in plan.tied]
    matched = [name for name in floating if name in sources]
    if len(matched) < SHARE_OF_WRONG_BASE * len(floating):
        what = f"{len(matched)} of the base's {len(floating)} weights are in it"
        raise wrong_base(f"{what}; it has {min(found)}, the base {min(base)}")
    taken = set(sources.values())
    for name in [n for n in sources if base[n].is_floating and found[sources[n]].shape != base[n].shape]:
        if matches(name, tolerance.allow_missing):  # a person says that the base's own stays
            del sources[name]
    refuse_shapes(base, found, sources)
    heads = tied_heads(base, found, sources, plan, rename)
    taken |= set(heads)
    refuse_strange([name for name in found if name not in taken], tolerance)
    missing = [name for name in floating if name not in sources]
    if unexcused := [name for name in missing if not matches(name, tolerance.allow_missing)]:
        raise Refused(
            "missing-weights",
            f"it does not have {listed(unexcused)} of the base",
            hint="publish the whole model, or add a glob to tensors.allow_missing to take them as unchanged",
        )
    return Fit(sources, frozenset(missing), heads)


def wrong_base(what: str) -> Refused:
    """Word the refusal of a fine-tune whose names are another model's."""
    return Refused(
        "wrong-base",
        what,
        hint="check base_model in its config or model card, or point another streammerge at that base",
    )


def listed(names: list[str]) -> str:
    """Name the first, and say how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def refuse_strange(strange: list[str], tolerance: Tolerance) -> None:
    """Raise Refused for weights that the base does not have and that nobody said to leave out."""
    if left := [name for name in strange if not matches(name, tolerance.ignore_extra)]:
        raise Refused(
            "unknown-weights",
            f"the base does not have {listed(left)}",
            hint="if they may be left out, add a glob to tensors.ignore_extra",
        )


def refuse_untied(head: str, embedding: str) -> Refused:
    """Word the refusal of a head that was trained apart from the embedding it is tied to."""
    return Refused(
        "untied-head",
        f"{head} differs from {embedding}, to which the base ties it",
        hint="a head trained apart from its embedding has no place in the base; tie it and publish again",
    )


def refuse_quantised(
    base: Mapping[str, Entry],
    found: Mapping[str, Entry],
    sources: Mapping[str, str],
    config: Mapping[str, object],
) -> None:
    """Raise Refused for weights stored in fewer bits than a float has."""
    odd = [s for name, s in sources.items() if found[s].dtype in QUANTISED_DTYPES and base[name].is_floating]
    odd += [name for name in found if name.endswith(QUANTISED_PARTS) and name not in base]
    if odd or config.get("quantization_config"):
        what = f"{odd[0]} is" if odd else "config.json says the model is"
        raise Refused(
            "quantised",
            f"{what} quantised; differences to the base's weights would be rounding noise",
            hint="publish the fine-tune in bf16, f16 or f32",
        )


def common_prefix(base: Collection[str], found: Collection[str]) -> Renaming:
    """Find the one prefix that the weights' names have more, or less, in the fine-tune than in the base.

    Every name votes for each prefix that would make it match; the most common one wins if it fits more names
    than no prefix at all.
    """
    votes: Counter[Renaming] = Counter()
    for name in found:
        votes.update(Renaming(drop=prefix) for prefix, rest in splits(name) if rest in base)
    for name in base:
        votes.update(Renaming(add=prefix) for prefix, rest in splits(name) if rest in found)
    votes[Renaming()] = sum(name in base for name in found)
    return max(votes, key=lambda renaming: (votes[renaming], renaming == Renaming()))


def splits(name: str) -> Iterator[tuple[str, str]]:
    """Cut a dotted name after each dot."""
    parts = name.split(".")
    return (
        (".".join(parts[:n]) + ".", ".".join(parts[n:]))
        for n in range(1, min(len(parts), MAX_PREFIX_PARTS + 1))
    )


@dataclass(frozen=True)
class Renaming:
    """Turns a fine-tune's name into the base's."""

    drop: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        """Give the base's name; a name without the prefix that others have stands for itself."""
        return self.add + name.removeprefix(self.drop)


def refuse_shapes(base: Mapping[str, Entry], found: Mapping[str, Entry], sources: Mapping[str, str]) -> None:
    """Raise Refused where a weight has another shape, or is no float where the base's is."""
    odd = [n for n, source in sources.items() if base[n].is_floating and found[source].shape != base[n].shape]
    if odd:
        name = odd[0]
        ours, theirs = base[name].shape, found[sources[name]].shape
        grown = len(ours) == 2 and ours[1:] == theirs[1:]
        vocabulary = all(base[n].shape[1:] == found[sources[n]].shape[1:] for n in odd) and grown
        raise Refused(
            "vocab-resized" if vocabulary else "wrong-shape",
            f"{len(odd)} of {len(base)} weights do not fit; "
            f"first is {name}, {list(theirs)} where the base has {list(ours)}",
            hint="publish it with the base's vocabulary; or leave these weights as the base has them: "
            "add them to tensors.allow_missing"
            if vocabulary
            else "check base_model in its config.json, or point another streammerge at that base",
        )
    for name, source in sources.items():
        if base[name].is_floating and not found[source].is_floating:
            raise Refused(
                "unsupported-dtype",
                f"{name} is stored as {found[source].dtype} where the base has {base[name].dtype}",
                hint="publish the fine-tune in bf16, f16 or f32",
            )


def tied_heads(
    base: Mapping[str, Entry],
    found: Mapping[str, Entry],
    sources: Mapping[str, str],
    plan: Plan,
    rename: Renaming,
) -> dict[str, str]:
    """List weights that only repeat another one: fine-tune name -> the fine-tune name it must equal.

    A name the base keeps tied, or one that only the fine-tune has where the base declares tied embeddings.
    """
    heads = {
        sources[name]: sources[to] for name, to in plan.tied.items() if name in sources and to in sources
    }
    if plan.embedding in sources:
        like = found[sources[plan.embedding]]
        for name, entry in found.items():
            if rename(name) not in base and (entry.dtype, entry.shape) == (like.dtype, like.shape):
                heads[name] = like.name
    return heads
