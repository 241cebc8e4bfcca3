"""Is this candidate good enough to serve? One file a kind; its name is the `type` in the configuration.

A gate measures a folder; it does not know what happens after its verdict. A gate that fails on the version
being served too says nothing about the candidate: then the queue is held (TryAgain), not the fine-tune
refused. What was measured of a version stands in its row and is not measured again while it would be the
same.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import filter as matching
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import structlog

from streammerge import files, snapshots
from streammerge.config.gates import CommandGate, Evaluating
from streammerge.errors import ConfigError, Stopped, TryAgain
from streammerge.measuring import Bounds, Measurement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from streammerge.config.gates import GateSection, Limit, Outside
    from streammerge.ledger import Ledger
    from streammerge.metrics import Metrics

NOT_MEASURED_BY = {"name", "limits", "timeout", "memory"}  # what of a gate does not change its numbers
COMPUTED_BY = ("streammerge", "torch", "transformers")

log = structlog.get_logger()


class GateBroken(TryAgain):
    """A gate does not even work on the version being served."""


class Kind(Protocol):
    """A module of this folder.

    ALWAYS    limits of what it measured that hold where the configuration says nothing else
    COMPARES  whether its numbers are of the version being served as much as of the candidate
    """

    ALWAYS: Mapping[str, Limit]
    COMPARES: bool

    def measure(self, gate: Any, snapshot: Path, bench: Bench) -> Measurement | str:  # noqa: ANN401 -- its own section
        """Measure one sealed folder, or say in words why that is not possible. Raises TryAgain for later."""


@dataclass(frozen=True)
class Bench:
    """What a candidate is measured beside.

    current    the version being served; None before there is one
    base       the base's folder, which version 0 is rendered from; its norm
    """

    ledger: Ledger
    metrics: Metrics
    current: Path | None
    base: Path
    base_norm: float
    beat: Callable[[], None] = lambda: None

    def bounds(self, gate: Outside) -> Bounds:
        """What a gate's program may take."""
        return Bounds(f"gate {gate.name}", gate.timeout, gate.memory, self.beat)

    def recall(self, version: int, gate: GateSection) -> Measurement | None:
        """Give what was measured of a version, if it would be the same now."""
        found, key = self.ledger.measured(version).get(gate.name, {}), fingerprint(gate)
        if not key or found.get("fingerprint") != key or not found["figures"]:
            return None
        figures = {name: math.nan if value is None else value for name, value in found["figures"].items()}
        return Measurement(figures, found["notes"])

    def keep(self, version: int, gate: GateSection, measured: Measurement, **more: object) -> None:
        """Write down what was measured of a version; where that fails, it does not count and is repeated."""
        figures, notes = plain(measured.figures), dict(measured.notes)
        found = {"fingerprint": fingerprint(gate), "figures": figures, "notes": notes, **more}
        self.ledger.keep_measured(version, gate.name, found)


@dataclass(frozen=True)
class Verdict:
    """What the gates found: `reasons` is empty for a candidate that may be served."""

    reasons: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Write figures as JSON can say them."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def require(gates: Sequence[GateSection]) -> None:
    """Raise ConfigError where a gate needs what is not here."""
    for gate in gates:
        if missing := [path for path in _data(gate) if not path.is_file()]:
            raise ConfigError(f"gate {gate.name}: there is no file {missing[0]}", hint="check its `data`")
        if isinstance(gate, Evaluating) and importlib.util.find_spec("transformers") is None:
            raise ConfigError(
                f"gate {gate.name} of type {gate.type} needs transformers, which is not installed",
                hint="pip install 'streammerge[gates]'",
            )


def _require_now(gate: GateSection) -> None:
    """What was there when the daemon started may be gone: that says nothing about the candidate."""
    try:
        require([gate])
        fingerprint(gate)
    except (ConfigError, OSError) as exc:
        raise GateBroken(str(exc), hint="put it back; the queue goes on by itself then") from exc


def check(
    gates: Sequence[GateSection], candidate: Path, bench: Bench, *, drops_refuse: bool = True
) -> Verdict:
    """Run every gate in order until one refuses; `max_drop` and `max_rise` may only be told of."""
    found: dict[str, Mapping[str, float]] = {}
    for gate in gates:
        with _counted(gate, bench.metrics) as said:
            found[gate.name], reasons = judge(gate, candidate, bench, drops_refuse=drops_refuse)
            said.append("refused" if reasons else "passed")
        log.info(
            "gate.judged",
            gate=gate.name,
            version=snapshots.number(candidate),
            verdict=said[0],
            reasons=reasons,
            figures=plain(found[gate.name]),
        )
        if reasons:
            return Verdict(tuple(f"gate {gate.name}: {reason}" for reason in reasons), found)
    return Verdict((), found)


@contextmanager
def _counted(gate: GateSection, metrics: Metrics) -> Iterator[list[str]]:
    """Time a gate and count what it says, which goes into the list; one that cannot judge raises."""
    started = time.monotonic()
    said: list[str] = []
    try:
        yield said
    except Stopped:
        raise
    except TryAgain as exc:
        said.append("broken" if isinstance(exc, GateBroken) else "later")
        raise
    finally:
        metrics.gate_seconds.labels(gate.name).observe(time.monotonic() - started)
        for verdict in said:
            metrics.gate_verdicts.labels(gate.name, verdict).inc()


