"""Commands that change the store: rows in the ledger, executed by whoever holds the lock."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from streammerge.cli.console import (
    ConfigOption,
    JsonOption,
    NameArgument,
    NoWaitOption,
    YesOption,
    app,
    err,
    fine_tunes_app,
    out,
    parse_knobs,
    print_json,
    read_config,
    reading_bar,
    size,
)
from streammerge.errors import Locked, StreammergeError, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config import Config

WAIT_SECONDS = 30.0


def _decide(verb: str, explanation: str) -> None:
    """Make one of the commands that decide about a single fine-tune; they differ in their verb alone."""

    @fine_tunes_app.command(verb, help=explanation)
    def decide(
        name: NameArgument,
        config: ConfigOption = None,
        *,
        no_wait: NoWaitOption = False,
        as_json: JsonOption = False,
    ) -> None:
        def say(result: dict[str, Any]) -> str:
            return f"{result['name']} is {result['state']}"

        ask(config, verb, {"name": name}, no_wait=no_wait, as_json=as_json, say=say)


_decide("approve", "Let a fine-tune in that waits for approval, or that was denied, refused or quarantined.")
_decide("reject", "Keep a fine-tune out: its content is denied under any name.")
_decide("retry", "Take a refused or quarantined fine-tune up again from the start.")


@app.command()
def rollback(
    version: Annotated[
        int | None, typer.Argument(help="The version to serve; the parent of current if left out.")
    ] = None,
    config: ConfigOption = None,
    *,
    yes: YesOption = False,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Serve an older version, deny what was folded after it, and hold."""
    which = "the previous version" if version is None else f"version {version}"
    confirm(f"Serve {which}, deny what was folded after it, and hold?", yes=yes)
    ask(
        config, "rollback", {"version": version}, no_wait=no_wait, as_json=as_json,
        say=lambda r: f"serving version {r['version']} instead of {r['from']}; "
        f"denied: {', '.join(r['denied']) or 'nothing'}; held until `streammerge resume`",
    )  # fmt: skip


@app.command()
def retract(
    name: NameArgument,
    config: ConfigOption = None,
    *,
    yes: YesOption = False,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take one fine-tune out of the merge, in a new version, and deny its content."""
    confirm(f"Take {name} out of the merge?", yes=yes)
    ask(
        config, "retract", {"name": name}, no_wait=no_wait, as_json=as_json,
        say=lambda r: f"{r['name']} is taken out in version {r['version']}",
    )  # fmt: skip


@app.command()
def rebuild(
    store: Annotated[Path, typer.Option(help="The new store's folder.")],
    method: Annotated[str | None, typer.Option(help="The new method; the same if left out.")] = None,
    knobs: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method; repeatable."),
    ] = None,
    config: ConfigOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Make a new store from the same fine-tunes, by another method or other knobs; the old one stays."""
    from streammerge import logs
    from streammerge import rebuild as new_store

    settings = read_config(config)
    logs.configure(level="warning")
    chosen = method or settings.method
    kept = settings.knobs if chosen == settings.method else {}
    made = new_store.rebuild(settings, chosen, {**kept, **parse_knobs(knobs or [])}, store.absolute(), err)
    if as_json:
        print_json(made)
        return
    out.print(
        f"{made['count']} fine-tunes merged by {made['method']} in {made['store']}; to serve it, set method, "
        "knobs and store in the configuration and restart the daemon",
        soft_wrap=True,
    )


@app.command("backup")
def back_up(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="Where the copy is, or is to be.")],
    config: ConfigOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Copy the store, whoever works in it; what is there already is not copied again."""
    from streammerge import backup

    settings = read_config(config)
    with reading_bar("backing up", lambda: files_of(settings.store)) as beat:
        made = backup.backup(settings, place.absolute(), beat)
    say_copied(made, f"version {made['version']} and {made['versions'] - 1} others", as_json=as_json)


@app.command("restore")
def restore_store(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="A copy that `backup` made.")],
    config: ConfigOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Make the configured store, which must not be there yet, from a backup."""
    from streammerge import backup

    settings, place = read_config(config), place.absolute()
    with reading_bar("restoring", lambda: files_of(place)) as beat:
        made = backup.restore(settings, place, beat)
    say_copied(made, f"version {made['version']} is head again, and {made['versions'] - 1} others are there",
               as_json=as_json)  # fmt: skip


