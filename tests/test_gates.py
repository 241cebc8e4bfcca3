"""Gates stop what merges and is no good: head stays, the queue goes on, every figure is there to read."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
from typing import TYPE_CHECKING, Any

import language
import models
import pytest
import torch
import transformers
from daemons import Site, until
from documents import read
from shops import Shop

from streammerge import gates, offline, once
from streammerge.config import Config
from streammerge.config.gates import CommandGate, DriftGate, LoadsGate
from streammerge.daemon import Daemon
from streammerge.errors import ConfigError, TryAgain
from streammerge.ledger import Ledger
from streammerge.measuring import Measurement
from streammerge.metrics import GATE_VERDICTS, Metrics
from streammerge.reports import fine_tunes, history

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Facts = dict[str, Any]
SCREENS = ("identity", "norm", "cosine", "spectrum", "gauge")
WILD: Facts = {"max_delta_ratio": 1000.0, "screens": {name: {"action": "off"} for name in SCREENS}}


def gated(root: Path, *parts: Facts, **keys: Any) -> Shop:
    """Make a store in this process whose candidates must pass these gates."""
    return Shop(root, "average", gates=parts, **keys)


def told(shop: Shop) -> tuple[dict[str, Facts], list[Facts]]:
    """What the store says of its fine-tunes, by name, and of its versions."""
    ledger = Ledger(shop.config.store / "ledger.db", read_only=True)
    try:
        return {row["name"]: row for row in fine_tunes(ledger)}, history(ledger)
    finally:
        ledger.close()


def served(shop: Shop) -> list[str]:
    """Names of what is served."""
    return [entry["name"] for entry in shop.manifest["fine_tunes"]]


def script(folder: Path, lines: str) -> str:
    """Write a shell script; gives its path."""
    path = folder / "gate.sh"
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


# drift


def test_noise_is_stopped_by_how_far_it_moves(tmp_path: Path) -> None:
    """Twenty times a usual delta is refused by `change`; the head stays, the next fine-tune goes in."""
    shop = gated(
        tmp_path / "shop", {"type": "drift", "name": "far", "limits": {"change": {"max": 0.5}}}, **WILD
    )
    shop.publish(["ant"])
    models.make_fine_tune(shop.root / "fine-tunes" / "loud", shop.base, seed=7, size=20 * 0.02)
    shop.work()
    shop.publish(["bee"])
    assert served(shop) == ["ant", "bee"]
    rows, versions = told(shop)
    assert (rows["loud"]["state"], rows["loud"]["reason"]) == ("quarantined", "quality")
    assert re.match(
        r"version 2: gate far: change = \d\.\d+ is above 0\.5; `streammerge", rows["loud"]["detail"]
    )
    refused = rows["loud"]["refused_in"]
    assert (refused["version"], refused["gates"]) == (2, versions[2]["gates"])
    assert refused["gates"]["far"]["verdict"] == "refused"
    assert (
        refused["gates"]["far"]["figures"]["change"] > 0.5 > versions[3]["gates"]["far"]["figures"]["change"]
    )
    assert [version["state"] for version in versions[1:]] == ["accepted", "refused", "accepted"]


def test_what_drift_measures_is_what_the_models_say(tmp_path: Path) -> None:
    """Change in all, the largest of one weight with its name, and what the engine says of the base."""
    shop = gated(tmp_path / "shop", {"type": "drift", "name": "far"})
    shop.publish(["ant"])
    before = {name: w.double() for name, w in shop.model.items() if w.is_floating_point()}
    shop.publish(["bee"])
    after = {name: w.double() for name, w in shop.model.items() if w.is_floating_point()}

    def length(weights: Mapping[str, torch.Tensor]) -> float:
        return float(torch.stack([w.square().sum() for w in weights.values()]).sum().sqrt())

    moved = {name: after[name] - before[name] for name in before}
    ratios = {name: float(moved[name].norm() / before[name].norm()) for name in before}
    merged = {name: after[name] - shop.base[name].double() for name in before}
    base = length({name: shop.base[name].double() for name in before})
    found = told(shop)[1][-1]["gates"]["far"]
    assert found["figures"] == pytest.approx(
        {
            "finite": 1.0, "change": length(moved) / length(before), "largest_change": max(ratios.values()),
            "delta_norm": length(merged), "delta_ratio": length(merged) / base,
        },
        rel=1e-5,
    )  # fmt: skip
    assert found["notes"]["largest_change"] == max(ratios, key=lambda name: ratios[name])


def test_what_is_not_finite_is_stopped_without_any_limit(tmp_path: Path) -> None:
    """One value suffices, and its weight is named."""
    shop = gated(tmp_path / "shop")
    shop.work()
    [version] = (shop.config.store / "snapshots").iterdir()
    spoil(version / "model" / "model.safetensors")
    ledger = Ledger(shop.config.store / "ledger.db")
    bench = gates.Bench(ledger, Metrics(), None, shop.root / "base", 1.0)
    [reason] = gates.check([DriftGate(type="drift", name="far")], version, bench).reasons
    ledger.close()
    words = r"gate far: finite = 0 is below 1 \(1 values are NaN or infinite, the first in model\..*\)"
    assert re.fullmatch(words, reason)


def spoil(file: Path) -> None:
    """Make the last value of a file of float32 weights NaN."""
    file.chmod(0o644)
    with file.open("r+b") as content:
        content.seek(-4, os.SEEK_END)
        content.write(struct.pack("<f", math.nan))


LATER = '[ -e "$(dirname "$0")/later" ] && exit 75; echo "{}"'


@pytest.mark.slow
def test_a_candidate_that_went_bad_while_it_waited_is_stopped(tmp_path: Path) -> None:
    """A sealed candidate in which a value became NaN is never served, whatever the gate's limits."""
    site = Site(tmp_path / "site")
    waits = {"name": "waits", "type": "command", "argv": [site.program("waits", LATER)]}
    site.configure(gates=[waits, {"name": "far", "type": "drift"}])
    with site.daemon() as daemon:
        site.publish("good", 1)
        daemon.until_state(good="folded")
        (site.root / "later").touch()
        site.publish("sick", 2)
        until(lambda: daemon.ask("history")[-1]["state"] == "candidate", "a candidate")
        [candidate] = (site.store / "candidates").glob("000002-*/model/model.safetensors")
        spoil(candidate)
        (site.root / "later").unlink()
        rows = daemon.until_state(sick="quarantined")
        assert (
            "gate far: finite = 0 is below 1 (1 values are NaN or infinite, the first in"
            in rows["sick"]["detail"]
        )
        assert site.served == ["good"]
        site.publish("next", 3)
        daemon.until_state(next="folded")


