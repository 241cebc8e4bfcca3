"""A model of a Triton server as a target: every version becomes a numbered folder of its model repository.

Triton serves the highest number, and takes it up again after a restart; so the numbers only rise, also where
production goes back. A folder is written beside its name and renamed, so that Triton never meets half of one,
and says in `streammerge.json` which version it is. One that Triton could not load is removed again.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

from streammerge import files, machine
from streammerge.errors import AnsweredWrong, TryAgain
from streammerge.web import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.config.targets import TritonTarget
    from streammerge.targets import Told

MARK = "streammerge.json"
LINK = "model"
BUILDING = ".streammerge-building"
LOOK_SECONDS = 10.0  # for a question; a load may take its time
AGAIN = "it is told again by itself"


class Triton:
    """One model of one server."""

    takes_all = False

    def __init__(self, part: TritonTarget, beat: Callable[[], None]) -> None:
        """Keep the configuration."""
        self.name = part.name
        self.part = part
        self.folder = part.repository / part.model
        self._server = Server(part.url, part.timeout, beat, part.api_key_file)
        self._model = quote(part.model)

    def tell(self, told: Told) -> None:
        """Write the version's folder, have it loaded, see that it is ready, and remove older ones."""
        number = self._newest(told.label) or self._write(told)
        answer = self._server.ask("POST", f"/v2/repository/models/{self._model}/load", {})
        if not answer.is_good:
            files.remove_tree(self.folder / str(number))
            raise AnsweredWrong(
                f"target {self.name} cannot load {told.label}: {answer.quoted}",
                hint="was Triton started with --model-control-mode=explicit? its log says more",
            )
        if (served := self.serves()) != told.label:
            raise AnsweredWrong(
                f"target {self.name} loaded and serves {served}, not {told.label}",
                hint=f"its version policy must be the latest one; {AGAIN}",
            )
        ready = f"/v2/models/{self._model}/versions/{number}/ready"
        if not self._server.ask("GET", ready, timeout=LOOK_SECONDS).is_good:
            raise TryAgain(f"target {self.name}: version {number} is not ready", hint=AGAIN)
        for older in self._ours():
            if older != number:
                files.remove_tree(self.folder / str(older))

    def serves(self) -> str | None:
        """Ask which number is ready, and read which version that is."""
        answer = self._server.ask(
            "POST", "/v2/repository/index", {"ready": True}, timeout=min(LOOK_SECONDS, self.part.timeout)
        )
        found = answer.json() if answer.is_good else None
        if not isinstance(found, list):
            raise TryAgain(
                f"{answer.url} answers {answer.quoted}", hint="is it the address of a Triton server?"
            )
        ready = [
            entry.get("version")
            for entry in found
            if isinstance(entry, dict)
            and entry.get("name") == self.part.model
            and entry.get("state", "READY") == "READY"
        ]
        numbers = [int(number) for number in ready if isinstance(number, str) and number.isdecimal()]
        if not numbers:
            return "nothing"
        label = self._ours().get(max(numbers))
        return label or f"version {max(numbers)} of its own"

    def _numbers(self) -> list[int]:
        """List the versions in the repository; a name that begins with 0 is none to Triton."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except OSError as exc:
            raise TryAgain(
                f"target {self.name}: {self.folder}: {exc.strerror}",
                hint="make the model's folder with its config.pbtxt; the daemon must be able to write there",
            ) from exc
        return [int(name) for name in names if name.isdecimal() and not name.startswith("0")]

    def _ours(self) -> dict[int, str]:
        """Give number and label of the versions that were written here."""
        found = {}
        for number in self._numbers():
            with suppress(OSError, ValueError, LookupError, TypeError):
                found[number] = str(json.loads((self.folder / str(number) / MARK).read_bytes())["label"])
        return found

    def _newest(self, label: str) -> int | None:
        """Give the highest number, if that is this version already."""
        newest = max(self._numbers(), default=0)
        return newest if self._ours().get(newest) == label else None

    def _write(self, told: Told) -> int:
        """Write the next number: the template's files, a link to the weights, what it is."""
        seen = self.part.sees(told.snapshot)
        number = max(self._numbers(), default=0) + 1
        building = self.folder / BUILDING
        try:
            with machine.errors("writing to the model repository", self.folder):
                files.remove_tree(building)
                if self.part.template:
                    shutil.copytree(self.part.template, building)
                else:
                    building.mkdir()
                _fill_in(building, {"{path}": seen, "{label}": told.label})
                building.chmod(0o755)  # whatever the umask: Triton is another user
                (building / LINK).symlink_to(f"{seen}/model")
                mark = {"label": told.label, "version": told.version, "digest": told.digest}
                files.write_file(building / MARK, json.dumps(mark).encode())
                files.fsync_tree(building)
                files.rename_folder(building, self.folder / str(number))
        except OSError as exc:
            raise TryAgain(
                f"target {self.name}: {exc.filename or self.folder}: {exc.strerror}",
                hint="the daemon must be able to write to the model's folder, and to read the template",
            ) from exc
        return number


def _fill_in(folder: Path, words: dict[str, str]) -> None:
    """Put what is told into the template's JSON files, such as the vLLM backend's model.json."""
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        for word, meant in words.items():
            text = text.replace(word, json.dumps(meant)[1:-1])
        path.write_text(text, encoding="utf-8")


def open_target(part: TritonTarget, config: Config, beat: Callable[[], None]) -> Triton:
    """Make the target."""
    return Triton(part, beat)