def judge(
    gate: GateSection, candidate: Path, bench: Bench, *, drops_refuse: bool = True
) -> tuple[Mapping[str, float], list[str]]:
    """Measure a candidate by one gate: its figures, and what speaks against it. Both go into its row."""
    _require_now(gate)
    kind, version = kind_of(gate), snapshots.number(candidate)
    known = None if kind.COMPARES else bench.recall(version, gate)
    measured = known or kind.measure(gate, candidate, bench)
    if isinstance(measured, str):
        _try_on_current(gate, bench)
        bench.keep(version, gate, Measurement({}), verdict="refused", reasons=[measured])
        return {}, [measured]
    always = {key: limit for key, limit in kind.ALWAYS.items() if key in measured.figures}
    limits = {**always, **gate.limits}
    served = _served(gate, bench) if any(limit.compares for limit in limits.values()) else {}
    reasons, drops = [], []
    for key, limit in limits.items():
        for name in matching(measured.figures, key) or [key]:
            if reason := breach(name, limit, measured):
                reasons.append(reason)
            elif reason := worsening(name, limit, measured, served):
                drops.append(reason)
    if not drops_refuse:
        for drop in drops:
            log.warning("gate.drop", gate=gate.name, detail=drop)
        drops = []
    reasons += drops
    bench.keep(
        version,
        gate,
        measured,
        verdict="refused" if reasons else "passed",
        reasons=reasons,
        limits={key: limit.model_dump(exclude_none=True) for key, limit in limits.items()},
        against=_against(bench, served),
    )
    return measured.figures, reasons


def _against(bench: Bench, served: Mapping[str, float]) -> dict[str, Any]:
    """Which version a candidate was compared with, and what it has; {} without a comparison."""
    if not served or bench.current is None:
        return {}
    figures = {name: value for name, value in served.items() if math.isfinite(value)}
    return {"version": snapshots.number(bench.current), "figures": figures}


def _try_on_current(gate: GateSection, bench: Bench) -> None:
    """Where a gate failed on a candidate: does it work at all?"""
    if bench.current is None:
        return
    found = kind_of(gate).measure(gate, bench.current, bench)
    if isinstance(found, str):
        raise GateBroken(
            f"gate {gate.name} fails on the version being served too: {found}",
            hint="mend the gate, its data or its limits; the queue goes on by itself then",
        )


def _served(gate: GateSection, bench: Bench) -> Mapping[str, float]:
    """Give the figures of the version being served, measured unless they are known."""
    if bench.current is None:
        return {}
    version = snapshots.number(bench.current)
    if known := bench.recall(version, gate):
        return known.figures
    found = kind_of(gate).measure(gate, bench.current, bench)
    if isinstance(found, str):
        raise GateBroken(
            f"gate {gate.name} fails on the version being served: {found}", hint="mend the gate or its data"
        )
    before = bench.ledger.measured(version).get(gate.name, {})
    bench.keep(version, gate, found, **{key: before[key] for key in ("verdict", "reasons") if key in before})
    return found.figures


def breach(key: str, limit: Limit, measured: Measurement) -> str:
    """Say how a number breaks its limit by itself; "" if it does not."""
    if key not in measured.figures:
        return f"{key} was not measured"
    value, note = measured.figures[key], _note(key, measured)
    if math.isnan(value):
        return f"{key} is not a number{note}"
    if limit.min is not None and value < limit.min:
        return f"{key} = {value:g} is below {limit.min:g}{note}"
    if limit.max is not None and value > limit.max:
        return f"{key} = {value:g} is above {limit.max:g}{note}"
    return ""


def worsening(key: str, limit: Limit, measured: Measurement, served: Mapping[str, float]) -> str:
    """Say how a number breaks its limit beside the version being served; "" if it does not."""
    before, value = served.get(key, math.nan), measured.figures[key]
    if limit.max_drop is not None and before - value > limit.max_drop:
        return f"{key} fell from {before:g} to {value:g}, more than {limit.max_drop:g}{_note(key, measured)}"
    if limit.max_rise is not None and value - before > limit.max_rise:
        return f"{key} rose from {before:g} to {value:g}, more than {limit.max_rise:g}{_note(key, measured)}"
    return ""


def _note(key: str, measured: Measurement) -> str:
    return f" ({measured.notes[key]})" if key in measured.notes else ""


def kind_of(gate: GateSection) -> Kind:
    """Give the module that measures for a gate."""
    return cast("Kind", importlib.import_module(f"{__name__}.{gate.type}"))


def fingerprint(gate: GateSection) -> str:
    """Name what a gate's numbers depend on beside the version; "" where nobody can say."""
    if isinstance(gate, CommandGate) and gate.data is None:
        return ""
    settings = gate.model_dump(mode="json", exclude=NOT_MEASURED_BY)
    content = [files.sha256_file(path) for path in _data(gate)]
    tools = [_release(name) for name in COMPUTED_BY]
    return hashlib.sha256(files.canonical_json([settings, content, tools])).hexdigest()


def _release(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _data(gate: GateSection) -> Iterator[Path]:
    """List the files that a gate's numbers depend on."""
    if isinstance(gate, CommandGate):
        yield from gate.data or ()
        if gate.data is not None and Path(gate.argv[0]).is_file():
            yield Path(gate.argv[0])
    elif isinstance(found := getattr(gate, "data", None), Path):
        yield found
