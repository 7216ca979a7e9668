"""Garbage collection for processes that live long and make many short-lived objects."""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (20_000, 20, 20)
"""Allocations before a young collection, then collections before the older generations. Python's default of 700 (2,000
from 3.13 on) collects several times in each batch of jobs: by `make bench` it took a fifth of a worker's time."""


def settle() -> None:
    """Call once, when everything that stays is there: what is frozen is not walked again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