# Limits


TASKS = """
here=$(dirname "$0"); echo x >> "$here/asked"
a=0.9; grep -q '"name": "ruin' "$1/model/streammerge.json" && a=0.75
printf '{"mean": %s, "task.a": %s' "$(echo "(8.1 + $a) / 10" | bc -l)" $a
for task in b c d e f g h i j; do printf ', "task.%s": 0.9' $task; done
echo '}'
"""


def test_one_ruined_task_is_enough(tmp_path: Path) -> None:
    """A glob binds each task by itself: 15 points of one are stopped while the mean of ten moves by 1.5."""
    limits = {"task.*": {"max_drop": 0.1}, "mean": {"max_drop": 0.02}}
    argv = [script(tmp_path, TASKS.replace('$(echo "(8.1 + $a) / 10" | bc -l)', "0.89")), "{snapshot}"]
    gate = {"type": "command", "name": "tasks", "argv": argv, "limits": limits, "data": []}
    shop = gated(tmp_path / "shop", gate)
    shop.publish(["ant"])
    models.make_fine_tune(shop.root / "fine-tunes" / "ruin", shop.base, seed=7)
    shop.work()
    shop.publish(["bee"])
    rows, versions = told(shop)
    assert served(shop) == ["ant", "bee"]
    detail = "version 2: gate tasks: task.a fell from 0.9 to 0.75, more than 0.1"
    assert rows["ruin"]["detail"].startswith(detail)
    found = versions[2]["gates"]["tasks"]
    assert found["against"]["version"] == 1
    assert (found["against"]["figures"]["task.a"], found["figures"]["task.a"]) == (0.9, 0.75)
    assert found["limits"] == limits
    assert len((tmp_path / "asked").read_text().split()) == 4, "each version was measured once"


