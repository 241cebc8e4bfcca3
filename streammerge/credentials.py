"""Secrets: read when they are needed, from a file, a systemd credential or the environment; never logged.

The configuration names where a secret lies and never holds one.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import structlog

from streammerge.errors import ConfigError

MAX_SECRET_BYTES = 4096

log = structlog.get_logger()


def read(file: Path | None, *, credential: str, variable: str = "") -> str | None:
    """Give a secret: from `file` if one is configured, else the systemd credential, else the variable.

    None where none of them is there. Raises ConfigError for a file that cannot be used. A file that others
    than its owner and group may read is used, with a warning.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    place = file or (Path(directory, credential) if directory else None)
    if file is None and (place is None or not place.is_file()):
        text = os.environ.get(variable, "").strip()
        if not (text.isascii() and text.isprintable()):
            raise ConfigError(f"{variable} is no plain text of one line", hint=f"set {variable} anew")
        return text or None
    assert place is not None
    try:
        if stat.S_IMODE(place.stat().st_mode) & stat.S_IROTH:
            log.warning("credential.readable_by_all", file=str(place), hint=f"chmod o-r {place}")
        with place.open("rb") as opened:
            text = opened.read(MAX_SECRET_BYTES + 1).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no plain text"
        raise ConfigError(
            f"{place}: the secret cannot be read: {reason}", hint="give the path of a file with one line"
        ) from exc
    if not text or len(text) > MAX_SECRET_BYTES or "\n" in text:
        raise ConfigError(f"{place}: holds no secret of one line", hint="write the secret alone into it")
    return text
