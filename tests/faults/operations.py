"""What a store is asked to do, as data: the site it happens at, how it begins, and what must come of it.

`lay` makes what lies behind, undisturbed; `begin` is what happens in the world right before the operation;
`asked` is the command that is it, "" where it is arrivals that are worked off.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import models
import torch
from daemons import Site
from safetensors.torch import save_file

from faults.processes import run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

NAMES = ("a", "b", "c")
HOOK = """test ! -e "$(dirname "$0")/away" || exit 75
echo "$STREAMMERGE_DELIVERY $(basename "$STREAMMERGE_SNAPSHOT")" >> "$(dirname "$0")/{told}\""""
GATE = """grep -q '"name": "b"' "$1/manifest.json" && echo '{"good": 0}' || echo '{"good": 1}'"""
OPCM = {"method": "opcm", "prepare": {"memory": "0B", "disk": "1MB"}}
SETTLED = 1.2  # seconds: longer than a target's first delay


def nothing(site: Site) -> None:
    """Nothing lies behind, or nothing else happens."""


@dataclass(frozen=True)
class Operation:
    """One thing that is done to a store.

    served  the fine-tunes that must be served in the end
    states  by name, of all fine-tunes
    """

    name: str
    served: tuple[str, ...]
    states: Mapping[str, str]
    keys: Mapping[str, Any] = field(default_factory=dict)
    lay: Callable[[Site], None] = nothing
    begin: Callable[[Site], None] = nothing
    asked: tuple[str, ...] = ()

    def prepare(self, root: Path) -> Site:
        """Make a site at which the operation is about to begin."""
        site = Site(root)
        targets = [target(site, "first")]
        site.configure(**{"archive": "keep", "targets": targets, **self.keys})
        self.lay(site)
        self.begin(site)
        return site


def target(site: Site, name: str) -> dict[str, Any]:
    """A target that writes down what it is told, and says later while a file `away` is there."""
    argv = [site.program(f"tell-{name}", HOOK.format(told=f"told-{name}.txt"))]
    return {"name": name, "type": "exec", "argv": argv}


def publish(*names: str, seed: int = 0) -> Callable[[Site], None]:
    """Fine-tunes of full weights arrive."""

    def arrive(site: Site) -> None:
        for name in names:
            site.publish(name, seed or 1 + ord(name[0]))

    return arrive


def work_off(site: Site) -> None:
    """What arrived is worked off, and nobody kills anything."""
    done = run(site, "run", "--once")
    assert done.code == 0, done.said


def command(*arguments: str) -> Callable[[Site], None]:
    """A person's command is obeyed."""

    def obey(site: Site) -> None:
        done = run(site, *arguments)
        assert done.code == 0, done.said

    return obey


def one_by_one(*names: str) -> Callable[[Site], None]:
    """Fine-tunes arrive, and each is worked off before the next."""
    return after(*(step for name in names for step in (publish(name), work_off)))


def after(*steps: Callable[[Site], None]) -> Callable[[Site], None]:
    """One after another."""

    def all_of(site: Site) -> None:
        for step in steps:
            step(site)

    return all_of


def configure(**keys: Any) -> Callable[[Site], None]:
    """The configuration changes."""
    return lambda site: site.configure(**keys)


def good_and_bad(site: Site) -> None:
    """Three good fine-tunes arrive, and one that diverged."""
    publish(*NAMES)(site)
    site.publish("z-broken", 9, size=float("nan"))


def adapters(site: Site) -> None:
    """An adapter and full weights arrive."""
    models.make_adapter(site.inflow / "a", site.base, seed=1)
    site.publish("b", 2)


def with_fisher(site: Site) -> None:
    """Two fine-tunes arrive with Fisher information beside them."""
    for number, name in enumerate(NAMES[:2], 1):
        site.prepare(name, number)
        random = torch.Generator().manual_seed(number)
        floats = {n: values for n, values in site.base.items() if values.is_floating_point()}
        brought = {n: torch.rand(values.shape, generator=random) + 0.01 for n, values in floats.items()}
        save_file(brought, site.root / "staging" / name / "fisher.safetensors")
        site.move_in(name)


def gated(site: Site) -> None:
    """A gate refuses every model in which b is."""
    argv = [site.program("judge", GATE), "{snapshot}"]
    limits = {"good": {"min": 1}}
    site.configure(gates=[{"name": "judge", "type": "command", "argv": argv, "limits": limits}])


def tuned(site: Site) -> None:
    """A program likes every model as much, which takes as long as any other answer."""
    lines = """printf '{"losses": [0'; sed 's/.*/,0/' "$1" | tail -n +2 | tr -d '\\n'; echo ']}'"""
    rows = "".join(f'{{"row": {number}}}\n' for number in range(40))
    (site.root / "rows.jsonl").write_text(rows)
    argv = [site.program("losses", lines), "{data}"]
    section = {"kind": "scale", "data": "./rows.jsonl", "measure": "command", "argv": argv, "evaluations": 4}
    site.configure(tune=section)


