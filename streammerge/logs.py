"""Logs: one JSON object a line, or readable lines on a terminal.

Events are dotted constants in the past tense; facts are keys with units. Standard library loggers go through
the same door, so that stderr stays one format. docs/operate.md explains each.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

SECRET = re.compile(
    r"(?i)((?-i:hf_)[a-z0-9]{8,}|whsec_[a-z0-9+/=]{8,}|bearer\s+\S+|(?<=[?&])(?:token|signature|x-amz-[a-z-]+)=[^&\s]+)"
)


def configure(*, level: str = "info", json_lines: bool | None = None) -> None:
    """Route structlog and the standard library to stderr; JSON unless stderr is a terminal."""
    json_lines = not sys.stderr.isatty() if json_lines is None else json_lines
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        redact,
    ]
    if json_lines:
        # Files and lines only: the values of variables may be anything, secrets included.
        transform = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared.append(structlog.processors.ExceptionRenderer(transform))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=False,
    )
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer()
    )
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.captureWarnings(capture=True)
    root = logging.getLogger()
    root.handlers[:] = [out]
    root.setLevel(level.upper())
    for noisy in ("apscheduler", "watchdog", "uvicorn", "uvicorn.access", "uvicorn.error", "httpx", "httpx2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def redact(_logger: object, _name: str, event: MutableMapping[str, object]) -> MutableMapping[str, object]:
    """Blank tokens, webhook secrets and signed URLs wherever they stand in a line."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = SECRET.sub("[redacted]", value)
    return event
