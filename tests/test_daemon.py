"""The process: signals, systemd's protocol, one writer, sources and disks that fail, logs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Self

import pytest
import torch
from daemons import CAN_BE_HUMBLE, HUMBLE, SOURCE, Daemon, Site, command, until

if TYPE_CHECKING:
    from pathlib import Path

WATCHDOG_SECONDS = 2.0


def large_site(root: Path, *, weights: int, size: int) -> Site:
    """A site whose second and later folds take seconds."""
    random = torch.Generator().manual_seed(0)
    base = {f"layers.{n}.weight": torch.randn(size, size, generator=random) / 32 for n in range(weights)}
    return Site(root, base)


# ---------------------------------------------------------------------------------------------- stopping


def test_sigterm_during_a_fold_leaves_no_trace(tmp_path: Path) -> None:
    """The daemon stops within a weight, exit 0, leaves nothing half done, and folds anew when restarted."""
    site = large_site(tmp_path / "site", weights=6, size=1024)
    with site.daemon() as daemon:
        site.publish("first", 1)
        daemon.until_state(first="folded")
        site.publish("second", 2)
        until(lambda: daemon.metric("streammerge_fold_progress_ratio") > 0.1, "the second fold runs")
        started = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.until_ended() == 0
        assert time.monotonic() - started < 3.0
        ended = [event["event"] for event in daemon.events() if event["event"].startswith("daemon.")]
        assert ended[-2:] == ["daemon.stopping", "daemon.stopped"]
        assert not daemon.events("finetune.refused")
    assert site.served == ["first"]
    assert list((site.store / "candidates").iterdir()) == []
    assert site.states() == {"first": "folded", "second": "pending"}
    with site.daemon() as daemon:
        daemon.until_state(second="folded")
    assert site.served == ["first", "second"]
    assert [row["state"] for row in site.ask("history")] == ["accepted"] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_slow_target_does_not_delay_the_stop(tmp_path: Path, number: signal.Signals) -> None:
    """A stop ends the telling, too; the target is told again after the restart."""
    site = Site(tmp_path / "site")
    hook = site.program("hook", 'echo $STREAMMERGE_VERSION >> "$(dirname "$0")/told"; sleep 25')
    site.configure(targets=[{"name": "hook", "type": "exec", "argv": [hook], "timeout": "30s"}])
    with site.daemon() as daemon:
        until((site.root / "told").exists, "the target is told")
        started = time.monotonic()
        daemon.signal(number)
        assert daemon.until_ended() == 0
        assert time.monotonic() - started < 5.0
    assert site.ask("status")["targets"][0]["open"] == 1


def test_a_stop_while_a_replaced_folder_is_watched(tmp_path: Path) -> None:
    """A model folder replaced by renaming, back and forth, keeps neither a reload nor a stop from working."""
    site = Site(tmp_path / "site", on_update="add")
    with site.daemon() as daemon:
        site.publish("model", 1)
        daemon.until_state(model="folded")
        site.publish("model", 2)
        until(lambda: len(site.served) == 2, "the second revision is folded")
        site.bring_back("model")
        daemon.look_again(2)
        site.configure(source={"poll": "2s"})  # a changed source is watched anew
        daemon.reload()
        site.publish("next", 3)
        daemon.until_state(next="folded")
        site.bring_back("model")
        daemon.look_again(2)


# --------------------------------------------------------------------------------------------- reloading


def test_a_reload_takes_everything_or_nothing(tmp_path: Path) -> None:
    """SIGHUP takes a new source; a bad file or a fixed key changes nothing and shows in log and metric."""
    site = Site(tmp_path / "site")
    successful = "streammerge_config_last_reload_successful"
    with site.daemon() as daemon:
        (site.root / "more").mkdir()
        more = {**SOURCE, "name": "more", "path": "./more"}
        site.prepare("one", 1)
        (site.root / "staging" / "one").rename(site.root / "more" / "one")
        good = site.config.read_text()

        for keys, complaint in (
            ({"sources": [SOURCE, {**more, "pol": "1s"}]}, "poll"),
            ({"sources": [SOURCE, more], "method": "average"}, "method"),
            ({"sources": [SOURCE, more], "http": {"listen": "127.0.0.1:1"}}, "http"),
            ({"sources": [SOURCE, more], "keep": 0}, "keep"),
        ):
            kept = dict(site.keys)
            site.configure(**keys)
            daemon.reload("config.reload_refused")
            said = daemon.events("config.reload_refused")[-1]
            assert complaint in said["error"] + said["hint"]
            assert daemon.metric(successful) == 0
            assert [source["name"] for source in daemon.ask("status")["sources"]] == ["team"]
            site.keys = kept
        site.config.unlink()
        daemon.reload("config.reload_refused")
        site.publish("still-works", 2)
        daemon.until_state({"still-works": "folded"})

        site.config.write_text(good)
        site.configure(sources=[SOURCE, more])
        daemon.reload()
        assert daemon.metric(successful) == 1
        rows = daemon.until_state(one="folded")
        assert rows["one"]["source"] == "more"
        assert daemon.metric("streammerge_source_up", source="more") == 1
        site.configure(sources=[more])
        daemon.reload()
        site.publish("unwatched", 3)
        daemon.look_again(2, source="more")
        assert "unwatched" not in daemon.states()
        assert site.served == ["still-works", "one"]


def test_a_configuration_that_is_no_text_stops_no_daemon(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are a bad configuration like any other: no reload, and exit 2 at the start."""
    site = Site(tmp_path / "site")
    with site.daemon() as daemon:
        site.config.write_bytes(site.config.read_bytes() + b"# \xff\n")
        daemon.reload("config.reload_refused")
        site.publish("model", 1)
        daemon.until_state(model="folded")
    command("run", "-c", site.config, code=2)


