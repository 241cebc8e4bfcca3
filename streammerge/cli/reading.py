"""Commands that read: they create nothing, take no lock and import no torch."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer
from rich.markup import escape

from streammerge.cli.console import (
    ConfigOption,
    JsonOption,
    NameArgument,
    app,
    fine_tunes_app,
    out,
    print_json,
    print_table,
    read_config,
    reading_bar,
    size,
)
from streammerge.errors import StreammergeError

SHOWN = 16  # characters of a revision in a table; commands take as many as tell it from others


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
        f"head      version {head.get('version', '-')}, {found['count']} fine-tunes "
        f"by {found['method']} {found['knobs'] or ''}"
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
        serves = "-" if target["snapshot"] is None else target["snapshot"]
        line = f"target    {target['name']}: {target['state']}, serves version {serves}"
        out.print(line + (f", {escape(target['error'])}" if target["error"] else ""), soft_wrap=True)
    for version, why in found["damaged"].items():
        out.print(f"[red]damaged   version {version}: {escape(why)}[/]", soft_wrap=True)
    disk = found["disk"]
    out.print(
        f"disk      {size(disk['store_bytes'])} used, {size(disk['version_bytes'])} a version, up to "
        f"{size(disk['full_store_bytes'])} with {disk['full_store_versions']} of them; "
        f"{size(disk['free_bytes'])} free"
    )


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
        (
            r["version"],
            r["digest"][:12],
            r["state"],
            change_of(r),
            r["promoted_at"] or "",
            r["note"] or gates_in_short(r["gates"]),
        )
        for r in found
    ]
    print_table(("version", "digest", "state", "change", "promoted", "note"), rows)


def change_of(row: dict[str, Any]) -> str:
    """Write what came in and what went out: +a, -b."""
    return ", ".join([*(f"+{name}" for name in row["added"]), *(f"-{name}" for name in row["removed"])])


def gates_in_short(gates: dict[str, Any]) -> str:
    """Write each gate's verdict, and the figures that have limits: quality passed: mean 0.91."""
    parts = []
    for name, found in gates.items():
        bound = [f for f in found["figures"] if any(fnmatchcase(f, key) for key in found["limits"])]
        shown = ", ".join(f"{f} {number(found['figures'][f])}" for f in bound)
        parts.append(f"{name} {found['verdict']}" + (f": {shown}" if shown else ""))
    return "; ".join(parts)


def number(value: float | None) -> str:
    """Write a figure in a few characters."""
    return "-" if value is None else f"{value:.4g}"


def print_gates(gates: dict[str, Any]) -> None:
    """Print what every gate found: each figure beside its limits and what the version being served had."""
    for name, found in gates.items():
        against = found["against"]
        beside = f", beside version {against['version']}" if against else ""
        out.print(f"gate {name}: {found['verdict'] or 'measured'}{beside}", soft_wrap=True)
        for reason in found["reasons"]:
            out.print(f"  {escape(reason)}", soft_wrap=True)
        rows = [
            (
                figure,
                number(value),
                number(against["figures"].get(figure)) if against else "",
                "; ".join(
                    " ".join(f"{bound} {limit:g}" for bound, limit in limits.items())
                    for key, limits in found["limits"].items()
                    if fnmatchcase(figure, key)
                ),
                found["notes"].get(figure, ""),
            )
            for figure, value in found["figures"].items()
        ]
        if rows:
            print_table(("figure", "value", "served", "limit", "what it is about"), rows)


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
        f"version {found['version']}  {found['digest'][:12]}  {found.get('state', 'unrecorded')}\n"
        f"{found['path']}",
        soft_wrap=True,
    )
    out.print(f"{found['method']} {found['knobs']} finalize {found['finalize']}", soft_wrap=True)
    for name, value in {**found["totals"], **found["health"]}.items():
        out.print(f"  {name:24}{value if value is not None else '-'}")
    if found["tuning"]:
        out.print(tuning_of(found["tuning"]), soft_wrap=True)
    for target in found["served"]:
        out.print(f"  confirmed by {target['target']} at {target['at']}")
    print_table(
        ("#", "fine-tune", "source", "revision", "digest"),
        [
            (i, f["name"], f["source"], f["revision"][:SHOWN], f["digest"][:12])
            for i, f in enumerate(found["fine_tunes"], 1)
        ],
    )
    print_gates(found.get("gates", {}))


