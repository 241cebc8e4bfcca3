"""How strongly a version is rendered, chosen by the log-loss on rows of the operator's.

One half of the rows chooses, the other judges: the choice counts only where it is better there than what is
configured, by more than so many standard errors of the difference. Neither the state nor the next fold know
of it. What was tried, and why the choice fell, is written down; where anything fails, what is configured
stays, and that is written down too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from streammerge import halves, linesearch
from streammerge.trials import Trials, Unmeasured, mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from streammerge.config.tuning import TuneSection
    from streammerge.finalize import Finalize
    from streammerge.halves import Halves
    from streammerge.rendering import Rendered

HELD_OUT = 2  # measurements: what is chosen and what is configured, on the half that judges
DIGITS = 4  # of a value that is tried
LARGEST = 100.0  # that may be configured

log = structlog.get_logger()


@dataclass(frozen=True)
class Asked:
    """What is tuned, on what.

    base   the base's folder
    ours   the version's own model, as configured by `finish`; `model` says what was written there
    write  renders the state, finished so, into an empty folder
    """

    section: TuneSection
    finish: Finalize
    base: Path
    ours: Path
    model: Rendered
    write: Callable[[Finalize, Path], Rendered]
    beat: Callable[[], None]


class Tuned(NamedTuple):
    """How the version is finished, its model, and what is written down."""

    finish: Finalize
    model: Rendered
    account: dict[str, Any]


def tune(asked: Asked, folder: Path) -> Tuned:
    """Choose, and put the chosen model in the place of the version's own; `folder` is for trials.

    Raises TryAgain where the program that measures says later.
    """
    section = asked.section
    trials = Trials(section, asked.base, asked.ours, folder, asked.write, asked.beat)
    account: dict[str, Any] = {
        "kind": section.kind,
        "measure": section.measure,
        "budget": {"evaluations": section.evaluations, "span": section.span, "errors": section.errors},
        "default": value_of(asked.finish, section.kind),
        "accepted": False,
    }
    try:
        rows = halves.read(section.data)
        account |= {"data": rows.digest, "rows": [len(rows.choosing.lines), len(rows.judging.lines)]}
        chosen = search(asked, trials, rows, account)
        account["used"] = trials.used
        if chosen is None:
            return Tuned(asked.finish, asked.model, account)
        return Tuned(chosen, trials.take(), account)
    except (Unmeasured, halves.BadRows) as exc:
        what = exc.what if isinstance(exc, Unmeasured) else "no rows"
        log.warning("tuning.failed", reason=what, detail=exc.message, hint=exc.hint)
        return Tuned(asked.finish, asked.model, {**account, "why": f"not measured: {what}"})


def search(asked: Asked, trials: Trials, rows: Halves, account: dict[str, Any]) -> Finalize | None:
    """Look for the best value; None where what is configured stays. Writes down what it sees."""
    section, kind = asked.section, asked.section.kind
    default = value_of(asked.finish, kind)
    points: list[tuple[float, float | None]] = []
    account["points"] = points

    def loss(exponent: float) -> float:
        value = tried_value(default, exponent)
        choice = with_value(asked.finish, kind, value) if exponent else None
        found = trials.losses_of(choice, rows.choosing)
        total = found.mean if found is not None else math.inf
        points.append((value, total if math.isfinite(total) else None))
        return total

    reach = math.log(section.span)
    most = section.evaluations - HELD_OUT
    tried = linesearch.minimise(loss, -reach, reach, start=0.0, evaluations=most)
    exponent, least = min(tried, key=lambda point: point[1])
    if not exponent or not math.isfinite(least):
        account["why"] = "nothing that was tried is better"
        return None
    choice = with_value(asked.finish, kind, tried_value(default, exponent))
    account["best"] = value_of(choice, kind)
    is_better = judged(trials, rows, choice, account)
    return choice if is_better else None


def tried_value(default: float, exponent: float) -> float:
    """Give what is tried at a point of the search, in few digits, within what may be configured."""
    return default if not exponent else min(float(f"{default * math.exp(exponent):.{DIGITS}g}"), LARGEST)


def judged(trials: Trials, rows: Halves, choice: object, account: dict[str, Any]) -> bool:
    """Whether a choice is better than what is configured on the half that it was not chosen by."""
    ours = trials.losses_of(None, rows.judging)
    theirs = trials.losses_of(choice, rows.judging)
    if ours is None or theirs is None or len(ours.values) != len(theirs.values):
        raise Unmeasured("no losses", "the rows measured differ from one model to the other")
    gain, error = gain_of(ours.values, theirs.values)
    account["held_out"] = {
        "default": _number(ours.mean), "best": _number(theirs.mean), "gain": _number(gain),
        "error": _number(error),
    }  # fmt: skip
    is_better = math.isfinite(gain) and gain > 0 and gain > trials.section.errors * error
    account["accepted"] = is_better
    account["why"] = f"{'better' if is_better else 'not better'} on the half that it was not chosen by"
    return is_better


def gain_of(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Give the mean of the differences row by row, and its standard error."""
    if not all(map(math.isfinite, (*ours, *theirs))):
        return -math.inf, math.inf
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    gain = mean(differences)
    squares = math.fsum((difference - gain) ** 2 for difference in differences)
    count = len(differences)
    return gain, math.sqrt(squares / (count - 1) / count) if count > 1 else math.inf


def value_of(finish: Finalize, kind: str) -> float:
    """What is configured of what is tuned."""
    if kind == "scale":
        return finish.scale
    assert finish.cap is not None
    return finish.cap.kappa if finish.cap.level == "fixed" else finish.cap.strength


def with_value(finish: Finalize, kind: str, value: float) -> Finalize:
    """The same with another value of what is tuned."""
    if kind == "scale":
        return finish.model_copy(update={"scale": value})
    assert finish.cap is not None
    key = "kappa" if finish.cap.level == "fixed" else "strength"
    return finish.model_copy(update={"cap": finish.cap.model_copy(update={key: value})})


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