def test_a_removed_source_leaves_nothing_pending(tmp_path: Path) -> None:
    """What a source announced that the configuration then dropped is waited for no longer."""
    site = Site(tmp_path / "site")
    site.publish("model", 1)
    site.once(code=-9, STREAMMERGE_KILL_AT="copied")
    site.configure(sources=[])
    site.once()
    assert site.ask("status")["pending"] == 0


# ----------------------------------------------------------------------------------------------- systemd


class Systemd:
    """The other end of sd_notify(3): a datagram socket, and what arrived at it with the time."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[tuple[float, dict[str, str]]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    def _listen(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                lines = self._socket.recv(4096).decode().splitlines()
                self.heard.append((time.monotonic(), dict(line.split("=", 1) for line in lines)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def all(self, key: str) -> list[str]:
        """Every value that was heard for a key, in order."""
        return [message[key] for _, message in self.heard if key in message]

    def times(self, key: str) -> list[float]:
        """When a key was heard."""
        return [at for at, message in self.heard if key in message]


def test_systemd_is_told_what_happens(tmp_path: Path) -> None:
    """READY once it serves, then WATCHDOG and STATUS, RELOADING with its time, at last STOPPING."""
    site = Site(tmp_path / "site")
    with Systemd(str(tmp_path / "notify")) as systemd:
        watchdog = str(int(WATCHDOG_SECONDS * 1e6))
        with site.daemon(NOTIFY_SOCKET=systemd.address, WATCHDOG_USEC=watchdog) as daemon:
            until(lambda: systemd.all("READY") == ["1"], "READY=1")
            assert site.current["version"] == 0
            site.publish("model", 1)
            daemon.until_state(model="folded")
            until(lambda: "version 1, 1 fine-tunes" in systemd.all("STATUS"), "the status line")
            until(lambda: len(systemd.times("WATCHDOG")) > 6, "pings")
            pings = systemd.times("WATCHDOG")
            assert (pings[-1] - pings[0]) / (len(pings) - 1) < WATCHDOG_SECONDS / 2
            daemon.reload()
            until(lambda: len(systemd.all("READY")) == 2, "READY=1 after the reload")
            (reloading,) = [message for _, message in systemd.heard if "RELOADING" in message]
            assert abs(int(reloading["MONOTONIC_USEC"]) / 1e6 - time.monotonic()) < 5.0
            assert systemd.all("STOPPING") == []
        until(lambda: systemd.all("STOPPING") == ["1"], "STOPPING=1")
        order = [key for _, message in systemd.heard for key in message if key not in ("STATUS", "WATCHDOG")]
        told = [key for key in order if key not in ("EXTEND_TIMEOUT_USEC", "MONOTONIC_USEC")]
        assert told == ["READY", "RELOADING", "READY", "STOPPING"]


def test_the_watchdog_ping_stops_when_the_worker_hangs(tmp_path: Path) -> None:
    """While the worker is in one native call for longer than the watchdog allows, nobody says it lives."""
    site = large_site(tmp_path / "site", weights=1, size=2400)  # its spectrum takes four seconds
    with Systemd(f"@streammerge-test-{os.getpid()}") as systemd:
        watchdog = str(int(WATCHDOG_SECONDS * 1e6))
        with site.daemon(NOTIFY_SOCKET=systemd.address, WATCHDOG_USEC=watchdog) as daemon:
            site.publish("first", 1)
            daemon.until_state(first="folded")
            site.publish("second", 2)
            until(lambda: daemon.get("/healthz")[0] == 503, "not alive")
            assert daemon.get("/readyz")[0] == 503
            assert "sign of life" in daemon.get("/readyz")[1]
            daemon.until_state(second="folded")
            until(lambda: daemon.get("/healthz")[0] == 200, "alive again")
            over = time.monotonic()
            until(lambda: systemd.times("WATCHDOG")[-1] > over, "pings again")
            pings = systemd.times("WATCHDOG")
            assert max(later - earlier for earlier, later in itertools.pairwise(pings)) > WATCHDOG_SECONDS


# -------------------------------------------------------------------------------------------- one writer


def test_there_is_one_writer(tmp_path: Path) -> None:
    """A second daemon on a store exits 75 and names the holder's pid; a taken port exits 2 and is named."""
    site = Site(tmp_path / "site")
    with site.daemon() as daemon:
        late = site.run("run", code=75)
        assert f"process {daemon.process.pid} " in late.stderr
        other = Site(tmp_path / "other", http={"listen": f"127.0.0.1:{site.port}"})
        taken = other.run("run", code=2)
        assert f"127.0.0.1:{site.port}" in taken.stderr
        assert "http.listen" in taken.stderr
        assert daemon.get("/healthz")[0] == 200
        daemon.signal(signal.SIGKILL)
        daemon.until_ended()
        site.once()  # the lock goes with the process
        daemon.log.write_text("")
        daemon.process.returncode = 0


