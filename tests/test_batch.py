"""Several waiting fine-tunes in one version: the bytes of one by one; if it is refused, who is at fault."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from merges import look, opened, states, turn, versions, weights_of, work_off
from safetensors.torch import save_file

from streammerge import methods, operations, pipeline, snapshots
from streammerge.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

NAMES = ("a", "b", "c", "d")
OTHERS = ("opcm", *(name for name in methods.NAMES if name not in ("spectral_cap", "opcm", "pcb")))
GATE = """#!/bin/sh
echo run >> {log}
grep -qE '"name":( )?"({bad})"' "$1/manifest.json" && echo '{{"good": 0}}' || echo '{{"good": 1}}'
"""


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    """A toy base, and a folder for its fine-tunes."""
    (tmp_path / "fine-tunes").mkdir()
    return models.make_base(tmp_path / "base")


def publish(root: Path, base: Mapping[str, Tensor], *names: str, **how: Any) -> None:
    """Put fine-tunes into the folder, an adapter for b."""
    for name in names:
        where = root / "fine-tunes" / name
        if name == "b":
            models.make_adapter(where, base, seed=2)
        else:
            models.make_fine_tune(where, base, seed=ord(name[0]), **how)


def gated(root: Path, bad: str) -> dict[str, Any]:
    """A gate that refuses every version in which one of some fine-tunes is, and writes down each run."""
    program = root / "judge"
    program.write_text(GATE.format(log=root / "runs", bad=bad))
    program.chmod(0o755)
    argv = [str(program), "{snapshot}"]
    return {"gates": [{"name": "judge", "type": "command", "argv": argv, "limits": {"good": {"min": 1}}}]}


def runs(root: Path) -> int:
    """Count the runs of the gate."""
    return len((root / "runs").read_text().splitlines())


def with_sidecar(root: Path, base: Mapping[str, Tensor], name: str) -> None:
    """Lay Fisher information or Gram matrices beside every fine-tune of full weights."""
    for number, path in enumerate(sorted((root / "fine-tunes").iterdir())):
        random = torch.Generator().manual_seed(number)
        found = {}
        for weight, values in base.items():
            if not values.is_floating_point():
                continue
            if name == "fisher.safetensors":
                found[weight] = torch.rand(values.shape, generator=random) + 0.01
            elif weight in models.PROJECTED:
                seen = torch.randn(64, values.shape[1], generator=random)
                found[weight] = seen.T @ seen
        save_file(found, path / name)


@pytest.mark.parametrize(
    ("method", "residency"),
    [
        ("spectral_cap", "disk"),
        ("opcm", "host"),
        ("pcb", "disk"),
        *(pytest.param(m, "disk", marks=pytest.mark.slow) for m in OTHERS),
        *(pytest.param(m, "host", marks=pytest.mark.slow) for m in OTHERS[1:4]),
    ],
)
def test_a_batch_has_the_bytes_of_one_by_one(
    method: str, residency: str, base: dict[str, Tensor], tmp_path: Path
) -> None:
    """Four fine-tunes in one version give the state and the model, bit for bit, that four versions give."""
    publish(tmp_path, base, *NAMES)
    if sidecar := methods.sidecar(method):
        with_sidecar(tmp_path, base, sidecar)
    found = []
    for batch, count in ((1, 4), (3, 2), (4, 1)):
        keys = {"method": method, "batch": batch, "archive": "keep"}
        with opened(tmp_path, f"store-{batch}", residency=residency, **keys) as merge:
            work_off(merge)
            assert [member.name for member in merge.head.fine_tunes] == list(NAMES)
            assert merge.head.version == count
            found.append((weights_of(merge), merge.head.manifest["totals"], merge.head.manifest["health"]))
    assert found[0] == found[1] == found[2]


def test_a_batch_is_one_version_in_ledger_and_manifest(base: dict[str, Tensor], tmp_path: Path) -> None:
    """One version is sealed, gated and promoted; it lists all in order, and so does its row."""
    publish(tmp_path, base, *NAMES)
    with opened(tmp_path, "store", batch=8, **gated(tmp_path, "none")) as merge:
        work_off(merge)
        assert versions(merge) == [("accepted", list(NAMES))]
        assert {row["version"] for row in merge.ledger.fine_tunes("folded")} == {1}
        assert runs(tmp_path) == 2
        assert len(merge.ledger.rows("select * from promotions")) == 2


@pytest.mark.parametrize("bad", ["b", "d", *(pytest.param(n, marks=pytest.mark.slow) for n in "ac")])
def test_one_that_is_refused_while_it_is_read_does_not_spoil_the_others(
    bad: str, base: dict[str, Tensor], tmp_path: Path
) -> None:
    """Wherever it stands, it is set aside with its reason; the others are what they are without it."""
    others = [name for name in NAMES if name != bad]
    publish(tmp_path, base, *others)
    with opened(tmp_path, "without", batch=4) as merge:
        work_off(merge)
        expected = weights_of(merge)
    if bad == "b":
        models.make_fine_tune(tmp_path / "fine-tunes" / "b", base, seed=9, size=math.nan)
    else:
        publish(tmp_path, base, bad, size=math.nan)
    with opened(tmp_path, "with", batch=4, residency="host") as merge:
        work_off(merge)
        assert states(merge) == {**dict.fromkeys(others, "folded"), bad: "refused"}
        assert versions(merge) == [("accepted", others)]
        assert weights_of(merge) == expected


def test_what_speaks_against_one_by_what_stands_before_it_is_asked_again(
    base: dict[str, Tensor], tmp_path: Path
) -> None:
    """A near copy of one in the same batch ends it, and is judged when that one is merged, or is not."""
    publish(tmp_path, base, "a")
    tensors = models.make_fine_tune(tmp_path / "fine-tunes" / "c", base, seed=ord("a"))
    tensors[models.NORM] = tensors[models.NORM] + 1e-3
    models.save(tmp_path / "fine-tunes" / "c", tensors)
    publish(tmp_path, base, "d")
    screens = {"cosine": {"min_folds": 1, "action": "refuse"}}
    with opened(tmp_path, "store", batch=4, screens=screens) as merge:
        work_off(merge)
        assert versions(merge) == [("accepted", ["a"]), ("accepted", ["d"])]
        assert states(merge) == {"a": "folded", "c": "refused", "d": "folded"}
    with opened(tmp_path, "gated", batch=4, screens=screens, **gated(tmp_path, "a")) as merge:
        work_off(merge)
        assert states(merge) == {"a": "quarantined", "c": "folded", "d": "folded"}


@pytest.mark.parametrize(
    ("bad", "most"),
    [
        ("d", 6),
        *(
            pytest.param(bad, most, marks=pytest.mark.slow)
            for bad, most in (("a", 6), ("h", 5), ("c|f", 12), ("a|b|c|d|e|f|g|h", 40))
        ),
    ],
)
def test_the_culprit_is_found_and_the_innocent_are_folded(
    bad: str, most: int, base: dict[str, Tensor], tmp_path: Path
) -> None:
    """Of eight, those for which the gate refuses are quarantined, after few versions; the rest goes in."""
    names, culprits = "abcdefgh", bad.split("|")
    good = [name for name in names if name not in culprits]
    publish(tmp_path, base, *names)
    with opened(tmp_path, "one", **gated(tmp_path, bad)) as merge:
        work_off(merge)
        expected = weights_of(merge)
    (tmp_path / "runs").unlink()
    with opened(tmp_path, "batch", batch=8, **gated(tmp_path, bad)) as merge:
        work_off(merge)
        assert states(merge) == {n: "quarantined" if n in culprits else "folded" for n in names}
        assert [member.name for member in merge.head.fine_tunes] == good
        assert {row["reason"] for row in merge.ledger.fine_tunes("quarantined")} == {"quality"}
        assert "below 1" in merge.ledger.fine_tunes("quarantined")[0]["detail"]
        assert weights_of(merge) == expected
        assert len(versions(merge)) == runs(tmp_path) - 1 <= most
        assert merge.ledger.fact("suspects") == []


@pytest.mark.slow
def test_what_was_learnt_outlives_a_restart(base: dict[str, Tensor], tmp_path: Path) -> None:
    """Begun anew after every version, the search takes the same versions."""
    publish(tmp_path, base, *"abcdefgh")
    keys = {"batch": 8, **gated(tmp_path, "e")}
    with opened(tmp_path, "undisturbed", **keys) as merge:
        work_off(merge)
        expected = versions(merge), weights_of(merge)
    more = True
    while more:
        with opened(tmp_path, "restarted", **keys) as merge:
            look(merge)
            more = turn(merge)
            found = versions(merge), weights_of(merge)
    assert found == expected


def test_what_happens_during_the_search_is_respected(base: dict[str, Tensor], tmp_path: Path) -> None:
    """A newer revision, a rejection, a hold, a rollback and a retract in the midst of it."""
    publish(tmp_path, base, *"acdefgh")
    with opened(tmp_path, "store", batch=8, **gated(tmp_path, "h")) as merge:
        look(merge)
        assert turn(merge)
        assert versions(merge) == [("refused", list("acdefgh"))]
        models.make_fine_tune(
            tmp_path / "fine-tunes" / "c", base, seed=77
        )  # not one of the suspects any more
        look(merge)
        operations.reject(merge, name="d")
        assert turn(merge)
        assert versions(merge)[-1] == ("accepted", ["a", "e", "f"])
        merge.ledger.ask("rollback", {})
        operations.work_off(merge)
        assert turn(merge)  # fetches the newer revision
        assert not turn(merge)
        operations.resume(merge)
        work_off(merge)
        assert states(merge) == {
            "a": "denied", "c": "folded", "d": "denied", "e": "denied", "f": "denied", "g": "folded",
            "h": "quarantined",
        }  # fmt: skip
        assert sorted(member.name for member in merge.head.fine_tunes) == ["c", "g"]


def test_a_suspect_that_passes_alone_goes_in(base: dict[str, Tensor], tmp_path: Path) -> None:
    """Of two that are refused only together, the first goes in and the second does not."""
    publish(tmp_path, base, *"acd")
    judge = tmp_path / "judge"
    judge.write_text(
        "#!/bin/sh\necho run >> " + str(tmp_path / "runs") + "\n"
        'grep -q \'"name": "a"\' "$1/manifest.json" && grep -q \'"name": "c"\' "$1/manifest.json" '
        "&& echo '{\"good\": 0}' || echo '{\"good\": 1}'\n"
    )
    judge.chmod(0o755)
    argv = [str(judge), "{snapshot}"]
    gate = {"name": "judge", "type": "command", "argv": argv, "limits": {"good": {"min": 1}}}
    with opened(tmp_path, "store", batch=4, gates=[gate]) as merge:
        work_off(merge)
        assert states(merge) == {"a": "folded", "c": "quarantined", "d": "folded"}


def test_a_new_revision_of_what_is_folded_goes_alone(base: dict[str, Tensor], tmp_path: Path) -> None:
    """It takes the old one's place in a version of its own; others wait for the next."""
    publish(tmp_path, base, "a", "c")
    with opened(tmp_path, "store", batch=4, method="average", archive="keep") as merge:
        work_off(merge)
        models.make_fine_tune(tmp_path / "fine-tunes" / "e", base, seed=5)
        look(merge)
        models.make_fine_tune(tmp_path / "fine-tunes" / "a", base, seed=7)
        models.make_fine_tune(tmp_path / "fine-tunes" / "f", base, seed=6)
        work_off(merge)
        assert versions(merge) == [
            ("accepted", ["a", "c"]), ("accepted", ["e"]), ("accepted", ["a"]), ("accepted", ["f"])
        ]  # fmt: skip
        assert [member.name for member in merge.head.fine_tunes] == ["c", "e", "a", "f"]


