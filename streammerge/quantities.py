"""Durations and sizes as people write them: "5m", "20GiB"; as types of the configuration."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

MAX_CHARACTERS = 100
LONGEST_SECONDS = 100 * 365.25 * 86400
LARGEST_SIZE = 1 << 60
UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
UNIT_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_duration(value: object) -> float:
    """Read "30s", "5m", "1h30m" or a number of seconds."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    else:
        text = _short(value)
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw])", text)
        if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw])", "", text).strip():
            raise ValueError(f"{value!r} is no duration; write for example 30s, 5m or 24h")
        seconds = sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts)
    if not 0 <= seconds <= LONGEST_SECONDS:
        raise ValueError("a duration cannot be negative, or longer than 100 years")
    return float(seconds)


def parse_size(value: object) -> int:
    """Read "20GiB", "500 MB" or a number of bytes."""
    text = _short(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", text, re.IGNORECASE | re.ASCII)
    if isinstance(value, bool) or not match:
        raise ValueError(f"{value!r} is no size; write for example 20GiB or 500MB")
    size = float(match[1]) * UNIT_BYTES[(match[2] or "B").upper()]
    if size > LARGEST_SIZE:
        raise ValueError(f"{text!r} is more than any disk has")
    return int(size)


def _short(value: object) -> str:
    text = str(value)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{text[:20]}… is too long for a number and its unit")
    return text


def write_duration(seconds: float) -> str:
    """Write seconds as the shortest text that reads back the same."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % length == 0:
            return f"{int(seconds / length)}{unit}"
    return f"{seconds:g}s"


def write_size(size: int) -> str:
    """Write bytes as the largest binary unit that reads back the same."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % UNIT_BYTES[unit.upper()] == 0:
            return f"{size // UNIT_BYTES[unit.upper()]}{unit}"
    return f"{size}B"


Duration = Annotated[
    float,
    BeforeValidator(parse_duration, json_schema_input_type=str | float),
    PlainSerializer(write_duration, return_type=str),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=str | int),
    PlainSerializer(write_size, return_type=str),
]
