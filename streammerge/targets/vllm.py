"""A vLLM server in its development mode as a target: paused, its weights reloaded in place, resumed.

Its label says that a reload came to its end, and no more: it is ours, and lies beside the weights. While they
are being exchanged the server has a label that no version has, so a telling that was cut off shows.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from streammerge.errors import AnsweredWrong, TryAgain
from streammerge.web import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config import Config
    from streammerge.config.targets import VllmTarget
    from streammerge.targets import Told
    from streammerge.web import Answer

LOOK_SECONDS = 10.0  # for a question; a reload may take its time
RESUME_SECONDS = 5.0  # for the server to go on, when we are told to stop
RELOAD_FAILED = (500, 501)  # what a worker's error becomes


class Vllm:
    """One server."""

    takes_all = False

    def __init__(self, part: VllmTarget, beat: Callable[[], None]) -> None:
        """Keep the configuration."""
        self.name = part.name
        self.part = part
        self._server = Server(part.url, part.timeout, beat, part.api_key_file)
        self._unheeding = Server(part.url, min(RESUME_SECONDS, part.timeout), lambda: None, part.api_key_file)

    def tell(self, told: Told) -> None:
        """Exchange the weights while nothing is generated; whatever happens, have it go on then."""
        try:
            self._exchange(told)
        except BaseException:
            with suppress(TryAgain):
                self._post("/resume", server=self._unheeding)
            raise
        self._post("/resume")
        served = self.serves()
        if served != told.label:
            raise AnsweredWrong(
                f"target {self.name} took {told.label} and serves {served}",
                hint="was it restarted meanwhile? it is told again by itself",
            )

    def _exchange(self, told: Told) -> None:
        self._post(f"/pause?mode={self.part.pause}")
        self._label(f"{told.label} unfinished")
        self._reload(told)
        cleared = self._post("/reset_prefix_cache?reset_running_requests=true&reset_external=true").json()
        if cleared != {"success": True}:
            raise TryAgain(f"target {self.name} keeps what the old weights computed: {cleared}", hint=AGAIN)
        self._label(told.label)

    def _reload(self, told: Told) -> None:
        path = f"{self.part.sees(told.snapshot)}/model"
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        answer = self._server.ask("POST", "/collective_rpc", body, failures=RELOAD_FAILED)
        if answer.is_good:
            return
        if answer.status in RELOAD_FAILED and not self._is_healthy():
            raise TryAgain(f"{answer.url} answers {answer.quoted}", hint="is its engine alive? see its log")
        raise AnsweredWrong(
            f"target {self.name} cannot load {told.label}: {answer.quoted}",
            hint=f"does the server see {path}? path_map says how it sees the store",
        )

    def _is_healthy(self) -> bool:
        with suppress(TryAgain):
            return self._server.ask("GET", "/health", timeout=LOOK_SECONDS).is_good
        return False

    def _label(self, label: str) -> None:
        self._post("/update_weight_version", {"new_version": label})

    def _post(self, path: str, body: object = None, *, server: Server | None = None) -> Answer:
        """Send what it must do; TryAgain where it does not."""
        answer = (server or self._server).ask("POST", path, body)
        if not answer.is_good:
            raise TryAgain(f"{answer.url} answers {answer.quoted}", hint=DEVELOPMENT)
        return answer

    def serves(self) -> str | None:
        """Read its label back."""
        answer = self._server.ask("GET", "/weight_info", timeout=min(LOOK_SECONDS, self.part.timeout))
        said = answer.json() if answer.is_good else None
        label = said.get("weight_version") if isinstance(said, dict) else None
        if not isinstance(label, str):
            raise TryAgain(f"{answer.url} answers {answer.quoted}", hint=DEVELOPMENT)
        return label


AGAIN = "it is told again by itself"
DEVELOPMENT = "it must be a vLLM of 0.33 or newer, started with VLLM_SERVER_DEV_MODE=1"


def open_target(part: VllmTarget, config: Config, beat: Callable[[], None]) -> Vllm:
    """Make the target."""
    return Vllm(part, beat)
