"""The commands a person types: parse, call one function, print.

Heavy imports happen inside the command that needs them: `status` and its like never import torch.
"""

from __future__ import annotations

import os
import sys

from streammerge.cli import running, reading, changing, trying  # isort: skip -- the order of --help
from streammerge import allocator, machine
from streammerge.cli.console import app, report
from streammerge.errors import StreammergeError

__all__ = ["changing", "main", "reading", "running", "trying"]  # importing them registers their commands


def main() -> None:
    """Run the command line; every expected error ends with its message, its hint and its exit code."""
    allocator.begin()
    try:
        with machine.errors("working"):
            app()
    except StreammergeError as exc:
        report(exc)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