# ---------------------------------------------------------------------------------- sources that fail


def test_a_source_that_cannot_be_seen_harms_nobody(tmp_path: Path) -> None:
    """It is in error, the others go on, what is served stays, and when it is back so are its fine-tunes."""
    site = Site(tmp_path / "site")
    (site.root / "more").mkdir()
    site.configure(sources=[SOURCE, {**SOURCE, "name": "more", "path": "./more"}])
    with site.daemon() as daemon:
        site.publish("first", 1)
        daemon.until_state(first="folded")
        site.inflow.rename(site.root / "unmounted")
        until(lambda: daemon.ask("status")["sources"][0]["state"] == "error", "the source is in error")
        assert "No such file" in daemon.ask("status")["sources"][0]["error"]
        assert daemon.metric("streammerge_source_up", source="team") == 0
        assert daemon.metric("streammerge_source_up", source="more") == 1
        assert [event["level"] for event in daemon.events("source.unreachable")] == ["warning"]
        site.prepare("second", 2)
        (site.root / "staging" / "second").rename(site.root / "more" / "second")
        daemon.until_state(first="folded", second="folded")
        assert site.served == ["first", "second"]
        site.inflow.mkdir()  # mounted, but empty
        until(lambda: daemon.ask("status")["sources"][0]["state"] == "ok", "an empty folder is no error")
        daemon.look_again(2)
        assert site.served == ["first", "second"]
        assert daemon.states() == {"first": "folded", "second": "folded"}
        site.inflow.rmdir()
        (site.root / "unmounted").rename(site.inflow)
        site.publish("third", 3)
        daemon.until_state(third="folded")
        assert daemon.metric("streammerge_source_up", source="team") == 1


