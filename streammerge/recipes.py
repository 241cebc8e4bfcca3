"""A merge with what folding needs: an engine, and the recipe that store.json and the base make together.

Here is written down what is fixed for the life of a store, and checked that a configuration still means it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge import headers, methods, snapshots, weights
from streammerge.errors import ConfigError, Refused
from streammerge.merging import Merge, check_archive, check_store, given_knobs
from streammerge.methods import Totals
from streammerge.plan import DEFAULT_ADDED, Plan, Recipe
from streammerge.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.engine import Engine
    from streammerge.finalize import Finalize
    from streammerge.snapshots import Snapshot


@dataclass(kw_only=True)
class FoldingMerge(Merge):
    """Everything the pipeline works with."""

    engine: Engine
    recipe: Recipe
    base_entries: Mapping[str, headers.Entry]
    broken_gate: str = ""
    gates_again_at: float = 0.0
    gate_attempts: int = 0

    @property
    def base_norm(self) -> float:
        """Length of the base."""
        return float(self.settings["base"]["norm"])

    def take(self, config: Config) -> None:
        """Go on with another configuration, which was checked."""
        self.config = config
        self.recipe = replace(self.recipe, is_capped=config.finalize.cap is not None)

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
        "rereads": methods.rereads(recipe.method),
        "embedding": recipe.plan.embedding,
        "kinds": dict(recipe.plan.kinds),
    }


def check_method(config: Config) -> None:
    """Raise ConfigError where other keys do not go with the method."""
    check_lines(config.finalize, config.method)
    check_archive(config, rereads=methods.rereads(config.method))


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
    check_store(config, settings, methods.resolve(config.method, given_knobs(config, settings)))
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


def open_base_headers(base: Path) -> dict[str, headers.Entry]:
    """Read the names and shapes of the base."""
    try:
        with weights.Weights(headers.find(base)) as found:
            return found.entries
    except (OSError, Refused, headers.Incomplete) as exc:
        raise ConfigError(
            f"base {base} cannot be read: {exc}", hint="`base` is a model folder or one .safetensors file"
        ) from exc
