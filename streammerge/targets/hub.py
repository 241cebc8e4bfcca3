"""A repository of a Hub as a target: every version that is told becomes one commit of a branch, and a tag.

Telling twice is harmless: what the branch holds is compared by content with the version first, and a commit
is made only upon the head that was compared. The upload runs in a process of its own, this file as a program:
the client may wait without end in places and leaves threads behind; a process can be ended at any moment.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import credentials, machine, members, programs
from streammerge.card import card
from streammerge.config.sources import HubSource
from streammerge.errors import ConfigError, TryAgain, Withheld
from streammerge.headers import MARK
from streammerge.hub import NO_ACCESS, NO_WRITE, Hub, blob_id, end_silence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streammerge.config import Config
    from streammerge.config.targets import HubTarget
    from streammerge.hubfacts import Repo
    from streammerge.targets import Told

CARD = "README.md"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class Job:
    """What the process that uploads is given, on its standard input."""

    repo: str
    branch: str
    private: bool | None
    endpoint: str
    seconds: int
    snapshot: str
    digest: str
    base_model: str | None
    hubs: dict[str, str]
    token: str | None = field(repr=False)


class HubRepository:
    """One repository."""

    takes_all = True

    def __init__(self, part: HubTarget, config: Config, beat: Callable[[], None]) -> None:
        """`config` names the base, and the sources whose fine-tunes have a page on a Hub."""
        self.name = part.name
        self.part = part
        self.base_model = part.base_model or next(iter(config.base_models), None)
        self.hubs = {
            source.name: Hub(endpoint=source.endpoint).endpoint
            for source in config.sources
            if isinstance(source, HubSource)
        }
        self._beat = beat

    def tell(self, told: Told) -> None:
        """Have the branch hold this version, and tag it."""
        part, job = self.part, self.job(told)
        argv = (sys.executable, "-m", __name__)
        # What the client keeps, such as Xet's cache, goes with the upload, unless HF_HOME names a place.
        with (
            machine.errors("publishing"),
            tempfile.TemporaryDirectory(prefix="streammerge-hub-") as folder,
        ):
            given = json.dumps(asdict(job)).encode()
            code, output, errors = programs.run(
                argv, _environment(job, folder), part.timeout, self._beat, given
            )
        if code is None:
            raise TryAgain(
                f"target {self.name}: the upload did not end within {part.timeout:g} s",
                hint="it is tried again by itself, without the files that arrived; or raise its timeout",
            )
        if code == TryAgain.exit_code:
            said = json.loads(output.splitlines()[-1])
            raise TryAgain(f"target {self.name}: {said['error']}", hint=said["hint"])
        if code:
            last = (errors.strip() or f"exit {code}").splitlines()[-1]
            raise TryAgain(
                f"target {self.name}: the upload failed: {last[-300:]}",
                hint="it is told again by itself; `streammerge targets test` tries it now",
            )

    def serves(self) -> None:
        """A branch that somebody else moved is put right by the next version."""

    def job(self, told: Told) -> Job:
        """Say what is to be done, with the token as it is now."""
        part = self.part
        try:
            token = credentials.read(part.token_file, credential="hf-token", variable="HF_TOKEN")
        except ConfigError as exc:  # the file may be put there, or exchanged, while the daemon runs
            raise TryAgain(f"target {self.name}: {exc.message}", hint=exc.hint) from exc
        return Job(
            part.repo, part.branch, part.private, Hub(endpoint=part.endpoint).endpoint,
            math.ceil(part.timeout) + 1, str(told.snapshot), told.digest, self.base_model, self.hubs, token,
        )  # fmt: skip


def open_target(part: HubTarget, config: Config, beat: Callable[[], None]) -> HubRepository:
    """Make the target."""
    return HubRepository(part, config, beat)


def _environment(job: Job, folder: str) -> dict[str, str]:
    """Give the client's environment: the Hub it is for, and no token but the one that the job has."""
    kept = {key: value for key, value in os.environ.items() if key not in TOKENS}
    home = {} if "HF_HOME" in kept else {"HF_HOME": folder}
    return {**kept, **home, "HF_ENDPOINT": job.endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}


# The process that uploads


