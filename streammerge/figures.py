"""What a fold saw of a fine-tune, beside the limits of the screens: a figure, a verdict, a sentence each.

Judges only. Knows what was folded by lengths and samples, nothing of ledgers or states. Statistics, no proof:
docs/security.md says what they cannot see.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.errors import Quarantined, Refused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from streammerge.config.screens import (
        CosineScreen,
        GaugeScreen,
        IdentityScreen,
        NormScreen,
        Screens,
        SpectrumScreen,
    )
    from streammerge.folding import Measured
    from streammerge.gauge import Distance

LOCKED, STRANGER = "attention-gauge-transformed", "not-this-base"
LONG, REPEATED, OPPOSED, SINGLE = "unusual-norm", "near-duplicate", "opposed", "one-direction"
HINTS = {
    LOCKED: "it is not unlocked; ask its owner for weights that may be merged, in the order of the base's",
    STRANGER: "check base_model in its config or model card, or point another streammerge at that base",
    LONG: "check learning rate and base; a long delta drowns the others",
    REPEATED: "publish it once; or retract the other",
    OPPOSED: "check who published it and why it takes back what is merged",
    SINGLE: "see what that weight does; edits of single facts and some attacks look like this",
}
# What speaks against a fine-tune by what else is merged, and not by itself.
RELATIVE = frozenset({LONG, REPEATED, OPPOSED, "overflow"})
REASONS = frozenset(HINTS)  # those that a person may overrule
VERDICTS = {"refuse": "refused", "quarantine": "quarantined", "warn": "warned", "off": "off"}
UNRELATED = 1.0  # distance beyond which attention has nothing in common: two that are independent have 1.4
SMALLEST_SPREAD = 0.1  # of the mean, where the folded are more alike than that


@dataclass(frozen=True)
class Figure:
    """What one screen saw.

    value      its number; None where it could not be had, and `note` says why
    threshold  the limit that counts
    verdict    passed, warned, quarantined, refused; overruled by a person; off; unjudged
    reason     one of screen.REASONS where it is beyond its limit
    """

    value: float | None
    threshold: float
    verdict: str
    note: str
    reason: str = ""

    @property
    def is_beyond(self) -> bool:
        """Whether its limit was crossed and somebody is to know."""
        return self.verdict in ("warned", "quarantined", "refused")

    @property
    def plain(self) -> dict[str, Any]:
        """Give it as it is written down and shown."""
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """All that the screens judge by.

    base       ||base||
    attention  distances of attention that moved far; None where no attention was recognised
    nearest    cosine, and name, of the folded fine-tune whose delta is most along or against this one's; None
               where none was compared
    """

    measured: Measured
    base: float
    attention: Sequence[Distance] | None
    nearest: tuple[float, str] | None


def nearest(sample: bytes, others: Iterable[Sequence[tuple[str, bytes]]]) -> tuple[float, str] | None:
    """Find the cosine that is furthest from zero, and whose it is; `others` come some at a time."""
    from streammerge import samples  # it computes with torch: whoever asks for reasons alone does not

    best: tuple[float, str] | None = None
    for part in others:
        alike = [(name, other) for name, other in part if len(other) == len(sample)]
        found = samples.cosines(sample, [other for _, other in alike]) if alike else []
        for cosine, (name, _) in zip(found, alike, strict=True):
            best = best or (0.0, "")
            if abs(cosine) > abs(best[0]):
                best = (cosine, name)
    return best


def examine(evidence: Evidence, limits: Screens, overruled: Collection[str] = ()) -> dict[str, Figure]:
    """Give every screen's figure; `overruled` are reasons that a person let pass."""
    judged = {
        "identity": _identity(evidence, limits.identity),
        "norm": _norm(evidence, limits.norm),
        "cosine": _cosine(evidence, limits.cosine),
        "nearest": _nearest(evidence, limits.cosine),
        "spectrum": _spectrum(evidence, limits.spectrum),
        "gauge": _gauge(evidence, limits.gauge),
    }
    return {
        name: replace(found, verdict="overruled") if found.is_beyond and found.reason in overruled else found
        for name, found in judged.items()
    }


