"""What is known of one request on the wire: whether a server may have seen it, and how it broke.

The SDK reports every failure as an error with a code, and the same code for 'refused to connect' and 'broke after
sending'. Whether a call may run again hangs on that difference, so the transports note what they see in an
`Exchange`. It travels in a context variable: the SDK carries the context of the sender into the task that does the
sending, and no parameter of its interface reaches that far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio

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

    def __init__(self) -> None:
        self.sent = False
        """Whether the server may have seen the request."""
        self.fault: Fault | None = None
        self._abandoned = False
        self._scope: anyio.CancelScope | None = None

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
            self.sent = True


_current: ContextVar[Exchange | None] = ContextVar("toolfleet_mcp_exchange", default=None)


def current_exchange() -> Exchange | None:
    """The exchange of the request that this context belongs to."""
    return _current.get()


def use_exchange(exchange: Exchange) -> None:
    """Make it the current one for this context and the tasks started from it."""
    _current.set(exchange)
