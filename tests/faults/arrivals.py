"""Months of arrivals: made-up fine-tunes of every kind, one after the other, and what must become of each.

Half go to a folder, half to a hub. Knows nothing of daemons; what it expects follows from what it published,
by arithmetic of its own in float64, and not from what the product says.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import models
import torch
from hubs import BASE, delta
from safetensors.torch import load_file, save_file

from streammerge.weights import identity

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from daemons import Site
    from torch import Tensor

    from streammerge.devhub import DevHub

Key = tuple[str, str]  # source and name

TEAM, HUB = "team", "hub"
RANK = 3
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
# What is published, and how often of a thousand; one broken in one of six ways is 50.
KINDS = {
    "full": 440, "adapter": 330, "broken": 50, "duplicate": 40, "changed": 50, "changed back": 15,
    "announced again": 40, "withdrawn": 35,
}  # fmt: skip
NOT_NEW = ("announced again", "withdrawn")  # nothing comes of it


@dataclass
class Arrivals:
    """Publishes, and keeps the account.

    digests    the content that must be in the merge for each name, once
    reasons    the reason that each refused name must have
    deltas     content -> what it adds to each weight, float64
    earlier    names that changed -> the contents they had before
    """

    site: Site
    hub: DevHub
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    digests: dict[Key, str] = field(default_factory=dict)
    reasons: dict[Key, str] = field(default_factory=dict)
    deltas: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    earlier: dict[Key, list[str]] = field(default_factory=dict)
    twins: set[Key] = field(default_factory=set)  # of which one is folded and one refused: neither changes
    there: set[Key] = field(default_factory=set)  # not withdrawn
    revisions: int = 0  # rows that the ledger must have in the end

    def __post_init__(self) -> None:
        """Make room for what is published again."""
        (self.site.root / "contents").mkdir()

    @property
    def published(self) -> int:
        """How many fine-tunes were published so far."""
        return sum(count for kind, count in self.counts.items() if kind not in NOT_NEW)

    def publish(self, is_folded: Callable[[Key, str], bool]) -> None:
        """Publish one more, or change, announce again or withdraw one that `is_folded`."""
        kind = self.chance.choices([*KINDS], [*KINDS.values()])[0]
        if kind == "broken":
            self._broken(self.chance.choice([*BROKEN]))
        elif kind == "adapter":
            self._good("adapter", self._adapter)
        elif kind != "full" and (known := self._known(kind, is_folded)):
            {
                "duplicate": self._duplicate, "changed": self._change, "changed back": self._change_back,
                "announced again": self._announce_again, "withdrawn": self._withdraw,
            }[kind](known)  # fmt: skip
        else:
            self._good("full", self._full)

    def _known(self, kind: str, is_folded: Callable[[Key, str], bool]) -> Key | None:
        """Choose one that was published before and can be what `kind` wants; None where there is none."""
        found = [key for key in self.digests if key in self.there and key not in self.twins]
        if kind == "duplicate":
            found = [key for key in found if key not in self.earlier]
        elif kind == "changed back":
            found = [key for key in found if key in self.earlier]
        elif kind == "withdrawn":
            found = [key for key in found if key[0] == TEAM]
        tried = self.chance.sample(found, min(len(found), 20))
        return next((key for key in tried if is_folded(key, self.digests[key])), None)

    # What can be published

    def _good(self, kind: str, make: Callable[[Path, int], dict[str, Tensor]]) -> None:
        key = self._new_key()
        self._content(key, make)
        self._put(key, self.digests[key])
        self.counts[kind] += 1
        self.revisions += 1

    def _change(self, key: Key) -> None:
        """Publish another content under a name that is folded."""
        self.earlier.setdefault(key, []).append(self.digests[key])
        self._content(key, self.chance.choice([self._full, self._adapter]))
        self._put(key, self.digests[key])
        self.counts["changed"] += 1
        self.revisions += 1

    def _change_back(self, key: Key) -> None:
        """Publish again what a name had before its last change."""
        before = self.earlier.pop(key)
        self.earlier[key] = [self.digests[key]]
        self.digests[key] = before[-1]
        self._put(key, before[-1])
        self.counts["changed back"] += 1
        self.revisions += key[0] == HUB  # a folder's revision is its content, a hub's a commit

    def _duplicate(self, key: Key) -> None:
        """Publish what is folded under another name."""
        twin = self._new_key()
        self._put(twin, self.digests[key])
        self.reasons[twin] = "duplicate"
        self.twins |= {key, twin}
        self.counts["duplicate"] += 1
        self.revisions += 1

    def _broken(self, how: str) -> None:
        key = self._new_key()
        folder = self._staging(key)
        make, reason = BROKEN[how]
        make(self, folder)
        self._deliver(key, folder)
        self.reasons[key] = reason
        self.counts[f"broken: {how}"] += 1
        self.revisions += 1

    def _announce_again(self, key: Key) -> None:
        """Touch what is there: the same weights, another README."""
        text = f"{CARDS[self._is_adapter(self.digests[key])]}Edited {self.chance.random()}\n"
        if key[0] == TEAM:
            (self.site.inflow / key[1] / "README.md").write_text(text)
        else:
            self.hub.publish(key[1], {"README.md": text})
        self.counts["announced again"] += 1

    def _withdraw(self, key: Key) -> None:
        """Remove from its source what is folded: it stays in the merge."""
        shutil.rmtree(self.site.inflow / key[1])
        self.there.discard(key)
        self.counts["withdrawn"] += 1

    # How

    def _new_key(self) -> Key:
        number = sum(self.counts.values())
        return (TEAM, f"ft-{number:05d}") if self.chance.random() < 0.5 else (HUB, f"team/ft-{number:05d}")

    def _staging(self, key: Key) -> Path:
        folder = self.site.root / "staging" / key[1].rpartition("/")[2]
        folder.mkdir(parents=True)
        return folder

    def _content(self, key: Key, make: Callable[[Path, int], dict[str, Tensor]]) -> None:
        """Make a content, and keep it to be published; its delta too."""
        folder = self._staging(key)
        deltas = make(folder, self.chance.randrange(1 << 40))
        digest = identity(folder)
        self.digests[key], self.deltas[digest] = digest, deltas
        folder.rename(self.site.root / "contents" / digest)

    def _put(self, key: Key, digest: str) -> None:
        folder = self._staging(key)
        shutil.copytree(self.site.root / "contents" / digest, folder, dirs_exist_ok=True)
        self._deliver(key, folder)
        self.there.add(key)

    def _deliver(self, key: Key, folder: Path) -> None:
        """Bring a folder to its source, whole."""
        if key[0] == TEAM:
            self.site.move_in(key[1])
            shutil.rmtree(self.site.root / "withdrawn", ignore_errors=True)
            return
        files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
        there = self.hub.store.repositories.get(key[1])
        held = there.find("main").files.keys() - {".gitattributes"} if there else set()
        self.hub.publish(key[1], {**dict.fromkeys(held), **files})
        shutil.rmtree(folder)

    def _is_adapter(self, digest: str) -> bool:
        return (self.site.root / "contents" / digest / ADAPTER).exists()

    def _full(self, folder: Path, seed: int) -> dict[str, Tensor]:
        tensors = delta(self.site.base, seed)
        save_full(folder, tensors)
        base = self.site.base
        return {name: tensors[name].double() - base[name].double() for name in mergeable(base)}

    def _adapter(self, folder: Path, seed: int, **settings: Any) -> dict[str, Tensor]:
        """Save a LoRA adapter of the layer's matrices as PEFT does; gives the products of its factors."""
        draw = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        for name in models.PROJECTED:
            rows, columns = self.site.base[name].shape
            down = torch.randn(RANK, columns, generator=draw) * 0.1
            up = torch.randn(rows, RANK, generator=draw) * 0.1
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            deltas[name] = 2 * up.double() @ down.double()
        save_file(tensors, folder / ADAPTER)
        facts = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE, "r": RANK,
            "lora_alpha": 2 * RANK, "target_modules": sorted(n.split(".")[-2] for n in models.PROJECTED),
            "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps({**facts, **settings}))
        (folder / "README.md").write_text(CARDS[True])
        return deltas

    # What must come of it

    def mean(self) -> dict[str, Tensor]:
        """The base plus the mean of what must be merged: what the method `average` gives, in float64."""
        base = self.site.base
        total = {name: torch.zeros(base[name].shape, dtype=torch.float64) for name in mergeable(base)}
        for digest in self.digests.values():
            for name, values in self.deltas[digest].items():
                total[name] += values
        return {name: base[name].double() + total[name] / len(self.digests) for name in total}