def test_what_was_measured_counts_until_its_data_change(tmp_path: Path) -> None:
    """With other data the version being served is measured again; without `data` it is each time."""
    data = tmp_path / "data"
    data.write_text("1")
    argv = [script(tmp_path, 'echo x >> "$(dirname "$0")/asked"; echo \'{"n": 1}\'')]
    gate: Facts = {
        "type": "command",
        "name": "n",
        "argv": argv,
        "limits": {"n": {"max_drop": 0, "max_rise": 0}},
    }

    def asked() -> int:
        return len((tmp_path / "asked").read_text().split())

    shop = gated(tmp_path / "shop", {**gate, "data": [str(data)]})
    shop.publish(["ant"])
    assert asked() == 2
    data.write_text("2")
    shop.publish(["bee"])
    assert asked() == 4
    shop.configure(gates=(CommandGate(**gate),))
    shop.publish(["cat"])
    assert asked() == 6


def test_a_candidate_that_waits_is_not_measured_again(tmp_path: Path) -> None:
    """While one gate says later, what the gates before it measured of the same candidate stands."""
    argv = [script(tmp_path, 'echo x >> "$(dirname "$0")/asked"; echo \'{"n": 1}\'')]
    waits = tmp_path / "waits"
    waits.mkdir()
    shop = gated(
        tmp_path / "shop",
        {"type": "command", "name": "costly", "argv": argv, "data": [], "limits": {"n": {"min": 1}}},
        {"type": "command", "name": "waits", "argv": [script(waits, LATER)]},
    )
    shop.work()
    (waits / "later").touch()
    with pytest.raises(TryAgain):
        shop.publish(["ant"])
    assert len((tmp_path / "asked").read_text().split()) == 2
    (waits / "later").unlink()
    shop.work()
    assert served(shop) == ["ant"]
    assert len((tmp_path / "asked").read_text().split()) == 2


@pytest.mark.parametrize(
    ("limit", "printed", "words"),
    [
        ({"max_rise": 0.5}, "2", "n rose from 1 to 2, more than 0.5"),
        ({"max_rise": 1}, "2", ""),
        ({}, "NaN", "n is not a number"),
        ({"max": 3}, "Infinity", "n = inf is above 3"),
        ({"min": 3}, "2", "n = 2 is below 3"),
    ],
)
def test_a_limit_binds(limit: Facts, printed: str, words: str, tmp_path: Path) -> None:
    """Each bound by itself; what is no number is never within."""
    lines = f"""grep -q '"name": "ant' "$1/model/streammerge.json" && echo '{{"n": {printed}}}' && exit
    echo '{{"n": {3 if "min" in limit else 1}}}'"""
    gate = {
        "type": "command",
        "name": "n",
        "argv": [script(tmp_path, lines), "{snapshot}"],
        "limits": {"n": limit},
    }
    shop = gated(tmp_path / "shop", gate)
    shop.publish(["ant"])
    row = told(shop)[0]["ant"]
    assert row["state"] == ("quarantined" if words else "folded")
    assert words in (row["detail"] or "")
    assert words != "n is not a number" or row["refused_in"]["gates"]["n"]["figures"] == {"n": None}


# What ends an evaluation


