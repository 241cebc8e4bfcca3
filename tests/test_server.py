"""The HTTP port: metrics that a Prometheus takes, health, JSON and the page, all reading only."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import threading
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from daemons import SOURCE, Daemon, Site, until
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from streammerge import metrics, screen
from streammerge.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ODD_NAME = "<script>alert('x')</script> & [red]"
OURS = "streammerge_"
# Everything that a label may be called; what it may be is checked against these sets.
STAGES = set(metrics.STAGES)
CAUSES = {"first", "fold", "retract", "rollback", "answered-wrong"}
LABELS = {
    "source": {"team", "second"},
    "target": {"hook", "failing"},
    "result": {"ok", "error", "failed", "wrong", "done", "refused", "abandoned"},
    "decision": set(metrics.DECISIONS),
    "reason": set(screen.REASONS),
    "stage": STAGES,
    "cause": CAUSES,
    "worker": {"worker"},
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with two sources and two targets, one of which fails, that folded one and refused one."""
    site = Site(tmp_path_factory.mktemp("server") / "site")
    (site.root / "second").mkdir()
    targets = [
        {"name": "hook", "type": "exec", "argv": [site.program("hook", "exit 0")]},
        {
            "name": "failing",
            "type": "exec",
            "argv": [site.program("failing", "echo '<b>no</b>' >&2; exit 1")],
        },
    ]
    site.configure(
        sources=[SOURCE, {**SOURCE, "name": "second", "path": "./second"}],
        targets=targets,
        keep=3,
        grace="0s",
    )
    site.publish("good", 1)
    (site.inflow / ODD_NAME.replace("/", "|")).mkdir()
    (site.inflow / ODD_NAME.replace("/", "|") / "model.safetensors").write_bytes(b"\xff" * 64)
    with site.daemon() as running:
        running.until_state({"good": "folded", ODD_NAME.replace("/", "|"): "refused"})
        until(lambda: running.ask("status")["targets"][0]["snapshot"] == 1, "the hook confirms")
        yield running


# ----------------------------------------------------------------------------------------------- metrics


def test_the_metrics_are_clean(daemon: Daemon) -> None:
    """Every sample parses, every metric has help, and promtool finds nothing to complain about."""
    code, text = daemon.get("/metrics")
    assert code == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation for family in families.values())
    assert all(name.startswith((OURS, "process_", "python_")) for name in families)
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_labels_are_bounded_and_begin_at_zero(daemon: Daemon) -> None:
    """A label's values come from the configuration or a closed set; each has its series from the start."""
    text = daemon.get("/metrics")[1]
    families = {f.name: f for f in text_string_to_metric_families(text) if f.name.startswith(OURS)}
    found: dict[str, set[tuple[str, ...]]] = {}
    for family in families.values():
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "le"}
            if family.name == "streammerge_build_info":
                continue
            assert all(value in LABELS[key] for key, value in labels.items()), sample
            found.setdefault(family.name, set()).add(tuple(sorted(labels.values())))

    def children(*values: set[str]) -> set[tuple[str, ...]]:
        combined: set[tuple[str, ...]] = {()}
        for part in values:
            combined = {tuple(sorted((*before, value))) for before in combined for value in part}
        return combined

    sources, targets = LABELS["source"], LABELS["target"]
    for name, expected in {
        "source_polls": children(sources, {"ok", "error"}),
        "source_poll_duration_seconds": children(sources),
        "source_last_success_timestamp_seconds": children(sources),
        "source_up": children(sources),
        "finetunes_discovered": children(sources),
        "finetunes": children(sources, LABELS["decision"]),
        "finetunes_refused": children(LABELS["reason"]),
        "finetunes_pending": children(sources),
        "fetched_bytes": children(sources),
        "folds": children({"done", "refused", "abandoned"}),
        "stage_duration_seconds": children(STAGES),
        "notifications": children(targets, {"ok", "failed", "wrong"}),
        "target_drifts": children(targets),
        "promotions": children(CAUSES),
        "notification_duration_seconds": children(targets),
        "notification_outbox": children(targets),
        "served_snapshot_matches": children(targets),
        "publish_to_serve_seconds": children(targets),
        "triggers_skipped": children(sources),
        "worker_last_heartbeat_timestamp_seconds": children({"worker"}),
    }.items():
        assert found[OURS + name] == expected, name
    series = sum(1 for line in text.splitlines() if line.startswith(OURS))
    assert series < 400


