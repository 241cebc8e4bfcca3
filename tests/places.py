"""Targets in their places: versions to tell of, sections as the configuration would read them, and a server
of a kind with the target that tells it.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import models
from pydantic import TypeAdapter
from servers.sglang import SglangServer
from servers.triton import MODEL, TritonServer
from servers.vllm import VllmServer

from streammerge import probe
from streammerge.config import Config
from streammerge.config.targets import TargetSection
from streammerge.targets import Told, open_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from servers import ModelServer

    from streammerge.config.targets import Serving
    from streammerge.targets import Target

KINDS = ("sglang", "vllm", "triton")
# What each server answers when asked for a text: the label of the version whose bytes it has.
ASKS: dict[str, dict[str, Any]] = {
    "sglang": {"url": "/generate", "send": {"text": "who?"}, "values": {"/text": "{label}"}},
    "vllm": {
        "url": "/v1/completions",
        "send": {"prompt": "who?"},
        "values": {"/choices/0/text": {"matches": "^{label}$"}},
    },
    "triton": {
        "url": f"/v2/models/{MODEL}/infer",
        "send": {"inputs": []},
        "values": {"/outputs/0/data/0": "{label}"},
    },
}


@dataclass
class Place:
    """A server, the target that tells it, and versions to tell it of."""

    server: ModelServer
    part: Serving
    target: Target
    versions: list[Told]

    def tell(self, version: int) -> None:
        """Tell it of a version, and ask it then."""
        self.target.tell(self.versions[version])
        probe.ask(self.part, self.versions[version], lambda: None)


A, B = (
    {"name": name, "source": "team", "revision": f"r-{name}", "digest": name * 64, "weight": 1.0}
    for name in "ab"
)
FOLDED: tuple[list[dict[str, Any]], ...] = ([], [A], [B])


def make_versions(store: Path) -> list[Told]:
    """Make three versions as they lie in a store; their weights differ."""
    root = store / "snapshots"
    found: list[Told] = []
    for version in range(3):
        digest = f"{version}c" * 32
        folder = root / f"{version:06d}-{digest[:12]}"
        models.make_base(folder / "model", seed=version, shards=2)
        manifest = {
            "version": version,
            "parent": found[-1].digest if found else None,
            "fine_tunes": FOLDED[version],
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        found.append(Told(version, digest, folder, f"{version + 1}-{digest[:12]}", "fold"))
    return found


def section(**keys: Any) -> Any:
    """Read a section as the configuration would."""
    return TypeAdapter(TargetSection).validate_python({"name": "web", **keys})


def opened(part: Any, root: Path, beat: Callable[[], None] = lambda: None) -> Target:
    """Make the target of a section."""
    return open_target(part, Config.model_validate({"base": str(root / "base"), "store": str(root)}), beat)


@contextmanager
def place(
    kind: str, versions: list[Told], root: Path, *, beat: Callable[[], None] = lambda: None, **keys: Any
) -> Iterator[Place]:
    """Start a server of a kind with version 0, and open the target on it."""
    launch = versions[0].snapshot / "model"
    server: ModelServer
    if kind == "triton":
        server = TritonServer(launch, root / "repository")
        keys |= {"model": MODEL, "repository": str(root / "repository")}
    else:
        server = {"sglang": SglangServer, "vllm": VllmServer}[kind](launch)
    ask = {**ASKS[kind], "url": server.url + ASKS[kind]["url"]}
    part = section(type=kind, url=server.url, **{"probe": ask, **keys})
    with server:
        yield Place(server, part, opened(part, root, beat), versions)