def main() -> int:
    """Do the job on standard input; what went wrong outside is said on standard output, exit 75."""
    job = Job(**json.load(sys.stdin))
    end_silence()
    signal.alarm(job.seconds)  # should the daemon be killed, this does not outlive its time
    try:
        publish(job)
    except TryAgain as exc:
        sys.stdout.write("\n" + json.dumps({"error": exc.message, "hint": exc.hint}) + "\n")
        return TryAgain.exit_code
    return 0


def publish(job: Job) -> None:
    """Bring the branch to the version by at most one commit, and make sure that it has its tag."""
    hub = Hub(endpoint=job.endpoint, token=job.token)
    snapshot = Path(job.snapshot)
    manifest = members.parse((snapshot / "manifest.json").read_bytes())
    wanted = _files(manifest)
    head = _head(hub, job)
    commit, stale = head.sha, _stale(head, wanted, snapshot)
    if stale or not _holds(head, wanted, snapshot):
        _refuse_another(head, job)
        text = "".join(card(manifest, base_model=job.base_model, library=_library(snapshot), hubs=job.hubs))
        changes: dict[str, Path | bytes | None] = {path: snapshot / "model" / path for path in wanted}
        changes |= {CARD: text.encode(), **dict.fromkeys(stale)}
        message = f"Version {manifest['version']} ({job.digest[:12]})"
        commit = hub.commit(job.repo, job.branch, head.sha, changes, message, wanted)
        if not _holds(hub.repo(job.repo, commit), wanted, snapshot):
            raise TryAgain(
                f"{job.repo} does not hold the version after commit {commit[:12]}",
                hint="it is tried again by itself; a .gitignore in the repository can keep files out",
            )
    hub.tag(job.repo, f"v{manifest['version']:06d}-{job.digest[:12]}", commit)


def _files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Give path and sha256 of every file that servers load; the card is written anew for the Hub."""
    below = {
        name.removeprefix("model/"): facts["sha256"]
        for name, facts in manifest["files"].items() if name.startswith("model/")
    }  # fmt: skip
    del below[CARD]
    return below


def _head(hub: Hub, job: Job) -> Repo:
    """Look at the branch; it and the repository are made where they are missing."""
    try:
        try:
            return hub.repo(job.repo, job.branch)
        except Withheld as exc:
            if exc.reason not in ("gone", "moved"):
                raise
        hub.make(job.repo, job.branch, private=job.private)
        return hub.repo(job.repo, job.branch)
    except TryAgain as exc:
        raise TryAgain(exc.message, hint=NO_WRITE if exc.hint == NO_ACCESS else exc.hint) from exc


def _holds(repo: Repo, wanted: Mapping[str, str], snapshot: Path) -> bool:
    """Whether every file is there with its content; of the card, which people may edit, that it is there."""
    there = {file.path: file for file in repo.files}
    return CARD in there and all(
        path in there
        and (
            there[path].sha256 == digest
            if there[path].sha256
            else there[path].size == (snapshot / "model" / path).stat().st_size
            and there[path].oid == blob_id((snapshot / "model" / path).read_bytes())
        )
        for path, digest in wanted.items()
    )


def _stale(repo: Repo, wanted: Mapping[str, str], snapshot: Path) -> list[str]:
    """List what must go: files of the store's other versions, and any other weights beside the model's.

    What people put there themselves, a licence or a picture, stays.
    """
    ours: set[str] = set()
    for path in snapshot.parent.glob("*/manifest.json"):
        ours |= _files(json.loads(path.read_bytes())).keys()
    return [
        file.path
        for file in repo.files
        if file.path not in wanted
        and file.path != CARD
        and (file.path in ours or ("/" not in file.path and file.path.endswith(WEIGHTS)))
    ]


def _refuse_another(repo: Repo, job: Job) -> None:
    """Never write over a model that somebody else made."""
    there = {file.path for file in repo.files}
    weights = sorted(path for path in there if path.endswith(WEIGHTS))
    if weights and MARK not in there:
        raise TryAgain(
            f"{job.repo} holds {weights[0]} and no {MARK}: another model than a merge of streammerge",
            hint="give the target a repository of its own; nothing was changed in this one",
        )


def _library(snapshot: Path) -> str:
    """Name what loads the model, where its config.json says."""
    try:
        config = json.loads((snapshot / "model" / "config.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return ""
    return "transformers" if isinstance(config, dict) and config.get("model_type") else ""


if __name__ == "__main__":
    sys.exit(main())