UNRULY = """
case $(cat "$1/model/streammerge.json") in
    *'"name": "hangs'*) sleep 60 ;;
    *'"name": "floods'*) exec PYTHON -c "import time; held = bytearray(400 << 20); time.sleep(60)" ;;
    *'"name": "dies'*) kill -9 $$ ;;
esac
echo '{"mean": 0.9}'
"""


@pytest.mark.slow
def test_an_evaluation_that_hangs_floods_or_dies_hurts_nobody(tmp_path: Path) -> None:
    """The daemon is ready all the while; each is set aside with what happened, and the queue goes on."""
    site = Site(tmp_path / "site")
    gate: Facts = {"name": "quality", "type": "command", "timeout": "3s", "memory": "200MiB"}
    gate["argv"] = [site.program("unruly", UNRULY.replace("PYTHON", sys.executable)), "{snapshot}"]
    site.configure(gates=[{**gate, "limits": {"mean": {"min": 0.5}}}])
    for seed, name in enumerate(("a-good", "dies", "floods", "hangs", "z-good"), 1):
        site.publish(name, seed)
    with site.daemon() as daemon:
        daemon.until_state({"z-good": "folded"}, **dict.fromkeys(("dies", "floods", "hangs"), "quarantined"))
        rows = daemon.rows()
        assert site.served == ["a-good", "z-good"]
        assert "gate quality: was ended by SIGKILL, as the kernel does when" in rows["dies"]["detail"]
        assert "gate quality: used more than its memory limit of 200MiB: 0." in rows["floods"]["detail"]
        assert "gate quality: did not end within 3 s" in rows["hangs"]["detail"]
        assert {rows[name]["reason"] for name in ("dies", "floods", "hangs")} == {"quality"}
        counted = {
            verdict: daemon.metric("streammerge_gate_verdicts_total", gate="quality", verdict=verdict)
            for verdict in GATE_VERDICTS
        }
        assert counted == {"passed": 3, "refused": 3, "broken": 0, "later": 0}
        assert daemon.metric("streammerge_gate_duration_seconds_count", gate="quality") == 6
        assert daemon.metric("streammerge_finetunes_refused_total", reason="quality") == 3
        assert "quality: refused" in daemon.get("/")[1]
        assert daemon.get("/readyz")[0] == 200
        judged = {line["version"]: line for line in daemon.events("gate.judged")}
        assert judged[1]["figures"] == {"mean": 0.9}
    number = rows["hangs"]["refused_in"]["version"]
    story = site.run("fine-tunes", "show", "hangs").stdout
    assert f"refused in version {number}; what is served was not touched" in story
    assert "gate quality: refused" in story
    assert "did not end within 3 s" in story
    assert "quality passed: mean 0.9" in site.run("history").stdout
    shown = site.run("show", "current").stdout
    assert re.search(r"mean\W+0\.9\W+min 0\.5", shown), shown
    assert site.ask("show", "current")["gates"]["quality"]["figures"] == {"mean": 0.9}


# What is not there


def test_a_gate_without_its_data_is_a_configuration_error(tmp_path: Path) -> None:
    """At the start and in `config check`, with the name of the file."""
    shop = gated(
        tmp_path / "shop", {"name": "tasks", "type": "accuracy", "data": str(tmp_path / "rows.jsonl")}
    )
    begun = Daemon(tmp_path, shop.config)
    for begin in (lambda: once.run_once(shop.config), lambda: offline.check(shop.config), begun.run):
        with pytest.raises(ConfigError, match=r"gate tasks: there is no file .*rows\.jsonl"):
            begin()
    assert not shop.config.store.exists()


def test_a_gate_without_transformers_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint says what to install; a command needs nothing."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    gates.require([CommandGate(type="command", name="c", argv=("true",))])
    with pytest.raises(ConfigError, match="gate g of type loads needs transformers") as refused:
        gates.require([LoadsGate(type="loads", name="g")])
    assert refused.value.hint == "pip install 'streammerge[gates]'"


