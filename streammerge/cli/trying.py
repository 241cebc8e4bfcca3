"""Commands that try the configured sources and targets, and check or describe the configuration."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from streammerge.cli.console import (
    ConfigOption,
    JsonOption,
    config_app,
    out,
    print_json,
    print_table,
    read_config,
    size,
    sources_app,
    targets_app,
)
from streammerge.errors import AnsweredWrong, StreammergeError, TryAgain

if TYPE_CHECKING:
    from streammerge.config.targets import TargetSection
    from streammerge.targets import Target, Told


@sources_app.command("test")
def try_sources(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Look at every source once and say what is there; folds nothing. Exit 75 if one cannot be seen."""
    from streammerge.sources import open_source

    found: list[dict[str, Any]] = []
    failed = False
    settings = read_config(config)
    for part in settings.sources:
        try:
            seen = open_source(part, settings).preview()
            notes = {s.name: s.waiting_for or s.excluded or s.refused for s in seen}
            found.append(
                {"name": part.name, "state": "ok", "error": None, "fine_tunes": list(notes), "notes": notes}
            )
        except TryAgain as exc:
            failed = True
            found.append(
                {"name": part.name, "state": "error", "error": exc.message, "fine_tunes": [], "notes": {}}
            )
    if as_json:
        print_json(found)
    for entry in found if not as_json else []:
        there = f"{len(entry['fine_tunes'])} there" if entry["fine_tunes"] else "nothing there"
        out.print(f"{entry['name']}: {entry['state']}, {escape(entry['error'] or there)}", soft_wrap=True)
        for name, note in entry["notes"].items():
            out.print(escape(f"  {name}" + (f": {note}" if note else "")), soft_wrap=True)
    if failed:
        raise typer.Exit(75)


@targets_app.command("test")
def try_targets(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Tell every target of the version that is current now, ask its probe and what it serves.

    Exit 75 if one does not confirm.
    """
    from streammerge import reports, snapshots
    from streammerge.targets import Told, open_target

    settings = read_config(config)
    store, _ = reports.open_for_reading(settings)
    serving = snapshots.current(store)
    if serving is None:
        raise StreammergeError("nothing is served yet", hint="`streammerge status` says why")
    snapshot = snapshots.read(serving)
    told = Told(snapshot.version, snapshot.digest, snapshot.path, f"test-{snapshot.digest[:12]}", "test")
    found = [_tried(part, open_target(part, settings), told) for part in settings.targets]
    if as_json:
        print_json(found)
    else:
        print_table(("target", "state", "serves"), [(t["name"], t["state"], t["serves"]) for t in found])
        for entry in found:
            if entry["error"]:
                out.print(f"{entry['name']}: {escape(entry['error'])}", soft_wrap=True)
            if entry["hint"]:
                out.print(f"  hint: {escape(entry['hint'])}", soft_wrap=True)
    if any(entry["error"] for entry in found):
        raise typer.Exit(75)


def _tried(part: TargetSection, target: Target, told: Told) -> dict[str, Any]:
    """Tell a target, ask its probe, and ask what it serves then, whatever came of it."""
    from streammerge import probe
    from streammerge.config.targets import Serving

    entry: dict[str, Any] = {"name": part.name, "type": part.type, "state": "confirmed", "serves": None}
    entry |= {"error": None, "hint": None}
    try:
        target.tell(told)
        if isinstance(part, Serving):
            probe.ask(part, told, lambda: None)
    except TryAgain as exc:
        state = "wrong" if isinstance(exc, AnsweredWrong) else "failing"
        entry |= {"state": state, "error": exc.message, "hint": exc.hint or None}
    with suppress(TryAgain):
        entry["serves"] = target.serves()
    return entry


@config_app.command("check")
def check_config(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Check the configuration and the base, and say what the store will take."""
    from streammerge import configfile, offline

    place = configfile.locate(config)
    found = offline.check(configfile.load(place)[0])
    if as_json:
        print_json({"file": str(place), **found})
        return
    out.print(f"{place}: good", soft_wrap=True)
    if found["weights"]:
        version, whole = size(found["version_bytes"]), size(found["full_store_bytes"])
        out.print(
            f"base has {found['weights']} weights, {size(found['base_bytes'])}; "
            f"{found['projected']} are projected, {found['added']} added whole"
        )
        out.print(f"a version takes {version}, the store up to {whole}")
    for warning in found["warnings"]:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


@config_app.command("show")
def show_config(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Print every effective value and where it came from."""
    from streammerge import configfile

    settings, origins = configfile.load(configfile.locate(config))
    values = settings.model_dump(mode="json")
    if as_json:
        print_json(
            {key: {"value": value, "origin": origins.get(key, "default")} for key, value in values.items()}
        )
        return
    print_table(
        ("key", "value", "origin"),
        [(k, json.dumps(v, ensure_ascii=False), origins.get(k, "default")) for k, v in values.items()],
    )


@config_app.command("schema")
def show_schema() -> None:
    """Print the JSON Schema of the configuration."""
    from streammerge.config import Config

    print_json(Config.model_json_schema())