def test_a_person_is_asked_for_each(base: dict[str, Tensor], tmp_path: Path) -> None:
    """With approve: manual each waits, and those approved go together."""
    publish(tmp_path, base, "a", "c", "d")
    with opened(tmp_path, "store", batch=4, approve="manual") as merge:
        work_off(merge)
        assert set(states(merge).values()) == {"awaiting_approval"}
        for name in ("a", "d"):
            operations.approve(merge, name=name)
        work_off(merge)
        assert versions(merge) == [("accepted", ["a", "d"])]
        assert states(merge)["c"] == "awaiting_approval"


def test_a_model_that_does_not_fit_its_dtype_is_one_of_the_batch(tmp_path: Path) -> None:
    """Where the merged weight overflows, the one that does it is found and refused; the others go in."""
    (tmp_path / "fine-tunes").mkdir()
    base = models.make_base(tmp_path / "base", dtype=torch.float16)
    base[models.NORM] = torch.full((16,), 6e4, dtype=torch.float16)
    models.save(tmp_path / "base", base)
    publish(tmp_path, base, "a", "d", "e")
    much = {**base, models.NORM: torch.full((16,), 6.5e4, dtype=torch.float16)}
    models.save(tmp_path / "fine-tunes" / "c", much)
    keys: dict[str, Any] = {"method": "task_arithmetic", "knobs": {"scale": 2.0}}
    found = {}
    for batch in (1, 4):
        with opened(tmp_path, f"store-{batch}", batch=batch, **keys) as merge:
            work_off(merge)
            assert states(merge) == {"a": "folded", "c": "refused", "d": "folded", "e": "folded"}
            assert {row["reason"] for row in merge.ledger.fine_tunes("refused")} == {"overflow"}
            found[batch] = weights_of(merge)
    assert found[1] == found[4]


