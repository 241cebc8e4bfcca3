"""The demo's server, told by the real daemon under load: no request is lost, no answer is of two versions."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from daemons import Daemon, Site, until

from streammerge.demo import digits, live, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streammerge.demo.digits import Exam, Model

IMAGES = list(range(40))


@pytest.fixture(scope="module")
def begun() -> tuple[Model, Exam]:
    """A base and an exam; how well it reads does not matter here."""
    return digits.begin(1, steps=20)


@pytest.fixture(scope="module")
def served(
    begun: tuple[Model, Exam], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, live.Server]]:
    """A server on the base, and a site whose daemon has it as its target."""
    base, exam = begun
    port = live.free_port()
    site = Site(tmp_path_factory.mktemp("served") / "site", base)
    digits.save_exam(exam, site.root / "exam")
    url = f"http://127.0.0.1:{port}"
    probe = {"url": f"{url}/predict", "send": {"images": [0]}, "values": {"/label": "{label}"}}
    site.configure(targets=[{"name": "web", "type": "sglang", "url": url, "probe": probe, "check": "1s"}])
    log = site.root / "server.txt"
    with live.serving(site.root / "exam", site.root / "base", log=log, port=port) as server:
        yield site, server


class Load:
    """Requests without a pause from two threads, with what became of each."""

    def __init__(self, server: live.Server) -> None:
        self.server = server
        self.answers: list[tuple[str, tuple[float, ...]]] = []
        self.failures: list[tuple[int, bytes]] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]

    def _run(self) -> None:
        while not self._ended.is_set():
            code, body = live.ask(self.server.port, "POST", "/predict", {"images": IMAGES})
            if code == 200:
                said = json.loads(body)
                self.answers.append((said["label"], tuple(said["scores"][-1])))
            else:
                self.failures.append((code, body))
            time.sleep(0.002)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep asking until the block ends."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()


def until_served(server: live.Server, daemon: Daemon) -> str:
    """Wait until the server serves what is current; gives its label."""

    def is_served() -> str | None:
        label = str(daemon.ask("status")["current"]["path"]).rpartition("/")[2]
        return label if server.label() == label else None

    return str(until(is_served, "the server serves what is current"))


def test_a_version_switches_under_load(begun: tuple[Model, Exam], served: tuple[Site, live.Server]) -> None:
    """During three promotions and a rollback every request is answered, and each answer is what the weights
    of the version that it names make of the images.
    """
    (base, exam), (site, server) = begun, served
    load = Load(server)
    seen = ["default"]
    with load.running():
        until(lambda: load.answers, "answers before the first telling")
        with site.daemon() as daemon:
            seen.append(until_served(server, daemon))
            for number in range(2):
                site.publish(f"model-{number}", number, size=0.05)
                daemon.until_state({f"model-{number}": "folded"})
                seen.append(until_served(server, daemon))
            site.run("rollback", "--yes")
            until(lambda: server.label() == seen[-2], "the version before is served again")
            enough = len(load.answers) + 5
            until(lambda: len(load.answers) >= enough, "answers after the rollback")
    assert load.failures == []
    assert len(set(seen)) == 4
    assert {label for label, _ in load.answers} == set(seen)
    assert load.answers[-1][0] == seen[-2]
    expected = {"default": base} | {
        label: digits.load_model(site.store / "snapshots" / label / "model") for label in seen[1:]
    }
    scores = {
        label: serve.answer(weights, exam.images[IMAGES], exam.heads[digits.SKILL])[-1]
        for label, weights in expected.items()
    }
    assert not torch.allclose(scores[seen[-1]], scores[seen[-2]])
    for label, found in load.answers:
        torch.testing.assert_close(torch.tensor(found), scores[label], rtol=1e-5, atol=1e-5)


def test_what_is_no_model_changes_nothing(
    begun: tuple[Model, Exam], served: tuple[Site, live.Server], tmp_path: Path
) -> None:
    """A folder that does not fit the network, or is none, and a question that makes no sense get a 400."""
    server = served[1]
    digits.save_model({name: weight[:1] for name, weight in begun[0].items()}, tmp_path / "odd")
    before = server.label()
    no_models: list[Any] = [
        {"model_path": str(tmp_path / "odd")}, {"model_path": str(tmp_path)}, {"weight_version": "x"}, [],
    ]  # fmt: skip
    for asked in no_models:
        code, body = live.ask(server.port, "POST", "/update_weights_from_disk", asked)
        assert (code, json.loads(body)["success"]) == (400, False), asked
    no_questions: list[Any] = [
        {"images": []}, {"images": [1797]}, {"images": [[1]]}, {"images": [0], "task": "x"}, [], 1,
    ]  # fmt: skip
    for asked in no_questions:
        assert live.ask(server.port, "POST", "/predict", asked)[0] == 400, asked
    assert (server.label(), server.predict([0, 1], "parity")[0]) == (before, before)
