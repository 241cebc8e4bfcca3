"""Models on trial: rendered beside the version that is built, one at a time, and measured by log-loss.

What a measurement may take is bounded, in number, time and memory; the program that measures runs in a
process of its own. Knows nothing of what is chosen by it.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge import files, furnish, measuring
from streammerge.errors import Refused, StreammergeError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
    from pathlib import Path

    from streammerge.config.tuning import TuneSection
    from streammerge.halves import Half
    from streammerge.rendering import Rendered

SUFFIX = "-trial"


class Unmeasured(StreammergeError):
    """A model could not be measured; `what` is the same word on every machine: no path, no time."""

    def __init__(self, what: str, message: str) -> None:
        """`message` is the sentence with the values."""
        super().__init__(message, hint="the version has the configured value")
        self.what = what


class Losses(NamedTuple):
    """The row's tasks, and their log-losses."""

    tasks: tuple[str, ...]
    values: tuple[float, ...]


def mean(values: Sequence[float]) -> float:
    """Add up in the order given, exactly; what is not finite makes it infinite."""
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.inf


@dataclass
class Trials:
    """The models that are tried for one version.

    base    the base, for what a model's folder holds beside weights
    ours    the version's own model, as it is configured
    folder  where one model at a time lies
    write   renders what is asked for into an empty folder
    """

    section: TuneSection
    base: Path
    ours: Path
    folder: Path
    write: Callable[[Any, Path], Rendered]
    beat: Callable[[], None]
    used: int = 0
    latest: Hashable = None  # what lies in the folder
    rendered: Rendered | None = None
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        """The time begins."""
        self.deadline = time.monotonic() + self.section.time

    def losses_of(self, choice: Hashable, half: Half) -> Losses | None:
        """Measure the model of a choice, None being as configured; None where it does not fit its dtype."""
        try:
            if choice is None:
                self.lay_ours()
            elif choice != self.latest:
                self.render(choice)
        except Refused:
            return None
        return self.measure(half)

    def lay_ours(self) -> None:
        """Put the version's own model on trial."""
        model = self._emptied()
        for path in self.ours.glob("*.safetensors"):
            path.chmod(0o444)  # what measures only reads
            (model / path.name).symlink_to(path.absolute())
        furnish.furnish(self.base, model, "", {})

    def render(self, choice: Hashable) -> Rendered:
        """Put another model on trial."""
        model = self._emptied()
        self.rendered = self.write(choice, model)
        furnish.furnish(self.base, model, "", {})
        self.latest = choice
        return self.rendered

    def take(self) -> Rendered:
        """Put the weights of the model on trial in the place of the version's own."""
        assert self.rendered is not None
        for name in self.rendered.hashes:
            (self.folder / "model" / name).replace(self.ours / name)
        self.latest = None
        return self.rendered

    def _emptied(self) -> Path:
        self.latest = None
        files.remove_tree(self.folder / "model")
        (self.folder / "model").mkdir(parents=True)
        return self.folder / "model"

    def measure(self, half: Half) -> Losses:
        """Measure what is on trial; raises Unmeasured, or TryAgain where the program says later."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Unmeasured("time", f"tuning took longer than {self.section.time:g} s")
        self.used += 1
        data = self.folder / "rows.jsonl"
        data.write_bytes(b"".join(line + b"\n" for line in half.lines))
        section, model = self.section, self.folder / "model"
        timeout = min(section.timeout, left)
        bounds = measuring.Bounds("tune", timeout, section.memory, self.beat)
        if section.measure == "command":
            argv = [part.replace("{model}", str(model)).replace("{data}", str(data)) for part in section.argv]
            given = {"STREAMMERGE_MODEL": str(model), "STREAMMERGE_DATA": str(data)}
            printed = measuring.run(argv, given, bounds)
            self._check(printed)
            return _of_program(printed, half)
        told = measuring.evaluate(
            section.measure,
            model,
            bounds,
            each=True,
            data=data,
            device=section.device,
            threads=section.threads,
        )
        self._check(told)
        assert isinstance(told, measuring.Measurement)
        return Losses(
            tuple("" if row["task"] == "all" else str(row["task"]) for row in told.rows),
            tuple(float(row["log_loss"]) for row in told.rows),
        )

    def _check(self, found: object) -> None:
        """Raise Unmeasured for words in the place of a measurement."""
        if isinstance(found, str):
            is_late = time.monotonic() >= self.deadline
            raise Unmeasured("time" if is_late else "failed", found)


def _of_program(found: Mapping[str, Any] | str, half: Half) -> Losses:
    """Read what a program of the operator's printed."""
    assert not isinstance(found, str)
    try:
        values = tuple(math.nan if loss is None else float(loss) for loss in found["losses"])
    except (KeyError, TypeError, ValueError) as exc:
        raise Unmeasured("no losses", "it printed no list of numbers as `losses`") from exc
    if len(values) != len(half.lines):
        raise Unmeasured("no losses", f"it printed {len(values)} losses for {len(half.lines)} rows")
    return Losses(half.tasks, values)


@contextmanager
def beside(building: Path) -> Iterator[Path]:
    """Give a folder for trials beside a building folder; it goes in any case, at the latest at a start."""
    folder = building.with_name(f"{building.name}{SUFFIX}")
    files.remove_tree(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        files.remove_tree(folder)
