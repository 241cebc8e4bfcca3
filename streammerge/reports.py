"""What the store says about itself, as the documented JSON: status, history, show, fine-tunes.

Reads only: creates nothing, takes no lock, imports no torch. Both the command line and the HTTP port print
what is made here.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
from typing import TYPE_CHECKING, Any

from streammerge import files, snapshots
from streammerge.errors import ConfigError, Damaged, StreammergeError
from streammerge.ledger import Ledger, iso

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streammerge.config import Config
    from streammerge.ledger import Row
    from streammerge.snapshots import Store

PENDING_STATES = ("pending", "awaiting_approval", "waiting")


def open_for_reading(config: Config) -> tuple[Store, Ledger]:
    """Open a store that a daemon made; raise ConfigError where there is none or it is another user's."""
    store = snapshots.Store(config.store)
    if not store.exists or not store.ledger.exists():
        raise ConfigError(f"there is no store at {config.store} yet", hint="`streammerge run` makes it")
    refuse_stranger(store, writing=False)
    return store, Ledger(store.ledger, read_only=True)


def refuse_stranger(store: Store, *, writing: bool) -> None:
    """Raise ConfigError when run under a user who cannot, or should not, touch this store."""
    owner = store.ledger.stat().st_uid
    if os.geteuid() == owner or (not writing and os.access(store.ledger, os.R_OK)):
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    raise ConfigError(
        f"the store {store.root} belongs to {name}", hint=f"run it as that user: sudo -u {name} streammerge …"
    )


def status(config: Config, store: Store, ledger: Ledger) -> dict[str, Any]:
    """Say where the merge stands."""
    settings = store.read_settings()
    head = named(store, ledger.fact("head"))
    current = served(store)
    counts = {
        row["state"]: row["n"]
        for row in ledger.rows("select state, count(*) as n from fine_tunes group by state")
    }
    hold = ledger.fact("hold")
    per_version = version_bytes(settings)
    most = full_store(config, str(settings.get("removal", "replay")))
    return {
        "current": current and {key: current[key] for key in ("version", "digest", "path")},
        "head": head and {key: head[key] for key in ("version", "digest", "path")},
        "count": head["count"] if head else 0,
        "pending": sum(counts.get(state, 0) for state in PENDING_STATES),
        "held": hold["why"] if hold else None,
        "held_since": iso(hold["since"]) if hold else None,
        "method": settings["method"],
        "knobs": settings["knobs"],
        "base": settings["base"],
        "store": str(store.root),
        "fine_tunes": counts,
        "sources": [source_status(ledger, part.name) for part in config.sources],
        "targets": [target_status(ledger, part.name) for part in config.targets],
        "damaged": ledger.fact("damaged") or {},
        "disk": {
            "version_bytes": per_version,
            "store_bytes": files.tree_bytes(store.root),
            "full_store_versions": most,
            "full_store_bytes": per_version * most,
            "free_bytes": shutil.disk_usage(store.root).free,
            "reserve_bytes": config.reserve,
        },
    }


def full_store(config: Config, removal: str) -> int:
    """Say how many versions a store holds at most, a candidate among them, beside those within `grace`."""
    return config.keep + (0 if removal == "subtract" else config.keep_spaced) + 1


def served(store: Store) -> dict[str, Any] | None:
    """Describe what `current` leads to."""
    serving = snapshots.current(store)
    return named(store, serving.name if serving else None)


def version_bytes(settings: Mapping[str, Any]) -> int:
    """Estimate what one version takes on disk: the model and the state."""
    return int(settings["base"]["bytes"] + settings["state_bytes"])


def named(store: Store, folder: str | None) -> dict[str, Any] | None:
    """Describe an accepted folder by its name."""
    if folder is None:
        return None
    path = store.snapshots / folder
    try:
        snapshot = snapshots.read(path)
    except Damaged:
        number, _, digest = folder.partition("-")
        return {"version": int(number), "digest": digest, "path": str(path), "count": 0}
    return {
        "version": snapshot.version,
        "digest": snapshot.digest,
        "path": str(path),
        "count": len(snapshot.fine_tunes),
    }


def source_status(ledger: Ledger, name: str) -> dict[str, Any]:
    """Say how a source is."""
    row = ledger.row("select * from sources where name = ?", name) or {}
    return {
        "name": name,
        "state": row.get("state", "starting"),
        "last_success": iso(row.get("last_success_at")),
        "error": row.get("error") or None,
    }


def target_status(ledger: Ledger, name: str) -> dict[str, Any]:
    """Say what a target serves, as it confirmed it or was found to last, and what it is still to be told."""
    done, seen = ledger.last_told(name), ledger.served(name)
    query = "select * from outbox where target = ? and state = 'pending' order by id limit 1"
    first = ledger.row(query, name)
    state = "telling" if first else "confirmed" if done else "starting"
    if first and first["attempts"]:
        state = "wrong" if first["wrong"] else "failing"
    elif seen and seen["error"] and not first:
        state = "unreachable"
    error = first["error"] if first else seen["error"] if seen else ""
    query = "select count(*) as n from outbox where target = ? and state = 'pending'"
    return {
        "name": name,
        "state": state,
        "snapshot": snapshots.version_of(seen["snapshot"]) if seen else done["version"] if done else None,
        "asked_at": iso(seen["asked_at"]) if seen else None,
        "open": (ledger.row(query, name) or {"n": 0})["n"],
        "error": error or None,
    }