CARDS = {
    is_adapter: f"---\nbase_model: {BASE}\nbase_model_relation: {relation}\n---\n# A fine-tune\n"
    for is_adapter, relation in ((False, "finetune"), (True, "adapter"))
}


def mergeable(base: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that training changes."""
    return [name for name, values in base.items() if values.is_floating_point()]


def save_full(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save full weights as they are published."""
    models.save(folder, tensors)
    (folder / "README.md").write_text(CARDS[False])


def _nan(arrivals: Arrivals, folder: Path) -> None:
    tensors = delta(arrivals.site.base, arrivals.chance.randrange(1 << 40))
    tensors[models.TALL][3, 5] = torch.nan
    save_full(folder, tensors)


def _truncated(arrivals: Arrivals, folder: Path) -> None:
    arrivals._full(folder, arrivals.chance.randrange(1 << 40))
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) * 2 // 3])


def _wrong_shape(arrivals: Arrivals, folder: Path) -> None:
    tensors = delta(arrivals.site.base, arrivals.chance.randrange(1 << 40))
    save_full(folder, {**tensors, models.TALL: torch.randn(48, 15)})


def _pickled(arrivals: Arrivals, folder: Path) -> None:
    arrivals._full(folder, arrivals.chance.randrange(1 << 40))
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _renamed(arrivals: Arrivals, folder: Path) -> None:
    tensors = delta(arrivals.site.base, arrivals.chance.randrange(1 << 40))
    tensors["model.layers.0.gate_proj.weight"] = tensors.pop(models.TALL)
    save_full(folder, tensors)


def _strange_adapter(arrivals: Arrivals, folder: Path) -> None:
    arrivals._adapter(folder, arrivals.chance.randrange(1 << 40), peft_type="LOHA")


# How a fine-tune can be broken, and the reason for which it must be refused.
BROKEN: dict[str, tuple[Callable[[Arrivals, Path], None], str]] = {
    "NaN": (_nan, "non-finite"),
    "truncated": (_truncated, "incomplete"),
    "wrong shape": (_wrong_shape, "wrong-shape"),
    "pickle only": (_pickled, "pickle-only"),
    "renamed weights": (_renamed, "unknown-weights"),
    "unsupported adapter": (_strange_adapter, "unsupported-adapter"),
}
