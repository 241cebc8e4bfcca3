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

from streammerge import halves, linesearch, pareto
from streammerge.trials import Trials, Unmeasured, mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from streammerge.config.tuning import TuneSection
    from streammerge.finalize import Finalize
    from streammerge.halves import Halves
    from streammerge.rendering import Rendered
    from streammerge.trials import Losses

HELD_OUT = 2  # measurements: what is chosen and what is configured, on the half that judges
DIGITS = 4  # of a value that is tried
LARGEST = 100.0  # that may be configured
UNTOUCHED = (1.0, 1.0)  # shares of the old and of the new with which nothing changes
FEWEST_OF_A_KIND = 4  # rows of the old tasks, and of the new one, in either half

log = structlog.get_logger()


@dataclass(frozen=True)
class Choice:
    """How a model is rendered: finished so, with so much of what was merged before and of what is new."""

    finish: Finalize
    shares: tuple[float, float] = UNTOUCHED


@dataclass(frozen=True)
class Asked:
    """What is tuned, on what.

    base   the base's folder
    ours   the version's own model, as configured by `finish`; `model` says what was written there
    write  renders the state, as chosen, into an empty folder
    new    names of the fine-tunes that are new in this version
    """

    section: TuneSection
    finish: Finalize
    base: Path
    ours: Path
    model: Rendered
    write: Callable[[Choice, Path], Rendered]
    new: frozenset[str]
    beat: Callable[[], None]


class Tuned(NamedTuple):
    """How the version is finished, its model, and what is written down."""

    finish: Finalize
    model: Rendered
    account: dict[str, Any]


class Part(NamedTuple):
    """Some of the rows, and what their mean loss counts."""

    weight: float
    has: Callable[[str], bool]  # the row's task

    def of(self, losses: Losses) -> list[float]:
        """Give the losses of its rows."""
        return [value for task, value in zip(*losses, strict=True) if self.has(task)]


def tune(asked: Asked, folder: Path) -> Tuned:
    """Choose, and put the chosen model in the place of the version's own; `folder` is for trials.

    Raises TryAgain where the program that measures says later.
    """
    section = asked.section
    trials = Trials(section, asked.base, asked.ours, folder, asked.write, asked.beat)
    is_pareto = section.kind == "pareto"
    account: dict[str, Any] = {
        "kind": section.kind,
        "measure": section.measure,
        "budget": {"evaluations": section.evaluations, "span": section.span, "errors": section.errors},
        "default": list(UNTOUCHED) if is_pareto else value_of(asked.finish, section.kind),
        "accepted": False,
    }
    try:
        rows = halves.read(section.data)
        account |= {"data": rows.digest, "rows": [len(rows.choosing.lines), len(rows.judging.lines)]}
        find = balance if is_pareto else search
        chosen = find(asked, trials, rows, account)
        account["used"] = trials.used
        if chosen is None:
            return Tuned(asked.finish, asked.model, account)
        return Tuned(chosen.finish, trials.take(), account)
    except (Unmeasured, halves.BadRows) as exc:
        what = exc.what if isinstance(exc, Unmeasured) else "no rows"
        log.warning("tuning.failed", reason=what, detail=exc.message, hint=exc.hint)
        return Tuned(asked.finish, asked.model, {**account, "why": f"not measured: {what}"})


def search(asked: Asked, trials: Trials, rows: Halves, account: dict[str, Any]) -> Choice | None:
    """Look for the best value; None where what is configured stays. Writes down what it sees."""
    section, kind = asked.section, asked.section.kind
    default = value_of(asked.finish, kind)
    account["points"] = []

    def loss(exponent: float) -> float:
        value = tried_value(default, exponent)
        choice = Choice(with_value(asked.finish, kind, value)) if exponent else None
        found = trials.losses_of(choice, rows.choosing)
        total = mean(found.values) if found is not None else math.inf
        account["points"].append([value, _number(total)])
        return total

    reach = math.log(section.span)
    most = section.evaluations - HELD_OUT
    tried = linesearch.minimise(loss, -reach, reach, start=0.0, evaluations=most)
    exponent, least = min(tried, key=lambda point: point[1])
    if not exponent or not math.isfinite(least):
        account["why"] = "nothing that was tried is better"
        return None
    best = tried_value(default, exponent)
    account["best"] = best
    choice = Choice(with_value(asked.finish, kind, best))
    return choice if is_better(trials, rows, choice, [Part(1.0, lambda _task: True)], account) else None


