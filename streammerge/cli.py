"""The commands a person types: parse, call one function, print. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from streammerge import __version__
from streammerge import config as configuration
from streammerge.errors import ConfigError, Locked, StreammergeError, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.config import Config

WAIT_SECONDS = 30.0
STATE_STYLES = {
    "folded": "green",
    "accepted": "green",
    "refused": "red",
    "quarantined": "red",
    "denied": "red",
    "damaged": "red",
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__ and (
    "Keep one merged model up to date: fold every new fine-tune of its base in, as it is published."
))  # fmt: skip
fine_tunes_app = typer.Typer(
    help="List fine-tunes, look at one, or decide about it.", invoke_without_command=True
)
sources_app = typer.Typer(help="Try the configured sources.", no_args_is_help=True)
targets_app = typer.Typer(help="Try the configured targets.", no_args_is_help=True)
config_app = typer.Typer(help="Check, show or describe the configuration.", no_args_is_help=True)
app.add_typer(fine_tunes_app, name="fine-tunes")
app.add_typer(sources_app, name="sources")
app.add_typer(targets_app, name="targets")
app.add_typer(config_app, name="config")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--config",
        help="The configuration; else $STREAMMERGE_CONFIG, ./streammerge.yaml, /etc/streammerge/.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the documented JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Leave the command for the daemon and return.")]
NameArgument = Annotated[str, typer.Argument(metavar="[SOURCE:]NAME[@REVISION]")]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the command line; every expected error ends with its message, its hint and its exit code."""
    try:
        app(standalone_mode=True)
    except StreammergeError as exc:
        report(exc)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def report(error: StreammergeError) -> None:
    """Print an error for a person: what happened, then what to do."""
    err.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        err.print(f"[bold]hint:[/] {escape(error.hint)}", soft_wrap=True)


def escape(text: str) -> str:
    """Keep brackets in a message from being read as markup."""
    return text.replace("[", "\\[")


def print_json(value: object) -> None:
    """Print JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_config(path: Path | None) -> Config:
    """Find and read the configuration."""
    return configuration.load(configuration.locate(path))[0]


# The daemon


@app.command()
def run(
    config: ConfigOption = None,
    once: Annotated[
        bool, typer.Option("--once", help="Work off what is there, then end; opens no port.")
    ] = False,
) -> None:
    """Watch the sources and keep the merged model up to date, until SIGTERM."""
    from streammerge import logs

    path = configuration.locate(config)
    settings = configuration.load(path)[0]
    logs.configure(level=settings.log_level)
    from streammerge import daemon

    if once:
        daemon.run_once(settings)
    else:
        daemon.Daemon(path, settings).run()


@app.command()
def healthcheck(config: ConfigOption = None) -> None:
    """Ask the running daemon whether it is alive; exit 0 if it is."""
    import urllib.error
    import urllib.request

    host, port = read_config(config).http.address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- the other way round: where to ask
    url = f"http://[{host}]:{port}/healthz" if ":" in host else f"http://{host}:{port}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 -- our own address
            answer.read()
    except (urllib.error.URLError, OSError) as exc:
        raise StreammergeError(
            f"{url} does not say that the daemon is alive: {exc}", hint="is `streammerge run` running?"
        ) from exc
    out.print("alive")


# Reading


@app.command()
def status(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Say what is served, what is folded and what is waiting."""
    from streammerge import reports

    settings = read_config(config)
    store, ledger = reports.open_for_reading(settings)
    found = reports.status(settings, store, ledger)
    if as_json:
        print_json(found)
        return
    current, head = found["current"] or {}, found["head"] or {}
    out.print(f"serving   version {current.get('version', '-')}  {current.get('path', '')}", soft_wrap=True)
    out.print(
        f"head      version {head.get('version', '-')}, {found['count']} fine-tunes by {found['method']} {found['knobs'] or ''}"
    )
    out.print(f"waiting   {found['pending']} fine-tunes")
    if found["held"]:
        out.print(
            f"[yellow]held      {escape(found['held'])}; `streammerge resume` goes on[/]", soft_wrap=True
        )
    for source in found["sources"]:
        out.print(
            f"source    {source['name']}: {source['state']}"
            + (f", {escape(source['error'])}" if source["error"] else ""),
            soft_wrap=True,
        )
    for target in found["targets"]:
        line = f"target    {target['name']}: {target['state']}, confirmed version {target['snapshot']}"
        out.print(line + (f", {escape(target['error'])}" if target["error"] else ""), soft_wrap=True)
    for version, why in found["damaged"].items():
        out.print(f"[red]damaged   version {version}: {escape(why)}[/]", soft_wrap=True)
    disk = found["disk"]
    out.print(
        f"disk      {size(disk['store_bytes'])} used, {size(disk['version_bytes'])} a version, up to "
        f"{size(disk['full_store_bytes'])} with keep: {settings.keep}; {size(disk['free_bytes'])} free"
    )


