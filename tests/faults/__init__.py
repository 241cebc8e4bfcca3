"""Faults made on purpose, against the real daemon: kills, failing disks, hostile bytes, months of arrivals.

Each module answers one question by `measure(work, scale)`, which raises nothing that the product did: what
it found wrong is in `Findings.differences`. `python -m faults` runs them all and writes a dated report; the
tests run the same functions at a scale that fits among the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """What one question's answer is made of.

    question     as a reader of the report would ask it
    figures      (what was counted or measured, its value with its unit), in the order of the report
    differences  everything that was not as promised, one sentence each; empty is what we want
    notes        what a reader should know before believing the figures
    """

    question: str
    figures: list[tuple[str, str]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
