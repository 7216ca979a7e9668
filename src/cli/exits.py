"""Exit codes, and the error that ends a command with one line on stderr.

| code | meaning |
|---|---|
| 0 | done; of a watched job: completed |
| 1 | failed; of a watched job: failed; of `doctor`: something is wrong |
| 2 | usage: the command line, or the job it asks for, is not valid |
| 3 | a watched job was cancelled |
| 4 | a job that is watched, or whose result is asked for, is unknown: decide its calls (`toolfleet resolve`) |
| 69 | the jobs API can't be reached (EX_UNAVAILABLE of sysexits.h) |
| 70 | of a worker: its event loop was blocked and it ended itself (EX_SOFTWARE); `loop_watchdog` |
| 75 | not now, try again later: the API said 429 or 503, or a job still runs (EX_TEMPFAIL) |
| 130 | Ctrl-C; 143 SIGTERM, 129 SIGHUP |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
CANCELLED: Final = 3
UNKNOWN: Final = 4
UNREACHABLE: Final = 69
TRY_AGAIN: Final = 75
SIGNAL_BASE: Final = 128
"""A process that a signal ends has this plus the signal's number, as shells have it."""
INTERRUPTED: Final = 130

_OF_STATUS: Final = {"completed": OK, "failed": FAILED, "cancelled": CANCELLED, "unknown": UNKNOWN}


def exit_code_of(status: str) -> int:
    """Of a job that has ended, by its status; 1 for a status that this program does not know."""
    return _OF_STATUS.get(status, FAILED)


class CliError(Exception):
    """Ends the command: the message becomes one line on stderr, and `document` the answer on stdout with `--json`."""

    def __init__(self, message: str, code: int = FAILED, *, document: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.document = document
