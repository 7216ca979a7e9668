"""Progress notifications, recognised before they are parsed, and thinned out where they come as a flood.

Parsing one notification with the SDK costs a worker about 0.1 ms of its event loop, so that a tool which reports as
fast as it can would stop every other job of the worker. Here a notification is known by its first bytes, which costs
about a microsecond. A call's first notifications of an interval are told one by one; of those beyond, the last one is
kept, and told with the count of the others when the interval ends or the call's answer comes: the last state is never
lost. What is not recognised, for its order of keys, say, takes the SDK's way.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from toolfleet.services.background_jobs.ports import ProgressSink

INTERVAL_S: Final = 0.1
"""Half of the time between two events of a call, `progress_interval`: a shorter one would be thinned out there."""
ONE_BY_ONE: Final = 20
"""Notifications of a call in an interval that are all told; 200 a second are more than anybody can read."""
REST_SHARE: Final = 20.0
"""A flooding server is not listened to for this many times the CPU time that its flood has taken, so it has at most a
twentieth of the worker. Meanwhile it blocks in its writes, which leaves its own CPU to others too."""
LONGEST_REST_S: Final = 0.05
"""What the answers of other calls in the same pipe may wait."""

_PROGRESS: Final = re.compile(
    rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"method"\s*:\s*"notifications/(?:progress|(message))"\s*,\s*"params"\s*:'
)
_TOKEN: Final = re.compile(rb'"progressToken"\s*:\s*(\d{1,15})\s*[,}]')
"""Inside a JSON string the quotes would be escaped, so this is a key; where there are several, none is taken."""


def is_log_message(line: bytes) -> bool:
    """Whether a message is a `notifications/message`: a log line for a person at a client, which nobody is here."""
    found = _PROGRESS.match(line)
    return found is not None and found.group(1) is not None


def progress_token(line: bytes) -> int | None:
    """The token of a message that is surely a progress notification of one of our requests, else None."""
    found = _PROGRESS.match(line)
    if found is None or found.group(1) is not None:
        return None
    tokens = _TOKEN.findall(line)
    return int(tokens[0]) if len(tokens) == 1 else None


class ProgressGate:
    """The progress of one call, from its transport to its sink. A context manager: nothing is told after it.

    Args:
        sink: told ``(progress, total, message)``, and as a fourth how many notifications were left out before.
    """

    def __init__(self, sink: ProgressSink) -> None:
        self._sink = sink
        self._last: bytes | None = None
        self._dropped = 0
        self._told = 0
        self._interval_end = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._on_close: list[Callable[[], object]] = []

    @property
    def closed(self) -> bool:
        """Whether nobody listens any more."""
        return self._closed

    def on_close(self, callback: Callable[[], object]) -> None:
        """Called once nobody listens any more."""
        self._on_close.append(callback)

    def offer(self, line: bytes) -> bool:
        """Take a progress notification of this call; whether it belongs to a flood, and was not told at once."""
        if self._closed:
            return True
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now >= self._interval_end:
            self._interval_end, self._told = now + INTERVAL_S, 0
        if self._last is None and self._told < ONE_BY_ONE:
            self._told += 1
            self._tell(line)
            return False
        if self._last is not None:
            self._dropped += 1
        self._last = line
        if self._timer is None:
            self._timer = loop.call_at(self._interval_end, self.flush)
        return True

    def flush(self) -> None:
        """Tell the last state, if it waits; done too before the call's answer is passed on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        line, self._last = self._last, None
        if line is not None and not self._closed:
            self._told = ONE_BY_ONE
            self._interval_end = asyncio.get_running_loop().time() + INTERVAL_S
            self._tell(line)

    def _tell(self, line: bytes) -> None:
        state = _state_of(line)
        if state is None:
            self._dropped += 1
        elif self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._sink(*state, dropped)
        else:
            self._sink(*state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        self.flush()
        self._closed = True
        for callback in self._on_close:
            callback()
        self._on_close.clear()


def _state_of(line: bytes) -> tuple[float, float | None, str | None] | None:
    """Progress, total and message; None where it is no valid notification. A number above a double's range is infinite,
    and what is said of such numbers is decided where all progress passes (`attempt_log`)."""
    try:
        params: Any = json.loads(line)["params"]
        progress, total, message = params["progress"], params.get("total"), params.get("message")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    number = _number(progress)
    if number is None:
        return None
    return number, _number(total), message if isinstance(message, str) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


class Pace:
    """How long a reader rests after a piece of a flood, by the CPU time that the piece took it."""

    def __init__(self) -> None:
        self._owed = 0.0

    @staticmethod
    def clock() -> float:
        """CPU seconds of this thread: waiting for the processor is not the flood's work."""
        return time.thread_time()

    def spent(self, seconds: float) -> None:
        """Note CPU time that a flood took."""
        self._owed += seconds * REST_SHARE

    def rest(self) -> float:
        """Seconds to rest now; 0 where too little is owed to be worth a timer."""
        if self._owed < LONGEST_REST_S / 10:
            return 0.0
        owed, self._owed = min(self._owed, LONGEST_REST_S), 0.0
        return owed
