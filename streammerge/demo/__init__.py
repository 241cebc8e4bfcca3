"""`streammerge demo`: the whole story in under a minute, on the real daemon.

It trains a small base and seven fine-tunes on handwritten digits, publishes them one by one into a watched
folder while the daemon runs, and examines what the daemon serves; then a broken fine-tune, a harmful one and
the way back. It does nothing that a user could not do by hand, and leaves everything behind to go on with.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.text import Text

from streammerge.demo import digits, live, picture
from streammerge.demo.digits import SKILL, TASKS
from streammerge.demo.picture import Served
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

    from streammerge.demo.digits import Exam, Model

HARMFUL, BROKEN = "swapped", "broken"
NOTABLE = 2.0  # points up or down that a row shows in colour
CONFIG = """\
# Written by `streammerge demo`.
base: ./base
store: ./store
threads: 1  # enough for so small a model
sources:
  - {{name: team, type: directory, path: ./fine-tunes, settle: 0.5s, poll: 1s, first_run: fold}}
# An exam that a version must pass before it is served; with it, the demo's harmful one is not:
#gates:
#  - {{name: exam, type: command, argv: {argv}, limits: {{mean: {{max_drop: 5}}}}}}
{targets}http: {{listen: "{host}:{port}"}}
"""
TARGET = """\
# A server of the model, which is told of every version. It speaks the protocol of SGLang.
targets:
  - name: web
    type: sglang
    url: {url}
    probe: {{url: "{url}/predict", send: {{images: [0]}}, values: {{/label: "{{label}}"}}}}
"""


@dataclass(frozen=True)
class Stage:
    """Where the story takes place, and what has happened so far."""

    folder: Path
    console: Console
    exam: Exam
    daemon: live.Daemon
    server: live.Server | None = None
    story: list[Served] = field(default_factory=list)

    def say(self, *lines: str, style: str = "") -> None:
        """Print lines as they are: never wrapped, nothing in them taken for markup."""
        self.console.print(Text("\n".join(lines), style=style), soft_wrap=True)


def run(folder: Path, *, console: Console, seed: int = 0, serve: bool = False) -> None:
    """Play the demo in `folder`, which must be new or empty, and tell it on `console`.

    serve  a server of the model runs beside the daemon, and what it answers is what is examined
    """
    _refuse_occupied(folder)
    base, exam = digits.begin(seed)
    server_port = live.free_port() if serve else None
    config, port = _prepare(folder, base, exam, server_port)
    with ExitStack() as processes:
        server = None
        if server_port:
            exam_file, log = folder / "exam.safetensors", folder / "server.log"
            server = processes.enter_context(
                live.serving(exam_file, folder / "base", log=log, port=server_port)
            )
        daemon = processes.enter_context(live.running(config, log=folder / "daemon.log", port=port))
        stage = Stage(folder, console, exam, daemon, server)
        _introduce(stage, base)
        fine_tunes = {task: digits.fine_tune(base, exam, task, seed=seed) for task in TASKS}
        bad = digits.harmful(base, exam, seed=seed)
        daemon.wait_until_ready()
        _show_base(stage)
        for task, model in fine_tunes.items():
            _show_arrival(stage, task, model)
        contrast = _compare(stage, base, fine_tunes)
        _show_refusal(stage, digits.broken(fine_tunes["parity"]))
        _show_harm_and_rollback(stage, bad)
        _draw(stage, contrast)
    _say_how_to_go_on(stage)


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = "remove it, or name another with --folder"
        raise ConfigError(f"{folder} exists and is not an empty folder", hint=hint)


def _prepare(folder: Path, base: Model, exam: Exam, server_port: int | None = None) -> tuple[Path, int]:
    """Write the base, the exam and a configuration as a user would; return the file and its port."""
    (folder / "fine-tunes").mkdir(parents=True)
    digits.save_model(base, folder / "base")
    digits.save_exam(exam, folder / "exam.safetensors")
    port = live.free_port()
    exam_file = str((folder / "exam.safetensors").resolve())
    argv = [sys.executable, "-m", "streammerge.demo", exam_file, "{snapshot}"]
    config = folder / "streammerge.yaml"
    targets = TARGET.format(url=f"http://{live.HOST}:{server_port}") if server_port else ""
    text = CONFIG.format(argv=json.dumps(argv), host=live.HOST, port=port, targets=targets)
    config.write_text(text, encoding="utf-8")
    return config, port


def _introduce(stage: Stage, base: Model) -> None:
    size = sum(weight.numel() for weight in base.values())
    stage.say("streammerge demo: one base, seven fine-tunes, one model that is served", style="bold")
    stage.say(
        "",
        f"The base ({size:,} weights) has learnt to read handwritten digits.",
        "Seven teams each fine-tune all of it for a question of their own:",
        *(f"  {task:8}{question}" for task, (question, _) in TASKS.items()),
        "",
        "The daemon runs as a process of its own:",
        f"  $ streammerge run -c {_shown(stage.daemon.config)}",
        "",
        *_introduced(stage.server),
        "Each fine-tune is published by moving its folder into the watched one. A row is",
        f"what the model served then gets right, in %, of {len(stage.exam.test)} digits never trained on.",
        "",
    )


def _introduced(server: live.Server | None) -> tuple[str, ...]:
    if server is None:
        return ()
    return (
        f"A server of the model listens at {server.url}. The daemon tells it of every version,",
        "asks then which one it serves, and every number below is measured through it.",
        "",
    )


def _show_base(stage: Stage) -> None:
    header = f"{'':3}{'served':10}" + "".join(f"{task:>7}" for task in (SKILL, *TASKS)) + f"{'mean':>6}{'':6}"
    stage.say(header, style="bold")
    current = stage.daemon.wait_for("to serve the base", lambda: _serving(stage, at_least=0))
    _show_row(stage, "base", current)


def _show_arrival(stage: Stage, name: str, model: Model) -> None:
    """Publish a fine-tune, wait until a version with it is served, examine that."""
    before = stage.story[-1].version
    began = time.monotonic()
    _publish(stage, name, model)
    current = stage.daemon.wait_for(f"to serve {name}", lambda: _serving(stage, at_least=before + 1))
    _show_row(stage, name, current, seconds=time.monotonic() - began)


def _publish(stage: Stage, name: str, model: Model) -> None:
    """Complete under a hidden name, then appear at once: the source never sees a half-written folder."""
    hidden = stage.folder / "fine-tunes" / f".{name}.part"
    digits.save_model(model, hidden)
    hidden.rename(stage.folder / "fine-tunes" / name)


def _serving(stage: Stage, *, at_least: int) -> Mapping[str, Any] | None:
    """What is current, if it is that version or a later one, and where there is a server, served by it."""
    current: Mapping[str, Any] | None = stage.daemon.status()["current"]
    if current is None or current["version"] < at_least:
        return None
    return current if stage.server is None or stage.server.label() == _label(current) else None


def _label(current: Mapping[str, Any]) -> str:
    """A version's name, that of its folder."""
    return PurePath(current["path"]).name


