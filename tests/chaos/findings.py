"""What an audit found wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One breach of a promise."""

    figure: str
    """The figure that it counts in."""
    promise: str
    job_id: str
    """Empty where it is not one job's."""
    text: str


Checked = tuple[list[Finding], Counter[str]]
"""What a check found, and how often it looked at each promise."""