def size(count: float) -> str:
    """Write bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@app.command()
def history(
    config: ConfigOption = None,
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many versions.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List versions, oldest first."""
    from streammerge import reports

    _, ledger = reports.open_for_reading(read_config(config))
    found = reports.history(ledger, limit)
    if as_json:
        print_json(found)
        return
    rows = [
        (r["version"], r["digest"][:12], r["state"], ", ".join(r["added"]), r["promoted_at"] or "", r["note"])
        for r in found
    ]
    print_table(("version", "digest", "state", "added", "promoted", "note"), rows)


def print_table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print rows for people; states are coloured on a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        style = next(
            (STATE_STYLES[value] for value in row if isinstance(value, str) and value in STATE_STYLES), ""
        )
        table.add_row(*(escape("" if value is None else str(value)) for value in row), style=style)
    out.print(table)


@app.command()
def show(
    version: Annotated[str, typer.Argument(metavar="VERSION|head|current")],
    config: ConfigOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Describe one version: what is inside, in which order, by which method, with which figures."""
    from streammerge import reports

    store, ledger = reports.open_for_reading(read_config(config))
    found = reports.show(store, ledger, version)
    if as_json:
        print_json(found)
        return
    out.print(
        f"version {found['version']}  {found['digest'][:12]}  {found.get('state', 'unrecorded')}\n{found['path']}",
        soft_wrap=True,
    )
    out.print(f"{found['method']} {found['knobs']} finalize {found['finalize']}", soft_wrap=True)
    for name, value in {**found["totals"], **found["health"]}.items():
        out.print(f"  {name:24}{value if value is not None else '-'}")
    print_table(
        ("#", "fine-tune", "source", "revision", "digest"),
        [
            (i, f["name"], f["source"], f["revision"], f["digest"][:12])
            for i, f in enumerate(found["fine_tunes"], 1)
        ],
    )


@app.command()
def path(config: ConfigOption = None) -> None:
    """Print the resolved folder that is current."""
    from streammerge import reports, snapshots

    store, _ = reports.open_for_reading(read_config(config))
    found = snapshots.current(store)
    if found is None:
        raise StreammergeError("nothing is served yet", hint="`streammerge status` says why")
    sys.stdout.write(f"{found}\n")


@app.command()
def verify(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Read every byte of every version back and compare; exit 3 if anything is damaged."""
    from streammerge import reports

    store, ledger = reports.open_for_reading(read_config(config))
    with err.status("verifying") if err.is_terminal else _quiet() as shown:
        damage = reports.verify(
            store, ledger, lambda name: shown.update(f"verifying {name}") if shown else None
        )
    if as_json:
        print_json({"damaged": bool(damage), "findings": damage})
    else:
        for line in damage:
            out.print(f"[red]damaged[/] {escape(line)}", soft_wrap=True)
        if not damage:
            out.print("every version is what was sealed")
    if damage:
        raise typer.Exit(3)


def _quiet() -> Any:  # noqa: ANN401 -- a context manager that yields None
    from contextlib import nullcontext

    return nullcontext()


# Fine-tunes


@fine_tunes_app.callback()
def fine_tunes(context: typer.Context, config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """List every fine-tune ever seen, in folding order."""
    if context.invoked_subcommand is not None:
        return
    from streammerge import reports

    _, ledger = reports.open_for_reading(read_config(config))
    found = reports.fine_tunes(ledger)
    if as_json:
        print_json(found)
        return
    rows = [
        (f["name"], f["source"], f["revision"], f["state"], f["version"], f["reason"], f["detail"])
        for f in found
    ]
    print_table(("name", "source", "revision", "state", "version", "reason", "detail"), rows)


@fine_tunes_app.command("show")
def show_fine_tune(name: NameArgument, config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Say at which step a fine-tune is, waiting for what, until when."""
    from streammerge import reports

    _, ledger = reports.open_for_reading(read_config(config))
    found = reports.fine_tune(reports.match_fine_tune(ledger.fine_tunes(), name))
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        out.print(f"{key:16}{escape(str(value)) if value is not None else '-'}", soft_wrap=True)


@fine_tunes_app.command()
def approve(
    name: NameArgument,
    config: ConfigOption = None,
    *,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let a fine-tune in that waits for approval, or that was denied, refused or quarantined."""
    ask(
        config,
        "approve",
        {"name": name},
        no_wait=no_wait,
        as_json=as_json,
        say=lambda r: f"{r['name']} is {r['state']}",
    )


@fine_tunes_app.command()
def reject(
    name: NameArgument,
    config: ConfigOption = None,
    *,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Keep a fine-tune out: its content is denied under any name."""
    ask(
        config,
        "reject",
        {"name": name},
        no_wait=no_wait,
        as_json=as_json,
        say=lambda r: f"{r['name']} is {r['state']}",
    )


@fine_tunes_app.command()
def retry(
    name: NameArgument,
    config: ConfigOption = None,
    *,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take a refused or quarantined fine-tune up again from the start."""
    ask(
        config,
        "retry",
        {"name": name},
        no_wait=no_wait,
        as_json=as_json,
        say=lambda r: f"{r['name']} is {r['state']}",
    )


# Commands that change the store


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
        say=lambda r: f"serving version {r['version']} instead of {r['from']}; denied: {', '.join(r['denied']) or 'nothing'}; "
        "held until `streammerge resume`",
    )  # fmt: skip


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

    settings = read_config(config)
    store, reading = reports.open_for_reading(settings)
    reading.close()
    reports.refuse_stranger(store, writing=True)
    ledger = Ledger(store.ledger)
    number = ledger.ask(verb, arguments)
    if no_wait:
        out.print(f"left for the daemon as command {number}")
        return
    deadline = time.monotonic() + WAIT_SECONDS
    while (row := ledger.row("select * from commands where id = ?", number)) and row["state"] == "pending":
        if not execute_here(settings):
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


def execute_here(settings: Config) -> bool:
    """Execute what is in the ledger if no daemon does; False where one holds the lock."""
    from streammerge import files, snapshots

    store = snapshots.Store(settings.store)
    try:
        with files.locked(store.lock):
            from streammerge import daemon, logs

            logs.configure(level="warning")
            daemon.obey_once(settings)
            return True
    except Locked:
        return False


# Merging without a daemon


@app.command()
def merge(
    fine_tunes: Annotated[
        list[Path],
        typer.Argument(metavar="FT…", help="Model folders or .safetensors files, in folding order."),
    ],
    base: Annotated[Path, typer.Option(help="A model folder or one .safetensors file.")],
    target: Annotated[Path, typer.Option("--out", help="A new folder: gets model/ and manifest.json.")],
    method: Annotated[str, typer.Option(help="opcm, average or task_arithmetic.")] = "opcm",
    knobs: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method; repeatable."),
    ] = None,
    added: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Weights added whole; replaces the default list; repeatable."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="REASON", help="Fold in spite of this reason; repeatable.")
    ] = None,
    scale: Annotated[float, typer.Option(help="finalize.scale: multiplies the merged delta.")] = 1.0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 instead of the base's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Fold fine-tunes into a base once, in the given order, with the daemon's own engine."""
    from streammerge import offline

    request = offline.Request(
        base=base, fine_tunes=tuple(fine_tunes), out=target, method=method, knobs=parse_knobs(knobs or []),
        added=tuple(added) if added else None, allow=frozenset(allow or []), scale=scale, dtype=dtype, device=device, threads=threads,
    )  # fmt: skip
    manifest = offline.merge(
        request,
        warn=lambda text: err.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True),
        console=err,
    )
    if as_json:
        print_json(manifest)
        return
    totals = manifest["totals"]
    out.print(
        f"{totals['count']} fine-tunes in {target}/model, lambda {totals['lambda']:.4f}", soft_wrap=True
    )


def parse_knobs(pairs: list[str]) -> dict[str, Any]:
    """Read KNOB=VALUE pairs; values as in YAML."""
    import yaml

    knobs = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: no value", hint="write for example --set alpha=0.5")
        knobs[name] = yaml.safe_load(value)
    return knobs


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="A new folder for everything the demo makes.")] = Path(
        "streammerge-demo"
    ),
) -> None:
    """Watch the real daemon fold seven fine-tunes, refuse a broken one and take a harmful one back. A minute."""
    from streammerge import demo as show

    show.run(folder, console=out)


# Trying and describing


@sources_app.command("test")
def test_sources(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Look at every source once and say what is there; folds nothing. Exit 75 if one cannot be seen."""
    from streammerge.sources import open_source

    found, failed = [], False
    for part in read_config(config).sources:
        try:
            sightings = open_source(part).look({})
            found.append(
                {"name": part.name, "state": "ok", "error": None, "fine_tunes": [s.name for s in sightings]}
            )
        except TryAgain as exc:
            failed = True
            found.append({"name": part.name, "state": "error", "error": exc.message, "fine_tunes": []})
    if as_json:
        print_json(found)
    for entry in found if not as_json else []:
        out.print(
            f"{entry['name']}: {entry['state']}, {entry['error'] or ', '.join(entry['fine_tunes']) or 'nothing there'}",
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(75)


@targets_app.command("test")
def test_targets(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Tell every target of the version that is current now. Exit 75 if one does not confirm."""
    from streammerge import reports, snapshots
    from streammerge.targets import Told, open_target

    settings = read_config(config)
    store, _ = reports.open_for_reading(settings)
    serving = snapshots.current(store)
    if serving is None:
        raise StreammergeError("nothing is served yet", hint="`streammerge status` says why")
    snapshot, found = snapshots.read(serving), []
    for part in settings.targets:
        try:
            open_target(part).tell(
                Told(snapshot.version, snapshot.digest, snapshot.path, f"test-{snapshot.digest[:12]}")
            )
            found.append({"name": part.name, "state": "confirmed", "error": None})
        except TryAgain as exc:
            found.append({"name": part.name, "state": "failing", "error": exc.message})
    if as_json:
        print_json(found)
    for entry in found if not as_json else []:
        out.print(
            f"{entry['name']}: {entry['state']}"
            + (f", {escape(str(entry['error']))}" if entry["error"] else ""),
            soft_wrap=True,
        )
    if any(entry["error"] for entry in found):
        raise typer.Exit(75)


@config_app.command("check")
def check_config(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Check the configuration and the base, and say what the store will take."""
    from streammerge import offline

    place = configuration.locate(config)
    found = offline.check(configuration.load(place)[0])
    if as_json:
        print_json({"file": str(place), **found})
        return
    out.print(f"{place}: good", soft_wrap=True)
    out.print(
        f"base has {found['weights']} weights, {size(found['base_bytes'])}; {found['projected']} are projected, {found['added']} added whole"
    )
    out.print(
        f"a version takes {size(found['version_bytes'])}, the store up to {size(found['full_store_bytes'])}"
    )
    for warning in found["warnings"]:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


@config_app.command("show")
def show_config(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Print every effective value and where it came from."""
    settings, origins = configuration.load(configuration.locate(config))
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
    print_json(configuration.Config.model_json_schema())


@app.command()
def version(*, as_json: JsonOption = False) -> None:
    """Print the version."""
    print_json({"version": __version__}) if as_json else out.print(__version__)
