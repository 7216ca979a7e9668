"""The jobs of a run, by its seed."""

from __future__ import annotations

import random
from typing import Any, Final

_SHAPES: Final = {
    ("note",): 40,
    ("once_note",): 20,
    ("nap",): 15,
    ("once_nap",): 10,
    ("note", "once_nap"): 10,
    ("fail",): 5,
}
"""Calls of a job, and how many of 100 jobs have them."""
_DELAYED: Final = 0.15
"""Part of the jobs that are to start a moment later, so that some wait at the cut."""


class Plan:
    """Request bodies one after the other; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self) -> dict[str, Any]:
        """The body of the next `POST /api/v1/jobs`."""
        (tools,) = self._random.choices(list(_SHAPES), list(_SHAPES.values()))
        seconds = round(self._random.uniform(0.02, 4), 3)
        body: dict[str, Any] = {
            "tools": [
                {"tool_name": tool, "tool_args": {"seconds": seconds}, "tool_call_id": f"c{number}"}
                for number, tool in enumerate(tools, 1)
            ],
            "max_retries": 0 if "fail" in tools else 2,
        }
        if self._random.random() < _DELAYED:
            body["delay_seconds"] = round(self._random.uniform(0.2, 8), 1)
        return body

    def choice(self, jobs: list[str]) -> str:
        """One of the jobs so far, for a client that looks at it or cancels it."""
        return self._random.choice(jobs)

    def cancels(self) -> bool:
        """Whether that client cancels it: one of fifty does."""
        return self._random.random() < 0.02