def _examined(stage: Stage, current: Mapping[str, Any]) -> dict[str, float]:
    """The marks of what is served: of the server's answers, else of the folder."""
    if stage.server is None:
        model = digits.load_model(stage.daemon.config.parent / current["path"] / "model")
        return digits.examine(model, stage.exam)
    marks, images = {}, stage.exam.test
    for task in stage.exam.heads:
        label, answers = stage.server.predict(images.tolist(), task)
        assert label == _label(current), f"{label} answers where {_label(current)} is served"
        marks[task] = digits.marks(answers, stage.exam, task)
    return marks


def _show_row(stage: Stage, event: str, current: Mapping[str, Any], *, seconds: float | None = None) -> None:
    """Examine what is served now, print it as one row, remember it."""
    served = Served(current["version"], event, _examined(stage, current))
    before = stage.story[-1].accuracy if stage.story else served.accuracy
    row = Text(f"{f'v{served.version}':3}{picture.label(served):10}", style="red" if event == HARMFUL else "")
    for task, now in served.accuracy.items():
        change = now - before[task]
        style = "" if abs(change) < NOTABLE else "green" if change > 0 else "red"
        row.append(f"{now:7.0f}", style=f"bold {style}" if task == event else style)
    row.append(f"{served.mean:6.1f}", style="bold")
    row.append("" if seconds is None else f"{seconds:4.1f} s", style="dim")
    stage.console.print(row, soft_wrap=True)
    stage.story.append(served)