def test_data_that_vanish_hold_the_queue(tmp_path: Path) -> None:
    """They say nothing about a fine-tune: it waits, and goes in when they are back."""
    data = tmp_path / "data"
    data.write_text("1")
    gate = {"type": "command", "name": "n", "argv": [script(tmp_path, "echo '{}'")], "data": [str(data)]}
    shop = gated(tmp_path / "shop", gate)
    shop.work()
    bench = gates.Bench(Ledger(shop.config.store / "ledger.db"), Metrics(), None, shop.root / "base", 1.0)
    data.unlink()
    [version] = (shop.config.store / "snapshots").iterdir()
    with pytest.raises(gates.GateBroken, match="there is no file"):
        gates.check(shop.config.gates, version, bench)
    bench.ledger.close()


def test_what_a_kind_always_asks_binds_where_it_is_measured(tmp_path: Path) -> None:
    """A model whose forward pass nobody knows is let in by `loads`; one that lacks a weight is not."""
    shop = gated(tmp_path / "shop")
    shop.work()
    bench = gates.Bench(Ledger(shop.config.store / "ledger.db"), Metrics(), None, shop.root / "base", 1.0)
    [version] = (shop.config.store / "snapshots").iterdir()
    loads = LoadsGate(type="loads", name="builds")
    bench.keep(0, loads, Measurement({"missing": 0, "forward": 0}))
    assert gates.check([loads], version, bench).reasons == ()
    bench.keep(0, loads, Measurement({"missing": 1, "forward": 0}, {"missing": "a.weight"}))
    words = "gate builds: missing = 1 is above 0 (a.weight)"
    assert gates.check([loads], version, bench).reasons == (words,)
    bench.ledger.close()


# The documents


def test_the_function_in_the_documents_is_a_gate(tmp_path: Path) -> None:
    """What docs/gates.md shows as a Python function runs as it stands and gives its number."""
    found = re.search(r"```python\n(.*?)```", read("docs/gates.md"), re.DOTALL)
    assert found
    (tmp_path / "score").write_text(found[1])
    base = models.make_base(tmp_path / "snapshot" / "model")
    gate = CommandGate(type="command", name="q", argv=(sys.executable, str(tmp_path / "score"), "{snapshot}"))
    bench = gates.Bench(Ledger(tmp_path / "ledger.db"), Metrics(), None, tmp_path, 1.0)
    measured = gates.kind_of(gate).measure(gate, tmp_path / "snapshot", bench)
    bench.ledger.close()
    floats = torch.cat([w.flatten() for w in base.values() if w.is_floating_point()])
    assert not isinstance(measured, str), measured
    assert measured.figures == {"large": pytest.approx(float((floats.abs() > 0.01).float().mean()))}


def test_the_example_of_gates_in_the_documents_is_valid() -> None:
    """The set that catches the usual ways is a configuration that loads."""
    import yaml

    found = re.search(r"```yaml\n(.*?)```", read("docs/gates.md"), re.DOTALL)
    assert found
    parts = Config.model_validate({"base": "b", "store": "s", **yaml.safe_load(found[1])}).gates
    assert [part.type for part in parts] == ["drift", "loads", "perplexity", "accuracy"]


# With transformers: each model is built in a process of its own, which takes seconds


def skilled(root: Path) -> tuple[Facts, list[Facts], Path]:
    """Make a classifier that answers two tasks, its questions, and their file."""
    rows = [
        {"text": f"w{word} w{40 + task} w{other}", "label": 2 * task + word % 2, "task": "ab"[task]}
        for task in (0, 1) for word in range(10) for other in (11, 12)
    ]  # fmt: skip
    model = language.train(language.classifier(), rows, 150)
    language.save(model, root / "skilled")
    return model.state_dict(), rows, language.write(root / "rows.jsonl", rows)