def history(ledger: Ledger, limit: int = 100) -> list[dict[str, Any]]:
    """List the newest versions, oldest first."""
    rows = ledger.rows("select * from snapshots order by version desc limit ?", limit)
    return [
        {
            "version": row["version"], "digest": row["digest"], "parent": row["parent"],
            "sealed_at": iso(row["sealed_at"]), "promoted_at": iso(row["promoted_at"]), "state": row["state"],
            "added": json.loads(row["added"]), "removed": json.loads(row["removed"]), "note": row["note"],
            "gates": gates_of(row),
        }
        for row in reversed(rows)
    ]  # fmt: skip


def gates_of(row: Row) -> dict[str, dict[str, Any]]:
    """Say what each gate found of a version: verdict, reasons, figures, limits, what they were beside."""
    found = json.loads(row.get("measured", "{}"))  # a ledger of an older release has none
    return {
        gate: {
            "verdict": part.get("verdict"),
            **{key: part.get(key, {}) for key in ("figures", "notes", "limits", "against")},
            "reasons": part.get("reasons", []),
        }
        for gate, part in found.items()
    }


def refused_in(ledger: Ledger, row: Row) -> dict[str, Any]:
    """Give the version in which a gate refused this fine-tune, and what gates found of it; {} if none did."""
    if row["reason"] != "quality" or not (named := re.match(r"version (\d+): ", row["detail"])):
        return {}
    found = ledger.snapshot(int(named[1]))
    return {"version": found["version"], "gates": gates_of(found)} if found else {}


def show(store: Store, ledger: Ledger, which: str) -> dict[str, Any]:
    """Describe one version: `head`, `current` or a number."""
    path = resolve(store, ledger, which)
    snapshot = snapshots.read(path)
    row = next((r for r in history(ledger, 1 << 30) if r["version"] == snapshot.version), {})
    keys = ("method", "knobs", "finalize", "threads", "device", "torch", "totals", "health", "base")
    return {
        **row,
        "version": snapshot.version,
        "digest": snapshot.digest,
        "parent": snapshot.parent,
        "path": str(snapshot.path),
        "fine_tunes": [member._asdict() for member in snapshot.fine_tunes],
        **{key: snapshot.manifest[key] for key in keys},
        "tuning": snapshot.manifest.get("tuning"),
        "added_globs": snapshot.manifest["added"],
        "files": snapshot.manifest["files"],
        "served": [
            {"target": found["target"], "at": iso(found["at"])}
            for found in ledger.confirmations(snapshot.version)
        ],
    }


def resolve(store: Store, ledger: Ledger, which: str) -> Path:
    """Find the folder of `head`, `current` or a version number, accepted or refused."""
    if which == "current":
        found = snapshots.current(store)
    elif which == "head":
        head = ledger.fact("head")
        found = store.snapshots / head if head else None
    elif which.isdecimal():
        found = snapshots.by_version(store, int(which)) or next(
            (path for path in snapshots.folders(store.candidates) if snapshots.number(path) == int(which)),
            None,
        )
    else:
        raise ConfigError(f"{which!r} is no version", hint="give a number, head or current")
    if found is None or not found.exists():
        raise StreammergeError(
            f"version {which} is not on disk", hint="`streammerge history` lists the versions"
        )
    return found


def fine_tunes(ledger: Ledger) -> list[dict[str, Any]]:
    """List every fine-tune ever seen, in folding order."""
    figures = ledger.figures()
    return [fine_tune(ledger, row, figures) for row in ledger.fine_tunes()]


def fine_tune(ledger: Ledger, row: Row, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describe one fine-tune: where it stands, waiting for what, until when, with which of these figures."""
    return {
        "name": row["name"], "source": row["source"],
        "revision": row["revision"] or None, "digest": row["digest"] or None,
        "state": row["state"], "reason": row["reason"] or None,
        "version": row["version"], "detail": row["detail"] or None, "step": row["step"],
        "published_at": iso(row["published_at"]), "first_seen_at": iso(row["first_seen_at"]),
        "updated_at": iso(row["updated_at"]), "attempts": row["attempts"],
        "until": iso(row["next_try_at"]) if row["next_try_at"] and row["state"] in PENDING_STATES else None,
        "overruled": row.get("overruled", "").split(), "figures": figures.get(row["digest"], {}),
        "refused_in": refused_in(ledger, row),
    }  # fmt: skip


def match_fine_tune(rows: list[Row], name: str) -> Row:
    """Choose among rows; an ambiguous name must say its source."""
    found: list[Row] = []
    whole, _, ending = name.rpartition("@")
    for wanted, revision in ((name, ""), (whole, ending)):  # a name may hold these signs itself
        source, _, rest = wanted.partition(":")
        for plain, owner in ((wanted, ""), (rest, source)):
            found = found or [
                row
                for row in rows
                if row["name"] == plain
                and owner in ("", row["source"])
                and row["revision"].startswith(revision)
            ]
    if not found:
        raise StreammergeError(f"no fine-tune is called {name}", hint="`streammerge fine-tunes` lists them")
    if len({row["source"] for row in found}) > 1:
        sources = ", ".join(sorted({row["source"] for row in found}))
        raise StreammergeError(f"{name} is published by {sources}", hint="write SOURCE:NAME")
    return max(found, key=lambda row: row["id"])