@pytest.mark.skipif(not CAN_BE_HUMBLE, reason="needs setpriv to be held to file modes")
def test_a_source_that_may_not_be_read_is_in_error(tmp_path: Path) -> None:
    """A folder that may not be read puts its source in error, a fine-tune is waited for; both come back."""
    site = Site(tmp_path / "site")
    site.publish("locked", 1)
    (site.inflow / "locked").chmod(0o000)
    with site.daemon(prefix=HUMBLE) as daemon:
        rows = daemon.until_state(locked="waiting")
        assert "Permission denied" in rows["locked"]["detail"]
        site.publish("open", 2)
        daemon.until_state(open="folded", locked="waiting")
        site.inflow.chmod(0o000)
        until(lambda: daemon.ask("status")["sources"][0]["state"] == "error", "the source is in error")
        assert site.served == ["open"]
        site.inflow.chmod(0o755)
        (site.inflow / "locked").chmod(0o755)
        daemon.until_state(locked="folded")
        assert site.served == ["open", "locked"]


# ------------------------------------------------------------------------------------------- full disks


# ------------------------------------------------------------------------------------------------- logs


def test_logs_are_json_lines_without_secrets(tmp_path: Path) -> None:
    """Each line is a JSON object with event, level and time; one line tells a journey; no token is in any."""
    site = Site(tmp_path / "site", log_level="debug")
    token = "hf_abcdefghijklmnop"  # made up
    leak = f"""[ -e "$(dirname "$0")/leak" ] && echo {token} >&2 && exit 1; echo '{{}}'"""
    site.configure(gates=[{"name": "leaky", "type": "command", "argv": [site.program("gate", leak)]}])
    with site.daemon(HF_TOKEN=token) as daemon:
        site.publish("model", 1)
        daemon.until_state(model="folded")
        (site.root / "leak").touch()
        site.publish("other", 2)
        until(
            lambda: daemon.events("finetune.put_back") or daemon.events("candidate.waits"), "the gate fails"
        )
        (site.root / "leak").unlink()
        daemon.until_state(other="folded")
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    assert all(isinstance(line, dict) and {"event", "level", "timestamp"} <= line.keys() for line in lines)
    assert token not in daemon.log.read_text()
    served = [line for line in lines if line["event"] == "finetune.served"]
    assert [(line["name"], line["source"], line["version"]) for line in served] == [
        ("model", "team", 1), ("other", "team", 2),
    ]  # fmt: skip
    assert all({"revision", "digest", "count", "seconds"} <= line.keys() for line in served)


def test_a_bug_does_not_log_what_it_knows(tmp_path: Path) -> None:
    """A trace in the log names files and lines, not the values of variables, among which a secret may be."""
    site = Site(tmp_path / "site")
    secret = "correct-horse-battery-staple"  # made up
    site.program("hook", "exit 0")
    site.configure(targets=[{"name": "hook", "type": "exec", "argv": ["./hook", secret]}])
    daemon = Daemon(site)
    try:
        daemon.until_ready()
        shutil.rmtree(site.store / "inbox")  # nobody expects this
        site.publish("model", 1)
        time.sleep(3)
        assert secret not in daemon.log.read_text()
    finally:
        daemon.kill()