def spoken_against(found: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Give the reasons in figures that were written down: what a person overrules who lets it in."""
    return {part["reason"] for part in found.values() if part["verdict"] != "passed"} - {""}


def refuse(found: Iterable[Figure]) -> None:
    """Raise for the gravest verdict, if there is one to raise for."""
    for verdict, kind in (("refused", Refused), ("quarantined", Quarantined)):
        for figure in found:
            if figure.verdict == verdict:
                raise kind(figure.reason, figure.note, hint=HINTS[figure.reason])


def _figure(value: float, threshold: float, reason: str, action: str, note: str) -> Figure:
    """Judge one number: `reason` is "" where it is within its limit."""
    verdict = "off" if action == "off" else VERDICTS[action] if reason else "passed"
    return Figure(value, threshold, verdict, note, reason)


def _unjudged(threshold: float, why: str) -> Figure:
    return Figure(None, threshold, "unjudged", why)


def _identity(evidence: Evidence, limits: IdentityScreen) -> Figure:
    """Share of weights that are exactly the base's, where the delta is long."""
    norms = [figures[0] for figures in evidence.measured.statistics.values()]
    equal = sum(norm == 0.0 for norm in norms) / max(len(norms), 1)
    ratio = evidence.measured.delta_norm / evidence.base if evidence.base else math.inf
    is_strange = ratio > limits.max_ratio and equal < limits.min_equal
    note = (
        f"{equal:.1%} of its weights are exactly the base's, and ||delta|| is {ratio:.3g} x ||base||, "
        f"{'beyond' if ratio > limits.max_ratio else 'within'} {limits.max_ratio:g}"
    )
    return _figure(equal, limits.min_equal, STRANGER if is_strange else "", limits.action, note)


def _norm(evidence: Evidence, limits: NormScreen) -> Figure:
    """Distance above the mean length of what is folded, in median absolute deviations."""
    earlier, norm = evidence.measured.earlier, evidence.measured.delta_norm
    if len(earlier) < limits.min_folds:
        return _unjudged(limits.mads, f"{len(earlier)} of {limits.min_folds} fine-tunes are folded")
    mean = math.fsum(earlier) / len(earlier)
    if not mean:
        return _unjudged(limits.mads, "all that is folded has no length")
    middle = _median(earlier)
    spread = max(_median([abs(length - middle) for length in earlier]), SMALLEST_SPREAD * mean)
    distance = (norm - mean) / spread
    note = (
        f"||delta|| = {norm:.4g}; the {len(earlier)} that are folded have a mean of {mean:.4g} and a median "
        f"absolute deviation of {spread:.4g}"
    )
    reason = LONG if distance > limits.mads else ""
    return _figure(distance, limits.mads, reason, limits.action, note)


def _cosine(evidence: Evidence, limits: CosineScreen) -> Figure:
    """Cosine to the sum that is merged."""
    count, cosine = len(evidence.measured.earlier), evidence.measured.cosine
    if count < limits.min_folds:
        return _unjudged(limits.duplicate, f"{count} of {limits.min_folds} fine-tunes are folded")
    if cosine is None:
        return _unjudged(limits.duplicate, "the method keeps no sum of deltas")
    return _alike(cosine, limits, "the merged delta")


def _nearest(evidence: Evidence, limits: CosineScreen) -> Figure:
    """Cosine to the fine-tune that is most alike, or most opposed."""
    count = len(evidence.measured.earlier)
    if count < limits.min_folds:
        return _unjudged(limits.duplicate, f"{count} of {limits.min_folds} fine-tunes are folded")
    if evidence.nearest is None:
        return _unjudged(limits.duplicate, "of what is folded no samples are known")
    cosine, name = evidence.nearest
    return _alike(cosine, limits, f"{name}, by samples")


def _alike(cosine: float, limits: CosineScreen, what: str) -> Figure:
    reason = REPEATED if cosine > limits.duplicate else OPPOSED if cosine < limits.opposite else ""
    threshold = limits.duplicate if cosine >= 0 else limits.opposite
    return _figure(cosine, threshold, reason, limits.action, f"cosine {cosine:.3f} to {what}")


def _spectrum(evidence: Evidence, limits: SpectrumScreen) -> Figure:
    """Largest share of one weight's delta in one singular direction."""
    if evidence.measured.top_share is None:
        return _unjudged(limits.max_share, "no full matrix whose spectrum the method measures has changed")
    share, name = evidence.measured.top_share
    reason = SINGLE if share > limits.max_share else ""
    note = f"{share:.1%} of the delta of {name} lies in one direction"
    return _figure(share, limits.max_share, reason, limits.action, note)


def _gauge(evidence: Evidence, limits: GaugeScreen) -> Figure:
    """Distance of attention weights, against that of the products through which alone they act."""
    if evidence.attention is None:
        return _unjudged(limits.raw, "no attention is recognised by its names and config.json")
    far = [found for found in evidence.attention if found.raw > limits.raw]
    if not far:
        most = max(evidence.measured.moved.values(), default=0.0)
        note = f"no attention weight moved by more than {most:.3g} of its length"
        return _figure(most, limits.raw, "", limits.action, note)
    turned = [found for found in far if found.invariant < limits.invariant]
    strange = [found for found in far if min(found.raw, found.invariant) > UNRELATED]
    shown = max(turned or far, key=lambda found: found.raw)
    reason = LOCKED if turned else STRANGER if 2 * len(strange) > len(far) else ""
    note = f"{shown.name}: {shown.raw:.3g} of their length apart from the base's, "
    note += f"their product {shown.invariant:.3g} of its"
    if len(turned) > 1:
        note += f"; {len(turned) - 1} more are like it"
    return _figure(shown.raw, limits.raw, reason, limits.action, note)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
