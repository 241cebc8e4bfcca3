"""One merge that is open for work: its configuration, store, ledger and engine, and who may change them when.

Holds resources and answers "what is head, what is current"; decides nothing. The store's flock is held by
whoever made this object; `turn` serialises the few moments at which head or current move inside this process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import structlog

from streammerge import headers, methods, snapshots, weights
from streammerge.errors import ConfigError, Damaged, Refused
from streammerge.methods import Totals
from streammerge.plan import DEFAULT_ADDED, Plan, Recipe
from streammerge.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.engine import Engine
    from streammerge.errors import Unable
    from streammerge.finalize import Finalize
    from streammerge.ledger import Ledger
    from streammerge.metrics import Metrics
    from streammerge.snapshots import Snapshot, Store

log = structlog.get_logger()


@dataclass
class Merge:
    """Everything the pipeline works with."""

    config: Config
    store: Store
    ledger: Ledger
    engine: Engine
    metrics: Metrics
    recipe: Recipe
    base_norm: float
    base_entries: Mapping[str, headers.Entry]
    turn: threading.RLock = field(default_factory=threading.RLock)
    unable: Unable | None = None  # what the machine withheld from the last work, until work succeeds
    broken_gate: str = ""
    gates_again_at: float = 0.0
    gate_attempts: int = 0
    folding_from: tuple[Path, ...] = ()
    needed: set[str] = field(default_factory=set)  # folders of the inbox that are being read

    @property
    def head(self) -> Snapshot:
        """The snapshot from which the next fold starts."""
        return self._named("head")

    @property
    def held(self) -> str:
        """Why folding and promotion are stopped, "" if they are not."""
        hold = self.ledger.fact("hold")
        return str(hold["why"]) if hold else ""

    def take(self, config: Config) -> None:
        """Go on with another configuration, which was checked."""
        self.config = config
        self.recipe = replace(self.recipe, is_capped=config.finalize.cap is not None)

    def _named(self, fact: str) -> Snapshot:
        name = self.ledger.fact(fact)
        if name is None:
            raise Damaged(
                f"{self.store.ledger} names no {fact}", hint="restore the ledger from a backup of the store"
            )
        return snapshots.read(self.store.snapshots / name)

    def state_of(self, snapshot: Snapshot) -> State:
        """Give a snapshot's state as the engine wants it."""
        hashes = {
            name.removeprefix("state/"): facts["sha256"]
            for name, facts in snapshot.manifest["files"].items()
            if name.startswith("state/")
        }
        totals = snapshot.manifest["totals"]
        known = {key: totals[key] for key in Totals.__dataclass_fields__}
        return State(snapshot.state, hashes, Totals(**known), snapshot.digest)


def settings_of(
    config: Config, recipe: Recipe, base_norm: float, base_bytes: int, state_bytes: int
) -> dict[str, Any]:
    """Write down what is fixed for the life of a store."""
    return {
        "format": snapshots.FORMAT,
        "base": {
            "digest": recipe.base_digest,
            "origin": str(config.base),
            "norm": base_norm,
            "bytes": base_bytes,
        },
        "method": recipe.method,
        "knobs": dict(recipe.knobs),
        "added": list(added_globs(config)),
        "routes": [route.model_dump() for route in config.routes],
        "state_bytes": state_bytes,
        "removal": methods.removal(recipe.method, recipe.knobs),
        "embedding": recipe.plan.embedding,
        "kinds": dict(recipe.plan.kinds),
    }


def check_method(config: Config) -> None:
    """Raise ConfigError where other keys do not go with the method."""
    check_lines(config.finalize, config.method)
    if methods.rereads(config.method) and config.archive != "keep":
        raise ConfigError(
            f"method {config.method} reads every fine-tune again each time, and archive is {config.archive}",
            hint="set archive: keep, which keeps all their files in the store",
        )


def check_cap(config: Config, head: Snapshot) -> None:
    """Raise ConfigError where a cap is asked for over fine-tunes whose spectra nobody recorded."""
    is_new = config.finalize.cap is not None and head.manifest["finalize"]["cap"] is None
    if is_new and head.fine_tunes and methods.is_elementwise(config.method):
        raise ConfigError(
            f"finalize.cap needs every fine-tune's spectra, and {config.method} recorded none of the "
            f"{len(head.fine_tunes)} in version {head.version}, because no cap was on",
            hint="leave the cap out, or `streammerge rebuild` with it folds them anew into a new store",
        )


def check_lines(finish: Finalize, method: str) -> None:
    """Raise ConfigError where LiNeS' own alpha is asked for and cannot be found."""
    if finish.lines is not None and finish.lines.alpha == "auto" and not methods.keeps_plain_sum(method):
        raise ConfigError(
            f"finalize.lines.alpha is auto, and {method} does not keep the sum it is found by",
            hint="give alpha a number",
        )


def added_globs(config: Config) -> tuple[str, ...]:
    """Give the list of weights that are added whole: the configured one, else the default."""
    return DEFAULT_ADDED if config.added is None else config.added


def recipe_of(config: Config, settings: Mapping[str, Any]) -> tuple[Recipe, dict[str, headers.Entry]]:
    """Rebuild the recipe from store.json and check that the configuration still means the same store."""
    given = methods.resolve(config.method, {**_same_knobs(config, settings), **config.knobs})
    for key, ours, theirs in (
        ("method", settings["method"], config.method),
        ("knobs", settings["knobs"], given),
        ("added", settings["added"], settings["added"] if config.added is None else list(config.added)),
        ("routes", settings["routes"], [route.model_dump() for route in config.routes]),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{key} is {theirs!r}, but the store {config.store} was made with {ours!r}",
                hint=f"put {key} back, or `streammerge rebuild` makes a new store with the new {key} "
                "from the same fine-tunes",
            )
    entries = open_base_headers(config.base_path)
    plan = Plan(settings["kinds"], settings["embedding"])
    if set(entries) != set(plan.kinds):
        raise ConfigError(
            f"base {config.base_path} has other weights than the one the store {config.store} was made with",
            hint="put the original base back, or start a new store for the new base",
        )
    return Recipe(
        config.base_path,
        settings["base"]["digest"],
        plan,
        settings["method"],
        settings["knobs"],
        config.routes,
        is_capped=config.finalize.cap is not None,
    ), entries


def _same_knobs(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where the configuration leaves a knob open, the store's value stays, whatever the default is now."""
    return dict(settings["knobs"]) if config.method == settings["method"] else {}


def open_base_headers(base: Path) -> dict[str, headers.Entry]:
    """Read the names and shapes of the base."""
    try:
        with weights.Weights(headers.find(base)) as found:
            return found.entries
    except (OSError, Refused, headers.Incomplete) as exc:
        raise ConfigError(
            f"base {base} cannot be read: {exc}", hint="`base` is a model folder or one .safetensors file"
        ) from exc
