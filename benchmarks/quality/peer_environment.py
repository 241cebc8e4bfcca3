"""The environment in which the peer runs: mergekit, which is under the LGPL, apart from everything of ours.

Made once, with pip, and kept in the benchmark's cache: 1.6 GB, about a minute.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tier import kept

if TYPE_CHECKING:
    from pathlib import Path

REQUIRES = ("torch==2.13.0", "mergekit==0.1.5")


def environment() -> Path:
    """A virtual environment with the peer in it; its Python works wherever the folder is moved."""
    return kept("peer", {"requires": REQUIRES, "python": sys.version_info[:2]}, _install)


def _install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.run([*pip, "install", *REQUIRES], check=True)
