"""Requests on a session, each in a task of its own, so that one can be taken back while the others go on.

A request that nobody waits for any more is cancelled: the SDK then tells the server in the way of its protocol version
(`notifications/cancelled`, or closing the stream of a 2026-07-28 HTTP request).
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from toolfleet.services.background_jobs.transitions import CallStop
from toolfleet.services.tool_execution.exchange import Exchange, use_exchange

_T = TypeVar("_T")

_TELL_S: Final = 0.5
"""For telling a server that a request is taken back. Over HTTP it goes on beside this for a while."""
_SHOW_S: Final = 0.1
"""After that, for the server to show that it has stopped. Many never do, and the protocol does not ask it of them; with
`_TELL_S` it stays below the time in which an attempt has to know (`attempt.CANCEL_GRACE_S`)."""


class RequestTasks:
    """The requests that are on their way on one session."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        request: Coroutine[Any, Any, _T],
        exchange: Exchange,
        timeout: float,
        on_stop: Callable[[CallStop], None] = lambda _: None,
    ) -> _T:
        """Run a request; take it back on time-out (seconds) and on cancellation, telling the server, and where it was
        cancelled telling `on_stop` how far that got.

        Raises:
            TimeoutError: no answer in time; what the request raises.
        """
        context = contextvars.copy_context()
        context.run(use_exchange, exchange)
        task = asyncio.create_task(request, name="mcp-request", context=context)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait({task}, timeout=timeout)
            if task.done():
                return task.result()
        except asyncio.CancelledError:
            try:
                await _take_back(task, exchange)
                if exchange.told:
                    await exchange.until_over(_SHOW_S)
            finally:
                exchange.abandon()
                on_stop(_how_far(task, exchange))
            raise
        try:
            await _take_back(task, exchange)
        finally:
            exchange.abandon()
        if task.done() and not task.cancelled():
            return task.result()  # the answer came while the request was being taken back
        raise TimeoutError

    async def none(self) -> None:
        """Wait until no request is on its way."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report what nobody waits for any more


async def _take_back(task: asyncio.Task[Any], exchange: Exchange) -> None:
    """A server that does not even take the cancel must not hold the worker's slot."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _TELL_S
    task.cancel()
    await asyncio.wait({task}, timeout=_TELL_S)
    if exchange.sent:
        await exchange.until_told(max(0.0, until - loop.time()))


def _how_far(task: asyncio.Task[Any], exchange: Exchange) -> CallStop:
    """Of an exchange that is abandoned, so that what was not sent never will be."""
    if not exchange.sent:
        return CallStop.NOT_SENT
    answered = task.done() and not task.cancelled() and task.exception() is None
    if answered or exchange.over:
        return CallStop.STOPPED
    return CallStop.TOLD if exchange.told else CallStop.NOT_TOLD