def tuning_of(account: dict[str, Any]) -> str:
    """Write how strongly a version is rendered, what was tried, and why that was chosen."""
    chosen = account["best"] if account["accepted"] else account["default"]
    lines = [f"tuned: {account['kind']} {chosen}, {account.get('why', '')}"]
    known = 2 if account["kind"] == "pareto" else 1
    for point in account.get("points", ()):
        losses = ["-" if loss is None else f"{loss:.6g}" for loss in point[known:]]
        lines.append(f"  {' '.join(map(str, point[:known])):24}{' '.join(losses)}")
    if held := account.get("held_out"):
        lines.append("  held out: " + ", ".join(f"{key} {value}" for key, value in held.items()))
    return "\n".join(lines)


@app.command()
def path(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Print the resolved folder that is current."""
    from streammerge import reports, snapshots

    store, _ = reports.open_for_reading(read_config(config))
    found = snapshots.current(store)
    if found is None:
        raise StreammergeError("nothing is served yet", hint="`streammerge status` says why")
    print_json({"path": str(found)}) if as_json else sys.stdout.write(f"{found}\n")


@app.command("verify")
def verify_store(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Read every byte back and compare it with what was sealed, and the ledger with it; exit 3 for damage."""
    from streammerge import snapshots, verify

    settings = read_config(config)
    with reading_bar("verifying", lambda: verify.total_bytes(snapshots.Store(settings.store))) as beat:
        found = verify.verify(settings, beat)
    damage = [finding for finding in found if finding.is_damage]
    unfinished = [finding for finding in found if not finding.is_damage]
    if as_json:
        print_json(
            {
                "damaged": bool(damage),
                "findings": [finding.what for finding in damage],
                "unfinished": [finding.what for finding in unfinished],
                "hints": {finding.what: finding.hint for finding in found},
            }
        )
    else:
        if not damage:
            out.print("every version is what was sealed")
        for finding in damage:
            out.print(f"[red]damaged[/] {escape(finding.what)}", soft_wrap=True)
        for finding in unfinished:
            out.print(f"unfinished {escape(finding.what)}", soft_wrap=True)
        for hint in dict.fromkeys(finding.hint for finding in found):
            out.print(f"hint: {escape(hint)}", soft_wrap=True)
    if damage:
        raise typer.Exit(3)


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
        (
            f["name"],
            f["source"],
            (f["revision"] or "")[:SHOWN],
            f["state"],
            f["version"],
            f["reason"],
            f["detail"],
        )
        for f in found
    ]
    print_table(("name", "source", "revision", "state", "version", "reason", "detail"), rows)


@fine_tunes_app.command("show")
def show_fine_tune(name: NameArgument, config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Say at which step a fine-tune is, waiting for what, until when."""
    from streammerge import reports

    _, ledger = reports.open_for_reading(read_config(config))
    found = reports.fine_tune(ledger, reports.match_fine_tune(ledger.fine_tunes(), name), ledger.figures())
    if as_json:
        print_json(found)
        return
    figures, overruled, refused = found.pop("figures"), found.pop("overruled"), found.pop("refused_in")
    for key, value in {**found, "overruled": ", ".join(overruled) or None}.items():
        out.print(f"{key:16}{escape(str(value)) if value is not None else '-'}", soft_wrap=True)
    if figures:
        rows = [
            (
                name,
                "-" if f["value"] is None else f"{f['value']:.4g}",
                f["threshold"],
                f["verdict"],
                f["note"],
            )
            for name, f in figures.items()
        ]
        print_table(("figure", "value", "limit", "verdict", "what it says"), rows)
    if refused:
        out.print(f"refused in version {refused['version']}; what is served was not touched", soft_wrap=True)
        print_gates(refused["gates"])
