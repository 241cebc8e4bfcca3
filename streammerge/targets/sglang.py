"""An SGLang server as a target: it loads the version's weights in place and says by which label it serves.

The label that it is given goes with the weights: it is only set once they are loaded, and a server that was
restarted has another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.errors import AnsweredWrong, TryAgain
from streammerge.web import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config import Config
    from streammerge.config.targets import SglangTarget
    from streammerge.targets import Told

LOOK_SECONDS = 10.0  # for a question; an update may take its time
NOT_FOUND = 404


class Sglang:
    """One server."""

    takes_all = False

    def __init__(self, part: SglangTarget, beat: Callable[[], None]) -> None:
        """Keep the configuration."""
        self.name = part.name
        self.part = part
        self._server = Server(part.url, part.timeout, beat, part.api_key_file)

    def tell(self, told: Told) -> None:
        """Have it load the weights, and ask it then what it serves."""
        update = {
            "model_path": f"{self.part.sees(told.snapshot)}/model",
            "weight_version": told.label,
            "flush_cache": True,  # what was computed by the old weights
            "abort_all_requests": self.part.abort,
        }
        answer = self._server.ask(
            "POST", "/update_weights_from_disk", update, key_file=self.part.admin_key_file
        )
        if answer.status == NOT_FOUND:
            raise TryAgain(f"{answer.url} is not there", hint="is it the address of an SGLang server?")
        said = answer.json()
        if not answer.is_good or not isinstance(said, dict) or said.get("success") is not True:
            raise AnsweredWrong(
                f"target {self.name} cannot serve {told.label}: {answer.quoted}",
                hint=f"does the server see {update['model_path']}? path_map says how it sees the store",
            )
        served = self.serves()
        if served is None:
            raise TryAgain(
                f"target {self.name} does not say what it serves",
                hint="a newer SGLang has weight_version in /model_info",
            )
        if served != told.label:
            raise AnsweredWrong(f"target {self.name} took {told.label} and serves {served}", hint=RESTARTED)

    def serves(self) -> str | None:
        """Read its label back."""
        for path in ("/model_info", "/get_model_info"):
            answer = self._server.ask("GET", path, timeout=min(LOOK_SECONDS, self.part.timeout))
            if answer.is_good:
                said = answer.json()
                label = said.get("weight_version") if isinstance(said, dict) else None
                return label if isinstance(label, str) else None
        raise TryAgain(f"{answer.url} answers {answer.quoted}", hint="is it the address of an SGLang server?")


RESTARTED = "was it restarted meanwhile? it is told again by itself"


def open_target(part: SglangTarget, config: Config, beat: Callable[[], None]) -> Sglang:
    """Make the target."""
    return Sglang(part, beat)