def balance(asked: Asked, trials: Trials, rows: Halves, account: dict[str, Any]) -> Choice | None:
    """Choose between the old tasks and the new one: how much of either is served, see `pareto`.

    None where all of both stays. Writes down what it sees.
    """
    section = asked.section
    kinds = (lambda task: task not in asked.new, lambda task: task in asked.new)
    for half in (rows.choosing, rows.judging):
        if any(sum(map(has, half.tasks)) < FEWEST_OF_A_KIND for has in kinds):
            raise halves.BadRows(
                f"{section.data} has fewer than {FEWEST_OF_A_KIND} rows of the old tasks, or of "
                f"{', '.join(sorted(asked.new))}, in one of its halves",
                hint="a row's `task` is the name of the fine-tune that it belongs to",
            )
    points: list[tuple[float, float, float | None, float | None]] = []
    account["prefer"] = section.prefer
    low, high = 1 / section.span, section.span
    for shares in pareto.design(low, high, section.evaluations - HELD_OUT):
        choice = None if shares == UNTOUCHED else Choice(asked.finish, shares)
        found = trials.losses_of(choice, rows.choosing)
        losses = [_number(mean(Part(1.0, has).of(found))) if found else None for has in kinds]
        points.append((*shares, losses[0], losses[1]))
    account["points"] = [list(point) for point in points]
    measured = [(a, b, old, new) for a, b, old, new in points if old is not None and new is not None]
    if len(measured) < pareto.FEWEST_POINTS or measured[0][:2] != UNTOUCHED or not all(measured[0][2:]):
        raise Unmeasured("too few points", f"{len(measured)} of {len(points)} models have losses")
    places = [(a, b) for a, b, _, _ in measured]
    old, new = (pareto.fit(places, [point[kind] for point in measured]) for kind in (2, 3))
    found_front = pareto.front(old, new, low, high)
    weights = (section.prefer / measured[0][2], (1 - section.prefer) / measured[0][3])
    best = pareto.prefer(found_front, weights)
    shares = (_few_digits(best.a), _few_digits(best.b))
    account |= {
        "front": [[_few_digits(number) for number in point] for point in found_front],
        "best": list(shares),
    }
    if shares == UNTOUCHED:
        account["why"] = "nothing that was tried is better"
        return None
    choice = Choice(asked.finish, shares)
    parts = [Part(weight, has) for weight, has in zip(weights, kinds, strict=True)]
    return choice if is_better(trials, rows, choice, parts, account) else None


def is_better(
    trials: Trials, rows: Halves, choice: Choice, parts: Sequence[Part], account: dict[str, Any]
) -> bool:
    """Whether a choice is better than what is configured on the half that it was not chosen by."""
    ours, theirs = trials.losses_of(None, rows.judging), trials.losses_of(choice, rows.judging)
    if ours is None or theirs is None or ours.tasks != theirs.tasks:
        raise Unmeasured("no losses", "the rows measured differ from one model to the other")
    compared = [(part.weight, part.of(ours), part.of(theirs)) for part in parts]
    gain, error = gain_of(compared)
    account["held_out"] = {
        "default": _number(math.fsum(weight * mean(one) for weight, one, _ in compared)),
        "best": _number(math.fsum(weight * mean(other) for weight, _, other in compared)),
        "gain": _number(gain),
        "error": _number(error),
    }
    accepted = math.isfinite(gain) and gain > 0 and gain > trials.section.errors * error
    account["accepted"] = accepted
    account["why"] = f"{'better' if accepted else 'not better'} on the half that it was not chosen by"
    return accepted


def gain_of(parts: Sequence[tuple[float, Sequence[float], Sequence[float]]]) -> tuple[float, float]:
    """Give by how much losses fall, row by row, and the standard error of that.

    parts  the weight of a part's mean, its losses before and after; a part's rows are alike, parts are not
    """
    gain = variance = 0.0
    for weight, ours, theirs in parts:
        if len(ours) < 2 or not all(map(math.isfinite, (*ours, *theirs))):
            return -math.inf, math.inf
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        middle, count = mean(differences), len(differences)
        squares = math.fsum((difference - middle) ** 2 for difference in differences)
        gain += weight * middle
        variance += weight**2 * squares / (count - 1) / count
    return gain, math.sqrt(variance)


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


def tried_value(default: float, exponent: float) -> float:
    """Give what is tried at a point of the search, in few digits, within what may be configured."""
    return default if not exponent else min(_few_digits(default * math.exp(exponent)), LARGEST)


def _few_digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