def test_files_that_changed_are_fetched_again_and_the_others_go_on(
    base: dict[str, Tensor], tmp_path: Path
) -> None:
    """One of a batch whose fetched files are not what they were is put back alone."""
    publish(tmp_path, base, "a", "c", "d")
    with opened(tmp_path, "store", batch=4) as merge:
        look(merge)
        [part] = merge.config.sources
        source = open_source(part, merge.config)
        rows = [pipeline.fetch(merge, row, source) for row in merge.ledger.fine_tunes("pending")]
        spoiled = merge.store.inbox / str(rows[1]["id"]) / "model.safetensors"
        content = bytearray(spoiled.read_bytes())
        content[-100] ^= 1
        spoiled.chmod(0o644)
        spoiled.write_bytes(content)
        assert turn(merge)
        assert versions(merge) == [("accepted", ["a", "d"])]
        row = merge.ledger.row("select * from fine_tunes where name = 'c'")
        assert row is not None
        assert (row["state"], row["step"], row["attempts"]) == ("pending", "announced", 1)
        merge.ledger.write("update fine_tunes set next_try_at = 0")
        work_off(merge)
        assert versions(merge)[-1] == ("accepted", ["c"])


def test_what_a_refused_fold_left_in_memory_is_not_rendered(base: dict[str, Tensor], tmp_path: Path) -> None:
    """A version that copies an older state, built where a refused one was, has that state's model."""
    found = {}
    for residency in ("disk", "host"):
        for name in NAMES:
            publish(tmp_path, base, *([name] if not (tmp_path / "fine-tunes" / name).exists() else []))
        with opened(tmp_path, residency, residency=residency, method="opcm", archive="keep") as merge:
            work_off(merge)
            models.make_fine_tune(tmp_path / "fine-tunes" / "z", base, seed=3, size=60.0)
            work_off(merge)
            assert states(merge)["z"] == "refused"
            merge.ledger.ask("retract", {"name": "d"})
            assert turn(merge)
            assert [member.name for member in merge.head.fine_tunes] == ["a", "b", "c"]
            before = snapshots.by_version(merge.store, 3)
            assert before is not None
            old = snapshots.read(before).manifest["files"]
            found[residency] = weights_of(merge)
            assert found[residency] == {n: f["sha256"] for n, f in old.items() if n in found[residency]}
