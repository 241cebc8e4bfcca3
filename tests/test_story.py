"""The table of DESIGN 6 with the real daemon: published, fetched, screened, folded, gated, served, told."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from typing import TYPE_CHECKING

import models
import torch
from daemons import CAN_BE_HUMBLE, HUMBLE, SOURCE, Site, command, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon

# What DESIGN 7 promises of each --json.
STATUS_KEYS = {"current", "head", "count", "pending", "held", "method", "knobs", "sources", "targets"}
HISTORY_KEYS = {"version", "digest", "parent", "sealed_at", "promoted_at", "state", "added", "removed"}
FINE_TUNE_KEYS = {"name", "source", "revision", "digest", "state", "reason", "version"}
ENTRY_KEYS = {"name", "source", "revision", "digest"}

HOOK = """
here=$(dirname "$0")
echo "$STREAMMERGE_VERSION $STREAMMERGE_DIGEST $STREAMMERGE_DELIVERY $STREAMMERGE_SNAPSHOT" \
    "$(readlink "$here/store/current") $(date +%s.%N) ${PASSWORD:-none} $1" >> "$here/told"
seen=$(grep -c "^$STREAMMERGE_VERSION " "$here/told")
[ "$STREAMMERGE_VERSION/$seen" = 1/1 ] && exit 1
[ "$STREAMMERGE_VERSION/$seen" = 2/1 ] && exit 75
exit 0
"""


def test_from_a_folder_to_the_serving_stack(tmp_path: Path) -> None:
    """Each fine-tune becomes one served version, and the target is told of every one until it confirms."""
    site = Site(tmp_path / "site")
    site.configure(
        source={"settle": "300ms"},
        targets=[{"name": "hook", "type": "exec", "argv": [site.program("hook", HOOK), "argument"]}],
    )
    with site.daemon(PASSWORD="hunter2") as daemon:
        assert site.current["version"] == 0
        assert site.served == []
        models.load(site.store / "current" / "model")
        first = site.publish("first", 1)
        daemon.until_state(first="folded")
        served = models.load(site.store / "current" / "model")
        assert all(torch.allclose(served[name], values, atol=1e-6) for name, values in first.items())
        copy_slowly(site, daemon)
        until(lambda: daemon.ask("status")["targets"][0]["snapshot"] == 3, "the target confirms version 3")
        check_reports(site, daemon)
    check_telling(site)


def copy_slowly(site: Site, daemon: Daemon) -> None:
    """Publish a file in pieces and a model shard by shard, with pauses longer than the settle time."""
    site.prepare("slow.safetensors", 2)
    site.prepare("sharded", 3, shards=2)
    whole = (site.root / "staging" / "slow.safetensors").read_bytes()
    sharded, arriving = site.root / "staging" / "sharded", site.inflow / "sharded"
    arriving.mkdir()
    for name in ("config.json", models.INDEX, "model-00001-of-00002.safetensors"):
        (sharded / name).rename(arriving / name)
    with (site.inflow / "slow.safetensors").open("wb", buffering=0) as file:
        step = len(whole) // 4 + 1
        for start in range(0, len(whole), step):
            file.write(whole[start : start + step])
            if start + step < len(whole):
                time.sleep(0.6)
                rows = daemon.until_state({"sharded": "waiting", "slow.safetensors": "waiting"})
                assert "bytes" in rows["slow.safetensors"]["detail"]
                assert "1 of 2 shards are missing" in rows["sharded"]["detail"]
    assert site.served == ["first"]
    shown = site.ask("fine-tunes", "show", "sharded")
    assert shown["state"] == "waiting"
    assert "model-00002-of-00002.safetensors" in shown["detail"]
    daemon.until_state({"slow.safetensors": "folded"})
    (sharded / "model-00002-of-00002.safetensors").rename(arriving / "model-00002-of-00002.safetensors")
    daemon.until_state(sharded="folded")


def check_reports(site: Site, daemon: Daemon) -> None:
    """Every --json has the promised keys, tells the same as the HTTP port, and tells the truth."""
    status = site.ask("status")
    assert status.keys() >= STATUS_KEYS
    manifest = site.current
    folder = (site.store / "current").resolve()
    for which in ("current", "head"):
        assert status[which] == {"version": 3, "digest": status["current"]["digest"], "path": str(folder)}
    assert folder.name == f"000003-{status['current']['digest'][:12]}"
    counted = (status["count"], status["pending"], status["held"], status["method"])
    assert counted == (3, 0, None, "spectral_cap")
    assert status["knobs"] == {"level": "interference", "strength": 0.93, "kappa": 0.6, "beta": 2.0}
    assert [(s["name"], s["state"]) for s in status["sources"]] == [("team", "ok")]
    assert status["sources"][0]["last_success"] > manifest.get("none", "")
    assert [(t["name"], t["state"], t["snapshot"]) for t in status["targets"]] == [("hook", "confirmed", 3)]

    history = site.ask("history")
    assert history == daemon.ask("history")
    assert all(row.keys() >= HISTORY_KEYS for row in history)
    assert [row["version"] for row in history] == [0, 1, 2, 3]
    assert [row["parent"] for row in history] == [None, *[row["digest"] for row in history[:3]]]
    assert [row["added"] for row in history] == [[], ["first"], ["slow.safetensors"], ["sharded"]]
    assert {row["state"] for row in history} == {"accepted"}
    assert all(row["sealed_at"] <= row["promoted_at"] for row in history)
    assert site.ask("history", "--limit", "2") == history[-2:]

    shown = site.ask("show", "2")
    assert shown.keys() >= HISTORY_KEYS | {"fine_tunes"}
    assert [entry["name"] for entry in shown["fine_tunes"]] == ["first", "slow.safetensors"]
    assert all(entry.keys() >= ENTRY_KEYS for entry in shown["fine_tunes"])
    assert site.ask("show", "head") == site.ask("show", "current")
    assert site.run("path").stdout == f"{folder}\n"

    fine_tunes = site.ask("fine-tunes")
    assert fine_tunes == daemon.ask("fine-tunes")
    assert all(row.keys() >= FINE_TUNE_KEYS for row in fine_tunes)
    assert {row["name"]: (row["state"], row["version"]) for row in fine_tunes} == {
        "first": ("folded", 1), "slow.safetensors": ("folded", 2), "sharded": ("folded", 3),
    }  # fmt: skip
    folded = {entry["name"]: entry["digest"] for entry in manifest["fine_tunes"]}
    assert {row["name"]: row["digest"] for row in fine_tunes} == folded


def check_telling(site: Site) -> None:
    """The hook heard of each version in order, again within 2 s after a failure, and no secret."""
    told = [line.split(" ") for line in (site.root / "told").read_text().splitlines()]
    assert [int(version) for version, *_ in told] == [0, 1, 1, 2, 2, 3]
    history = {row["version"]: row["digest"] for row in site.ask("history")}
    assert all(history[int(version)] == digest for version, digest, *_ in told)
    assert len({delivery for _, _, delivery, *_ in told}) == 4
    assert told[1][2] == told[2][2]
    assert all(path == str(site.store / "snapshots" / f"00000{v}-{d[:12]}") for v, d, _, path, *_ in told)
    assert all(int(link.split("/")[1][:6]) >= int(version) for version, _, _, _, link, *_ in told)
    times = [float(line[5]) for line in told]
    assert times[2] - times[1] < 2.0
    assert times[4] - times[3] < 2.0
    assert {line[6] for line in told} == {"none"}
    assert {line[7] for line in told} == {"argument"}


def test_the_first_look_takes_the_oldest_first(tmp_path: Path) -> None:
    """What was there before the first start is folded by time of modification, then by name."""
    site = Site(tmp_path / "site")
    now = time.time()
    ages = {"a-newest": 10, "b-oldest": 1000, "d-twin": 500, "c-twin": 500}
    for number, (name, age) in enumerate(ages.items()):
        site.publish(name, number)
        for path in [*(site.inflow / name).iterdir(), site.inflow / name]:
            os.utime(path, (now - age, now - age))
    site.once()
    assert site.served == ["b-oldest", "c-twin", "d-twin", "a-newest"]


# ----------------------------------------------------------------------------------------------- refusals


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def publish_refused(site: Site) -> dict[str, str]:
    """Move one fine-tune of each refused kind into the source folder; gives the reason due to each."""
    staging, base = site.root / "staging", dict(site.base)
    like = models.make_fine_tune(staging / "like", base, seed=77)
    nan = like[models.TALL].clone()
    nan[3, 3] = float("nan")
    models.save(staging / "nan", {**like, models.TALL: nan})
    models.save(staging / "mis-shaped", {**like, models.SQUARE: torch.zeros(16, 17)})
    models.save(staging / "vocabulary", {**like, models.EMBEDDING: torch.zeros(41, 16)})
    models.save(staging / "renamed", {f"w{number}": values for number, values in enumerate(like.values())})
    models.save(staging / "extra", {**like, "adapter.extra": torch.ones(3)})
    models.save(staging / "lacking", {name: values for name, values in like.items() if name != models.WIDE})
    models.save(staging / "integers", {**like, models.NORM: like[models.NORM].to(torch.int64)})
    models.save(staging / "eight-bit", {**like, models.SQUARE: torch.zeros(16, 16, dtype=torch.int8)})
    models.save(staging / "empty", {})
    models.save(staging / "unchanged", base)
    models.make_fine_tune(staging / "implausible", base, seed=78, size=3.0)
    models.save(staging / "adapter", {"q_proj.lora_A.weight": torch.ones(2, 16)})
    (staging / "adapter" / "model.safetensors").rename(staging / "adapter" / "adapter_model.safetensors")
    (staging / "adapter" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    (staging / "pickled").mkdir()
    (staging / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(site.root / "sprung")))
    (staging / "garbage").mkdir()
    (staging / "garbage" / "model.safetensors").write_bytes(b"\xff" * 4096)
    shutil.copytree(site.store / "current" / "model", staging / "own")
    shutil.copytree(site.inflow / "good", staging / "again")
    (staging / "again" / "README.md").write_text("the same weights under another name")
    (staging / "link").symlink_to(site.inflow / "good")
    expected = {
        "nan": "non-finite", "mis-shaped": "wrong-shape", "vocabulary": "vocab-resized",
        "renamed": "wrong-base", "extra": "unknown-weights", "lacking": "missing-weights",
        "integers": "unsupported-dtype", "eight-bit": "quantised", "empty": "empty",
        "unchanged": "zero-delta", "implausible": "implausible",
        "adapter": "unsupported-adapter", "pickled": "pickle-only", "garbage": "malformed",
        "own": "own-merge",
        "again": "duplicate", "link": "symlink",
    }  # fmt: skip
    for name in expected:
        (staging / name).rename(site.inflow / name)
    return expected


def test_what_is_no_safe_fine_tune_of_the_base_is_refused_with_its_reason(tmp_path: Path) -> None:
    """A refused fine-tune shows its reason in fine-tunes, logs and metrics, and the queue goes on."""
    site = Site(tmp_path / "site")
    with site.daemon() as daemon:
        site.publish("good", 1)
        site.publish("better", 2)  # version 1 alone would be a duplicate: it has good's own weights
        daemon.until_state(good="folded", better="folded")
        expected = publish_refused(site)
        rows = daemon.until_state(dict.fromkeys(expected, "refused"))
        assert {name: rows[name]["reason"] for name in expected} == expected
        assert all(rows[name]["detail"] and rows[name]["version"] is None for name in expected)
        assert site.versions() == [0, 1, 2]
        logged = {event["name"]: event for event in daemon.events() if event.get("state") == "refused"}
        assert {name: event["reason"] for name, event in logged.items()} == expected
        for reason in expected.values():
            assert daemon.metric("streammerge_finetunes_refused_total", reason=reason) == 1, reason
        refused = daemon.metric("streammerge_finetunes_total", source="team", decision="refused")
        assert refused == len(expected)
        site.publish("next", 3)
        daemon.until_state(next="folded")
        assert site.served[-1:] == ["next"]
        assert daemon.get("/readyz")[0] == 200
        assert not (site.root / "sprung").exists()
        assert site.rows()["nan"] == rows["nan"]
        assert list((site.store / "inbox").iterdir()) == []


def publish_strange(site: Site, kind: str) -> None:
    """Put something into the source folder that is no fine-tune and that a careless look trips over."""
    place = site.inflow / kind
    if kind == "loop":
        place.symlink_to("loop")
    elif kind == "not-utf-8":
        (site.inflow / os.fsdecode(b"not-utf-8-\xff")).mkdir()
    elif kind == "fifo.safetensors":
        os.mkfifo(place)
    elif kind == "fifo-beside-pickles":
        place.mkdir()
        (place / "pytorch_model.bin").write_bytes(b"no pickle")
        os.mkfifo(place / "fifo")
    elif kind == "fifo-for-config":
        site.prepare(kind, 99)
        (site.root / "staging" / kind / "config.json").unlink()
        os.mkfifo(site.root / "staging" / kind / "config.json")
        site.move_in(kind)
    elif kind == "unreadable":
        site.publish(kind, 99)
        (place / "config.json").chmod(0o000)


def test_a_strange_entry_never_hides_the_others(tmp_path: Path) -> None:
    """Whatever lies in a source folder, the fine-tunes beside it are folded; nothing hangs or breaks."""
    site = Site(tmp_path / "site")
    kinds = ["loop", "not-utf-8", "fifo.safetensors", "fifo-beside-pickles", "fifo-for-config"]
    for kind in [*kinds, "unreadable"] if CAN_BE_HUMBLE else kinds:
        publish_strange(site, kind)
    site.publish("zz-good", 1)
    prefix = HUMBLE if CAN_BE_HUMBLE else ()
    done = site.run("run", "--once", code=None, prefix=prefix, timeout=30)
    assert site.served == ["zz-good"]
    assert done.returncode in (0, 75)
    with site.daemon(prefix=prefix) as daemon:
        site.publish("zzz-better", 2)
        daemon.until_state({"zzz-better": "folded"})
        assert daemon.ask("status")["sources"][0]["state"] == "ok"
    assert site.served == ["zz-good", "zzz-better"]


def test_a_slow_upload_is_not_refused_while_it_grows(tmp_path: Path) -> None:
    """`incomplete_after` counts from the last change; what it refused is looked at when it changes."""
    site = Site(tmp_path / "site", incomplete_after="2s")
    site.prepare("slow", 1)
    whole = (site.root / "staging" / "slow" / "model.safetensors").read_bytes()
    with site.daemon() as daemon:
        (site.inflow / "slow").mkdir()
        with (site.inflow / "slow" / "model.safetensors").open("wb", buffering=0) as file:
            for start in range(0, 4000, 500):
                file.write(whole[start : start + 500])
                time.sleep(0.5)
                assert daemon.states().get("slow", "waiting") == "waiting", start
            rows = daemon.until_state(slow="refused")
            assert rows["slow"]["reason"] == "incomplete"
            file.write(whole[4000:])
        daemon.until_state(slow="folded")


# ---------------------------------------------------------------------------------------------- revisions


def test_a_changed_revision_does_what_on_update_says(tmp_path: Path) -> None:
    """A folded name with new content takes its own place, is added or ignored; a README is no news."""
    site = Site(tmp_path / "site", source={"settle": "100ms"})
    with site.daemon() as daemon:
        site.publish("model", 1)
        daemon.until_state(model="folded")
        (site.inflow / "model" / "README.md").write_text("better words")
        os.utime(site.inflow / "model" / "model.safetensors")
        daemon.look_again(3)
        assert len(daemon.ask("fine-tunes")) == 1

        site.publish("model", 2)
        until(
            lambda: [row["state"] for row in daemon.ask("fine-tunes")] == ["replaced", "folded"], "replaced"
        )
        assert site.served == ["model"]
        assert site.versions() == [0, 1, 2]
        site.bring_back("model")
        until(lambda: site.versions() == [0, 1, 2, 3], "back")
        until(
            lambda: sorted(row["state"] for row in daemon.ask("fine-tunes")) == ["folded", "replaced"], "back"
        )

        site.configure(on_update="add")
        daemon.reload()
        site.publish("model", 3)
        daemon.until_state(model="folded")
        assert site.served == ["model", "model"]

        site.configure(on_update="ignore")
        daemon.reload()
        site.publish("model", 4)
        daemon.until_state(model="ignored")
        assert site.served == ["model", "model"]

        site.publish("later", 5)
        daemon.until_state(later="folded")
        site.configure(on_update="replace", replay_limit=0)
        daemon.reload()
        site.publish("model", 6)
        rows = daemon.until_state(model="quarantined")
        assert rows["model"]["reason"] == "needs-replay"
        assert "replay_limit" in rows["model"]["detail"]
        assert daemon.metric("streammerge_finetunes_total", source="team", decision="replaced") == 2
        assert daemon.metric("streammerge_finetunes_total", source="team", decision="quarantined") == 1


def test_only_the_newest_revision_waits(tmp_path: Path) -> None:
    """What waits for disk space is superseded by a newer revision, gone when it vanishes, and comes back."""
    site = Site(tmp_path / "site")
    with site.daemon() as daemon:
        site.configure(reserve="900TB")
        daemon.reload()
        site.publish("model", 1)
        daemon.until_state(model="pending")
        until(lambda: daemon.get("/readyz")[0] == 503, "not ready without disk space")
        assert "reserve" in daemon.get("/readyz")[1]
        site.publish("model", 2)
        until(lambda: [row["state"] for row in daemon.ask("fine-tunes")] == ["superseded", "pending"], "news")
        site.withdraw("model")
        until(lambda: [row["state"] for row in daemon.ask("fine-tunes")] == ["superseded", "gone"], "gone")
        shutil.move(site.root / "withdrawn" / "model", site.inflow / "model")
        until(lambda: [row["state"] for row in daemon.ask("fine-tunes")] == ["superseded", "pending"], "back")
        site.configure(reserve="1MB")
        daemon.reload()
        until(
            lambda: [row["state"] for row in daemon.ask("fine-tunes")] == ["superseded", "folded"], "folded"
        )
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again")
        assert site.served == ["model"]
        assert daemon.metric("streammerge_finetunes_total", source="team", decision="gone") == 1


def test_going_back_to_what_is_folded_ends_the_wait_of_the_newer_one(tmp_path: Path) -> None:
    """A revision that its source no longer shows is not folded, though what it shows instead is folded."""
    site = Site(tmp_path / "site", on_update="add")
    with site.daemon() as daemon:
        site.publish("model", 1)
        daemon.until_state(model="folded")
        site.run("hold")
        site.publish("model", 2)
        until(lambda: [row["state"] for row in daemon.ask("fine-tunes")] == ["folded", "pending"], "news")
        site.bring_back("model")
        until(lambda: [row["state"] for row in daemon.ask("fine-tunes")] == ["folded", "superseded"], "back")
        site.run("resume")
        daemon.look_again(2)
        assert site.current["totals"]["count"] == 1


def test_a_vanished_fine_tune_does_not_keep_the_daemon_unready(tmp_path: Path) -> None:
    """Not ready for want of disk space lasts no longer than something wants it."""
    site = Site(tmp_path / "site")
    with site.daemon() as daemon:
        site.configure(reserve="900TB")
        daemon.reload()
        site.publish("model", 1)
        until(lambda: daemon.get("/readyz")[0] == 503, "not ready without disk space")
        site.configure(reserve="1MB")
        site.withdraw("model")
        daemon.until_state(model="gone")
        daemon.reload()
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again", 10)


def test_the_first_run_may_leave_out_what_was_there(tmp_path: Path) -> None:
    """`first_run: ignore` folds only what comes later, `since` what was published on that day or later."""
    site = Site(tmp_path / "site")
    (site.root / "dated").mkdir()
    site.configure(
        sources=[
            {**SOURCE, "first_run": "ignore"},
            {**SOURCE, "name": "dated", "path": "./dated", "first_run": {"since": "2026-01-01"}},
        ]
    )
    site.publish("old", 1)
    for name, seed, at in (("before", 2, 1767225599), ("after", 3, 1767225600)):
        models.make_fine_tune(site.root / "dated" / name, site.base, seed=seed)
        for path in [*(site.root / "dated" / name).iterdir(), site.root / "dated" / name]:
            os.utime(path, (at, at))
    with site.daemon() as daemon:
        rows = daemon.until_state(old="ignored", before="ignored", after="folded")
        assert rows["old"]["reason"] == "first_run"
        site.publish("new", 4)
        daemon.until_state(old="ignored", before="ignored", new="folded")
        site.run("fine-tunes", "approve", "old")
        daemon.until_state(old="folded")
        assert site.served == ["after", "new", "old"]


# ---------------------------------------------------------------------------------------- asking a person


def test_a_person_approves_or_rejects(tmp_path: Path) -> None:
    """With `approve: manual` nothing is folded unasked, and rejected content stays out under any name."""
    site = Site(tmp_path / "site", approve="manual")
    with site.daemon() as daemon:
        site.publish("wanted", 1)
        site.publish("unwanted", 2)
        daemon.until_state({"wanted": "awaiting_approval", "unwanted": "awaiting_approval"})
        assert daemon.ask("status")["pending"] == 2
        assert site.versions() == [0]
        assert "approve" in site.ask("fine-tunes", "show", "wanted")["detail"]
        assert site.ask("fine-tunes", "approve", "team:wanted")["state"] == "pending"
        daemon.until_state({"wanted": "folded", "unwanted": "awaiting_approval"})
        assert site.ask("fine-tunes", "reject", "unwanted")["state"] == "denied"
        shutil.copytree(site.inflow / "unwanted", site.root / "staging" / "renamed")
        site.move_in("renamed")
        rows = daemon.until_state(renamed="denied", unwanted="denied")
        assert rows["renamed"]["reason"] == "denied"
        assert site.served == ["wanted"]
        failed = site.run("fine-tunes", "reject", "wanted", code=1)
        assert "retract" in failed.stderr
        site.run("fine-tunes", "approve", "unheard-of", code=1)
        site.run("fine-tunes", "approve", "renamed")
        daemon.until_state(renamed="folded")
        assert site.served == ["wanted", "renamed"]


def test_what_was_fetched_can_be_approved_after_it_vanished(tmp_path: Path) -> None:
    """What waits for approval is complete here: approving it does not need its source any more."""
    site = Site(tmp_path / "site", approve="manual")
    with site.daemon() as daemon:
        site.publish("model", 1)
        daemon.until_state(model="awaiting_approval")
        site.withdraw("model")
        daemon.look_again(2)
        site.run("fine-tunes", "approve", "model")
        daemon.until_state(model="folded")


def test_rejecting_what_was_never_fetched_keeps_its_content_out(tmp_path: Path) -> None:
    """Rejected means the content, also when no byte of it was here yet."""
    site = Site(tmp_path / "site")
    site.publish("model", 1)
    site.once(code=-9, STREAMMERGE_KILL_AT="copied")
    site.run("fine-tunes", "reject", "model")
    (site.inflow / "model").rename(site.inflow / "renamed")
    site.once()
    assert site.states() == {"model": "denied", "renamed": "denied"}


def test_every_name_can_be_addressed(tmp_path: Path) -> None:
    """A fine-tune whose name holds the signs that separate source and revision can be named all the same."""
    site = Site(tmp_path / "site")
    names = ("model@v1", "model:v1", "team:model@v1")
    for number, name in enumerate(names):
        site.publish(name, number)
    site.once()
    for name in names:
        assert site.ask("fine-tunes", "show", name)["name"] == name
        revision = site.rows()[name]["revision"]
        assert site.ask("fine-tunes", "show", f"team:{name}@{revision}")["name"] == name


# ------------------------------------------------------------------------------------------------- gates

GATE = """
here=$(dirname "$0")
date +%s.%N >> "$here/asked"
[ -e "$here/broken" ] && exit 3
case $1 in *-000000*|*/000000-*) ;; *) [ -e "$here/later" ] && exit 75 ;; esac
grep -q '"name": "bad' "$1/model/streammerge.json" && echo '{"mean": 0.1}' || echo '{"mean": 0.9}'
"""


def test_a_gate_decides_what_is_served(tmp_path: Path) -> None:
    """A candidate below a limit is set aside; a gate that says later or is broken holds the queue."""
    site = Site(tmp_path / "site")
    limits = {"mean": {"min": 0.5, "max_drop": 0.2}}
    gate = {"name": "quality", "type": "command", "argv": [site.program("gate", GATE), "{snapshot}"]}
    site.configure(gates=[{**gate, "limits": limits}])
    with site.daemon() as daemon:
        site.publish("good", 1)
        daemon.until_state(good="folded")
        site.publish("bad", 2)
        rows = daemon.until_state(bad="quarantined")
        assert rows["bad"]["reason"] == "quality"
        assert "mean = 0.1 is below 0.5" in rows["bad"]["detail"]
        assert site.served == ["good"]
        assert [row["state"] for row in site.ask("history")] == ["accepted", "accepted", "refused"]
        assert [path.name[:6] for path in (site.store / "candidates").iterdir()] == ["000002"]
        assert [entry["name"] for entry in site.ask("show", "2")["fine_tunes"]] == ["good", "bad"]

        (site.root / "later").touch()
        site.publish("patient", 3)
        until(lambda: [row["state"] for row in daemon.ask("history")][-1] == "candidate", "a candidate")
        time.sleep(1.0)
        assert daemon.states()["patient"] == "pending"
        assert site.served == ["good"]
        (site.root / "later").unlink()
        daemon.until_state(patient="folded")

        (site.root / "broken").touch()
        site.publish("unlucky", 4)
        until(lambda: daemon.get("/readyz")[0] == 503, "a broken gate is not ready")
        assert "gate quality" in daemon.get("/readyz")[1]
        assert daemon.states()["unlucky"] == "pending"
        (site.root / "broken").unlink()
        daemon.until_state(unlucky="folded")
        until(lambda: daemon.get("/readyz")[0] == 200, "ready again")
        assert site.served == ["good", "patient", "unlucky"]
        site.run("fine-tunes", "retry", "bad")
        until(lambda: len(daemon.ask("history")) == 6, "it is folded and gated once more")
        daemon.until_state(bad="quarantined")
        assert site.served == ["good", "patient", "unlucky"]


def test_a_gate_that_says_later_is_asked_less_and_less_often(tmp_path: Path) -> None:
    """Exit 75 backs off: the waits between two questions grow."""
    site = Site(tmp_path / "site")
    site.configure(
        gates=[{"name": "q", "type": "command", "argv": [site.program("gate", GATE), "{snapshot}"]}]
    )
    (site.root / "later").touch()
    with site.daemon() as daemon:
        (site.root / "asked").unlink()
        site.publish("model", 1)
        asked = site.root / "asked"
        until(lambda: asked.exists() and len(asked.read_text().split()) >= 3, "the gate is asked", seconds=60)
        times = [float(line) for line in asked.read_text().split()]
        assert daemon.states() == {"model": "pending"}
    assert len(times) <= 5, times
    assert times[-1] - times[-2] > times[1] - times[0]


def test_a_gate_that_the_base_fails_is_a_configuration_error(tmp_path: Path) -> None:
    """Version 0 is gated like any other; where the base itself does not pass, nothing starts: exit 2."""
    site = Site(tmp_path / "site")
    argv = [site.program("gate", "echo '{\"mean\": 0.4}'")]
    site.configure(gates=[{"name": "q", "type": "command", "argv": argv, "limits": {"mean": {"min": 0.5}}}])
    failed = command("run", "-c", site.config, code=2)
    assert "mean = 0.4 is below 0.5" in failed.stderr
    assert not (site.store / "current").is_symlink()
    site.configure(gates=[])
    site.once()
    assert json.loads((site.store / "current" / "manifest.json").read_bytes())["version"] == 0