def _compare(stage: Stage, base: Model, fine_tunes: Mapping[str, Model]) -> dict[str, float]:
    """Say what the merge is worth, in both directions; return the means that it is compared with."""
    first, last = stage.story[0], stage.story[-1]
    own = [digits.examine(model, stage.exam)[task] for task, model in fine_tunes.items()]
    alone = sum(own) / len(own)
    plain = digits.average(base, list(fine_tunes.values()))
    average = digits.mean_of_tasks(digits.examine(plain, stage.exam))
    worse = [task for task in TASKS if last.accuracy[task] < first.accuracy[task]]
    unpractised = f"{first.accuracy[SKILL]:.0f} to {last.accuracy[SKILL]:.0f}"
    stage.say(
        "",
        f"One model for all seven: mean {first.mean:.1f} -> {last.mean:.1f}. The plain average of the",
        f"seven has {average:.1f}; seven models, each for its own task only, {alone:.1f}.",
        f"It is not free either: {SKILL}, which nobody trained any more, went from {unpractised}"
        + (f",\nand {' and '.join(worse)} ended below the base." if worse else "."),
    )
    return {"each alone": alone, "plain average": average}


def _show_refusal(stage: Stage, model: Model) -> None:
    """A fine-tune with a NaN never gets in, and says why."""
    stage.say("", f"Publishing {BROKEN}: one of its weights is not a number.")
    _publish(stage, BROKEN, model)
    refused = stage.daemon.wait_for(f"to refuse {BROKEN}", lambda: _refusal(stage))
    stage.say(f"  {refused['state']}: {refused['reason']}", style="yellow")
    stage.say(f"  {refused['detail']}")
    stage.say(f"  still served: v{stage.daemon.status()['current']['version']}")


def _refusal(stage: Stage) -> Mapping[str, Any] | None:
    listed = json.loads(stage.daemon.command("fine-tunes", "--json"))
    return next((one for one in listed if one["name"] == BROKEN and one["state"] == "refused"), None)


def _show_harm_and_rollback(stage: Stage, model: Model) -> None:
    """What looks healthy is served when no gate is configured; one command brings the version before back."""
    good = stage.story[-1]
    stage.say(
        "",
        f"Publishing {HARMFUL}: trained with yes and no swapped. Its weights look healthy, and",
        "no gate is configured here that would examine what they do:",
    )
    _show_arrival(stage, HARMFUL, model)
    stage.say(f"  $ streammerge rollback --yes -c {_shown(stage.daemon.config)}")
    began = time.monotonic()
    stage.daemon.command("rollback", "--yes")
    current = stage.daemon.wait_for("to serve it again", lambda: _serving(stage, at_least=0))
    _show_row(stage, "rollback", current, seconds=time.monotonic() - began)
    same = "The very same" if stage.story[-1].accuracy == good.accuracy else "NOT the same"
    stage.say(
        "",
        f"{same} row as before. {HARMFUL} is denied from now on, and nothing more is",
        "folded until a person says `streammerge resume`.",
    )


def _draw(stage: Stage, contrast: Mapping[str, float]) -> None:
    try:
        picture.draw(stage.story, stage.folder / "accuracy.png", contrast=contrast, harmful=HARMFUL)
    except ImportError:
        stage.say("", "No picture: it needs matplotlib, pip install 'streammerge[demo]'")


def _say_how_to_go_on(stage: Stage) -> None:
    config, folder = _shown(stage.daemon.config), stage.folder
    lines = {
        "start it again": f"streammerge run -c {config}",
        "ask it": f"streammerge status -c {config}",
        "lift the hold": f"streammerge resume -c {config}",
        "guard it": f"uncomment the gate in {config}",
        "configuration": config,
        "store": _shown(folder / "store"),
        "served model": _shown(folder / "store" / "current" / "model"),
        "metrics": f"http://{live.HOST}:{stage.daemon.port}/metrics   (status page at /)",
        "log": _shown(stage.daemon.log),
    }
    if stage.server is not None:
        words = (str(stage.server.port), str(folder / "exam.safetensors"), str(folder / "base"))
        lines["the server"] = f"python -m streammerge.demo.serve {shlex.join(words)}"
    if (folder / "accuracy.png").exists():
        lines["picture"] = _shown(folder / "accuracy.png")
    stage.say("", "The daemon has stopped; everything is kept. To go on:", style="bold")
    stage.say(*(f"  {what:16}{where}" for what, where in lines.items()))


def _shown(path: Path) -> str:
    """A path as one would type it."""
    return shlex.quote(str(path))