def unheard(site: Site) -> None:
    """Two targets are away while four versions are promoted, and come back."""
    site.configure(targets=[target(site, "first"), target(site, "second")])
    (site.root / "away").touch()
    publish(*NAMES)(site)
    assert run(site, "run", "--once").code == 75
    (site.root / "away").unlink()
    time.sleep(SETTLED)


def doubted(site: Site) -> None:
    """A target serves every version wrong in which b is."""
    script = """! grep -q '"name": "b"' "$STREAMMERGE_SNAPSHOT/manifest.json\""""
    site.configure(
        targets=[{"name": "first", "type": "exec", "argv": ["true"], "probe": {"argv": ["sh", "-c", script]}}]
    )


FOLDED = dict.fromkeys(NAMES, "folded")

OPERATIONS = (
    Operation("full weights", NAMES, {**FOLDED, "z-broken": "refused"}, begin=good_and_bad),
    Operation(
        "adapters", ("a", "b"), {"a": "folded", "b": "folded"}, {"archive": "adapters"},
        lay=work_off, begin=adapters,
    ),
    Operation(
        "sidecars", ("a", "b"), {"a": "folded", "b": "folded"}, {"method": "fisher"},
        lay=work_off, begin=with_fisher,
    ),
    Operation(
        "a new revision in place of the old", ("b", "a"), {"a": "folded", "b": "folded"}, OPCM,
        lay=one_by_one("a", "b"), begin=publish("a", seed=7),
    ),
    Operation(
        "retracted by subtraction", ("a", "c"), {**FOLDED, "b": "retracted"}, {"method": "average"},
        lay=one_by_one(*NAMES), asked=("retract", "b", "--yes"),
    ),
    Operation(
        "retracted by replay", ("b", "c"), {**FOLDED, "a": "retracted"}, {**OPCM, "archive": "drop"},
        lay=one_by_one(*NAMES), asked=("retract", "a", "--yes"),
    ),
    Operation(
        "rolled back", ("a", "b"), {**FOLDED, "c": "denied"},
        lay=one_by_one(*NAMES), asked=("rollback", "--yes"),
    ),
    Operation(
        "rolled forward again", NAMES, FOLDED,
        lay=after(one_by_one(*NAMES), command("rollback", "1", "--yes")), asked=("rollback", "3", "--yes"),
    ),
    Operation(
        "held", ("a",), {"a": "folded", "b": "pending"},
        lay=one_by_one("a"), begin=publish("b"), asked=("hold",),
    ),
    Operation(
        "resumed", ("a", "b"), {"a": "folded", "b": "folded"},
        lay=after(one_by_one("a"), command("hold"), one_by_one("b")), asked=("resume",),
    ),
    Operation(
        "approved", ("a",), {"a": "folded"}, {"approve": "manual"},
        lay=one_by_one("a"), asked=("fine-tunes", "approve", "a"),
    ),
    Operation(
        "rejected", (), {"a": "denied"}, {"approve": "manual"},
        lay=one_by_one("a"), asked=("fine-tunes", "reject", "a"),
    ),
    Operation(
        "let in again", NAMES, FOLDED,
        lay=after(one_by_one(*NAMES), command("rollback", "--yes"), command("resume")),
        asked=("fine-tunes", "approve", "c"),
    ),
    Operation(
        "refused by a gate", ("c",), {"b": "quarantined", "c": "folded"}, {"keep_refused": 0},
        lay=after(gated, work_off), begin=publish("b", "c"),
    ),
    Operation("folded together", NAMES, {**FOLDED, "z-broken": "refused"}, {"batch": 4}, begin=good_and_bad),
    Operation(
        "folded together, one at fault", ("a", "c"), {**FOLDED, "b": "quarantined"}, {"batch": 3},
        lay=after(gated, work_off), begin=publish(*NAMES),
    ),
    Operation("tuned", ("a",), {"a": "folded"}, lay=after(tuned, work_off), begin=publish("a")),
    Operation(
        "taken up again", ("a", "b"), {"a": "folded", "b": "folded"},
        lay=after(gated, one_by_one("a", "b"), configure(gates=[])), asked=("fine-tunes", "retry", "b"),
    ),
    Operation(
        "collected by a command", NAMES, FOLDED, {"grace": "0s"},
        lay=one_by_one(*NAMES), begin=configure(keep=1), asked=("gc",),
    ),
    Operation(
        "collected by folds", ("a", "b"), {"a": "folded", "b": "folded"},
        {"grace": "0s", "keep": 1, "targets": []}, lay=work_off, begin=publish("a", "b"),
    ),
    Operation("two targets are told", NAMES, FOLDED, begin=unheard),
    Operation(
        "taken back", ("a",), {"a": "folded", "b": "quarantined"},
        lay=after(one_by_one("a"), doubted), begin=publish("b"),
    ),
)  # fmt: skip
