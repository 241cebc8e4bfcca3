"""Commands that work: the daemon and a look at its health, a merge without it, demo, dev-hub; the version."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from streammerge.cli.console import (
    ConfigOption,
    JsonOption,
    app,
    err,
    out,
    parse_knobs,
    print_json,
    print_table,
    read_config,
    read_value,
)
from streammerge.errors import ConfigError, StreammergeError

if TYPE_CHECKING:
    from streammerge.config import Route
    from streammerge.finalize import Finalize


@app.command()
def run(
    config: ConfigOption = None,
    once: Annotated[
        bool, typer.Option("--once", help="Work off what is there, then end; opens no port.")
    ] = False,
) -> None:
    """Watch the sources and keep the merged model up to date, until SIGTERM."""
    from streammerge import configfile, logs

    path = configfile.locate(config)
    settings = configfile.load(path)[0]
    logs.configure(level=settings.log_level)
    if once:
        from streammerge.once import run_once

        run_once(settings)
    else:
        from streammerge import daemon

        daemon.Daemon(path, settings).run()


@app.command()
def healthcheck(config: ConfigOption = None) -> None:
    """Ask the running daemon whether it is alive; exit 0 if it is."""
    import urllib.error
    import urllib.request

    host, port = read_config(config).http.address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- compared, never bound
    url = f"http://[{host}]:{port}/healthz" if ":" in host else f"http://{host}:{port}/healthz"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 -- always http, to our own port
            answer.read()
    except (urllib.error.URLError, OSError) as exc:
        raise StreammergeError(
            f"{url} does not say that the daemon is alive: {exc}", hint="is `streammerge run` running?"
        ) from exc
    out.print("alive")


@app.command()
def merge(
    fine_tunes: Annotated[
        list[Path],
        typer.Argument(
            metavar="FT…", help="Model folders, adapters or .safetensors files, in folding order."
        ),
    ],
    base: Annotated[Path, typer.Option(help="A model folder or one .safetensors file.")],
    target: Annotated[Path, typer.Option("--out", help="A new folder: gets model/ and manifest.json.")],
    method: Annotated[
        str | None, typer.Option(help="`streammerge methods` lists them; the default stands first.")
    ] = None,
    knobs: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method; repeatable."),
    ] = None,
    added: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Weights added whole; replaces the default list; repeatable."),
    ] = None,
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Of each fine-tune, in their order; or once, for all."),
    ] = None,
    routes: Annotated[
        list[str] | None,
        typer.Option(
            "--route",
            metavar="[NAME:]GLOB=SHARE",
            help="Multiplies these weights' deltas, of one fine-tune or all; 0 leaves them out.",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="REASON", help="Fold in spite of this reason; repeatable.")
    ] = None,
    finalize: Annotated[
        list[str] | None,
        typer.Option(
            "--finalize", metavar="KEY=VALUE", help="scale=2, cap, cap.level=fixed, lines.beta=0.5, …"
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="The same as --finalize scale=…")] = None,
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
    from streammerge.methods import DEFAULT

    request = offline.Request(
        base=base, fine_tunes=tuple(fine_tunes), out=target, method=method or DEFAULT,
        knobs=parse_knobs(knobs or []), added=tuple(added) if added else None,
        weights=tuple(weights or []), routes=parse_routes(routes or []),
        finalize=parse_finalize([*(finalize or []), *([] if scale is None else [f"scale={scale}"])]),
        allow=frozenset(allow or []), dtype=dtype, device=device, threads=threads,
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


def parse_routes(pairs: list[str]) -> tuple[Route, ...]:
    """Read [NAME:]GLOB=SHARE; NAME is one of the fine-tunes'."""
    from pydantic import ValidationError

    from streammerge.config import Route

    found = []
    for pair in pairs:
        glob, _, share = pair.rpartition("=")
        name, _, weights = glob.rpartition(":")
        try:
            found.append(Route(weights=weights, share=share, source=name or None))  # type: ignore[arg-type]
        except ValidationError as exc:
            raise ConfigError(
                f"--route {pair}: no GLOB=SHARE", hint="write for example --route 'lm_head*=0'"
            ) from exc
    return tuple(found)


