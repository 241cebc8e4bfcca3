"""What an adapter's configuration says, read from a stranger's adapter_config.json: settings and patterns.

Knows nothing of tensors. What a setting means follows PEFT; one under which the delta is not known exactly is
refused by name, and so is a pattern that could take for ever to match.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streammerge.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# Settings under which the file is no plain LoRA of the base.
UNSUPPORTED = (
    "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MERGE_FIRST = "merge the adapter into its base with PEFT's merge_and_unload and publish the model"
MAX_PATTERN = 200
MAX_PATTERNS = 4096
MAX_STEPS = 10**9
# A quantifier behind a group, and groups with a meaning of their own; module names need neither.
STRANGE_PATTERN = re.compile(r"\)\s*[*+{]|\(\?(?!:)")
Rank = Annotated[int, Field(ge=1, lt=1 << 31)]


class Settings(BaseModel):
    """The part of adapter_config.json that changes the delta."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    r: Rank = 8
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)] = 8
    rank_pattern: dict[str, Rank] = Field(default_factory=dict, max_length=MAX_PATTERNS)
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict, max_length=MAX_PATTERNS
    )
    use_rslora: bool = False
    fan_in_fan_out: bool = False

    @cached_property
    def ranks(self) -> list[tuple[re.Pattern[str], float]]:
        """`rank_pattern`, ready to match."""
        return [(_compiled(pattern), rank) for pattern, rank in self.rank_pattern.items()]

    @cached_property
    def alphas(self) -> list[tuple[re.Pattern[str], float]]:
        """`alpha_pattern`, ready to match."""
        return [(_compiled(pattern), alpha) for pattern, alpha in self.alpha_pattern.items()]

    def refuse_slow(self, modules: Collection[str]) -> None:
        """Raise Refused where matching every pattern with every module could take for ever."""
        longest = max(map(len, modules), default=0)
        steps = {p: _most_steps(p, longest) for p in (*self.rank_pattern, *self.alpha_pattern)}
        if sum(steps.values()) * len(modules) > MAX_STEPS:
            raise unsupported(
                f"the pattern {max(steps, key=steps.__getitem__)[:80]!r}, which could take for ever,"
            )

    def scaling(self, module: str, rank: int) -> float:
        """What the product of the factors is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        expected = _first_match(self.ranks, module, self.r)
        if rank != expected:
            raise malformed(f"{module} has rank {rank}, adapter_config.json says {expected}")
        alpha = _first_match(self.alphas, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Check an adapter's settings; raises Refused for an adapter that is no plain LoRA of the base."""
    kind = str(given.get("peft_type", "of no stated kind"))[:40]
    if kind != "LORA":
        raise unsupported(f"an adapter {kind}")
    if used := [key for key in UNSUPPORTED if given.get(key)]:
        raise unsupported(f"LoRA with {used[0]}")
    init = str(given.get("init_lora_weights", "")).lower()
    if init.startswith(INITS_THAT_CHANGE_THE_BASE):
        raise Refused(
            "unsupported-adapter",
            f"init_lora_weights: {init[:40]} changes the base itself, so the adapter alone is no delta of it",
            hint="save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    try:
        settings = Settings.model_validate(given)
    except ValidationError as exc:
        found = exc.errors()[0]
        raise malformed(f"adapter_config.json: {'.'.join(map(str, found['loc']))}: {found['msg']}") from exc
    for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
        if len(pattern) > MAX_PATTERN or STRANGE_PATTERN.search(pattern):
            raise unsupported(f"the pattern {pattern[:80]!r}, which could take for ever,")
        try:
            re.compile(pattern)
            _compiled(pattern)
        except (re.error, OverflowError) as exc:
            raise malformed(f"adapter_config.json: {pattern[:80]!r} is no pattern: {exc}") from exc
    return settings


def _compiled(pattern: str) -> re.Pattern[str]:
    """As PEFT reads it: what matches the end of a module's path, from a dot on."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _first_match(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    """Choose as PEFT does: the first pattern that matches."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _most_steps(pattern: str, length: int) -> int:
    """Bound what matching a name of this length can take: every way to divide it among the pattern's parts.

    No group is repeated, so each quantifier multiplies by the length at most, each `?` by two, and each run
    of alternatives by their number; the path before the pattern counts as a quantifier.
    """
    quantifiers = 1 + len(re.findall(r"[*+{]", pattern))
    branches = math.prod(1 + part.count("|") for part in re.split(r"[()]", pattern))
    return int((1 + length) ** quantifiers * 2 ** pattern.count("?") * branches)


def unsupported(what: str) -> Refused:
    """Refuse an adapter by the name of what is not supported."""
    return Refused("unsupported-adapter", f"{what} cannot be folded exactly", hint=MERGE_FIRST)


def malformed(what: str) -> Refused:
    """Refuse an adapter that is not what it claims."""
    return Refused("malformed", what, hint="save the adapter again with PEFT's save_pretrained")