def files_of(store: Path) -> int:
    """Sum the sizes of a store's versions."""
    from streammerge import files, snapshots

    return files.tree_bytes(snapshots.Store(store).snapshots)


def say_copied(made: dict[str, Any], what: str, *, as_json: bool) -> None:
    """Say what a copy came to; exit 3 where something damaged was left out."""
    if as_json:
        print_json(made)
    else:
        out.print(
            f"{made['place']}: {what}; {size(made['copied_bytes'])} copied, {size(made['bytes'])} in all",
            soft_wrap=True,
        )
        for line in made["damaged"]:
            out.print(f"[red]damaged, left out:[/] {escape(line)}", soft_wrap=True)
    if made["damaged"]:
        raise typer.Exit(3)


@app.command()
def hold(
    config: ConfigOption = None,
    *,
    why: Annotated[str, typer.Option(help="Shown by status until resume.")] = "",
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stop folding and promotion; polling and fetching go on."""
    ask(config, "hold", {"why": why}, no_wait=no_wait, as_json=as_json, say=lambda r: f"held: {r['held']}")


@app.command()
def resume(
    config: ConfigOption = None, *, no_wait: NoWaitOption = False, as_json: JsonOption = False
) -> None:
    """Lift the hold, and only the hold: denied fine-tunes stay out."""
    ask(
        config,
        "resume",
        {},
        no_wait=no_wait,
        as_json=as_json,
        say=lambda r: "resumed" if r["was"] else "it was not held",
    )


@app.command()
def gc(config: ConfigOption = None, *, no_wait: NoWaitOption = False, as_json: JsonOption = False) -> None:
    """Remove versions beyond `keep` that nothing needs."""
    ask(
        config,
        "gc",
        {},
        no_wait=no_wait,
        as_json=as_json,
        say=lambda r: f"removed {len(r['removed'])}: {', '.join(r['removed']) or '-'}",
    )


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal; elsewhere take it as said."""
    if not yes and sys.stdin.isatty() and not typer.confirm(question):
        raise StreammergeError("nothing was changed")


def ask(
    config: Path | None,
    verb: str,
    arguments: dict[str, Any],
    *,
    no_wait: bool,
    as_json: bool,
    say: Callable[[dict[str, Any]], str],
) -> None:
    """Leave a command in the ledger and see that it is executed: by the daemon, or here when none runs."""
    from streammerge import reports
    from streammerge.ledger import Ledger
    from streammerge.steps import reached

    settings = read_config(config)
    store, reading = reports.open_for_reading(settings)
    reading.close()
    reports.refuse_stranger(store, writing=True)
    ledger = Ledger(store.ledger)
    number = ledger.ask(verb, arguments)
    reached("asked")
    if no_wait:
        waiting = {"command": number, "state": "pending"}
        print_json(waiting) if as_json else out.print(f"left for the daemon as command {number}")
        return
    deadline = time.monotonic() + WAIT_SECONDS
    while (row := ledger.row("select * from commands where id = ?", number)) and row["state"] == "pending":
        try:
            executed = execute_here(settings, verb)
        except (
            StreammergeError
        ) as exc:  # it has failed now, and must not be executed once the store is mended
            ledger.answer(number, "failed", {"error": exc.message, "hint": exc.hint, "exit": exc.exit_code})
            raise
        if not executed:
            if time.monotonic() > deadline:
                raise TryAgain(
                    f"the daemon did not execute `{verb}` within {WAIT_SECONDS:.0f} s",
                    hint="it stays in its queue; `streammerge status`",
                )
            time.sleep(0.1)
    assert row is not None
    result = json.loads(row["result"])
    if row["state"] == "failed":
        error = StreammergeError(result["error"], hint=result["hint"])
        error.exit_code = result["exit"]
        raise error
    print_json(result) if as_json else out.print(escape(say(result)), soft_wrap=True)


def execute_here(settings: Config, verb: str) -> bool:
    """Execute what is in the ledger if no daemon does; False where one holds the lock."""
    from streammerge import files, snapshots

    store = snapshots.Store(settings.store)
    try:
        with files.locked(store.lock):
            from streammerge import logs, obeying

            logs.configure(level="warning")
            obeying.obey(settings, verb)
            return True
    except Locked:
        return False