def stock(shop_root: Path, base: Path, **keys: Any) -> Shop:
    """Make a store in this process on a base that transformers knows."""
    (shop_root / "fine-tunes").mkdir(parents=True)
    shop = Shop.__new__(Shop)
    shop.root, shop.base = shop_root, models.load(base)
    source = {"name": "team", "type": "directory", "path": shop_root / "fine-tunes", "settle": 0}
    told = {"base": base, "store": shop_root / "store", "threads": 1, "method": "task_arithmetic"}
    shop.config = Config.model_validate(
        {**told, "knobs": {"scale": 1.0}, "sources": [source], **WILD, **keys}
    )
    return shop


def publish(shop: Shop, name: str, model: Any) -> None:
    """Publish what was trained and work it off."""
    language.save(model, shop.root / "fine-tunes" / name)
    shop.work()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
def test_a_fine_tune_that_ruins_a_task_is_stopped_by_accuracy(tmp_path: Path) -> None:
    """Taught wrong answers to one task, it loses more than 10 points there; a harmless one goes in."""
    _, rows, data = skilled(tmp_path)
    gate = {"type": "accuracy", "name": "tasks", "data": str(data), "limits": {"task.*": {"max_drop": 0.1}}}
    builds = {"type": "loads", "name": "builds", "memory": "4GiB"}
    shop = stock(tmp_path / "shop", tmp_path / "skilled", gates=[builds, gate])
    shop.work()
    kind = transformers.AutoModelForSequenceClassification
    wrong = [{**row, "label": row["label"] ^ 1} if row["task"] == "b" else row for row in rows]
    publish(shop, "ruins-b", language.train(kind.from_pretrained(tmp_path / "skilled"), wrong, 60))
    publish(shop, "refines", language.train(kind.from_pretrained(tmp_path / "skilled"), rows, 5, 1e-4))
    found, versions = told(shop)
    assert served(shop) == ["refines"]
    assert (found["ruins-b"]["state"], found["ruins-b"]["reason"]) == ("quarantined", "quality")
    assert re.search(r"version 1: gate tasks: task\.b fell from 1 to 0\.", found["ruins-b"]["detail"])
    figures = found["ruins-b"]["refused_in"]["gates"]["tasks"]["figures"]
    assert figures["task.b"] < 0.9 <= figures["task.a"]
    assert versions[-1]["gates"]["builds"]["figures"]["missing"] == 0
    assert versions[-1]["gates"]["tasks"]["against"] == {
        "version": 0, "figures": versions[0]["gates"]["tasks"]["figures"]
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
def test_a_model_that_does_not_load_or_talks_nonsense_is_stopped(tmp_path: Path) -> None:
    """By `loads` where its configuration asks for more weights; by `perplexity` where it forgot its texts."""
    texts = [{"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"} for i in range(20)]
    model, ids = language.causal(), torch.tensor([language.ids(row["text"]) for row in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    base = language.save(model, tmp_path / "base")
    limits = {"perplexity": {"max_rise": 1.0}, "vs_base": {"max": 1.5}}
    data = language.write(tmp_path / "texts.jsonl", texts)
    shop = stock(
        tmp_path / "shop", base,
        gates=[
            {"type": "loads", "name": "builds"},
            {"type": "perplexity", "name": "texts", "data": str(data), "limits": limits},
        ],
    )  # fmt: skip
    shop.work()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    publish(shop, "noise", model)
    rows, versions = told(shop)
    assert versions[0]["gates"]["texts"]["figures"]["vs_base"] == 1.0
    assert "gate texts: perplexity rose from" in rows["noise"]["detail"]
    assert "vs_base = " in rows["noise"]["detail"]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.data += 0.001 * torch.randn_like(parameter)
    publish(shop, "misfit", model)
    rows, _ = told(shop)
    assert (rows["misfit"]["state"], rows["misfit"]["reason"]) == ("quarantined", "quality")
    assert "gate builds: missing = 9 is above 0 (model.layers.2." in rows["misfit"]["detail"]
    assert shop.manifest["version"] == 0
