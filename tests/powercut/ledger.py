"""What clients, workers and tools have seen, in files outside of the device: JSON lines in the order of their times."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

What = Literal["accepted", "seen", "result", "effect"]
"""``accepted``: a client has its 202. ``seen``: a client was told that a job is over, or a worker has the answer to
its finish. ``result``: a worker has the answer to the write of a call's result. ``effect``: a tool was run."""

Note = Mapping[str, Any]
"""``what`` and ``at`` (monotonic ns, one clock for all processes of the machine), ``job``; and ``call`` and ``text`` of
a result, ``call`` and ``once`` of an effect, ``status`` of an end, ``by`` where two may see the same."""


class Ledger:
    """One process's file. No fsync: the driver's own machine keeps its power, and a killed process's page cache
    stays."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, what: What, job: str, **more: object) -> None:
        """One line, written before this returns."""
        line = {"at": time.monotonic_ns(), "what": what, "job": job, **more}
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read_ledgers(folder: Path) -> list[Note]:
    """All lines of all processes, by time."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda note: int(note["at"]))
