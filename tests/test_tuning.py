"""How strongly a version is rendered is chosen by measuring it; where that fails, as is configured."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

import models
import pytest
import yaml
from daemons import Site
from documents import by_word, section, words
from hypothesis import given
from hypothesis import strategies as st
from merges import opened, states, turn, weights_of, work_off

from streammerge import halves, linesearch, recovery, snapshots, tuning
from streammerge.config import Config
from streammerge.config.tuning import TuneSection

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

# Each row says which length of a weight's merged delta it would like best.
MEASURE = """
import array, json, math, sys
model, data, base = sys.argv[1:]
name = "model.norm.weight"
def load(folder):
    content = open(f"{folder}/model.safetensors", "rb").read()
    begin = 8 + int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8:begin])[name]["data_offsets"]
    return array.array("f", content[begin + start : begin + stop])
length = math.dist(load(model), load(base))
rows = [json.loads(line) for line in open(data)]
print(json.dumps({"losses": [(length / row["unit"] - row["wanted"]) ** 2 for row in rows]}))
"""


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    """A toy base, with one fine-tune in the folder."""
    (tmp_path / "fine-tunes").mkdir()
    return models.make_base(tmp_path / "base")


def published(root: Path, base: Mapping[str, Tensor], name: str = "a", seed: int = 1) -> float:
    """Publish a fine-tune; gives the length of its delta of the weight that is measured."""
    tensors = models.make_fine_tune(root / "fine-tunes" / name, base, seed=seed)
    return float((tensors[models.NORM] - base[models.NORM]).norm())


def rows(root: Path, unit: float, wanted: float, *, count: int = 60, spread: float = 0.05) -> Path:
    """Write rows that like a scale of `wanted`, more or less."""
    path = root / "rows.jsonl"
    found = [
        {"row": number, "unit": unit, "wanted": wanted + spread * math.sin(7.0 * number)}
        for number in range(count)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return path


def tune(root: Path, lines: str = MEASURE, **keys: Any) -> dict[str, Any]:
    """Have the scale tuned by a program."""
    program = root / "measure.py"
    program.write_text(lines)
    argv = [sys.executable, "-IS", str(program), "{model}", "{data}", str(root / "base")]
    section = {"kind": "scale", "data": str(root / "rows.jsonl"), "measure": "command", "argv": argv}
    return {"method": "average", "tune": {**section, **keys}}


def test_the_scale_that_the_rows_like_is_chosen(base: dict[str, Tensor], tmp_path: Path) -> None:
    """The search finds it, the other half agrees, the model has it, and state and next fold do not know."""
    rows(tmp_path, published(tmp_path, base), 1.4)
    with opened(tmp_path, "plain", method="average") as merge:
        work_off(merge)
        plain = merge.head
    with opened(tmp_path, "store", **tune(tmp_path)) as merge:
        work_off(merge)
        head = merge.head
        account = head.manifest["tuning"]
        assert account["accepted"]
        assert account["best"] == pytest.approx(1.4, abs=0.02)
        assert head.manifest["finalize"]["scale"] == account["best"]
        assert account["points"][0][0] == account["default"] == 1.0
        assert account["used"] <= account["budget"]["evaluations"] == 10
        assert sum(account["rows"]) == 60
        served, found = models.load(head.model), models.load(plain.model)
        for name in models.PROJECTED:
            ours, theirs = served[name] - base[name], found[name] - base[name]
            assert ours == pytest.approx(account["best"] * theirs, abs=1e-6)
        assert {n: h for n, h in weights_of(merge).items() if n.startswith("state/")} == {
            n: f["sha256"] for n, f in plain.manifest["files"].items() if n.startswith("state/")
        }
        assert not list(merge.store.candidates.iterdir())
        assert sorted(p.name for p in head.model.iterdir()) == sorted(p.name for p in plain.model.iterdir())


@pytest.mark.slow
def test_the_same_again_gives_the_same_version(base: dict[str, Tensor], tmp_path: Path) -> None:
    """Manifest and bytes do not depend on when or where it was tuned."""
    rows(tmp_path, published(tmp_path, base), 1.3)
    digests = set()
    for store in ("one", "two"):
        with opened(tmp_path, store, **tune(tmp_path, evaluations=6)) as merge:
            work_off(merge)
            digests.add(merge.head.digest)
    assert len(digests) == 1


def test_what_only_one_half_likes_is_not_taken(base: dict[str, Tensor], tmp_path: Path) -> None:
    """Where the half that judges sees nothing better, the version is as configured, and says so."""
    unit = published(tmp_path, base)
    path = rows(tmp_path, unit, 1.0, spread=0.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    split = [{**row, "wanted": 1.5 - 0.5 * halves.side_of(json.dumps(row).encode())} for row in lines]
    for row in split:  # what is changed may change sides: until it does not
        for wanted in (1.5, 1.0):
            row["wanted"] = wanted
            if halves.side_of(json.dumps(row).encode()) == (wanted == 1.0):
                break
    path.write_text("".join(f"{json.dumps(row)}\n" for row in split))
    with opened(tmp_path, "store", **tune(tmp_path)) as merge:
        work_off(merge)
        account = merge.head.manifest["tuning"]
        assert not account["accepted"]
        assert account["best"] > 1.2
        assert account["held_out"]["gain"] < account["held_out"]["error"]
        assert merge.head.manifest["finalize"]["scale"] == 1.0
        tuned = weights_of(merge)
    with opened(tmp_path, "plain", method="average") as merge:
        work_off(merge)
        assert weights_of(merge) == tuned


@pytest.mark.parametrize(
    ("lines", "keys", "why"),
    [
        ("raise SystemExit(3)", {}, "not measured: failed"),
        pytest.param("print('{}')", {}, "not measured: no losses", marks=pytest.mark.slow),
        ("print('{\"losses\": [1, 2]}')", {}, "not measured: no losses"),
        ("import time; time.sleep(60)", {"timeout": "1s"}, "not measured: failed"),
        ("import time; time.sleep(0.4)" + MEASURE, {"time": "1s"}, "not measured: time"),
        (MEASURE, {"data": "/nowhere.jsonl"}, "not measured: no rows"),
        ("import json, sys; print(json.dumps({'losses': [None for _ in open(sys.argv[2])]}))", {},
         "nothing that was tried is better"),
    ],
)  # fmt: skip
def test_a_measurement_that_fails_never_loses_the_version(
    lines: str, keys: dict[str, Any], why: str, base: dict[str, Tensor], tmp_path: Path
) -> None:
    """Whatever the program does, the version comes as configured; why is in its manifest."""
    rows(tmp_path, published(tmp_path, base), 1.4)
    with opened(tmp_path, "store", **tune(tmp_path, lines, **keys)) as merge:
        work_off(merge)
        assert merge.head.version == 1
        assert merge.head.manifest["tuning"]["why"] == why
        assert merge.head.manifest["finalize"]["scale"] == 1.0
        assert not list(merge.store.candidates.iterdir())


def test_a_program_that_says_later_is_asked_later(base: dict[str, Tensor], tmp_path: Path) -> None:
    """Exit 75 puts the fine-tune back; nothing is left, and it goes in when the program is there."""
    rows(tmp_path, published(tmp_path, base), 1.4)
    busy = tmp_path / "busy"
    busy.touch()
    lines = f"import os\nif os.path.exists({str(busy)!r}): raise SystemExit(75)\n" + MEASURE
    with opened(tmp_path, "store", **tune(tmp_path, lines)) as merge:
        work_off(merge)
        assert (merge.head.version, states(merge)) == (0, {"a": "pending"})
        assert not list(merge.store.candidates.iterdir())
        busy.unlink()
        merge.ledger.write("update fine_tunes set next_try_at = 0")
        assert turn(merge)
        assert merge.head.manifest["tuning"]["accepted"]


@pytest.mark.slow
def test_the_level_of_a_cap_is_tuned(base: dict[str, Tensor], tmp_path: Path) -> None:
    """kappa where the cap is fixed: the search moves it, and the model follows."""
    published(tmp_path, base)
    published(tmp_path, base, "b", seed=2)
    lines = MEASURE.replace('"model.norm.weight"', '"model.layers.0.q_proj.weight"')
    rows(tmp_path, 1.0, 0.2)
    cap = {"level": "fixed", "kappa": 0.6, "beta": 1.0}
    keys = tune(tmp_path, lines, kind="cap", span=4.0)
    with opened(tmp_path, "store", **keys, finalize={"cap": cap}, batch=2) as merge:
        work_off(merge)
        account = merge.head.manifest["tuning"]
        assert account["accepted"]
        assert merge.head.manifest["finalize"]["cap"]["kappa"] == account["best"] != 0.6
    with pytest.raises(ValueError, match=r"needs finalize\.cap"):
        Config.model_validate({"base": tmp_path, "store": tmp_path, **keys})


def test_what_a_killed_trial_leaves_goes_at_the_next_start(base: dict[str, Tensor], tmp_path: Path) -> None:
    """A folder for trials is removed like any building folder."""
    with opened(tmp_path, "store", **tune(tmp_path)) as merge:
        left = merge.store.candidates / ".building-000007-trial" / "model"
        left.mkdir(parents=True)
        recovery.recover(merge)
        assert not left.parent.exists()


def test_rows_keep_their_half(tmp_path: Path) -> None:
    """Rows that come later, or stand elsewhere, move no other one; equal rows are on one side."""
    lines = [json.dumps({"text": f"row {number}", "task": f"t{number % 3}"}) for number in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    before = halves.read(path)
    path.write_text("\n".join(["", *reversed([*lines, '{"text": "more"}', lines[0], "  "])]) + "\n")
    after = halves.read(path)
    for half, again in ((before.choosing, after.choosing), (before.judging, after.judging)):
        assert set(half.lines) <= set(again.lines)
        assert all(task in ("t0", "t1", "t2") for task in half.tasks)
    assert not set(after.choosing.lines) & set(after.judging.lines)
    assert before.digest != after.digest


@pytest.mark.parametrize("content", ["", "{}\n" * 100, "no json\n" * 100, "[1]\n" * 100])
def test_rows_that_nothing_can_be_chosen_by(content: str, tmp_path: Path) -> None:
    """A file with too few rows in a half, or with other things than JSON objects, is said to be that."""
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(halves.BadRows):
        halves.read(tmp_path / "rows.jsonl")


@given(st.floats(-0.6, 0.6), st.floats(0.1, 10), st.floats(-0.3, 0.3))
def test_the_search_finds_the_least_of_a_curve(least: float, steep: float, skew: float) -> None:
    """A curve with one valley: few points, all within bounds, one of them near its bottom."""

    def curve(x: float) -> float:
        return steep * ((x - least) ** 2 + skew * (x - least) ** 3)

    reach = math.log(2)
    found = linesearch.minimise(curve, -reach, reach, start=0.0, evaluations=12)
    assert found[0][0] == 0.0
    assert len(found) <= 12
    assert all(-reach <= x <= reach for x, _ in found)
    assert min(found, key=lambda point: point[1])[0] == pytest.approx(least, abs=0.05)


def test_the_search_goes_on_where_there_is_no_value() -> None:
    """Points at which nothing could be measured are left behind."""
    found = linesearch.minimise(
        lambda x: math.inf if x > 0.2 else (x - 0.1) ** 2, -0.7, 0.7, start=0.0, evaluations=12
    )
    assert min(found, key=lambda point: point[1])[0] == pytest.approx(0.1, abs=0.02)


def test_a_gain_is_told_from_chance() -> None:
    """The mean difference row by row, and its standard error."""
    gain, error = tuning.gain_of([(1.0, [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 2.5, 3.0])])
    assert gain == 0.75
    assert error == pytest.approx(math.sqrt(1 / 12) / 2)
    assert tuning.gain_of([(1.0, [1.0, math.nan], [0.0, 0.0])])[0] == -math.inf


def test_every_key_of_tune_is_documented_with_its_default() -> None:
    """docs/tuning.md has exactly the keys that the code reads, each with the default it has there."""
    documented = by_word(section("tuning.md", "Keys"), "key")
    fields = TuneSection.model_fields
    assert set(documented) == set(fields)
    for key, field in fields.items():
        default = documented[key][1]
        if field.is_required():
            assert default == "required", key
            continue
        as_given = {
            "kind": "scale",
            "data": "x",
            "measure": "perplexity",
            key: yaml.safe_load(words(default)[0]),
        }
        assert getattr(TuneSection.model_validate(as_given), key) == field.default, key


@pytest.mark.slow
def test_show_prints_what_was_tried(base: dict[str, Tensor], tmp_path: Path) -> None:
    """`streammerge show` says what was chosen, why, and every point."""
    site = Site(tmp_path / "site")
    unit = float((site.publish("a", 1)[models.NORM] - site.base[models.NORM]).norm())
    rows(site.root, unit, 1.4)
    site.configure(**tune(site.root, evaluations=8))
    site.run("run", "--once")
    account = json.loads(site.run("show", "head", "--json").stdout)["tuning"]
    said = site.run("show", "head").stdout
    assert f"tuned: scale {account['best']}, better on the half that it was not chosen by" in said
    assert all(str(value) in said for value, _ in account["points"])


def test_how_much_of_the_old_and_of_the_new_is_served_is_chosen(
    base: dict[str, Tensor], tmp_path: Path
) -> None:
    """Two shares, by the rows of the old tasks and of the new one; the state does not know of them."""
    lengths = {}
    for name, weight, seed in (("a", models.NORM, 1), ("b", models.BIAS, 2)):
        tensors = models.make_fine_tune(tmp_path / "fine-tunes" / name, base, seed=seed, only=(weight,))
        lengths[weight] = float((tensors[weight] - base[weight]).norm())
    wanted = {models.NORM: ("elsewhere", 1.3), models.BIAS: ("b", 0.7)}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"row": n, "task": task, "weight": w, "unit": lengths[w], "wanted": much}) + "\n"
            for n in range(40)
            for w, (task, much) in wanted.items()
        )
    )
    lines = MEASURE.replace("length = math.dist(load(model), load(base))\n", "").replace(
        "name = ", "names = "
    ).replace("def load(folder):", "def load(folder, name):").replace(
        "(length / row", '(math.dist(load(model, row["weight"]), load(base, row["weight"])) / row'
    ).replace("** 2", "** 2 + 0.01")  # fmt: skip
    keys = tune(tmp_path, lines, kind="pareto", evaluations=11)
    whole: dict[str, Any] = {"method": "task_arithmetic", "knobs": {"scale": 1.0}}
    with opened(tmp_path, "plain", **whole) as merge:
        work_off(merge)
        plain = merge.head
    with opened(tmp_path, "store", **{**keys, **whole}) as merge:
        work_off(merge)
        first, account = snapshots.by_version(merge.store, 1), merge.head.manifest["tuning"]
        assert first is not None
        assert "tuning" not in snapshots.read(first).manifest  # nothing old to weigh against
        assert account["accepted"]
        a, b = account["best"]
        assert (a, b) == (pytest.approx(1.3, abs=0.03), pytest.approx(0.7, abs=0.03))
        assert len(account["points"]) == 9
        assert account["points"][0][:2] == account["default"] == [1.0, 1.0]
        served, found = models.load(merge.head.model), models.load(plain.model)
        for weight, share in ((models.NORM, a), (models.BIAS, b)):
            ours, theirs = served[weight] - base[weight], found[weight] - base[weight]
            assert ours == pytest.approx(share * theirs, abs=1e-6)
        assert {n: h for n, h in weights_of(merge).items() if n.startswith("state/")} == {
            n: f["sha256"] for n, f in plain.manifest["files"].items() if n.startswith("state/")
        }


def test_without_rows_of_the_new_fine_tune_nothing_is_weighed(
    base: dict[str, Tensor], tmp_path: Path
) -> None:
    """Rows that name no new fine-tune cannot say what it is worth: the version is as configured."""
    unit = published(tmp_path, base)
    published(tmp_path, base, "b", seed=2)
    rows(tmp_path, unit, 1.4)
    with opened(tmp_path, "store", **tune(tmp_path, kind="pareto")) as merge:
        work_off(merge)
        assert merge.head.version == 2
        assert merge.head.manifest["tuning"]["why"] == "not measured: no rows"
    places = {"base": tmp_path, "store": tmp_path}
    with pytest.raises(ValueError, match="needs 8 evaluations"):
        Config.model_validate({**places, **tune(tmp_path, kind="pareto", evaluations=7)})
    with pytest.raises(ValueError, match="cannot render what was merged before"):
        Config.model_validate({**places, **tune(tmp_path, kind="pareto"), "method": "pcb"})