def test_the_metrics_tell_the_truth(daemon: Daemon) -> None:
    """Counters and gauges show what the status says."""
    assert daemon.metric("streammerge_head_version") == 1
    assert daemon.metric("streammerge_current_version") == 1
    assert daemon.metric("streammerge_merged_finetunes") == 1
    assert daemon.metric("streammerge_merge_lambda") == pytest.approx(1.0)
    assert daemon.metric("streammerge_snapshots_retained") == 2
    assert daemon.metric("streammerge_finetunes_total", source="team", decision="folded") == 1
    assert daemon.metric("streammerge_finetunes_total", source="team", decision="refused") == 1
    assert daemon.metric("streammerge_finetunes_refused_total", reason="malformed") == 1
    assert daemon.metric("streammerge_finetunes_discovered_total", source="team") == 2
    assert daemon.metric("streammerge_finetunes_discovered_total", source="second") == 0
    assert daemon.metric("streammerge_folds_total", result="done") == 1
    assert daemon.metric("streammerge_promotions_total", cause="fold") == 1
    assert daemon.metric("streammerge_notifications_total", target="hook", result="ok") == 2
    assert daemon.metric("streammerge_notifications_total", target="failing", result="ok") == 0
    assert daemon.metric("streammerge_notifications_total", target="failing", result="failed") >= 1
    assert daemon.metric("streammerge_notification_outbox", target="failing") == 2
    assert daemon.metric("streammerge_served_snapshot_matches", target="hook") == 1
    assert daemon.metric("streammerge_served_snapshot_matches", target="failing") == 0
    assert daemon.metric("streammerge_publish_to_serve_seconds_count", target="hook") >= 1
    assert daemon.metric("streammerge_oldest_pending_timestamp_seconds") == 0
    assert daemon.metric("streammerge_ready") == 1


# ------------------------------------------------------------------------------------------ JSON and page


def test_json_is_that_of_the_command_line(daemon: Daemon) -> None:
    """The port shows what the --json commands print, except for what changes while one looks."""

    def steady(status: dict[str, object]) -> dict[str, object]:
        return {key: value for key, value in status.items() if key not in ("disk", "sources", "targets")}

    status = daemon.ask("status")
    assert steady(status) == steady(daemon.site.ask("status"))
    assert status["disk"].keys() == daemon.site.ask("status")["disk"].keys()
    assert daemon.ask("history") == daemon.site.ask("history")
    assert daemon.ask("fine-tunes") == daemon.site.ask("fine-tunes")
    failing = status["targets"][1]
    assert (failing["name"], failing["state"], failing["snapshot"]) == ("failing", "failing", None)
    assert "exit 1" in failing["error"]


def test_the_port_answers_from_the_first_moment() -> None:
    """Who is told that the daemon is ready finds its port open, however soon they come."""
    server = Server(Starlette(), ("127.0.0.1", 0))
    try:
        with socket.create_connection(server.address, timeout=10):
            pass
    finally:
        server.stop()


def test_health(daemon: Daemon) -> None:
    """Alive and ready are two questions; a failing target makes the daemon neither dead nor unready."""
    assert daemon.get("/healthz") == (200, '{"alive":true}')
    code, body = daemon.get("/readyz")
    assert code == 200
    assert json.loads(body) == {"ready": True, "problems": []}
    daemon.site.run("healthcheck")


class Page(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_the_page_shows_refusals_and_escapes_names(daemon: Daemon) -> None:
    """The status page names what is served and what was refused and why; a name is only ever text."""
    code, text = daemon.get("/")
    assert code == 200
    page = Page(text)
    assert "script" not in page.tags
    assert ODD_NAME.replace("/", "|") in page.text
    assert "malformed" in page.text
    assert "refused" in page.text
    assert "good" in page.text
    assert "version" in page.text.lower()
    assert daemon.ask("status")["current"]["path"] in page.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed_over_http(daemon: Daemon, method: str) -> None:
    """Only questions are answered: everything else is refused, and what is not there is not found."""
    for path in ("/", "/api/v1/status", "/metrics", "/api/v1/rollback"):
        connection = http.client.HTTPConnection("127.0.0.1", daemon.site.port, timeout=10)
        connection.request(method, path)
        assert connection.getresponse().status in (404, 405), path
        connection.close()
    assert daemon.get("/../../etc/passwd")[0] == 404
    assert daemon.get("/api/v1/nothing")[0] == 404


def test_every_request_is_answered_while_the_store_changes(tmp_path: Path) -> None:
    """Folding, collecting and removing beside it, no request and no command fails."""
    site = Site(tmp_path / "site", keep=1, grace="0s")
    answers: list[tuple[str, int]] = []
    over = threading.Event()

    def ask(daemon: Daemon, path: str) -> None:
        while not over.is_set():
            answers.append((path, daemon.get(path)[0]))

    with site.daemon() as daemon:
        paths = ("/metrics", "/api/v1/status", "/", "/api/v1/history")
        asking = [threading.Thread(target=ask, args=(daemon, path)) for path in paths]
        for thread in asking:
            thread.start()
        try:
            for number in range(12):
                site.publish(f"model-{number}", number)
            while len(site.served) < 12:
                site.run("status")
                site.run("fine-tunes")
        finally:
            over.set()
            for thread in asking:
                thread.join()
    assert len(answers) > 20
    assert {answer for answer in answers if answer[1] != 200} == set()
