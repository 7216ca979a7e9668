"""Ends a worker whose event loop is blocked.

A blocked loop renews no lease, hears of no cancel and answers no signal: a tool of this process that never awaits, or a
library that waits for a socket in the wrong way, makes the worker a corpse that holds its slots. A thread of its own
sees it, says what blocks, and ends the process; whoever supervises it starts another, and the jobs come back by their
leases.

The thread counts its own ticks, not the clock: of a process that was stopped (SIGSTOP) or a machine that slept it was
asleep as well, so what it missed is one tick, and the loop has the whole bound again to show itself. For the same
reason it does not see a loop that is blocked inside C code that holds the interpreter's lock; nothing inside the
process does, the heartbeat that fails to come tells of it outside (`manage_workers.sh status`: stale).
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

import structlog

log = structlog.get_logger(__name__)

EXIT_CODE: Final = 70
"""Of a process that its watchdog ended: EX_SOFTWARE of sysexits.h, an internal fault. Nothing else here ends so."""
TICKS: Final = 20
"""Of a bound. With fewer a stop of the process would weigh more in the count."""
TELL_S: Final = 2.0
"""For the log to take what is said. It may be the very thing that blocks: a full pipe, or a lock of its handler."""


class Silence:
    """For how long a loop has not beaten, of the time in which there was somebody to hear it.

    Args:
        tick_s: seconds after which somebody listens again, if he is not kept from it.
        now: the monotonic second.
    """

    def __init__(self, tick_s: float, now: float) -> None:
        self._tick = tick_s
        self._last = now
        self._heard = 0
        self._seconds = 0.0

    def at(self, now: float, beats: int) -> float:
        """Seconds of silence, with `beats` counted so far."""
        passed, self._last = now - self._last, now
        if beats != self._heard:
            self._heard, self._seconds = beats, 0.0
        else:
            # What is longer than two ticks is time in which the listener did not run either.
            self._seconds += min(passed, 2 * self._tick)
        return self._seconds


class LoopWatchdog:
    """Watches the loop in which `run` runs.

    Args:
        bound_s: seconds for which the loop may be blocked.
        end: ends the process; with the exit code.
    """

    def __init__(self, bound_s: float, end: Callable[[int], object] = os._exit) -> None:
        self._bound = bound_s
        self._tick = bound_s / TICKS
        self._end = end
        self._beats = 0
        self._left = threading.Event()

    async def run(self) -> None:
        """Watch until cancelled."""
        thread = threading.Thread(
            target=self._watch, args=(threading.get_ident(),), name="toolfleet-loop-watchdog", daemon=True
        )
        thread.start()
        try:
            while True:
                self._beats += 1
                await asyncio.sleep(self._tick)
        finally:
            self._left.set()

    def _watch(self, loop_thread: int) -> None:
        silence = Silence(self._tick, time.monotonic())
        while not self._left.wait(self._tick):
            seconds = silence.at(time.monotonic(), self._beats)
            if seconds >= self._bound:
                self._tell(loop_thread, seconds)
                self._end(EXIT_CODE)
                return

    def _tell(self, loop_thread: int, silent: float) -> None:
        frame = sys._current_frames().get(loop_thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "its thread has ended"
        teller = threading.Thread(target=_say, args=(silent, stack), name="toolfleet-loop-blocked", daemon=True)
        teller.start()
        teller.join(TELL_S)


def _say(silent: float, stack: str) -> None:
    log.critical(
        "worker.loop_blocked",
        seconds=round(silent, 1),
        stack=stack,
        exit_code=EXIT_CODE,
        hint="this process ends and its jobs come back by their leases; what blocks stands at the end of the stack: "
        "it must await, or run in a thread or a process of its own",
    )
