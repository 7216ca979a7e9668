"""What is known of one request on the wire: whether a server may have seen it, how it broke, how far a cancel got.

The SDK reports every failure as an error with a code, and the same code for 'refused to connect' and 'broke after
sending'. Whether a call may run again hangs on that difference, so the transports note what they see in an
`Exchange`. It travels in a context variable: the SDK carries the context of the sender into the task that does the
sending, and no parameter of its interface reaches that far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio

from toolfleet.services.tool_execution.progress_gate import ProgressGate

TOO_LARGE_CODE = -32090
"""JSON-RPC error code with which a transport resolves a request whose answer was above the limit; of the range that
the specification leaves to implementations (-32000 to -32099), and never sent over a wire."""
UNREADABLE_CODE = -32091
"""The same for a request whose answer is no JSON-RPC message, such as one with invalid UTF-8."""
NO_PROBE_ANSWER_CODE = -32092
"""The same for the question that older servers leave without an answer: what comes before the handshake."""


@dataclass(frozen=True, slots=True)
class NotSent:
    """No byte of the request reached the server."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The connection broke after the request was, or may have been, sent."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The server answered with an HTTP status of 400 or above."""

    status: int


@dataclass(frozen=True, slots=True)
class Oversized:
    """The answer was above the limit; at least `size` bytes."""

    size: int


Fault = NotSent | Broken | Refused | Oversized


class Exchange:
    """One request on the wire, as its transport saw it."""

    def __init__(self, *, closing_tells: bool = False) -> None:
        """`closing_tells`: to close the stream of the answer is how this protocol takes a request back."""
        self.sent = False
        """Whether the server may have seen the request. Once it is abandoned this no longer changes."""
        self.told: bool | None = None
        """Whether the server has been told that the request is taken back; None while that is not known."""
        self.over = False
        """Whether the server is surely done with the request: it gave the result, closed the stream of the answer, or
        ended. An error is not taken for that: widely used servers answer a cancel with it before their tool stops."""
        self.silent = False
        """Whether nothing can be heard of the request any more."""
        self.fault: Fault | None = None
        self.progress: ProgressGate | None = None
        """Where the progress of a call goes; None for requests that have none."""
        self.token: int | None = None
        """The progress token of a call over HTTP, which is its JSON-RPC id, once it has been sent."""
        self._closing_tells = closing_tells
        self._news = asyncio.Event()
        self._abandoned = False
        self._scope: anyio.CancelScope | None = None

    def asks(self) -> None:
        """A request is about to be sent, perhaps another one than before.

        Raises:
            OSError: it was taken back; nothing may be sent any more.
        """
        if self._abandoned:
            raise OSError("the request was taken back before it was sent")
        self.sent, self.told, self.over, self.silent = True, None, False, False

    def server_told(self, told: bool) -> None:
        """The server has taken word of the cancel, or can't be told."""
        self.told = told
        self._news.set()

    def server_done(self) -> None:
        """The server does nothing more for the request."""
        self.over = True
        self._news.set()

    def answered(self, *, result: bool) -> None:
        """The server has answered, with a result or with an error."""
        self.silent = True
        if result:
            self.over = True
        self._news.set()

    def closed(self) -> None:
        """We have closed the stream of the answer."""
        self.silent = True
        if self._closing_tells and self.sent and not self.over:
            self.told = True
        self._news.set()

    async def until_told(self, seconds: float) -> None:
        """Wait until it is known whether the server was told, or is done."""
        await self._until(lambda: self.told is not None or self.over, seconds)

    async def until_over(self, seconds: float) -> None:
        """Wait until the server is done with the request, where that can be heard of."""
        await self._until(lambda: self.over or self.silent, seconds)

    async def _until(self, known: Callable[[], bool], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not known():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._abandoned

    def abandon(self) -> None:
        """Stop waiting on the wire, so that an answer that never comes does not hold a connection for ever."""
        self._abandoned = True
        if self._scope is not None:
            self._scope.cancel()

    @contextmanager
    def waiting(self) -> Iterator[anyio.CancelScope]:
        """A wait that `abandon` ends."""
        with anyio.CancelScope() as scope:
            outer, self._scope = self._scope, scope
            if self._abandoned:
                scope.cancel()
            try:
                yield scope
            finally:
                self._scope = outer

    async def trace(self, name: str, _info: dict[str, Any]) -> None:
        """httpcore's `trace` extension: the one place that tells when the first byte of a request is written."""
        if name.endswith(".send_request_headers.started"):
            self.asks()


_current: ContextVar[Exchange | None] = ContextVar("toolfleet_mcp_exchange", default=None)


def current_exchange() -> Exchange | None:
    """The exchange of the request that this context belongs to."""
    return _current.get()


def use_exchange(exchange: Exchange) -> None:
    """Make it the current one for this context and the tasks started from it."""
    _current.set(exchange)
