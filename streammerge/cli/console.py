"""What every command shares: the app, the options, how things and errors are printed."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streammerge.config import Config
    from streammerge.errors import StreammergeError

STATE_STYLES = {
    "folded": "green",
    "accepted": "green",
    "refused": "red",
    "quarantined": "red",
    "denied": "red",
    "damaged": "red",
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep one merged model up to date: fold every new fine-tune of its base in, as it is published.",
)
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


def report(error: StreammergeError) -> None:
    """Print an error for a person: what happened, then what to do."""
    err.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        err.print(f"[bold]hint:[/] {escape(error.hint)}", soft_wrap=True)


def print_json(value: object) -> None:
    """Print JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_config(path: Path | None) -> Config:
    """Find and read the configuration."""
    from streammerge import configfile

    return configfile.load(configfile.locate(path))[0]


@contextmanager
def reading_bar(what: str, total: Callable[[], int]) -> Iterator[Callable[[str, int], None]]:
    """Show how far long reading is, on a terminal; gives what is called with each name and its bytes."""
    if not err.is_terminal:
        yield lambda _name, _bytes: None
        return
    with Progress(console=err, transient=True) as progress:
        bar = progress.add_task(what, total=total())

        def beat(name: str, count: int) -> None:
            progress.update(bar, description=f"{what} {name}", advance=count)

        yield beat


def size(count: float) -> str:
    """Write bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


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


def parse_knobs(pairs: list[str]) -> dict[str, Any]:
    """Read KNOB=VALUE pairs; values as in YAML."""
    knobs = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: no value", hint="write for example --set alpha=0.5")
        knobs[name] = read_value(pair, value)
    return knobs


def read_value(pair: str, text: str) -> Any:  # noqa: ANN401 -- whatever YAML can say
    """Read the value of a KEY=VALUE pair as YAML."""
    from streammerge.configfile import read_yaml

    try:
        return read_yaml(text)
    except ValueError as exc:
        raise ConfigError(f"{pair}: not readable as YAML", hint="quote it as YAML does") from exc