def parse_finalize(pairs: list[str]) -> Finalize:
    """Read KEY=VALUE pairs with dotted keys; a key alone takes its defaults."""
    from pydantic import ValidationError

    from streammerge.finalize import Finalize

    given: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        *parents, last = name.split(".")
        place = given
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = read_value(pair, value) if value else place.get(last, {})
    try:
        return Finalize(**given)
    except ValidationError as exc:
        found = exc.errors()[0]
        key = ".".join(str(part) for part in found["loc"])
        raise ConfigError(
            f"--finalize {key}: {found['msg']}, not {found['input']!r}", hint="docs/methods.md lists the keys"
        ) from exc


@app.command()
def methods(*, as_json: JsonOption = False) -> None:
    """List the merge methods: what they remember and need, and how a fine-tune is taken out again."""
    from dataclasses import asdict

    from streammerge import methods as merging

    found = [merging.describe(name) for name in merging.NAMES]
    if as_json:
        print_json([{**asdict(entry), "default": entry.name == merging.DEFAULT} for entry in found])
        return
    rows = [
        (
            f"{entry.name} *" if entry.name == merging.DEFAULT else entry.name,
            f"{entry.state:g} x",
            entry.data or "-",
            "any" if entry.order_free else "matters",
            entry.removal,
            ", ".join(f"{knob} {value}" for knob, value in entry.knobs.items()) or "-",
        )
        for entry in found
    ]
    print_table(("method", "state", "needs", "order", "taking out", "knobs"), rows)
    out.print("* the default. state: float32 copies of a square matrix. docs/methods.md says more")


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Option(help="A new folder for all that the demo makes; streammerge-demo, -2, -3, …"),
    ] = None,
    *,
    serve: Annotated[
        bool, typer.Option("--serve", help="Run a server of the model, and examine that.")
    ] = False,
) -> None:
    """Watch the real daemon fold seven fine-tunes, refuse a broken one, take a harmful one back. A minute."""
    from streammerge import demo as show

    names = (Path("streammerge-demo" + (f"-{number}" if number > 1 else "")) for number in itertools.count(1))
    show.run(folder or next(path for path in names if not path.exists()), console=out, serve=serve)


@app.command()
def dev_hub(
    folder: Annotated[
        Path, typer.Option(help="Where repositories are kept; made if it is not there.")
    ] = Path("hub"),
    listen: Annotated[str, typer.Option(help="address:port")] = "127.0.0.1:8090",
    token: Annotated[
        str | None, typer.Option(help="Needed then to write, and to read what is private or gated.")
    ] = None,
) -> None:
    """Serve a folder as a small Hugging Face Hub, for tests and trials offline, until Ctrl-C or SIGTERM."""
    import signal
    import threading

    from streammerge.devhub import DevHub

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        hub = DevHub(folder, listen=parse_address(listen), token=token)
    except OSError as exc:
        raise ConfigError(f"--folder {folder}: {exc}", hint="name a folder that can be written to") from exc
    with hub:
        out.print(f"{folder} is a Hub now. Have clients use it:\n", soft_wrap=True)
        out.print(f"  export HF_ENDPOINT={hub.url}")
        out.print("  export HF_HUB_DISABLE_XET=1     # for uploads")
        if token is not None:
            out.print("  export HF_TOKEN=…               # the one given to --token")
        out.print(
            "\nFaults and the account of requests are below /_dev/, see docs/dev-hub.md. Ctrl-C ends it."
        )
        stopped.wait()


def parse_address(text: str) -> tuple[str, int]:
    """Read address:port as the configuration would."""
    from pydantic import ValidationError

    try:
        from streammerge.config import Http

        return Http(listen=text).address
    except ValidationError as exc:
        raise ConfigError(
            f"--listen {text}: no address:port", hint="write for example --listen 127.0.0.1:8090"
        ) from exc


@app.command()
def version(*, as_json: JsonOption = False) -> None:
    """Print the version."""
    from streammerge import __version__

    print_json({"version": __version__}) if as_json else out.print(__version__)
